"""The benchmark on a CPU: every part runs, both sides agree, and no ratio is reported where they do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from torch_impl import packed
from torch_impl.bench import __main__ as bench
from torch_impl.bench import checks, decode, decode_cpu, int4, large, parts, reconstruct, whole, whole_cpu
from torch_impl.bench.measure import Row, relative
from torch_impl.decode.next_token import NextToken
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine import batches
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import geometry
from torch_impl.quantise import dequantise_rows


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    status = bench.main(["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "bench.json"), *arguments])
    return status, json.loads((tmp_path / "bench.json").read_text())


def block_weights(name: str) -> int:
    """Count the weights of a block's projections."""
    shape = geometry.GEOMETRIES[name]
    hidden, heads, groups = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    return 2 * hidden * (hidden + hidden * groups // heads) + 3 * hidden * shape["intermediate_size"]


def test_every_part_runs_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures = run(tmp_path, "--geometry", "small", "--dtype", "float32", "--sequences", "8", "--length", "64")
    assert status == 0
    assert len(figures["rows"]) == 13
    for row in figures["rows"]:
        assert row["ours_ms"] > 0
        if "KL" in row["part"] or "reconstruction" in row["part"]:
            continue
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert 0 <= row["disagreement"] <= row["bound"]
    # Each prunable weight takes two operations a token in a forward pass, and four in a backward one.
    weights = block_weights("small") * geometry.GEOMETRIES["small"]["num_hidden_layers"]
    for part, operations in (("mutual information, 4 × 64", 2 * 4 * 64), ("training micro-batch, 4 × 32", 6 * 4 * 32)):
        measured = [row for row in figures["rows"] if row["part"].startswith(part) and "KL" not in row["part"]]
        assert measured
        for row in measured:
            assert row["tflops"] == pytest.approx(operations * weights / row["ours_ms"] * 1e3 / 1e12)
    shown = capsys.readouterr().out
    assert "limits measured now" in shown
    assert "training micro-batch, 4 of 8 to 32, merged weight held" in shown
    assert "refused" not in shown
    assert [row["geometry"] for row in figures["stream"] + figures["scale"]] == ["small", "small", "medium"]
    smaller, larger = figures["scale"]
    for row in figures["stream"] + figures["scale"]:
        assert row["pruning sweep, s a block"] > 0
        assert row["bytes of a block"] == 4 * row["parameters of a block"]
    assert larger["device peak, GB"] > smaller["device peak, GB"]
    for row in figures["plan"]:
        # On the CPU the blocks that another thread reads are not measured.
        assert row["foretold / measured"] == pytest.approx(row["foretold, GB"] / row["measured, GB"])
        assert 0.8 < row["foretold / measured"] < (2.0 if "block by block" in row["case"] else 1.25), row


def test_jobs_of_the_plan_are_short_and_hide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Config] = []

    def job(config: Config, folder: Path) -> torch.Tensor:
        if len(jobs) == 2:
            raise FloatingPointError("the third job")
        jobs.append(config)
        print(f"warning {len(jobs)}", file=sys.stderr)
        return torch.ones(1000)

    monkeypatch.setattr(large, "run_in_memory", job)
    monkeypatch.setattr(large, "run_offloaded", job)
    assert bench.main(["--device", "cpu", "--parts", "plan", "--geometry", "small", "--sequences", "100"]) == 2
    shown = capsys.readouterr()
    assert "error: the third job" in shown.err
    assert [config.calibration.nsamples for config in jobs] == [32, 32]
    assert [line.partition(";")[0] for line in shown.out.splitlines() if line.startswith("case ")] == [
        "case plain, wanda",
        "case plain, sparsegpt",
    ]
    assert "block by block, wanda …" in shown.err
    assert "warning 2" in shown.err


