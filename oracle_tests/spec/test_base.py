"""A compressed base: what rounding leaves as it is, and the adapter's gradients over it by finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from reference import adapter, packed
from reference.base import round_base
from reference.quantise import dequantise_rows


def meant(codes: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    return dequantise_rows(codes, scales, min(group, codes.shape[1]))


@given(strategies.bases())
def test_the_mask_stays_and_the_error_is_bounded(case: dict[str, Any]) -> None:
    weight, group = case["weight"], min(case["group"], case["weight"].shape[1])
    codes, scales = round_base(**case)
    np.testing.assert_array_equal(codes != 0, weight != 0)
    s = np.repeat(scales.astype(np.float64), group, axis=1)[:, : weight.shape[1]]
    error = np.abs(meant(codes, scales, group) - weight)
    small = np.abs(weight) < s / 2
    assert (error <= s / 2 * (1 + 1e-12) + 4 * np.spacing(np.abs(weight)))[~small].all()
    assert (error <= s)[small].all()
    assert (np.sign(codes) == np.sign(weight)).all()


@given(strategies.matrices(), st.integers(1, 13), st.integers(0, 2**16))
def test_pruning_does_not_round_again(weight: np.ndarray, group: int, seed: int) -> None:
    codes, scales = round_base(weight, None, group)
    kept = np.random.default_rng(seed).random(weight.shape) < 0.5
    again, same = round_base(meant(codes, scales, group) * kept, scales, group)
    np.testing.assert_array_equal(again, codes * kept)
    np.testing.assert_array_equal(same, scales)


def test_in_single_precision_the_rounded_product_counts() -> None:
    """bfloat16's and float16's products of scale and code are rounded; such a base still keeps its codes."""
    rng = np.random.default_rng(0)
    codes, scales = round_base(rng.standard_normal((4, 16)), None, 8)
    base = meant(codes, scales, 8).astype(np.float16)
    assert (base != meant(codes, scales, 8)).any()
    again, same = round_base(base, scales, 8)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(same, scales)


def test_a_group_that_has_moved_is_rounded_afresh_and_its_neighbour_is_not() -> None:
    _, scales = round_base([[127.0, 3.0, 127.0, 5.0]], None, 2)
    again, found = round_base([[0.0, 3.0, 0.0, 5.5]], scales, 2)
    assert again.tolist() == [[0, 3, 0, 127]]
    # 5.5 / 127 is between 0.04330 and 0.04333 of float16, and is rounded up.
    assert found.tolist() == [[1.0, 0.0433349609375]]


def test_gradients_over_a_compressed_base_by_finite_differences() -> None:
    """Of the loss by every entry of A and B, over the packed and over the rounded base; the base is unpacked each time."""
    rng = np.random.default_rng(1)
    W = rng.standard_normal((3, 8)) * (rng.random((3, 8)) < 0.6)
    A, B, x, dy = (rng.standard_normal(shape) for shape in ((2, 8), (3, 2), (5, 8), (5, 3)))
    codes, scales = round_base(W, None, 4)
    stored = {"packed": packed.unpack(*packed.pack(W), columns=8)}
    stored["rounded"] = meant(packed.unpack_codes(*packed.pack_codes(codes, 8), columns=8), scales, 4)
    np.testing.assert_array_equal(stored["packed"], W)
    assert 0 < np.abs(stored["rounded"] - W).max() <= float(scales.max()) / 2
    for base in stored.values():
        dx, dA, dB = adapter.masked_lora_grad(x, base, A, B, 0.5, dy)
        for parameter, gradient in ((x, dx), (A, dA), (B, dB)):
            for place in np.ndindex(parameter.shape):
                found = []
                for step in (1e-6, -1e-6):
                    parameter[place] += step
                    found.append(float((dy * adapter.masked_lora(x, base, A, B, 0.5)).sum()))
                    parameter[place] -= step
                np.testing.assert_allclose((found[0] - found[1]) / 2e-6, gradient[place], rtol=1e-6, atol=1e-7)
