"""Gaps: production against the spec in every dtype and slab by slab, the size of a mask by Wanda, and what both refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle_tests import strategies
from oracle_tests.assertions import assert_exact, outcome
from oracle_tests.ops import to_torch
from reference import gaps as spec
from torch_impl import gaps
from torch_impl.masks.wanda import wanda_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=strategies.examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight=strategies.weights_with_gaps(), slab=st.integers(1, 4000), section=st.none() | st.integers(1, 200))
def test_values_keep_their_dtype(
    dtype: torch.dtype, weight: np.ndarray, slab: int, section: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are packed at a time."""
    monkeypatch.setattr(gaps, "SLAB", slab)
    given_weight = torch.from_numpy(weight).to(DEVICE, dtype)
    found = gaps.pack_gaps(given_weight, section)
    expected = spec.pack_gaps(given_weight.double().cpu().numpy(), section)
    assert found[0].dtype == dtype
    for name, ours, theirs in zip(("values", "gaps", "starts", "order"), found, expected, strict=True):
        assert ours.device == given_weight.device
        assert_exact(name, theirs, ours.double() if name == "values" else ours)
    restored = gaps.unpack_gaps(*found, *weight.shape)
    assert restored.dtype == dtype
    assert torch.equal(restored, given_weight)
    assert not torch.signbit(restored[restored == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_other_than_zero_is_kept(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    odd = [smallest, -smallest, float("inf"), -float("inf"), float("nan"), 0.0, -0.0, torch.finfo(dtype).max]
    weight = torch.tensor([[0.0] * 17 + odd], dtype=dtype, device=DEVICE)
    packed = gaps.pack_gaps(weight)
    assert packed[0][0, 0].tolist()[:5] == [0.0, *weight[0, 17:21].tolist()]
    assert packed[1][:, 0].flatten().tolist() == [15, 2, 1, 1, 1, 1, 3, 0]
    restored = gaps.unpack_gaps(*packed, *weight.shape)
    torch.testing.assert_close(restored, weight, rtol=0, atol=0, equal_nan=True)
    # The spec says the same.
    for ours, theirs in zip(packed, spec.pack_gaps(weight.double().cpu().numpy()), strict=True):
        assert np.array_equal(ours.double().cpu().numpy(), theirs, equal_nan=True)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_the_size_of_a_mask_by_wanda(sparsity: float) -> None:
    """Its entries are counted from the kept columns alone: their distance d in fifteens, rounded up, one for d = 0."""
    generator = torch.Generator().manual_seed(0)
    weight, norm = (torch.rand(shape, generator=generator) + 0.1 for shape in ((200, 1000), (1000,)))
    mask = wanda_mask(weight, norm, sparsity)
    lengths = []
    for row in mask.numpy():
        distances = np.diff(np.flatnonzero(row), prepend=0)
        lengths.append(int(np.maximum(np.ceil(distances / 15), 1).sum()))
    assert {int(row.sum()) for row in mask} == {round(1000 * (1 - sparsity))}
    longest = sorted(lengths, reverse=True)[::32]
    values, found, starts, _ = gaps.pack_gaps((weight * mask).to(DEVICE))
    assert values.numel() == found.numel() == 32 * sum(8 * -(-length // 8) for length in longest)
    assert int(starts[-1]) == len(values)
    # All but what fills a strip up.
    assert int(((values != 0) | (found == 15)).sum()) == sum(lengths)


# Rows 0, with columns 2 and 30, and 32, with column 39, are the first two lanes of the only group.
ROWS = np.zeros((33, 40))
ROWS[0, [2, 30]], ROWS[32, 39] = 1, 2


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("gaps", {(0, 31, 7): 16}, "gaps holds 16; allowed: 0 to 15"),
        ("gaps", {(0, 0, 3): 10}, "gaps leads beyond column 39 in strip 0"),
        ("gaps", {(0, 0, 3): 9}, None),
        ("columns", 39, "gaps leads beyond column 38 in strip 0"),
        ("values", {(0, 0, 3): 5}, "values has 4 entries other than 0, but gaps leads to 3 places"),
        ("values", {(0, 0, 1): 5}, None),
        ("starts", {0: 1}, "starts does not rise from 0 to 1, the number of groups"),
        ("starts", {1: 2}, "starts does not rise from 0 to 1, the number of groups"),
        ("starts", {2: 2}, "starts does not rise from 0 to 1, the number of groups"),
        # The group is the second strip's, of which only the first lane has a row.
        ("starts", {1: 0}, "values has an entry other than 0 in a lane after row 32"),
        ("order", {1: 0}, "order does not hold each of 0 to 32 once"),
        ("order", {0: 33}, "order does not hold each of 0 to 32 once"),
        ("order", {0: 1, 2: 0}, None),
        ("rows", 34, "order has shape (33,); allowed: (34,)"),
        ("rows", 32, "starts has shape (3,); allowed: (2,)"),
    ],
)
def test_what_is_refused(argument: str, change: Any, message: str | None) -> None:
    packed: dict[str, Any] = dict(zip(("values", "gaps", "starts", "order"), spec.pack_gaps(ROWS), strict=True))
    case = {**packed, "rows": 33, "columns": 40}
    if isinstance(change, dict):
        for place, value in change.items():
            case[argument][place] = value
    else:
        case[argument] = change
    expected = None if message is None else f"ValueError: {message}"
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (spec.unpack_gaps, case),
        (gaps.unpack_gaps, {name: to_torch(value) for name, value in case.items()}),
    ]
    for function, arguments in calls:
        assert outcome(function, arguments) == expected


def test_a_lane_without_a_row_stays_within_the_columns() -> None:
    values, steps, starts, order = (torch.from_numpy(part) for part in spec.pack_gaps(ROWS))
    starts[1], values[:], steps[:] = 0, 0, 0
    assert not gaps.unpack_gaps(values, steps, starts, order, 33, 40).any()
    steps[0, 31, :3] = 15
    with pytest.raises(ValueError, match=r"^gaps leads beyond column 39 in strip 1$"):
        gaps.unpack_gaps(values, steps, starts, order, 33, 40)
