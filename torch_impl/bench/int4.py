"""Dense 4-bit weights with torch's own kernels, as torchao uses them; lossy, so shown only for comparison."""

from __future__ import annotations

import torch

# Weights per scale and midpoint; tiles in the GPU's order.
GROUP = 128
INNER_TILES = 8


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise: (codes 0 to 15 (out, in) int32, scales and midpoints (in / GROUP, out, 2) bf16, their weight in float32)."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-8).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    codes = ((groups - middle[..., None]) / scale[..., None]).round().add(8).clamp(0, 15)
    meant = (codes - 8) * scale[..., None] + middle[..., None]
    both = torch.stack([scale, middle], -1).transpose(0, 1).contiguous().bfloat16()
    return codes.view(rows, columns).int(), both, meant.view(rows, columns)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (tiles, scales and midpoints) for `product`; None if torch has no kernel for this device, dtype or shape."""
    if weight.dtype != torch.bfloat16 or weight.shape[1] % GROUP:
        return None
    codes, both, meant = quantise(weight)
    x = torch.randn(2, weight.shape[1], device=weight.device).bfloat16()
    try:
        if weight.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            tiles = torch._convert_weight_to_int4pack(pairs, INNER_TILES)
        else:
            tiles = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        found, right = product(tiles, both, x).float(), x.float() @ meant.T
    except (AttributeError, RuntimeError):
        return None
    return (tiles, both) if float((found - right).norm()) <= 2**-6 * float(right.norm()) else None


def product(tiles: torch.Tensor, both: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Compute y = x Ŵᵀ (b, out) of x (b, in), bf16."""
    kernel = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
    return kernel(x, tiles, GROUP, both)
