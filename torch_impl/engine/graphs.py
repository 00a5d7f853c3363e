"""Work recorded once as a CUDA graph and replayed: it must own everything outside itself that it reads or writes.

A graph holds addresses, not tensors. Memory that a capture itself allocates belongs to the graph's pool; a tensor that was
there before the capture is freed as soon as nobody refers to it, and a replay then reads whatever has taken its place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """`work`, captured; it has not run yet. `replay` runs it; `result` is what it returned, overwritten by every replay.

    owned: the tensors that were there before and that the graph uses, in any nesting of containers: kept alive as long as the
    graph. pool: that of another graph, to share its memory; then only one of the two may be between a replay and the reading
    of its result.

    Errors: torch.OutOfMemoryError if memory runs out; RuntimeError if the work cannot be captured.
    """

    def __init__(self, work: Callable[[], Result], owned: Any, pool: Any = None) -> None:
        self._owned = owned
        self._graph = torch.cuda.CUDAGraph()
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        """Its memory, for other graphs to share."""
        try:
            with torch.cuda.graph(self._graph, pool=self.pool):
                self.result = work()
        except RuntimeError as error:
            # Unless told that the capture is over, the allocator never again gives free memory back to the device. It refuses
            # where the capture broke for a reason that has nothing to do with CUDA, and was ended.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
            # Ending a broken capture raises an error of its own, which hides the one that broke it.
            if isinstance(error.__context__, RuntimeError):
                raise error.__context__ from None
            raise

    def replay(self) -> Result:
        """Run the work on what the tensors hold now; waits for nothing."""
        self._graph.replay()
        return self.result
