"""Capture work as a CUDA graph and replay it. The graph must keep all tensors alive that it reads or writes.

A graph stores addresses, not tensors. Memory allocated during the capture belongs to the graph's pool. A tensor allocated
before is freed with its last reference, and a replay would then read whatever is stored in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

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
