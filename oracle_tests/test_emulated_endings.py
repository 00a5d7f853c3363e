"""The products that also compute what a block does next, on an emulated GPU, against float64: every rounding is one of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracle_tests import ending_cases
from oracle_tests.emulated.cases import (
    compiled,
    in_guarded_memory,
    look,
    needs_compiler,
    packed,
    random_weight,
    unwritten,
)
from oracle_tests.emulated.kernels import Kernels, guarded
from oracle_tests.ending_cases import BF16, EPS, Numbers
from torch_impl import quantise
from torch_impl.decode import cuda, cuda_coded

NORMED, GATED, ADDED = 1, 2, 3
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernels]:
    """The kernels as compiled for each architecture."""
    return compiled(tmp_path_factory)


class Case:
    """A weight, x, and what the kernels are told; gate and up are the halves of the rows."""

    def __init__(self, rows: int, columns: int, batch: int, share: int, bits: int = 0, zeros: float = 0.6) -> None:
        self.generator = torch.Generator().manual_seed(rows + columns)
        self.batch, self.share, self.bits = batch, share, bits
        weight = random_weight(rows, columns, zeros)
        if bits:
            codes, scales = quantise.quantise_rows(weight, bits)
            self.layout: cuda.Layout = in_guarded_memory(cuda_coded.pack_codes(codes, scales, bits, BF16))
        else:
            self.layout = packed(weight.to(BF16), [rows])
        self.weight = self.layout.expanded(torch.float32)
        self.x = self.some(batch, columns)
        self.bias = self.some(rows) if batch % 2 else None

    def some(self, *shape: int) -> torch.Tensor:
        return guarded(torch.randn(*shape, generator=self.generator).to(BF16))

    def run(self, call: Kernels, ending: int, y: torch.Tensor, squares: torch.Tensor, *residual: torch.Tensor) -> None:
        layout = self.layout
        coded, kind = ("_coded", (layout.code_bits,)) if self.bits else ("", ())
        told = (layout.data, layout.starts, self.x, self.bias, y, *look(layout), *kind, self.batch, self.share, 2)
        call(f"losa_ending{coded}", *told, ending, squares, squares.shape[1], EPS, *(residual or (None, None)))


SHAPES = [
    (1, 8, 1, 1, 0),
    (17, 300, 7, 2, 0),
    (37, 520, 8, 1, 0),
    (33, 1000, 3, 3, 0),
    (21, 777, 8, 1, 6),
    (16, 256, 1, 1, 4),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 33])
def test_norm_of_the_input(kernels: list[Kernels], shape: Any, parts: int) -> None:
    case = Case(*shape)
    squares = guarded(torch.rand(case.batch, parts, generator=case.generator) * 40)
    for call in kernels:
        y = unwritten(case.batch, case.layout.rows, BF16)
        case.run(call, NORMED, y, squares)
        Numbers(case.weight, case.x, case.bias, squares).normed(y)


@pytest.mark.parametrize(
    "shape", [(32, 8, 1, 1, 0), (64, 300, 7, 2, 0), (96, 1000, 8, 3, 0), (32, 520, 8, 1, 8), (64, 777, 3, 1, 3)]
)
def test_gate_and_up(kernels: list[Kernels], shape: Any) -> None:
    case = Case(*shape)
    squares = guarded(torch.rand(case.batch, 5, generator=case.generator) * 40)
    for call in kernels:
        y = unwritten(case.batch, case.layout.rows // 2, BF16)
        case.run(call, GATED, y, squares)
        Numbers(case.weight, case.x, case.bias, squares).swiglu(y)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_sum(kernels: list[Kernels], shape: Any) -> None:
    case = Case(*shape)
    rows = case.layout.rows
    before, gain = case.some(case.batch, rows), case.some(rows)
    for call in kernels:
        total, scaled = guarded(before), unwritten(case.batch, rows, BF16)
        squares = guarded(torch.full((case.batch, -(-rows // 16)), float("nan")))
        case.run(call, ADDED, scaled, squares, total, gain)
        Numbers(case.weight, case.x, case.bias).added(before, gain, total, scaled, squares)


@pytest.mark.parametrize("kind", ["normed", "swiglu", "added"])
def test_torch_computes_the_same(kind: str) -> None:
    """Where there are no kernels."""
    for rows, columns, batch in ((32, 8, 1), (64, 300, 7), (96, 200, 8)):
        ending_cases.ending(kind, rows, columns, batch)


def test_the_plan_of_gate_and_up_fits() -> None:
    for rows, columns in ((22016, 4096), (28672, 8192), (64, 100), (28672, 16384)):
        layout = cuda.Layout(rows, columns, -(-columns // 128), 3000, BF16, torch.empty(0), torch.empty(0))
        share = layout.plan[cuda.GATED]
        assert 0 < share <= 29
        warps = 2 * -(-layout.panels // share)
        assert warps <= 32
        assert layout.shared(warps) + cuda.squares_bytes(columns) <= cuda.Card().shared
    assert cuda.Layout(40, 128, 1, 3000, BF16, torch.empty(0), torch.empty(0)).plan[cuda.GATED] == 0
