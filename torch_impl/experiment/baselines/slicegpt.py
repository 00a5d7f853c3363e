"""SliceGPT: fewer channels in the hidden states, along their principal axes. Formula: reference/slicegpt.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl import slicegpt
from torch_impl.engine.calibration import Stream, start_stream
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines.sliced_block import (
    NORMS,
    SlicedBlock,
    SlicedNorm,
    eps_of,
    gain_and_bias,
    subtracts_mean,
)
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material

UNLIKE = "SliceGPT knows blocks with a norm before attention and one before the MLP, and nothing else in the residual"


@dataclass(frozen=True)
class Axes:
    """The axes (d, k) that a norm reads, and those that what comes before it writes: without the mean, if the norm subtracts it."""

    read: torch.Tensor
    written: torch.Tensor


def remove(decoder: Decoder, material: Material, config: Config) -> None:
    """Slice the hidden states of a model in place, block by block, each on what the sliced blocks before it put out.

    Errors: ValueError if the blocks are built in another way.
    """
    stream = start_stream(decoder, material.calibration, config.calibration.calibration_batch_size)
    _check(decoder, stream)
    width = stream.hidden.shape[-1]
    kept = slicegpt.kept_axes(config.prune.final_sparsity, width, decoder.prunable_weights[0])
    last = decoder.model.get_submodule(NORMS[decoder.family.name][2])
    centred = subtracts_mean(last)
    axes = first = axes_of(stream, kept, centred)
    blocks = []
    for index, block in enumerate(decoder.blocks):
        sliced = SlicedBlock(block, decoder.family)

        def attend(states: torch.Tensor, batch: int, block: SlicedBlock = sliced, index: int = index) -> torch.Tensor:
            return block.after_attention(states, **stream.arguments[batch][index])

        def transform(states: torch.Tensor, batch: int, block: SlicedBlock = sliced) -> torch.Tensor:
            return block.after_mlp(states)

        _advance(stream, axes, attend)
        middle = axes_of(stream, kept, centred)
        _advance(stream, middle, transform)
        after = axes_of(stream, kept, centred)
        slice_block(sliced, decoder, (axes, middle, after), width)
        blocks.append(sliced)
        axes = after
    decoder.model.set_submodule(decoder.family.blocks, nn.ModuleList(blocks))
    _slice_outside(decoder, first, axes, last, width)


def _check(decoder: Decoder, stream: Stream) -> None:
    """Check that the first block is what `SlicedBlock` takes it for, and the norms what they are taken for."""
    block, states = decoder.blocks[0], stream.states(slice(0, stream.batch_size))
    names = NORMS.get(decoder.family.name, ())
    inputs: Any = decoder.model.get_input_embeddings()
    if not names or not all(hasattr(block, name) for name in names[:2]) or inputs.embedding_dim != states.shape[-1]:
        raise ValueError(f"{UNLIKE}; {type(block).__name__} is built in another way")
    sliced, arguments = SlicedBlock(block, decoder.family), stream.arguments[0][0]
    found = block(states, **arguments)
    whole = found[0] if isinstance(found, tuple) else found
    # The norms of transformers compute in float32.
    tolerance = 8 * max(torch.finfo(states.dtype).eps, torch.finfo(torch.float32).eps)
    pairs = [(sliced(states, **arguments), whole)]
    for norm in (sliced.norm(0), sliced.norm(1)):
        gain, bias = gain_and_bias(norm)
        x = states - states.mean(-1, keepdim=True) if subtracts_mean(norm) else states
        y = slicegpt.sliced_norm(x, x.shape[-1], eps_of(norm)) * gain
        pairs.append((y if bias is None else y + bias, norm(states)))
    if any(float((ours - theirs).abs().max()) > tolerance * float(theirs.abs().max()) for ours, theirs in pairs):
        raise ValueError(f"{UNLIKE}; {type(block).__name__} computes something else")


def axes_of(stream: Stream, kept: int, centred: bool) -> Axes:
    """Find the first principal axes of the states (n, t, d) of a stream."""
    width = stream.hidden.shape[-1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=stream.device)
    for _, rows in stream.batches():
        x = stream.states(rows).reshape(-1, width).double()
        x = x - x.mean(1, keepdim=True) if centred else x
        gram += x.T @ x
    Q = slicegpt.principal_axes(gram)[:, :kept]
    return Axes(Q, slicegpt.centred(Q) if centred else Q)


def _advance(stream: Stream, axes: Axes, half: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Replace the states by what half a block makes of their part along the axes. They stay along the model's own channels."""
    for batch, rows in stream.batches():
        states = stream.states(rows)
        along = states.double() @ axes.written @ axes.read.T
        stream.hidden[rows].copy_(half(along.to(states.dtype), batch))


def slice_block(block: SlicedBlock, decoder: Decoder, axes: tuple[Axes, Axes, Axes], width: int) -> None:
    """Give a block the weights for states along the axes before its attention, before its MLP and after it."""
    groups = decoder.family.inputs
    for half, (before, after) in enumerate(itertools.pairwise(axes)):
        reads, writes = (groups[0], groups[1]) if half == 0 else (groups[2], groups[3])
        for name in reads:
            _read_sliced(block.get_submodule(name), block.norm(half), before)
        for name in writes:
            _write_sliced(block.get_submodule(name), after)
        turn = slicegpt.shortcut(before.read, after.written)
        setattr(block, ("attention_shortcut", "mlp_shortcut")[half], turn.to(next(block.parameters()).dtype))
    block.slice_norms(width)


def _read_sliced(linear: nn.Module, norm: nn.Module, axes: Axes) -> None:
    """Replace the weight of a linear behind a norm, which gives it its gain and bias."""
    assert isinstance(linear, nn.Linear)
    gain, shift = gain_and_bias(norm)
    if shift is not None:
        shift = linear.weight.double() @ shift.double()
        shift = shift if linear.bias is None else shift + linear.bias.double()
        linear.bias = _like(shift, linear.weight)
    linear.weight = _like(slicegpt.slice_inputs(linear.weight, gain, axes.read), linear.weight)
    linear.in_features = linear.weight.shape[1]


def _write_sliced(linear: nn.Module, axes: Axes) -> None:
    assert isinstance(linear, nn.Linear)
    if linear.bias is not None:
        linear.bias = _like(slicegpt.slice_outputs(linear.bias[:, None], axes.written)[:, 0], linear.weight)
    linear.weight = _like(slicegpt.slice_outputs(linear.weight, axes.written), linear.weight)
    linear.out_features = linear.weight.shape[0]


def _like(values: torch.Tensor, weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(weight.dtype).contiguous(), requires_grad=False)


def _slice_outside(decoder: Decoder, first: Axes, last: Axes, norm: nn.Module, width: int) -> None:
    """Slice embeddings and head. They are not tied any more: they are along different axes."""
    model = decoder.model
    head = model.get_output_embeddings()
    own = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    own.weight, own.bias = nn.Parameter(head.weight.detach(), requires_grad=False), head.bias
    _read_sliced(own, norm, last)
    for embedding in decoder.body.children():
        if isinstance(embedding, nn.Embedding):
            embedding.weight = _like(embedding.weight.double() @ first.written, embedding.weight)
            embedding.embedding_dim = embedding.weight.shape[1]
    model.set_output_embeddings(own)
    model.config.tie_word_embeddings = False
    model.set_submodule(NORMS[decoder.family.name][2], SlicedNorm(width, eps_of(norm)))
