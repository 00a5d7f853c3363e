"""Streamed statistics equal the spec's one-shot functions for any split into batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests.tolerances import bound
from reference import hsic, rank
from reference.masks import sparsegpt, wanda
from torch_impl.engine import statistics
from torch_impl.masks.prune import METHODS
from torch_impl.masks.sparsegpt import HESSIAN
from torch_impl.masks.wanda import INPUT_NORM


@st.composite
def split_features(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Features (tokens, columns) with a dead column, and the sizes of consecutive batches."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    columns = draw(st.integers(2, 8))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    features = generator.standard_normal((sum(sizes), columns)) * 10.0 ** draw(st.integers(-3, 3))
    features[:, draw(st.integers(0, columns - 1))] = 0.0
    return features, sizes


@given(split_features())
def test_input_norm_and_hessian(case: tuple[np.ndarray, list[int]]) -> None:
    features, sizes = case
    norm, hessian = (statistics.InputSum(statistic, samples=3) for statistic in (INPUT_NORM, HESSIAN))
    for part in torch.from_numpy(features).split(sizes):
        norm.update(part)
        hessian.update(part)
    np.testing.assert_allclose(norm.result().numpy(), wanda.input_norm(features), rtol=1e-12)
    np.testing.assert_allclose(hessian.result().numpy(), sparsegpt.hessian(features, 3), rtol=1e-10, atol=1e-300)


@given(split_features(), st.floats(0, 1))
def test_reconstruction_error(case: tuple[np.ndarray, list[int]], noise: float) -> None:
    dense, sizes = case
    sparse = dense + noise * np.roll(dense, 1, axis=1)
    error = statistics.ReconstructionError()
    for d, s in zip(torch.from_numpy(dense).split(sizes), torch.from_numpy(sparse).split(sizes), strict=True):
        error.update(d[None], s[None])
    assert error.result() == pytest.approx(rank.reconstruction_error(dense, sparse), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("sequences", [1, 3, 5])
def test_half_precision_differences_are_not_rounded(sequences: int) -> None:
    generator = torch.Generator().manual_seed(sequences)
    dense, sparse = (torch.randn(5, 7, 4, generator=generator).bfloat16() for _ in range(2))
    error = statistics.ReconstructionError()
    for d, s in zip(dense.split(sequences), sparse.split(sequences), strict=True):
        error.update(d, s)
    exact = rank.reconstruction_error(dense.double().view(-1, 4).numpy(), sparse.double().view(-1, 4).numpy())
    assert error.result() == pytest.approx(exact, rel=bound(torch.float32))


@given(split_features())
def test_gram(case: tuple[np.ndarray, list[int]]) -> None:
    features, _ = case
    hidden = torch.from_numpy(features)[:, None, :]
    np.testing.assert_allclose(statistics.gram_of(hidden).numpy(), hsic.linear_gram(features), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1] * 5])
def test_sizes_of_gradients_are_of_each_sequence_by_itself(sizes: list[int]) -> None:
    """However many come at once: √Σ (grad_yᵀ x)² over the sequences."""
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(5, 4, width, generator=generator, dtype=torch.float64) for width in (3, 2))
    sums = statistics.GradientSums(METHODS["pruner_zero"].statistic, SimpleNamespace(projections=("p",)))  # type: ignore[arg-type]
    for some_x, some_grad in zip(x.split(sizes), grad_y.split(sizes), strict=True):
        sums.add(0, "p", some_x, some_grad)
    sums.done(0, {})
    expected = sum((g.T @ a).square() for a, g in zip(x, grad_y, strict=True)).sqrt()
    torch.testing.assert_close(sums.take(0, torch.device("cpu"))["p"], expected)
