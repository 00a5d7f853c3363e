"""SLEB: remove whole decoder blocks, the most redundant one first. Spec: reference/sleb.py.

With a model: experiment/baselines/sleb.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from torch_impl import _checks

MOST = 1000


def removed_blocks(sparsity: float, blocks: int) -> int:
    """Return how many of L blocks of one size to remove: ⌊s·L + 1/2⌋, at most L − 2."""
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    return max(0, min(math.floor(sparsity * blocks + 0.5), blocks - 2))


def remove_blocks(loss: Callable[[tuple[int, ...]], float], blocks: int, count: int) -> torch.Tensor:
    """Remove the block whose absence raises the loss least, `count` times, never the first or last; return (count,) in order.

    loss: indices of the blocks that are left → the loss of that model. Candidates are tried from the front.
    """
    _checks.integer("blocks", blocks, 1, MOST)
    _checks.integer("count", count, 0, max(0, blocks - 2))
    left, removed = list(range(blocks)), []
    for _ in range(count):
        losses = {j: loss(tuple(i for i in left if i != j)) for j in left[1:-1]}
        if any(math.isnan(value) for value in losses.values()):
            raise ValueError("loss is NaN; allowed: numbers")
        removed.append(min(losses, key=lambda j: losses[j]))
        left.remove(removed[-1])
    return torch.tensor(removed, dtype=torch.int64)
