"""The same bits on every run on CUDA."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Have torch use deterministic kernels only; before the first product on a GPU, whose workspace it fixes.

    Memory that is allocated is not filled as well, which torch would do to find reads before writes: nothing here reads it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
