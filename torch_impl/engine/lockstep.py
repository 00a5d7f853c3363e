"""Run the dense and the pruned stream through the blocks together; they can be recomputed up to any block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from torch_impl.engine import calibration, distributed, statistics
from torch_impl.engine.adapted_linear import block_adapters, holding
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.families import Family, decoder_blocks
from torch_impl.engine.memory import halving

Result = TypeVar("Result")
Reconstruct = Callable[[calibration.Stream, calibration.Stream, dict[str, Any]], None]


class Lockstep:
    """The hidden states before block `index` in the dense and in the pruned model.

    To resume in the middle of a sweep, or to use smaller batches when memory is full, both streams are recomputed from the
    tokens through the blocks before `index`, which are already pruned. So hidden states are never stored.
    """

    def __init__(
        self, model: nn.Module, dense: nn.Module, family: Family, ids: torch.Tensor, batch_size: int, index: int
    ) -> None:
        self._dense, self._blocks = dense, decoder_blocks(model, family)
        self._family, self._ids = family, ids
        self._streams: tuple[calibration.Stream, ...] = ()
        self._arguments: list[dict[str, Any]] = []
        self._dense_blocks: Iterator[nn.Module] = iter(())
        self._at = -1
        self._index = index
        self.batch_size = batch_size

    def pruned_input(self, work: Callable[[calibration.Stream], Result]) -> Result:
        """Run read-only `work` on the pruned stream and return its result."""
        return self._attempt(lambda: work(self._streams[1]))

    def advance(self, reconstruct: Reconstruct | None = None) -> float:
        """Advance both streams through the next block. Return e of LoSA, Eq. 6, of its outputs.

        reconstruct: trains the block before the pruned stream passes it. Called with the pruned stream before the block, the
        dense stream after it, and the block's arguments for one sequence. If it fails, it must leave the block unchanged.
        """
        error = self._attempt(lambda: self._advance(reconstruct))
        self._index += 1
        return error

    def _advance(self, reconstruct: Reconstruct | None) -> float:
        index, self._at = self._at, -1
        self._through(index, reconstruct)
        error = reconstruction_error(*self._streams)
        self._at = index + 1
        return error

    def _through(self, index: int, reconstruct: Reconstruct | None = None) -> None:
        dense, pruned = self._streams
        self._stream_through(dense, next(self._dense_blocks), index)
        if reconstruct is not None:
            # Recorded only when needed: for a sharded model it gathers the weights outside the blocks in every process.
            self._arguments = self._arguments or calibration.block_arguments(self._dense, self._family, self._ids[:1])
            reconstruct(pruned, dense, self._arguments[index])
        self._stream_through(pruned, self._blocks[index], index)

    def _stream_through(self, stream: calibration.Stream, block: nn.Module, index: int) -> None:
        with distributed.whole(block), holding(list(block_adapters(block, self._family).values())):
            stream.advance(block, index)

    def _attempt(self, work: Callable[[], Result]) -> Result:
        def attempt(size: int) -> Result:
            if self._at != self._index or size != self.batch_size:
                self._start(size)
            return work()

        result, self.batch_size = halving(attempt, self.batch_size, "calibration_batch_size")
        return result

    def _start(self, batch_size: int) -> None:
        self._at, self._streams = -1, ()
        dense = calibration.start_stream(self._dense, self._family, self._ids, batch_size)
        self._streams = (dense, dense.clone())
        self._dense_blocks = sweep(self._dense, self._family)
        for index in range(self._index):
            self._through(index)
        self._at = self._index


def reconstruction_error(dense: calibration.Stream, pruned: calibration.Stream) -> float:
    """Compute e of LoSA, Eq. 6, of two streams, batch by batch. This needs less memory than running a block."""
    error = statistics.ReconstructionError()
    for _, rows in pruned.batches():
        error.update(dense.states(rows), pruned.states(rows))
    return error.result()
