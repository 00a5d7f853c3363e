"""Products of packed weights that also compute what a decoder block does next: norm, SiLU(gate) · up, residual sum (cuda_decode.h).

RMSNorm divides by a root that a product can divide by afterwards. So the product that adds to the residual t leaves t · gain of
the next norm and `squares`, the sums of t's squares per strip of its rows; the product that follows reads both. In bf16, up to
eight rows. On a GPU with kernels each is one launch; elsewhere torch computes the same.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from torch_impl import tiles
from torch_impl.decode import cuda

MOST_ROWS = 8
"""Rows of x."""
DTYPE = torch.bfloat16
"""A norm's input times its gain may be too large for fp16."""


def fits(layout: cuda.Layout, ending: str, rows: int = MOST_ROWS) -> bool:
    """Return whether a product of so many rows of x can end so: "normed", "swiglu" or "added"."""
    if layout.dtype != DTYPE or (layout.data.is_cuda and layout.product is None):
        return False
    return layout.ends(ending == "swiglu", 0 if ending == "added" else cuda.squares_bytes(layout.columns), rows)


def normed(
    layout: cuda.Layout, x: torch.Tensor, squares: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute RMSNorm(t) · Wᵀ (+ bias) from x = t · gain (b, in) and t's squares."""
    if layout.product is not None:
        y: torch.Tensor = torch.ops.losa_cuda_decode.linear_normed.default(
            x, squares, eps, layout.data, layout.starts, layout.plan, bias
        )
        return y
    sums = _product(layout, x) * torch.rsqrt(squares.sum(1, keepdim=True) / layout.columns + eps)
    return (sums if bias is None else sums + bias.float()).to(x.dtype)


def swiglu(
    layout: cuda.Layout, x: torch.Tensor, squares: torch.Tensor, eps: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute SiLU(gate) · up (b, rows / 2), where gate and up are the halves of `normed`."""
    if layout.product is not None:
        y: torch.Tensor = torch.ops.losa_cuda_decode.linear_gated.default(
            x, squares, eps, layout.data, layout.starts, layout.plan, bias
        )
        return y
    gate, up = normed(layout, x, squares, eps, bias).chunk(2, 1)
    return functional.silu(gate) * up


def added(
    layout: cuda.Layout, x: torch.Tensor, total: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x · Wᵀ (+ bias) to total (b, rows) in place; return (total · gain, squares (b, parts))."""
    if layout.product is not None:
        scaled, squares = torch.ops.losa_cuda_decode.linear_added.default(
            x, total, gain, layout.data, layout.starts, layout.plan, bias
        )
        return scaled, squares
    sums = _product(layout, x)
    total += (sums if bias is None else sums + bias.float()).to(x.dtype)
    return begun(total, gain)


def begun(total: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (total · gain, squares (b, parts)) by torch."""
    wide = functional.pad(total.float(), (0, -total.shape[1] % tiles.ROWS))
    return total * gain, wide.square().view(len(total), -1, tiles.ROWS).sum(-1)


def _product(layout: cuda.Layout, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x.float(), layout.expanded(torch.float32))
