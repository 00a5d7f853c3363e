"""The measured parts, one or more rows each; both sides start from the same weights and tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import adapter, losa, rmi
from torch_impl.bench import plain
from torch_impl.bench.measure import Row, alternate, once, relative, resident
from torch_impl.engine import calibration
from torch_impl.engine.adapted_linear import AdaptedLinear, adapters, attach_adapters, block_adapters
from torch_impl.engine.batches import IGNORED, Example
from torch_impl.engine.blocks import ModelBlocks, measure_importance
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.measures import MutualInformation
from torch_impl.engine.resume.checkpointer import Checkpointer, Progress
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig

RATE = 0.7
RANK = 8
# Bound for two float32 implementations of one algorithm that differ in the order of summation, over two blocks.
FLOAT32_BOUND = 1e-3


@dataclass(frozen=True)
class Work:
    """The sizes and the device of the measurements."""

    device: torch.device
    dtype: torch.dtype
    sequences: int
    length: int
    repeats: int
    bound: float
    """Largest allowed relative difference between the sides: rounding of the dtype, accumulated over the blocks."""

    def ids(self, model: nn.Module, rows: int, length: int) -> torch.Tensor:
        """Sample token ids (rows, length)."""
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.vocab_size  # type: ignore[union-attr]
        return torch.randint(vocabulary, (rows, length), generator=generator).to(self.device)  # type: ignore[arg-type]


def mutual_information(model: PreTrainedModel, work: Work, compare: bool) -> Row:
    """Measure the RMI sweep: R of every block."""
    decoder = Decoder(model)
    ids = work.ids(model, work.sequences // 2, work.length)

    def ours() -> torch.Tensor:
        return measure_importance(decoder, MutualInformation(), ids, 16)

    with calibration.compiled([decoder], "auto"):
        [(milliseconds, peak, _)] = alternate([ours], work.device, work.repeats)
    tokens = ids.numel()
    flops = 2 * tokens * sum(decoder.prunable_weights)
    static = resident(model)
    row = Row(f"mutual information, {len(ids)} × {work.length}", milliseconds, ours_gib=static + peak)
    row.tflops = flops / milliseconds / 1e9
    if compare:
        row.plain_ms, row.plain_gib, redundancy = once(lambda: plain.redundancy(decoder, ids), work.device)
        row.plain_gib += static
        row.disagreement, row.bound = relative(ours().log(), rmi.importance(redundancy).log()), work.bound
    return row


def _prune_ours(
    model: PreTrainedModel, work: Work, ids: torch.Tensor, method: str
) -> tuple[PreTrainedModel, float, float, list[float]]:
    """Prune a copy; return (copy, milliseconds, peak additional GiB, errors)."""
    decoder = Decoder(model)
    settings = Settings(
        prune=PruneConfig(prune_method=method, sparsity_ratio=RATE, layer_sparsity="uniform"),
        calibration=CalibrationConfig(nsamples=len(ids), seqlen=ids.shape[1]),
    )
    pruned = copy.deepcopy(model)
    blocks, checkpointer = ModelBlocks(Decoder(pruned), decoder, ids, len(ids), 1.0), Checkpointer()
    count = len(blocks.weights)
    checkpointer.progress = Progress(sparsity=[RATE] * count, groups=[None] * count)
    with calibration.compiled([blocks.decoder, decoder], "auto"):
        elapsed, peak, _ = once(
            lambda: losa.prune_model(blocks, settings, torch.zeros(count, dtype=torch.float64), checkpointer),
            work.device,
        )
    return pruned, elapsed, peak, checkpointer.progress.errors


def masks_apart(model: PreTrainedModel, work: Work, method: str) -> float:
    """Return the largest difference between the sides in mask entries (share) or errors (relative), small float32 model."""
    ids = work.ids(model, min(8, work.sequences), min(512, work.length))
    pruned, _, _, errors = _prune_ours(model, work, ids, method)
    other = Decoder(copy.deepcopy(model))
    other_errors = plain.prune(other, ids, method, RATE)
    pairs = zip(Decoder(pruned).weights, other.weights, strict=True)
    apart = [float((a != 0).ne(b != 0).float().mean()) for a, b in pairs]
    return max([*apart, relative(torch.tensor(errors), torch.tensor(other_errors))])


def prune_sweep(model: PreTrainedModel, work: Work, method: str, compare: bool, apart: float) -> Row:
    """Measure masks and reconstruction errors of all blocks, with adapters of rank 0."""
    ids = work.ids(model, work.sequences, work.length)
    _prune_ours(model, work, ids[:16], method)  # compiles kernels
    pruned, milliseconds, peak, _ = _prune_ours(model, work, ids, method)
    row = Row(
        f"masks and error, {method}, {work.sequences} × {work.length}",
        milliseconds,
        ours_gib=peak + resident(model, pruned),
    )
    if compare:
        other = copy.deepcopy(model)
        row.plain_ms, peak, _ = once(lambda: plain.prune(Decoder(other), ids, method, RATE), work.device)
        row.plain_gib = peak + resident(other)
        row.disagreement, row.bound = apart, FLOAT32_BOUND
    return row


def adapted(model: PreTrainedModel) -> None:
    """Prune by magnitude and give every projection an adapter, B not zero."""
    attach_adapters(Decoder(model), 2.0)
    for number, layer in enumerate(adapters(model)):
        weight = layer.weight
        threshold = weight.abs().flatten()[:: max(1, weight.numel() // 100_000)].float().quantile(RATE)
        weight.data.mul_(weight.abs() > threshold)
        layer.resize(RANK, (number,))
        with torch.no_grad():
            layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(number)) * 0.002)


def zero_gradients(model: nn.Module) -> None:
    """Update in place in a few kernel launches, like a fused optimizer."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_zero_(gradients)


