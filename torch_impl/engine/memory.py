"""Free memory, room for hidden states, and smaller batches when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from torch_impl.engine import distributed

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# Usable share of the free memory; the rest is for fragmentation and the libraries' workspaces.
SHARE = 0.9


def free_bytes(device: torch.device) -> int:
    """Return how many bytes a process may still allocate on a device (CPU: in host memory)."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class MemoryBudget:
    """The memory budget for hidden states on a device, besides the `working` bytes that the computation itself needs.

    budget: bytes to use; default all free memory.
    """

    def __init__(self, device: torch.device, working: int, budget: int | None = None) -> None:
        self._left = self._all = int(SHARE * (free_bytes(device) if budget is None else budget)) - working
        # On the CPU there is no alternative.
        self._always = device.type != "cuda"

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes if they fit; return whether they do."""
        if self._always or size <= self._left:
            self._left -= size
            return True
        return False

    def release_all(self) -> None:
        """Free all reserved bytes."""
        self._left = self._all


def find_executable_batch_size(work: Callable[[int], Result], size: int, name: str) -> tuple[Result, int]:
    """Run work(size); halve the size each time the device runs out of memory. Return (result, size).

    name: of the option, for the log. Errors: torch.OutOfMemoryError if a size of 1 is too large, or if there are several
    processes: all take part in every batch, so one must not change its number of batches.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size == 1 or distributed.processes() > 1:
                raise
        # The tensors of the failed attempt are free only here, outside the exception handler.
        logger.warning("out of memory on the device: reducing %s from %d to %d", name, size, size // 2)
        size //= 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
