"""The part `base`: a training micro-batch over a compressed base, beside the dense base with the same values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.bench.measure import Row, alternate, relative, resident
from torch_impl.bench.parts import Work, adapted, zero_gradients
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import adapters
from torch_impl.engine.batches import Example
from torch_impl.engine.compressed_linear import compress_block
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.settings import INT8, PACKED, TrainingConfig

SEQUENCES = 2


def steps(model: PreTrainedModel, work: Work, lengths: tuple[int, ...]) -> Iterator[Row]:
    """Measure forward and backward of two sequences with checkpointed activations, as a 70B run has them; changes the model.

    Both sides build their merged weights at each use. Notes: the gradients' distance from those over the base before rounding,
    and the size of both.
    """
    adapted(model)
    training.checkpoint_activations(model)
    for length in lengths:
        rows = work.ids(model, SEQUENCES, length).cpu()
        batch: list[Example] = [{"input_ids": row, "labels": row} for row in rows]
        exact = _gradients(model, batch)
        for values in (PACKED, INT8):
            yield _compared(model, work, batch, values, exact)


def _compared(model: PreTrainedModel, work: Work, batch: list[Example], values: str, exact: list[torch.Tensor]) -> Row:
    compressed, dense = _compressed(model, values), copy.deepcopy(model)
    for layer, other in zip(adapters(dense), adapters(compressed), strict=True):
        layer.set_base(other.weight)
    sides = [compressed, dense]
    found = [_gradients(side, batch) for side in sides]
    times = alternate([partial(_gradients, side, batch) for side in sides], work.device, work.repeats, warm_up=2)
    tokens = sum(len(example["input_ids"]) for example in batch)
    row = Row(f"micro-batch over a base, {values}, {SEQUENCES} × {tokens // SEQUENCES}", times[0][0], times[1][0])
    row.ours_gib, row.plain_gib = (time[1] + resident(side) for time, side in zip(times, sides, strict=True))
    # Forward, again before the backward pass, and two products in that.
    row.tflops = 4 * 2 * tokens * sum(Decoder(dense).prunable_weights) / row.ours_ms / 1e9
    row.disagreement, row.bound = _apart(found[0], found[1]), work.bound
    row.notes.append(f"from the base before rounding {_apart(found[0], exact):.1e}")
    bits = [8 * sum(_bytes(layer) for layer in adapters(side)) / _weights(dense) for side in sides]
    row.notes.append(f"{bits[0]:.2f} bits a weight, dense {bits[1]:.2f}")
    return row


def _compressed(model: PreTrainedModel, values: str) -> PreTrainedModel:
    """Copy a model with compressed bases."""
    twin = copy.deepcopy(model)
    decoder = Decoder(twin)
    for block in decoder.blocks:
        compress_block(block, decoder.family, values)
    return twin


def _gradients(model: PreTrainedModel, batch: list[Example]) -> list[torch.Tensor]:
    """Compute the gradients of one optimizer step."""
    config = TrainingConfig(
        per_device_train_batch_size=SEQUENCES,
        gradient_accumulation_steps=1,
        gradient_checkpointing=True,
        hold_merged="off",
    )
    zero_gradients(model)
    model.train()
    with Gradients(model, None, config) as gradients:
        gradients.of(batch)
    model.eval()
    return [p.grad.clone() for layer in adapters(model) for p in (layer.A, layer.B) if p.grad is not None]


def _apart(ours: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(relative(a, b) for a, b in zip(ours, other, strict=True))


def _bytes(layer: nn.Module) -> int:
    """Count the bytes of a layer without its adapter."""
    tensors = (*layer.parameters(), *layer.buffers())
    return sum(t.nbytes for t in tensors if not t.requires_grad)


def _weights(model: PreTrainedModel) -> int:
    return sum(layer.in_features * layer.out_features for layer in adapters(model))
