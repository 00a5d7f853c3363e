"""Four fused kernels for CUDA, in Triton. Each does in one pass what its caller's torch code does in many.

Memory traffic limits them. Bytes read and written per bf16 weight, and those of the torch code:

    merge      W and W̃ once each                4 bytes     (torch: about 30)
    contract   G and W once each                4 bytes     (torch: about 22); a second small kernel sums the parts
    sweep      one block of columns in registers, no launch per column, nor per group of an N:M pattern
    select     a row of scores in registers, read once; finds the threshold bit by bit (torch sorts the row)

Call `usable` first. Without Triton or CUDA tensors, run the torch code instead. Triton's interpreter (TRITON_INTERPRET=1)
runs the kernels on CPU tensors, so the tests compare them with the spec without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU does not install it
    triton = None

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# Tile sizes measured on an H200: rows, columns, and warps per program. merge: warps for float32, warps for bf16 factors.
# contract: also the approximate number of programs.
MERGE_TILE = (64, 128, 2, 4)
CONTRACT_TILE = (128, 64, 4, 264)
# Partial sums read at once, and sums per program.
TOTALS_TILE = (8, 128)
# The longest row of scores that a program holds in registers, and its columns per warp.
WIDEST_ROW, COLUMNS_OF_WARP = 1 << 14, 1024


def usable(*tensors: torch.Tensor) -> bool:
    """Return whether the kernels support these tensors: on CUDA, with a supported dtype."""
    return triton is not None and all(t.is_cuda and t.dtype in FLOATS for t in tensors)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply left @ right in float32 at least. Half-precision operands on CUDA are not widened: their products are exact."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


if triton is not None:

    @triton.jit
    def _merge(
        weight,
        A,
        B,
        merged,
        rows,
        columns,
        rank,
        scale,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        RANK: tl.constexpr,
        PRECISION: tl.constexpr,
        SPLIT: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        r = tl.arange(0, RANK)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        place = row[:, None].to(tl.int64) * columns + column[None, :]
        base = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + row[:, None] * rank + r[None, :], mask=(row[:, None] < rows) & (r[None, :] < rank), other=0.0)
        a_fits = (r[:, None] < rank) & (column[None, :] < columns)
        a = tl.load(A + r[:, None] * columns + column[None, :], mask=a_fits, other=0.0)
        if SPLIT:
            # Each factor is the sum of two bf16 numbers, up to 2⁻¹⁷. The product of the low parts is negligible.
            a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
            a_low, b_low = (a - a_high.to(tl.float32)).to(tl.bfloat16), (b - b_high.to(tl.float32)).to(tl.bfloat16)
            change = tl.dot(b_high, a_high, tl.dot(b_high, a_low, tl.dot(b_low, a_high)))
        else:
            change = tl.dot(b, a, input_precision=PRECISION)
        result = tl.where(base == 0, 0.0, base + scale * change)
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
        scale,
        tiles,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        RANK: tl.constexpr,
        HALF: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        r = tl.arange(0, RANK)
        b_fits = (row[:, None] < rows) & (r[None, :] < rank)
        b = tl.load(B + row[:, None] * rank + r[None, :], mask=b_fits, other=0.0)
        sum_B = tl.zeros((BLOCK_ROWS, RANK), tl.float32)
        for tile in range(tiles):
            column = (tl.program_id(1) * tiles + tile) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            place = row[:, None].to(tl.int64) * columns + column[None, :]
            g = tl.load(gradient + place, mask=inside, other=0.0)
            w = tl.load(weight + place, mask=inside, other=0.0)
            g = tl.where(w != 0, g, tl.zeros_like(g))
            a_fits = (r[:, None] < rank) & (column[None, :] < columns)
            a = tl.load(A + r[:, None] * columns + column[None, :], mask=a_fits, other=0.0)
            if HALF:
                # g is exact in its own dtype. a and b are each the sum of two numbers of that dtype, up to 2⁻¹⁷ (bf16).
                a_high, b_high = a.to(g.dtype), b.to(g.dtype)
                a_low, b_low = (a - a_high.to(tl.float32)).to(g.dtype), (b - b_high.to(tl.float32)).to(g.dtype)
                sum_B += tl.dot(g, tl.trans(a_high)) + tl.dot(g, tl.trans(a_low))
                part = tl.dot(tl.trans(b_high), g) + tl.dot(tl.trans(b_low), g)
            else:
                g = g.to(tl.float32)
                sum_B += tl.dot(g, tl.trans(a), input_precision="ieee")
                part = tl.dot(tl.trans(b), g, input_precision="ieee")
            to = (tl.program_id(0) * rank + r[:, None]).to(tl.int64) * columns + column[None, :]
            tl.store(parts_A + to, scale * part, mask=a_fits)
        to = (tl.program_id(1) * rows + row[:, None]).to(tl.int64) * rank + r[None, :]
        tl.store(parts_B + to, scale * sum_B, mask=b_fits)

    @triton.jit
    def _add_up(parts, total, size, count, first, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
        number, place = tl.arange(0, AT_ONCE), first * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((AT_ONCE, BLOCK), tl.float32)
        for start in range(0, count, AT_ONCE):
            there = (start + number[:, None] < count) & (place[None, :] < size)
            at = (start + number[:, None]).to(tl.int64) * size + place[None, :]
            sums += tl.load(parts + at, mask=there, other=0.0)
        tl.store(total + place, tl.sum(sums, 0), mask=place < size)

    @triton.jit
    def _totals(
        parts_A,
        parts_B,
        total_A,
        total_B,
        size_A,
        size_B,
        bands,
        strips,
        programs_A,
        AT_ONCE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        if program < programs_A:
            _add_up(parts_A, total_A, size_A, bands, program, AT_ONCE, BLOCK)
        else:
            _add_up(parts_B, total_B, size_B, strips, program - programs_A, AT_ONCE, BLOCK)

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
        step,
        gone,
        BLOCK_ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        CHOOSE: tl.constexpr,
    ):
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * weight_stride + column[None, :]
        tile = tl.load(weight + place, mask=inside, other=0.0)
        if CHOOSE:
            mask_place = row[:, None].to(tl.int64) * mask_stride + column[None, :]
            chosen = tl.load(mask + mask_place, mask=inside, other=0).to(tl.int32)
            pivots = tl.load(factor + column * (factor_stride + 1), mask=column < width, other=1.0)
        for start in range(first, last, step):
            if CHOOSE:
                # Of each row's group, prune what is pruned already and then the lowest scores; ties by lower column.
                score = tile / pivots[None, :]
                score = tl.where(chosen != 0, score * score, float("-inf"))
                of_group = inside & (column[None, :] >= start) & (column[None, :] < start + step)
                left = tl.where(of_group, 1, 0)
                for _ in range(gone):
                    lowest = tl.min(tl.where(left != 0, score, float("inf")), 1)
                    equal = (left != 0) & (score == lowest[:, None])
                    place_gone = tl.min(tl.where(equal, column[None, :], WIDTH), 1)
                    left = tl.where(column[None, :] == place_gone[:, None], 0, left)
                    chosen = tl.where(column[None, :] == place_gone[:, None], 0, chosen)
            for j in range(start, start + step):
                value = tl.sum(tl.where(column[None, :] == j, tile, 0.0), 1)
                if CHOOSE:
                    kept = tl.sum(tl.where(column[None, :] == j, chosen, 0), 1)
                else:
                    kept = tl.load(mask + row.to(tl.int64) * mask_stride + j, mask=row < rows, other=1).to(tl.int32)
                pivot = tl.load(factor + j * factor_stride + j)
                error = tl.where(kept != 0, 0.0, value) / pivot
                later = (column >= j) & (column < width)
                u = tl.load(factor + j * factor_stride + column, mask=later, other=0.0)
                tile -= error[:, None] * u[None, :]
                tl.store(errors + row.to(tl.int64) * errors_stride + j, error, mask=row < rows)
        tl.store(weight + place, tile, mask=inside)
        if CHOOSE:
            tl.store(mask + mask_place, chosen.to(tl.uint8), mask=inside)

    @triton.jit
    def _select(score, mask, columns, count, WIDTH: tl.constexpr):
        column = tl.arange(0, WIDTH)
        inside = column < columns
        place = tl.program_id(0).to(tl.int64) * columns + column
        value = tl.load(score + place, mask=inside, other=float("inf"))
        # Map floats to integers of the same order: flip the bits of negative floats, and make -0 equal to 0.
        bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
        key = tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)
        # Find the largest threshold with fewer than `count` keys below it, from the highest bit to the lowest.
        threshold, one = tl.full((), -0x80000000, tl.int32), tl.full((), 1, tl.int32)
        for step in range(32):
            higher = threshold ^ (one << (31 - step))
            below = tl.sum((key < higher).to(tl.int32), 0)
            threshold = tl.where(below < count, higher, threshold)
        lower, equal = (key < threshold).to(tl.int32), (key == threshold).to(tl.int32)
        # Prune keys equal to the threshold from the left until `count` are pruned.
        pruned = (lower != 0) | ((equal != 0) & (tl.cumsum(equal, 0) <= count - tl.sum(lower, 0)))
        tl.store(mask + place, tl.where(pruned, 0, 1).to(tl.uint8), mask=inside)


def _padded(rank: int) -> int:
    """Round the rank up to what matrix units take: 16 at least, and a power of two."""
    return max(16, int(triton.next_power_of_2(rank)))


def merge(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, merged: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute M⊙(W + s·BA), rounded once to the weight's dtype; weight (out, in), A (r, in), B (out, r) in float32.

    merged: contiguous tensor for the result; default a new one.
    """
    rows, columns = weight.shape
    weight = weight.contiguous()
    merged = torch.empty_like(weight) if merged is None else merged
    block_rows, block_columns, *warps = MERGE_TILE
    # The interpreter cannot multiply bf16.
    split = weight.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret
    _merge[(triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))](
        weight,
        A.contiguous(),
        B.contiguous(),
        merged,
        rows,
        columns,
        len(A),
        scale,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        RANK=_padded(len(A)),
        PRECISION="ieee" if weight.dtype == torch.float32 else "tf32x3",
        SPLIT=split,
        num_warps=warps[split],
    )
    return merged