def _with_plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy an adapted model with the plain formulation's projections."""
    twin = copy.deepcopy(model)
    decoder = Decoder(twin)
    for block in decoder.blocks:
        for name, layer in block_adapters(block, decoder.family).items():
            block.set_submodule(name, plain.PlainLoRALinear(layer.weight.data, layer.A.data, layer.B.data, layer.scale))
    return twin


def gradients_apart(model: PreTrainedModel, work: Work) -> float:
    """Return the largest relative difference between the sides' adapter gradients, for a small float32 model."""
    adapted(model)
    twin = _with_plain_twin(model)
    config = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=1, cuda_graphs=False)
    twins = [m for m in twin.modules() if isinstance(m, plain.PlainLoRALinear)]
    worst = 0.0
    for _, examples, padded in _batches(model, work, (64,)):
        for side, batch in ((model, examples), (twin, padded)):
            side.zero_grad()
            with Gradients(side, None, config) as gradients:
                gradients.of(batch)
        worst = max(worst, _gradients_apart(adapters(model), twins))
    return worst


def training_steps(
    model: PreTrainedModel,
    work: Work,
    lengths: tuple[int, ...],
    compare: bool,
    apart: float,
    accumulation: int,
) -> Iterator[Row]:
    """Measure forward and backward of a micro-batch of four sequences, merged weight held or rebuilt; changes the model.

    accumulation: micro-batches per optimizer step, for which held weights are merged once. Times are per micro-batch.
    """
    decoder = Decoder(model)
    adapted(model)
    device = work.device
    twin = _with_plain_twin(model) if compare else None
    for name, examples, padded in _batches(model, work, lengths):
        for held in (True, False):
            config = TrainingConfig(
                per_device_train_batch_size=4,
                gradient_accumulation_steps=accumulation,
                hold_merged="on" if held else "off",
            )
            sides = [(model, Gradients(model, None, config), examples)]
            if twin is not None:
                sides.append((twin, Gradients(twin, None, replace(config, cuda_graphs=False)), padded))

            def step(number: int, sides: Any = sides) -> float:
                side, gradients, batch = sides[number]
                zero_gradients(side)
                return float(gradients.of(batch * accumulation))

            with calibration.compiled([decoder], "auto"):
                found = alternate(
                    [partial(step, number) for number in range(len(sides))], device, work.repeats, warm_up=4
                )
            for _, gradients, _ in sides:
                gradients.close()
            row = Row(
                f"training micro-batch, {name}, merged weight {'held' if held else 'rebuilt'}",
                found[0][0] / accumulation,
            )
            row.ours_gib = found[0][1] + resident(model)
            # Three large products per prunable weight.
            tokens = sum(len(example["input_ids"]) for example in examples)
            row.tflops = 3 * 2 * tokens * sum(decoder.prunable_weights) / row.ours_ms / 1e9
            if twin is not None:
                row.plain_ms, row.plain_gib = found[1][0] / accumulation, found[1][1] + resident(twin)
                row.disagreement, row.bound = apart, FLOAT32_BOUND
            yield row


