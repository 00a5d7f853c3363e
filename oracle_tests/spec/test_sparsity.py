"""Allocations against SciPy's linear programming and against every integer solution there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import example, given
from scipy.optimize import linprog

from oracle_tests import strategies
from reference.schedule import cubic_sparsity, sparsity_spread
from reference.sparsity import allocate_kept, allocate_sparsity


def bounds(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, lo, hi as METHOD has them."""
    L, target, spread = len(case["importance"]), case["target"], case["spread"]
    w = np.ones(L) if case["weights"] is None else case["weights"]
    floor = np.zeros(L) if case["floor"] is None else case["floor"]
    lo = np.array([max(target - spread, f, 0.0) for f in floor])
    if (w * lo).sum() / w.sum() > target + 1e-9:
        lo = floor
    return w / w.sum(), lo, np.array([max(low, min(target + spread, 1.0)) for low in lo])


@given(strategies.allocations())
@example({"importance": np.array([1e-40, 2e-40, 3e-40]), "target": 0.5, "spread": 0.01, "weights": None, "floor": None})
def test_sparsity_is_the_linear_program_s_optimum(case: dict[str, Any]) -> None:
    rates = allocate_sparsity(**case)
    w, lo, hi = bounds(case)
    assert abs(w @ rates - case["target"]) <= 1e-9
    assert (rates >= lo - 1e-12).all()
    assert (rates <= hi + 1e-12).all()
    cost = w * case["importance"]
    cost = cost / max(cost.max(), 1e-300)
    # linprog is given a budget that its own tolerance can meet.
    budget = np.clip(case["target"], w @ lo, w @ hi)
    solved = linprog(cost, A_eq=w[None] * len(w), b_eq=[budget * len(w)], bounds=list(zip(lo, hi, strict=True)))
    assert solved.status == 0, solved.message
    assert cost @ rates <= solved.fun + 1e-6


def test_rates_only_grow_along_the_schedule() -> None:
    rng, floor = np.random.default_rng(0), np.zeros(32)
    for step in range(1, 9):
        target = cubic_sparsity(step, 8, 0.8)
        rates = allocate_sparsity(rng.random(32), target, sparsity_spread(target), floor=floor)
        assert (rates >= floor - 1e-12).all()
        assert abs(rates.mean() - target) <= 1e-9
        floor = rates


@given(strategies.kept_allocations().filter(lambda case: len(case["importance"]) <= 5))
def test_kept_is_the_best_of_all_integer_solutions(case: dict[str, Any]) -> None:
    kept = allocate_kept(**case)
    importance, L, m = case["importance"], len(case["importance"]), case["m"]
    top = np.full(L, m) if case["ceiling"] is None else case["ceiling"]
    mean = case["kept_total"] / L
    feasible = [
        np.array(candidate)
        for candidate in itertools.product(range(m + 1), repeat=L)
        if sum(candidate) == case["kept_total"]
        and all(n <= t and abs(n - mean) <= case["spread"] for n, t in zip(candidate, top, strict=True))
    ]
    assert feasible
    assert any((kept == candidate).all() for candidate in feasible)
    best = max(importance @ candidate for candidate in feasible)
    assert importance @ kept >= best - 1e-12


def test_ties_are_pruned_in_order() -> None:
    np.testing.assert_allclose(allocate_sparsity(np.ones(4), 0.5, 0.1), [0.6, 0.6, 0.4, 0.4])
    np.testing.assert_array_equal(allocate_kept(np.ones(4), 8, 4), [1, 1, 3, 3])


def test_uneven_floors_fall_back_to_themselves() -> None:
    rates = allocate_sparsity([1.0, 2.0, 3.0], 0.35, 0.01, floor=[0.0, 0.0, 0.9])
    np.testing.assert_allclose(rates, [0.15, 0.0, 0.9])
