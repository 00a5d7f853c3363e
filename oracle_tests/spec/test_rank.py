"""Ranks, errors and resizing, by properties and by a literal simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given

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
