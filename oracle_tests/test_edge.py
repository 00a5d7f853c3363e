"""Numerics at the edge, both packages side by side: half precision, seven orders of magnitude, silence, singularity, ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close, assert_exact
from oracle_tests.ops import to_torch
from reference import adapter as spec_adapter
from reference import hsic as spec_hsic
from reference import rank as spec_rank
from reference import rmi as spec_rmi
from reference import sparsity as spec_sparsity
from reference.masks import nm as spec_nm
from reference.masks import prune as spec_prune
from reference.masks import sparsegpt as spec_sparsegpt
from reference.masks import wanda as spec_wanda
from torch_impl import adapter, hsic, rank, rmi, sparsity
from torch_impl.masks import nm, prune, sparsegpt, wanda

HALF = [torch.float16, torch.bfloat16]
GENERATOR = np.random.default_rng(0)
SPREAD = 10.0 ** GENERATOR.uniform(-6, 4, (24, 12)) * GENERATOR.choice([-1, 1], (24, 12))
"""Activations from 1e-6 to 1e4."""
WEIGHT = GENERATOR.standard_normal((6, 12))


def exact(value: torch.Tensor) -> Any:
    """What a tensor holds, in float64."""
    return value.double().numpy()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_precision_weights_are_pruned_alike(dtype: torch.dtype, method: str) -> None:
    """The spec is given the numbers that the half-precision tensor holds; scores of the two are then the same numbers."""
    weight = to_torch(WEIGHT, dtype)
    inputs = GENERATOR.standard_normal((40, 12))
    statistic = {
        "magnitude": None,
        "wanda": spec_wanda.input_norm(inputs),
        "sparsegpt": spec_sparsegpt.hessian(inputs, 1),
    }
    kept = np.ones(WEIGHT.shape, dtype=bool)
    new, mask = prune.prune(method, weight, to_torch(statistic[method]), torch.from_numpy(kept), sparsity=0.5)
    expected, expected_mask = spec_prune.prune(method, exact(weight), statistic[method], kept, sparsity=0.5)
    assert new.dtype == dtype
    assert_exact(f"{method} mask", expected_mask, mask)
    assert_close(f"{method} weight", expected, new, 2 * tolerances.UNIT[dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_merge_rounds_once(dtype: torch.dtype) -> None:
    weight = to_torch(WEIGHT * (GENERATOR.random(WEIGHT.shape) < 0.5), dtype)
    A, B = GENERATOR.standard_normal((3, 12)), GENERATOR.standard_normal((6, 3))
    found = adapter.merge(weight, to_torch(A, torch.float32), to_torch(B, torch.float32), 0.25)
    expected = spec_adapter.effective_weight(exact(weight), np.float32(A), np.float32(B), 0.25)
    assert_exact("zeros", expected == 0, found == 0)
    # One rounding to the dtype, and float32's own before it, which can tip a tie.
    assert_close("merge", expected, found, 1.01 * tolerances.UNIT[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_ten_orders_of_magnitude(dtype: torch.dtype) -> None:
    inputs = to_torch(SPREAD, dtype)
    held = exact(inputs)
    bound = tolerances.SAME_ALGORITHM if dtype == torch.float64 else tolerances.bound(torch.float32)
    assert_close("input_norm", spec_wanda.input_norm(held), wanda.input_norm(inputs), bound)
    assert_close("hessian", spec_sparsegpt.hessian(held, 2), sparsegpt.hessian(inputs, 2), bound)
    assert_close("linear_gram", spec_hsic.linear_gram(held), hsic.linear_gram(inputs), bound)
    score = spec_wanda.wanda_score(WEIGHT, spec_wanda.input_norm(held))
    assert_close("wanda_score", score, wanda.wanda_score(to_torch(WEIGHT), wanda.input_norm(inputs)), bound)


@pytest.mark.parametrize("sparsity_ratio", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_never_active(method: str, sparsity_ratio: float) -> None:
    """Their weights go first in Wanda; SparseGPT's Hessian has zero rows, and its damping carries it."""
    inputs = GENERATOR.standard_normal((40, 12))
    silent = [0, 5, 11]
    inputs[:, silent] = 0
    statistic = spec_wanda.input_norm(inputs) if method == "wanda" else spec_sparsegpt.hessian(inputs, 1)
    kept = np.ones(WEIGHT.shape, dtype=bool)
    expected, mask = spec_prune.prune(method, WEIGHT, statistic, kept, sparsity=sparsity_ratio)
    given = (to_torch(WEIGHT), to_torch(statistic), torch.from_numpy(kept))
    found, found_mask = prune.prune(method, *given, sparsity=sparsity_ratio)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", expected, found, tolerances.SPARSEGPT_FLOAT64)
    if method == "wanda" and sparsity_ratio >= 0.25:
        assert not mask[:, silent].any()


