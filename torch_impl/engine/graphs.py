"""Capture work as a CUDA graph and replay it. The graph must keep all tensors alive that it reads or writes.

A graph stores addresses, not tensors. Memory allocated during the capture belongs to the graph's pool. A tensor allocated
before is freed with its last reference, and a replay would then read whatever is stored in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Captured(Generic[Result]):
    """`work`, captured but not yet run. `replay` runs it; every replay overwrites `result`.

    owned: all existing tensors that the graph uses, in any nesting of containers; kept alive as long as the graph. pool: of
    another graph, to share its memory; then read the result of one graph before replaying the other.

    Errors: torch.OutOfMemoryError if memory runs out; RuntimeError if the work cannot be captured.
    """

    def __init__(self, work: Callable[[], Result], owned: Any, pool: Any = None) -> None:
        self._owned = owned
        self._graph = torch.cuda.CUDAGraph()
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        """The memory pool, for other graphs to share."""
        try:
            with torch.cuda.graph(self._graph, pool=self.pool):
                self.result = work()
        except RuntimeError as error:
            # Tell the allocator that the capture is over; otherwise it never returns free memory to the device. This call
            # fails if the capture failed outside CUDA and has already ended.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            # Ending a failed capture raises a second error that hides the first one.
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from None
            raise

    def replay(self) -> Result:
        """Run the work on the tensors' current values, without synchronising."""
        self._graph.replay()
        return self.result


class Repeater:
    """Turns work that is repeated on the same tensors into a CUDA graph, as `reconstruct.Repeat` asks; on a CPU, leaves it.

    name: of the work, for the log. If the graph does not fit into memory, that work is done launch by launch; if it cannot be
    captured, all later work too.
    """

    def __init__(self, enabled: bool, name: str = "reconstruction") -> None:
        self._enabled, self._name = enabled, name

    def __call__(self, work: Callable[[], None], owned: Any) -> Callable[[], None]:
        """Return what does `work`. owned: see `Captured`."""
        if not self._enabled or not _on_gpu(owned):
            return work
        try:
            return Captured(work, owned).replay
        except torch.OutOfMemoryError:
            return work
        except RuntimeError as error:
            self._enabled = False
            reason = " ".join(str(error).split())[:160]
            logger.warning("CUDA graph capture failed, so %s is slower (%s)", self._name, reason)
            return work


def _on_gpu(owned: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(owned))
