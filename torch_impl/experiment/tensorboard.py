"""A run's events as scalars for TensorBoard (--report_to tensorboard), beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPORTS = ("none", "tensorboard")
# Seconds until an event can be seen.
FLUSH = 10


def check_report_to(name: str) -> None:
    """Check the option report_to. Errors: ValueError for an unknown word, or if TensorBoard is not installed."""
    if name not in REPORTS:
        raise ValueError(f"report_to is {name!r}; allowed: {', '.join(REPORTS)}")
    if name == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "report_to is 'tensorboard', which is not installed: pip install \"losa-oracle[tensorboard]\", or leave it out"
        )


class TensorBoard:
    """Writes events, as metrics.jsonl holds them, into a folder that it empties first.

    train/loss and train/learning_rate count optimizer steps over the whole run; everything else counts LoSA steps, with what
    was measured before the first one at 0.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._writer: Any = SummaryWriter(str(folder), flush_secs=FLUSH)  # type: ignore[no-untyped-call]
        self._step = self._trained = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Write the scalars of an event; an event of another kind has none."""
        kind = event["event"]
        if kind == "train":
            self._trained += 1
            self._scalars({f"train/{name}": event[name] for name in ("loss", "learning_rate")}, self._trained)
        elif kind == "perplexity":
            self._scalars({f"perplexity/{event['model']}": event["value"]}, event.get("step", self._step))
        elif kind == "step":
            self._step = event["step"]
            self._scalars(_of_step(event), self._step)

    def _scalars(self, values: Mapping[str, float], at: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name.replace(", ", "_").replace(" ", "_"), value, at)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _of_step(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a step: of the model, and of each block."""
    found = {"step/sparsity_asked": event["target"], "step/largest_error": max(event["errors"])}
    by_block: dict[str, Sequence[float]] = {
        "sparsity": event["realised"],
        "error": event["errors"],
        "importance": event["importance"],
        "rank": event["ranks"],
    }
    for name, values in by_block.items():
        found |= {f"{name}_of_block/{index:02}": value for index, value in enumerate(values)}
    return found | {f"seconds/{part}": value for part, value in event["seconds"].items()}
