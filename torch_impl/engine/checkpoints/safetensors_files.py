"""Read and write the safetensors files of a Hugging Face folder tensor by tensor.

Only the requested tensors are in memory, so a checkpoint may be larger than memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from torch_impl.engine.checkpoints.contents import CODES, INDEX, CheckpointFiles, Entry

READERS = 4
# The header metadata that transformers writes and requires.
FORMAT = {"format": "pt"}
_NAMES = {dtype: code for code, dtype in CODES.items()}


class Shards:
    """Reads tensors from the files of a checkpoint."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        self.folder, self.entries = files.folder, files.entries
        # Read several tensors at once, so that page faults and casts overlap.
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="shards")

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill CPU tensors, given by their names in the checkpoint; cast to each tensor's dtype."""
        list(self._pool.map(self._read, targets, targets.values()))

    def _read(self, name: str, target: torch.Tensor) -> None:
        # The file is mapped only during this call, so its pages do not stay in memory.
        with safe_open(self.folder / self.entries[name].file, "pt") as opened:
            target.copy_(opened.get_tensor(name))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor to the CPU. dtype: cast to it, if the tensor is floating-point."""
        entry = self.entries[name]
        with safe_open(self.folder / entry.file, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
        return found.to(dtype, copy=True) if dtype is not None and entry.dtype is not None else found.clone()


class ShardWriter:
    """Writes a checkpoint with the files, names and shapes of another one, tensor by tensor in any order.

    dtype: of all floating-point tensors. The headers are written first, so each tensor can be written to its place at once.
    Data already in the files stays.
    """

    def __init__(self, folder: Path, like: Shards, dtype: torch.dtype) -> None:
        self._folder, self._like, self._dtype = folder, like, dtype
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = set(like.entries)
        self.bytes = sum(self._lay_out(file, metadata) for file, metadata in like.files.metadata.items())
        if like.files.index is not None:
            index = {
                "metadata": {"total_size": self.bytes},
                "weight_map": {name: entry.file for name, entry in like.entries.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def _lay_out(self, file: str, metadata: dict[str, str] | None) -> int:
        """Write the header of a file and set the file's size. Return the size of its tensors in bytes."""
        header: dict[str, object] = {"__metadata__": {**FORMAT, **(metadata or {})}}
        position = 0
        for name, entry in self._like.entries.items():
            if entry.file == file:
                code = entry.code if entry.dtype is None else _NAMES[self._dtype]
                end = position + _bytes(entry, self._dtype)
                header[name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [position, end]}
                self._places[name] = (self._folder / file, position)
                position = end
        text = json.dumps(header, allow_nan=False).encode()
        text += b" " * (-len(text) % 8)
        path = self._folder / file
        with path.open("r+b" if path.exists() else "wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + position)
        for name, (path, offset) in self._places.items():
            if self._like.entries[name].file == file:
                self._places[name] = (path, 8 + len(text) + offset)
        return position

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one CPU tensor to its place."""
        entry = self._like.entries[name]
        assert tuple(tensor.shape) == entry.shape, name
        assert entry.dtype is None or tensor.dtype == self._dtype, name
        path, offset = self._places[name]
        with path.open("r+b") as opened:
            opened.seek(offset)
            opened.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def flush(self, names: Iterable[str]) -> None:
        """Flush the files of these tensors to disk."""
        for path in {self._places[name][0] for name in names}:
            with path.open("rb") as opened:
                os.fsync(opened.fileno())

    def copy(self, names: Iterable[str]) -> None:
        """Copy tensors from the other checkpoint, cast to the dtype."""
        for name in names:
            self.write(name, self._like.read(name, self._dtype))

    def finish(self, there: Set[str] = frozenset()) -> None:
        """Copy all tensors that were not written, except those already `there`."""
        self.copy(sorted(self._missing - there))


def _bytes(entry: Entry, dtype: torch.dtype) -> int:
    if entry.dtype is not None:
        return torch.Size(entry.shape).numel() * dtype.itemsize
    sizes = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
    return torch.Size(entry.shape).numel() * sizes[entry.code]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = FORMAT) -> None:
    """Write a safetensors file with a mode that follows the umask, or with that of the file it replaces.

    Errors: OSError naming the file, if the disk is full, say.
    """
    # A thread may do this, and the umask is the whole process's: an empty file tells the mode without changing it.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(mode)


def follow_umask(paths: Iterable[Path]) -> None:
    """Set the modes of files by the umask; safetensors makes them readable by their owner only."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)
