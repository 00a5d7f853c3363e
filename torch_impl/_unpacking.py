"""Unpack a packed matrix on a GPU in one pass, in Triton: a row per program, its kept positions counted as they come.

It reads the packed form and writes the weight; torch's code does so in several passes, with a running count of 8 bytes per position
in memory. Call `usable` first; without Triton or CUDA tensors, use `packed.expand` and `packed.expand_coded`. Triton's interpreter
runs the kernel on CPU tensors, for the tests.
"""

from __future__ import annotations

import torch

from torch_impl._kernels import FLOATS
from torch_impl.quantise import GROUP

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU does not install it
    triton = None

# Columns at once.
BLOCK = 1024
_BITS = {2: torch.int16, 4: torch.int32}


def usable(bitmap: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernel unpacks to this dtype here."""
    return triton is not None and bitmap.is_cuda and dtype in FLOATS


if triton is not None:

    @triton.jit
    def _unpack(
        bitmap,
        values,
        offsets,
        scales,
        weight,
        columns,
        width,
        groups,
        CODED: tl.constexpr,
        GROUP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        before = tl.load(offsets + row)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < columns
            byte = tl.load(bitmap + row * width + column // 8, mask=inside, other=0).to(tl.int32)
            kept = (byte >> (column % 8)) & 1
            place = before + tl.cumsum(kept, 0) - kept
            value = tl.load(values + place, mask=inside & (kept != 0), other=0)
            if CODED:
                scale = tl.load(scales + row * groups + column // GROUP, mask=inside, other=0.0).to(tl.float32)
                value = scale * value.to(tl.float32)
            tl.store(weight + row * columns + column, value.to(weight.dtype.element_ty), mask=inside)
            before += tl.sum(kept, 0)


def unpack(bitmap: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, columns: int) -> torch.Tensor:
    """Compute `packed.expand`: the weight (out, in) of values (kept,), bit for bit."""
    weight = torch.empty(len(bitmap), columns, dtype=values.dtype, device=values.device)
    bits = _BITS[values.element_size()]
    _launch(bitmap, values.view(bits), offsets, bitmap, weight.view(bits), groups=0)
    return weight


def unpack_coded(
    bitmap: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `packed.expand_coded` of codes of 8 bits (⌈kept/8⌉, 8): the weight (out, in), rounded once to `dtype`."""
    weight = torch.empty(len(bitmap), columns, dtype=dtype, device=codes.device)
    _launch(bitmap, codes.view(torch.int8), offsets, scales, weight, groups=scales.shape[1])
    return weight


def _launch(
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    groups: int,
) -> None:
    rows, columns = weight.shape
    _unpack[(rows,)](
        bitmap,
        values,
        offsets,
        scales,
        weight,
        columns,
        bitmap.shape[1],
        groups,
        CODED=groups > 0,
        GROUP=GROUP,
        BLOCK=BLOCK,
        num_warps=4,
    )
