"""Memory that is free, room for hidden states in it, and what happens when there is none: the same work in smaller batches."""

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

# What is left free of a device: the allocator's fragments and the libraries' own workspaces.
SHARE = 0.9


def free_bytes(device: torch.device) -> int:
    """Bytes that a process may still take on a device (the CPU: of the host's memory)."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_in_training(itemsize: int) -> int:
    """Bytes that reconstruction takes for one weight of `itemsize` bytes, beside it: see `Sizes.reconstruction`."""
    rounded = 2 * itemsize if itemsize < 4 else 0
    return 4 * max(4, itemsize) + 2 * itemsize + rounded + 1


class Room:
    """Room on a device for hidden states beside what the work itself takes. working: bytes of that.

    budget: bytes to get by with, if not all that is free.
    """

    def __init__(self, device: torch.device, working: int, budget: int | None = None) -> None:
        self._left = self._all = int(SHARE * (free_bytes(device) if budget is None else budget)) - working
        # On the CPU there is no other place.
        self._always = device.type != "cuda"

    def take(self, size: int) -> bool:
        """Whether so many bytes more fit; if they do, they are taken."""
        if self._always or size <= self._left:
            self._left -= size
            return True
        return False

    def give_back(self) -> None:
        """All that was taken is free again."""
        self._left = self._all


def halving(work: Callable[[int], Result], size: int, name: str) -> tuple[Result, int]:
    """(work(size), size), with half the size, logged under the option's name, each time the device's memory is full.

    Errors: torch.OutOfMemoryError if a size of 1 is still too much, or if there are several processes: all take part in
    every batch, so none may change its own number of them.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size == 1 or distributed.processes() > 1:
                raise
        # Only here, outside the handler, are the tensors of the failed attempt free.
        logger.warning("out of memory on the device: %s goes on with %d instead of %d", name, size // 2, size)
        size //= 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
