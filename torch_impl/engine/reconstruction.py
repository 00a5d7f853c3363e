"""Reconstruct one block of a run: with its adapters and streams, and in smaller batches when memory is full."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl import _checks, adapter, reconstruct
from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import AdaptedLinear, block_adapters
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.calibration import Stream
from torch_impl.engine.families import Family
from torch_impl.engine.lockstep import Reconstruct
from torch_impl.engine.memory import find_executable_batch_size


@dataclass(frozen=True)
class ReconstructionConfig:
    """Training of each pruned block's kept weights to reproduce the dense block's output."""

    reconstruct_epochs: int = 0
    """Epochs over the calibration sequences, for every block at every step; 0: no reconstruction (paper)."""
    reconstruct_learning_rate: float = 3e-3
    """Initial learning rate of Adam in reconstruction; it decays linearly to 0."""
    reconstruct_batch_size: int = 8
    """Sequences per optimizer step in reconstruction, over all processes together."""

    def __post_init__(self) -> None:
        _checks.count("reconstruct_epochs", self.reconstruct_epochs, 0)
        _checks.number("reconstruct_learning_rate", self.reconstruct_learning_rate, 0)
        _checks.count("reconstruct_batch_size", self.reconstruct_batch_size)


class Reconstructor:
    """Chooses which blocks to reconstruct at a step: the first one that has lost a weight, and all after it.

    Before that block, the streams are equal up to rounding, so there is nothing to reconstruct. start: sparsity of each block
    (L,) at the start of the run.
    """

    def __init__(self, family: Family, start: torch.Tensor, config: ReconstructionConfig) -> None:
        self._family, self._start, self._config = family, start, config
        self._damaged = False

    def _lost(self, block: nn.Module, index: int) -> bool:
        if not self._config.reconstruct_epochs:
            return False
        return zero_share(self._family.weights_of(block).values()) > float(self._start[index])

    def for_block(self, block: nn.Module, index: int) -> Reconstruct | None:
        """Return the function that reconstructs this pruned block, the next in order; None if there is nothing to do."""
        self._damaged = self._damaged or self._lost(block, index)
        if not self._damaged:
            return None
        return lambda pruned, dense, arguments: reconstruct_block(
            block, index, self._family, pruned, dense, arguments, self._config
        )


def reconstruct_block(
    block: nn.Module,
    index: int,
    family: Family,
    inputs: Stream,
    targets: Stream,
    arguments: Mapping[str, Any],
    config: ReconstructionConfig,
) -> None:
    """Train the merged weights of the pruned, gathered block `index` on its streams. The change goes into the base weights;
    the adapters stay.

    inputs: the pruned stream before the block. targets: the dense stream after it. arguments: the block's arguments for one
    sequence. Errors: FloatingPointError naming the block, which is then unchanged.
    """
    share = reconstruct.Share(distributed.first_own_index(len(inputs.hidden)), distributed.all_reduce)
    here = math.ceil(config.reconstruct_batch_size / distributed.processes())
    layers = block_adapters(block, family)
    masks = {name: layer.mask for name, layer in layers.items()}
    with _plain(block, layers) as linears:
        merged = {name: linear.weight.detach().clone() for name, linear in linears.items()}

        def attempt(rows: int) -> None:
            reconstruct.reconstruct_block(
                block,
                masks,
                inputs.hidden,
                targets.hidden,
                config.reconstruct_epochs,
                config.reconstruct_learning_rate,
                config.reconstruct_batch_size,
                arguments,
                rows,
                share,
            )

        try:
            find_executable_batch_size(attempt, here, "reconstruct_batch_size")
        except FloatingPointError as error:
            raise FloatingPointError(f"block {index}: {error} (now {config.reconstruct_learning_rate:g})") from error
        better = {name: linear.weight.detach() for name, linear in linears.items()}
    for name, layer in layers.items():
        layer.set_base(adapter.rebase(layer.weight, merged[name], better[name], masks[name]))


@contextmanager
def _plain(block: nn.Module, layers: Mapping[str, AdaptedLinear]) -> Iterator[dict[str, nn.Linear]]:
    """Within this context, give the block plain linears with the merged weights, and call it uncompiled and without FSDP hooks.

    A sharded block must be gathered.
    """
    linears = {}
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.merged().clone(), requires_grad=False)
        linear.bias = layer.bias
        linears[name] = linear
    compiled_call = block._compiled_call_impl
    try:
        for name, linear in linears.items():
            block.set_submodule(name, linear)
        block._compiled_call_impl = block.forward
        yield linears
    finally:
        block._compiled_call_impl = compiled_call
        for name, layer in layers.items():
            block.set_submodule(name, layer)
