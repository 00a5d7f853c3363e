"""The folder of a run: written under a hidden name beside its place, and moved there whole when all is done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_impl.engine import distributed


@contextmanager
def run_folder(
    target: Path, overwrite: bool, option: str = "output_dir", marker: str = "losa_result.json", kind: str = "a run"
) -> Iterator[Path]:
    """A folder to write into, which becomes `target` if the body ends well and is removed if it does not.

    Replaced is only a folder of the same kind, which holds the file `marker`. option: what messages call `target`.

    Errors: ValueError if `target` exists and may not be replaced, or cannot be written.
    """
    if target.exists() and not overwrite:
        raise ValueError(f"{option} {target} exists; allowed: a new folder, or --overwrite")
    if target.exists() and not (target / marker).is_file():
        raise ValueError(f"{option} {target} is not the folder of {kind}; allowed: a new folder, or that of {kind}")
    partial = target.absolute().parent / f".{target.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{option} {target} cannot be written: {error.strerror}; allowed: a writable place") from error
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class Metrics:
    """metrics.jsonl: one line an event, written by process 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, event: str, **values: Any) -> None:
        """Append an event and its values."""
        if not distributed.leads():
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
