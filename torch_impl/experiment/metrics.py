"""Write metrics.jsonl during a run and JSON files at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_impl.engine import distributed, files
from torch_impl.engine.files import write_atomically


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON. Errors: FloatingPointError if a value is not finite."""
    write_atomically(path, (files.dumps(value, path.name, indent=1) + "\n").encode())


class Metrics:
    """The file metrics.jsonl: one line per event, written by process 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, event: str, **values: Any) -> None:
        """Append an event. Errors: FloatingPointError if a value is not finite; then nothing is written."""
        if not distributed.is_main_process():
            return
        line = files.dumps({"event": event, **values}, self._path.name)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
