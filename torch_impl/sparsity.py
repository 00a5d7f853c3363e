"""Allocate a model's sparsity to its blocks. Spec: reference/sparsity.py."""

from __future__ import annotations

import math

import torch

from torch_impl import _checks
from torch_impl._checks import SLACK
from torch_impl.bits import allocate_bits as allocate_bits
from torch_impl.masks.select import rest_sparsity


def allocate_sparsity(
    importance: torch.Tensor,
    target: float,
    spread: float,
    weights: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the sparsity (L,) of each block at the model's `target`: the fractional knapsack of LoSA, Eq. 5.

    importance, weights, floor: (L,). Returns float64. Ties: the lower index is pruned first. Errors: as in the spec.
    """
    importance = _checks.finite("importance", importance, "L")
    _checks.number("target", target, 0.0, 1.0)
    _checks.number("spread", spread, 0.0, 1.0)
    weights = torch.ones_like(importance) if weights is None else weights
    floor = torch.zeros_like(importance) if floor is None else floor
    w, floor = (values.to(importance.device) for values in _blocks(weights, floor, importance, "importance"))

    w = w / w.sum()
    lo = floor.clamp(min=max(target - spread, 0.0))
    if float(w @ lo) > target + SLACK:
        lo = floor
    if float(w @ lo) > target + SLACK:
        raise ValueError(f"floor has a mean of {float(w @ floor)}; allowed: at most target, {target}")
    room = w * (torch.maximum(lo, torch.full_like(lo, min(target + spread, 1.0))) - lo)

    # In order of importance, each block takes what is left of the budget, up to its own room.
    order = torch.sort(importance, stable=True).indices
    before = torch.cumsum(room[order], 0) - room[order]
    taken = torch.minimum((target - float(w @ lo) - before).clamp(min=0.0), room[order])
    rates = lo.clone()
    rates[order] += taken / w[order]
    return rates


def uniform_sparsity(target: float, weights: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Give every block the same sparsity, except those that are sparser already.

    weights: (L,), whole numbers. floor: (L,), the sparsity that each block has already. Returns float64 (L,).
    """
    _checks.number("target", target, 0.0, 1.0)
    w, floor = _blocks(weights, floor)
    return floor.clamp(min=rest_sparsity((floor * w).round(), w, target))


def middle_sparsity(target: float, weights: torch.Tensor, floor: torch.Tensor, first: int, last: int) -> float:
    """Return the sparsity of the blocks in the middle at which the model reaches `target` with both ends as they are.

    weights, floor: (L,). first, last: numbers of blocks that are not pruned. Errors: ValueError if the middle is too small.
    """
    s = _checks.number("target", target, 0.0, 1.0)
    w, floor = _blocks(weights, floor)
    _checks.integer("first", first, 0, len(w) - 1)
    _checks.integer("last", last, 0, len(w) - 1 - first)
    ends = torch.ones_like(w, dtype=torch.bool)
    ends[first : len(w) - last] = False
    room = float(w[~ends].sum())
    found = s + float(w[ends] @ (s - floor[ends])) / room
    if not -SLACK <= found <= 1 + SLACK:
        low = float(w[ends] @ floor[ends])
        total = float(w.sum())
        raise ValueError(f"target is {s}; allowed: {low / total:.6g} to {(low + room) / total:.6g} with these ends")
    return min(max(found, 0.0), 1.0)


def nearest_rates(wanted: torch.Tensor, target: float, weights: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """Shift wanted rates by the same amount, up to their bounds, so that the mean is the target. All (L,); returns float64."""
    wanted = _checks.finite("wanted", wanted, "L").double()
    _checks.number("target", target, 0.0, 1.0)
    w, floor = _blocks(weights, floor, wanted, "wanted")
    w = w / w.sum()
    if float(w @ floor) > target + SLACK:
        raise ValueError(f"floor has a mean of {float(w @ floor)}; allowed: at most target, {target}")

    def shifted(c: torch.Tensor) -> torch.Tensor:
        return torch.maximum(wanted + c, floor).clamp(max=1.0)

    # The mean is linear between the shifts at which a block meets a bound.
    shifts = torch.cat([floor - wanted, 1 - wanted]).sort().values
    means = shifted(shifts[:, None]) @ w
    after = int((means < target).sum().clamp(max=len(means) - 1))
    before = max(0, after - 1)
    rise = float(means[after] - means[before])
    part = min(1.0, max(0.0, (target - float(means[before])) / rise)) if rise > 0 else 0.0
    return shifted(shifts[before] + part * (shifts[after] - shifts[before]))


def even_moves(spread: float, blocks: int, m: int) -> int:
    """Count the weights of every m that a mixed N:M pattern may move between blocks: rint(δ·L·m / 2), as many as Eq. 5 moves."""
    _checks.number("spread", spread, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    _checks.integer("m", m, 1)
    return round(round(spread * blocks * m / 2, 9))


def allocate_kept(
    importance: torch.Tensor,
    kept_total: int,
    m: int,
    spread: int = 1,
    ceiling: torch.Tensor | None = None,
    moves: int | None = None,
) -> torch.Tensor:
    """Choose N (L,) int64 of each block's N:M, Σ N = kept_total: the knapsack of Eq. 5 in integers.

    moves: zeros above the even share that the blocks may have together; default: no limit.
    """
    importance = _checks.finite("importance", importance, "L")
    L = len(importance)
    _checks.integer("m", m, 1)
    _checks.integer("kept_total", kept_total, 0, L * m)
    _checks.integer("spread", spread, 0)
    top = torch.full((L,), m, device=importance.device) if ceiling is None else ceiling
    if not isinstance(top, torch.Tensor) or top.is_floating_point() or top.dtype == torch.bool:
        raise TypeError(f"ceiling has dtype {getattr(top, 'dtype', type(top).__name__)}; allowed: integers")
    _checks.same_shape("ceiling", top, importance, "importance")
    if int(top.min()) < 0 or int(top.max()) > m:
        raise ValueError(f"ceiling holds {int(top.min())} to {int(top.max())}; allowed: 0 to m, {m}")

    mean = kept_total / L
    most = top.long().clamp(max=math.floor(mean + spread + SLACK))
    least = most.clamp(max=max(0, math.ceil(mean - spread - SLACK)))
    if int(most.sum()) < kept_total:
        raise ValueError(f"kept_total is {kept_total}; allowed: at most {int(most.sum())} with this spread and ceiling")
    order = torch.sort(importance, stable=True).indices
    share = kept_total // L
    even = least if moves is None else least.clamp(min=share).minimum(most)
    room = (most - even)[order]
    before = torch.cumsum(room, 0) - room
    kept = most.clone()
    kept[order] -= torch.minimum((int(most.sum()) - kept_total - before).clamp(min=0), room)
    if moves is not None:
        _checks.integer("moves", moves, 0)
        left = max(0, moves - int((share - most).clamp(min=0).sum()))
        _move(kept, importance, order.tolist(), (least, most), share, left)
    return kept


def _move(
    kept: torch.Tensor,
    importance: torch.Tensor,
    order: list[int],
    bounds: tuple[torch.Tensor, torch.Tensor],
    share: int,
    moves: int,
) -> None:
    """Let the most important blocks take over weights of the least important ones, in place; order: by importance."""
    least, most = bounds
    for _ in range(moves):
        taker = next((block for block in order if least[block] < kept[block] <= share), None)
        giver = next((block for block in reversed(order) if kept[block] < most[block]), None)
        if taker is None or giver is None or not importance[giver] > importance[taker]:
            return
        kept[taker] -= 1
        kept[giver] += 1


def _blocks(
    weights: torch.Tensor, floor: torch.Tensor, like: torch.Tensor | None = None, like_name: str = "weights"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the prunable weights of the blocks (L,), above 0, and the sparsity that they have already (L,); return float64."""
    w, floor = _checks.finite("weights", weights, "L").double(), _checks.finite("floor", floor, "L").double()
    if like is not None:
        _checks.same_shape("weights", w, like, like_name)
    _checks.same_shape("floor", floor, w if like is None else like, like_name)
    if float(w.min()) <= 0:
        raise ValueError(f"weights holds {float(w.min())}; allowed: above 0")
    if float(floor.min()) < 0 or float(floor.max()) > 1:
        raise ValueError(f"floor holds {float(floor.min())} to {float(floor.max())}; allowed: 0 to 1")
    return w, floor
