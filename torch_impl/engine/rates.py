"""The registry of rate rules, which choose each block's sparsity (its rate). A new rule is one record in `RULES`.

Spec: reference/rates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from torch_impl import rmi, schedule, sparsity
from torch_impl.engine import statistics
from torch_impl.engine.calibration import Stream
from torch_impl.engine.families import Family


class Measure(Protocol):
    """Measures the importance of every block in one sweep over the blocks; blocks may be offloaded."""

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Advance the stream through block `index` and record what the importance needs."""

    def importance(self) -> torch.Tensor:
        """Compute the importance (L,) after the last block: higher for a block that should keep more."""


@dataclass(frozen=True)
class RateRule:
    """One rate rule.

    name: its value of `layer_sparsity`. allocate: (importance (L,), None without a measure; target; prunable weights (L,);
    current sparsity (L,)) → sparsity of each block (L,). measure: starts a measurement; None if nothing is measured.
    least_blocks: the minimum number of blocks. works_offloaded: whether it works with one block in memory at a time.
    """

    name: str
    allocate: Callable[[torch.Tensor | None, float, torch.Tensor, torch.Tensor], torch.Tensor]
    measure: Callable[[Family], Measure] | None = None
    least_blocks: int = 1
    works_offloaded: bool = True


class MutualInformation:
    """Measures I of LoSA, Eq. 4; keeps only the Gram matrix (n, n) of each block's output."""

    def __init__(self) -> None:
        self._grams: list[torch.Tensor] = []

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Record the Gram matrix of the block's output."""
        stream.advance(block, index)
        self._grams.append(statistics.gram_of(stream.hidden, stream.device))

    def importance(self) -> torch.Tensor:
        """Compute the importance (L,)."""
        return rmi.importance(rmi.redundancy(rmi.nhsic_matrix(torch.stack(self._grams))))


def by_importance(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Make the less important blocks sparser: LoSA, Eq. 5."""
    assert importance is not None
    return sparsity.allocate_sparsity(importance, target, schedule.sparsity_spread(target), weights, floor)


def the_same(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Give all blocks the same sparsity."""
    return sparsity.uniform_sparsity(target, weights, floor)


RULES = {
    rule.name: rule
    for rule in (
        # With two blocks, importances are always equal.
        RateRule("rmi", by_importance, lambda family: MutualInformation(), least_blocks=3),
        RateRule("uniform", the_same),
    )
}
