"""Checkpoints of a run on disk. A checkpoint is a set of part files and a manifest, written last, with their SHA-256.

    .points/000007-block-003.safetensors   a part, with the number of the checkpoint that first wrote it
    .points/000009.json                    checkpoint 9: its state, and file, size and SHA-256 of each part

Consecutive checkpoints share no file, so a single corrupt file cannot damage both. A part that does not change is copied
once; then the checkpoints alternate between its two files. Files are written atomically: to a temporary file that is flushed
and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.files import UNFINISHED, dumps, flush_and_rename, sha256_of, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """The file of a part, as recorded in a manifest."""

    file: str
    bytes: int
    sha256: str


class RunCheckpoints:
    """The checkpoints of one run in their own folder. `parts` are the files of the current checkpoint."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self.parts: dict[str, Entry] = {}
        self._last: dict[str, Entry] = {}
        self._before: dict[str, Entry] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{UNFINISHED}"):
            leftover.unlink(missing_ok=True)
        # Start above all used numbers, so that no file of an existing checkpoint is overwritten.
        self._number = max((_number(file.name) for file in folder.iterdir()), default=0)

    def put(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a part of the next checkpoint as safetensors, unless the current checkpoint has the same bytes."""
        name = f"{part}.safetensors"
        path = self._path(name)
        unfinished = path.with_name(path.name + UNFINISHED)
        save_tensors({name: t.contiguous() for name, t in tensors.items()}, unfinished)
        digest = sha256_of(unfinished)
        if name in self.parts and self.parts[name].sha256 == digest:
            unfinished.unlink()
            return
        size = unfinished.stat().st_size
        flush_and_rename(unfinished, path)
        self.parts[name] = Entry(path.name, size, digest)

    def put_bytes(self, part: str, data: bytes) -> None:
        """Write a part of the next checkpoint, unless the current checkpoint has the same bytes."""
        digest = hashlib.sha256(data).hexdigest()
        if part in self.parts and self.parts[part].sha256 == digest:
            return
        path = self._path(part)
        write_atomically(path, data)
        self.parts[part] = Entry(path.name, len(data), digest)

    def _path(self, part: str) -> Path:
        return self._folder / f"{self._number + 1:06}-{part}"

    def drop(self, part: str) -> None:
        """Leave a part out of the next checkpoint."""
        self.parts.pop(f"{part}.safetensors", None)

    def commit(self, state: Mapping[str, Any]) -> int:
        """Complete a checkpoint of the written parts and the state; delete the oldest. Return its number."""
        if self._keep > 1:
            for part in self.parts:
                self._separate(part)
        self._number += 1
        body = {"number": self._number, "state": state, "parts": {name: asdict(e) for name, e in self.parts.items()}}
        text = dumps(body, "state")
        manifest = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
        write_atomically(self._folder / f"{self._number:06}.json", json.dumps(manifest, allow_nan=False).encode())
        self._forget()
        self._before, self._last = self._last, dict(self.parts)
        return self._number

    def _separate(self, part: str) -> None:
        """Make the next checkpoint use another file than the last one for an unchanged part."""
        entry = self.parts[part]
        if self._last.get(part) != entry:
            return
        twin = self._before.get(part)
        if twin is None or twin.sha256 != entry.sha256 or twin.file == entry.file:
            twin = Entry(self._path(part).name, entry.bytes, entry.sha256)
            write_atomically(self._folder / twin.file, (self._folder / entry.file).read_bytes())
        self.parts[part] = twin

    def open_last(self) -> dict[str, Any] | None:
        """Open the last valid checkpoint and return its state; None if there is none.

        Corrupt checkpoints are logged, with file and reason, and deleted.
        """
        good: list[dict[str, Any]] = []
        for manifest in sorted(self._manifests(), reverse=True):
            try:
                good.append(self._checked(manifest))
            except (ValueError, KeyError, TypeError, OSError) as error:
                logger.warning("skipping corrupt checkpoint %d: %s", _number(manifest.name), error)
                manifest.unlink()
        parts = [{name: Entry(**entry) for name, entry in body["parts"].items()} for body in good]
        self._last, self._before = [*parts, {}, {}][:2]
        self.parts = dict(self._last)
        state: dict[str, Any] | None = good[0]["state"] if good else None
        return state

    def __contains__(self, part: str) -> bool:
        return f"{part}.safetensors" in self.parts

    def get(self, part: str) -> dict[str, torch.Tensor]:
        """Read a part of the current checkpoint, on the CPU."""
        return load_file(self._folder / self.parts[f"{part}.safetensors"].file)

    def get_bytes(self, part: str) -> bytes:
        """Read a part of the current checkpoint that was written as bytes."""
        return (self._folder / self.parts[part].file).read_bytes()

    def _manifests(self) -> list[Path]:
        return [file for file in self._folder.glob("*.json") if file.stem.isdigit()]

    def _checked(self, manifest: Path) -> dict[str, Any]:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if hashlib.sha256(content["body"].encode()).hexdigest() != content["sha256"]:
            raise ValueError(f"{manifest.name} does not match its SHA-256")
        body: dict[str, Any] = json.loads(content["body"])
        for entry in body["parts"].values():
            file = self._folder / entry["file"]
            if not file.is_file():
                raise ValueError(f"{file.name} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {entry['bytes']}")
            if sha256_of(file) != entry["sha256"]:
                raise ValueError(f"{file.name} does not match its SHA-256")
        return body

    def _forget(self) -> None:
        """Delete all but the newest checkpoints, and all files that these do not use."""
        manifests = sorted(self._manifests(), reverse=True)
        for manifest in manifests[self._keep :]:
            manifest.unlink()
        used = {entry.file for entry in self.parts.values()}
        for manifest in manifests[: self._keep]:
            used |= set(_named_files(manifest))
        for file in self._folder.iterdir():
            if file not in manifests and file.name not in used:
                file.unlink(missing_ok=True)


def _named_files(manifest: Path) -> Iterator[str]:
    """Yield the files of an earlier checkpoint; none if its manifest is corrupt, because it cannot be resumed from."""
    try:
        body = json.loads(json.loads(manifest.read_text(encoding="utf-8"))["body"])
        yield from [entry["file"] for entry in body["parts"].values()]
    except (ValueError, KeyError, TypeError):
        return


def _number(name: str) -> int:
    head = name[:6]
    return int(head) if head.isdigit() else 0


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder holds checkpoints, valid or not."""
    return any(file.stem.isdigit() for file in folder.glob("*.json"))
