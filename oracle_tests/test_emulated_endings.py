"""The products that also compute what a block does next, on an emulated GPU, against float64: every rounding is one of theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from oracle_tests import ending_cases
from oracle_tests.emulated.cases import (
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
from torch_impl.decode import cuda, cuda_coded, cuda_coded_gaps, cuda_endings, cuda_gaps

NORMED, GATED, ADDED = 1, 2, 3
pytestmark = needs_compiler


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


class GapCase(Case):
    """The same of gaps, in so many parts of a strip. equal: all rows are as long, so that gate and up are in one order."""

    def __init__(self, rows: int, columns: int, batch: int, parts: int, bits: int = 0, equal: bool = False) -> None:
        super().__init__(rows, columns, batch, 1)
        self.bits = bits
        weight = self.weight
        if equal:
            weight = torch.randn(rows, columns, generator=self.generator)
            # None so small that it is rounded to 0.
            weight = weight.sign() * (weight.abs() + 1)
            weight[:, torch.randperm(columns, generator=self.generator)[: columns // 2]] = 0
        if bits:
            own = cuda_coded_gaps.pack_codes(*quantise.quantise_rows(weight, bits), bits, BF16, parts)
        else:
            own = cuda_gaps.pack_gaps_rows(weight.to(BF16), parts)
        self.order = own.parts()[-1]
        self.layout = in_guarded_memory(own)
        self.weight = own.expanded(torch.float32)

    def run(self, call: Kernels, ending: int, y: torch.Tensor, squares: torch.Tensor, *residual: torch.Tensor) -> None:
        layout = self.layout
        coded, kind = ("_coded", (layout.code_bits,)) if self.bits else ("", ())
        told = (layout.data, layout.starts, self.x, self.bias, y, *look(layout), *kind, self.batch, 2)
        call(f"losa_ending{coded}_gaps", *told, ending, squares, squares.shape[1], EPS, *(residual or (None, None)))


GAPS = [(1, 8, 1, 1), (37, 300, 1, 3), (70, 520, 2, 2), (33, 1000, 4, 5), (65, 264, 8, 3), (33, 777, 7, 26)]
CODED_GAPS = [(40, 300, 1, 3, 8), (70, 520, 2, 2, 4), (33, 264, 8, 3, 8)]


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


@pytest.mark.parametrize("shape", [*GAPS, *CODED_GAPS])
def test_gaps_with_a_norm_before_and_the_residual_after(kernels: list[Kernels], shape: Any) -> None:
    case = GapCase(*shape)
    rows = case.layout.rows
    squares = guarded(torch.rand(case.batch, 33, generator=case.generator) * 40)
    before, gain = case.some(case.batch, rows), case.some(rows)
    for call in kernels:
        y = unwritten(case.batch, rows, BF16)
        case.run(call, NORMED, y, squares)
        Numbers(case.weight, case.x, case.bias, squares).normed(y)
        total, scaled = guarded(before), unwritten(case.batch, rows, BF16)
        sums = guarded(torch.full((case.batch, -(-rows // 32)), float("nan")))
        case.run(call, ADDED, scaled, sums, total, gain)
        Numbers(case.weight, case.x, case.bias).added(before, gain, total, scaled, sums, case.order)


@pytest.mark.parametrize(
    "shape",
    [(64, 8, 1, 1), (128, 300, 2, 5), (192, 264, 7, 3), (64, 520, 4, 16), (64, 300, 1, 5, 8), (128, 264, 7, 3, 4)],
)
def test_gaps_of_gate_and_up(kernels: list[Kernels], shape: Any) -> None:
    case = GapCase(*shape, equal=True)
    assert case.layout.plan[cuda.GATED] == 1
    squares = guarded(torch.rand(case.batch, 5, generator=case.generator) * 40)
    for call in kernels:
        y = unwritten(case.batch, case.layout.rows // 2, BF16)
        case.run(call, GATED, y, squares)
        Numbers(case.weight, case.x, case.bias, squares).swiglu(y)


def test_gate_and_up_in_different_orders_are_refused() -> None:
    weight = random_weight(128, 200, 0.5).to(BF16)
    apart = cuda_gaps.pack_gaps_rows(weight)
    assert not cuda_endings.fits(apart, "swiglu")
    assert cuda_endings.fits(apart, "added")
    same = cuda.stack([cuda_gaps.pack_gaps_rows(own) for own in (weight[:64], weight[:64])])
    assert same is not None
    assert cuda_endings.fits(same, "swiglu")
    assert not cuda_endings.fits(replace(same, columns=14000), "swiglu")
    assert cuda_endings.fits(replace(same, columns=14000), "swiglu", 4)
    half = same.part(0, 64)
    assert half is not None
    assert not cuda_endings.fits(half, "swiglu")


@pytest.mark.parametrize("kind", ["normed", "swiglu", "added"])
def test_torch_computes_the_same(kind: str) -> None:
    """Where there are no kernels."""
    for rows, columns, batch, gaps in ((32, 8, 1, False), (64, 300, 7, True), (96, 200, 8, False), (128, 200, 2, True)):
        ending_cases.ending(kind, rows, columns, batch, gaps=gaps)


def test_the_plan_of_gate_and_up_fits() -> None:
    for rows, columns in ((22016, 4096), (28672, 8192), (64, 100), (28672, 16384)):
        layout = cuda.Layout(rows, columns, -(-columns // 128), 3000, BF16, torch.empty(0), torch.empty(0))
        share = layout.plan[cuda.GATED]
        assert 0 < share <= 29
        warps = 2 * -(-layout.panels // share)
        assert warps <= 32
        assert layout.shared(warps) + cuda.squares_bytes(columns) <= cuda.Card().shared
    assert cuda.Layout(40, 128, 1, 3000, BF16, torch.empty(0), torch.empty(0)).plan[cuda.GATED] == 0
