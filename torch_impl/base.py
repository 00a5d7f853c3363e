"""The base weight of a masked adapter, rounded while the adapter is trained. Spec: reference/base.py; the layer:
engine/compressed_linear.py."""

from __future__ import annotations

import torch
from torch.nn import functional

from torch_impl import _checks
from torch_impl.quantise import GROUP, MOST_BITS, group_scales, nearest_codes

# Entries that are rounded at once, in float64.
AT_ONCE = 2**23


def round_base(
    weight: torch.Tensor, scales: torch.Tensor | None = None, group: int = GROUP
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight (out, in): (codes (out, in) int8, 0 only where it is, scales (out, ⌈in/group⌉) float16).

    scales: of an earlier rounding; a group whose values they represent keeps scale and codes.
    """
    weight = _checks.tensor("weight", weight, "out", "in")
    group = min(_checks.integer("group", group, 1), weight.shape[1])
    shape = len(weight), -(-weight.shape[1] // group)
    if scales is not None:
        scales = _checks.tensor("scales", scales, "out", "groups")
        if scales.shape != shape or float(scales.min()) < 0:
            held = f"has shape {tuple(scales.shape)} and holds {float(scales.min())}"
            raise ValueError(f"scales {held}; allowed: {shape}, 0 or more")
    at_once = max(1, AT_ONCE // weight.shape[1])
    earlier = [None] * -(-len(weight) // at_once) if scales is None else scales.split(at_once)
    rounded = [_round_rows(rows, own, group) for rows, own in zip(weight.split(at_once), earlier, strict=True)]
    codes, found = zip(*rounded, strict=True)
    return torch.cat(codes), torch.cat(found)


def _round_rows(weight: torch.Tensor, scales: torch.Tensor | None, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    grouped = functional.pad(weight, (0, -columns % group)).reshape(-1, group)
    fresh = group_scales(grouped, MOST_BITS)
    codes = _codes(grouped, fresh)
    if scales is not None:
        earlier = _codes(grouped, scales.flatten())
        # float32 holds a product of scale and code exactly.
        meant = (scales.flatten().float()[:, None] * earlier).to(weight.dtype)
        stays = (meant == grouped).all(1)
        codes = torch.where(stays[:, None], earlier, codes)
        fresh = torch.where(stays, scales.flatten().half(), fresh)
    return codes.view(rows, -1)[:, :columns], fresh.view(rows, -1)


def _codes(grouped: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Round to the nearest code, but not to 0 what is not 0."""
    codes = nearest_codes(grouped, scales, MOST_BITS)
    return torch.where((codes == 0) & (grouped != 0), grouped.sign().to(torch.int8), codes)
