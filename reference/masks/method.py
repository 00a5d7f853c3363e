"""The record of a pruning method; masks/prune.py lists all records.

Legend: W (out × in) one projection's weight, S the method's statistic of its calibration input, kept the current mask.
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
"""How much to prune: a sparsity ρ, or (n, m) to keep n of every m consecutive inputs."""

Prune = Callable[[Array, Any, Mask, Amount], tuple[Array, Mask]]
"""(W, S, kept, amount) → (new weight, zero where pruned; its mask, a subset of kept)."""

Statistic = Callable[[Array, int], Array]
"""(calibration input (tokens, in), number of sequences) → S."""


GradientStatistic = Callable[[Array], Array]
"""gradient of the loss of each calibration sequence by the weight (n, out, in) → S."""


@dataclass(frozen=True)
class Method:
    """One pruning method.

    name: its value of `prune_method`. prune: prunes one projection further. statistic: computes S from the calibration input;
    gradient_statistic: from the gradients of the loss; both None if the method needs no statistic.
    sums_structures: whether a structure's score is the sum over all its projections (LLM-Pruner), not over those that read it.
    """

    name: str
    prune: Prune
    statistic: Statistic | None = None
    gradient_statistic: GradientStatistic | None = None
    sums_structures: bool = False

    @property
    def needs_statistic(self) -> bool:
        """Return whether `prune` needs S."""
        return self.statistic is not None or self.gradient_statistic is not None

    @property
    def structural_score(self) -> Callable[[Array, Any], Array] | None:
        """Return (W, S) → score (out, in) of a method that can score structures and moves no weights."""
        if isinstance(self.prune, LowestScores) and (self.gradient_statistic is None or self.sums_structures):
            return self.prune.score
        return None

    @classmethod
    def by_score(
        cls,
        name: str,
        score: Callable[[Array, Any], Array],
        statistic: Statistic | None = None,
        whole_matrix: bool = False,
        gradient_statistic: GradientStatistic | None = None,
        sums_structures: bool = False,
    ) -> Method:
        """Make a method that prunes the weights of lowest `score(W, S)` (out, in) and does not change the others."""
        return cls(name, LowestScores(score, whole_matrix), statistic, gradient_statistic, sums_structures)


@dataclass(frozen=True)
class LowestScores:
    """Prunes the lowest scores of every row or of the whole matrix; with n:m, of every m inputs."""

    score: Callable[[Array, Any], Array]
    whole_matrix: bool = False

    def __call__(self, weight: Array, statistic: Any, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
        """Prune one projection further; see `Prune`."""
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
