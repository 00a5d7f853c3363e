"""The schedules of LoSA's T steps: sparsity, mean rank, and how far one block may differ from the mean sparsity."""

from __future__ import annotations

import math

from reference import _checks


def cubic_sparsity(step: int, steps: int, final: float, initial: float = 0.0) -> float:
    """Return the model's sparsity after step t of T: it rises fast at first and slowly at the end.

    Source: LoSA, Eq. 8 (Zhu & Gupta 2017).

        s_t = s_f + (s_0 − s_f)(1 − t/T)³

    Parameters: step t, 1 to T; steps T; final s_f in [0, 1]; initial s_0 in [0, s_f], above 0 only if the model is
    already sparse. Returns: s_t in [s_0, s_f], exactly s_f at the last step.

    *Deviation*: none.

    >>> cubic_sparsity(1, 2, 0.5)  # half-way: 0.5 − 0.5 · ½³
    0.4375
    >>> cubic_sparsity(2, 2, 0.5)
    0.5
    """
    _checks.integer("steps", steps, 1)
    _checks.integer("step", step, 1, steps)
    _checks.number("final", final, 0.0, 1.0)
    _checks.number("initial", initial, 0.0, final)
    if step == steps:
        return float(final)
    return float(final + (initial - final) * (1 - step / steps) ** 3)


def mean_rank(step: int, initial: int = 6) -> int:
    """Return the mean rank of the adapters at step t: it grows by one each step.

    Source: LoSA, Eq. 9.

        r̄_t = r̄_1 + (t − 1)

    Parameters: step t from 1; initial r̄_1 from 1. Returns: r̄_t.

    *Deviation*: none.

    >>> [mean_rank(t) for t in (1, 2, 3, 4, 5)]
    [6, 7, 8, 9, 10]
    """
    _checks.integer("step", step, 1)
    _checks.integer("initial", initial, 1)
    return int(initial + step - 1)


def sparsity_spread(target: float) -> float:
    """Return δ, how far the sparsity of one block may be from the model's.

    Source: LoSA, Section 3.2 and its published code: 0.01 up to a target of 0.5, 0.02 up to 0.6, 0.03 up to 0.7.

    Parameters: target s_t in [0, 1]. Returns: δ_t. It grows just above each tenth (slack 1e-9 for rounding).

    *Deviation*: the published code leaves targets above 0.7 undefined; here δ keeps growing by 0.01 per 0.1.

    >>> [sparsity_spread(s) for s in (0.2, 0.5, 0.55, 0.6, 0.7, 0.75)]
    [0.01, 0.01, 0.02, 0.02, 0.03, 0.04]
    """
    _checks.number("target", target, 0.0, 1.0)
    tenths_above_half = math.ceil((target - 0.5) / 0.1 - 1e-9)
    return max(1, tenths_above_half + 1) / 100
