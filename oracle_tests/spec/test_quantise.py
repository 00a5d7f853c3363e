"""Rounding to a few bits: against every code there is, every scale that is tried, and the optimal brain surgeon."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from oracle_tests import strategies
from reference import packed, quantise
from reference.bits import allocate_bits, allocate_bits_by_harm
from reference.masks.first_token import weigh_first
from reference.masks.sparsegpt import hessian, rounding_harm, sparsegpt, sparsegpt_codes


def nearest(value: float, scale: float, bits: int) -> int:
    """Of all codes, the one nearest to the value, of two the even one."""
    largest = 2 ** (bits - 1) - 1
    return min(range(-largest, largest + 1), key=lambda code: (abs(value - scale * code), code % 2, abs(code)))


ROWS = strategies.matrices(rows=1).map(np.ravel)


@given(ROWS, strategies.BITS, st.integers(1, 13))
@example(np.array([0.5, 1.5, 2.5, 7.0]), 4, 4)
def test_each_value_has_the_nearest_of_all_codes(values: np.ndarray, bits: int, group: int) -> None:
    codes, scales = quantise.quantise(values, bits, group)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float16
    assert len(scales) == math.ceil(len(values) / group)
    found = quantise.dequantise(codes, scales, group)
    for i, value in enumerate(values):
        scale = float(scales[i // group])
        expected = nearest(value, scale, bits)
        # The quotient is rounded, so it may tie where the distances differ in their last digit.
        ulps = 4 * np.spacing(abs(value))
        assert abs(abs(value - scale * codes[i]) - abs(value - scale * expected)) <= ulps
        if scale == 0 or value / scale % 1 != 0.5:
            assert codes[i] == expected
        assert found[i] == scale * codes[i]
        assert abs(value - found[i]) <= scale / 2 * (1 + 1e-12)


def test_ties_go_to_the_even_code() -> None:
    codes, scales = quantise.quantise([0.5, 1.5, 2.5, -0.5, -1.5, 7.0], 4, 6)
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [0, 2, 2, 0, -2, 7]


@given(strategies.matrices(), strategies.BITS)
def test_scales_are_the_smallest_that_cut_nothing_off(values: np.ndarray, bits: int) -> None:
    for row, scale in zip(values, quantise.group_scales(values, bits), strict=True):
        largest = 2 ** (bits - 1) - 1
        assert float(scale) * largest >= np.abs(row).max() * (1 - 1e-15)
        if scale:
            assert float(np.nextafter(scale, np.float16(0))) * largest < np.abs(row).max()


def test_an_empty_row_has_no_scale() -> None:
    codes, scales = quantise.quantise([], 4, 128)
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype) == ((0,), np.int8, (0,), np.float16)
    assert quantise.dequantise(codes, scales, 128).shape == (0,)


@given(ROWS, strategies.BITS, st.integers(1, 13))
def test_zeros_have_code_0_and_do_not_move_the_scale(values: np.ndarray, bits: int, group: int) -> None:
    spread = np.zeros(3 * len(values))
    spread[1::3] = values
    codes, scales = quantise.quantise(values, bits, group)
    of_columns, same_scales = quantise.quantise(spread, bits, 3 * group)
    np.testing.assert_array_equal(of_columns[1::3], codes)
    assert not of_columns[0::3].any()
    assert not of_columns[2::3].any()
    np.testing.assert_array_equal(same_scales, scales)


@given(ROWS, strategies.BITS, st.integers(1, 13))
def test_what_is_rounded_stays_as_it_is(values: np.ndarray, bits: int, group: int) -> None:
    codes, scales = quantise.quantise(values, bits, group)
    assume((scales >= np.finfo(np.float16).smallest_normal).all() or not values.any())
    again, same_scales = quantise.quantise(quantise.dequantise(codes, scales, group), bits, group)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(same_scales, scales)


@given(ROWS, strategies.BITS, st.integers(1, 13), st.sampled_from([-1, 4, -8]))
def test_signs_and_powers_of_two_do_not_matter(values: np.ndarray, bits: int, group: int, factor: int) -> None:
    codes, scales = quantise.quantise(values, bits, group)
    assume((scales >= 8 * np.finfo(np.float16).smallest_normal).all())
    others, their_scales = quantise.quantise(factor * values, bits, group)
    np.testing.assert_array_equal(others, np.sign(factor) * codes)
    np.testing.assert_array_equal(their_scales, abs(factor) * scales)


@given(
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 7),
    strategies.BITS,
    st.floats(0, 1),
    strategies.SEEDS,
)
def test_the_formula_is_the_size(rows: int, columns: int, group: int, bits: int, kept: float, seed: int) -> None:
    weight = np.where(np.random.default_rng(seed).random((rows, columns)) < kept, 1.0, 0.0)
    bitmap, values, offsets = packed.pack(weight)
    scales = [quantise.quantise(row, bits, group)[1] for row in weight]
    size = 8 * (bitmap.nbytes + offsets.nbytes + sum(s.nbytes for s in scales)) + bits * len(values)
    found = quantise.bits_per_weight(1 - len(values) / weight.size, bits, columns, group) * weight.size
    assert found + 64 == pytest.approx(size, rel=1e-12)


def test_large_values_are_refused_and_tiny_ones_are_zeros() -> None:
    codes, scales = quantise.quantise([65504.0 * 7, -65504.0], 4, 2)
    assert (codes.tolist(), scales.tolist()) == ([7, -1], [65504.0])
    with pytest.raises(ValueError, match=r"values holds 458640 in size; allowed: at most 458528 with 4 bits"):
        quantise.quantise([-65520.0 * 7], 4, 2)
    codes, scales = quantise.quantise([1e-9, -2e-9], 4, 2)
    assert (codes.tolist(), scales.tolist()) == ([0, 0], [2.0**-24])


def rounding_surgeon(
    row: np.ndarray, H: np.ndarray, mask: np.ndarray, bits: int, group: int
) -> tuple[np.ndarray, list[float]]:
    """One row, left to right: each weight is set to its target, 0 or the nearest of all codes, and moves those right of it by the
    optimal brain surgeon's step for that change, with the inverse of what is left of the Hessian."""
    row, scales = row.copy(), []
    for j in range(len(row)):
        if j % group == 0:
            scales.append(float(quantise.quantise((row * mask)[j : j + group], bits, group)[1][0]))
        target = scales[-1] * nearest(row[j], scales[-1], bits) if mask[j] else 0.0
        inverse = np.linalg.inv(H[j:, j:])
        row[j:] -= (row[j] - target) / inverse[0, 0] * inverse[:, 0]
        row[j] = target
    return row, scales


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "block_size"), [(2, 4), (3, 6), (1, 1), (6, 6), (3, 3), (128, 128)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sparsegpt_rounds_as_the_surgeon_does(bits: int, group: int, block_size: int, sparsity: float) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        W, X = rng.standard_normal((3, 6)), rng.standard_normal((20, 6))
        H, kept = 2 / 4 * X.T @ X, rng.random((3, 6)) < 0.8
        new, mask = sparsegpt(W, H, sparsity, block_size, kept=kept, bits=bits, group=group)
        assert not (mask & ~kept).any()
        damped = H + 0.01 * np.diag(H).mean() * np.eye(6)
        for row in range(3):
            expected, scales = rounding_surgeon(W[row], damped, mask[row], bits, group)
            np.testing.assert_allclose(new[row], expected, rtol=1e-8, atol=1e-10)
            for j, value in enumerate(new[row]):
                assert value == scales[j // group] * nearest(value, scales[j // group], bits), "on the grid, exactly"


def test_the_mask_of_each_block_is_that_of_the_weights_that_rounding_has_moved() -> None:
    """The first block's mask is as without bits; the second's is chosen after what the first's rounding did."""
    rng = np.random.default_rng(1)
    W, X = rng.standard_normal((6, 8)), rng.standard_normal((20, 3)) @ rng.standard_normal((3, 8))
    _, plain = sparsegpt(W, X.T @ X, 0.5, 4)
    _, rounded = sparsegpt(W, X.T @ X, 0.5, 4, bits=2, group=4)
    np.testing.assert_array_equal(rounded[:, :4], plain[:, :4])
    assert (rounded[:, 4:] != plain[:, 4:]).any()


def test_compensation_loses_less_than_rounding_to_nearest() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((64, 16)) @ rng.standard_normal((16, 16))
    W = rng.standard_normal((8, 16))
    compensated, _ = sparsegpt(W, 2 * X.T @ X, 0.0, bits=4)
    rounded, _ = sparsegpt(W, np.eye(16), 0.0, bits=4)
    by_row = [quantise.dequantise(*quantise.quantise(row, 4, 16), 16) for row in W]
    np.testing.assert_array_equal(rounded, by_row)
    assert np.linalg.norm(X @ (W - compensated).T) < 0.8 * np.linalg.norm(X @ (W - rounded).T)


def test_codes_and_scales_are_those_of_sparsegpt() -> None:
    """Also where pruned weights would be larger, and in a last group of two columns."""
    rng = np.random.default_rng(2)
    W, X = rng.standard_normal((4, 130)), rng.standard_normal((300, 130)) @ rng.standard_normal((130, 130))
    kept = np.abs(W) < 1.5
    codes, scales = sparsegpt_codes(W, X.T @ X, 4, kept=kept)
    expected, mask = sparsegpt(W, X.T @ X, 0.0, bits=4, kept=kept)
    assert scales.shape == (4, 2)
    assert not codes[~kept].any()
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_array_equal(quantise.dequantise_rows(codes, scales), expected)


def test_an_attention_sink_is_rounded_better_only_if_the_first_token_counts_more() -> None:
    """Every token attends to the first one, which is one of 200 in the Hessian: compensation makes its value worse."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((24, 24)) * np.geomspace(1, 0.02, 24)
    X = rng.standard_normal((4, 200, 24)) @ mix.T
    X[:, 0] = np.linalg.svd(mix)[0][:, -1] * 4
    W = rng.standard_normal((16, 24))
    attention = np.tril(np.full((200, 200), 0.1)) / np.arange(1, 201)[:, None]
    attention[:, 0] += 0.9

    def error(rounded: np.ndarray) -> float:
        change = X @ (rounded - W).T
        return float(np.linalg.norm(attention @ change) / np.linalg.norm(attention @ (X @ W.T)))

    def compensated(inputs: np.ndarray) -> float:
        return error(quantise.dequantise_rows(*sparsegpt_codes(W, hessian(inputs, 4), 4)))

    nearest_error = error(quantise.dequantise_rows(*quantise.quantise_rows(W, 4)))
    assert compensated(X.reshape(-1, 24)) > 1.5 * nearest_error
    assert compensated(weigh_first(X, quantise.FIRST_TOKEN)) < 0.7 * nearest_error


def test_groups_that_blocks_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="group is 3; allowed: a divisor of block_size 4"):
        sparsegpt(np.ones((1, 4)), np.eye(4), 0.5, 4, bits=4, group=3)
    sparsegpt(np.ones((1, 4)), np.eye(4), 0.5, 4, group=3)
    with pytest.raises(ValueError, match="bits is 1; allowed: 2 to 8"):
        sparsegpt(np.ones((1, 4)), np.eye(4), 0.5, bits=1)


@st.composite
def few_blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Any arguments of allocate_bits for few blocks, with or without a solution; small importances, some equal."""
    L = draw(st.integers(1, 5))
    choices = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    importance = np.array(draw(st.lists(st.integers(1, 4), min_size=L, max_size=L)), dtype=float) / 8
    total = draw(st.integers(L * choices[0], L * choices[-1]))
    return {"importance": importance, "mean_bits": total / L, "choices": choices}


@given(few_blocks())
# 1 + 5 + 6 = 2 + 3 + 7, and so are their squares.
@example({"importance": np.ones(3), "mean_bits": 4, "choices": [1, 2, 3, 5, 6, 7]})
def test_bits_are_the_best_of_all_that_have_the_mean(case: dict[str, Any]) -> None:
    """The most important bits; among equals the most even; among these the first in dictionary order by importance."""
    importance, L = case["importance"], len(case["importance"])
    total = round(L * case["mean_bits"])
    order = sorted(range(L), key=lambda block: (importance[block], block))
    every = list(itertools.product(case["choices"], repeat=L))
    solutions = [bits for bits in every if sum(bits) == total]
    if not solutions:
        sums = {sum(bits) / L for bits in every}
        below, above = (max(s for s in sums if s < total / L), min(s for s in sums if s > total / L))
        with pytest.raises(ValueError, match=f"allowed for {L} blocks: {below:g} or {above:g}, the nearest"):
            allocate_bits(**case)
        return
    best = min(
        solutions,
        key=lambda b: (-(importance @ b), sum(bits**2 for bits in b), [b[block] for block in order]),
    )
    np.testing.assert_array_equal(allocate_bits(**case), best)


def test_equal_importances_get_equal_bits_and_tiny_differences_count() -> None:
    assert allocate_bits(np.ones(5), 4, (2, 4, 8)).tolist() == [4] * 5
    assert allocate_bits([1.0, 1.0 + 2**-52, 1.0], 4, (2, 4, 6)).tolist() == [2, 6, 4]
    assert allocate_bits([1e-300, 1e300, 1.0], 4, (3, 5, 4)).tolist() == [3, 5, 4]


@pytest.mark.parametrize("mean_bits", [5, 4.4])
def test_means_that_no_bits_have_are_refused_with_the_nearest(mean_bits: float) -> None:
    with pytest.raises(ValueError, match=r"mean_bits is .*; allowed for 3 blocks: 4 or 5\.33333, the nearest"):
        allocate_bits(np.ones(3), mean_bits, (4, 8))
    for wrong in (3.9, 8.1):
        with pytest.raises(ValueError, match=r"mean_bits is .*; allowed: 4 to 8"):
            allocate_bits(np.ones(3), wrong, (4, 8))
    with pytest.raises(ValueError, match=r"choices is \(\); allowed"):
        allocate_bits(np.ones(3), 4, ())


def test_the_harm_is_that_of_the_column_loop() -> None:
    """What compensated rounding costs in squared output error, for each row and number of bits, without running the loop."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((200, 24)) @ rng.standard_normal((24, 24))
    W, H = rng.standard_normal((64, 24)), X.T @ X
    damped = H + 0.01 * np.diag(H).mean() * np.eye(24)
    for rows in (np.arange(64) < 20, np.arange(64) >= 20):
        for bits, harm in zip((3, 4, 6, 8), rounding_harm(W, H, rows.astype(float), (3, 4, 6, 8)), strict=True):
            rounded, _ = sparsegpt(W, H, 0.0, bits=bits)
            change, share = (rounded - W)[rows], 64 / rows.sum()
            assert harm == pytest.approx(share * np.sum(change @ damped * change), rel=0.2)
            nearest_weights = quantise.dequantise_rows(*quantise.quantise_rows(W, bits))
            plain = (nearest_weights - W)[rows]
            assert harm < 0.7 * share * np.sum(plain @ damped * plain), "the harm without compensation is another"


def test_with_independent_inputs_the_harm_is_the_error_of_rounding_to_nearest() -> None:
    W, scales = np.array([[7.0, 2.5, -0.25], [0.0, 0.0, 0.0]]), np.array([2.0, 0.5, 3.0])
    harm = rounding_harm(W, np.diag(scales), [5.0, 9.0], (4, 8), damping=0.0)
    change = [W - quantise.dequantise_rows(*quantise.quantise_rows(W, bits)) for bits in (4, 8)]
    np.testing.assert_allclose(harm, [5.0 / 7.0 * (change[i][0] ** 2 @ scales) for i in range(2)])
    assert rounding_harm(W, np.zeros((3, 3)), [0.0, 0.0], (4, 8)).tolist() == [0.0, 0.0]


def test_the_harm_is_the_curvature_of_rows_that_share_their_gradients_alike() -> None:
    """Σ_t g²_ti x_t x_tᵀ of each row, added up one by one, where every token's gradient is a row's share times the token's."""
    rng = np.random.default_rng(4)
    X, of_token, of_row = rng.standard_normal((30, 4)), rng.random(30), rng.random(3)
    X = np.linalg.qr(X)[0] / np.sqrt(of_token)[:, None]  # Σ s x xᵀ is diagonal
    W, g2 = rng.standard_normal((3, 4)), np.outer(of_token, of_row)
    change = quantise.dequantise_rows(*quantise.quantise_rows(W, 4)) - W
    expected = sum(g2[t, i] * (change[i] @ X[t]) ** 2 for t in range(30) for i in range(3))
    H = X.T @ np.diag(g2.mean(1)) @ X
    np.testing.assert_allclose(rounding_harm(W, H, g2.sum(0), (4,), damping=0.0), [expected])


@given(strategies.harms())
# 0.1 + 0.2 + 0.3 and 0.1 + 0.3 + 0.2 differ in float64: sums are in order.
@example(
    {"harm": np.array([[0.1, 0.1], [0.3, 0.2], [0.2, 0.3]]), "sizes": [1, 1, 1], "mean_bits": 4, "choices": [3, 4]}
)
@example({"harm": np.array([[1.0, 0.0], [1.0, 0.0]]), "sizes": [2, 2], "mean_bits": 3.5, "choices": [3, 4]})
def test_bits_by_harm_are_the_best_of_all_that_fit(case: dict[str, Any]) -> None:
    """The least harm; of equals the fewest bits, then the first in dictionary order from the last projection."""
    harm, sizes, choices = case["harm"], case["sizes"], case["choices"]
    most = case["mean_bits"] * sum(sizes) + 1e-6

    def cost(places: tuple[int, ...]) -> tuple[float, int, list[int]]:
        total = 0.0
        for row, place in zip(harm, places, strict=True):
            total += row[place]
        return total, taken(places), list(places[::-1])

    def taken(places: tuple[int, ...]) -> int:
        return sum(size * choices[place] for size, place in zip(sizes, places, strict=True))

    every = itertools.product(range(len(choices)), repeat=len(sizes))
    best = min((places for places in every if taken(places) <= most), key=cost)
    found = allocate_bits_by_harm(**case)
    np.testing.assert_array_equal(found, [choices[place] for place in best])


def test_bad_arguments_of_bits_by_harm_are_named() -> None:
    harm = np.ones((2, 2))
    with pytest.raises(ValueError, match=r"choices is \[4, 3\]; allowed: 2 increasing numbers of bits"):
        allocate_bits_by_harm(harm, [1, 1], 3.5, (4, 3))
    with pytest.raises(ValueError, match=r"choices is \[3, 4, 5\]; allowed: 2 increasing"):
        allocate_bits_by_harm(harm, [1, 1], 3.5, (3, 4, 5))
    with pytest.raises(ValueError, match="sizes has 3 entries; allowed: 2"):
        allocate_bits_by_harm(harm, [1, 1, 1], 3.5, (3, 4))
    with pytest.raises(ValueError, match="mean_bits is 5; allowed: 3 to 4"):
        allocate_bits_by_harm(harm, [1, 1], 5, (3, 4))
