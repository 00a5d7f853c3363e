"""How sparsity and ranks grow over the T steps of LoSA."""

from __future__ import annotations

import math

from torch_impl import _checks


def cubic_sparsity(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """s_t of LoSA, Eq. 8: share of zeros of the whole model after `step` of `steps`. See reference/schedule.py."""
    _checks.integer("steps", steps, 1)
    _checks.integer("step", step, 1, steps)
    _checks.number("final", final, 0.0, 1.0)
    _checks.number("initial", initial, 0.0, final)
    if step == steps:
        return float(final)
    return float(final + (initial - final) * (1 - step / steps) ** 3)


def mean_rank(step: int, initial: int = 6) -> int:
    """r̄_t of LoSA, Eq. 9: mean rank at `step`. See reference/schedule.py."""
    _checks.integer("step", step, 1)
    _checks.integer("initial", initial, 1)
    return int(initial + step - 1)


def sparsity_spread(target: float) -> float:
    """δ_t of LoSA, Section 3.2: how far a block may be from the target. See reference/schedule.py."""
    _checks.number("target", target, 0.0, 1.0)
    tenths_above_half = math.ceil((target - 0.5) / 0.1 - 1e-9)
    return max(1, tenths_above_half + 1) / 100
