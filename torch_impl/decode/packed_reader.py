"""Read the files of a packed folder, and check them against packed.json. The format: packed_folder.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from torch_impl import _checks
from torch_impl.decode.packed_writer import FORMAT, PLAIN, ROUNDED, dtype_name
from torch_impl.engine.checkpoints.contents import PACKED
from torch_impl.packed import CODED, PARTS


def is_packed(folder: Path) -> bool:
    """Return whether this is the folder of a packed model."""
    return (folder / PACKED).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read packed.json and check the fields that loading needs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model {folder}: no such folder; give the folder of a packed model")
    if not is_packed(folder):
        raise ValueError(f"model {folder}: no {PACKED} in this folder; give the folder of a packed model")
    path = folder / PACKED
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        files = {name: Path(facts["source"]).name == facts["source"] for name, facts in manifest["files"].items()}
        metadata = [pair for facts in manifest["files"].values() for pair in dict(facts["metadata"] or {}).items()]
        if not all(isinstance(word, str) for pair in metadata for word in pair):
            raise TypeError("metadata is not text")
        entries = [
            (facts["file"], facts["shape"], facts["dtype"], facts["packed"]) for facts in manifest["tensors"].values()
        ]
        named = {entry[0] for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt ({error!r}); pack the model again") from error
    if found not in ((FORMAT, PLAIN), (FORMAT, ROUNDED)):
        raise ValueError(
            f"{path} has format {found[0]}, version {found[1]}, but this version reads only {FORMAT}, versions {PLAIN} and "
            f"{ROUNDED}"
        )
    if not all(files.values()) or any(Path(name).name != name for name in files) or named - set(files):
        raise ValueError(f"{path} names files that are not in its list or not in this folder; pack the model again")
    # Earlier versions did not store the index.
    sources = {key: manifest["files"][facts["file"]]["source"] for key, facts in manifest["tensors"].items()}
    manifest.setdefault("index", {"metadata": {}, "weight_map": sources} if len(files) > 1 else None)
    return manifest


def tensors_of(folder: Path, manifest: dict[str, Any], name: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each tensor of one file by its original name: itself, or its bitmap, values and offsets.

    Errors: ValueError if its names, shapes or dtypes differ from packed.json.
    """
    listed = {key: facts for key, facts in manifest["tensors"].items() if facts["file"] == name}
    names = {key: _names(key, facts) for key, facts in listed.items()}
    with opened(folder / name) as file:
        every, stored = {part for parts in names.values() for part in parts}, set(file.keys())
        for wrong, what in (
            (every - stored, f"lacks, but {PACKED} lists"),
            (stored - every, f"has, but {PACKED} lacks"),
        ):
            if wrong:
                raise ValueError(f"{folder / name} {what}, {_checks.few(sorted(wrong))}; pack the model again")
        for key, facts in listed.items():
            parts = [file.get_tensor(part) for part in names[key]]
            with naming(folder / name, key):
                if "bits" not in facts:
                    fits(parts[1] if facts["packed"] else parts[0], facts)
                elif parts[1].dim() != 2 or parts[1].shape[1] != facts["bits"]:
                    raise ValueError(
                        f"codes has shape {tuple(parts[1].shape)}, but {PACKED} lists {facts['bits']} bits"
                    )
            yield key, parts


def _names(key: str, facts: dict[str, Any]) -> list[str]:
    """Return the names of the stored parts of a tensor."""
    if not facts["packed"]:
        return [key]
    return [f"{key}.{part}" for part in (CODED if "bits" in facts else PARTS)]


def fits(value: torch.Tensor, facts: dict[str, Any]) -> None:
    """Check the dtype against packed.json; also the shape, unless the tensor is the kept values."""
    if dtype_name(value) != facts["dtype"]:
        raise ValueError(f"dtype is {dtype_name(value)}, but {PACKED} lists {facts['dtype']}")
    if list(value.shape) != facts["shape"] and not (facts["packed"] and value.dim() == 1):
        raise ValueError(f"shape is {tuple(value.shape)}, but {PACKED} lists {tuple(facts['shape'])}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing, truncated or corrupt ({' '.join(str(error).split())}); pack the model again"
        ) from error


@contextmanager
def naming(path: Path, key: str) -> Iterator[None]:
    """Prefix errors with the file and the name of the tensor."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, {key}: {error}") from error
