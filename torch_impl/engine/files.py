"""Write files atomically, hash them, and write JSON without NaN and infinity."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 24
UNFINISHED = ".tmp"


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file with `data`: write and flush a temporary file, then rename it."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_bytes(data)
    flush_and_rename(unfinished, path)


def flush_and_rename(unfinished: Path, path: Path) -> None:
    """Flush a written file to disk and give it its name, replacing another."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def dumps(value: Any, what: str, indent: int | None = None) -> str:
    """Convert plain values to JSON.

    Errors: FloatingPointError naming the first value of `what` that is not finite, because JSON has no such number.
    """
    for place, number in _not_finite(value, what):
        raise FloatingPointError(f"{place} is {number}, which JSON cannot store")
    return json.dumps(value, indent=indent, allow_nan=False)


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}, {key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{number}]")
