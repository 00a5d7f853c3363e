"""How a model's sparsity is shared out among its blocks: the more important a block, the less sparse."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import _checks
from reference._checks import Array

# Budgets that differ by less than this, relative to the whole, are the same budget in other rounding.
SLACK = 1e-9


def allocate_sparsity(
    importance: Array,
    target: float,
    spread: float,
    weights: Array | None = None,
    floor: Array | None = None,
) -> Array:
    """Sparsity of every block that costs the least importance at a given sparsity of the whole model.

    Source: LoSA, Eq. 5.

        min_ρ Σ w_l I_l ρ_l   subject to   Σ w_l ρ_l / Σ w_l = s,   lo_l ≤ ρ_l ≤ hi_l
        lo = max(s − δ, floor, 0),   hi = max(lo, min(s + δ, 1))

    A linear program with one equality is a fractional knapsack: start every block at lo and spend the rest of the budget
    on the blocks in order of increasing importance. With weight w a unit of budget costs I whatever w is, so the order
    of I alone decides (and the β of `rmi.importance` drops out).

    Parameters: importance I (L,); target s in [0, 1]; spread δ ≥ 0; weights w (L,), prunable weights per block, more
    than 0, default equal; floor (L,), sparsity that each block has already, default 0. If the lower bounds alone exceed
    the budget, as they may in a model whose blocks came unevenly sparse, they fall back to the floor.

    Returns: ρ (L,). Ties of I: the lower index is pruned first.

    Errors: ValueError if the floor alone exceeds the target; ValueError or TypeError naming the argument.

    *Deviation*: the published code calls SLSQP from an infeasible start and returns rates off the optimum, and has no
    floor, so that its masks, which only grow, overshoot the target.

    >>> allocate_sparsity([0.9, 0.5, 0.7], target=0.5, spread=0.1)  # budget over lo = 0.4: 0.3; 0.2 to the second, 0.1 to the third
    array([0.4, 0.6, 0.5])
    """
    importance = _checks.array("importance", importance, "L")
    _checks.number("target", target, 0.0, 1.0)
    _checks.number("spread", spread, 0.0, 1.0)
    w = np.ones(len(importance)) if weights is None else _checks.array("weights", weights, "L")
    floor = np.zeros(len(importance)) if floor is None else _checks.array("floor", floor, "L")
    _checks.same_shape("weights", w, importance, "importance")
    _checks.same_shape("floor", floor, importance, "importance")
    if w.min() <= 0:
        raise ValueError(f"weights holds {w.min()}; allowed: more than 0")
    if floor.min() < 0 or floor.max() > 1:
        raise ValueError(f"floor holds {floor.min()} to {floor.max()}; allowed: 0 to 1")

    w = w / w.sum()
    lo = np.maximum(max(target - spread, 0.0), floor)
    if w @ lo > target + SLACK:
        lo = floor
    if w @ lo > target + SLACK:
        raise ValueError(f"floor has a mean of {w @ floor}; allowed: at most target, {target}")
    hi = np.maximum(lo, min(target + spread, 1.0))

    rates = lo.copy()
    for block in np.argsort(importance, kind="stable"):
        left = target - w @ rates
        rates[block] += min(hi[block] - lo[block], max(left, 0.0) / w[block])
    return rates


def allocate_kept(
    importance: Array, kept_total: int, m: int, spread: int = 1, ceiling: ArrayLike | None = None
) -> NDArray[np.int64]:
    """N of N:M for every block: the integer form of `allocate_sparsity`, for mixed N:M patterns.

    Source: LoSA, Section 4 (mixed 2:4), and Eq. 5 in integers.

        Σ N_l = kept_total,   |N_l − N̄| ≤ spread with N̄ = kept_total / L,   0 ≤ N_l ≤ min(m, ceiling_l)

    In zeros Z = m − N it is the same knapsack: start every block at its fewest zeros and prune one more of each group,
    up to its most, in order of increasing importance.

    Parameters: importance I (L,); kept_total from 0 to L·m; m; spread; ceiling (L,) integers, what each block keeps
    already, default m. A ceiling below N̄ − spread lowers that block's bound to it.

    Returns: N (L,) int64. Ties of I: the lower index is pruned first.

    Errors: ValueError if the ceilings sum to less than kept_total or the bounds leave no way to reach it; ValueError or
    TypeError naming the argument.

    *Deviation*: the paper names mixed N:M without a rule; this one is ours.

    >>> allocate_kept([0.9, 0.5, 0.7], kept_total=6, m=4)  # at most 3 each, 9 − 6 = 3 to give up: 2 by the second, 1 by the third
    array([3, 1, 2])
    """
    importance = _checks.array("importance", importance, "L")
    L = len(importance)
    _checks.integer("m", m, 1)
    _checks.integer("kept_total", kept_total, 0, L * m)
    _checks.integer("spread", spread, 0)
    top = np.full(L, m) if ceiling is None else np.asarray(ceiling)
    if not np.issubdtype(top.dtype, np.integer):
        raise TypeError(f"ceiling has dtype {top.dtype}; allowed: integers")
    _checks.same_shape("ceiling", top, importance, "importance")
    if top.min() < 0 or top.max() > m:
        raise ValueError(f"ceiling holds {top.min()} to {top.max()}; allowed: 0 to m, {m}")

    mean = kept_total / L
    most = np.minimum(math.floor(mean + spread + SLACK), top)
    least = np.minimum(max(0, math.ceil(mean - spread - SLACK)), most)
    if most.sum() < kept_total:
        raise ValueError(f"kept_total is {kept_total}; allowed with this spread and ceiling: at most {most.sum()}")

    kept = most.astype(np.int64)
    for block in np.argsort(importance, kind="stable"):
        kept[block] -= min(most[block] - least[block], kept.sum() - kept_total)
    return kept
