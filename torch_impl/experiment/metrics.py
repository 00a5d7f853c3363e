"""Write metrics.jsonl during a run, and JSON files at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch_impl.engine import distributed, files
from torch_impl.engine.files import write_atomically
from torch_impl.experiment.tensorboard import TensorBoard

METRICS = "metrics.jsonl"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON. Errors: FloatingPointError if a value is not finite."""
    write_atomically(path, (files.dumps(value, path.name, indent=1) + "\n").encode())


class Metrics:
    """The file metrics.jsonl: one line per event, written by process 0; and the same events for TensorBoard, if asked.

    What the file holds already, of a run that is resumed, goes to TensorBoard again, so that no point is missing or twice.
    """

    def __init__(self, path: Path, tensorboard: Path | None = None) -> None:
        self._path = path
        self._tensorboard: TensorBoard | None = None
        if tensorboard is not None and distributed.is_main_process():
            self._tensorboard = TensorBoard(tensorboard)
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                self._tensorboard.add(json.loads(line))

    def log(self, event: str, **values: Any) -> None:
        """Append an event. Errors: FloatingPointError if a value is not finite; then nothing is written."""
        if not distributed.is_main_process():
            return
        line = files.dumps({"event": event, **values}, self._path.name)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self._tensorboard is not None:
            self._tensorboard.add({"event": event, **values})

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
