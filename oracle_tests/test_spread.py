"""Several processes do what one does: the same decisions, the same numbers up to the order of summation."""

from __future__ import annotations

import numpy as np
import pytest

from oracle_tests.spread_runs import Outcome
from oracle_tests.tolerances import OTHER_ORDER


def assert_same(several: Outcome, one: Outcome) -> None:
    for record, expected in zip(several.records, one.records, strict=True):
        assert record.ranks == expected.ranks
        for name in ("sparsity", "realised", "importance", "errors", "losses"):
            values, wanted = getattr(record, name), getattr(expected, name)
            assert values == pytest.approx(wanted, rel=OTHER_ORDER, abs=OTHER_ORDER), f"step {record.step}: {name}"
    assert several.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        assert np.array_equal(several.weights[name] == 0, weight == 0), f"{name}: masks part"
        np.testing.assert_allclose(several.weights[name], weight, rtol=0, atol=OTHER_ORDER)
