"""Tests of the table: the functions that a row finds, the arguments that production gets, and each row's cases."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import reference.masks.wanda
import torch_impl.masks.wanda
from oracle_tests.ops import OPS, Kind, Op, to_torch

WANDA = Op("masks.wanda.wanda_mask", st.none(), Kind.EXACT, ({}, ""))


def test_a_row_finds_both_functions_of_its_name() -> None:
    assert WANDA.reference is reference.masks.wanda.wanda_mask
    assert WANDA.production is torch_impl.masks.wanda.wanda_mask
    assert str(WANDA) == "masks.wanda.wanda_mask"
    for missing in ("masks.wanda.nothing", "masks.nothing.wanda_mask"):
        with pytest.raises((AttributeError, ImportError), match="nothing"):
            _ = Op(missing, st.none(), Kind.EXACT, ({}, "")).production


def test_production_is_handed_the_same_values() -> None:
    array = np.array([[0.1, -0.0], [1e300, 2.0]])
    tensor = to_torch(array)
    assert tensor.dtype == torch.float64
    assert tensor.numpy().tobytes() == array.tobytes()
    tensor += 1
    assert array[0, 0] == 0.1, "a copy, so that neither side can change the other's arguments"
    assert to_torch(array[:1], torch.bfloat16).dtype == torch.bfloat16
    for kept in (np.array([True, False]), np.arange(3), np.zeros(2, np.uint8), np.zeros(2, np.uint16)):
        for dtype in (torch.float64, torch.float32):
            handed = to_torch(kept, dtype)
            assert handed.numpy().dtype == kept.dtype
            assert np.array_equal(handed.numpy(), kept)
    for rest in (3, 0.5, None, "wanda", (2, 4)):
        assert to_torch(rest) is rest


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_row_s_cases_are_arguments_that_the_spec_takes_and_its_mistake_is_one_of_them(op: Op) -> None:
    parameters = inspect.signature(op.reference).parameters
    case, argument = op.bad
    assert argument in case, "the mistake is in an argument that is given"
    assert set(case) <= set(parameters)
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert needed <= set(case), "nothing is missing, so that the mistake alone is refused"

    @settings(
        max_examples=3,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(op.cases)
    def takes(drawn: dict[str, object]) -> None:
        assert needed <= set(drawn) <= set(parameters)
        assert op.reference(**drawn) is not None or ".check" in op.name

    takes()  # fmt: skip
