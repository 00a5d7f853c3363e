"""Several processes do what one does: the same decisions, the same numbers up to the order of summation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracle_tests.processes import in_processes
from oracle_tests.spread_runs import Outcome, gram, run, settings, train
from oracle_tests.tolerances import OTHER_ORDER
from torch_impl.engine import distributed, points


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


CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"prune_method": "sparsegpt", "rank_shrink": "fold", "loss": "ce"}),
    (4, {"prune_method": "magnitude", "gradient_checkpointing": True}),
    (4, {"sparsity_ratio": None, "sparsity_type": "mixed-2:4"}),
]


@pytest.mark.parametrize(("count", "changes"), CASES)
def test_a_whole_run_is_that_of_one_process(count: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Rates, masks, ranks, losses and merged weights; every process holds its rows alone, and all know the same."""
    case = settings(**changes)
    one = run(case)
    outcomes = in_processes(count, run, case, tmp_path)
    for outcome in outcomes:
        assert_same(outcome, one)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    for name, parameter in saved.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), outcomes[0].weights[name]), name


def test_gram_matrices_are_of_all_sequences_in_their_order() -> None:
    features = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        wide = features.to(dtype).double().flatten(1)
        for ours in in_processes(4, gram, features.to(dtype).float().numpy(), dtype):
            np.testing.assert_allclose(ours, (wide @ wide.T).numpy(), rtol=1e-6)


def test_a_point_of_two_processes_goes_on_on_one_and_four(tmp_path: Path) -> None:
    point = tmp_path / "point"
    whole = train(None, range(4))
    in_processes(2, train, None, range(2), point)
    goes_on = [train(point, range(2, 4)), *in_processes(4, train, point, range(2, 4))]
    for weights in goes_on:
        for name, weight in whole.items():
            np.testing.assert_allclose(weights[name], weight, rtol=0, atol=OTHER_ORDER)
    assert not list(tmp_path.glob(".*"))


def test_a_point_that_was_changed_is_refused(tmp_path: Path) -> None:
    point = tmp_path / "point"
    train(None, range(1), point)
    [file] = point.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is not what was written"):
        train(point, range(1, 2))
    (point / points.STATE).unlink()
    with pytest.raises(ValueError, match="is not complete"):
        train(point, range(1, 2))


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path: Path) -> None:
    """The others notice in seconds that it is gone, without a launcher too; the last point is whole."""
    point = tmp_path / "point"
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="process"):
        in_processes(2, train, None, range(3), point, 1)
    assert time.monotonic() - start < 60
    resumed = in_processes(2, train, point, range(2, 4))
    for name, weight in train(None, range(4)).items():
        np.testing.assert_allclose(resumed[0][name], weight, rtol=0, atol=OTHER_ORDER)


def test_one_process_needs_no_group() -> None:
    values = torch.ones(3)
    assert distributed.processes() == 1
    assert distributed.leads()
    assert distributed.total(values) is values
    assert distributed.agreed(values) is values
    assert distributed.deal([1, 2], lambda item: -item) == [1, 2]
    assert distributed.rows_here(5) == slice(0, 5)
