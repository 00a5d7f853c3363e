"""The schedules of LoSA's T steps. Spec: reference/schedule.py."""

from __future__ import annotations

import math

from torch_impl import _checks


def cubic_sparsity(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return s_t of LoSA, Eq. 8: the model's sparsity after `step` of `steps`."""
    _checks.integer("steps", steps, 1)
    _checks.integer("step", step, 1, steps)
    _checks.number("final", final, 0.0, 1.0)
    _checks.number("initial", initial, 0.0, final)
    if step == steps:
        return float(final)
    return float(final + (initial - final) * (1 - step / steps) ** 3)


def mean_rank(step: int, initial: int = 6) -> int:
    """Return r̄_t of LoSA, Eq. 9: the mean rank at `step`."""
    _checks.integer("step", step, 1)
    _checks.integer("initial", initial, 1)
    return int(initial + step - 1)


def sparsity_spread(target: float) -> float:
    """Return δ_t of LoSA, Section 3.2: how far a block's sparsity may be from the target."""
    _checks.number("target", target, 0.0, 1.0)
    tenths_above_half = math.ceil((target - 0.5) / 0.1 - 1e-9)
    return max(1, tenths_above_half + 1) / 100
