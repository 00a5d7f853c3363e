"""A low-rank adapter under its weight's mask: merging it fills no zero.

Legend: W (out × in) a projection's weight, zero where pruned, M = W ≠ 0 its mask, A (r × in) and B (out × r) the adapter,
s = α / r₀ its scale, the same at every rank, x (... × in) the input, y (... × out) the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reference import _checks
from reference._checks import Array, Mask


def effective_weight(weight: Array, A: Array, B: Array, scale: float) -> Array:
    """Combine a base weight and its adapter into one weight.

    Source: LoSA, Eq. 1.

        W̃ = M⊙(W + s·BA),   M = W ≠ 0

    Parameters: weight W (out, in); A (r, in), B (out, r), r may be 0; scale s. Returns: W̃ (out, in), exactly 0 wherever
    W is.

    *Deviation*: the mask is M = W ≠ 0. So a plain sparse checkpoint carries its own mask, and a kept weight that is
    exactly 0 counts as pruned.

    >>> effective_weight([[1, 0], [2, 3]], [[1, 1]], [[1], [2]], scale=0.5)  # BA = [[1, 1], [2, 2]]
    array([[1.5, 0. ],
           [3. , 4. ]])
    """
    W, A, B = _operands(weight, A, B, scale)
    return np.where(W != 0, W + scale * (B @ A), 0.0)


def merge(weight: Array, A: Array, B: Array, scale: float) -> Array:
    """Merge an adapter into its weight, rounding once to the weight's own precision. This weight is saved.

    Source: LoSA, Eq. 1.

    Parameters: as for `effective_weight`. Returns: (out, in) in the weight's floating dtype (float64 for integers).

    *Deviation*: the published code adds in half precision, so its merged and unmerged outputs differ.

    >>> merge(np.float32([[1, 0]]), [[1, 1]], [[1]], scale=0.5)
    array([[1.5, 0. ]], dtype=float32)
    """
    dtype = np.asarray(weight).dtype
    return effective_weight(weight, A, B, scale).astype(dtype if dtype.kind == "f" else np.float64)


def masked_lora(x: Array, weight: Array, A: Array, B: Array, scale: float) -> Array:
    """Compute the output of a projection with its adapter.

    Source: LoSA, Eq. 1.

        y = x W̃ᵀ

    Parameters: x (..., in); the others as for `effective_weight`. Returns: y (..., out).

    *Deviation*: no dropout on the adapter's input (published code: 0.1). With dropout, base and adapter cannot be one
    weight.

    >>> masked_lora([[1, 1]], [[1, 0], [2, 3]], [[1, 1]], [[1], [2]], scale=0.5)
    array([[1.5, 7. ]])
    """
    effective = effective_weight(weight, A, B, scale)
    return _input(x, effective) @ effective.T


def masked_lora_grad(
    x: Array, weight: Array, A: Array, B: Array, scale: float, grad_y: Array
) -> tuple[Array, Array, Array]:
    """Compute the gradients of a loss by the input and the adapter, given its gradient by the output.

    Source: LoSA, Eq. 1, differentiated.

        G = dyᵀ x,   dB = s (M⊙G) Aᵀ,   dA = s Bᵀ (M⊙G),   dx = dy W̃

    Parameters: x (..., in); grad_y dy (..., out); the others as for `effective_weight`. Returns: (dx (..., in),
    dA (r, in), dB (out, r)).

    *Deviation*: none.

    >>> dx, dA, dB = masked_lora_grad([[1, 2]], [[1, 0]], [[1, 1]], [[3]], 0.5, [[1]])  # G = [1 2], M⊙G = [1 0]
    >>> dx, dA, dB
    (array([[2.5, 0. ]]), array([[1.5, 0. ]]), array([[0.5]]))
    """
    W, A, B = _operands(weight, A, B, scale)
    x = _input(x, W)
    dy = _checks.array("grad_y", grad_y, "...", "out", empty=True, finite=False)
    if dy.shape != (*x.shape[:-1], len(W)):
        raise ValueError(f"grad_y has shape {dy.shape}; allowed: {(*x.shape[:-1], len(W))}")
    G = dy.reshape(-1, W.shape[0]).T @ x.reshape(-1, W.shape[1])
    masked = np.where(W != 0, G, 0.0)
    dB = scale * masked @ A.T
    dA = scale * B.T @ masked
    dx = dy @ effective_weight(W, A, B, scale)
    return dx, dA, dB


def initial_rows(count: int, in_features: int, seed: Sequence[int]) -> Array:
    """Sample the initial values of new rows of A; the same seed gives the same rows on every machine.

    Source: LoRA (arXiv 2106.09685), initialised as in its library: Kaiming uniform with a = √5.

        U(−1/√in, 1/√in)

    Parameters: count of rows; in_features; seed, integers ≥ 0; LoSA uses (run, step, block, projection).
    Returns: (count, in).

    *Deviation*: none in the distribution.

    >>> rows = initial_rows(2, 4, seed=(0, 1))
    >>> rows.shape, bool((abs(rows) <= 0.5).all())
    ((2, 4), True)
    """
    _checks.integer("count", count, 0)
    _checks.integer("in_features", in_features, 1)
    for part in seed:
        _checks.integer("seed", part, 0)
    bound = 1 / np.sqrt(in_features)
    return np.random.default_rng(list(seed)).uniform(-bound, bound, (count, in_features))


def rebase(weight: Array, merged: Array, updated: Array, mask: Mask) -> Array:
    """Return the base weight after pruning: merged with the unchanged adapter, it gives the pruned weight.

    Source: LoSA, Algorithm 1: pruning acts on the merged weight, and the adapter is kept.

        W' = M'⊙(W + (updated − merged))       so that W' + s·BA = updated under M'

    Parameters: weight W (out, in), the old base; merged (out, in), the weight before pruning; updated (out, in), the
    weight after it; mask M' bool (out, in), a subset of the old mask. Returns: W' (out, in). Kept weights that pruning
    did not update keep their bits.

    *Deviation*: the paper does not say what is pruned; the published code prunes the base without its adapter.

    >>> rebase([[1, 2]], [[1.5, 2.5]], [[0, 3.5]], np.array([[False, True]]))
    array([[0., 3.]])
    """
    W = _checks.array("weight", weight, "out", "in")
    merged = _checks.array("merged", merged, "out", "in")
    _checks.same_shape("merged", merged, W, "weight")
    updated = _checks.array("updated", updated, "out", "in")
    _checks.same_shape("updated", updated, W, "weight")
    mask = _checks.mask("mask", mask, W, "weight")
    return np.where(mask, W + (updated - merged), 0.0)


def _operands(weight: Array, A: Array, B: Array, scale: float) -> tuple[Array, Array, Array]:
    W = _checks.array("weight", weight, "out", "in")
    A, B = (
        _checks.array("A", A, "r", "in", empty=True, finite=False),
        _checks.array("B", B, "out", "r", empty=True, finite=False),
    )
    if A.shape[1] != W.shape[1]:
        raise ValueError(f"A has shape {A.shape}; allowed: (r, {W.shape[1]})")
    if B.shape != (len(W), len(A)):
        raise ValueError(f"B has shape {B.shape}; allowed: ({len(W)}, {len(A)})")
    _checks.number("scale", scale)
    return W, A, B


def _input(x: Array, weight: Array) -> Array:
    x = _checks.array("x", x, "...", "in", empty=True, finite=False)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {x.shape}; allowed: (..., {weight.shape[1]})")
    return x
