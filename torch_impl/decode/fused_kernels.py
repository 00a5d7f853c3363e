"""Kernels in Triton that compute everything of a decoder block between its products, for one token per row.

    add_norm   the residual sum and its RMSNorm
    begin      what the first block's products read, if they compute their own norms (cuda_endings.py)
    attend     norms of heads if any, rotary embedding, writing key and value to the cache, attention over its filled part
    gated      SiLU(gate) · up

Each rounds where Hugging Face's layers round. Nothing synchronises with the host, so a CUDA graph can capture a call: the number
of cached tokens is read from the GPU. On GPUs that allow it, a kernel starts while the one before it ends, and so does the next.
Call `usable` first. Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on CPU tensors.
"""

from __future__ import annotations

import subprocess

import torch

from torch_impl import tiles
from torch_impl._kernels import usable
from torch_impl.decode.early_launch import early
from torch_impl.decode.fused_attention import MOST_SHARED, Attention, attend

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU does not install it
    triton = None

ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, subprocess.SubprocessError)
"""What a launch may raise, whose first one compiles the kernel."""
if triton is not None:
    ERRORS = (*ERRORS, triton.TritonError)

__all__ = ["ERRORS", "MOST_SHARED", "Attention", "add_norm", "attend", "begin", "gated", "usable"]

# Columns of one program of `gated`.
COLUMNS = 1024


if triton is not None:
    from torch_impl.decode.early_launch import take_turn

    @triton.jit
    def _begin(
        x, gain, scaled, squares, columns, x_stride, STRIP: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr
    ):
        row = tl.program_id(0)
        column = tl.arange(0, WIDTH)
        inside = column < columns
        scale = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        take_turn(EARLY)
        own = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
        value = own.to(tl.float32)
        tl.store(scaled + row * columns + column, (value * scale).to(own.dtype), mask=inside)
        part, parts = tl.arange(0, WIDTH // STRIP), tl.cdiv(columns, STRIP)
        sums = tl.sum(tl.reshape(value * value, (WIDTH // STRIP, STRIP)), 1)
        tl.store(squares + row * parts + part, sums, mask=part < parts)

    @triton.jit
    def _add_norm(
        x,
        residual,
        gain,
        normed,
        total,
        columns,
        eps,
        x_stride,
        ADD: tl.constexpr,
        WIDTH: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        row = tl.program_id(0)
        column = tl.arange(0, WIDTH)
        inside = column < columns
        scale = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        take_turn(EARLY)
        own = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
        dtype = own.dtype
        value = own.to(tl.float32)
        if ADD:
            value += tl.load(residual + row * columns + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + row * columns + column, value.to(dtype), mask=inside)
            value = value.to(dtype).to(tl.float32)
        value *= tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
        tl.store(normed + row * columns + column, (scale * value.to(dtype).to(tl.float32)).to(dtype), mask=inside)

    @triton.jit
    def _gated(gate, up, out, columns, gate_stride, up_stride, WIDTH: tl.constexpr, EARLY: tl.constexpr):
        take_turn(EARLY)
        row = tl.program_id(0)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = column < columns
        own = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
        value = own.to(tl.float32)
        value = (value / (1 + tl.exp(-value))).to(own.dtype).to(tl.float32)
        value *= tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + column, value.to(own.dtype), mask=inside)


def begin(x: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (x · gain, the sums of squares of x per 16 columns) of (b, d)."""
    rows, columns = x.shape
    scaled, squares = x.new_empty(rows, columns), x.new_empty(rows, -(-columns // tiles.ROWS), dtype=torch.float32)
    width = max(tiles.ROWS, triton.next_power_of_2(columns))
    warps = min(16, max(1, width // 512))
    strides = (columns, x.stride(0))
    _begin[(rows,)](x, gain, scaled, squares, *strides, STRIP=tiles.ROWS, WIDTH=width, num_warps=warps, **early(x))
    return scaled, squares


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, gain: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (RMSNorm of the sum, the sum) of x and residual (b, d), or of x alone."""
    rows, columns = x.shape
    normed = x.new_empty(rows, columns)
    total = x if residual is None else torch.empty_like(normed)
    width = triton.next_power_of_2(columns)
    _add_norm[(rows,)](
        x,
        residual,
        gain,
        normed,
        total,
        columns,
        eps,
        x.stride(0),
        ADD=residual is not None,
        WIDTH=width,
        num_warps=min(16, max(1, width // 512)),
        **early(x),
    )
    return normed, total


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute SiLU(gate) · up of (b, inner)."""
    rows, columns = gate.shape
    out = gate.new_empty(rows, columns)
    grid = (rows, triton.cdiv(columns, COLUMNS))
    _gated[grid](gate, up, out, columns, gate.stride(0), up.stride(0), WIDTH=COLUMNS, num_warps=4, **early(gate))
    return out
