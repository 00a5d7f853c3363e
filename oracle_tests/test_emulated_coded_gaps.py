"""The kernels of cuda_coded_gaps.cu on an emulated GPU, against the spec. All tensors lie at the end of accessible memory."""

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
from reference import quantise as spec
from torch_impl import quantise
from torch_impl.decode import cuda, cuda_coded_gaps
from torch_impl.decode.cuda_plan import Card

pytestmark = needs_compiler
both_dtypes = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)


class Case:
    """A rounded weight, joined from weights of so many rows, in so many parts of a strip if it is one."""

    def __init__(
        self, sizes: Sequence[int], columns: int, zeros: float, bits: int, parts: int | None, dtype: torch.dtype
    ) -> None:
        sizes = list(sizes)
        weight = random_weight(sum(sizes), columns, zeros) * 3.0 ** (torch.arange(columns) // 128 % 5)
        codes, scales = quantise.quantise_rows(weight, bits)
        self.weight = torch.from_numpy(spec.dequantise_rows(codes.numpy(), scales.numpy()))
        each = zip(codes.split(sizes), scales.split(sizes), strict=True)
        layouts = [cuda_coded_gaps.pack_codes(*own, bits, dtype, parts) for own in each]
        joined = layouts[0] if len(layouts) == 1 else cuda.stack(layouts)
        self.layout = in_guarded_memory(joined)
        self.kind = dtype == torch.float16, self.layout.code_bits

    def multiply(self, call: Kernels, batch: int, together: int) -> None:
        """Multiply and check."""
        x, bias, y = operands(self.layout, batch)
        told = (self.layout.data, self.layout.starts, x, bias, y, *look(self.layout), *self.kind)
        call("losa_matvec_coded_gaps", *told, batch, together, True)
        assert_product(self.weight, x, bias, y)

    def unpack(self, call: Kernels, width: int) -> None:
        layout = self.layout
        dense = unwritten(layout.rows, layout.columns, layout.dtype)
        call("losa_expand_coded_gaps", layout.data, layout.starts, dense, *look(layout), *self.kind, width)
        assert_exact("unpacked", self.weight.to(layout.dtype), dense)


@pytest.mark.parametrize(
    ("sizes", "columns", "zeros", "bits", "parts", "batch", "together", "width"),
    [
        ((1,), 1, 0.0, 8, 1, 1, 1, 8),
        ((33,), 300, 0.7, 8, 3, 1, 2, 128),
        ((64,), 1000, 0.6, 4, 13, 1, 2, 256),
        ((40,), 520, 0.97, 4, 2, 2, 1, 1024),
        ((70,), 259, 0.5, 6, 5, 2, 3, 256),
        ((32, 64, 5), 1000, 0.8, 8, None, 3, 1, 512),
        ((65,), 516, 0.6, 4, 7, 8, 2, 136),
        ((64, 32), 131, 0.7, 8, None, 8, 1, 128),
        ((35,), 200, 1.0, 3, 4, 5, 1, 64),
    ],
)
@both_dtypes
def test_the_product_and_unpacking(
    kernels: list[Kernels],
    sizes: Sequence[int],
    columns: int,
    zeros: float,
    bits: int,
    parts: int | None,
    batch: int,
    together: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    case = Case(sizes, columns, zeros, bits, parts, dtype)
    for call in kernels:
        case.multiply(call, batch, together)
        case.unpack(call, width)


@settings(max_examples=examples(20))
@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 600),
    zeros=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    bits=st.sampled_from([8, 4, 5, 2]),
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
    bits: int,
    parts: int,
    batch: int,
    together: int,
    dtype: torch.dtype,
) -> None:
    case = Case([rows], columns, zeros, bits, parts, dtype)
    assume(case.layout.shared(parts * together, 8) <= Card().shared)
    case.multiply(kernels[0], batch, together)
    case.unpack(kernels[0], 128)


def test_wrong_accesses_are_errors(kernels: list[Kernels]) -> None:
    case = Case([33], 200, 0.5, 8, 2, torch.float16)
    right = case.layout
    for call in kernels:
        for short in (
            replace(right, data=guarded(right.data[: -right.slot])),
            replace(right, starts=guarded(right.starts[:-1])),
        ):
            case.layout = short
            with pytest.raises(RuntimeError, match="memory that does not belong to a tensor"):
                case.multiply(call, 3, 1)
        case.layout = right
        with pytest.raises(RuntimeError, match="too many threads or too much shared memory"):
            case.multiply(call, 3, 17)
        # And the next launch is right.
        case.multiply(call, 3, 1)
