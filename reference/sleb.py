"""SLEB, a baseline: remove whole decoder blocks, the most redundant one first.

Legend: L blocks, at most MOST; a model without some blocks passes the hidden states on to the next block that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from reference import _checks

MOST = 1000


def removed_blocks(sparsity: float, blocks: int) -> int:
    """Choose how many blocks to remove, so that the share of removed blocks is nearest to the sparsity.

    Source: SLEB (arXiv 2402.09025), Section 3.

        ⌊s · L + 1/2⌋, at most L − 2

    Parameters: sparsity s in [0, 1]; blocks L ≥ 1, all of one size. Returns: count; the first and the last block stay.

    *Deviation*: the paper gives the count itself.

    >>> removed_blocks(0.2, 32), removed_blocks(0.9, 4)  # 6.4 blocks; 3.6, but two stay
    (6, 2)
    """
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    return max(0, min(math.floor(sparsity * blocks + 0.5), blocks - 2))


def remove_blocks(loss: Callable[[tuple[int, ...]], float], blocks: int, count: int) -> NDArray[np.int64]:
    """Choose the blocks to remove, one after the other: always the one whose absence raises the loss least.

    Source: SLEB (arXiv 2402.09025), Algorithm 1, Metric³: the loss of the model without the candidate and without all blocks
    that were removed before.

        removed_k = argmin { loss(all but removed_1, …, removed_{k−1} and j) : j neither the first nor the last }

    Parameters: loss: indices of the blocks that are left, rising → loss of that model on the calibration text, not NaN; blocks L;
    count ≤ L − 2. Returns: (count,), in the order of removal. It calls the loss of one candidate after the other, from the front.

    Ties: the lower index.

    *Deviation*: none.

    >>> remove_blocks(lambda left: 10.0 - sum(left), blocks=4, count=2)  # the lower the index, the less it adds
    array([1, 2])
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
    return np.array(removed, dtype=np.int64)
