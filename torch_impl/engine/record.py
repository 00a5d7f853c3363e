"""The record of one step of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class StepRecord:
    """The decisions and measurements of one step. Lists have one entry per block; losses has one per optimizer step.

    losses: empty if nothing is trained at this step, for example with loss kl while nothing is pruned.
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
        """Return plain numbers, for JSON."""
        return asdict(self)
