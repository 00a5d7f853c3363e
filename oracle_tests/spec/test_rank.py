"""Ranks against a literal simulation and against every rank vector there is; errors and resizing by properties."""

from __future__ import annotations

import itertools
from collections import deque
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracle_tests import strategies
from reference.adapter import effective_weight
from reference.rank import allocate_ranks, fold_adapter, reconstruction_error, resize_adapter


@given(strategies.rank_cases())
@example({"errors": np.array([1.0, 0, 0, 0]), "mean_rank": 6, "min_rank": 1, "max_rank": 16})
def test_ranks_keep_bounds_and_sum(case: dict[str, Any]) -> None:
    ranks, errors = allocate_ranks(**case), case["errors"]
    assert ranks.sum() == np.rint(len(errors) * case["mean_rank"])
    assert ranks.min() >= case["min_rank"]
    assert ranks.max() <= case["max_rank"]
    # Worse hurt, at most one rank less: the repair may stop between two blocks that rounding made equal.
    order = np.argsort(errors, kind="stable")
    assert (np.diff(ranks[order]) >= -1).all()


def test_repair_goes_round_by_round_from_the_right_end() -> None:
    """Too few: the worst hurt first; all others are at their share."""
    np.testing.assert_array_equal(allocate_ranks([1, 2, 3, 94], 4, max_rank=8), [2, 3, 3, 8])
    # There: clip(rint(16·share)) = 1, 1, 1, 8, so 5 are missing; the last is full, so rounds go third, second, first.
    np.testing.assert_array_equal(allocate_ranks([0, 0, 0, 0], 3), [3, 3, 3, 3])
    # shares 0, 0, 4, 4 -> 1, 1, 4, 4: two too many; the first two cannot give, so the others do, the third first.
    np.testing.assert_array_equal(allocate_ranks([0, 0, 1, 1], 2, min_rank=1), [1, 1, 3, 3])


@st.composite
def exact_rank_cases(draw: st.DrawFn, blocks: int = 12, top: int = 20) -> dict[str, Any]:
    """Errors that are fractions, so that shares can be computed without rounding: many ties, many shares of a half."""
    errors = draw(st.lists(st.integers(0, draw(st.sampled_from([1, 5, 100]))), min_size=1, max_size=blocks))
    unit = draw(st.sampled_from([Fraction(1), Fraction(1, 10), Fraction(1, 3), Fraction(10**9)]))
    min_rank = draw(st.integers(0, 3))
    max_rank = draw(st.integers(min_rank, top))
    halves = draw(st.integers(2 * min_rank, 2 * max_rank))
    return {
        "errors": [unit * error for error in errors],
        "mean_rank": Fraction(halves, 2),
        "min_rank": min_rank,
        "max_rank": max_rank,
    }


def clipped_shares(errors: list[Fraction], mean_rank: Fraction, min_rank: int, max_rank: int) -> list[int]:
    """clip(rint(e_l / Σe · L · r̄)) in exact fractions; Python rounds those half to even."""
    total = sum(errors)
    shares = [error / total if total else Fraction(1, len(errors)) for error in errors]
    return [min(max(round(share * len(errors) * mean_rank), min_rank), max_rank) for share in shares]


def simulated(errors: list[Fraction], mean_rank: Fraction, min_rank: int, max_rank: int) -> list[int]:
    """The repair one rank at a time: the block at the head of a queue takes or gives one and goes to its end."""
    ranks = clipped_shares(errors, mean_rank, min_rank, max_rank)
    missing = round(len(errors) * mean_rank) - sum(ranks)
    step = 1 if missing > 0 else -1
    queue = deque(sorted(range(len(errors)), key=lambda block: (-step * errors[block], block)))
    while missing:
        block = queue.popleft()
        if ranks[block] != (max_rank if step > 0 else min_rank):
            ranks[block] += step
            missing -= step
            queue.append(block)
    return ranks


