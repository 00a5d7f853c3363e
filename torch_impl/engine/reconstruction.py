"""Reconstruct blocks of a run: with their adapters and streams, and in smaller batches when memory is full."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl import _checks, adapter, reconstruct
from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import block_adapters, plain_linears
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.calibration import Stream
from torch_impl.engine.families import Family
from torch_impl.engine.graphs import Repeater
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
    reconstruct_window: int = 1
    """Blocks trained together: the one just pruned and those before it; 1: each block by itself."""

    def __post_init__(self) -> None:
        _checks.count("reconstruct_epochs", self.reconstruct_epochs, 0)
        _checks.number("reconstruct_learning_rate", self.reconstruct_learning_rate, 0)
        _checks.count("reconstruct_batch_size", self.reconstruct_batch_size)
        _checks.count("reconstruct_window", self.reconstruct_window)

    @property
    def window(self) -> int:
        """Return the number of blocks trained together; 1 also without reconstruction."""
        return self.reconstruct_window if self.reconstruct_epochs else 1

    @property
    def more_streams(self) -> int:
        """Return 1 if a stream waits before each window."""
        return int(self.window > 1)

    def trainings(self, blocks: int) -> int:
        """Return how many blocks are trained at a step, each counted once for every window it is in."""
        return sum(min(index + 1, self.window) for index in range(blocks))


class Reconstructor:
    """Chooses which blocks to reconstruct at a step: the first one that has lost a weight, and all after it.

    start: sparsity of each block (L,) at the start of the run. cuda_graphs: whether to use them on a GPU. apart: a context for
    each training.
    """

    def __init__(
        self,
        family: Family,
        start: torch.Tensor,
        config: ReconstructionConfig,
        cuda_graphs: bool,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._family, self._start, self._config, self._repeat = family, start, config, Repeater(cuda_graphs)
        self._apart = apart
        self._damaged: deque[nn.Module] = deque(maxlen=config.reconstruct_window)

    def _lost(self, block: nn.Module, index: int) -> bool:
        if not self._config.reconstruct_epochs:
            return False
        return zero_share(self._family.weights_of(block).values()) > float(self._start[index])

    def for_block(self, block: nn.Module, index: int) -> Reconstruct | None:
        """Return what reconstructs this pruned block, the next in order, with its window; None if there is nothing to do."""
        if self._damaged or self._lost(block, index):
            self._damaged.append(block)
        if not self._damaged:
            return None
        blocks = list(self._damaged)

        def train(pruned: Stream, dense: Stream, arguments: Sequence[Mapping[str, Any]]) -> None:
            with self._apart():
                reconstruct_blocks(blocks, index, self._family, pruned, dense, arguments, self._config, self._repeat)

        return Reconstruct(index + 1 - len(blocks), blocks, train)


def reconstruct_blocks(
    blocks: Sequence[nn.Module],
    last: int,
    family: Family,
    inputs: Stream,
    targets: Stream,
    arguments: Sequence[Mapping[str, Any]],
    config: ReconstructionConfig,
    repeat: Repeater,
) -> None:
    """Train the merged weights of pruned, gathered blocks that end with block `last`, together, on their streams. The change
    goes into the base weights; the adapters stay.

    inputs: the pruned stream before the first. targets: the dense stream after the last. arguments: those of each block for
    one sequence. repeat: captures passes on a GPU. Errors: FloatingPointError naming the last block; all are then unchanged.
    """
    share = reconstruct.Share(distributed.first_own_index(len(inputs.hidden)), distributed.all_reduce)
    here = math.ceil(config.reconstruct_batch_size / distributed.processes())
    layers = [block_adapters(block, family) for block in blocks]
    masks = [{name: layer.mask for name, layer in of_block.items()} for of_block in layers]
    with ExitStack() as stack:
        linears = [
            stack.enter_context(plain_linears(block, found, compiled=True))
            for block, found in zip(blocks, layers, strict=True)
        ]
        merged = [{name: weight.clone() for name, weight in _weights(found).items()} for found in linears]

        def attempt(rows: int) -> None:
            reconstruct.reconstruct_blocks(
                blocks,
                masks,
                inputs.hidden,
                targets.hidden,
                config.reconstruct_epochs,
                config.reconstruct_learning_rate,
                config.reconstruct_batch_size,
                arguments,
                rows,
                share,
                repeat,
            )

        try:
            find_executable_batch_size(attempt, here, "reconstruct_batch_size")
        except FloatingPointError as error:
            raise FloatingPointError(f"block {last}: {error} (now {config.reconstruct_learning_rate:g})") from error
        better = [_weights(of_block) for of_block in linears]
    for found, old, new, kept in zip(layers, merged, better, masks, strict=True):
        for name, layer in found.items():
            layer.set_base(adapter.rebase(layer.weight, old[name], new[name], kept[name]))


def _weights(linears: Mapping[str, nn.Linear]) -> dict[str, torch.Tensor]:
    return {name: linear.weight.detach() for name, linear in linears.items()}
