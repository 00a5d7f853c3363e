"""What a decoder block computes between its products, for one token per row: by Triton on a GPU, by torch elsewhere."""

from __future__ import annotations

import torch
from torch.nn import functional

from torch_impl.decode import cuda_endings, fused_kernels
from torch_impl.decode.fused_kernels import Attention


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, gain: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (RMSNorm of the sum, the sum) of x and residual (b, d), or of x alone."""
    if fused_kernels.usable(x, gain):
        return fused_kernels.add_norm(x, residual, gain, eps)
    total = x if residual is None else x + residual
    return _normed(total, gain, eps), total


def begin(x: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (x · gain, the sums of squares of x per 16 columns) of (b, d)."""
    return fused_kernels.begin(x, gain) if fused_kernels.usable(x, gain) else cuda_endings.begun(x, gain)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Attention) -> torch.Tensor:
    """Write the token's key and value to the cache, and attend to all tokens up to it: (b, h·e).

    q (b, h·e), k, v (b, g·e): before rotary embedding. The caller counts the token afterwards.
    """
    if fused_kernels.usable(q, layer.keys):
        return fused_kernels.attend(q, k, v, layer)
    batch, groups, longest, channels = layer.keys.shape
    place = layer.filled.view(1)
    cos, sin = layer.cos[place], layer.sin[place]
    q, k = (
        _turned(_normed(x.view(batch, -1, 1, channels), gain, layer.eps), cos, sin)
        for x, gain in zip((q, k), layer.gains, strict=True)
    )
    layer.keys.index_copy_(2, place, k)
    layer.values.index_copy_(2, place, v.view(batch, groups, 1, channels))
    seen = (torch.arange(longest, device=q.device) <= place)[None]
    result = functional.scaled_dot_product_attention(
        q, layer.keys, layer.values, attn_mask=seen, scale=layer.scale, enable_gqa=True
    )
    return result.reshape(batch, layer.heads * channels)


def _normed(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    if gain is None:
        return x
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute SiLU(gate) · up of (b, inner)."""
    return fused_kernels.gated(gate, up) if fused_kernels.usable(gate, up) else functional.silu(gate) * up
