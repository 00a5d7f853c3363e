"""Text available on every machine: the sources and documentation of the CPython standard library.

Files are split into training and held-out text by a hash of their path, so the split is the same on every machine and in
every version of Python. The embedded model was trained on the training text only.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout", "all"]

# Excluded: files that some installations lack, third-party code, and repetitive generated tables.
LEFT_OUT = {
    *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3", "idlelib", "turtledemo"),
    *("test", "tests", "__phello__", "__pycache__", "encodings", "pydoc_data"),
}
GENERATED = ("config-", "_sysconfigdata", "_sysconfig_vars")
TOPICS = "pydoc_data/topics.py"
SHORTEST = 200
HELDOUT_SHARE = 0.1
# Modules of Python 3.11 that later became packages stay in the split they had when the embedded model was trained.
NOW_PACKAGES = ("zipfile", "pathlib", "string", "sysconfig")
# Drop a held-out file if training files contain more than this share of its long lines.
OVERLAP = 0.1
LONG_LINE = 30


def documents(split: Split = "train", folder: str | Path | None = None) -> list[tuple[str, str]]:
    """Return (path inside the library, text) of every file of a split, in the order of their paths.

    folder: a standard library; default that of the running interpreter. The language reference (`pydoc_data/topics.py`, if
    installed) is training text and comes last. "all" is every file, including held-out files that are dropped because
    training text contains parts of them.

    Errors: ValueError for an unknown split; FileNotFoundError if the folder has no sources.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split is {split!r}; allowed: train, heldout, all")
    root = Path(folder) if folder is not None else Path(sysconfig.get_path("stdlib"))
    found = _read(root)
    if not found:
        raise FileNotFoundError(f"{root} has no Python sources; give the folder of a standard library")
    if split == "all":
        return found
    train = [(name, text) for name, text in found if not _is_heldout(name)]
    if split == "train":
        return train
    known = {line for _, text in train for line in _long_lines(text)}
    return [(name, text) for name, text in found if _is_heldout(name) and not _repeats(text, known)]


def _read(root: Path) -> list[tuple[str, str]]:
    """Read all readable files except very short ones and exact duplicates."""
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
    """Extract the language reference as plain text from the module's string literals."""
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
