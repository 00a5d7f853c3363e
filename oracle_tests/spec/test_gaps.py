"""Gaps: entries by hand, where they lie, how many there are by counting runs of zeros, and the product that a lane computes."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests import strategies
from reference.gaps import pack_gaps, unpack_gaps


@settings(max_examples=strategies.examples(25))
@given(strategies.weights_with_gaps())
def test_there_and_back(weight: np.ndarray) -> None:
    values, gaps, starts, order = pack_gaps(weight)
    found = unpack_gaps(values, gaps, starts, order, *weight.shape)
    assert np.array_equal(found, weight)
    assert not np.signbit(found[found == 0]).any()
    # Nothing but the kept weights; rows by their length, or as they are; strips no longer than their longest row needs.
    assert sorted(values[values != 0]) == sorted(weight[weight != 0])
    lengths = [length(row) for row in weight]
    plain, ordered = list(range(len(weight))), sorted(range(len(weight)), key=lambda row: (-lengths[row], row))
    expected = plain if sum(groups(lengths, plain)) <= 33 / 32 * sum(groups(lengths, ordered)) else ordered
    assert order.tolist() == expected
    assert starts.tolist() == np.cumsum([0, *groups(lengths, expected)]).tolist()


def groups(lengths: list[int], order: list[int]) -> list[int]:
    """Count each strip's groups: those of its longest row."""
    return [-(-max(lengths[row] for row in order[first : first + 32]) // 8) for first in range(0, len(order), 32)]


def length(row: np.ndarray) -> int:
    """Count a row's entries by its runs of zeros: z zeros between two kept values need z // 15 fillers."""
    first, *between = re.findall("(0*)1", "".join("01"[int(kept)] for kept in row != 0)) or [None]
    if first is None:
        return 0
    # Before the first kept value there is no step over the value before.
    return 1 + max(0, len(first) - 1) // 15 + sum(1 + len(zeros) // 15 for zeros in between)


@pytest.mark.parametrize(
    ("columns", "gaps"),
    [
        ([0], [0]),
        ([15], [15]),
        ([16], [15, 1]),
        ([30], [15, 15]),
        ([31], [15, 15, 1]),
        ([0, 1, 2], [0, 1, 1]),
        ([3, 18, 34, 64, 95], [3, 15, 15, 1, 15, 15, 15, 15, 1]),
        ([599], [15] * 39 + [14]),
    ],
)
def test_the_entries_of_a_row(columns: list[int], gaps: list[int]) -> None:
    """A value lies where the running sum of gaps is its column; every other entry has the value 0."""
    weight = np.zeros((1, 600))
    weight[0, columns] = np.arange(1, len(columns) + 1)
    values, found, starts, _ = pack_gaps(weight)
    groups = -(-len(gaps) // 8)
    assert starts.tolist() == [0, groups]
    assert found[:, 0].ravel().tolist() == gaps + [0] * (8 * groups - len(gaps))
    ends = [number for number, column in enumerate(np.cumsum(gaps)) if column in columns]
    expected = np.zeros(8 * groups)
    expected[ends] = weight[0, columns]
    assert values[:, 0].ravel().tolist() == expected.tolist()
    assert not found[:, 1:].any()
    assert not values[:, 1:].any()


@pytest.mark.parametrize(
    ("section", "columns", "gaps"),
    [
        (None, [0, 1, 5], [0, 1, 4]),
        (4, [0, 1, 5], [0, 1, 0, 0, 4, 0, 0, 0]),
        (4, [0, 1, 2, 3, 4], [0, 1, 1, 1, 1, 0, 0, 0]),
        # Fillers belong to the section of the value that they lead to.
        (16, [3, 40], [3, 0, 0, 0, 15, 15, 7, 0]),
        (16, [3, 15, 79], [3, 12, 0, 0, 15, 15, 15, 15, 4, 0, 0, 0]),
        (600, [1, 2, 3, 4, 5], [1, 1, 1, 1, 1, 0, 0, 0]),
    ],
)
def test_the_entries_of_sections(section: int | None, columns: list[int], gaps: list[int]) -> None:
    weight = np.zeros((1, 600))
    weight[0, columns] = np.arange(1, len(columns) + 1)
    values, found, starts, order = pack_gaps(weight, section)
    assert found[:, 0].ravel()[: len(gaps)].tolist() == gaps
    assert not found[:, 0].ravel()[len(gaps) :].any()
    assert starts.tolist() == [0, -(-len(gaps) // 8)]
    assert np.array_equal(unpack_gaps(values, found, starts, order, 1, 600), weight)


@settings(max_examples=strategies.examples(20))
@given(strategies.weights_with_gaps(), st.integers(1, 200))
def test_four_entries_have_values_of_one_section(weight: np.ndarray, section: int) -> None:
    """The one in which the last of them lies."""
    values, gaps, starts, order = pack_gaps(weight, section)
    assert np.array_equal(unpack_gaps(values, gaps, starts, order, *weight.shape), weight)
    for first, last in pairwise(starts):
        quads, kept = (part[first:last].swapaxes(0, 1).reshape(32, -1) for part in (gaps, values))
        where = quads.cumsum(axis=1, dtype=np.int64).reshape(32, -1, 4) // section
        assert ((where == where[..., 3:]) | (kept.reshape(where.shape) == 0)).all()


def test_where_rows_lie() -> None:
    """Rows 0 to 68 of 69, by their number of entries: 20 in row 40, 9 in rows 3 and 50, 1 in 32 more, else none."""
    weight = np.zeros((69, 64))
    weight[40, :20], weight[[3, 50], :9], weight[5:37, 2] = 7, 8, 9
    values, gaps, starts, order = pack_gaps(weight)
    assert order.tolist() == [40, 3, 50, *range(5, 37), *(row for row in range(69) if not weight[row].any())]
    # Three groups for 20 entries, one for the last three rows with a value, none for a strip without.
    assert starts.tolist() == [0, 3, 4, 4]
    assert gaps.shape == values.shape == (4, 32, 8)
    assert (values != 0).sum(2)[:, :4].tolist() == [[8, 8, 8, 1], [8, 1, 1, 0], [4, 0, 0, 0], [1, 1, 1, 0]]
    assert values[3, :3, 0].tolist() == [9, 9, 9]
    assert gaps[3, :3, 0].tolist() == [2, 2, 2]


def test_rows_about_equally_long_stay_as_they_are() -> None:
    """31 strips have one group and one strip two, sorted or not."""
    weight = np.zeros((1024, 16))
    weight[:, :8], weight[-1] = 1, 1
    assert pack_gaps(weight)[3].tolist() == list(range(1024))
    # One more group for 32 is as much as may be; two are sorted away.
    weight[0] = 1
    assert pack_gaps(weight)[3].tolist() == list(range(1024))
    weight[100] = 1
    assert pack_gaps(weight)[3].tolist() == [0, 100, 1023, *(row for row in range(1023) if row not in (0, 100))]


@pytest.mark.parametrize("shape", [(1, 1), (32, 5), (33, 5)])
def test_a_matrix_of_zeros_has_no_group(shape: tuple[int, int]) -> None:
    values, gaps, starts, order = pack_gaps(np.full(shape, -0.0))
    assert values.shape == gaps.shape == (0, 32, 8)
    assert not starts.any()
    assert len(starts) == -(-shape[0] // 32) + 1
    assert order.tolist() == list(range(shape[0]))
    assert not np.signbit(unpack_gaps(values, gaps, starts, order, *shape)).any()


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1])
def test_the_size_is_that_of_random_zeros(share: float) -> None:
    """(1 − ρ) / (1 − ρ^15) entries a weight, if every row keeps as many; and some to spare, up to the longest row's groups."""
    ranks = np.random.default_rng(0).random((64, 4096)).argsort(axis=1)
    values, gaps, *_ = pack_gaps(ranks < round(share * 4096))
    needed = 64 * 4096 * share / (1 - (1 - share) ** 15)
    used = np.count_nonzero(values) + (gaps[values == 0] == 15).sum()
    assert abs(used / needed - 1) < 0.005
    assert 1 <= values.size / used < 1.06


@settings(max_examples=strategies.examples(15))
@given(strategies.gapped_weights())
def test_a_lane_multiplies_by_walking_its_row(case: dict[str, Any]) -> None:
    """Fillers too read x at a column of the weight, and add nothing."""
    weight = unpack_gaps(**case)
    x = np.arange(1.0, case["columns"] + 1)
    y = np.zeros(case["rows"])
    for strip, (first, last) in enumerate(pairwise(case["starts"])):
        gaps, values = (case[name][first:last].swapaxes(0, 1).reshape(32, -1) for name in ("gaps", "values"))
        columns = gaps.cumsum(axis=1, dtype=np.int64)
        rows = case["order"][32 * strip :][:32]
        y[rows] = (values * x[columns]).sum(axis=1)[: len(rows)]
    np.testing.assert_allclose(y, weight @ x, rtol=1e-12, atol=1e-12 * len(x) ** 2)


@pytest.mark.parametrize(("more", "stays"), [(0, True), (8, False)])
def test_rows_stay_in_order_if_that_takes_at_most_one_group_in_32_more(more: int, stays: bool) -> None:
    """Two full rows, one in each strip, and all others shorter: 33 + 33 groups as they are, 33 + 31 with the full ones first."""
    weight = np.zeros((64, 264))
    weight[:, : 248 - more] = 1
    weight[[5, 40]] = 1
    _, _, starts, order = pack_gaps(weight)
    assert order.tolist() == (list(range(64)) if stays else [5, 40, *(row for row in range(64) if row not in (5, 40))])
    assert starts.tolist() == [0, 33, 66 if stays else 63]
