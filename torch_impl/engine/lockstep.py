"""Dense and pruned streams that go through the blocks together, and can be put at any block again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from torch_impl.engine import calibration, statistics
from torch_impl.engine.blocks import Blocks, advance
from torch_impl.engine.memory import halving

Result = TypeVar("Result")
Reconstruct = Callable[[calibration.Stream, calibration.Stream, dict[str, Any]], None]


class Lockstep:
    """Goes through the blocks in order, with what enters each of them in the pruned model and what leaves it in the dense one.

    When the device's memory is full, the streams start again from the tokens, in smaller batches, and go through the
    blocks before the one at hand, which are pruned already: nothing of them is ever stored.
    """

    def __init__(self, blocks: Blocks, batch_size: int) -> None:
        self.batch_size = batch_size
        self._blocks = blocks
        self._pairs: Iterator[tuple[nn.Module, nn.Module]] = iter(())
        self._streams: tuple[calibration.Stream, ...] = ()
        self._arguments: list[dict[str, Any]] = []
        self._index = 0
        self._block: nn.Module | None = None
        self._reconstructed = False
        self._passed, self._opened = -1, False
        """Blocks that both streams are behind, -1 for none to go on from; whether the dense one is behind the next, too."""

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """Each block's number and the block, to be pruned before `advance` is called for it."""
        for index in range(len(self._blocks.weights)):
            self._index, self._block, self._reconstructed = index, None, False
            self._attempt(lambda: None)
            assert self._block is not None
            yield index, self._block

    def pruned_input(self, work: Callable[[calibration.Stream], Result]) -> Result:
        """Run read-only `work` on the pruned stream before the block at hand; return its result."""
        return self._attempt(lambda: work(self._streams[1]))

    def advance(self, reconstruct: Reconstruct | None = None) -> float:
        """Take the pruned stream through the block at hand. Returns e of LoSA, Eq. 6, of its outputs.

        reconstruct: changes the block before its stream goes through; it hears the pruned stream before the block, the dense
        one behind it, and what the model calls the block with for one sequence. It leaves the block as it is if it fails.
        """
        return self._attempt(lambda: self._advance(reconstruct))

    def _advance(self, reconstruct: Reconstruct | None) -> float:
        dense, pruned = self._streams
        assert self._block is not None
        if reconstruct is not None and not self._reconstructed:
            # Asked for only here: of a sharded model that brings what lies outside its blocks to every process.
            self._arguments = self._arguments or self._blocks.arguments()
            reconstruct(pruned, dense, self._arguments[self._index])
            # Not again if memory is full behind it.
            self._reconstructed = True
        self._pass(self._block)
        return reconstruction_error(dense, pruned)

    def _attempt(self, work: Callable[[], Result]) -> Result:
        def attempt(size: int) -> Result:
            self._reach(size)
            return work()

        if not self._blocks.restartable:
            return attempt(self.batch_size)
        result, self.batch_size = halving(attempt, self.batch_size, "calibration_batch_size")
        return result

    def _reach(self, batch_size: int) -> None:
        """Have the streams at the block at hand: go on, or start again from the tokens."""
        if batch_size != self.batch_size or self._passed < 0:
            self._start(batch_size)
        if not self._opened:
            block = self._open()
            # On a second attempt the block at hand is there, and pruned perhaps.
            self._block = block if self._block is None else self._block

    def _start(self, batch_size: int) -> None:
        self._passed, self._opened = -1, False
        self._streams, self._pairs = (), iter(())
        dense = self._blocks.start(batch_size)
        self._streams, self._pairs = (dense, dense.clone()), self._blocks.pairs()
        self._passed = 0
        while self._passed < self._index:
            block = self._open()
            self._blocks.restore(self._passed, block)
            self._pass(block)

    def _open(self) -> nn.Module:
        """Take the dense stream through the next block. Returns the block to prune."""
        index, self._passed = self._passed, -1
        dense_block, block = next(self._pairs)
        advance(self._streams[0], dense_block, index, self._blocks.decoder.family)
        self._passed, self._opened = index, True
        return block

    def _pass(self, block: nn.Module) -> None:
        """Take the pruned stream through the block that the dense one is behind."""
        index, self._passed = self._passed, -1
        advance(self._streams[1], block, index, self._blocks.decoder.family)
        self._passed, self._opened = index + 1, False


def reconstruction_error(dense: calibration.Stream, pruned: calibration.Stream) -> float:
    """e of LoSA, Eq. 6, of two streams. Differences of a batch in float32 take less than a block does for it."""
    error = statistics.ReconstructionError()
    for _, rows in pruned.batches():
        error.update(dense.states(rows), pruned.states(rows))
    return error.result()