def test_a_side_that_gives_other_numbers_gets_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "FLOAT32_BOUND", 0.0)
    status, figures = run(tmp_path, "--parts", "train", "--train_lengths", "8", "--blocks", "1")
    assert status == 1
    assert all(row["ratio"] is None for row in figures["rows"])
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize("accumulation", [1, 2])
def test_times_of_training_are_of_a_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """A step merges once and has the requested number of micro-batches of four sequences."""
    sizes = []
    of = Gradients.of

    def counted(self: Gradients, batch: Sequence[batches.Example]) -> float:
        sizes.append((len(batch), self.micro_batch_size))
        return of(self, batch)

    def timed(sides: Sequence[Callable[[], float]], *_: Any, **__: Any) -> list[tuple[float, float, list[float]]]:
        for side in sides:
            side()
        return [(100.0, 0.0, []), (300.0, 0.0, [])]

    monkeypatch.setattr(Gradients, "of", counted)
    monkeypatch.setattr(parts, "alternate", timed)
    options = ["--parts", "train", "--train_lengths", "8", "--blocks", "1", "--accumulation", str(accumulation)]
    rows = run(tmp_path, *options)[1]["rows"]
    assert {(row["ours_ms"], row["plain_ms"]) for row in rows} == {(100 / accumulation, 300 / accumulation)}
    assert set(sizes[-2 * len(rows) :]) == {(4 * accumulation, 4)}


def test_kl_is_measured_beside_cross_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []

    def timed(sides: Sequence[Callable[[], float]], *_: Any, **__: Any) -> list[tuple[float, float, list[float]]]:
        losses.extend(side() for side in sides)
        return [(300.0, 0.0, []), (200.0, 0.0, [])]

    monkeypatch.setattr(parts, "alternate", timed)
    rows = run(tmp_path, "--parts", "kl", "--train_lengths", "8", "--blocks", "1", "--accumulation", "2")[1]["rows"]
    assert [row["ours_ms"] for row in rows] == [150.0, 150.0]
    assert all(row["part"].endswith("KL, 1.50 × cross-entropy") for row in rows)
    # Random predictions over 512 tokens: about log 512 nats, and far less from one model to another.
    assert all(ce > 5 > kl > 0 for kl, ce in zip(losses[::2], losses[1::2], strict=True))


def test_reconstruction_of_a_block_is_timed_and_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(action: Callable[[], Any], _: torch.device) -> tuple[float, float, Any]:
        return 1000.0, 0.0, action()

    monkeypatch.setattr(reconstruct, "once", timed)
    options = ["--parts", "reconstruct", "--sequences", "9", "--length", "16", "--reconstruct_epochs", "2", "--profile"]
    [row] = run(tmp_path, *options, "--geometry", "small", "--dtype", "float32")[1]["rows"]
    assert row["part"] == "reconstruction, 2 × 9 × 16, compiled: off"
    # The MLP's weights and o in three products; q of 128 × 128, k and v of 64 × 128 in two.
    products = 3 * (128 * 128 + 3 * 128 * 352) + 2 * (128 * 128 + 2 * 64 * 128)
    assert row["tflops"] == pytest.approx(2 * products * 9 * 16 * 2 / 1e12)
    kernels = capsys.readouterr().out.partition(row["part"])[2]
    assert "aten::mm\n" in kernels
    assert "in all, for 144 tokens" in kernels
    lines = row["kernels"].splitlines()
    amounts = {line.split("  ")[-1]: int(line.split(" µs")[0].replace(",", "")) for line in lines}
    kinds = [amounts[kind] for kind in ("products", "attention", "others")]
    assert min(kinds) > 0
    assert sum(kinds) == pytest.approx(amounts["in all, for 144 tokens"], abs=3)


def test_a_compressed_base_is_held_to_the_dense_one_with_its_values(tmp_path: Path) -> None:
    options = [
        "--parts",
        "base",
        "--train_lengths",
        "16",
        "--geometry",
        "small",
        "--blocks",
        "1",
        "--dtype",
        "bfloat16",
    ]
    packed, int8 = run(tmp_path, *options)[1]["rows"]
    assert (packed["disagreement"], int8["disagreement"]) == (0, 0)
    assert packed["plain_gib"] == int8["plain_gib"] > packed["ours_gib"] > int8["ours_gib"]
    # Forward twice, as activations are checkpointed, and backward once: eight operations for each weight and token.
    operations = 8 * 2 * 16 * block_weights("small")
    assert [row["tflops"] * row["ours_ms"] * 1e9 for row in (packed, int8)] == pytest.approx([operations] * 2)
    assert packed["notes"][0].endswith("0.0e+00")
    assert 1e-3 < float(int8["notes"][0].split()[-1]) < 0.1
    # 70 % zeros: bitmap 1, offsets 64 a row, and 0.3 of 16 or 8 bits; a scale of 16 bits for every 128 columns.
    found = [float(row["notes"][1].split()[0]) for row in (packed, int8)]
    assert found == pytest.approx([1 + 64 / 256 + 4.8, 1 + 64 / 256 + 2.4 + 0.125], abs=0.4)


