"""Make CUDA runs bit-identical."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Make torch use only deterministic kernels. Call it before the first product on a GPU, because it sets its workspace.

    torch would also fill new memory, to make reads of uninitialised memory deterministic. Nothing here reads it, so that is
    turned off.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
