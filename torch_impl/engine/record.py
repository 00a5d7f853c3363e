"""The record of one step of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


PartObserver = Callable[[str], None]
"""Called with the name of a part of a step whenever some of it ends and another part begins."""


class Clock:
    """Wall-clock seconds of the parts of a step."""

    def __init__(
        self, device: torch.device, laps: dict[str, float] | None = None, on_part: PartObserver | None = None
    ) -> None:
        self._device, self.laps, self._on_part = device, {} if laps is None else laps, on_part
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap as part `name`."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
        if self._on_part is not None:
            self._on_part(name)

    @contextmanager
    def inside(self, name: str, outer: str) -> Iterator[None]:
        """Count what is done within this context as part `name`, in the middle of part `outer`."""
        self.lap(outer)
        yield
        self.lap(name)
