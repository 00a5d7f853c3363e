"""An offloaded run prunes to the same bits as a run in memory, and writes the same folder."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oracle_tests.offloaded_runs import PLAIN, both, same, stop_after, weights_in
from oracle_tests.small_runs import arguments, fails
from tiny_models.random_models import FAMILIES, save_random_model
from torch_impl import losa
from torch_impl.bench import large
from torch_impl.engine import adapted_linear, calibration, memory, statistics
from torch_impl.engine.checkpoints import offload, safetensors_files
from torch_impl.engine.checkpoints.contents import INDEX, SINGLE
from torch_impl.engine.checkpoints.rewriting import Output
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import PruneConfig, Settings
from torch_impl.experiment import offloaded_job
from torch_impl.experiment.config import parse
from torch_impl.experiment.material import load_material
from torch_impl.experiment.planning import checks, dry_run, parts, phases
from torch_impl.experiment.planning.parts import Parts, Place
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.sweeps import Sweeps
from torch_impl.run import main


def split_into_shards(folder: Path, parts: int) -> None:
    """Split a checkpoint into several files, with the tensors of each block spread over all of them."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    place_of = {name: f"model-{k % parts + 1:05}-of-{parts:05}.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(place_of.values()):
        chosen = {name: tensor for name, tensor in tensors.items() if place_of[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt", "made by": "hand"})
    index = {"metadata": {"total_size": 0}, "weight_map": place_of}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_same_bits(place: Path, family: str) -> None:
    save_random_model(place / "model", family)
    same(*both(place))


@pytest.mark.parametrize(
    "changes",
    [
        {"prune_method": "magnitude", "sparsity_ratio": 0.5, "layer_sparsity": "uniform"},
        {"prune_method": "sparsegpt", "dtype": "bfloat16", "layer_sparsity": "lamp"},
        {"prune_method": "alps", "dtype": "bfloat16", "layer_sparsity": "owl"},
        {"prune_method": "admm", "layer_sparsity": "atp"},
        {"prune_method": "pruner_zero", "calibration_batch_size": 4, "layer_sparsity": "gradient"},
        {
            "prune_method": "sparsegpt",
            "sparsity_type": "mixed-2:4",
            "calibration_batch_size": 4,
            "first_token_weight": 50,
        },
        {"sparsity_type": "2:4", "dtype": "float64"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_every_method_pattern_and_rule_gets_the_same_bits(place: Path, changes: dict) -> None:
    split_into_shards(place / "model", 3)
    one, other = both(place, **changes)
    same(one, other)
    mirrored = {path.name for path in (place / "model").glob("model*")}
    assert {path.name for path in (other / "model").glob("model*")} == mirrored
    index = json.loads((other / "model" / INDEX).read_text())
    assert index["weight_map"] == json.loads((place / "model" / INDEX).read_text())["weight_map"]
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in weights_in(other / "model").values())}
    for file in sorted(mirrored - {INDEX}):
        with safe_open(other / "model" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "made by": "hand"}


def test_a_bare_decoder_s_names_are_understood(place: Path) -> None:
    file = place / "model" / SINGLE
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    assert main(arguments(place, **PLAIN, offload="on")) == 0
    written = weights_in(place / "out" / "model")
    assert set(written) == set(bare), "the files' own names are kept"
    assert main(arguments(place, **PLAIN, offload="off", output_dir=place / "off")) == 0
    for name, tensor in weights_in(place / "off" / "model").items():
        assert torch.equal(written[name.removeprefix("model.")], tensor), name


def test_what_a_file_holds_beside_the_model_is_taken_over(place: Path) -> None:
    """Old checkpoints hold buffers that are computed today, floating-point and not."""
    file = place / "model" / SINGLE
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4), "model.position_ids": torch.arange(5)}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    assert main(arguments(place, **PLAIN, offload="on")) == 0
    written = weights_in(place / "out" / "model")
    for name, tensor in more.items():
        assert torch.equal(written[name], tensor)


def test_the_dense_side_of_a_whole_run_may_come_from_files(place: Path) -> None:
    ids = torch.randint(257, (6, 16), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in ids]
    setup = Settings(prune=PruneConfig(steps=2))
    results = []
    for from_files in (False, True):
        model = AutoModelForCausalLM.from_pretrained(place / "model")
        dense = offload.open_offloaded(place / "model", torch.device("cpu"), None) if from_files else None
        records = losa.run(model, ids, [examples[:3], examples[3:]], setup, dense=dense)
        results.append(
            ([record.errors for record in records], [layer.merged() for layer in adapted_linear.adapters(model)])
        )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_states_kept_elsewhere_have_the_same_gram_matrix() -> None:
    hidden = torch.randn(4, 2 * statistics.PART + 3, 8, dtype=torch.float64)
    # To torch, the CPU and the first CPU are two devices.
    elsewhere = statistics.gram_of(hidden, torch.device("cpu:0"))
    torch.testing.assert_close(elsewhere, statistics.gram_of(hidden), rtol=1e-12, atol=1e-12)


def test_room_is_given_while_there_is_some() -> None:
    budget = memory.MemoryBudget(torch.device("cuda"), working=40, budget=200)
    assert [budget.reserve(size) for size in (100, 50, 40, 1)] == [True, False, True, False]
    budget.release_all()
    assert budget.reserve(140)
    assert memory.MemoryBudget(torch.device("cpu"), working=0, budget=0).reserve(10**12), "there is no other place"


def test_a_block_has_weights_until_the_next_is_asked_for(place: Path) -> None:
    model = offload.open_offloaded(place / "model", torch.device("cpu"), None)
    blocks = offload.sweep(Decoder(model))
    first = next(blocks)
    assert all(parameter.numel() for parameter in first.parameters())
    second = next(blocks)
    assert not any(parameter.numel() for parameter in first.parameters())
    assert all(parameter.numel() for parameter in second.parameters())
    skeleton = Decoder(model).blocks
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def bytes_alive() -> int:
    """Of all tensors on the CPU that Python knows of, whichever thread made them; not what compilers trace with."""
    plain = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [t for t in plain if t.device.type == "cpu" and not torch._is_functional_tensor(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("window", [1, 3])
def test_no_more_than_a_few_blocks_are_ever_there(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as every block comes: itself, those of its window, the next one, the one being written, and the hidden states."""
    device, blocks = torch.device("cpu"), 12 if window == 1 else 8
    more = ["--reconstruct_epochs", str(int(window > 1)), "--reconstruct_window", str(window)]
    before = bytes_alive()
    peak = 0
    filled = offload._filled

    def counted(*given: Any) -> torch.nn.Module:
        nonlocal peak
        block = filled(*given)
        peak = max(peak, bytes_alive() - before)
        return block

    monkeypatch.setattr(offload, "_filled", counted)
    with large.checkpoint("medium", blocks, device, torch.float32) as folder:
        config = large._options(
            folder, device, torch.float32, 2, 8, "--offload", "on", "--layer_sparsity", "uniform", *more
        )
        material = large._random_text(config, folder, device)
        decoder = Decoder(material.model)
        sizes = Sizes.of(decoder, torch.float32)
        sweeps = Sweeps(decoder, config, material)
        sweeps.prune(config.settings, sweeps.dense(), Output(tmp_path, decoder))
    # With the one being written come the mask and the bytes of one of its projections.
    assert peak < sizes.outside_blocks() + (window + 2.8) * sizes.block()


def test_the_model_that_is_read_again_does_not_stay(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would lie beside the one that is pruned at one rate afterwards."""
    opened, left = [], []
    open_offloaded, uniform = offloaded_job.open_offloaded, offloaded_job._at_once

    def noted(*given: Any) -> Any:
        model = open_offloaded(*given)
        opened.append(weakref.ref(model))
        return model

    def counted(*given: Any) -> dict[str, float]:
        gc.collect()
        left.append(sum(model() is not None for model in opened))
        return uniform(*given)

    monkeypatch.setattr(offloaded_job, "open_offloaded", noted)
    monkeypatch.setattr(offloaded_job, "_at_once", counted)
    assert main(arguments(place, **PLAIN, offload="on")) == 0
    assert (len(opened), left) == (1, [0])


def test_auto_leaves_on_disk_what_does_not_fit(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    config = parse(arguments(place, **PLAIN))
    assert not dry_run.offloads(config)
    monkeypatch.setattr(parts, "free_bytes", lambda device: 10**5)
    assert dry_run.offloads(config)
    assert not dry_run.offloads(parse(arguments(place, **PLAIN, offload="off")))
    assert not dry_run.offloads(parse(arguments(place))), "training needs the whole model"
    assert main([*arguments(place, **PLAIN), "--dry_run"]) == 0
    assert "one block at a time" in capsys.readouterr().out
    called = []
    monkeypatch.setattr(
        "torch_impl.commands.run.run_offloaded", lambda *_: called.append(1) or SimpleNamespace(footprints=None)
    )
    monkeypatch.setattr("torch_impl.commands.run.report.table", lambda _: "")
    monkeypatch.setattr("torch_impl.commands.run.report.packing_pays", lambda _: False)
    assert main(arguments(place, **PLAIN)) == 0
    assert called


def test_training_is_foretold_from_what_is_kept(place: Path) -> None:
    """Larger batches, longer sequences, the dense model's predictions and held weights all take more."""
    save_random_model(place / "model", "llama", vocab_size=2048)

    def foretold(**changes: object) -> int:
        options = {"finetune": "true", "steps": 1, "hold_merged": "off", "train_seqlen": 512, **changes}
        return dry_run.make_plan(parse(arguments(place, **options))).memory.device.total

    least = foretold()
    for more in ({"loss": "kl"}, {"hold_merged": "on"}, {"train_seqlen": 1024}, {"per_device_train_batch_size": 8}):
        assert foretold(**more) > least, more


def test_two_models_are_foretold_while_one_is_read_again(place: Path) -> None:
    """Their embeddings and heads; what lies between comes block by block."""
    config = parse(arguments(place, **PLAIN, offload="on"))
    model = offload.open_offloaded(place / "model", torch.device("cpu"), torch.float32)
    sizes = replace(Sizes.of(Decoder(model), torch.float32), outside=((10**9,),))
    foretold = phases.peak(config, sizes, Place("cpu"))
    assert foretold.phase == "verifying"
    assert foretold.device.weights == foretold.device.reloaded == 4 * 10**9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_compiled_blocks_make_again_is_foretold(place: Path, checkpointing: bool) -> None:
    """Without held weights, and only where no block is computed again as a whole, they keep one output of the MLP less."""
    save_random_model(place / "model", "llama", intermediate_size=1024)

    def foretold(held: str) -> Parts:
        options = {"finetune": "true", "steps": 1, "hold_merged": held, "compile_blocks": "on", "train_seqlen": 512}
        options["gradient_checkpointing"] = str(checkpointing).lower()
        return dry_run.make_plan(parse(arguments(place, **options))).memory.device

    held, rebuilt = foretold("on"), foretold("off")
    config = parse(arguments(place))
    tokens = config.training.per_device_train_batch_size * 512
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    blocks, up = len(model.model.layers), model.model.layers[0].mlp.up_proj.weight
    spared = 0 if checkpointing else blocks * tokens * 1024 * 4
    assert held.activations - rebuilt.activations == spared
    if checkpointing:
        # A block's backward: the same, and a merged weight that is not held.
        assert rebuilt.work - held.work == up.nbytes


FAULTS = {
    "a tensor is missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        ["lacks model.layers.1.mlp.up_proj.weight: 1 of"],
    ),
    "a shape is wrong": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        ["shapes for 1 of its tensors", "model.norm.weight has (3,) for (32,)"],
    ),
    "NaN": (lambda t: t["model.layers.2.mlp.down_proj.weight"].fill_(torch.nan), ["layers.2.mlp.down_proj", "NaN"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_named(place: Path, fault: str, capsys: pytest.CaptureFixture) -> None:
    file = place / "model" / SINGLE
    tensors = load_file(file)
    change, words = FAULTS[fault]
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    fails(capsys, place, arguments(place, **PLAIN, offload="on"), words)


def test_files_that_cannot_be_read_are_named(place: Path, capsys: pytest.CaptureFixture) -> None:
    file = place / "model" / SINGLE
    file.write_bytes(file.read_bytes()[:-100])
    fails(capsys, place, arguments(place, **PLAIN, offload="on"), [SINGLE, "truncated or corrupt"])
    file.unlink()
    fails(capsys, place, arguments(place, **PLAIN, offload="on"), ["has neither model.safetensors nor"])


@pytest.mark.parametrize(("breaks", "words"), [("zeros", ["saved zeros differ"]), ("others", ["logits", "differ"])])
def test_what_the_disk_made_of_it_is_noticed(
    place: Path,
    breaks: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    write = safetensors_files.ShardWriter.write

    def broken(self: safetensors_files.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if breaks == "zeros" and name.endswith("up_proj.weight"):
            tensor = tensor + 1
        elif breaks == "others" and name.endswith("norm.weight"):
            tensor = tensor * 2
        write(self, name, tensor)

    monkeypatch.setattr(safetensors_files.ShardWriter, "write", broken)
    assert main(arguments(place, **PLAIN, offload="on")) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all(word in error for word in [*words, "rerun with --resume"]), error
    assert not (place / "out").exists()
    # What was written is not what was pruned: it is pruned again.
    monkeypatch.setattr(safetensors_files.ShardWriter, "write", write)
    assert main(arguments(place, **PLAIN, offload="on", resume="true")) == 0
    assert main(arguments(place, **PLAIN, offload="on", output_dir=place / "whole")) == 0
    same(place / "out", place / "whole")


def flip_a_byte(place: Path) -> None:
    """In the weights of block 1 that a stopped run has left."""
    file = place / ".out.partial" / "model" / SINGLE
    with safe_open(file, "pt") as opened:
        weight = opened.get_tensor("model.layers.1.mlp.up_proj.weight")
    place_of = file.read_bytes().index(weight.view(torch.int16).numpy().tobytes())
    with file.open("r+b") as opened:
        opened.seek(place_of + 5)
        byte = opened.read(1)[0]
        opened.seek(place_of + 5)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_from_files_takes_smaller_batches_when_memory_is_full(
    place: Path, epochs: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the second block is pruned: the first one comes back from the output, the second keeps what was pruned of it."""
    options = {**PLAIN, "offload": "on", "layer_sparsity": "uniform", "calibration_batch_size": 4}
    options |= {"reconstruct_epochs": epochs, "compile_blocks": "off"}
    assert main(arguments(place, **options, output_dir=place / "plain")) == 0
    forward, full = calibration.Stream.forward, []

    def limited(self: calibration.Stream, block: Any, index: int, batch: int, rows: slice) -> torch.Tensor:
        # Of three passes of a block (dense, statistics, pruned), the last.
        full.append((index, rows.stop - rows.start))
        if full.count((1, 4)) == 3 * 2 and full[-1] == (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, block, index, batch, rows)

    monkeypatch.setattr(calibration.Stream, "forward", limited)
    assert main(arguments(place, **options)) == 0
    assert "reducing calibration_batch_size from 4 to 2" in caplog.text
    ours, plain = weights_in(place / "out" / "model"), weights_in(place / "plain" / "model")
    assert all(float((ours[name] != plain[name]).float().mean()) < (0.01 if epochs == 0 else 1) for name in plain)
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)


def test_an_output_that_changes_while_it_is_written_is_an_error(place: Path, tmp_path: Path) -> None:
    config = parse(arguments(place, **PLAIN, offload="on"))
    material = load_material(config, offloaded=True)
    decoder = Decoder(material.model)
    (tmp_path / "written").mkdir()
    output = Output(tmp_path / "written", decoder)
    for index, block in enumerate(offload.sweep(decoder)):
        adapted_linear.adapt_block(block, decoder.family, 1.0)
        assert not output.restore(index, block)
        output.write(index, block)
        assert output.restore(index, block), "written by this run"
        if index:
            continue
        output.written[0] = dict.fromkeys(output.written[0], "another hash")
        with pytest.raises(RuntimeError, match="block 0 is corrupt on disk although this run wrote it; check the disk"):
            output.restore(index, block)
        return


@pytest.mark.parametrize(
    ("method", "damage"),
    [("wanda", False), ("wanda", True), ("sparsegpt", False), ("sparsegpt", True), ("pruner_zero", False)],
)
def test_a_run_from_files_goes_on_to_the_same_bits(
    place: Path, method: str, damage: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped after the dense sweep, two blocks later, and with all blocks on the disk."""
    # Ten seconds pass between two looks at the clock.
    monkeypatch.setattr(offloaded_job, "time", SimpleNamespace(perf_counter=itertools.count(step=10.0).__next__))
    split = {"prune_method": method, "dtype": "bfloat16", "offload": "on"}
    assert main(arguments(place, **PLAIN, **split, output_dir=place / "whole")) == 0
    again = {}
    pruned = []
    prune_block = losa._prune_block
    monkeypatch.setattr(losa, "_prune_block", lambda *given: (pruned.append(given[1]), prune_block(*given))[1])
    for count in (1, 2, 1):
        stop_after(count, monkeypatch)
        assert main(arguments(place, **PLAIN, **split, **again)) == 1
        again = {"resume": "true"}
    # Block 2 was pruned when the checkpoint after block 1 was written, and again.
    assert pruned == [0, 1, 2, 2]
    if damage:
        flip_a_byte(place)
    pruned.clear()
    assert main(arguments(place, **PLAIN, **split, resume="true")) == 0
    assert ("block 1 is corrupt on disk" in caplog.text) == damage
    # The last sweep is that of the row "pruned at once".
    assert pruned == ([1, 2] if damage else []) + [0, 1, 2]
    same(place / "out", place / "whole")
    if not damage:
        # It looks at the start, at pruning's, after each block and at its end, twice for the last row, and at the end.
        results = [json.loads((place / name / "losa_result.json").read_text()) for name in ("whole", "out")]
        assert [result["losa"]["seconds"] for result in results] == [40, 40]
        assert [result["seconds_in_all"] for result in results] == [80, 80 + 2 * 10], (
            "two more starts, both before a block"
        )
    lines = [(place / name / "metrics.jsonl").read_text().splitlines() for name in ("out", "whole")]
    assert len(lines[0]) == len(lines[1])
    assert not (place / "out" / ".points").exists()


def test_a_model_s_share_of_zeros_counts_every_weight_once() -> None:
    """A block of three quarters of the weights counts three times as much as one of a quarter."""
    assert offloaded_job._mean([0.5, 0.1], torch.tensor([100.0, 300.0])) == pytest.approx(0.2)


def test_a_run_from_files_goes_on_as_it_began_or_not_at_all(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stop_after(2, monkeypatch)
    assert main(arguments(place, **PLAIN, offload="on")) == 1
    assert "Killed" in capsys.readouterr().err
    for changes, words in (
        ({"resume": "true", "sparsity_ratio": 0.6}, "sparsity_ratio is 0.6"),
        ({}, "unfinished run"),
    ):
        assert main(arguments(place, **PLAIN, offload="on", **changes)) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert main(arguments(place, **PLAIN, offload="on", resume="true")) == 2
    assert "of disk are free" in capsys.readouterr().err


def test_a_model_sparser_than_asked_is_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(place, **PLAIN, sparsity_ratio=0.6, offload="on")) == 0
    again = arguments(place, **PLAIN, model=place / "out" / "model", sparsity_ratio=0.4, offload="on")
    fails(
        capsys,
        place,
        [*again, "--output_dir", str(place / "again")],
        ["sparsity_ratio is 0.4", "the model's own sparsity"],
    )
