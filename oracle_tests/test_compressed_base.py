"""Training over a compressed base: packed, the trajectory of the dense base bit for bit; rounded, that of the rounded values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oracle_tests import interruptions, offloaded_runs, plans
from oracle_tests.interruptions import Counting, Stop, outcome, settings
from oracle_tests.small_runs import arguments, fails, make_place
from oracle_tests.spread_runs import peak_config, peak_model
from reference import adapter as spec
from reference.base import round_base
from reference.quantise import dequantise_rows
from tiny_models.random_models import random_model
from torch_impl import losa, packed
from torch_impl.bench.large import device_peak
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import AdaptedLinear, adapters, attach_adapters
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.compressed_linear import CompressedLinear, compress_block
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig
from torch_impl.experiment.config import parse
from torch_impl.experiment.planning import checks, compressed, phases
from torch_impl.experiment.planning.cards import find_card
from torch_impl.experiment.planning.outlook import outlook
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.table import sizes_of
from torch_impl.masks.magnitude import magnitude_mask
from torch_impl.run import main

TOY = Family("toy", "blocks", (("projection",),))


def _block(dtype: torch.dtype, rank: int, out: int = 5, columns: int = 70) -> nn.Module:
    """A block of one sparse adapted projection, B not 0."""
    generator = torch.Generator().manual_seed(rank)
    linear = nn.Linear(columns, out, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out, columns, generator=generator))
        linear.weight.mul_(torch.rand(out, columns, generator=generator) < 0.5)
        linear.weight[0, 0] = -0.0
    block = nn.Module()
    block.projection = layer = AdaptedLinear(linear, 0.5)
    layer.resize(rank, (1,))
    with torch.no_grad():
        layer.B.copy_(torch.randn(out, rank, generator=generator))
    return block


def _passes(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    parameters = [p for p in (layer.A, layer.B) if p.numel()]
    return [y.detach(), *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), [x, *parameters])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_packed_base_gives_the_bits_of_the_dense_one(dtype: torch.dtype, rank: int) -> None:
    block = _block(dtype, rank)
    dense = block.projection
    x = torch.randn(2, 4, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = _passes(dense, x)
    compress_block(block, TOY, "packed")
    layer = block.projection
    assert isinstance(layer, CompressedLinear)
    assert not any(p.numel() == 5 * 70 for p in (*layer.parameters(), *layer.buffers()))
    assert torch.equal(layer.weight, dense.weight)
    assert layer.weight.dtype == dtype
    for ours, other in zip(_passes(layer, x), expected, strict=True):
        assert torch.equal(ours, other)
    with torch.no_grad():
        assert torch.equal(layer(x), dense(x))
        assert torch.equal(layer.merged(), dense.merged())
        layer.hold()
        assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rounded_base_has_the_gradients_of_the_spec(rank: int) -> None:
    block = _block(torch.float64, rank)
    weight = block.projection.weight.detach().numpy().copy()
    compress_block(block, TOY, "int8")
    layer = block.projection
    packed.check_codes(*(layer.parts[name] for name in packed.CODED), 70)
    base = dequantise_rows(*round_base(weight))
    np.testing.assert_array_equal(layer.weight.numpy(), base)
    x = torch.randn(6, 70, generator=torch.Generator().manual_seed(1)).double()
    A, B = (p.detach().numpy() for p in (layer.A.double(), layer.B.double()))
    y, dx, *of_adapter = _passes(layer, x)
    dy = np.arange(30.0).reshape(6, 5)
    expected = spec.masked_lora_grad(x.numpy(), base, A, B, 0.5, dy)
    np.testing.assert_allclose(y.numpy(), spec.masked_lora(x.numpy(), base, A, B, 0.5) + layer.bias.detach().numpy())
    for ours, other in zip([dx, *of_adapter], expected, strict=False):
        np.testing.assert_allclose(ours.numpy(), other, rtol=1e-6)


def test_a_new_base_is_compressed_and_pruning_does_not_round_again() -> None:
    block = _block(torch.bfloat16, 2)
    compress_block(block, TOY, "int8")
    layer = block.projection
    before, scales = layer.weight.clone(), layer.scales.clone()
    kept = torch.rand(5, 70, generator=torch.Generator().manual_seed(2)) < 0.5
    layer.set_base(before * kept)
    assert torch.equal(layer.weight, before * kept)
    assert torch.equal(layer.scales, scales)
    layer.set_base(before * 1.003)
    assert not torch.equal(layer.scales, scales)
    assert torch.equal(layer.mask, before != 0)


def test_nothing_unpacked_stays_between_the_passes() -> None:
    """Autograd keeps inputs, A and B, and no tensor of the weight's size."""
    block = _block(torch.float32, 3)
    compress_block(block, TOY, "packed")
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block.projection(torch.randn(2, 70, requires_grad=True))
    assert kept
    assert max(t.numel() for t in kept) < 5 * 70


