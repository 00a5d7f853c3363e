"""Packed folders of codes: what is stored is what the spec rounds, every reader sees the same weights, sizes are as stated."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_impl
from oracle_tests.packed_models import save_sparse
from reference import bits as spec_bits
from reference import packed as spec_packed
from reference import quantise as spec
from reference.masks import sparsegpt as spec_sparsegpt
from reference.masks.first_token import weigh_first
from torch_impl.commands import pack
from torch_impl.decode.coded_linear import CodedLinear
from torch_impl.decode.cuda_coded import CodedLayout
from torch_impl.decode.cuda_coded_gaps import CodedGapLayout
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.decoder import Decoder
from torch_impl.packed import CODED

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
IDS = torch.randint(0, 200, (6, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse(tmp_path_factory.mktemp("plain") / "model", "llama", torch.float64)


@pytest.fixture(scope="module")
def compensated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded") / "int4"
    torch_impl.pack(plain, folder, values="int4", calibration=IDS)
    return folder


def projections(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    decoder = Decoder(model)
    return {
        decoder.full_name(index, f"{name}.weight"): weight.detach()
        for index, block in enumerate(decoder.blocks)
        for name, weight in decoder.family.weights_of(block).items()
    }


def codes_of(folder: Path, columns: dict[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The codes and scales of each projection in a folder, as the spec reads them."""
    stored: dict[str, torch.Tensor] = {}
    for path in folder.glob("packed-*.safetensors"):
        stored |= load_file(path)
    found = {}
    for key, count in columns.items():
        bitmap, codes, scales, offsets = (stored[f"{key}.{part}"].numpy() for part in CODED)
        spec_packed.check_codes(bitmap, codes, scales, offsets, count)
        found[key] = spec_packed.unpack_codes(bitmap, codes, offsets, count), scales
    return found


