"""Text that is on every machine: the sources and documentation of the CPython standard library.

Files are split into training and held-out text by a hash of their path, so the split is the same on every machine and
in every version of Python. The embedded model has read the training text alone.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout", "all"]

# Left out: what some installations lack, third-party code, and generated tables that repeat each other.
LEFT_OUT = {
    *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3", "idlelib", "turtledemo"),
    *("test", "tests", "__phello__", "__pycache__", "encodings", "pydoc_data"),
}
GENERATED = ("config-", "_sysconfigdata", "_sysconfig_vars")
TOPICS = "pydoc_data/topics.py"
SHORTEST = 200
HELDOUT_SHARE = 0.1
# Modules of Python 3.11 that later became packages stay on the side they were on when the embedded model read them.
NOW_PACKAGES = ("zipfile", "pathlib", "string", "sysconfig")
# A held-out file is dropped if more than this share of its long lines stands in training files.
OVERLAP = 0.1
LONG_LINE = 30


def documents(split: Split = "train", folder: str | Path | None = None) -> list[tuple[str, str]]:
    """(path inside the library, text) of every file of a split, in the order of their paths.

    folder: a standard library; default, that of the interpreter that runs. The language reference that comes with it
    (`pydoc_data/topics.py`, where it is installed) belongs to the training text and stands last. "all" is every file,
    those included that held-out text leaves out because training text contains parts of them.

    Errors: ValueError for an unknown split; FileNotFoundError if the folder holds no sources.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split = {split!r}; allowed: 'train', 'heldout', 'all'")
    root = Path(folder) if folder is not None else Path(sysconfig.get_path("stdlib"))
    found = _read(root)
    if not found:
        raise FileNotFoundError(f"{root} holds no Python sources; allowed: the folder of a standard library")
    if split == "all":
        return found
    train = [(name, text) for name, text in found if not _is_heldout(name)]
    if split == "train":
        return train
    known = {line for _, text in train for line in _long_lines(text)}
    return [(name, text) for name, text in found if _is_heldout(name) and not _repeats(text, known)]


def _read(root: Path) -> list[tuple[str, str]]:
    """Readable files, the shortest and exact duplicates left out."""
    names: dict[str, str] = {}
    for path in _paths(root):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        text = _topics(text) if name == TOPICS else text
        if len(text) >= SHORTEST:
            names.setdefault(text, name)
    return [(name, text) for text, name in names.items()]


def _paths(root: Path) -> list[Path]:
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(GENERATED)]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
    topics = root / TOPICS
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix()) + [topics] * topics.is_file()


def _topics(source: str) -> str:
    """The language reference as plain text, out of the string literals that hold it."""
    literals = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "\n\n".join(text for text in literals if isinstance(text, str) and len(text) >= SHORTEST)


def _is_heldout(name: str) -> bool:
    top = name.split("/")[0]
    name = f"{top}.py" if top in NOW_PACKAGES else name
    return name != TOPICS and hashlib.sha256(name.encode()).digest()[0] < 256 * HELDOUT_SHARE


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE]


def _repeats(text: str, known: set[str]) -> bool:
    lines = _long_lines(text)
    return sum(line in known for line in lines) > OVERLAP * max(1, len(lines))
