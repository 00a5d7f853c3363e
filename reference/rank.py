"""Measure the error that pruning causes in each block, allocate ranks by it, and change an adapter's rank.

Legend: L blocks, D and S (tokens × hidden) the output of one block in the dense and in the pruned model, A (r × in) and
B (out × r) one adapter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array


def reconstruction_error(dense: Array, sparse: Array) -> float:
    """Measure how far a pruned block's output is from the dense block's; each runs on its own model's hidden states.

    Source: LoSA, Eq. 6.

        e = mean over channels c of  Σ_tok (D − S)²_{tok,c} / Σ_tok D²_{tok,c}

    Parameters: dense D, sparse S (tokens, hidden). Returns: e ≥ 0, without unit. A channel that is 0 for all tokens of D
    counts 0 if it is 0 in S too, and 1 otherwise.

    *Deviation*: the paper does not define e for a channel that is always 0.

    >>> reconstruction_error([[1, 2], [1, 2]], [[1, 0], [0, 0]])  # channels: 1/2 and 8/8
    0.75
    """
    D, S = _checks.array("dense", dense, "tokens", "hidden"), _checks.array("sparse", sparse, "tokens", "hidden")
    _checks.same_shape("sparse", S, D, "dense")
    difference = ((D - S) ** 2).sum(axis=0)
    energy = (D**2).sum(axis=0)
    silent = energy == 0
    ratio = np.where(silent, difference > 0, difference / np.where(silent, 1.0, energy))
    return float(ratio.mean())


def allocate_ranks(errors: Array, mean_rank: float, min_rank: int = 1, max_rank: int = 16) -> NDArray[np.int64]:
    """Allocate ranks in proportion to the errors, within bounds and with exactly the given mean.

    Source: LoSA, Eq. 7.

        r_l = clip(rint(e_l / Σ e · L · r̄), r_min, r_max), then repaired until Σ r = rint(L · r̄):
        too many: −1 each in order of increasing error, where r > r_min;  too few: +1 each in order of decreasing error,
        where r < r_max; repeat

    Parameters: errors e (L,) ≥ 0; mean_rank r̄; min_rank; max_rank. Returns: r (L,) int64.

    Ties and rounding: rint rounds a half to the even number (slack 1e-9 for the rounding of the shares). Among blocks of
    equal error, the repair takes the lower index first. If all errors are 0, all shares are 1/L.

    Errors: ValueError if r̄ is not within [r_min, r_max].

    *Deviation*: the published code makes one repair pass and misses the sum in 20 % of random cases. It builds adapters
    of 8 ranks, so every rank above 8 is silently 8.

    >>> allocate_ranks([0.1, 0.2, 0.7], mean_rank=4)  # shares of 12: 1.2, 2.4, 8.4 -> 1, 2, 8; one is missing
    array([1, 2, 9])
    """
    errors = _checks.array("errors", errors, "L")
    if errors.min() < 0:
        raise ValueError(f"errors holds {errors.min()}; allowed: 0 or more")
    _checks.integer("min_rank", min_rank, 0)
    _checks.integer("max_rank", max_rank, min_rank)
    _checks.number("mean_rank", mean_rank, min_rank, max_rank)
    L = len(errors)
    total = int(np.rint(L * mean_rank))
    peak = errors.max()
    # Divide by the largest error first, so that the sum of large errors does not overflow.
    shares = (errors / peak) / (errors / peak).sum() if peak > 0 else np.full(L, 1 / L)
    ranks = np.clip(np.rint(np.round(shares * L * mean_rank, 9)), min_rank, max_rank).astype(np.int64)

    least_hurt_first = np.argsort(errors, kind="stable")
    most_hurt_first = np.argsort(-errors, kind="stable")
    while ranks.sum() > total:
        for block in least_hurt_first:
            if ranks.sum() > total and ranks[block] > min_rank:
                ranks[block] -= 1
    while ranks.sum() < total:
        for block in most_hurt_first:
            if ranks.sum() < total and ranks[block] < max_rank:
                ranks[block] += 1
    return ranks


def resize_adapter(A: Array, B: Array, rank: int, new_rows: Array | None = None) -> tuple[Array, Array]:
    """Change the rank of an adapter: growing leaves its output unchanged, shrinking drops the last ranks.

    Source: LoSA, Section 3.3.

        up:    A' = [A; new rows],  B' = [B, 0]        so B'A' = BA
        down:  A' = first rows of A,  B' = first columns of B

    Parameters: A (r, in); B (out, r), r may be 0; rank, the new rank, 0 or more; new_rows (at least rank − r, in), the
    initial values of the rows to add (`adapter.initial_rows`), needed only to grow. Returns: A' (rank, in),
    B' (out, rank).

    *Deviation*: none. `fold_adapter` shrinks without loss.

    >>> A, B = resize_adapter([[1, 2]], [[3]], 2, new_rows=[[5, 6]])
    >>> A, B
    (array([[1., 2.],
           [5., 6.]]), array([[3., 0.]]))
    >>> resize_adapter(A, B, 1)
    (array([[1., 2.]]), array([[3.]]))
    """
    A, B = _adapter(A, B)
    _checks.integer("rank", rank, 0)
    r = len(A)
    if rank <= r:
        return A[:rank].copy(), B[:, :rank].copy()
    if new_rows is None:
        raise ValueError(f"new_rows is None; growing from rank {r} to {rank} needs {rank - r} or more rows")
    rows = _checks.array("new_rows", new_rows, "rows", "in")
    if len(rows) < rank - r or rows.shape[1] != A.shape[1]:
        raise ValueError(f"new_rows has shape {rows.shape}; allowed: ({rank - r} or more, {A.shape[1]})")
    return np.vstack([A, rows[: rank - r]]), np.hstack([B, np.zeros((len(B), rank - r))])


def fold_adapter(weight: Array, A: Array, B: Array, rank: int, scale: float) -> Array:
    """Fold the ranks an adapter is about to lose into its weight, so that shrinking leaves the output unchanged.

    Source: ours.

        W' = W + M⊙(s · B[:, rank:] A[rank:]),   M = W ≠ 0

    Parameters: weight W (out, in); A (r, in); B (out, r); rank, the rank to shrink to, at most r; scale s.
    Returns: W' (out, in), zero where W is.

    *Deviation*: the paper drops the lost ranks.

    >>> fold_adapter([[1, 0]], [[1, 1], [2, 2]], [[1, 3]], 1, scale=0.5)  # adds 0.5 · 3 · 2 where W is not 0
    array([[4., 0.]])
    """
    weight = _checks.array("weight", weight, "out", "in")
    A, B = _adapter(A, B)
    if (len(B), A.shape[1]) != weight.shape:
        raise ValueError(f"weight has shape {weight.shape}; allowed: ({len(B)}, {A.shape[1]}), the shape of B A")
    _checks.integer("rank", rank, 0, len(A))
    _checks.number("scale", scale)
    return np.where(weight != 0, weight + scale * (B[:, rank:] @ A[rank:]), 0.0)


def _adapter(A: Array, B: Array) -> tuple[Array, Array]:
    """Check that A and B have the same rank, which may be 0; return them in float64."""
    A, B = (
        _checks.array("A", A, "r", "in", empty=True, finite=False),
        _checks.array("B", B, "out", "r", empty=True, finite=False),
    )
    if len(A) != B.shape[1]:
        raise ValueError(f"B has shape {B.shape}; allowed: (out, {len(A)}), the rank of A")
    return A, B
