"""What a pruning method is: the record that the registry, masks/prune.py, lists.

Legend: W (out × in) one projection's weight, S what the method knows of its calibration input, kept the mask so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference._checks import Array, Mask
from reference.masks.nm import nm_mask
from reference.masks.select import demote_pruned, matrix_mask, rest_sparsity, row_mask

Amount = float | tuple[int, int]
"""How much to prune: a share of zeros ρ, or (n, m), which keeps n of each m consecutive inputs."""

Prune = Callable[[Array, Any, Mask, Amount], tuple[Array, Mask]]
"""(W, S, kept, amount) → (the new weight, zero where pruned; its mask, a part of kept)."""

Statistic = Callable[[Array, int], Array]
"""(calibration input (tokens, in), number of sequences it came in) → S."""


@dataclass(frozen=True)
class Method:
    """One pruning method.

    name: what `prune_method` calls it. prune: prunes one projection further. statistic: S, which it needs; None if it needs
    nothing of the input.
    """

    name: str
    prune: Prune
    statistic: Statistic | None = None

    @classmethod
    def by_score(
        cls,
        name: str,
        score: Callable[[Array, Any], Array],
        statistic: Statistic | None = None,
        whole_matrix: bool = False,
    ) -> Method:
        """The method that prunes the lowest `score(W, S)` (out, in) and leaves the others as they are."""
        return cls(name, LowestScores(score, whole_matrix), statistic)


@dataclass(frozen=True)
class LowestScores:
    """Prune the lowest scores: of every row, or of the whole matrix. With n:m, of every m inputs."""

    score: Callable[[Array, Any], Array]
    whole_matrix: bool = False

    def __call__(self, weight: Array, statistic: Any, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
        """As `Prune`."""
        score = demote_pruned(self.score(weight, statistic), kept)
        if isinstance(amount, tuple):
            mask = nm_mask(score, *amount)
        else:
            groups = kept.reshape(1, -1) if self.whole_matrix else kept
            zeros, sizes = (~groups).sum(axis=1).astype(np.float64), np.full(len(groups), float(groups.shape[1]))
            rest = rest_sparsity(zeros, sizes, amount)
            mask = matrix_mask(score, rest) if self.whole_matrix else row_mask(score, rest)
        mask &= kept
        return np.where(mask, weight, 0.0), mask