def divergence_steps(
    model: PreTrainedModel, teacher: PreTrainedModel, work: Work, lengths: tuple[int, ...], accumulation: int
) -> Iterator[Row]:
    """Measure a micro-batch of `training_steps` with KL to a teacher, and its ratio to cross-entropy; changes the model."""
    if not adapters(model):
        adapted(model)
    config = TrainingConfig(per_device_train_batch_size=4, gradient_accumulation_steps=accumulation)
    for name, examples, _ in _batches(model, work, lengths):
        both = [Gradients(model, dense, config) for dense in (teacher, None)]

        def step(gradients: Gradients, batch: Any = examples) -> float:
            zero_gradients(model)
            return float(gradients.of(batch * accumulation))

        with calibration.compiled([Decoder(model), Decoder(teacher)], "auto"):
            kl, ce = alternate([partial(step, gradients) for gradients in both], work.device, work.repeats, warm_up=4)
        for gradients in both:
            gradients.close()
        part = f"training micro-batch, {name}, KL, {kl[0] / ce[0]:.2f} × cross-entropy"
        row = Row(part, kl[0] / accumulation)
        row.ours_gib = kl[1] + resident(model) + resident(teacher)
        yield row


def _batches(
    model: nn.Module, work: Work, lengths: tuple[int, ...]
) -> Iterator[tuple[str, list[Example], list[Example]]]:
    """Yield (name, four sequences, the same padded to the longest) for each length, and for mixed lengths from a quarter."""
    for length in lengths:
        rows = work.ids(model, 4, length).cpu()
        examples = [{"input_ids": row, "labels": row} for row in rows]
        yield f"4 × {length}", examples, examples
    if lengths:
        longest = lengths[-1]
        parts = [longest * quarters // 4 for quarters in (1, 2, 3, 4)]
        shorter = [{name: x[:n] for name, x in example.items()} for example, n in zip(examples, parts, strict=True)]
        # Causal attention: tokens after the last label change nothing.
        padded = [
            {"input_ids": row, "labels": row.clone().index_fill_(0, torch.arange(n, longest), IGNORED)}
            for row, n in zip(rows, parts, strict=True)
        ]
        yield f"4 of {parts[0]} to {longest}", shorter, padded


def _gradients_apart(layers: list[AdaptedLinear], twins: list[plain.PlainLoRALinear]) -> float:
    worst = 0.0
    for ours, other in zip(layers, twins, strict=True):
        for name in ("A", "B"):
            worst = max(worst, relative(getattr(ours, name).grad, getattr(other, name).grad))
    return worst


def merge(model: nn.Module, work: Work) -> Row:
    """Measure merging all adapters of a model; check a few rows of each against float64."""
    layers = adapters(model)
    [(milliseconds, peak, _)] = alternate([lambda: [layer.merged() for layer in layers[:7]]], work.device, work.repeats)
    row = Row("merge, one block", milliseconds, ours_gib=peak)
    moved = 2 * sum(layer.weight.numel() * layer.weight.element_size() for layer in layers[:7])
    row.notes.append(f"{moved / milliseconds / 1e9:.2f} TB/s")

    def plainly() -> list[torch.Tensor]:
        return [
            (layer.weight + (layer.weight != 0) * (layer.scale * (layer.B @ layer.A))).to(layer.weight)
            for layer in layers[:7]
        ]

    with torch.no_grad():
        [(row.plain_ms, row.plain_gib, _)] = alternate([plainly], work.device, work.repeats)
        first = layers[0]
        exact = adapter.effective_weight(first.weight.double(), first.A.double(), first.B.double(), first.scale)
        row.disagreement, row.bound = relative(first.merged(), exact), work.bound
    return row
