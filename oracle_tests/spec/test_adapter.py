"""The adapters against finite differences and their own definitions; the schedules of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given

from oracle_tests import strategies
from reference import adapter
from reference.schedule import cubic_sparsity, mean_rank, sparsity_spread
from reference.sora import gated_lora, soft_threshold


@given(strategies.adapter_inputs(gradient=True))
def test_gradients_are_finite_differences(case: dict[str, Any]) -> None:
    """The loss ⟨dy, y⟩ is quadratic in A and B together and linear in each: central differences are exact."""
    dy = case.pop("grad_y")
    grads = adapter.masked_lora_grad(grad_y=dy, **case)
    rng = np.random.default_rng(0)
    for name, grad in zip(("x", "A", "B"), grads, strict=True):
        direction = rng.standard_normal(case[name].shape)
        up, down = ({**case, name: case[name] + sign * direction} for sign in (1, -1))
        slope = np.sum(dy * (adapter.masked_lora(**up) - adapter.masked_lora(**down))) / 2
        terms = np.abs(dy).sum() * (1 + sum(np.abs(v).sum() for v in case.values() if isinstance(v, np.ndarray))) ** 3
        assert abs(slope - np.sum(grad * direction)) <= 1e-12 * terms


@given(strategies.adapters())
def test_merging_fills_no_zero(case: dict[str, Any]) -> None:
    merged = adapter.merge(**case)
    assert not merged[case["weight"] == 0].any()
    kept = case["weight"] != 0
    plain = case["weight"] + case["scale"] * case["B"] @ case["A"]
    np.testing.assert_allclose(merged[kept], plain[kept], rtol=1e-12, atol=1e-12)


@given(strategies.rebases())
def test_rebased_weights_become_what_pruning_made(case: dict[str, Any]) -> None:
    base = adapter.rebase(**case)
    contribution = case["merged"] - case["weight"]
    size = np.abs(case["updated"]).max() + np.abs(case["merged"]).max()
    assert np.abs((base + contribution - case["updated"]) * case["mask"]).max() <= 1e-12 * size
    assert not base[~case["mask"]].any()
    untouched = case["mask"] & (case["updated"] == case["merged"])
    np.testing.assert_array_equal(base[untouched], case["weight"][untouched])


def test_half_precision_is_rounded_once() -> None:
    weight = np.float16([[1.0, 0.0]])
    merged = adapter.merge(weight, np.array([[2.0**-12, 1.0]]), np.array([[3.0]]), 1.0)
    assert merged.dtype == np.float16
    assert merged.tolist() == [[float(np.float16(1.0 + 3 * 2.0**-12)), 0.0]]


def test_new_rows_depend_on_the_seed_alone() -> None:
    first = adapter.initial_rows(3, 5, (1, 2, 3))
    np.testing.assert_array_equal(first, adapter.initial_rows(3, 5, (1, 2, 3)))
    np.testing.assert_array_equal(first[:2], adapter.initial_rows(2, 5, (1, 2, 3)))
    assert not (first == adapter.initial_rows(3, 5, (1, 2, 4))).any()
    many = adapter.initial_rows(4000, 4, (0,))
    assert abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(0.5 / np.sqrt(3), rel=0.02)


def test_the_paper_s_schedules() -> None:
    assert [mean_rank(t) for t in range(1, 6)] == [6, 7, 8, 9, 10]
    five = [round(cubic_sparsity(t, 5, 0.7), 4) for t in range(1, 6)]
    assert five == [0.3416, 0.5488, 0.6552, 0.6944, 0.7]
    assert cubic_sparsity(3, 3, 0.7, 0.2) == 0.7
    assert [sparsity_spread(s) for s in (0.5, 0.5001, 0.6, 0.61, 0.7, 0.71, 0.8, 1.0)] == [
        0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.04, 0.06,
    ]  # fmt: skip


@given(strategies.gated_adapters())
def test_a_gate_scales_each_rank(case: dict[str, Any]) -> None:
    """The sum over ranks of gᵢ times the outer product of B's column and A's row, also for a gate below 0."""
    A, B, gate = case["A"], case["B"], case["gate"]
    update = sum((g * np.outer(b, a) for g, b, a in zip(gate, B.T, A, strict=True)), np.zeros((len(B), A.shape[1])))
    np.testing.assert_allclose(gated_lora(**case), case["scale"] * case["x"] @ update.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("amount", [0.0, 0.25, 0.4])
def test_the_threshold_is_the_proximal_step(amount: float) -> None:
    """The z of least (z − v)² / 2 + amount · |z|, of ten thousand."""
    values, grid = np.array([-1.0, -0.3, -0.25, 0.0, 0.1, 0.3, 0.8]), np.linspace(-1, 1, 10_001)
    cost = (grid - values[:, None]) ** 2 / 2 + amount * np.abs(grid)
    np.testing.assert_allclose(soft_threshold(values, amount), grid[cost.argmin(axis=1)], atol=1e-4)
    assert (soft_threshold(values, amount)[np.abs(values) <= amount] == 0).all()
