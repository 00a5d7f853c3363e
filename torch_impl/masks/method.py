"""What a pruning method is: the record that the registry, masks/prune.py, lists. Spec: reference/masks/method.py.

Legend: W (out × in) one projection's weight, S what the method knows of its calibration input, kept the mask so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_impl.masks.nm import nm_mask
from torch_impl.masks.select import SORTED_AT_ONCE, demote_pruned, matrix_mask, rest_sparsity, row_mask

Amount = float | tuple[int, int]
"""How much to prune: a share of zeros ρ, or (n, m), which keeps n of each m consecutive inputs."""

Prune = Callable[[torch.Tensor, Any, torch.Tensor, Amount], tuple[torch.Tensor, torch.Tensor]]
"""(W, S, kept, amount) → (the new weight, zero where pruned; its mask, a part of kept)."""

Workspace = Callable[[int, int, int], int]
"""(rows, columns, bytes of a weight) → most bytes that pruning one projection takes beside its weight and S."""


@dataclass(frozen=True)
class InputStatistic:
    """S, as a sum over calibration inputs that come in batches, to several processes.

    part: (inputs (tokens, in) of one batch, number of sequences in all) → its part of the sum, a new tensor in float32 at
    least. finish: sum → S. entries: inputs of a projection → numbers in S.
    """

    part: Callable[[torch.Tensor, int], torch.Tensor]
    finish: Callable[[torch.Tensor], torch.Tensor]
    entries: Callable[[int], int]


@dataclass(frozen=True)
class Method:
    """One pruning method.

    name: what `prune_method` calls it. prune: prunes one projection further. statistic: S, which it needs; None if it needs
    nothing of the input. (A statistic of the loss's gradients would be another class beside `InputStatistic`, with a sweep
    of its own in engine/statistics.) moves_weights: whether kept weights change too. workspace: memory it needs.
    """

    name: str
    prune: Prune
    workspace: Workspace
    statistic: InputStatistic | None = None
    moves_weights: bool = False

    @classmethod
    def by_score(
        cls,
        name: str,
        score: Callable[[torch.Tensor, Any], torch.Tensor],
        statistic: InputStatistic | None = None,
        whole_matrix: bool = False,
    ) -> Method:
        """The method that prunes the lowest `score(W, S)` (out, in) and leaves the others as they are."""
        prune = LowestScores(score, whole_matrix)
        return cls(name, prune, prune.workspace, statistic)


@dataclass(frozen=True)
class LowestScores:
    """Prune the lowest scores: of every row, or of the whole matrix. With n:m, of every m inputs."""

    score: Callable[[torch.Tensor, Any], torch.Tensor]
    whole_matrix: bool = False

    def __call__(
        self, weight: torch.Tensor, statistic: Any, kept: torch.Tensor, amount: Amount
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Prune`."""
        score = demote_pruned(self.score(weight, statistic), kept)
        if isinstance(amount, tuple):
            mask = nm_mask(score, *amount)
        else:
            groups = kept.reshape(1, -1) if self.whole_matrix else kept
            sizes = torch.full((len(groups),), groups.shape[1], dtype=torch.float64)
            rest = rest_sparsity(sizes - groups.sum(1).cpu(), sizes, amount)
            mask = matrix_mask(score, rest) if self.whole_matrix else row_mask(score, rest)
        mask &= kept
        return weight.masked_fill(~mask, 0.0), mask

    def workspace(self, rows: int, columns: int, itemsize: int) -> int:
        """As `Workspace`: the score, twice, and a sort of it; then the new weight."""
        wide, entries = max(4, itemsize), rows * columns
        sorting = 36 * (entries if self.whole_matrix else min(entries, SORTED_AT_ONCE))
        return max(entries * (2 * wide + 3) + sorting, entries * (3 * wide + itemsize + 2))