def _run(train_base: str, **training: Any) -> tuple[list[Any], list[float], list[torch.Tensor], nn.Module]:
    model = random_model("llama-gqa", dtype=torch.bfloat16)
    ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    part = [{"input_ids": row, "labels": row} for row in ids]
    settings = Settings(
        PruneConfig(steps=2),
        AdapterConfig(initial_rank=2, max_rank=4),
        CalibrationConfig(nsamples=4, seqlen=16, rmi_samples=4),
        TrainingConfig(learning_rate=1e-2, per_device_train_batch_size=2, train_base=train_base, **training),
    )
    losses: list[float] = []
    records = losa.run(model, ids, [part, part], settings, on_loss=lambda _, __, loss, ___: losses.append(loss))
    return records, losses, [layer.merged() for layer in adapters(model)], model


@pytest.mark.parametrize("training", [{}, {"gradient_checkpointing": True, "loss": "kl"}])
def test_the_trajectory_over_a_packed_base_is_that_over_the_dense_one(training: dict[str, Any]) -> None:
    records, losses, merged, _ = _run("dense", hold_merged="off", **training)
    others = _run("packed", **training)
    assert others[1] == losses
    for ours, other in zip(others[2], merged, strict=True):
        assert torch.equal(ours, other)
    assert [record.errors for record in others[0]] == [record.errors for record in records]


def test_the_trajectory_over_a_rounded_base_keeps_the_sparsity() -> None:
    records, losses, _, _ = _run("dense")
    rounded = _run("int8")
    assert all(isinstance(layer, CompressedLinear) for layer in adapters(rounded[3]))
    assert [record.realised for record in rounded[0]] == [record.realised for record in records]
    assert rounded[1] != losses
    assert rounded[1] == pytest.approx(losses, rel=0.02)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


@pytest.mark.parametrize(("train_base", "after"), [("packed", 9), ("int8", 2), ("int8", 6)])
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path: Path, train_base: str, after: int) -> None:
    """Stopped while the first blocks are compressed, in training, and in the second step's pruning."""
    setup = settings(train_base=train_base)
    whole = outcome(setup)
    with pytest.raises(Stop):
        outcome(setup, Counting(tmp_path, after))
    assert interruptions.same(outcome(setup, Counting(tmp_path)), whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_base": "int4"}, ["train_base", "int4", "dense, packed, int8"]),
        ({"train_base": "int8", "finetune": "false"}, ["train_base", "finetune"]),
        ({"train_base": "packed", "hold_merged": "on"}, ["hold_merged", "auto or off"]),
        ({"train_base": "packed", "compile_blocks": "on"}, ["compile_blocks", "auto or off"]),
        ({"train_base": "int8", "offload": "on", "loss": "kl"}, ["loss kl", "trained on labels", "--loss ce"]),
        ({"train_base": "int8", "offload": "on", "baselines": "one_shot"}, ["baselines", "leave it out"]),
        ({"offload": "on"}, ["steps 2, finetune True", "--train_base int8"]),
        ({"train_base": "packed", "sparsity_type": "structured", "sparsity_ratio": 0.2}, ["structured", "dense"]),
    ],
)
def test_what_a_compressed_base_does_not_support_is_refused(
    place: Path, changes: dict[str, Any], words: list[str], capsys: pytest.CaptureFixture
) -> None:
    fails(capsys, place, arguments(place, **changes), words)


def test_several_cards_are_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    changes = {"train_base": "int8", "device": "auto", "devices": 2, "dry_run": "true"}
    fails(capsys, place, arguments(place, **changes), ["train_base", "several processes"])


COMPRESSED = {"steps": 2, "finetune": "true", "layer_sparsity": "rmi", "train_examples": 8, "eval_windows": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"train_base": "packed"},
        {"train_base": "int8", "gradient_checkpointing": "true", "reconstruct_epochs": 1, "rank_shrink": "fold"},
    ],
)
def test_a_run_from_files_gives_the_bits_of_a_run_in_memory(place: Path, changes: dict[str, Any]) -> None:
    offloaded_runs.same(*offloaded_runs.both(place, **COMPRESSED, **changes))


