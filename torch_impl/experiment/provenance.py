"""Where a result comes from: version and commit of this software, and the memory that the run took."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard

import torch_impl

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """Return the commit of this checkout, with `+` if files differ from it; None for an installed package."""
    if not (ROOT / ".git").exists():
        return None
    try:
        found = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0].strip() + ("+" if found[1].strip() else "")


@functools.cache
def software() -> dict[str, str | None]:
    """Return name, version and commit of this software. Call it first when a run begins: a checkout may change before it ends."""
    return {"name": "losa-oracle", "version": torch_impl.__version__, "commit": commit()}


def license_in(folder: Path) -> str | None:
    """Return the licence that the card in a model's folder names; None if there is no card, or none in it."""
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = data.get("license_name") if data.license == "other" else data.license
    return named if isinstance(named, str) else None


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the largest memory of this process so far, in bytes: of the host, and of a GPU's tensors."""
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found
