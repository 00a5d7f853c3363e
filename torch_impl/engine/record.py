"""What one step of a run leaves on record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class StepRecord:
    """What one step decided and measured; lists have one entry per block, but losses one per optimizer step.

    losses: none if nothing is trained, at all or at this step, as with kl while nothing is pruned.
    """

    step: int
    target: float
    importance: list[float]
    sparsity: list[float]
    realised: list[float]
    errors: list[float]
    ranks: list[int]
    losses: list[float]
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)
