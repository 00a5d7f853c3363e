"""Allocate a model's sparsity to its blocks: the more important a block, the less sparse it becomes.

Legend: L blocks.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import _checks
from reference._checks import Array
from reference.masks.select import rest_sparsity

# Relative slack for rounding when two budgets are compared.
SLACK = 1e-9


def allocate_sparsity(
    importance: Array,
    target: float,
    spread: float,
    weights: Array | None = None,
    floor: Array | None = None,
) -> Array:
    """Choose the sparsity of each block so that the model reaches its target and loses the least importance.

    Source: LoSA, Eq. 5.

        min_ρ Σ w_l I_l ρ_l   subject to   Σ w_l ρ_l / Σ w_l = s,   lo_l ≤ ρ_l ≤ hi_l
        lo = max(s − δ, floor, 0),   hi = max(lo, min(s + δ, 1))

    This linear program has one equality, so it is a fractional knapsack. Start each block at lo. Spend the rest of the
    budget on the blocks in order of increasing importance. A unit of budget costs I, whatever w is. So only the order of
    I matters, and the β of `rmi.importance` has no effect.

    Parameters: importance I (L,); target s in [0, 1]; spread δ ≥ 0; weights w (L,), prunable weights per block, above 0,
    default equal; floor (L,), the sparsity each block already has, default 0. If the lower bounds alone exceed the
    budget, lo is the floor. This happens when the blocks of the given model are unevenly sparse.

    Returns: ρ (L,). Ties of I: the lower index is pruned first.

    Errors: ValueError if the floor alone exceeds the target.

    *Deviation*: the published code calls SLSQP from an infeasible start and returns rates off the optimum. It has no
    floor, so it overshoots the target: zeros are never taken back.

    >>> allocate_sparsity([0.9, 0.5, 0.7], target=0.5, spread=0.1)  # budget above lo = 0.4: 0.3; second takes 0.2, third 0.1
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
        raise ValueError(f"weights holds {w.min()}; allowed: above 0")
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


def uniform_sparsity(target: float, weights: Array, floor: Array) -> Array:
    """Give every block the same sparsity, except those that are sparser already.

    Source: the usual baseline; ours for blocks that are sparser already (decision 31).

        ρ_l = max(ρ', floor_l),   ρ' = `select.rest_sparsity` of the blocks

    Parameters: target s in [0, 1]; weights w (L,), whole numbers, prunable weights per block, above 0; floor (L,), the
    sparsity that each block has already. Returns: ρ (L,).

    *Deviation*: the published code prunes every block at s, so that a model that is unevenly sparse ends above s.

    >>> uniform_sparsity(0.5, np.array([100.0, 100.0]), np.array([0.75, 0.0]))  # of 100 zeros, 75 are there
    array([0.75, 0.25])
    """
    _checks.number("target", target, 0.0, 1.0)
    w = _checks.array("weights", weights, "L")
    floor = _checks.array("floor", floor, "L")
    _checks.same_shape("floor", floor, w, "weights")
    if floor.min() < 0 or floor.max() > 1:
        raise ValueError(f"floor holds {floor.min()} to {floor.max()}; allowed: 0 to 1")
    return np.maximum(rest_sparsity(np.rint(floor * w), w, target), floor)


def allocate_kept(
    importance: Array, kept_total: int, m: int, spread: int = 1, ceiling: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Choose N of N:M for each block: the integer form of `allocate_sparsity`, for mixed N:M patterns.

    Source: LoSA, Section 4 (mixed 2:4), and Eq. 5 in integers.

        Σ N_l = kept_total,   |N_l − N̄| ≤ spread with N̄ = kept_total / L,   0 ≤ N_l ≤ min(m, ceiling_l)

    In zeros Z = m − N this is the same knapsack. Start each block at its fewest zeros. Then raise the blocks to their
    most zeros, in order of increasing importance, until the budget is spent.

    Parameters: importance I (L,); kept_total from 0 to L·m; m; spread; ceiling (L,) integers, the N each block has now,
    default m. A ceiling below N̄ − spread is also that block's lower bound.

    Returns: N (L,) int64. Ties of I: the lower index is pruned first.

    Errors: ValueError if ceiling and spread do not allow kept_total.

    *Deviation*: the paper uses mixed N:M but gives no rule; this rule is ours.

    >>> allocate_kept([0.9, 0.5, 0.7], kept_total=6, m=4)  # 3 each is 9, so 3 must go: second gives 2, third gives 1
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
        raise ValueError(f"kept_total is {kept_total}; allowed: at most {most.sum()} with this spread and ceiling")

    kept = most.astype(np.int64)
    for block in np.argsort(importance, kind="stable"):
        kept[block] -= min(most[block] - least[block], kept.sum() - kept_total)
    return kept