def contract(
    gradient: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (dA (r, in), dB (out, r)) = (s Bᵀ(M⊙G), s (M⊙G)Aᵀ) from G (out, in); float32 sums in a fixed order."""
    rows, columns = weight.shape
    gradient, weight = gradient.contiguous(), weight.contiguous()
    rank = len(A)
    block_rows, block_columns, warps, programs = CONTRACT_TILE
    bands = triton.cdiv(rows, block_rows)
    strips = min(triton.cdiv(columns, block_columns), max(1, programs // bands))
    tiles = triton.cdiv(triton.cdiv(columns, block_columns), strips)
    strips = triton.cdiv(triton.cdiv(columns, block_columns), tiles)
    parts_A = A.new_empty(bands, rank, columns)
    parts_B = B.new_empty(strips, rows, rank)
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
        scale,
        tiles,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        RANK=_padded(rank),
        # The interpreter cannot multiply bf16.
        HALF=gradient.dtype != torch.float32 and not triton.knobs.runtime.interpret,
        num_warps=warps,
    )
    total_A, total_B = torch.empty_like(parts_A[0]), torch.empty_like(parts_B[0])
    at_once, block = TOTALS_TILE
    programs_A = triton.cdiv(total_A.numel(), block)
    _totals[(programs_A + triton.cdiv(total_B.numel(), block),)](
        parts_A,
        parts_B,
        total_A,
        total_B,
        total_A.numel(),
        total_B.numel(),
        bands,
        strips,
        programs_A,
        AT_ONCE=at_once,
        BLOCK=block,
    )
    return total_A, total_B


def sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    mask: torch.Tensor,
    errors: torch.Tensor,
    first: int,
    last: int,
    pattern: tuple[int, int] | None = None,
) -> None:
    """Prune columns `first` to `last` of one block in place (SparseGPT, Algorithm 1, inner loop).

    weight, errors (out, width), float32; factor (width, width), the block of U on the diagonal; mask (out, width), bool. pattern:
    (N, M); the mask, at first what may be kept, is then chosen here for every M columns, when the first of them is reached.
    """
    kept, step = pattern or (0, max(1, last - first))
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
        step,
        step - kept,
        CHOOSE=pattern is not None,
        **options,
    )


def select(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return a bool mask (out, in), False at the `count` lowest scores of each row; ties by lower column.

    score: (out, in), float32, without NaN.
    """
    rows, columns = score.shape
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    width = triton.next_power_of_2(columns)
    warps = min(16, max(1, width // COLUMNS_OF_WARP))
    _select[(rows,)](score.contiguous(), mask.view(torch.uint8), columns, count, WIDTH=width, num_warps=warps)
    return mask
