"""The optimizer against torch's, the schedule against the trainer's and the field's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracle_tests.strategies import examples
from reference import adamw
from torch_impl.engine import training
from torch_impl.engine.settings import TrainingConfig

seeds = st.integers(0, 2**32 - 1)


def arrays(seed: int, scale: float, count: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [scale * generator.normal(size=(2 + number, 3)) for number in range(count)]


@settings(deadline=None, max_examples=examples(30))
@given(seeds, st.sampled_from([1e-9, 1e-4, 1.0, 1e6]), st.sampled_from([0.0, 0.001, 0.5]), st.integers(1, 6))
def test_steps_are_torch_s(seed: int, scale: float, weight_decay: float, steps: int) -> None:
    ours = arrays(seed, 1.0)
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=1.0, weight_decay=weight_decay)
    moments = adamw.start(ours)
    for step in range(steps):
        gradients = arrays(seed + step + 1, scale)
        rate = 0.1 * (step % 3)  # a rate of 0 still moves the moments
        optimizer.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        ours, moments = adamw.adamw(ours, gradients, moments, rate, weight_decay)
        for mine, parameter in zip(ours, theirs, strict=True):
            # A handful of roundings a step on numbers of order 1.
            np.testing.assert_allclose(mine, parameter.detach().numpy(), rtol=1e-13, atol=1e-14)


def test_arguments_stay_as_they_are() -> None:
    parameters, gradients = arrays(0, 1.0), arrays(1, 1.0)
    moments = adamw.start(parameters)
    before = [p.copy() for p in (*parameters, *gradients)]
    adamw.adamw(parameters, gradients, moments, 0.1, 0.01)
    adamw.clip_by_global_norm(gradients, 0.1)
    for now, then in zip((*parameters, *gradients), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert moments.steps == 0
    assert not any(m.any() for m in (*moments.first, *moments.second))


@settings(deadline=None, max_examples=examples(30))
@given(seeds, st.sampled_from([1e-8, 1e-3, 1.0, 1e5]), st.sampled_from([0.3, 1.0, 10.0]))
def test_clipping_is_torch_s(seed: int, scale: float, max_norm: float) -> None:
    gradients = arrays(seed, scale)
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clipped, ours = adamw.clip_by_global_norm(gradients, max_norm)
    assert ours == pytest.approx(float(norm), rel=1e-14)
    for mine, parameter in zip(clipped, theirs, strict=True):
        np.testing.assert_allclose(mine, parameter.grad.numpy(), rtol=1e-14)


def test_a_bound_of_zero_clips_nothing() -> None:
    """As in Hugging Face's trainer; the norm is still told. Production does the same to the bit."""
    gradients = arrays(0, 1e3)
    same, norm = adamw.clip_by_global_norm(gradients, 0)
    parameters = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    training._clip(parameters, 1.0, TrainingConfig(max_grad_norm=0), "step 1")
    for mine, parameter, gradient in zip(same, parameters, gradients, strict=True):
        np.testing.assert_array_equal(mine, gradient)
        np.testing.assert_array_equal(parameter.grad.numpy(), gradient)
    assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in gradients)))


@example(1, 0.3)
@example(2, 0.3)
@example(1, 1.0)
@given(st.integers(1, 60), st.floats(0, 1))
def test_the_schedule_in_both_packages(total: int, ratio: float) -> None:
    """Up, then down, never 0: the shortest schedule trains."""
    factors = [adamw.lr_factor(done, total, ratio) for done in range(total)]
    assert factors == [training.lr_factor(done, total, ratio) for done in range(total)]
    warmup = math.ceil(total * ratio)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    if warmup < total:
        assert factors[warmup] == 1


def test_bad_arguments() -> None:
    p = [np.zeros(2)]
    with pytest.raises(ValueError, match=r"learning_rate is -1"):
        adamw.adamw(p, p, adamw.start(p), -1.0, 0.0)
    with pytest.raises(ValueError, match=r"weight_decay is inf"):
        adamw.adamw(p, p, adamw.start(p), 1.0, math.inf)
    with pytest.raises(ValueError, match=r"gradients\[0\] has shape \(3,\); allowed: \(2,\)"):
        adamw.adamw(p, [np.zeros(3)], adamw.start(p), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"max_norm is -0.1"):
        adamw.clip_by_global_norm(p, -0.1)
    with pytest.raises(ValueError, match=r"done is 4; allowed: 0 to 3"):
        adamw.lr_factor(4, 4, 0.3)
    with pytest.raises(ValueError, match=r"total is 0"):
        adamw.lr_factor(0, 0, 0.3)
    with pytest.raises(ValueError, match=r"warmup_ratio is 1.5"):
        adamw.lr_factor(0, 4, 1.5)
