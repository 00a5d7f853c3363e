"""Structured pruning: remove whole heads and whole MLP channels. Spec: reference/masks/structured.py.

Legend: g key-value heads, m channels, u structures of either kind: equal runs of rows or columns of a projection.
"""

from __future__ import annotations

import math

import torch

from torch_impl import _checks


def structure_score(score: torch.Tensor, structures: int) -> torch.Tensor:
    """Average score (out, in) of o or down over outputs and sum it over each structure's columns; return (u,) (Wanda-SP)."""
    score = _checks.scores(score)
    _divides("structures", structures, score.shape[1], "columns of score")
    return _checks.wide(score).mean(0).view(structures, -1).sum(1)


def removed_structures(
    sparsity: float,
    heads: int,
    channels: int,
    head_weights: int,
    channel_weights: int,
    multiple: int = 1,
    last: bool = True,
) -> tuple[int, int]:
    """Choose how many (heads, channels) a block of this sparsity has lost; see the spec for the rounding.

    head_weights, channel_weights: weights of one. multiple: of which the number of kept channels is one, unless all are kept.
    last: whether the block is not pruned again; channels then make up for the part of a head that was rounded off.
    """
    rho = _checks.number("sparsity", sparsity, 0.0, 1.0)
    g, m = _checks.integer("heads", heads, 1), _checks.integer("channels", channels, 1)
    w_h, w_c = _checks.integer("head_weights", head_weights, 1), _checks.integer("channel_weights", channel_weights, 1)
    _checks.integer("multiple", multiple, 1, m)
    H = min(math.floor(rho * g + 1e-9), g - 1)
    C = (rho * (g * w_h + m * w_c) - H * w_h) / w_c if last else rho * m
    low = math.floor((m - C) / multiple) * multiple
    counts = [min(max(count, multiple), m) for count in (low, low + multiple, m)]
    kept = min(counts, key=lambda count: (round(abs(count - (m - C)), 9), -count))
    return H, m - kept


def structure_mask(score: torch.Tensor, removed: int, kept: torch.Tensor) -> torch.Tensor:
    """Remove the structures of lowest score (u,), those already gone first; return bool (u,) ⊆ kept. Ties by lower index."""
    score = _checks.finite("score", score, "u")
    kept = _checks.mask("kept", kept, score, "score")
    _checks.integer("removed", removed, 0, len(score))
    order = score.masked_fill(~kept, -math.inf).argsort(stable=True)
    return kept.index_fill(0, order[:removed], False)


def kept_structures(mask: torch.Tensor, structures: int) -> torch.Tensor:
    """Find the structures (u,) of which a column of o or down is still read; mask bool (out, in)."""
    mask = _mask("mask", mask, "out", "in")
    _divides("structures", structures, mask.shape[1], "columns of mask")
    return mask.any(0).view(structures, -1).any(1)


def coupled_mask(kept: torch.Tensor, shape: tuple[int, int], axis: int) -> torch.Tensor:
    """Mask the rows (axis 0) or columns (1) of a projection (out, in) that belong to structures; return bool (out, in)."""
    lines = _lines(kept, tuple(_checks.integer("shape", size, 1) for size in shape), axis)
    return (lines[:, None] if axis == 0 else lines).expand(shape).clone()


def cut(values: torch.Tensor, kept: torch.Tensor, axis: int) -> torch.Tensor:
    """Leave out the rows (axis 0) or columns (1) of structures that are gone, of a weight (out, in) or a bias (out,)."""
    values = _checks.tensor("values", values, "...", "out")
    lines = _lines(kept, tuple(values.shape), axis)
    return values.index_select(axis, lines.nonzero().flatten().to(values.device))


def _lines(kept: torch.Tensor, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """Repeat each structure's entry for the rows or columns that it has."""
    kept = _mask("kept", kept, "u")
    _checks.integer("axis", axis, 0, len(shape) - 1)
    _divides("kept", len(kept), shape[axis], f"entries along axis {axis}")
    return kept.repeat_interleave(shape[axis] // len(kept))


def _mask(name: str, value: torch.Tensor, *axes: str) -> torch.Tensor:
    mask = _checks.mask(name, value, value, name)
    if mask.dim() != len(axes) or not mask.numel():
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; allowed: ({', '.join(axes)}), none of them 0")
    return mask


def _divides(name: str, structures: int, lines: int, of: str) -> None:
    _checks.integer("structures", structures, 1)
    if lines % structures:
        raise ValueError(f"{name} has {structures} structures for {lines} {of}; allowed: a divisor")
