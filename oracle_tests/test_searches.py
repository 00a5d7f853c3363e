"""ALPS and ADMM in production: lower precision against the spec, one decomposition for each input, the memory that they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests import tolerances
from oracle_tests.assertions import assert_exact
from oracle_tests.tiny_material import settings, token_ids
from reference.masks import prune as spec_prune
from tiny_models.random_models import random_model
from torch_impl import losa
from torch_impl.bench.large import device_peak
from torch_impl.masks import prune
from torch_impl.masks.least_squares import Problem

SEARCHES = ("alps", "admm")
PATTERNS = ({"sparsity": 0.6}, {"nm": (2, 4)})


def case(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (48, 64) under an earlier mask, the Hessian of correlated, loud inputs in float32, and the mask."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((300, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    X *= np.exp(rng.standard_normal(64))
    kept = torch.tensor(rng.random((48, 64)) < 0.9)
    weight = torch.tensor(rng.standard_normal((48, 64))).to(dtype) * kept
    return weight, torch.tensor(2 / 5 * X.T @ X, dtype=torch.float32), kept


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_lower_precision_finds_what_the_spec_finds(name: str, dtype: torch.dtype, pattern: dict[str, Any]) -> None:
    """Near ties may flip, so what counts is the error of the result; the spec is fed the numbers that production holds."""
    for seed in range(3):
        weight, H, kept = case(seed, dtype)
        W, held = weight.double().numpy(), H.double().numpy()
        expected, mask = spec_prune.prune(name, W, held, kept.numpy(), **pattern)
        new, found = prune.prune(name, weight, H, kept, **pattern)
        assert new.dtype == dtype
        assert not new[~found].any()
        flipped = float((found.numpy() != mask).mean())
        assert flipped <= tolerances.SEARCH["mask entries that differ (share)"]

        def error(Z: np.ndarray, W: np.ndarray = W, held: np.ndarray = held) -> float:
            damped = held + 0.01 * np.diag(held).mean() * np.eye(64)
            return float(np.einsum("ij,jk,ik->", W - Z, damped, W - Z))

        assert abs(error(new.double().numpy()) / error(expected) - 1) <= tolerances.SEARCH[dtype]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_weight_that_is_sparse_enough_keeps_its_bits(name: str) -> None:
    weight, H, kept = case(0, torch.bfloat16)
    new, mask = prune.prune(name, weight, H, kept, sparsity=0.05)
    assert_exact("weight", weight, new)
    assert_exact("mask", kept, mask)


def test_one_decomposition_for_every_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values share one, gate and up another: four for each of three blocks, not seven."""
    calls, method = [], prune.METHODS["admm"]

    def prepare(hessian: torch.Tensor) -> Any:
        calls.append(tuple(hessian.shape))
        return method.prepare(hessian)

    monkeypatch.setitem(prune.METHODS, "admm", replace(method, prepare=prepare))
    model = random_model("llama-gqa")
    setup = settings(prune_method="admm", steps=1, sparsity_ratio=0.5, training={"finetune": False})
    losa.run(model, token_ids(model, 6, 12), [], setup)
    assert calls == [(32, 32), (32, 32), (32, 32), (48, 48)] * 3


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)], ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_workspace_holds_what_pruning_takes(name: str, shape: tuple[int, int]) -> None:
    """Nothing above the formula, and at least half of it is needed."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    X = torch.randn(2 * shape[1], shape[1], generator=generator)
    H, kept = X.T @ X, torch.ones(shape, dtype=torch.bool)
    peaks = [
        device_peak(lambda how=how: prune.prune(name, weight, H, kept, **how), torch.device("cpu"))[0]  # type: ignore[misc]
        for how in PATTERNS
    ]
    allowed = prune.METHODS[name].workspace(*shape, weight.element_size())
    assert max(peaks) <= allowed
    assert max(peaks) >= allowed / 2


def test_a_hessian_is_decomposed_in_double_precision() -> None:
    """From float32 it comes back in float32, and the eigenvectors are as orthogonal as that allows; the Hessian stays as it is."""
    _, H, _ = case(0, torch.float32)
    before = H.clone()
    problem = Problem.of(H, 0.01)
    assert_exact("hessian", before, H)
    assert {part.dtype for part in (problem.scale, problem.hessian, problem.values, problem.vectors)} == {torch.float32}
    vectors = problem.vectors.double()
    rebuilt = vectors @ torch.diag(problem.values.double()) @ vectors.T
    torch.testing.assert_close(rebuilt, problem.hessian.double(), rtol=0, atol=64 * 2.0**-24)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(64, dtype=torch.float64), rtol=0, atol=8 * 2.0**-24)
