"""Allocate a model's sparsity to its blocks. Spec: reference/sparsity.py."""

from __future__ import annotations

import math

import torch

from torch_impl import _checks
from torch_impl.masks.select import rest_sparsity

SLACK = 1e-9


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
    ones = torch.ones_like(importance, dtype=torch.float64)
    w = ones if weights is None else _checks.finite("weights", weights, "L").to(ones)
    floor = torch.zeros_like(ones) if floor is None else _checks.finite("floor", floor, "L").to(ones)
    _checks.same_shape("weights", w, importance, "importance")
    _checks.same_shape("floor", floor, importance, "importance")
    if float(w.min()) <= 0:
        raise ValueError(f"weights holds {float(w.min())}; allowed: above 0")
    if float(floor.min()) < 0 or float(floor.max()) > 1:
        raise ValueError(f"floor holds {float(floor.min())} to {float(floor.max())}; allowed: 0 to 1")

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
    w = _checks.finite("weights", weights, "L").double()
    floor = _checks.finite("floor", floor, "L").double()
    _checks.same_shape("floor", floor, w, "weights")
    if float(floor.min()) < 0 or float(floor.max()) > 1:
        raise ValueError(f"floor holds {float(floor.min())} to {float(floor.max())}; allowed: 0 to 1")
    return floor.clamp(min=rest_sparsity((floor * w).round(), w, target))


def allocate_kept(
    importance: torch.Tensor, kept_total: int, m: int, spread: int = 1, ceiling: torch.Tensor | None = None
) -> torch.Tensor:
    """Choose N (L,) int64 of each block's N:M, Σ N = kept_total: the knapsack of Eq. 5 in integers."""
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
    room = (most - least)[order]
    before = torch.cumsum(room, 0) - room
    kept = most.clone()
    kept[order] -= torch.minimum((int(most.sum()) - kept_total - before).clamp(min=0), room)
    return kept