def test_a_whole_run_is_the_sum_of_its_parts() -> None:
    agreed = {"disagreement": 0.0, "bound": 1.0}
    rows = [
        Row("mutual information, 4 × 64", 6000.0, 12000.0, **agreed),
        Row("masks and error, wanda, 8 × 64", 18000.0, 24000.0, **agreed),
        Row("training micro-batch, 4 × 32, merged weight held", 120.0, 240.0, **agreed),
        Row("training micro-batch, 4 × 64, merged weight held", 240.0, 480.0, disagreement=2.0, bound=1.0),
    ]
    assert bench.whole_runs(rows) == {
        "wanda, 4 × 32, merged weight held": (7.0, 13.0),
        "wanda, 4 × 64, merged weight held": (12.0, None),
    }
    assert bench.whole_runs(rows[1:]) == bench.whole_runs(rows[:2]) == {}


def test_ours_alone_claims_nothing(tmp_path: Path) -> None:
    status, figures = run(tmp_path, "--parts", "rmi", "--ours_only")
    assert status == 0
    assert figures["rows"][0]["plain_ms"] is None


def test_a_ratio_needs_agreement() -> None:
    assert Row("", 1.0, 2.0, disagreement=1e-3, bound=1e-2).ratio == 2.0
    assert Row("", 1.0, 2.0, disagreement=1e-1, bound=1e-2).ratio is None
    assert Row("", 1.0, 2.0, disagreement=float("nan"), bound=1e-2).ratio is None
    assert Row("", 1.0, 2.0).ratio is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--geometry word", "argument --geometry: invalid choice: 'word'"),
        ("--length word", "argument --length: invalid int value: 'word'; see --help"),
        ("--repeat 1", "--repeat is not an option; did you mean --repeats?"),
        ("--blocks 0", "blocks is 0; allowed: 1 or more"),
        ("--sequences 3", "sequences is 3; allowed: 4 or more"),
        ("--length 1", "length is 1; allowed: 2 or more"),
        ("--train_lengths 32 7", "train_lengths is 7; allowed: 8 or more"),
        ("--accumulation 0", "accumulation is 0; allowed: 1 or more"),
        ("--reconstruct_epochs -1", "reconstruct_epochs is -1; allowed: 0 or more"),
        ("--repeats 0", "repeats is 0; allowed: 1 or more"),
        ("--device word", "device is 'word'; allowed: auto, cpu, cuda"),
        ("--json no/such/file", "json is no/such/file, and there is no folder no/such; make it first"),
        ("--json .", "json is ., which is a folder; name a file"),
        ("decode --batches 9", "argument --batches: invalid choice: 9"),
        ("decode --word 1", "--word is not an option; see --help"),
        ("decode --sparsities 50 100", "sparsities has '100'; allowed: percentages from 0 to below 100, and N:M"),
        ("decode --sparsities nan", "sparsities has 'nan'; allowed"),
        ("decode --sparsities 4:2", "sparsities has '4:2'; allowed"),
        ("decode --sparsities 0:4", "sparsities has '0:4'; allowed"),
        ("decode --blocks 0", "blocks is 0; allowed: 1 or more"),
        ("decode --repeats 0", "repeats is 0; allowed: 1 or more"),
        ("decode --adapters 0", "adapters is 0; allowed: 1 or more"),
        ("decode --adapters 8", "adapters is 8 and has no effect without --whole_model"),
        ("decode --blocks 2", "blocks is 2 and has no effect without --whole_model"),
        ("decode --tokens 1", "tokens is 1; allowed: 2 or more"),
        ("decode --tokens 252", "tokens is 252; allowed: at most 251"),
        ("decode --prompt 0", "prompt is 0; allowed: 1 or more"),
        ("decode --device word", "device is 'word'; allowed: auto, cpu, cuda"),
        ("decode --json no/such/file", "json is no/such/file, and there is no folder no/such"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_any_work(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((bench, "ceilings"), (decode, "ceilings"), (decode_cpu, "read_rate")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it works"))
    assert bench.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("module", "check"), [(bench, checks.check), (decode, checks.check_decode)])
def test_the_device_is_chosen_by_itself(
    module: Any, check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = module._parser().parse_args(["--device", "auto"])
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        options.device = "auto"
        check(options)
        assert torch.device(options.device).type == expected


@pytest.mark.usefixtures("few_copies")
def test_the_most_tokens_fit_into_the_cache(tmp_path: Path) -> None:
    options = ("--geometries", "--whole_model", "small", "--blocks", "1", "--tokens", "251", "--batches", "1")
    assert len(run_decode(tmp_path, *options)[1]["whole_model"]) == 1


@pytest.fixture
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of each weight: what is timed does not matter here."""
    monkeypatch.setattr(decode_cpu, "STREAM", 1000)


def run_decode(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    short = ["--sparsities", "50", "2:4", "--batches", "1", "3", "--repeats", "1", "--tokens", "2"]
    where = ["--device", "cpu", "--json", str(tmp_path / "decode.json")]
    status = bench.main(["decode", *short, *where, *arguments])
    return status, json.loads((tmp_path / "decode.json").read_text())


@pytest.mark.usefixtures("few_copies")
def test_decoding_runs_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures = run_decode(
        tmp_path, "--geometries", "small", "--whole_model", "small", "--blocks", "1", "--adapters", "2"
    )
    assert status == 0
    assert len(figures["kernels"]) == 4 * 2 * 2
    for cell in figures["kernels"]:
        assert cell["ratio"] == pytest.approx(cell["dense_us"] / cell["ours_us"])
        assert 0 <= cell["disagreement"] <= cell["bound"]
        # The small model's rows of 352 are no whole number of groups.
        assert (cell["int4_us"] is None) == (cell["projection"] == "down")
        assert cell["int8_us"] > 0
        # Half of the weights in 16 bits, a bit for each, an offset for a row.
        assert 0.55 < cell["ours_bytes"] / cell["dense_bytes"] < 0.62
        assert cell["share_of_limit"] == pytest.approx(
            cell["ours_bytes"] / cell["ours_us"] / 1e6 / figures["peak_tb_per_s"]
        )
    assert [(row["sparsity"], row["batch"]) for row in figures["whole_model"]] == [("50", 1), ("50", 3)]
    for row in figures["whole_model"]:
        assert row["ratio"] == pytest.approx(row["dense"] / row["packed"])
        assert row["packed_gib"] < row["dense_gib"]
        assert row["int4"] is None
        assert row["unmerged"] > 0
        assert row["rest"] > 0
    shown = capsys.readouterr().out
    assert "the projections of a block" in shown
    assert shown.count("adapters beside") == 2
    assert "refused" not in shown


def test_a_whole_model_as_on_a_gpu_runs_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--whole_model", "small", "--blocks", "1", "--adapters", "2", "--tokens", "2"]
    options = decode._parser().parse_args([*arguments, "--sparsities", "50", "2:4", "--batches", "1", "3"])
    rows = whole.measure(options)
    assert [(row.sparsity, row.batch) for row in rows] == [("50", 1), ("50", 3)]
    for row in rows:
        assert row.ratio == pytest.approx(row.packed / row.dense)
        assert row.packed_gib < row.dense_gib
        assert row.dense_joined is row.dense_kernels is None
        assert row.unmerged is not None
    whole.show(rows)
    shown = capsys.readouterr().out
    assert shown.count("adapters beside") == 2
    assert "refused" not in shown


def test_the_sides_of_a_whole_model_on_a_cpu() -> None:
    """Rounded values replace the dense ones; four bits are torch's; without projections a block adds nothing; all are put back."""
    model = geometry.build("small", 2, torch.device("cpu"), torch.bfloat16)
    decoder = Decoder(model)
    linears = [decoder.blocks[0].get_submodule(name) for name in decoder.family.projections]
    before = [linear.weight.clone() for linear in linears]
    arguments = ["--device", "cpu", "--whole_model", "small", "--sparsities", "50", "--values", "int8"]
    options = decode._parser().parse_args(arguments)
    sides = whole_cpu._Sides(model)
    forms = dict(sides.forms(options))
    assert set(forms) == {"packed", "dense", "rest"}
    assert list(forms["dense"])[: len(linears)] == linears
    for linear, old, layer in zip(linears, before, forms["packed"], strict=False):
        assert 0 < relative(linear.weight, old) < 2**-6
        torch.testing.assert_close(layer.unpacked(), linear.weight, rtol=0, atol=0)
    ids = torch.tensor([[5, 6]])
    sides.install(forms["rest"])
    embedded = model.model.norm(model.model.embed_tokens(ids))
    assert torch.equal(model(ids).logits, model.lm_head(embedded))
    wide = nn.Linear(256, 32, bias=False, dtype=torch.bfloat16)
    tiles = int4.pack(wide.weight.detach())
    assert tiles is not None
    x = torch.randn(2, 3, 256).bfloat16()
    meant = int4.quantise(wide.weight.detach())[2]
    torch.testing.assert_close(whole_cpu._Int4(*tiles, wide)(x).float(), x.float() @ meant.T, rtol=2**-7, atol=0.1)


def test_the_sides_of_a_whole_model_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before a call is not timed, nor is the first turn."""
    calls: list[str] = []
    seconds = {"a": [0.1, 5.0, 7.0], "b": [0.1, 8.0, 6.0]}
    clock = [0.0]

    def call(name: str) -> None:
        calls.append(name)
        clock[0] += seconds[name].pop(0)

    def begin(name: str) -> None:
        clock[0] += 100

    monkeypatch.setattr(whole_cpu.time, "perf_counter", lambda: clock[0])
    assert whole_cpu.fastest({name: partial(call, name) for name in "ab"}, begin, 2) == {"a": 5e3, "b": 6e3}
    assert calls == ["a", "b"] * 3


def test_dense_projections_of_one_input_are_one_product_too() -> None:
    """Compiled; the CPU's benchmark, which compiles nothing, sees that the numbers are the same."""
    model = geometry.build("small", 2, torch.device("cpu"), torch.float32)

    def logits() -> torch.Tensor:
        following = NextToken(model, StaticCache(config=model.config, max_cache_len=8), fuse=True)
        found = [following(torch.tensor([[token]])).clone() for token in (1, 2, 3)]
        assert following.fuses
        with torch.autograd.profiler.profile() as profile:
            found.append(following(torch.tensor([[4]])).clone())
        calls.append(sum(event.name == "losa::dense_rows" for event in profile.function_events))
        return torch.stack(found)

    calls: list[int] = []
    plain = logits()
    whole._join_dense(Decoder(model))
    assert relative(logits(), plain) < 1e-5
    # Of q, k and v, of gate and up; the other two are torch's.
    assert calls == [0, 2 * 2]


def test_four_bits_are_the_product_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 256).bfloat16()
    weight[0] = 0
    codes, both, meant = int4.quantise(weight)
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 15
    # Errors of at most half a step, plus the rounding of scale and middle; a constant group is exact.
    step = both[..., 0].T.repeat_interleave(int4.GROUP, 1).float()
    assert bool(((meant - weight.float()).abs() <= 0.6 * step + 1e-6).all())
    found = int4.pack(weight)
    assert found is not None
    x = torch.randn(3, 256).bfloat16()
    torch.testing.assert_close(int4.product(*found, x).float(), x.float() @ meant.T, rtol=2**-7, atol=0.1)
    assert sum(part.nbytes for part in found) == weight.numel() / 2 + 2 * 2 * weight.numel() / int4.GROUP
    assert int4.pack(weight.half()) is None
    assert int4.pack(weight[:, :100]) is None
    right = torch._weight_int4pack_mm_for_cpu
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", lambda *given: 2 * right(*given))
    assert int4.pack(weight) is None


@pytest.mark.usefixtures("few_copies")
@pytest.mark.parametrize(("values", "bits"), [("int8", 8), ("int4", 4)])
def test_decoding_with_codes_is_held_to_the_rounded_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str, bits: int
) -> None:
    status, figures = run_decode(tmp_path, "--geometries", "small", "--values", values)
    assert (status, figures["values"]) == (0, values)
    for cell in figures["kernels"]:
        assert 0 <= cell["disagreement"] <= cell["bound"]
        # Beside codes: a bit for each, a scale for 128, an offset for a row. A few weights are rounded to 0.
        assert bits * 0.45 < 16 * cell["ours_bytes"] / cell["dense_bytes"] - 1.1 < bits * 0.5 + 0.6
    monkeypatch.setattr(decode_cpu, "dequantise_rows", lambda codes, scales: 1.1 * dequantise_rows(codes, scales))
    assert run_decode(tmp_path, "--geometries", "small", "--values", values)[0] == 1


@pytest.mark.usefixtures("few_copies")
def test_decoding_that_gives_other_numbers_gets_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = decode.pack

    def wrong(weight: torch.Tensor, *given: Any) -> tuple[decode.Product, int, torch.Tensor]:
        # The small model's projections add little to its embeddings.
        return *pack(-20 * weight, *given)[:2], weight.double()

    def wrong_layer(linear: nn.Linear, sequences: int = 1) -> PackedLinear:
        return PackedLinear(*packed.pack(-20 * linear.weight), linear.in_features)

    monkeypatch.setattr(decode, "pack", wrong)
    monkeypatch.setattr(whole, "PackedLinear", SimpleNamespace(of=wrong_layer))
    monkeypatch.setattr(whole_cpu, "PackedLinear", SimpleNamespace(of=wrong_layer))
    status, figures = run_decode(tmp_path, "--geometries", "small", "--whole_model", "small", "--blocks", "1")
    assert status == 1
    assert all(side["ratio"] is None for side in figures["kernels"] + figures["whole_model"])
    assert "refused" in capsys.readouterr().out


def test_sides_take_turns_and_the_fastest_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    # Seconds of each call, the warm-up's first.
    seconds = {"a": [0.001, 5.0, 7.0, 3.0, 9.0, 4.0], "b": [0.001, 0.001, 8.0, 6.0, 7.0, 6.5]}
    clock = [0.0]

    def call(name: str) -> None:
        calls.append(name)
        clock[0] += seconds[name[0]].pop(0)

    monkeypatch.setattr(decode_cpu.time, "perf_counter", lambda: clock[0])
    best = decode_cpu.quickest([[partial(call, "a")], [partial(call, "b0"), partial(call, "b1")]], repeats=2)
    assert best == pytest.approx([3e6, 6e6])
    assert calls == ["a", "b0", "a", "b1"] * 3


def test_eight_bits_are_the_product_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(32, 256).bfloat16(), torch.randn(3, 256).bfloat16()
    weight[0] = 0
    product = decode_cpu.int8_product(weight)
    assert product is not None
    torch.testing.assert_close(product(x).float(), x.float() @ weight.float().T, rtol=0.02, atol=0.5)
    assert decode_cpu.int8_product(weight.float()) is None
    monkeypatch.setattr(
        decode_cpu, "_int8_product", lambda codes, scales, x: 2 * torch._weight_int8pack_mm(x, codes, scales)
    )
    assert decode_cpu.int8_product(weight) is None


def test_the_best_dense_counts_and_every_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, "dense_loop", lambda: abs)
    monkeypatch.setattr(decode_cpu, "quickest", lambda sides, repeats: [12.0, 30.0, 20.0][: len(sides)])
    x = torch.ones(1, 128)
    assert decode_cpu.times([abs] * 3, [x] * 2, x.bfloat16(), 1) == (12.0, 20.0)
    # The loop takes bf16 and columns that fill its registers.
    assert decode_cpu.times([abs] * 3, [x] * 2, x, 1) == (12.0, 30.0)
    assert decode_cpu.times([abs] * 3, [x] * 2, x[:, 1:].bfloat16(), 1) == (12.0, 30.0)
    assert decode_cpu.copies(10**7) * 10**7 > decode_cpu.STREAM


def test_a_block_counts_each_projection_as_often_as_it_has_it() -> None:
    assert {name: count for name, (*_, count) in decode.projections("llama-2-7b", joined=False).items()} == {
        "q,k,v,o": 4,
        "gate,up": 2,
        "down": 1,
    }
    assert decode.projections("llama-3-8b", joined=False)["k,v"] == ((1024,), 4096, 2)
    assert decode.projections("llama-3-8b", joined=True)["q,k,v"] == ((4096, 1024, 1024), 4096, 1)
    for name in ("llama-2-7b", "llama-3-8b"):
        # The same weights either way.
        weights = [decode.projections(name, joined).values() for joined in (False, True)]
        one, other = ([sum(rows) * columns * count for rows, columns, count in found] for found in weights)
        assert sum(one) == sum(other)
    sides = [(3.0, 9.0, 2, None), (1.0, 4.0, 1, 3.0)]
    cells = [decode.Cell("", "", n, "50", 1, a, b, 1, 1, 1.0, 0.0, 1.0, j) for a, b, n, j in sides]
    assert decode.block(cells, "50", 1) == (7.0, 22.0, 21.0)
    assert decode.block([*cells, replace(cells[0], disagreement=2.0)], "50", 1) is None
