"""The kernels of cuda_gaps.cu on an emulated GPU, against the spec. All tensors lie at the end of accessible memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oracle_tests.assertions import assert_exact
from oracle_tests.emulated.cases import (
    assert_product,
    in_guarded_memory,
    look,
    needs_compiler,
    operands,
    random_weight,
    unwritten,
)
from oracle_tests.emulated.kernels import Kernels, guarded
from oracle_tests.strategies import examples
from torch_impl.decode import cuda, cuda_gaps
from torch_impl.decode.cuda_plan import Card, gaps_kernel_bytes

pytestmark = needs_compiler
both_dtypes = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)


def packed(weight: torch.Tensor, sizes: Sequence[int], parts: int | None) -> cuda.Layout:
    """The layout of weights of so many rows, joined, in so many parts of a strip if there is one weight."""
    layout = cuda.stack([cuda_gaps.pack_gaps_rows(own, parts) for own in weight.split(list(sizes))])
    if len(sizes) == 1:
        layout = cuda_gaps.pack_gaps_rows(weight, parts)
    return in_guarded_memory(layout)


def multiply(
    call: Kernels, weight: torch.Tensor, layout: cuda.Layout, batch: int, together: int, shift: int = 0
) -> None:
    """Multiply and check."""
    x, bias, y = operands(layout, batch)
    if shift:
        x = guarded(torch.cat([x.flatten(), x.new_full((shift,), float("nan"))]))[:-shift].view(x.shape)
    half = weight.dtype == torch.float16
    call("losa_matvec_gaps", layout.data, layout.starts, x, bias, y, *look(layout), half, batch, together, True)
    assert_product(weight, x, bias, y)


@pytest.mark.parametrize(
    ("sizes", "columns", "zeros", "parts", "batch", "together", "shift"),
    [
        ((1,), 1, 0.0, 1, 1, 1, 0),
        ((33,), 300, 0.7, 3, 1, 2, 0),
        ((40,), 304, 0.6, 2, 1, 1, 0),
        ((64,), 1000, 0.6, 13, 2, 2, 0),
        ((31,), 304, 0.5, 2, 1, 1, 1),
        ((70,), 259, 0.5, 5, 2, 3, 0),
        ((32, 64, 5), 1000, 0.8, None, 3, 1, 0),
        ((40,), 260, 0.97, 2, 4, 1, 1),
        ((65,), 516, 0.6, 7, 8, 2, 0),
        ((64, 32), 131, 0.7, None, 5, 2, 3),
        ((35,), 200, 1.0, 4, 8, 1, 0),
    ],
)
@both_dtypes
def test_the_product(
    kernels: list[Kernels],
    sizes: Sequence[int],
    columns: int,
    zeros: float,
    parts: int | None,
    batch: int,
    together: int,
    shift: int,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(sum(sizes), columns, zeros).to(dtype)
    for call in kernels:
        multiply(call, weight, packed(weight, sizes, parts), batch, together, shift)


@settings(max_examples=examples(25))
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 400),
    zeros=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    parts=st.integers(1, 9),
    batch=st.integers(1, 8),
    together=st.integers(1, 3),
    dtype=st.sampled_from(cuda.DTYPES),
)
def test_any_division(
    kernels: list[Kernels],
    rows: int,
    columns: int,
    zeros: float,
    parts: int,
    batch: int,
    together: int,
    dtype: torch.dtype,
) -> None:
    assume(gaps_kernel_bytes(columns, parts * together, 8) <= Card().shared)
    weight = random_weight(rows, columns, zeros).to(dtype)
    multiply(kernels[0], weight, packed(weight, [rows], parts), batch, together)


@pytest.mark.parametrize(
    ("sizes", "columns", "zeros", "parts", "width"),
    [
        ((1,), 3, 0.0, 1, 8),
        ((64, 17), 263, 0.5, None, 128),
        ((33,), 1000, 0.7, 4, 256),
        ((40,), 136, 1.0, 2, 1024),
        ((20,), 1304, 0.96, 5, 512),
    ],
)
def test_unpacked(
    kernels: list[Kernels], sizes: Sequence[int], columns: int, zeros: float, parts: int | None, width: int
) -> None:
    """To the bit, except that zeros of either sign become 0. The kernel does not know which dtype the values have."""
    weight = random_weight(sum(sizes), columns, zeros).bfloat16()
    layout = packed(weight, sizes, parts)
    for call in kernels:
        dense = unwritten(sum(sizes), columns, weight.dtype)
        call("losa_expand_gaps", layout.data, layout.starts, dense, *look(layout), width)
        assert_exact("bits", torch.where(weight == 0, 0, weight).view(torch.int16), dense.view(torch.int16))


def test_wrong_accesses_are_errors(kernels: list[Kernels]) -> None:
    weight = random_weight(33, 200, 0.5).half()
    layout = packed(weight, [33], 2)
    for call in kernels:
        for short in (
            replace(layout, data=guarded(layout.data[: -cuda_gaps.GROUP])),
            replace(layout, starts=guarded(layout.starts[:-1])),
        ):
            with pytest.raises(RuntimeError, match="memory that does not belong to a tensor"):
                multiply(call, weight, short, 3, 1)
        with pytest.raises(RuntimeError, match="too many threads or too much shared memory"):
            multiply(call, weight, layout, 3, 17)
        # And the next launch is right.
        multiply(call, weight, layout, 3, 1)
