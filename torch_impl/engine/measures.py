"""Measure what the rate rules go by, block by block; blocks may be sharded or offloaded. Spec: reference/rates.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from torch_impl import atp, first_order, lamp, owl, rmi
from torch_impl.engine import calibration, distributed, gradient_sweep, statistics
from torch_impl.engine.adapted_linear import AdaptedLinear, adapt_block, block_adapters, plain_linears
from torch_impl.engine.calibration import Stream
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.masks.wanda import INPUT_NORM, wanda_mask, wanda_score

# Of the calibration sequences that measure importance, ATP compares its candidates on every fourth.
COMPARED = 4


class Measure(Protocol):
    """Measures the importance of every block in one sweep over the blocks.

    A measure that is a `gradient_sweep.Backward` too is then taken back through the blocks.
    """

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Advance the stream through block `index`, which is gathered, and record what the importance needs."""

    def importance(self) -> torch.Tensor:
        """Compute the importance (L,) after the last block: higher for a block that should keep more."""


class MutualInformation:
    """Measures I of LoSA, Eq. 4; keeps only the Gram matrix (n, n) of each block's output."""

    def __init__(self) -> None:
        self._grams: list[torch.Tensor] = []

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Record the Gram matrix of the block's output."""
        stream.advance(block, index)
        self._grams.append(statistics.gram_of(stream.hidden, stream.device))

    def importance(self) -> torch.Tensor:
        """Compute the importance (L,)."""
        return rmi.importance(rmi.redundancy(rmi.nhsic_matrix(torch.stack(self._grams))))


class Outliers:
    """Measures the share of outliers among the Wanda scores of every block (OWL)."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._found: list[float] = []

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Score the block's weights on its inputs."""
        layers, norms = _input_norms(stream, block, index, self._family)
        self._found.append(owl.outlier_share([wanda_score(layer.merged(), norms[n]) for n, layer in layers.items()]))
        stream.advance(block, index)

    def importance(self) -> torch.Tensor:
        """Return the shares (L,), in percent."""
        return torch.tensor(self._found, dtype=torch.float64)


class BestProgression:
    """Chooses the arithmetic progression of rates that loses least (ATP): every candidate prunes its own copy of a stream."""

    def __init__(self, decoder: Decoder, target: float) -> None:
        self._decoder = decoder
        blocks = len(decoder.blocks)
        self._rates = [atp.progression(target, blocks, float(step)) for step in atp.candidate_steps(target, blocks)]
        self._streams: list[Stream] = []

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Prune a copy of the block at each candidate's rate, and advance that candidate's stream through it."""
        family = self._decoder.family
        if not self._streams:
            self._streams = [self._compared(stream)]
            self._streams += [self._streams[0].clone() for _ in self._rates[1:]]
        layers, norms = _input_norms(stream, block, index, family)
        with plain_linears(block, layers) as linears:
            for rates, candidate in zip(self._rates, self._streams, strict=True):
                for name, linear in linears.items():
                    weight = layers[name].merged()
                    mask = wanda_mask(weight, norms[name], float(rates[index]))
                    linear.weight.data.copy_(weight).masked_fill_(~mask, 0.0)
                candidate.advance(block, index)
        stream.advance(block, index)

    def _compared(self, stream: Stream) -> Stream:
        """Start a stream of every fourth of all processes' sequences."""
        first = distributed.first_own_index(len(stream.hidden))
        rows = torch.tensor(range(-first % COMPARED, len(stream.hidden), COMPARED), dtype=torch.int64)
        hidden = stream.hidden[rows.to(stream.hidden.device)]
        hidden = hidden.pin_memory() if stream.hidden.is_pinned() else hidden
        arguments = calibration.block_arguments(self._decoder, stream.ids[:1])
        batches = math.ceil(len(rows) / stream.batch_size)
        return replace(stream, hidden=hidden, arguments=[arguments] * batches, ids=stream.ids[rows])

    def importance(self) -> torch.Tensor:
        """Return the share (L,) that each block keeps in the best candidate; of equal losses, the smaller step."""
        with distributed.unsharded(self._decoder.model):
            losses = [distributed.all_reduce_number(self._loss(stream)) for stream in self._streams]
        return 1 - self._rates[losses.index(min(losses))]

    def _loss(self, stream: Stream) -> float:
        """Sum the loss of a stream that has passed all blocks, one sequence at a time."""
        rows = [slice(row, row + 1) for row in range(len(stream.hidden))]
        return sum(
            float(gradient_sweep.next_token_loss(self._decoder, stream.ids[row], stream.states(row))) for row in rows
        )


class KeptByLamp:
    """Measures the share of its weights that each block keeps under LAMP's threshold; counts scores by level."""

    def __init__(self, family: Family, target: float) -> None:
        self._family, self._target = family, target
        self._levels: list[torch.Tensor] = []

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Count the scores of the block's weights; no hidden states are needed."""
        found = torch.zeros(lamp.LEVELS, dtype=torch.int64)
        for number, layer in enumerate(_adapted(block, self._family).values()):
            if distributed.owns(number):
                found += lamp.lamp_levels(layer.merged())
        self._levels.append(distributed.all_reduce(found))

    def importance(self) -> torch.Tensor:
        """Compute the shares (L,)."""
        return lamp.lamp_kept(self._levels, self._target)


class FirstOrder:
    """Measures the first-order importance of every block: Σ |w·∂loss/∂w| (see reference/first_order.py)."""

    def __init__(self, decoder: Decoder) -> None:
        self._sweep = gradient_sweep.GradientSweep(decoder, self)
        self.advance, self.retreat = self._sweep.advance, self._sweep.retreat
        self._sums: dict[str, torch.Tensor] = {}
        self._found: dict[int, float] = {}

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Sum the gradient of a projection of the current block."""
        part = gradient_sweep.weight_gradient(x, grad_y)
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Sum the importances of the block's weights."""
        found = 0.0
        for name, weight in weights.items():
            gradient = self._sums.pop(name, None)
            gradient = torch.zeros_like(weight) if gradient is None else gradient
            found += first_order.first_order_importance(weight, distributed.all_reduce(gradient))
        self._found[index] = found / gradient_sweep.predicted_tokens(self._sweep.stream)

    def importance(self) -> torch.Tensor:
        """Return the importances (L,)."""
        return torch.tensor([self._found[index] for index in sorted(self._found)], dtype=torch.float64)


def _adapted(block: nn.Module, family: Family) -> dict[str, AdaptedLinear]:
    """Return the adapted projections of a block; those of an offloaded one get adapters of rank 0."""
    if not (layers := block_adapters(block, family)):
        adapt_block(block, family, 1.0)
        layers = block_adapters(block, family)
    return layers


def _input_norms(
    stream: Stream, block: nn.Module, index: int, family: Family
) -> tuple[dict[str, AdaptedLinear], dict[str, torch.Tensor]]:
    """Return the adapted projections of a block, and the norms of their inputs."""
    layers = _adapted(block, family)
    return layers, statistics.of_inputs(INPUT_NORM, block, index, family, stream)