HESSIANS = {
    "fewer tokens than inputs": GENERATOR.standard_normal((3, 12)),
    "the same input twice": np.repeat(GENERATOR.standard_normal((40, 6)), 2, axis=1),
    "condition 1e12": GENERATOR.standard_normal((40, 12)) * np.logspace(0, -6, 12),
    "ten orders of magnitude": SPREAD,
    "one token": GENERATOR.standard_normal((1, 12)),
}


@pytest.mark.parametrize("inputs", HESSIANS.values(), ids=HESSIANS.keys())
@pytest.mark.parametrize("group", [None, (2, 4)], ids=str)
def test_singular_and_ill_conditioned_hessians(inputs: np.ndarray, group: tuple[int, int] | None) -> None:
    H = spec_sparsegpt.hessian(inputs, 1)
    if group is None:
        expected, mask = spec_sparsegpt.sparsegpt(WEIGHT, H, 0.5, block_size=4)
        found, found_mask = sparsegpt.sparsegpt(to_torch(WEIGHT), to_torch(H), 0.5, block_size=4)
    else:
        expected, mask = spec_sparsegpt.sparsegpt_nm(WEIGHT, H, *group, block_size=4)
        found, found_mask = sparsegpt.sparsegpt_nm(to_torch(WEIGHT), to_torch(H), *group, block_size=4)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", expected, found, tolerances.SPARSEGPT_FLOAT64)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("importance", [np.ones(6), np.array([1.0, 2, 1, 2, 1, 2]), np.zeros(6)], ids=str)
@pytest.mark.parametrize("target", [0.0, 0.31, 0.7, 1.0])
def test_importances_that_tie(importance: np.ndarray, target: float) -> None:
    """The lower index is pruned first."""
    expected = spec_sparsity.allocate_sparsity(importance, target, 0.03)
    found = sparsity.allocate_sparsity(to_torch(importance), target, 0.03)
    assert_close("rates", expected, found, tolerances.SAME_ALGORITHM)
    first_of_equals = [expected[importance == value] for value in np.unique(importance)]
    assert all((np.diff(rates) <= 1e-12).all() for rates in first_of_equals)
    kept = spec_sparsity.allocate_kept(importance, 20, 4)
    assert_exact("kept", kept, sparsity.allocate_kept(to_torch(importance), 20, 4))
    assert kept.sum() == 20


@pytest.mark.parametrize(
    "errors", [np.zeros(7), np.full(7, 1e-300), np.array([0.0, 0, 0, 1, 0, 0, 0]), np.full(7, 1e300)]
)
@pytest.mark.parametrize("mean", [1, 6.5, 8, 16])
def test_errors_that_tie_or_vanish(errors: np.ndarray, mean: float) -> None:
    expected = spec_rank.allocate_ranks(errors, mean)
    assert_exact("ranks", expected, rank.allocate_ranks(to_torch(errors), mean))
    assert expected.sum() == round(7 * mean)
    assert expected.min() >= 1
    assert expected.max() <= 16


def test_eighty_blocks() -> None:
    """The size of a 70B model: sums stay exact and bounds hold."""
    features = GENERATOR.standard_normal((80, 8, 16)) + 3 * GENERATOR.standard_normal((1, 8, 16))
    grams = np.stack([spec_hsic.linear_gram(X) for X in features])
    shared = spec_rmi.nhsic_matrix(grams)
    assert_close("nhsic", shared, rmi.nhsic_matrix(to_torch(grams)), tolerances.SAME_ALGORITHM)
    importance = spec_rmi.importance(spec_rmi.redundancy(shared))
    weights = GENERATOR.uniform(1, 2, 80)
    rates = spec_sparsity.allocate_sparsity(importance, 0.6552, 0.03, weights)
    found = sparsity.allocate_sparsity(to_torch(importance), 0.6552, 0.03, to_torch(weights))
    assert_close("rates", rates, found, tolerances.SAME_ALGORITHM)
    assert abs(weights @ rates / weights.sum() - 0.6552) < 1e-12
    assert (abs(rates - 0.6552) <= 0.03 + 1e-12).all()
    kept = spec_sparsity.allocate_kept(importance, 197, 8)
    assert_exact("kept", kept, sparsity.allocate_kept(to_torch(importance), 197, 8))
    assert kept.sum() == 197
    errors = np.exp(GENERATOR.standard_normal(80) * 2)
    ranks = spec_rank.allocate_ranks(errors, 10)
    assert_exact("ranks", ranks, rank.allocate_ranks(to_torch(errors), 10))
    assert ranks.sum() == 800


