"""Allocations against SciPy's linear programming and against every integer solution there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


@st.composite
def small_kept_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Any arguments of allocate_kept for few blocks, with or without a solution; importances are small integers, so that
    costs are exact and some are equal."""
    L, m = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4, 5]))
    ceilings = st.lists(st.integers(0, m), min_size=L, max_size=L).map(np.array)
    return {
        "importance": np.array(draw(st.lists(st.integers(1, 4), min_size=L, max_size=L)), dtype=float),
        "kept_total": draw(st.integers(0, L * m)),
        "m": m,
        "spread": draw(st.integers(0, 3)),
        "ceiling": draw(st.one_of(st.none(), ceilings)),
    }


def kept_solutions(
    importance: np.ndarray, kept_total: int, m: int, spread: int, ceiling: np.ndarray | None
) -> list[tuple[int, ...]]:
    """Every N within its bounds and with the right sum, in integers throughout: L·N against L·N̄ = kept_total."""
    L = len(importance)
    tops = [m] * L if ceiling is None else ceiling.tolist()
    choices = [
        [
            n
            for n in range(top + 1)
            if L * n <= kept_total + L * spread and (L * n >= kept_total - L * spread or n == top)
        ]
        for top in tops
    ]
    return [kept for kept in itertools.product(*choices) if sum(kept) == kept_total]


@settings(max_examples=strategies.examples(600))
@given(small_kept_cases())
# N̄ = 7/3 with spread 1: 2 or 3 each.
@example({"importance": np.array([3.0, 1, 2]), "kept_total": 7, "m": 4, "spread": 1, "ceiling": None})
# A block that keeps only 1 has to stay below N̄ − spread; the others take what it cannot.
@example({"importance": np.array([3.0, 1, 2]), "kept_total": 9, "m": 5, "spread": 1, "ceiling": np.array([1, 5, 5])})
# No whole number is within 0 of N̄ = 1/2.
@example({"importance": np.array([1.0, 2]), "kept_total": 1, "m": 2, "spread": 0, "ceiling": None})
def test_kept_is_the_best_of_all_integer_solutions(case: dict[str, Any]) -> None:
    """The most importance kept; among equals, the first in dictionary order, as lower indices are pruned first. Refused
    if and only if there is none."""
    solutions = kept_solutions(**case)
    if not solutions:
        with pytest.raises(ValueError, match=r"kept_total is \d+; allowed: at most \d+ with this spread and ceiling"):
            allocate_kept(**case)
        return
    best = min(solutions, key=lambda kept: (-(case["importance"] @ kept), kept))
    np.testing.assert_array_equal(allocate_kept(**case), best)


@given(strategies.kept_allocations())
def test_kept_keeps_its_bounds_and_sum(case: dict[str, Any]) -> None:
    kept, mean = allocate_kept(**case), case["kept_total"] / len(case["importance"])
    top = np.full(len(kept), case["m"]) if case["ceiling"] is None else case["ceiling"]
    assert kept.sum() == case["kept_total"]
    assert (kept <= np.minimum(top, mean + case["spread"] + 1e-9)).all()
    assert (kept >= np.minimum(top, mean - case["spread"] - 1e-9)).all()


@pytest.mark.parametrize(
    ("kept_total", "ceiling", "message"),
    [
        (9, [2, 3, 3], "kept_total is 9; allowed: at most 8 with this spread and ceiling"),
        (10, None, "kept_total is 10; allowed: at most 9 with this spread and ceiling"),
        (11, None, "kept_total is 11; allowed: at most 9 with this spread and ceiling"),
    ],
)
def test_kept_that_cannot_be_reached_is_refused(kept_total: int, ceiling: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_kept([0.2, 0.3, 0.5], kept_total, 4, spread=0, ceiling=ceiling)


def test_ties_are_pruned_in_order() -> None:
    np.testing.assert_allclose(allocate_sparsity(np.ones(4), 0.5, 0.1), [0.6, 0.6, 0.4, 0.4])
    np.testing.assert_array_equal(allocate_kept(np.ones(4), 8, 4), [1, 1, 3, 3])


def test_uneven_floors_fall_back_to_themselves() -> None:
    rates = allocate_sparsity([1.0, 2.0, 3.0], 0.35, 0.01, floor=[0.0, 0.0, 0.9])
    np.testing.assert_allclose(rates, [0.15, 0.0, 0.9])
