"""Tests of the comparisons: what each must accept, and what each must notice and name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests.assertions import assert_close, assert_exact, assert_masks_agree, to_numpy

NAN, INF = float("nan"), float("inf")
GRID = np.array([[1.0, 2.0, 4.0], [-8.0, 0.0, 0.5]])


def changed(index: tuple[int, ...], value: float, array: np.ndarray = GRID) -> np.ndarray:
    copy = array.copy()
    copy[index] = value
    return copy


def refused(words: str, check: Callable[..., None], *given: Any, **options: Any) -> None:
    with pytest.raises(AssertionError, match=re.escape(words)):
        check("this", *given, **options)


def test_tensors_arrays_and_numbers_become_arrays_of_the_same_values() -> None:
    assert to_numpy(3).shape == ()
    assert to_numpy([1, 2]).dtype == np.int64
    needs_gradient = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert to_numpy(needs_gradient).dtype == np.float64
    for dtype, of_numpy in ((torch.bfloat16, np.float32), (torch.float16, np.float16)):
        value = torch.tensor([1 / 3, -2.0]).to(dtype)
        assert to_numpy(value).dtype == of_numpy
        assert to_numpy(value).tolist() == value.double().tolist()
    assert to_numpy(torch.tensor([True])).dtype == bool


def test_exact_accepts_the_same_from_either_package() -> None:
    for value in (GRID, np.array([True, False]), np.zeros((0, 3)), np.array(2.0), np.arange(3)):
        assert_exact("this", value, torch.from_numpy(value.copy()))
        assert_exact("this", value, value.copy())


@pytest.mark.parametrize(
    ("production", "words"),
    [
        (GRID[None], "this: shape (1, 2, 3), the spec's is (2, 3)"),
        (GRID.ravel(), "this: shape (6,), the spec's is (2, 3)"),
        (GRID[:1], "this: shape (1, 3), the spec's is (2, 3)"),
        (GRID.astype(np.float32), "this: dtype float32, the spec's is float64"),
        (changed((0, 2), np.nextafter(4.0, 5)), "this: 1 of 6 differ, first at (0, 2): 4.000000000000001, the spec's is 4.0"),
        (changed((1, 0), NAN), "this: 1 of 6 differ, first at (1, 0): nan, the spec's is -8.0"),
        (-GRID, "this: 5 of 6 differ, first at (0, 0): -1.0, the spec's is 1.0"),
    ],
)  # fmt: skip
def test_exact_notices(production: np.ndarray, words: str) -> None:
    refused(words, assert_exact, GRID, torch.from_numpy(production))


def test_exact_takes_no_truth_value_for_a_number_and_nan_for_nothing() -> None:
    refused("dtype int64", assert_exact, np.array([True]), np.array([1]))
    refused("first at (0,): nan", assert_exact, np.array([NAN]), np.array([NAN]))


def test_close_measures_by_the_largest_entry_or_by_the_scale_of_each() -> None:
    # The largest entry is 8: a hundredth of it is 0.08, at the smallest entry too.
    for index, value in (((0, 0), 1.08), ((1, 1), -0.08), ((1, 0), -8.08)):
        assert_close("this", GRID, changed(index, value), 0.01 * (1 + 1e-9))
        refused("this: off by 8.0", assert_close, GRID, changed(index, value), 0.0099)
    sizes = np.abs(GRID)
    assert_close("this", GRID, GRID * 1.01, 0.01 * (1 + 1e-9), scale=sizes)
    refused("at (1, 1): ", assert_close, GRID, changed((1, 1), 1e-30), 0.01, scale=sizes)
    refused("at (0, 0): ", assert_close, GRID, changed((0, 0), 1.02), 0.01, scale=torch.from_numpy(sizes))
    assert_close("this", GRID, changed((1, 1), 0.5), 0.5, scale=1.0)
    refused("allowed 5.000e-01 of 1.000e+00", assert_close, GRID, changed((1, 1), 0.6), 0.5, scale=1.0)


def test_close_allows_the_floor_where_that_is_more() -> None:
    assert_close("this", GRID, changed((1, 1), 0.25), 0.0, floor=0.25)
    refused("off by 2.500e-01 at (1, 1)", assert_close, GRID, changed((1, 1), 0.25), 0.0, floor=0.24)
    assert_close("this", np.zeros(2), np.zeros(2), 0.0)
    refused("at (1,)", assert_close, np.zeros(2), np.array([0.0, 1e-300]), 1.0)


def test_close_names_the_worst_entry_both_values_and_the_whole() -> None:
    found = changed((0, 1), 3.0, changed((1, 2), 0.6))
    refused("this: off by 1.000e+00 at (0, 1): ", assert_close, GRID, found, 1e-3)
    refused("3.0", assert_close, GRID, found, 1e-3)
    ratio = np.sqrt(1.01 / 85.25)
    refused(f"the spec's is {np.float64(2.0)!r}; RMS ratio {ratio:.3e}, allowed", assert_close, GRID, found, 1e-3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_close_accepts_no_number_that_is_not_finite(bad: float) -> None:
    found = changed((0, 0), bad)
    refused("this: holds NaN or infinity", assert_close, GRID, found, INF)
    refused("this: the spec's holds NaN or infinity", assert_close, found, GRID, INF)
    refused("this: the spec's holds NaN or infinity", assert_close, found, found, INF)


def test_close_compares_no_other_shapes_and_nothing_with_nothing() -> None:
    refused("this: shape (1, 2, 3), the spec's is (2, 3)", assert_close, GRID, GRID[None], 1.0)
    refused("this: shape (), the spec's is (1,)", assert_close, np.ones(1), 1.0, 1.0)
    assert_close("this", np.zeros((0, 3)), torch.zeros(0, 3), 0.0)
    assert_close("this", torch.ones(2, dtype=torch.bfloat16), np.ones(2), 0.0)


# Row by row: thresholds 2 and 20, of the highest pruned score.
SCORE = np.array([[1.0, 2.0, 3.0, 2.02], [10.0, 20.0, 40.0, 30.0]])
KEPT = np.array([[False, False, True, True], [False, False, True, True]])


def swapped(row: int, one: int, other: int) -> np.ndarray:
    mask = KEPT.copy()
    mask[row, [one, other]] = mask[row, [other, one]]
    return mask


def test_masks_may_differ_at_the_threshold_of_their_row_alone() -> None:
    assert_masks_agree("this", KEPT, KEPT.copy(), torch.from_numpy(SCORE), 0.0)
    near = swapped(0, 1, 3)
    assert_masks_agree("this", KEPT, torch.from_numpy(near), SCORE, 0.0101)
    refused(
        "this: row 0 differs from the spec's at a score 2.000e-02 from", assert_masks_agree, KEPT, near, SCORE, 0.0099
    )
    far = swapped(1, 1, 3)
    assert_masks_agree("this", KEPT, far, SCORE, 0.5)
    words = "this: row 1 differs from the spec's at a score 1.000e+01 from its threshold 2.000e+01"
    refused(words, assert_masks_agree, KEPT, far, SCORE, 0.49)
    # The lowest pruned instead of the highest.
    refused("a score 1.000e+01 from", assert_masks_agree, KEPT, swapped(1, 0, 3), SCORE, 0.49)
    both = near.copy()
    both[1] = far[1]
    refused("row 1 differs", assert_masks_agree, KEPT, both, SCORE, 0.0101)
    refused("row 0 differs", assert_masks_agree, KEPT, near, np.full_like(SCORE, NAN), 1.0)


def test_masks_keep_as_many_in_every_row() -> None:
    more = KEPT.copy()
    more[0, 0] = True
    refused("this: rows do not keep as many weights as the spec's", assert_masks_agree, KEPT, more, SCORE, INF)
    # As many in all, and not in each row.
    more[1, 2] = False
    refused("this: rows do not keep as many", assert_masks_agree, KEPT, more, SCORE, INF)
    refused("this: shape (1, 4), the spec's is (2, 4)", assert_masks_agree, KEPT, KEPT[:1], SCORE, INF)
