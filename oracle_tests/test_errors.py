"""The same mistake gives the same message in both packages: every argument of every pair, wrong in every way it can be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests.assertions import outcome
from oracle_tests.ops import OPS, Op, to_torch
from oracle_tests.strategies import examples
from torch_impl import hsic, packed


def wrong_values(value: Any) -> Iterator[Any]:
    """Values that are near `value` and mostly not allowed in its place."""
    if isinstance(value, np.ndarray):
        yield "seven"
        yield from (value[:0], value[..., :0], np.array(value.sum(0)), value[None])
        yield np.concatenate([value, value])
        yield np.concatenate([value, value], axis=-1)
        if value.dtype == bool:
            yield value.astype(float)
        else:
            yield from (-np.abs(value) - 1, np.abs(value) + 99, np.full_like(value, 0))
        if value.dtype.kind in "iu":
            yield value.astype(float)
            yield value > 0
    elif isinstance(value, int | float):
        yield from ("seven", True, float("nan"), -1, -0.5, 0, 1, 2, 1.5, 10**6, np.inf)
    elif isinstance(value, str):
        yield "best"
    elif isinstance(value, list) and any(isinstance(part, np.ndarray) for part in value):
        # Each array has the checks that an argument of its own has.
        return
    elif isinstance(value, tuple | list):
        yield from ((-1, 2), (3, 2), ("a", 2), (1, 0))


@pytest.mark.parametrize("op", OPS, ids=str)
@settings(max_examples=examples(8))
@given(data=st.data())
def test_same_mistake_same_message(op: Op, data: st.DataObject) -> None:
    case = data.draw(op.cases)
    for name, value in case.items():
        for wrong in wrong_values(value):
            mistaken = {**case, name: wrong}
            expected = outcome(op.reference, mistaken)
            found = outcome(op.production, {key: to_torch(part) for key, part in mistaken.items()})
            assert found == expected, f"{op}, {name} = {wrong!r}"


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_listed_mistake_gives_the_same_message(op: Op) -> None:
    case, _ = op.bad
    expected = outcome(op.reference, case)
    assert expected is not None
    assert outcome(op.production, {name: to_torch(value) for name, value in case.items()}) == expected


@pytest.mark.parametrize(
    ("byte", "bit", "refused"),
    [
        # Row 9 and column 2, the last ones; the row and the column after them; both.
        (4, 4, False),
        (4 + 16, 0, True),
        (5, 4, True),
        (5 + 16, 0, True),
    ],
)
def test_a_panel_has_no_bit_beyond_the_weight(byte: int, bit: int, refused: bool) -> None:
    bitmaps = np.zeros((2, 256), dtype=np.uint8)
    bitmaps[1, byte] = 1 << bit
    case = {"bitmaps": bitmaps, "values": np.ones(1), "rows": 10, "columns": 131}
    said = "ValueError: bitmaps has a bit set beyond row 9 or column 130 in panel 1" if refused else None
    [op] = [op for op in OPS if op.name == "tiles.unpack_tiles"]
    assert outcome(op.reference, case) == said
    assert outcome(op.production, {name: to_torch(value) for name, value in case.items()}) == said


def test_production_takes_no_integers_for_numbers() -> None:
    """The spec computes in float64 whatever it is given; a tensor's own dtype decides, and integers would truncate."""
    with pytest.raises(TypeError, match=r"^features has dtype torch.int64; allowed: a floating-point dtype$"):
        hsic.linear_gram(torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.uint8, torch.float8_e5m2])
def test_not_every_dtype_can_be_packed(dtype: torch.dtype) -> None:
    said = f"weight has dtype {dtype}; allowed: floating-point or unsigned, of 2, 4 or 8 bytes"
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        packed.pack(torch.ones(2, 3).to(dtype))
