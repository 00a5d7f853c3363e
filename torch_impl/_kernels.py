"""Three fused kernels for CUDA, in Triton. Each does in one pass what the torch code beside its caller does in many.

They are bound by memory traffic: bytes read and written per weight, bf16 weights, against the torch formulation.

    merge      W and W̃ once each                4 bytes     (torch: about 30)
    contract   G and W once each                4 bytes     (torch: about 22)
    sweep      one block of columns in registers, no launch per column

A caller asks `usable` first: no Triton or no CUDA tensor, and the torch code runs. Under Triton's interpreter
(TRITON_INTERPRET=1) the kernels run on CPU tensors, which is how the tests hold them to the spec without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: on CUDA and of a supported dtype."""
    return triton is not None and all(t.is_cuda and t.dtype in FLOATS for t in tensors)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32 at least. On CUDA, half-precision operands are not widened: products are exact anyway."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


if triton is not None:

    @triton.jit
    def _merge(weight, A, B, merged, rows, columns, rank, scale, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        base = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for k in range(rank):
            b = tl.load(B + row * rank + k, mask=row < rows, other=0.0)
            a = tl.load(A + k * columns + column, mask=column < columns, other=0.0)
            product += b[:, None] * a[None, :]
        result = tl.where(base == 0, 0.0, base + scale * product)
        tl.store(merged + place, result.to(merged.dtype.element_ty), mask=inside)

    @triton.jit
    def _contract(
        gradient,
        weight,
        A,
        B,
        parts_A,
        parts_B,
        rows,
        columns,
        rank,
        tiles,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        RANK: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        r = tl.arange(0, RANK)
        b = tl.load(B + row[:, None] * rank + r[None, :], mask=(row[:, None] < rows) & (r[None, :] < rank), other=0.0)
        sum_B = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
        for tile in range(tiles):
            column = (tl.program_id(1) * tiles + tile) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            place = row[:, None].to(tl.int64) * columns + column[None, :]
            g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + place, mask=inside, other=0.0)
            g = tl.where(w != 0, g, 0.0)
            fits = (r[:, None] < rank) & (column[None, :] < columns)
            a = tl.load(A + r[:, None] * columns + column[None, :], mask=fits, other=0.0)
            sum_B += tl.dot(g, tl.trans(a), input_precision="tf32x3")
            part = tl.dot(tl.trans(b), g, input_precision="tf32x3")
            tl.store(parts_A + (tl.program_id(0) * rank + r[:, None]) * columns + column[None, :], part, mask=fits)
        to = (tl.program_id(1) * rows + row[:, None]) * rank + r[None, :]
        tl.store(parts_B + to, sum_B, mask=(row[:, None] < rows) & (r[None, :] < rank))

    @triton.jit
    def _sweep(
        weight,
        factor,
        mask,
        errors,
        rows,
        weight_stride,
        factor_stride,
        mask_stride,
        errors_stride,
        first,
        last,
        width,
        BLOCK_ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * weight_stride + column[None, :]
        tile = tl.load(weight + place, mask=inside, other=0.0)
        for j in range(first, last):
            value = tl.sum(tl.where(column[None, :] == j, tile, 0.0), 1)
            kept = tl.load(mask + row.to(tl.int64) * mask_stride + j, mask=row < rows, other=1)
            pivot = tl.load(factor + j * factor_stride + j)
            error = tl.where(kept != 0, 0.0, value) / pivot
            later = (column >= j) & (column < width)
            u = tl.load(factor + j * factor_stride + column, mask=later, other=0.0)
            tile -= error[:, None] * u[None, :]
            tl.store(errors + row.to(tl.int64) * errors_stride + j, error, mask=row < rows)
        tl.store(weight + place, tile, mask=inside)


def merge(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """M⊙(W + s·BA) rounded once to the weight's dtype; weight (out, in), A (r, in), B (out, r) in float32."""
    rows, columns = weight.shape
    weight = weight.contiguous()
    merged = torch.empty_like(weight)
    grid = (triton.cdiv(rows, 32), triton.cdiv(columns, 128))
    _merge[grid](
        weight, A.contiguous(), B.contiguous(), merged, rows, columns, len(A), scale, BLOCK_ROWS=32, BLOCK_COLUMNS=128
    )
    return merged


def contract(
    gradient: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s Bᵀ(M⊙G), s (M⊙G)Aᵀ) = (dA (r, in), dB (out, r)) from G (out, in); sums in float32 and in a fixed order."""
    rows, columns = weight.shape
    gradient, weight = gradient.contiguous(), weight.contiguous()
    rank, block_rows, block_columns = len(A), 128, 64
    padded = max(16, triton.next_power_of_2(rank))
    bands = triton.cdiv(rows, block_rows)
    strips = min(triton.cdiv(columns, block_columns), max(1, 1024 // bands))
    tiles = triton.cdiv(triton.cdiv(columns, block_columns), strips)
    parts_A = A.new_zeros(bands, rank, columns)
    parts_B = B.new_zeros(strips, rows, rank)
    _contract[(bands, strips)](
        gradient,
        weight,
        A.contiguous(),
        B.contiguous(),
        parts_A,
        parts_B,
        rows,
        columns,
        rank,
        tiles,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        RANK=padded,
    )
    return parts_A.sum(0).mul_(scale), parts_B.sum(0).mul_(scale)


def sweep(
    weight: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor, first: int, last: int
) -> None:
    """Visit columns `first` to `last` of one block in place (SparseGPT, Algorithm 1, inner loop).

    weight, errors (out, width), float32; factor (width, width), the block of U on the diagonal; mask (out, width), bool.
    """
    rows, width = weight.shape
    factor = factor.contiguous()
    block_rows = 16
    options: dict[str, Any] = {"BLOCK_ROWS": block_rows, "WIDTH": triton.next_power_of_2(width), "num_warps": 4}
    _sweep[(triton.cdiv(rows, block_rows),)](
        weight,
        factor,
        mask.view(torch.uint8),
        errors,
        rows,
        weight.stride(0),
        factor.stride(0),
        mask.stride(0),
        errors.stride(0),
        first,
        last,
        width,
        **options,
    )
