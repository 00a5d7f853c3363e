"""The CUDA kernels of decode/ on an emulated GPU (emulated/device.h), against the spec: values, codes, and unpacking.

Every lane is followed through reads, copies, barriers and products. All tensors lie at the end of accessible memory.
"""

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
    packed,
    random_weight,
    unwritten,
)
from oracle_tests.emulated.kernels import Kernels, guarded, translate
from oracle_tests.strategies import examples
from reference import quantise as spec
from torch_impl import quantise
from torch_impl.decode import cuda, cuda_coded
from torch_impl.decode.cuda_plan import Card, rows_kernel_bytes

both_dtypes = pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)


def multiply_rows(
    call: Kernels, weight: torch.Tensor, layout: cuda.Layout, batch: int, strips: int, share: int, groups: int
) -> None:
    """Multiply up to 32 rows by cuda_rows.cu and check."""
    x, bias, y = operands(layout, batch)
    half = weight.dtype == torch.float16
    told = (layout.data, layout.starts, x, bias, y, *look(layout), half, batch, strips, share, groups, True)
    call("losa_matvec_rows", *told)
    assert_product(weight, x, bias, y)


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "columns", "zeros", "batch", "share", "groups"),
    [
        (1, 8, 0.0, 1, 1, 1),
        (17, 300, 0.7, 7, 2, 1),
        (5, 259, 0.5, 8, 1, 2),
        (73, 1000, 0.8, 3, 3, 3),
        (16, 128, 1.0, 8, 1, 1),
        (64, 136, 0.6, 8, 1, 4),
    ],
)
@both_dtypes
def test_up_to_eight_rows(
    kernels: list[Kernels],
    rows: int,
    columns: int,
    zeros: float,
    batch: int,
    share: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(rows, columns, zeros).to(dtype)
    layout = packed(weight, [rows])
    half = dtype == torch.float16
    for call in kernels:
        x, bias, y = operands(layout, batch)
        call("losa_matvec", layout.data, layout.starts, x, bias, y, *look(layout), half, batch, share, groups, True)
        assert_product(weight, x, bias, y)


@needs_compiler
@pytest.mark.parametrize(
    ("parts", "columns", "zeros", "batch", "strips", "share", "groups"),
    [
        ((1,), 8, 0.0, 1, 2, 1, 1),
        ((17,), 136, 0.5, 9, 2, 1, 2),
        ((33,), 264, 0.7, 16, 1, 2, 3),
        ((16, 32, 5), 392, 0.8, 32, 2, 3, 2),
        ((31,), 200, 1.0, 24, 1, 1, 1),
        ((48,), 640, 0.6, 25, 2, 4, 1),
    ],
)
@both_dtypes
def test_up_to_32_rows(
    kernels: list[Kernels],
    parts: Sequence[int],
    columns: int,
    zeros: float,
    batch: int,
    strips: int,
    share: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(sum(parts), columns, zeros).to(dtype)
    for call in kernels:
        multiply_rows(call, weight, packed(weight, parts), batch, strips, share, groups)


@needs_compiler
@settings(max_examples=examples(25))
@given(
    rows=st.integers(1, 70),
    eights=st.integers(1, 70),
    zeros=st.sampled_from([0.5, 0.6, 0.7, 0.8, 1.0]),
    batch=st.integers(1, 32),
    strips=st.integers(1, 2),
    share=st.integers(1, 5),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(cuda.DTYPES),
)
def test_any_rows(
    kernels: list[Kernels],
    rows: int,
    eights: int,
    zeros: float,
    batch: int,
    strips: int,
    share: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    """Also divisions of the work that no plan chooses."""
    weight = random_weight(rows, 8 * eights, zeros).to(dtype)
    layout = packed(weight, [rows])
    share = min(share, layout.panels)
    warps = -(-layout.panels // share) * groups
    assume(warps <= 24 and warps * rows_kernel_bytes(layout.slot, strips) <= Card().shared)
    multiply_rows(kernels[0], weight, layout, batch, strips, share, groups)


@needs_compiler
@pytest.mark.parametrize(
    ("parts", "columns", "zeros"), [((1,), 3, 0.0), ((16, 17), 263, 0.5), ((33,), 1000, 0.7), ((40,), 136, 1.0)]
)
def test_unpacked_values(kernels: list[Kernels], parts: Sequence[int], columns: int, zeros: float) -> None:
    """To the bit, except that zeros of either sign become 0. The kernels do not know which dtype the values have."""
    weight = random_weight(sum(parts), columns, zeros).bfloat16()
    layout = packed(weight, parts)
    for call in kernels:
        dense = unwritten(sum(parts), columns, weight.dtype)
        call("losa_expand", layout.data, layout.starts, dense, *look(layout))
        assert_exact("bits", torch.where(weight == 0, 0, weight).view(torch.int16), dense.view(torch.int16))


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "columns", "zeros", "bits", "batch", "share", "groups"),
    [
        (1, 8, 0.0, 8, 1, 1, 1),
        (17, 300, 0.7, 4, 7, 1, 1),
        (21, 777, 0.3, 6, 8, 3, 2),
        (73, 520, 0.3, 2, 3, 2, 3),
        (16, 256, 1.0, 8, 8, 1, 1),
        (64, 264, 0.7, 8, 8, 1, 4),
    ],
)
@both_dtypes
def test_codes(
    kernels: list[Kernels],
    rows: int,
    columns: int,
    zeros: float,
    bits: int,
    batch: int,
    share: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    codes, scales = quantise.quantise_rows(random_weight(rows, columns, zeros), bits)
    weight = torch.from_numpy(spec.dequantise_rows(codes.numpy(), scales.numpy()))
    layout = in_guarded_memory(cuda_coded.pack_codes(codes, scales, bits, dtype))
    kind = (dtype == torch.float16, layout.code_bits)
    for call in kernels:
        x, bias, y = operands(layout, batch)
        told = (layout.data, layout.starts, x, bias, y, *look(layout), *kind, batch, share, groups, True)
        call("losa_matvec_coded", *told)
        assert_product(weight, x, bias, y)
        dense = unwritten(rows, columns, dtype)
        call("losa_expand_coded", layout.data, layout.starts, dense, *look(layout), *kind)
        assert_exact("unpacked", weight.to(dtype), dense)


@needs_compiler
def test_wrong_accesses_are_errors(kernels: list[Kernels]) -> None:
    weight = random_weight(17, 200, 0.5).half()
    layout = packed(weight, [17])
    for call in kernels:
        for short in (
            replace(layout, data=guarded(layout.data[:-16])),
            replace(layout, starts=guarded(layout.starts[:-1])),
        ):
            with pytest.raises(RuntimeError, match="memory that does not belong to a tensor"):
                multiply_rows(call, weight, short, 3, 1, 1, 1)
        with pytest.raises(RuntimeError, match="shared memory: out of bounds"):
            multiply_rows(call, weight, replace(layout, slot=16), 3, 1, 1, 1)
        with pytest.raises(RuntimeError, match="too many threads or too much shared memory"):
            multiply_rows(call, weight, layout, 3, 1, 1, 33)
        # And the next launch is right.
        multiply_rows(call, weight, layout, 3, 1, 1, 1)


def test_an_unknown_instruction_is_an_error() -> None:
    assert translate('asm("" : "+r"(used)); f<T, 8><<<a, (b, c), d>>>(x);') == (
        "; emulated::launch(f<T, 8>, emulated::Shape{a, (b, c), d}, x);"
    )
    with pytest.raises(KeyError, match=r"cp\.async\.wait_group 1"):
        translate('asm volatile("cp.async.wait_group 1;" ::: "memory");')
