"""What happens when the device runs out of memory: the same work in smaller batches."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from torch_impl.engine import distributed

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


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
