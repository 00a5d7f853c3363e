"""The record of a pruning method; masks/prune.py lists all records. Spec: reference/masks/method.py.

Legend: W (out × in) one projection's weight, S the method's statistic of its calibration input, kept the current mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_impl.masks.nm import nm_mask
from torch_impl.masks.select import demote_pruned, matrix_mask, rest_sparsity, row_mask
from torch_impl.masks.select import workspace as choosing

Amount = float | tuple[int, int]
"""How much to prune: a sparsity ρ, or (n, m) to keep n of every m consecutive inputs."""

Prune = Callable[[torch.Tensor, Any, torch.Tensor, Amount], tuple[torch.Tensor, torch.Tensor]]
"""(W, prepared S, kept, amount) → (new weight, zero where pruned; its mask, a subset of kept)."""

Workspace = Callable[[int, int, int], int]
"""(rows, columns, bytes of a weight) → peak bytes for pruning one projection, besides its weight and S."""


@dataclass(frozen=True)
class InputStatistic:
    """S as a sum over batches of calibration inputs and over processes.

    part: (inputs (tokens, in) of one batch, total number of sequences) → its part of the sum, a new tensor in float32 at
    least. finish: sum → S. entries: number of inputs of a projection → number of entries in S.
    """

    part: Callable[[torch.Tensor, int], torch.Tensor]
    finish: Callable[[torch.Tensor], torch.Tensor]
    entries: Callable[[int], int]


@dataclass(frozen=True)
class GradientStatistic:
    """S as a sum over calibration sequences and processes.

    part: gradient of the loss of one sequence by the weight (out, in) → its part of the sum (out, in), a new tensor.
    finish: sum → S.
    """

    part: Callable[[torch.Tensor], torch.Tensor]
    finish: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """One pruning method.

    name: its value of `prune_method`. prune: prunes one projection further. statistic: computes S, of the input or of the
    gradients; None if the method needs none. moves_weights: whether kept weights change too. workspace: the memory it needs.
    prepare: S → what `prune` needs of it, computed once for the projections that share an input; default S itself.
    sums_structures: whether a structure's score is the sum over all its projections (LLM-Pruner), not over those that read it.
    """

    name: str
    prune: Prune
    workspace: Workspace
    statistic: InputStatistic | GradientStatistic | None = None
    moves_weights: bool = False
    prepare: Callable[[Any], Any] = lambda statistic: statistic
    sums_structures: bool = False

    @property
    def structural_score(self) -> Callable[[torch.Tensor, Any], torch.Tensor] | None:
        """Return (W, S) → score (out, in) of a method that can score structures and moves no weights."""
        gradients = isinstance(self.statistic, GradientStatistic)
        if isinstance(self.prune, LowestScores) and (self.sums_structures or not gradients):
            return self.prune.score
        return None

    @classmethod
    def by_score(
        cls,
        name: str,
        score: Callable[[torch.Tensor, Any], torch.Tensor],
        statistic: InputStatistic | GradientStatistic | None = None,
        whole_matrix: bool = False,
        sums_structures: bool = False,
    ) -> Method:
        """Make a method that prunes the weights of lowest `score(W, S)` (out, in) and does not change the others."""
        prune = LowestScores(score, whole_matrix)
        return cls(name, prune, prune.workspace, statistic, sums_structures=sums_structures)


@dataclass(frozen=True)
class LowestScores:
    """Prunes the lowest scores of every row or of the whole matrix; with n:m, of every m inputs."""

    score: Callable[[torch.Tensor, Any], torch.Tensor]
    whole_matrix: bool = False

    def __call__(
        self, weight: torch.Tensor, statistic: Any, kept: torch.Tensor, amount: Amount
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prune one projection further; see `Prune`."""
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
        """Return the peak bytes (see `Workspace`): two copies of the score and choosing, then the new weight."""
        wide, entries = max(4, itemsize), rows * columns
        return max(entries * (2 * wide + 3) + choosing(entries, wide), entries * (3 * wide + itemsize + 2))
