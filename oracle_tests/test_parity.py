"""Every production function against its spec, on all inputs of the strategies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from oracle_tests import strategies, tolerances
from oracle_tests.assertions import assert_close, assert_exact, assert_masks_agree, to_numpy
from oracle_tests.ops import OPS, Kind, Op, to_torch
from reference.masks import wanda as reference_wanda
from torch_impl.masks import wanda as production_wanda

LOW = [torch.float32, torch.float16, torch.bfloat16]


def results(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op", OPS, ids=str)
@given(data=st.data())
def test_float64_is_the_same_algorithm(op: Op, data: st.DataObject) -> None:
    case = data.draw(op.cases)
    expected = results(op.reference(**case))
    given_case = {name: to_torch(value) for name, value in case.items()}
    before = {name: value.clone() for name, value in given_case.items() if isinstance(value, torch.Tensor)}
    found = results(op.production(**given_case))
    assert len(found) == len(expected)
    for name, value in before.items():
        assert_exact(f"{op}: argument {name} afterwards", value, given_case[name])
    # An error is relative to the terms of its own entry: one huge column says nothing about the others.
    terms = (
        results(op.reference(**sizes_of(case))) if op.low_precision else (op.scale and op.scale(case),) * len(expected)
    )
    method = case.get("method", op.name.rpartition(".")[2].removesuffix("_nm"))
    bound = tolerances.METHOD_FLOAT64.get(method, tolerances.SAME_ALGORITHM)
    for index, (ours, theirs, size) in enumerate(zip(found, expected, terms, strict=True)):
        what = f"{op}, result {index}"
        if op.kind is Kind.EXACT or to_numpy(theirs).dtype.kind in "bi":
            assert_exact(what, theirs, ours)
        else:
            assert to_numpy(ours).dtype == to_numpy(theirs).dtype, what
            assert_close(what, theirs, ours, bound, scale=size)
    if op.kind is Kind.OPTIMUM:
        assert_optimal(case, to_numpy(found[0]), expected[0])


def sizes_of(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments' absolute values: what the spec makes of them is the sum of the sizes of the terms of each entry."""
    return {name: abs(value) if isinstance(value, np.ndarray | float) else value for name, value in case.items()}


def assert_optimal(case: dict[str, Any], found: np.ndarray, expected: np.ndarray) -> None:
    """Rates meet the target within bounds, at the cost of the spec's."""
    w = np.ones(len(found)) if case["weights"] is None else case["weights"]
    w = w / w.sum()
    assert abs(w @ found - case["target"]) <= 1e-9
    assert found.min() >= 0
    if case["floor"] is not None:
        assert (found >= case["floor"] - 1e-12).all()
    cost = w * case["importance"]
    assert cost @ found <= cost @ expected * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op.low_precision], ids=str)
@given(data=st.data())
def test_lower_precision_is_within_its_bound(op: Op, dtype: torch.dtype, data: st.DataObject) -> None:
    """The spec is fed the rounded arguments, so that only production's own rounding is measured.

    Every rounding is relative to a term, so each entry's bound refers to the sum of its terms' sizes.
    """
    rounded = {name: to_torch(value, dtype) for name, value in data.draw(op.cases).items()}
    exact = {name: value.double().numpy() if _is_float(value) else value for name, value in rounded.items()}
    assume(all(np.isfinite(value).all() for value in exact.values() if isinstance(value, np.ndarray)))
    found, expected, terms = (
        results(op.production(**rounded)),
        results(op.reference(**exact)),
        results(op.reference(**sizes_of(exact))),
    )
    for index, (ours, theirs, size) in enumerate(zip(found, expected, terms, strict=True)):
        what = f"{op}, result {index}"
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        # Results that are themselves products of rounded numbers may underflow at each factor.
        floor = 64 * smallest * max(1.0, float(np.max(size, initial=0.0)))
        # Where the terms may overflow, anything goes.
        fits = np.asarray(size) <= torch.finfo(ours.dtype).max / 2
        assert ours.shape == np.shape(theirs), what
        assert_close(what, theirs[fits], ours[torch.from_numpy(fits)], tolerances.bound(dtype), size[fits], floor)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(data=st.data(), sparsity=strategies.SPARSITIES)
def test_masks_differ_across_precisions_only_at_the_threshold(
    dtype: torch.dtype, data: st.DataObject, sparsity: float
) -> None:
    seed = data.draw(strategies.SEEDS)
    generator = np.random.default_rng(seed)
    weight, norm = generator.standard_normal((6, 16)), np.abs(generator.standard_normal(16))
    score = reference_wanda.wanda_score(weight, norm)
    mask = production_wanda.wanda_mask(to_torch(weight, dtype), to_torch(norm, torch.float32), sparsity)
    expected = reference_wanda.wanda_mask(weight, norm, sparsity)
    tolerance = tolerances.SCORE_ROUNDINGS * tolerances.UNIT[dtype]
    if mask.all() or not mask.any():
        assert_exact("wanda_mask", expected, mask)
    else:
        assert_masks_agree("wanda_mask", expected, mask, score, tolerance)
