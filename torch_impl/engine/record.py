"""The record of one step of a run."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torch_impl.engine.resume.checkpointer import Progress


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

    @classmethod
    def of(cls, progress: Progress, target: float, realised: list[float]) -> StepRecord:
        """Build the record of the current step. realised: sparsity of each block."""
        return cls(
            step=progress.step,
            target=target,
            importance=progress.importance,
            sparsity=progress.sparsity,
            realised=realised,
            errors=progress.errors,
            ranks=progress.ranks,
            losses=progress.losses,
            seconds=progress.seconds,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return asdict(self)


class Clock:
    """Wall-clock seconds of the parts of a step."""

    def __init__(self, device: torch.device, laps: dict[str, float] | None = None) -> None:
        self._device, self.laps = device, {} if laps is None else laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
