"""Structured pruning: remove whole attention heads and whole MLP channels, so that the block becomes smaller.

A structure is what must go together. Removing it changes the block as setting the columns that read it to zero does:

    a key-value head with its query heads:  its rows of k and v, their rows of q, the columns of o that read them
    a channel of the MLP:                   its row of gate and up, its column of down

Legend: g key-value heads, m channels, u structures of either kind. In a matrix they are equal runs of rows or columns, in order.
A head has w_h weights, a channel w_c, the block n = g·w_h + m·w_c.
"""

from __future__ import annotations

import math

import numpy as np

from reference import _checks
from reference._checks import Array, Mask

BY_HEAD = {"q": 0, "k": 0, "v": 0, "o": 1}
"""The projections that a head runs through: 0, its rows; 1, its columns."""
BY_CHANNEL = {"gate": 0, "up": 0, "down": 1}
"""The projections that a channel runs through, likewise."""
AXES = BY_HEAD | BY_CHANNEL
READS_HEADS, READS_CHANNELS = "o", "down"
"""The projections whose columns read the structures: their scores decide."""


def structure_score(score: Array, structures: int) -> Array:
    """Score structures by the weights that read them.

    Source: Wanda-SP (in FLAP, arXiv 2312.11983), for score_ij = |W_ij| · ‖X_j‖₂ of o and down.

        S_u = Σ_{j in run u} (1 / out) Σ_i score_ij

    Parameters: score (out, in) of o or down, of any pruning method; structures u, a divisor of in. Returns: (u,).

    *Deviation*: with grouped queries, a run holds the columns of all query heads that share a key-value head.

    >>> structure_score([[1, 2, 3, 4], [3, 2, 1, 0]], 2)  # means of columns 2, 2, 2, 2
    array([4., 4.])
    """
    score = _checks.scores(score)
    _divides("structures", structures, score.shape[1], "columns of score")
    return score.mean(axis=0).reshape(structures, -1).sum(axis=1)


def removed_structures(
    sparsity: float,
    heads: int,
    channels: int,
    head_weights: int,
    channel_weights: int,
    multiple: int = 1,
    last: bool = True,
) -> tuple[int, int]:
    """Choose how many key-value heads and channels a block of sparsity ρ has lost.

    Source: ours, decision 52; Wanda-SP gives heads and channels the same ratio.

        H = min(floor(ρ · g + 1e-9), g − 1)
        C = ρ · m                        before the last step
        C = (ρ · n − H · w_h) / w_c      at the last: channels make up for the part of a head that was rounded off
        kept channels: the multiple nearest to m − C from `multiple` to m, or m itself; of two, the larger

    Parameters: sparsity ρ in [0, 1]; heads g; channels m; head_weights w_h; channel_weights w_c; multiple, of which the number of
    kept channels is one unless all are kept, up to m; last, whether the block is not pruned again.

    Returns: (heads removed, channels removed). Neither falls as ρ rises or as the last step comes, so that masks nest. One head
    and `multiple` channels stay, whatever ρ.

    *Deviation*: Wanda-SP rounds both alike, so a model of few heads misses its ratio by up to half a head in every block.

    >>> removed_structures(0.5, 3, 8, 16, 6)  # 48 of 96 weights: one head of 16, and 32 / 6 channels of 6
    (1, 5)
    >>> removed_structures(0.5, 3, 8, 16, 6, last=False)
    (1, 4)
    >>> removed_structures(0.5, 3, 8, 16, 6, multiple=4)  # keep 2.7 channels, so 4
    (1, 4)
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


def structure_mask(score: Array, removed: int, kept: Mask) -> Mask:
    """Remove the structures of lowest score; those that are gone already count and go first, so that masks nest.

    Source: Wanda-SP. Parameters: score (u,); removed, their number after this, from 0 to u; kept bool (u,), those there now.

    Returns: bool (u,), True = kept; a subset of kept.

    Ties: the lower index is removed first.

    *Deviation*: the published code has no rule for ties.

    >>> structure_mask([3.0, 1.0, 1.0, 0.5], 2, np.array([False, True, True, True]))
    array([False,  True,  True, False])
    """
    score = _checks.array("score", score, "u")
    kept = _checks.mask("kept", kept, score, "score")
    _checks.integer("removed", removed, 0, len(score))
    order = np.argsort(np.where(kept, score, -np.inf), kind="stable")
    mask = kept.copy()
    mask[order[:removed]] = False
    return mask


def kept_structures(mask: Mask, structures: int) -> Mask:
    """Find the structures that are still there: those of which some column is read.

    Source: definition. Parameters: mask bool (out, in) of o or down; structures u, a divisor of in. Returns: bool (u,).

    *Deviation*: none.

    >>> kept_structures(np.array([[True, False, False, False]]), 2)
    array([ True, False])
    """
    mask = _mask("mask", mask, "out", "in")
    _divides("structures", structures, mask.shape[1], "columns of mask")
    runs: Mask = mask.any(axis=0).reshape(structures, -1)
    return np.asarray(runs.any(axis=1))


def coupled_mask(kept: Mask, shape: tuple[int, int], axis: int) -> Mask:
    """Mask the rows or columns of a projection that belong to structures.

    Source: definition. Parameters: kept bool (u,); shape (out, in) of the projection; axis, as in `AXES`: 0, the rows are the
    structures'; 1, the columns. Their number is a multiple of u. Returns: bool (out, in), True = kept.

    *Deviation*: none.

    >>> coupled_mask(np.array([True, False]), (2, 4), 1)
    array([[ True,  True, False, False],
           [ True,  True, False, False]])
    """
    lines = _lines(kept, tuple(_checks.integer("shape", size, 1) for size in shape), axis)
    return np.broadcast_to(lines[:, None] if axis == 0 else lines, shape).copy()


def cut(values: Array, kept: Mask, axis: int) -> Array:
    """Leave out the rows or columns of structures that are gone: a projection's weight, or, with axis 0, its bias.

    Source: definition. Parameters: values (out, in), or (out,); kept and axis as for `coupled_mask`. Returns: the smaller array.
    A block of smaller arrays computes what the masked block does.

    *Deviation*: none.

    >>> cut([[1, 2, 3, 4], [5, 6, 7, 8]], np.array([True, False]), 1)
    array([[1., 2.],
           [5., 6.]])
    """
    values = _checks.array("values", values, "...", "out")
    return np.compress(_lines(kept, values.shape, axis), values, axis=axis)


def _lines(kept: Mask, shape: tuple[int, ...], axis: int) -> Mask:
    """Repeat each structure's entry for the rows or columns that it has."""
    kept = _mask("kept", kept, "u")
    _checks.integer("axis", axis, 0, len(shape) - 1)
    _divides("kept", len(kept), shape[axis], f"entries along axis {axis}")
    return np.repeat(kept, shape[axis] // len(kept))


def _mask(name: str, value: Mask, *axes: str) -> Mask:
    mask = _checks.mask(name, value, np.asarray(value), name)
    if mask.ndim != len(axes) or not mask.size:
        raise ValueError(f"{name} has shape {mask.shape}; allowed: ({', '.join(axes)}), none of them 0")
    return mask


def _divides(name: str, structures: int, lines: int, of: str) -> None:
    _checks.integer("structures", structures, 1)
    if lines % structures:
        raise ValueError(f"{name} has {structures} structures for {lines} {of}; allowed: a divisor")
