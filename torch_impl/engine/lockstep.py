"""Run the dense and the pruned stream through the blocks together; they can be recomputed up to any block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from torch_impl.engine import calibration, statistics
from torch_impl.engine.blocks import Blocks, advance
from torch_impl.engine.memory import find_executable_batch_size

Result = TypeVar("Result")


@dataclass(frozen=True)
class Reconstruct:
    """Trains the blocks from number `first` to the one just pruned.

    train: called with the pruned stream before the first, the dense stream after the last, and each block's arguments for
    one sequence. If it fails, it must leave the blocks unchanged.
    """

    first: int
    blocks: Sequence[nn.Module]
    train: Callable[[calibration.Stream, calibration.Stream, Sequence[dict[str, Any]]], None]


class Lockstep:
    """Iterates over the blocks with the pruned stream before each block and the dense stream after it.

    If the device runs out of memory, both streams are recomputed in smaller batches from the tokens through the blocks before
    the current one, which are already pruned. So hidden states are never stored.

    window: number of blocks reconstructed together. If above 1, a third stream waits before the first of them. `recent`: the
    current block and those before it that may still change, by number.
    """

    def __init__(self, blocks: Blocks, batch_size: int, window: int = 1) -> None:
        self.batch_size, self._window = batch_size, window
        self._waiting: calibration.Stream | None = None
        self._waits_at = 0
        self._blocks = blocks
        self._pairs: Iterator[tuple[nn.Module, nn.Module]] = iter(())
        self._streams: tuple[calibration.Stream, ...] = ()
        self._arguments: list[dict[str, Any]] = []
        self._index = 0
        self.recent: dict[int, nn.Module] = {}
        self._reconstructed = False
        self._passed, self._opened = -1, False
        """Number of blocks that both streams have passed, -1 if they must restart; whether the dense stream has passed one more."""

    def __iter__(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, block); prune the block, then call `advance`."""
        for index in range(len(self._blocks.weights)):
            self._index, self._reconstructed = index, False
            self.recent.pop(index - self._window, None)
            self._attempt(lambda: None)
            yield index, self.recent[index]

    def pruned_input(self, work: Callable[[calibration.Stream], Result]) -> Result:
        """Run read-only `work` on the pruned stream before the current block; return its result."""
        return self._attempt(lambda: work(self._streams[1]))

    def advance(self, reconstruct: Reconstruct | None = None) -> float:
        """Advance the pruned stream through the current block. Return e of LoSA, Eq. 6, of its outputs.

        reconstruct: trains the current block, and those before it in its window, before the pruned stream passes them.
        """
        return self._attempt(lambda: self._advance(reconstruct))

    def _advance(self, reconstruct: Reconstruct | None) -> float:
        dense, pruned = self._streams
        if reconstruct is not None and not self._reconstructed:
            self._reconstruct(reconstruct)
        self._pass()
        return reconstruction_error(dense, pruned)

    def _reconstruct(self, reconstruct: Reconstruct) -> None:
        """Train the blocks of a window; advance the pruned stream to the current block through those before it."""
        dense, pruned = self._streams
        # Recorded only when needed: for a sharded model it gathers the weights outside the blocks in every process.
        self._arguments = self._arguments or self._blocks.arguments()
        first, family = reconstruct.first, self._blocks.decoder.family
        self._wait_before(first)
        inputs = self._waiting or pruned
        reconstruct.train(inputs, dense, self._arguments[first : self._index + 1])
        # Do not repeat it if memory runs out afterwards.
        self._reconstructed = True
        if first < self._index:
            pruned.hidden.copy_(inputs.hidden)
        for number, block in enumerate(reconstruct.blocks[:-1], first):
            advance(pruned, block, number, family)

    def _attempt(self, work: Callable[[], Result]) -> Result:
        def attempt(size: int) -> Result:
            self._reach(size)
            return work()

        if not self._blocks.restartable:
            return attempt(self.batch_size)
        result, self.batch_size = find_executable_batch_size(attempt, self.batch_size, "calibration_batch_size")
        return result

    def _reach(self, batch_size: int) -> None:
        """Advance the streams to the current block, or recompute them from the tokens."""
        if batch_size != self.batch_size or self._passed < 0:
            self._start(batch_size)
        if not self._opened:
            self._open()

    def _start(self, batch_size: int) -> None:
        self._passed, self._opened = -1, False
        self._streams, self._pairs, self._waiting = (), iter(()), None
        self.recent = {number: block for number, block in self.recent.items() if number > self._index - self._window}
        dense = self._blocks.start(batch_size)
        self._streams, self._pairs = (dense, dense.clone()), self._blocks.pairs()
        self._waiting, self._waits_at = dense.clone() if self._window > 1 else None, 0
        self._passed = 0
        while self._passed < self._index:
            number = self._passed
            known = number in self.recent
            self._open()
            if not known:
                self._blocks.restore(number, self.recent[number])
            self._pass()
            self.recent.pop(number - self._window + 1, None)

    def _open(self) -> None:
        """Advance the dense stream through the next block, which becomes a recent one. That of an earlier attempt stays."""
        index, self._passed = self._passed, -1
        dense_block, block = next(self._pairs)
        advance(self._streams[0], dense_block, index, self._blocks.decoder.family)
        self._passed, self._opened = index, True
        if self.recent.setdefault(index, block) is not block:
            self._blocks.discard(block)

    def _pass(self) -> None:
        """Advance the pruned stream through the block that the dense stream has passed."""
        index, self._passed = self._passed, -1
        advance(self._streams[1], self.recent[index], index, self._blocks.decoder.family)
        # The first block of a full window does not change any more.
        self._wait_before(index - self._window + 2)
        self._passed, self._opened = index + 1, False

    def _wait_before(self, first: int) -> None:
        """Advance the waiting stream, if there is one, to block `first`."""
        while self._waiting is not None and self._waits_at < first:
            advance(self._waiting, self.recent[self._waits_at], self._waits_at, self._blocks.decoder.family)
            self._waits_at += 1


def reconstruction_error(dense: calibration.Stream, pruned: calibration.Stream) -> float:
    """Compute e of LoSA, Eq. 6, of two streams, batch by batch. This needs less memory than running a block."""
    error = statistics.ReconstructionError()
    for _, rows in pruned.batches():
        error.update(dense.states(rows), pruned.states(rows))
    return error.result()