def in_floats(case: dict[str, Any]) -> dict[str, Any]:
    """The same case for the spec."""
    return {**case, "errors": np.array([float(e) for e in case["errors"]]), "mean_rank": float(case["mean_rank"])}


@settings(max_examples=strategies.examples(400))
@given(exact_rank_cases())
@example(
    {
        "errors": [Fraction(e) for e in (3, 2, 1, 5, 0, 1, 5, 5, 0, 1, 0, 1, 2)],
        "mean_rank": Fraction(3),
        "min_rank": 1,
        "max_rank": 16,
    }
)
@example({"errors": [Fraction(1), *[Fraction(0)] * 9], "mean_rank": Fraction(2), "min_rank": 1, "max_rank": 4})
@example({"errors": [Fraction(1), *[Fraction(9)] * 9], "mean_rank": Fraction(3), "min_rank": 3, "max_rank": 3})
def test_ranks_are_those_of_a_literal_simulation(case: dict[str, Any]) -> None:
    np.testing.assert_array_equal(allocate_ranks(**in_floats(case)), simulated(**case))


@settings(max_examples=strategies.examples(150))
@given(exact_rank_cases(blocks=4, top=7))
def test_ranks_are_the_most_even_repair(case: dict[str, Any]) -> None:
    """Of all rank vectors within bounds and with the right sum, the one whose changes to the clipped shares are as even as
    bounds let them be, and where that leaves a choice, larger for blocks that come earlier in the order of repair."""
    errors, low, high = case["errors"], case["min_rank"], case["max_rank"]
    shares, total = clipped_shares(**case), round(len(errors) * case["mean_rank"])
    sign = 1 if total > sum(shares) else -1
    order = sorted(range(len(errors)), key=lambda block: (-sign * errors[block], block))
    best = min(
        (ranks for ranks in itertools.product(range(low, high + 1), repeat=len(errors)) if sum(ranks) == total),
        key=lambda ranks: (
            sum(abs(rank - share) for rank, share in zip(ranks, shares, strict=True)),
            sorted((abs(rank - share) for rank, share in zip(ranks, shares, strict=True)), reverse=True),
            [-abs(ranks[block] - shares[block]) for block in order],
        ),
    )
    np.testing.assert_array_equal(allocate_ranks(**in_floats(case)), best)


def test_error_is_the_mean_of_channels() -> None:
    rng = np.random.default_rng(0)
    D, S = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    slow = sum(sum((D[t, c] - S[t, c]) ** 2 for t in range(5)) / sum(D[t, c] ** 2 for t in range(5)) for c in range(3))
    assert reconstruction_error(D, S) == pytest.approx(slow / 3)
    D[:, 1] = 0
    S[:, 1] = 0
    assert reconstruction_error(D, S) < slow
    assert reconstruction_error(np.zeros((2, 2)), np.array([[0, 1], [0, 0]])) == 0.5


@given(strategies.folds())
def test_growing_and_folding_do_not_move_the_weight(case: dict[str, Any]) -> None:
    weight, A, B, rank, scale = (case[name] for name in ("weight", "A", "B", "rank", "scale"))
    before = effective_weight(weight, A, B, scale)
    grown = resize_adapter(A, B, len(A) + 2, np.ones((2, A.shape[1])))
    np.testing.assert_allclose(effective_weight(weight, *grown, scale), before, rtol=1e-12, atol=1e-12)
    folded = fold_adapter(weight, A, B, rank, scale)
    kept = (folded != 0) | (weight == 0)  # a sum that cancels to 0 exactly counts as pruned from then on
    shrunk = resize_adapter(A, B, rank)
    size = np.abs(before).max(initial=1.0) + np.abs(scale * np.abs(B) @ np.abs(A)).max(initial=0.0)
    difference = np.abs(effective_weight(folded, *shrunk, scale) - before) * kept
    assert difference.max() <= 1e-12 * size
