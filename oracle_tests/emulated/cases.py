"""What tests on an emulated GPU share: the compiled kernels, and layouts at the end of accessible memory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from oracle_tests import tolerances
from oracle_tests.emulated.kernels import Kernels, guarded
from torch_impl.decode import cuda

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="emulating a GPU needs Linux and a C++ compiler"
)
# Before compute capability 9.0 the lanes copy; from there on the copy engine.
ARCHITECTURES = (900, 800)


def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Kernels]:
    """The kernels as compiled for each architecture, once for all of xdist's workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return [Kernels(str(COMPILER), architecture, folder) for architecture in ARCHITECTURES]


def random_weight(rows: int, columns: int, zeros: float) -> torch.Tensor:
    """A weight with zeros of both signs, the first of several rows empty and the last full."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    kept = torch.rand(rows, columns, generator=generator) >= zeros
    if rows > 1:
        kept[0], kept[-1] = False, True
    return weight * kept


def in_guarded_memory(layout: Any) -> Any:
    return replace(layout, data=guarded(layout.data), starts=guarded(layout.starts))


def packed(weight: torch.Tensor, parts: Sequence[int]) -> cuda.Layout:
    """The layout of weights of so many rows, joined."""
    layout = cuda.stack([cuda.pack_rows(part) for part in weight.split(list(parts))])
    return in_guarded_memory(layout)


def operands(layout: cuda.Layout, batch: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x, the bias or None for an even batch, and y, not written yet."""
    generator = torch.Generator().manual_seed(batch)
    x, bias = torch.randn(batch, layout.columns, generator=generator), torch.randn(layout.rows, generator=generator)
    numbers = guarded(x.to(layout.dtype)), guarded(bias.to(layout.dtype)) if batch % 2 else None
    return *numbers, unwritten(batch, layout.rows, layout.dtype)


def unwritten(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return guarded(torch.full((rows, columns), float("nan"), dtype=dtype))


def look(layout: cuda.Layout) -> tuple[int, int, int, int]:
    """The numbers that every kernel is told of a layout."""
    return layout.rows, layout.columns, layout.panels, layout.slot


def assert_product(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Within float32's sums and one rounding of the product in float64."""
    W, inputs = weight.double().numpy(), x.double().numpy()
    offset = 0.0 if bias is None else bias.double().numpy()
    expected, terms = inputs @ W.T + offset, abs(inputs) @ abs(W).T + abs(offset)
    error = abs(y.double().numpy() - expected)
    # NaN, which nobody wrote over, is not within any bound.
    assert (error <= tolerances.one_rounding(y.dtype, abs(expected), terms)).all()