def test_one_and_two_calibration_samples() -> None:
    """One sample says nothing about dependence and is refused; two always tell the same or the opposite: nHSIC is 1."""
    one, two = GENERATOR.standard_normal((3, 1, 1)), GENERATOR.standard_normal((3, 2, 5))
    for module, value in ((spec_rmi, one), (rmi, to_torch(one))):
        with pytest.raises(ValueError, match="n = 2 or more"):
            module.nhsic_matrix(value)
    grams = np.stack([spec_hsic.linear_gram(X) for X in two])
    assert_close("nhsic", np.ones((3, 3)), spec_rmi.nhsic_matrix(grams), 1e-12)
    assert_close("nhsic", np.ones((3, 3)), rmi.nhsic_matrix(to_torch(grams)), 1e-12)


def test_constant_representations_share_nothing() -> None:
    same = np.full((4, 3), 7.0)
    grams = np.stack([spec_hsic.linear_gram(same), spec_hsic.linear_gram(GENERATOR.standard_normal((4, 3)))])
    assert_exact("nhsic", np.eye(2), spec_rmi.nhsic_matrix(grams))
    for dtype in (torch.float64, torch.float32):
        assert_exact("nhsic", np.eye(2), rmi.nhsic_matrix(to_torch(grams, dtype)).double())


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)], ids=str)
def test_full_rank_adapters_come_and_go(shape: tuple[int, int]) -> None:
    """Rank min(out, in) and beyond: growing never moves the product, folding all ranks away neither."""
    out, columns = shape
    full = min(shape)
    weight = GENERATOR.standard_normal(shape) * (GENERATOR.random(shape) < 0.6)
    A, B = GENERATOR.standard_normal((full, columns)), GENERATOR.standard_normal((out, full))
    rows = GENERATOR.standard_normal((3, columns))
    grown = spec_rank.resize_adapter(A, B, full + 3, rows)
    found = rank.resize_adapter(to_torch(A), to_torch(B), full + 3, to_torch(rows))
    for name, ours, theirs in zip("AB", found, grown, strict=True):
        assert_exact(name, theirs, ours)
    before = spec_adapter.effective_weight(weight, A, B, 2.0)
    assert_close("grown", before, adapter.effective_weight(to_torch(weight), *found, 2.0), tolerances.SAME_ALGORITHM)
    folded = rank.fold_adapter(to_torch(weight), to_torch(A), to_torch(B), 0, 2.0)
    assert_close("folded", spec_rank.fold_adapter(weight, A, B, 0, 2.0), folded, tolerances.SAME_ALGORITHM)
    assert_close("nothing lost", before, folded, tolerances.SAME_ALGORITHM)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_one_row_and_one_column(shape: tuple[int, int], method: str) -> None:
    weight, inputs = GENERATOR.standard_normal(shape), GENERATOR.standard_normal((9, shape[1]))
    statistic = {
        "magnitude": None,
        "wanda": spec_wanda.input_norm(inputs),
        "sparsegpt": spec_sparsegpt.hessian(inputs, 3),
    }
    kept = np.ones(shape, dtype=bool)
    expected, mask = spec_prune.prune(method, weight, statistic[method], kept, sparsity=0.5)
    given = (to_torch(weight), to_torch(statistic[method]), torch.from_numpy(kept))
    found, found_mask = prune.prune(method, *given, sparsity=0.5)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", expected, found, tolerances.SPARSEGPT_FLOAT64)


@pytest.mark.parametrize("n", range(5))
def test_groups_that_tie(n: int) -> None:
    score = np.repeat(GENERATOR.integers(0, 3, (3, 2)), 4, axis=1).astype(float)
    mask = spec_nm.nm_mask(score, n, 4)
    assert_exact("mask", mask, nm.nm_mask(to_torch(score), n, 4))
    # Equal scores: the lower columns go.
    assert_exact("last n", mask.reshape(3, 2, 4)[..., 4 - n :].all(), True)
