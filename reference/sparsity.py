"""Allocate a model's sparsity to its blocks: the more important a block, the less sparse it becomes.

Legend: L blocks.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference import _checks
from reference._checks import SLACK, Array
from reference.bits import allocate_bits as allocate_bits
from reference.masks.select import rest_sparsity


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

    Parameters: importance I (L,); target s in [0, 1]; spread δ in [0, 1]; weights w (L,), prunable weights per block,
    above 0, default equal; floor (L,), the sparsity each block already has, default 0. If the lower bounds alone exceed the
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
    weights = np.ones(len(importance)) if weights is None else weights
    floor = np.zeros(len(importance)) if floor is None else floor
    w, floor = _blocks(weights, floor, importance, "importance")

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
    w, floor = _blocks(weights, floor)
    return np.maximum(rest_sparsity(np.rint(floor * w), w, target), floor)


def middle_sparsity(target: float, weights: Array, floor: Array, first: int, last: int) -> float:
    """Choose the sparsity of the blocks in the middle so that the model reaches its target with both ends as they are.

    Source: ours (decision 73), after LLM-Pruner, Section 4.1, which leaves the first four and the last two of 32 blocks whole.

        s' = s + Σ_{ends} w_l (s − floor_l) / Σ_{middle} w_l      middle: first ≤ l < L − last; ends: all others

    Parameters: target s in [0, 1]; weights w (L,), prunable weights per block, above 0; floor (L,), the sparsity each block
    already has; first, last: numbers of blocks that are not pruned, together fewer than L. Returns: s', which is s without ends.

    Errors: ValueError if the middle has too few weights, or if the ends are already too sparse.

    *Deviation*: LLM-Pruner prunes dense models once, and its paper gives s' instead of s.

    >>> middle_sparsity(0.25, [1, 1, 1, 1], [0, 0, 0, 0], first=1, last=1)
    0.5
    """
    s = _checks.number("target", target, 0.0, 1.0)
    w, floor = _blocks(weights, floor)
    _checks.integer("first", first, 0, len(w) - 1)
    _checks.integer("last", last, 0, len(w) - 1 - first)
    ends = np.ones(len(w), dtype=bool)
    ends[first : len(w) - last] = False
    owed, room = w[ends] @ (s - floor[ends]), w[~ends].sum()
    found = s + owed / room
    if not -SLACK <= found <= 1 + SLACK:
        low, high = (w[ends] @ floor[ends] + part * room for part in (0, 1))
        raise ValueError(f"target is {s}; allowed: {low / w.sum():.6g} to {high / w.sum():.6g} with these ends")
    return min(max(float(found), 0.0), 1.0)


def nearest_rates(wanted: Array, target: float, weights: Array, floor: Array) -> Array:
    """Move wanted rates as little as needed, so that the model reaches its target and no block falls below its floor.

    Source: ours (decision 43), for rules that say what rate each block should have, such as OWL.

        min_ρ Σ w_l (ρ_l − wanted_l)²   subject to   Σ w_l ρ_l / Σ w_l = s,   floor_l ≤ ρ_l ≤ 1

    The optimum shifts all blocks by the same amount, up to their bounds: ρ_l = min(max(wanted_l + c, floor_l), 1). The mean
    grows with c, linearly between the shifts at which a block meets a bound. So c is found between two of them.

    Parameters: wanted (L,), any finite rates; target s in [0, 1]; weights w (L,), prunable weights per block, above 0;
    floor (L,), the sparsity each block already has. Returns: ρ (L,).

    Errors: ValueError if the floor alone exceeds the target.

    *Deviation*: OWL and ATP prune once, so they know no floor; OWL balances blocks without their sizes.

    >>> nearest_rates([0.2, 0.5, 0.8], 0.6, weights=[1, 1, 1], floor=[0.4, 0, 0])  # all + 0.1 would leave 0.3, below the floor
    array([0.4 , 0.55, 0.85])
    """
    wanted = _checks.array("wanted", wanted, "L")
    _checks.number("target", target, 0.0, 1.0)
    w, floor = _blocks(weights, floor, wanted, "wanted")
    w = w / w.sum()
    if w @ floor > target + SLACK:
        raise ValueError(f"floor has a mean of {w @ floor}; allowed: at most target, {target}")

    def shifted(c: float) -> Array:
        return np.minimum(np.maximum(wanted + c, floor), 1.0)

    shifts = np.sort(np.concatenate([floor - wanted, 1 - wanted]))
    means = np.array([w @ shifted(c) for c in shifts])
    return shifted(float(np.interp(target, means, shifts)))


def even_moves(spread: float, blocks: int, m: int) -> int:
    """Count the weights of every m that a mixed N:M pattern may move between blocks: as many as Eq. 5 moves.

    Source: ours (decision 44). Eq. 5 moves each block by up to δ, half of them up and half of them down, so that a share
    of δ / 2 of all weights changes its block. In an N:M pattern a block moves by 1 / m or not at all:

        moves = rint(δ · L · m / 2)

    Parameters: spread δ in [0, 1] of `schedule.sparsity_spread`; blocks L; m. Returns: moves ≥ 0. A half is rounded to an
    even number (slack 1e-9).

    *Deviation*: the paper does not say how far N may differ between blocks.

    >>> [even_moves(0.01, 32, 4), even_moves(0.04, 32, 8)]  # 2:4 is 50 % zeros and 2:8 is 75 %: 0.64 and 5.12
    [1, 5]
    """
    _checks.number("spread", spread, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    _checks.integer("m", m, 1)
    return int(np.rint(round(spread * blocks * m / 2, 9)))


def allocate_kept(
    importance: Array,
    kept_total: int,
    m: int,
    spread: int = 1,
    ceiling: ArrayLike | None = None,
    moves: int | None = None,
) -> NDArray[np.int64]:
    """Choose N of N:M for each block: the integer form of `allocate_sparsity`, for mixed N:M patterns.

    Source: LoSA, Section 4 (mixed 2:4), and Eq. 5 in integers.

        Σ N_l = kept_total,   |N_l − N̄| ≤ spread with N̄ = kept_total / L,   0 ≤ N_l ≤ min(m, ceiling_l)

    In zeros Z = m − N this is the same knapsack. Start each block at its fewest zeros. Then raise the blocks to their
    most zeros, in order of increasing importance, until the budget is spent.

    With `moves`, in addition Σ max(0, Z_l − ⌈Z̄⌉) ≤ moves, or as many as the ceiling forces. Raise the blocks to ⌈Z̄⌉ zeros
    first. Then, `moves` times, move one zero from the most important block that has one to give to the least important one
    that can take it, if that one is less important. So blocks of equal importance stay equal.

    Parameters: importance I (L,); kept_total from 0 to L·m; m; spread; ceiling (L,) integers, the N each block has now,
    default m; moves ≥ 0, default: no limit. A ceiling below N̄ − spread is also that block's lower bound.

    Returns: N (L,) int64. Ties of I: the lower index is pruned first.

    Errors: ValueError if ceiling and spread do not allow kept_total.

    *Deviation*: the paper uses mixed N:M but gives no rule; this rule is ours.

    >>> allocate_kept([0.9, 0.5, 0.7], kept_total=6, m=4)  # 3 each is 9, so 3 must go: second gives 2, third gives 1
    array([3, 1, 2])
    >>> allocate_kept([0.9, 0.5, 0.7, 0.8], kept_total=8, m=4), allocate_kept([0.9, 0.5, 0.7, 0.8], 8, 4, moves=1)
    (array([3, 1, 1, 3]), array([3, 1, 2, 2]))
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
    order = np.argsort(importance, kind="stable")
    # ⌈Z̄⌉ zeros leave ⌊N̄⌋.
    even = least if moves is None else np.minimum(np.maximum(least, kept_total // L), most)
    for block in order:
        kept[block] -= min(most[block] - even[block], kept.sum() - kept_total)
    forced = np.maximum(0, kept_total // L - most).sum()
    for _ in range(0 if moves is None else max(0, _checks.integer("moves", moves, 0) - forced)):
        takers = [block for block in order if least[block] < kept[block] <= kept_total // L]
        givers = [block for block in order[::-1] if kept[block] < most[block]]
        if not takers or not givers or importance[givers[0]] <= importance[takers[0]]:
            break
        kept[takers[0]] -= 1
        kept[givers[0]] += 1
    return kept


def _blocks(weights: Array, floor: Array, like: Array | None = None, like_name: str = "weights") -> tuple[Array, Array]:
    """Check the prunable weights of the blocks (L,), above 0, and the sparsity that they have already (L,), from 0 to 1."""
    w, floor = _checks.array("weights", weights, "L"), _checks.array("floor", floor, "L")
    if like is not None:
        _checks.same_shape("weights", w, like, like_name)
    _checks.same_shape("floor", floor, w if like is None else like, like_name)
    if w.min() <= 0:
        raise ValueError(f"weights holds {w.min()}; allowed: above 0")
    if floor.min() < 0 or floor.max() > 1:
        raise ValueError(f"floor holds {floor.min()} to {floor.max()}; allowed: 0 to 1")
    return w, floor