def with_weights(plain: Path, weights: dict[str, np.ndarray]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(torch.from_numpy(weight))
    return model


def test_without_calibration_the_codes_are_those_of_rounding_to_nearest(plain: Path, tmp_path: Path) -> None:
    weights = projections(AutoModelForCausalLM.from_pretrained(plain))
    for values, bits in (("int8", 8), ("int3", 3)):
        torch_impl.pack(plain, tmp_path / values, values=values)
        found = codes_of(tmp_path / values, {name: weight.shape[1] for name, weight in weights.items()})
        for name, weight in weights.items():
            codes, scales = spec.quantise_rows(weight.numpy(), bits)
            np.testing.assert_array_equal(found[name][0], codes)
            np.testing.assert_array_equal(found[name][1], scales)
        listed = json.loads((tmp_path / values / "packed.json").read_text())
        assert listed["version"] == 2
        blocks = [dict.fromkeys(PROJECTIONS, bits)] * 3
        assert listed["rounding"] == {"values": values, "bits": blocks, "importance": [], "calibration": None}


def test_with_calibration_each_block_is_rounded_on_what_the_rounded_blocks_put_out(
    plain: Path, compensated: Path
) -> None:
    """Against the spec's functions on inputs of a plain model whose earlier blocks have the rounded weights."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    decoder, found = Decoder(model), codes_of(compensated, {n: w.shape[1] for n, w in projections(model).items()})
    for index in range(len(decoder.blocks)):
        seen: dict[str, torch.Tensor] = {}
        layers = decoder.projections(index)

        def note(name: str, _: torch.nn.Module, given: tuple[torch.Tensor, ...], seen: dict = seen) -> None:
            seen[name] = given[0].detach()

        handles = [layer.register_forward_pre_hook(functools.partial(note, name)) for name, layer in layers.items()]
        with torch.no_grad():
            model(IDS)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            inputs = seen[name].double().numpy()
            first = name in decoder.family.inputs[0]
            rows = weigh_first(inputs, spec.FIRST_TOKEN) if first else inputs.reshape(-1, inputs.shape[2])
            weight = layer.weight.detach().numpy()
            codes, scales = spec_sparsegpt.sparsegpt_codes(
                weight, spec_sparsegpt.hessian(rows, len(IDS)), 4, kept=weight != 0
            )
            stored = found[decoder.full_name(index, f"{name}.weight")]
            # LLaMA's norms and angles are float32, so a weight beside a tie may have the next code.
            assert (stored[0] != codes).mean() < 0.01, name
            np.testing.assert_array_equal(stored[1][:, 0], scales[:, 0])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(spec.dequantise_rows(*stored)))


def test_every_reader_has_the_weights_that_the_codes_stand_for(plain: Path, compensated: Path, tmp_path: Path) -> None:
    columns = {n: w.shape[1] for n, w in projections(AutoModelForCausalLM.from_pretrained(plain)).items()}
    meant = {name: spec.dequantise_rows(*pair) for name, pair in codes_of(compensated, columns).items()}
    expected = with_weights(plain, meant)
    logits = expected(IDS).logits
    measured = torch_impl.evaluate(expected, text=IDS)["perplexity"]
    dense = torch_impl.evaluate(AutoModelForCausalLM.from_pretrained(plain), text=IDS)["perplexity"]
    assert abs(measured / dense - 1) > 1e-4, "else the next comparison says nothing"
    again = tmp_path / "saved again"
    torch_impl.load_packed(compensated, "cpu").save_pretrained(again)
    assert (
        load_file(next(again.glob("*.safetensors"))).keys() == load_file(next(compensated.glob("*.safetensors"))).keys()
    )
    assert codes_of(again, columns).keys() == meant.keys()
    for model in (
        torch_impl.load_packed(compensated, "cpu"),
        AutoModelForCausalLM.from_pretrained(compensated),
        torch_impl.load_packed(again, "cpu"),
    ):
        assert isinstance(model.model.layers[0].mlp.up_proj, CodedLinear)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-6, atol=1e-6)
        assert torch_impl.evaluate(model, text=IDS)["perplexity"] == pytest.approx(measured, rel=1e-6)
    assert pack.main(["--unpack", str(compensated), str(tmp_path / "unpacked")]) == 0
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    for name, weight in meant.items():
        np.testing.assert_array_equal(unpacked.get_parameter(name).detach().numpy(), weight)
    assert "losa-packed" not in (tmp_path / "unpacked" / "config.json").read_text()


def test_sizes_are_the_formula_s_and_the_files(
    plain: Path, compensated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = projections(AutoModelForCausalLM.from_pretrained(plain))
    assert pack.main([str(plain), str(tmp_path / "out"), "--values", "int8"]) == 0
    said = capsys.readouterr().out
    found = codes_of(tmp_path / "out", {name: weight.shape[1] for name, weight in weights.items()})
    total, places = 0.0, 0
    for codes, _ in found.values():
        share = 1 - np.count_nonzero(codes) / codes.size
        # The last offset; eight codes of a byte each fill up a row.
        rest = 64 + 8 * (-np.count_nonzero(codes) % 8)
        total += spec.bits_per_weight(share, 8, codes.shape[1]) * codes.size + rest
        places += codes.size
    stored = load_file(tmp_path / "out" / "packed-00001-of-00001.safetensors")
    inside = sum(part.nbytes for name, part in stored.items() if ".weight." in name)
    assert 8 * inside == pytest.approx(total, rel=1e-12)
    bits = total / places
    assert f"{bits:.2f} bits a weight" in (tmp_path / "out" / "README.md").read_text()
    assert "codes of 8 bits" in (tmp_path / "out" / "README.md").read_text()
    assert "rounded to nearest; give --calibration_data" in said
    sizes = torch_impl.pack(plain, tmp_path / "again", values="int8")
    assert sum(saving.after for saving in sizes if saving.kind != "other") == inside
    zeros = sum(int((codes == 0).sum()) for codes, _ in found.values())
    assert sum(saving.positions - saving.kept for saving in sizes if saving.kind != "other") == zeros


@pytest.mark.parametrize("by", ["rmi", "gradient"])
def test_mixed_bits_follow_importance_with_the_mean(plain: Path, tmp_path: Path, by: str) -> None:
    torch_impl.pack(plain, tmp_path / "out", values="mixed", calibration=IDS, mean_bits=14 / 3, bits_by=by)
    facts = facts_of(tmp_path / "out")
    expected = spec_bits.allocate_bits(np.array(facts["importance"]), 14 / 3, (3, 4, 5, 6))
    assert facts["bits"] == [dict.fromkeys(PROJECTIONS, bits) for bits in expected.tolist()]
    assert len(set(expected.tolist())) > 1
    assert expected.sum() == 14
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"codes of {expected.min()} to {expected.max()} bits" in card
    if by == "gradient":
        np.testing.assert_allclose(facts["importance"], first_order(plain), rtol=1e-4)
    table = pack._rounded(tmp_path / "out")
    for block, bits in enumerate(expected):
        assert re.search(rf"^ +{block} +{facts['importance'][block]:.6g} +{bits}$", table, re.MULTILINE)


def first_order(plain: Path) -> list[float]:
    """Σ |w · ∂loss/∂w| of each block, by autograd, for each weight and predicted token."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    model(IDS, labels=IDS).loss.backward()
    blocks = [list(Decoder(model).projections(index).values()) for index in range(3)]
    return [
        float(sum((layer.weight.detach() * layer.weight.grad).abs().sum() for layer in block))
        / sum(layer.weight.numel() for layer in block)
        for block in blocks
    ]


def test_mixed_bits_do_the_least_harm(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Against the spec's functions on inputs and gradients by autograd of the whole model."""
    torch_impl.pack(plain, tmp_path / "out", values="mixed", calibration=IDS, mean_bits=4.25)
    facts = facts_of(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(plain)
    decoder, seen, gradients = Decoder(model), {}, {}

    def note(place: tuple[int, str], _: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen[place] = given[0].detach().double().numpy()
        output.register_hook(lambda gradient: gradients.__setitem__(place, gradient.flatten(0, 1).double().numpy()))

    layers = {(index, name): layer for index in range(3) for name, layer in decoder.projections(index).items()}
    for place, layer in layers.items():
        layer.register_forward_hook(functools.partial(note, place))
    model(IDS, labels=IDS).loss.backward()
    harms = []
    for (index, name), layer in layers.items():
        rows, squares = seen[index, name].reshape(-1, layer.in_features), gradients[index, name] ** 2
        hessian = rows.T @ np.diag(squares.mean(1)) @ rows
        weight = layer.weight.detach().numpy()
        harms.append(spec_sparsegpt.rounding_harm(weight, hessian, squares.sum(0), range(2, 9)))
    sizes = [layer.weight.numel() for layer in layers.values()]
    expected = spec_bits.allocate_bits_by_harm(harms, sizes, 4.25, range(2, 9)).tolist()
    assert [bits for block in facts["bits"] for bits in block.values()] == expected
    assert len(set(expected)) > 2
    assert facts["bits_by"] == "error"
    assert facts["importance"] == []
    assert facts["calibration"] == {"sequences": 6, "tokens": 20}
    listed = json.loads((tmp_path / "out" / "packed.json").read_text())["tensors"]
    for (index, name), bits in zip(layers, expected, strict=True):
        assert listed[decoder.full_name(index, f"{name}.weight")]["bits"] == bits
    table = pack._rounded(tmp_path / "out")
    assert "bits by error" in table
    for block, bits in enumerate(facts["bits"]):
        assert re.search(rf"^ +{block} +{' +'.join(map(str, bits.values()))}$", table, re.MULTILINE)
    packed = torch_impl.load_packed(tmp_path / "out", "cpu")
    assert [layer.bits for index in range(3) for layer in Decoder(packed).projections(index).values()] == expected


def facts_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "packed.json").read_text())["rounding"]
    return facts


@pytest.mark.parametrize(
    ("given", "bits", "by", "windows"),
    [
        ([], 4.0, "error", {"nsamples": 128, "seqlen": 2048, "seed": 0}),
        (
            ["--mean_bits", "3.5", "--bits_by", "rmi", "--nsamples", "7", "--seqlen", "33", "--seed", "5"],
            3.5,
            "rmi",
            {"nsamples": 7, "seqlen": 33, "seed": 5},
        ),
    ],
)
def test_the_command_rounds_as_told(
    given: list[str], bits: float, by: str, windows: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults are those of --help."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(pack.pretrained, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(pack, "windows_of", lambda *_, **options: asked.append(options) or IDS)
    words = ["MODEL", "OUT", "--values", "mixed", "--calibration_data", "stdlib", *given]
    found = pack._rounding(pack._parser().parse_args(words))
    assert found is not None
    named = {**windows, "name": "calibration_data"}
    assert (found.values, found.mean_bits, found.bits_by, asked) == ("mixed", bits, by, [named])


def test_what_cannot_be_rounded_is_named(plain: Path, tmp_path: Path) -> None:
    """A value too large for scales of 16 bits, and a projection whose inputs are all zero."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    up, down = model.model.layers[1].mlp.up_proj.weight, "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        up[3, 3] = 1e8
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: values holds 1e\+08 in size"):
        torch_impl.pack(model, tmp_path / "out", values="int4")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj cannot be rounded on this text: values"):
        torch_impl.pack(model, tmp_path / "out", values="int4", calibration=IDS)
    up.data.zero_()
    with pytest.raises(ValueError, match=rf"^{re.escape(down)} cannot be rounded on this text: hessian is not"):
        torch_impl.pack(model, tmp_path / "out", values="int4", calibration=IDS)
    up.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^model LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        torch_impl.pack(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_calibration_beyond_what_the_model_was_trained_on_is_told(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for tokens, told in ((128, 0), (129, 1)):
        ids = torch.randint(0, 200, (2, tokens))
        torch_impl.pack(plain, tmp_path / str(tokens), values="int8", calibration=ids)
        assert len(caplog.records) == told
    assert "has sequences of 129 tokens; this model was trained on at most 128, so take seqlen 128" in caplog.text


def test_the_command_says_on_how_much_text_it_rounded(compensated: Path) -> None:
    assert pack._rounded(compensated) == "\nrounded with compensation on 6 windows of 20 tokens\n"


def test_the_layer_keeps_its_codes_in_every_dtype(as_on_a_gpu: list[str], compensated: Path) -> None:
    layer: Any = torch_impl.load_packed(compensated, "cpu").model.layers[1].mlp.down_proj
    parts = {name: part.clone() for name, part in layer.stored().items()}
    exact = layer.unpacked()
    assert as_on_a_gpu == []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        other = copy.deepcopy(layer).to(dtype)
        # bfloat16 and float16 have kernels, so the weight is in a layout.
        assert (other.layout is not None) == (dtype in (torch.bfloat16, torch.float16))
        assert other.dtype == other(torch.ones(2, other.in_features, dtype=dtype)).dtype == dtype
        assert torch.equal(other.unpacked(), exact.to(dtype))
        state = other.state_dict()
        assert {name: part.dtype for name, part in state.items()} == {name: part.dtype for name, part in parts.items()}
        assert all(torch.equal(state[name], part) for name, part in parts.items())
        back = other.to(torch.float64)
        assert torch.equal(back.unpacked(), exact)
        assert back.kept == layer.kept == int(parts["offsets"][-1])
    assert "bits=4" in repr(layer)
    other = copy.deepcopy(layer).to(torch.bfloat16)
    other.load_state_dict({**state, "scales": 2 * parts["scales"]})
    assert torch.equal(other.unpacked(), (2 * exact).to(torch.bfloat16))
    # The host's copy of the parts is the loaded one too, also where loading does not write into it, as on a GPU.
    other.load_state_dict({**state, "scales": 4 * parts["scales"]}, assign=True)
    assert torch.equal(other.state_dict()["scales"], 4 * parts["scales"])
    assert torch.equal(other.to(torch.float64).unpacked(), 4 * exact)
    # What leaves its layout stays on the device of the layout, not on the host, where the parts are kept.
    other = copy.deepcopy(layer).to(torch.bfloat16)
    other.layout = dataclasses.replace(other.layout, data=other.layout.data.to("meta"))
    assert {part.device.type for part in other.stored().values()} == {"cpu"}
    other.to(torch.float32)
    assert {getattr(other, name).device.type for name in other.names} == {"meta"}


def test_as_on_a_gpu_codes_are_multiplied(as_on_a_gpu: list[str], compensated: Path) -> None:
    """The kernel's layout, of projections with the same input as one, in a model of transformers that generates."""
    exact = torch_impl.load_packed(compensated, "cpu")
    model = AutoModelForCausalLM.from_pretrained(compensated, dtype=torch.bfloat16)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        assert all(
            isinstance(layer._on_gpu, CodedLayout | CodedGapLayout)
            for layer in (attention.o_proj, mlp.up_proj, mlp.down_proj)
        )
        assert attention.q_proj.group is attention.v_proj.group is not None
        assert mlp.gate_proj.group is mlp.up_proj.group is not None
    assert "pack_rows" not in as_on_a_gpu
    few = IDS[:1, :6]
    torch.testing.assert_close(model(few).logits.double(), exact(few).logits.double(), rtol=0.05, atol=0.05)
    as_on_a_gpu.clear()
    assert model.generate(few, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 9)
    # The prompt and two tokens: q, k and v; o; gate and up; down.
    assert as_on_a_gpu == ["matvec"] * 3 * 4 * len(model.model.layers)
    state, known = model.model.layers[0].mlp.up_proj.state_dict(), exact.model.layers[0].mlp.up_proj.state_dict()
    assert all(torch.equal(part, known[name]) for name, part in state.items())


@pytest.mark.parametrize("part", ["codes", "scales", "offsets", "bitmap"])
def test_a_damaged_part_is_named_by_every_reader(compensated: Path, tmp_path: Path, part: str) -> None:
    broken = tmp_path / "broken"
    torch_impl.load_packed(compensated, "cpu").save_pretrained(broken)
    torch_impl.api.pretrained.AutoTokenizer.from_pretrained(compensated).save_pretrained(broken)
    [path] = broken.glob("packed-*.safetensors")
    stored = load_file(path)
    name = f"model.layers.1.mlp.up_proj.weight.{part}"
    if part == "scales":
        stored[name][0, 0] = -1
    else:
        stored[name].view(-1)[0] ^= 0xFF
    save_file(stored, path, metadata={"format": "pt"})
    for read in (
        lambda: torch_impl.load_packed(broken, "cpu"),
        lambda: AutoModelForCausalLM.from_pretrained(broken),
        lambda: torch_impl.decode.packed_folder.unpack_folder(broken, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*: "):
            read()


def test_what_is_refused(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, empty = str(tmp_path / "out"), tmp_path / "empty.txt"
    empty.touch()
    for words, message in (
        (["--values", "int9"], "values is 'int9'; allowed: same, int2, int3, int4, int5, int6, int7, int8, mixed"),
        (["--values", "mixed"], "values is 'mixed', whose bits are chosen on calibration text; give calibration text"),
        (["--bits_by", "rmi"], "bits_by is rmi and has no effect without --values mixed; leave it out"),
        (["--values", "mixed", "--bits_by", "size"], "bits_by is 'size'; allowed: rmi, gradient, error"),
        (["--mean_bits", "5"], "mean_bits is 5.0 and has no effect without --values mixed; leave it out"),
        (
            ["--values", "int8", "--nsamples", "4"],
            "nsamples is 4 and has no effect without --calibration_data; leave it out",
        ),
        (
            ["--calibration_data", "stdlib"],
            "calibration_data is stdlib and has no effect without --values int8; leave it out",
        ),
        (["--values", "int8", "--unpack"], "values is int8 and has no effect with --unpack; leave it out"),
        (["--values", "int4", "--calibration_data", "no such"], "no such is 'calibration_data'"),
        (["--values", "int4", "--calibration_data", str(empty)], f"calibration_data is '{empty}', which holds no text"),
    ):
        assert pack.main([str(plain), out, *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}") or "no such" in words
        assert not Path(out).exists()
    for given in ({"mean_bits": 3.5}, {"bits_by": "rmi"}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is .* and has no effect without values='mixed'"):
            torch_impl.pack(plain, out, values="int4", calibration=IDS, **given)
    with pytest.raises(ValueError, match="mean_bits is 9"):
        torch_impl.pack(plain, out, values="mixed", calibration=IDS, mean_bits=9)
    with pytest.raises(ValueError, match="calibration is given and values is 'same'"):
        torch_impl.pack(plain, out, calibration=IDS)
    with pytest.raises(ValueError, match=r"calibration has ids 0 to 99999; the model has embeddings for \d+"):
        torch_impl.pack(plain, out, values="int4", calibration=torch.tensor([[0, 99999]] * 2))
    assert not Path(out).exists()


def test_exact_values_stay_version_1(plain: Path, tmp_path: Path) -> None:
    """So that earlier releases read them."""
    torch_impl.pack(plain, tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "packed.json").read_text())
    assert listed["version"] == 1
    assert "rounding" not in listed
    assert type(torch_impl.load_packed(tmp_path / "out", "cpu").model.layers[1].mlp.up_proj) is PackedLinear
