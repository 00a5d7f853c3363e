"""The packed form against a loop over its bits: what it keeps, how large it is, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from reference import packed, quantise


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


@given(strategies.codes_to_pack())
def test_every_bit_of_every_code_is_where_the_definition_says(case: dict[str, Any]) -> None:
    codes, bits = case["codes"], case["bits"]
    bitmap, stream, offsets = packed.pack_codes(**case)
    positions = packed.pack(np.where(codes == 0, 0, 1).astype(np.uint16))
    np.testing.assert_array_equal(bitmap, positions[0])
    np.testing.assert_array_equal(offsets, positions[2])
    kept = [int(code) for row in codes for code in row if code]
    assert stream.shape == (-(-len(kept) // 8), bits)
    flat = stream.ravel()
    for place in range(8 * len(flat)):
        number, bit = divmod(place, bits)
        expected = kept[number] >> bit & 1 if number < len(kept) else 0
        assert flat[place // 8] >> (place % 8) & 1 == expected


@given(strategies.codes_to_pack())
def test_unpacking_gives_the_same_codes(case: dict[str, Any]) -> None:
    found = packed.unpack_codes(*packed.pack_codes(**case), columns=case["codes"].shape[1])
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, case["codes"])


@given(strategies.matrices(rows=5), strategies.BITS)
def test_the_formula_of_rounded_weights_is_the_size(weight: np.ndarray, bits: int) -> None:
    """Up to what fills the last row of eight codes."""
    codes, scales = quantise.quantise_rows(weight, bits)
    bitmap, stream, offsets = packed.pack_codes(codes, bits)
    expected = quantise.bits_per_weight(1 - np.count_nonzero(codes) / codes.size, bits, codes.shape[1]) * codes.size
    found = 8 * (bitmap.nbytes + stream.nbytes + scales.nbytes + offsets.nbytes)
    assert expected + 64 - 1e-6 <= found <= expected + 64 + 8 * bits


def test_what_rounded_weights_refuse() -> None:
    bitmap, codes, offsets = packed.pack_codes(np.array([[0, 7, -1], [5, 0, 0]], dtype=np.int8), bits=4)
    good = {"bitmap": bitmap, "codes": codes, "scales": np.ones((2, 1), np.float16), "offsets": offsets, "columns": 3}
    packed.check_codes(**good)
    for place, nibble, message in (
        (0, 0, "code 0 is 0"),
        (1, 8, "code 1 is -8; allowed: -7 to 7"),
        (3, 1, "codes has a bit"),
    ):
        other = codes.copy().ravel()
        other[place // 2] = other[place // 2] & (0xF0 >> 4 * (place % 2)) | nibble << 4 * (place % 2)
        with pytest.raises(ValueError, match=message):
            packed.check_codes(**{**good, "codes": other.reshape(1, 4)})
    for change, message in (
        ({"codes": np.append(codes, codes, axis=0)}, "codes has 2 rows; allowed: 1, because bitmap has 3 bits set"),
        ({"codes": codes[:, :1]}, r"codes has shape \(1, 1\)"),
        ({"codes": codes.ravel()}, r"codes has shape \(4,\)"),
        ({"scales": good["scales"].T}, r"scales has shape \(1, 2\); allowed: \(2, 1\), one for every 128 columns"),
        ({"scales": good["scales"] * np.nan}, "scales holds nan"),
        ({"offsets": offsets + 1}, r"offsets\[0\] is 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            packed.check_codes(**{**good, **change})
    for wrong, message in (
        ([[8]], "codes holds 8 and 8; allowed: -7 to 7 with 4 bits"),
        ([[-8]], "codes holds -8"),
        ([1], "codes has"),
    ):
        with pytest.raises(ValueError, match=message):
            packed.pack_codes(np.array(wrong, dtype=np.int8), 4)
    with pytest.raises(TypeError, match=r"^scales has dtype float32; allowed: float16"):
        packed.check_codes(**{**good, "scales": np.ones((2, 1), np.float32)})
