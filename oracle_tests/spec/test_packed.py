"""The packed form against a loop over its bits: what it keeps, how large it is, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from reference import packed


@given(strategies.weights_to_pack())
def test_every_bit_and_value_is_where_the_definition_says(weight: np.ndarray) -> None:
    bitmap, values, offsets = packed.pack(weight)
    expected, count = [], 0
    for i, row in enumerate(weight):
        assert offsets[i] == count
        for j in range(8 * bitmap.shape[1]):
            bit = bitmap[i, j // 8] >> (j % 8) & 1
            kept = j < len(row) and any(row[j].tobytes())
            assert bit == kept
            if kept:
                expected.append(row[j].tobytes())
                count += 1
    assert offsets[-1] == count
    assert [value.tobytes() for value in values] == expected


@given(strategies.weights_to_pack())
def test_unpacking_gives_the_same_bits(weight: np.ndarray) -> None:
    found = packed.unpack(*packed.pack(weight), columns=weight.shape[1])
    assert found.dtype == weight.dtype
    assert found.tobytes() == np.ascontiguousarray(weight).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_negative_zeros_and_nan_payloads_survive(dtype: type) -> None:
    size = np.dtype(dtype).itemsize
    odd_nan = np.frombuffer(bytes([5] * (size - 2) + [0xF5, 0x7F]), dtype=dtype)[0]
    assert np.isnan(odd_nan)
    tiny = np.frombuffer(bytes([1] + [0] * (size - 1)), dtype=dtype)[0]
    weight = np.array([[0.0, -0.0, odd_nan, np.inf, tiny]], dtype=dtype)
    bitmap, values, _ = packed.pack(weight)
    assert bitmap.tolist() == [[0b11110, 0, 0, 0]]
    assert len(values) == 4
    assert packed.unpack(*packed.pack(weight), columns=5).tobytes() == weight.tobytes()


@given(strategies.weights_to_pack())
def test_the_formula_is_the_size(weight: np.ndarray) -> None:
    bitmap, values, offsets = packed.pack(weight)
    sparsity = 1 - len(values) / weight.size
    bits = packed.bits_per_weight(sparsity, 8 * weight.dtype.itemsize, weight.shape[1]) * weight.size
    assert bits + 64 == pytest.approx(8 * (bitmap.nbytes + values.nbytes + offsets.nbytes), rel=1e-12)


def test_what_a_7b_projection_takes_of_dense() -> None:
    """PERFORMANCE.md's limits, and what the offsets cost of them."""
    for sparsity, speed_up in ((0.5, 1.78), (0.6, 2.16), (0.7, 2.76)):
        assert 16 / packed.bits_per_weight(sparsity, 16, 4096) == pytest.approx(speed_up, abs=0.01)


@given(strategies.packed_weights(), st.data())
def test_any_bit_of_the_bitmap_turned_is_refused(case: dict[str, Any], data: st.DataObject) -> None:
    packed.check(**case)
    bitmap = case["bitmap"].copy()
    row, byte = (data.draw(st.integers(0, size - 1)) for size in bitmap.shape)
    bitmap[row, byte] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match=r"^(offsets\[\d+\] is \d+, but|bitmap has a bit set beyond)"):
        packed.check(**{**case, "bitmap": bitmap})


@given(strategies.packed_weights(), st.data())
def test_any_offset_moved_is_refused(case: dict[str, Any], data: st.DataObject) -> None:
    offsets = case["offsets"].copy()
    row = data.draw(st.integers(0, len(offsets) - 1))
    offsets[row] += data.draw(st.sampled_from([-1, 1, 2**40]))
    with pytest.raises(ValueError, match=rf"^offsets\[{row}\] is .*, but bitmap has {case['offsets'][row]} bits"):
        packed.check(**{**case, "offsets": offsets})


def test_what_else_is_refused() -> None:
    bitmap, values, offsets = packed.pack(np.array([[0, 7, 0], [5, 0, 0]], dtype=np.uint16))
    good = {"bitmap": bitmap, "values": values, "offsets": offsets, "columns": 3}
    for change, message in (
        ({"values": values[:1]}, "values has 1 entries, but bitmap has 2 bits set"),
        ({"values": np.append(values, values)}, "values has 4 entries, but bitmap has 2 bits set"),
        ({"values": values * 0}, r"values\[0\] is 0"),
        ({"columns": 33}, r"bitmap has shape \(2, 4\); allowed: \(out, 8\) for 33 columns"),
        ({"columns": 1}, "bitmap has a bit set beyond column 0 in row 0"),
        ({"offsets": offsets[:2]}, r"offsets has shape \(2,\); allowed: \(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            packed.check(**{**good, **change})
    with pytest.raises(TypeError, match=r"^weight has dtype int32; allowed: floating-point or unsigned"):
        packed.pack(np.ones((2, 2), dtype=np.int32))
