"""Tiles: single weights at their place, there and back, and the matrix product whose fragments they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests import strategies
from reference.tiles import pack_tiles, unpack_tiles


@settings(max_examples=strategies.examples(25))
@given(strategies.weights_to_tile())
def test_there_and_back(weight: np.ndarray) -> None:
    bitmaps, values = pack_tiles(weight)
    assert np.array_equal(unpack_tiles(bitmaps, values, *weight.shape), weight)
    # Nothing but the kept weights, and a bit for each.
    assert sorted(values) == sorted(weight[weight != 0])
    assert np.unpackbits(bitmaps).sum() == len(values)


@pytest.mark.parametrize(
    ("row", "column", "panel", "byte", "bit"),
    [
        # Four neighbours: two bytes on either side of a word's middle.
        (0, 0, 0, 2, 0),
        (0, 1, 0, 3, 0),
        (0, 2, 0, 0, 0),
        (0, 3, 0, 1, 0),
        # The other product of the same lane, the next lane, the next row.
        (0, 4, 0, 10, 0),
        (0, 8, 0, 2, 1),
        (1, 0, 0, 2, 4),
        # The next word of the tile, the lower rows' tile, the next 32 columns.
        (2, 0, 0, 18, 0),
        (8, 0, 0, 6, 0),
        (0, 32, 0, 66, 0),
        (15, 127, 0, 253, 7),
        # The next panel of a strip, the next strip.
        (0, 128, 1, 2, 0),
        (16, 0, 2, 2, 0),
        (19, 129, 3, 19, 4),
    ],
)
def test_the_bit_of_a_weight(row: int, column: int, panel: int, byte: int, bit: int) -> None:
    weight = np.zeros((20, 130))
    weight[row, column] = 7
    bitmaps, values = pack_tiles(weight)
    assert bitmaps.shape == (4, 256)
    assert np.argwhere(bitmaps).tolist() == [[panel, byte]]
    assert bitmaps[panel, byte] == 1 << bit
    assert values.tolist() == [7]


def test_the_order_of_values() -> None:
    """Columns 0-3 of every 8 come first, the upper rows before the lower ones, column 1 before column 0."""
    weight = np.zeros((17, 33))
    weight[0, :12] = range(1, 13)
    weight[8, :5] = range(21, 26)
    weight[16, 0], weight[0, 32] = 50, 40
    assert pack_tiles(weight)[1].tolist() == [2, 1, 3, 4, 10, 9, 11, 12, 22, 21, 23, 24, 6, 5, 7, 8, 25, 40, 50]


def quad(word: int, bit: int, values: list[float]) -> tuple[list[float], list[float]]:
    """A lane's four numbers and the values that are left."""
    values, found = list(values), [0.0] * 4
    for j in (1, 0, 2, 3):
        if word >> (8 * ((j + 2) % 4) + bit) & 1:
            found[j] = values.pop(0)
    return found, values


def test_tiles_are_fragments_of_the_product() -> None:
    """m16n8k16 as the PTX ISA defines it: a lane's pair of a at row l / 4 (+ 8), columns 2 (l mod 4) (+ 8) of 16 x 16, and of
    b at rows 2 (l mod 4) (+ 8) of 16 x 8, column l / 4. Lanes that take b from eight neighbouring x get W x."""
    random = np.random.default_rng(0)
    weight = random.integers(-4, 5, (16, 128)) * (random.random((16, 128)) < 0.5)
    x = random.integers(-4, 5, (8, 128)).astype(float)
    bitmaps, rest = pack_tiles(weight)
    words, values = bitmaps.view("<u4")[0], list(rest)
    y = np.zeros((16, 8))
    for step in range(8):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for half in range(2):
            tile = 2 * step + half
            for lane in range(32):
                word = int(words[tile // 4 * 16 + lane // 8 * 4 + tile % 4])
                found, values = quad(word, lane % 8, values)
                row, k = lane // 4 + 8 * half, 2 * (lane % 4)
                a[row, k : k + 2], a[row, k + 8 : k + 10] = found[:2], found[2:]
        for lane in range(32):
            k, eight = 2 * (lane % 4), x[lane // 4, step // 2 * 32 + lane % 4 * 8 :][:8]
            four = eight[step % 2 * 4 :][:4]
            b[k : k + 2, lane // 4], b[k + 8 : k + 10, lane // 4] = four[:2], four[2:]
        y += a @ b
    assert not values
    assert np.array_equal(y, weight @ x.T)


@settings(max_examples=strategies.examples(25))
@given(strategies.tiled_weights(), st.data())
def test_any_bit_turned_is_refused(case: dict[str, Any], data: st.DataObject) -> None:
    unpack_tiles(**case)
    bitmaps = case["bitmaps"].copy()
    panel, byte = (data.draw(st.integers(0, size - 1)) for size in bitmaps.shape)
    bitmaps[panel, byte] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"^(values has \d+ entries, but|bitmaps has a bit set beyond row)"):
        unpack_tiles(**{**case, "bitmaps": bitmaps})