@pytest.mark.parametrize("after", [3, 7])
def test_a_run_from_files_resumes_to_the_same_result(place: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the first step's pruning, when only some blocks are in memory, and in the second step."""
    options = {**COMPRESSED, "train_base": "int8", "offload": "on", "train_examples": 16}
    assert main(arguments(place, **options, output_dir=place / "whole")) == 0
    save, seen = Checkpointer._save, []

    def counted(self: Checkpointer) -> None:
        save(self)
        seen.append(1)
        if len(seen) == after:
            raise offloaded_runs.Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "_save", counted)
        assert main(arguments(place, **options)) == 1
    assert main([*arguments(place, **options), "--resume"]) == 0
    offloaded_runs.same(place / "whole", place / "out")


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"train_base": "int8"}, True),
        ({"train_base": "packed", "steps": 1}, True),
        # A third of the weights is pruned at the first of five steps: 11.6 bits a weight.
        ({"train_base": "packed"}, False),
        ({}, False),
    ],
)
def test_70b_on_one_card(changes: dict[str, Any], fits: bool) -> None:
    """The paper's settings on 80 GB; in memory without a compressed base, two copies of 129 GiB."""
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    config = parse(["--config", "llama_70b", "--model", "a/b", *words])
    card = find_card("80GB")
    found = outlook(config, sizes_of("llama-2-70b"), Place("cuda", 1, card.free), card, 1)
    assert found.fits == fits
    if not changes:
        offered = next(words for words, _ in found.remedies if "train_base" in words)
        assert offered == "--train_base int8 --offload on"


@pytest.mark.parametrize(("train_base", "offload"), [("packed", "off"), ("int8", "on")])
def test_the_plan_counts_the_compressed_blocks_of_the_first_step(place: Path, train_base: str, offload: str) -> None:
    options = {**COMPRESSED, "train_base": train_base, "offload": offload, "gradient_checkpointing": "true"}
    config = parse(arguments(place, **options))
    sizes = Sizes.of(Decoder(random_model("llama-gqa")), torch.float32)
    counted: list[int] = []
    train = training.train

    def counting(model: nn.Module, *rest: Any) -> Any:
        tensors = (t for block in Decoder(model).blocks for t in (*block.parameters(), *block.buffers()))
        counted.append(sum(t.nbytes for t in tensors if not t.requires_grad))
        assert all(block.gradient_checkpointing for block in Decoder(model).blocks)
        return train(model, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "train", counting)
        assert main(arguments(place, **options)) == 0
    # Besides: the last offset of a matrix, and up to one more kept value in a row of 32 to 48.
    assert 1 <= counted[0] / compressed.weights(config, sizes) < 1.05
    assert counted[1] < counted[0]


@pytest.mark.parametrize("train_base", ["packed", "int8"])
def test_the_plan_is_what_a_training_step_takes(train_base: str) -> None:
    """An optimizer step of a model whose weights are large beside a few tokens, measured, without the moments."""
    model, config = peak_model(64), peak_config(8)
    config = replace(
        config,
        training=replace(config.training, train_base=train_base, gradient_checkpointing=True),
    )
    decoder = Decoder(model)
    sizes = Sizes.of(decoder, torch.float32)
    attach_adapters(decoder, 1.0)
    training.checkpoint_activations(model)
    for number, layer in enumerate(adapters(model)):
        layer.resize(config.adapter.initial_rank, (number,))
        layer.set_base(layer.weight * magnitude_mask(layer.weight, config.prune.final_sparsity))
    for block in decoder.blocks:
        compress_block(block, decoder.family, train_base)
    foretold = replace(phases.phases(config, sizes, Place("cpu"))["training"], dense_copy=0, moments=0)
    batch = [{"input_ids": row, "labels": row} for row in torch.randint(64, (4, 8))]
    model.train()
    with Gradients(model, None, config.training) as gradients:
        gradients.of(batch)
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        held += sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        step = device_peak(lambda: gradients.of(batch), torch.device("cpu"))[0]
    assert foretold.weights + foretold.adapters + foretold.gradients == pytest.approx(held, rel=0.02)
    assert 0.9 < foretold.total / (held + step) < 1.2


@pytest.mark.parametrize("moved", [{}, {"prune_method": "sparsegpt"}])
def test_checkpoints_hold_the_packed_form(moved: dict[str, Any]) -> None:
    """Also where an uncompressed base needs a bit or a whole number, and where a run without training needs none."""
    sizes = Sizes.of(Decoder(random_model("llama-gqa")), torch.float32)
    options = plans.config(train_base="int8", **moved)
    block = compressed.block(options, sizes)
    for offloaded in (False, True):
        found = checks.disk(options, sizes, offloaded=offloaded)
        # Two files of each of three blocks, and one in each of three checkpoints; values and moments of the adapters.
        assert found.checkpoints == block * (3 * 2 + 3) + 3 * 3 * sizes.adapters(7)
