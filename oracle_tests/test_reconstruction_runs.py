"""Runs with reconstruction that are killed in it, run out of memory in it, or diverge in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.interruptions import Stop, outcome, same, settings, tiny
from oracle_tests.small_runs import arguments
from torch_impl import losa, reconstruct
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import PruneConfig, Settings
from torch_impl.run import main

STEP = reconstruct._Weights.step


def reconstructed(epochs: int, window: int, **changes: Any) -> Settings:
    return replace(
        settings(**changes),
        prune=PruneConfig(steps=2 if changes.get("finetune", True) else 1, layer_sparsity="uniform"),
        reconstruction=ReconstructionConfig(epochs, 1e-2, 4, window),
    )


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, then: Callable[[Any], None]) -> None:
    """Call `then` in the training of blocks, after optimizer step `number` of the run, counted from 1."""
    count = [0]

    def step(self: Any, *given: Any) -> None:
        STEP(self, *given)
        count[0] += 1
        if count[0] == number:
            then(self)

    monkeypatch.setattr(reconstruct._Weights, "step", step)


@pytest.mark.parametrize(("window", "number"), [(1, 1), (1, 7), (2, 6), (2, 12), (3, 11)])
def test_a_run_killed_while_it_trains_a_window_resumes_at_the_block_before(
    tmp_path: Path, window: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four optimizer steps a block: in the middle of the first, second and third block, and at the end of the third."""
    setup = reconstructed(2, window)
    plain = outcome(setup)

    def kill(_: Any) -> None:
        raise Stop

    at_step(monkeypatch, number, kill)
    with pytest.raises(Stop):
        outcome(setup, Checkpointer(RunCheckpoints(tmp_path)))
    monkeypatch.setattr(reconstruct._Weights, "step", STEP)
    again = Checkpointer(RunCheckpoints(tmp_path))
    assert again.progress.block == (number - 1) // 4
    assert same(outcome(setup, again), plain)


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_is_trained_again_in_smaller_parts_when_memory_is_full(
    window: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory in the second epoch of every training: what the first epoch did is not done twice."""
    setup = reconstructed(2, window, finetune=False)
    model, ids, _ = tiny()
    expected = copy.deepcopy(model)
    losa.run(expected, ids, [], setup)
    run, sizes = reconstruct._Passes.run, []

    def limited(self: Any, inputs: torch.Tensor, targets: torch.Tensor, rows: range, scale: torch.Tensor) -> None:
        sizes.append(len(rows))
        if len(rows) > 2 and sizes.count(3) % 3 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, inputs, targets, rows, scale)

    monkeypatch.setattr(reconstruct._Passes, "run", limited)
    losa.run(model, ids, [], setup)
    # Six sequences in two batches of three: two whole, the third too large, then all four in parts of two and one.
    assert sizes == [3, 3, 3, *(4 * [2, 1])] * len(Decoder(model).blocks)
    assert caplog.text.count("reducing reconstruct_batch_size from 4 to 2") == len(Decoder(model).blocks)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_window_that_diverges_leaves_all_its_blocks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second window: the first block keeps what the first window made of it, the second what pruning did."""
    setup = reconstructed(1, 2, finetune=False)
    model, ids, _ = tiny()
    alone = copy.deepcopy(model)
    before: dict[str, torch.Tensor] = {}

    def break_it(weights: Any) -> None:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        with torch.no_grad():
            weights._wide[-1][0, 0] = float("nan")

    at_step(monkeypatch, 4, break_it)
    with pytest.raises(
        FloatingPointError, match=r"block 1: .* a weight is not finite; lower reconstruct_learning_rate \(now 0\.01\)"
    ):
        losa.run(model, ids, [], setup)
    weights = [
        {name: layer.weight for name, layer in Decoder(model).family.projections_of(block).items()}
        for block in Decoder(model).blocks[:2]
    ]
    assert all(torch.isfinite(weight).all() for of_block in weights for weight in of_block.values())
    monkeypatch.setattr(reconstruct._Weights, "step", STEP)
    stopped = Checkpointer()

    def stop(index: int, *given: Any, **named: Any) -> None:
        raise Stop

    monkeypatch.setattr(stopped, "pruned", stop)
    with pytest.raises(Stop):
        losa.run(alone, ids, [], setup, checkpointer=stopped)
    for name, layer in Decoder(alone).family.projections_of(Decoder(alone).blocks[0]).items():
        assert torch.equal(weights[0][name], layer.weight), name


def test_a_run_that_diverges_in_a_window_resumes_at_a_lower_rate(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = {"steps": 1, "reconstruct_epochs": 1, "reconstruct_window": 2, "reconstruct_learning_rate": 1e-2}

    def break_it(weights: Any) -> None:
        with torch.no_grad():
            weights._wide[0][0, 0] = float("inf")

    for offload in ("off", "on"):
        given = {
            **options,
            "offload": offload,
            "output_dir": place / offload,
            "finetune": str(offload == "off").lower(),
        }
        at_step(monkeypatch, 2, break_it)
        assert main(arguments(place, **given)) == 2
        said = capsys.readouterr().err
        for words in ("block 1: ", "lower reconstruct_learning_rate (now 0.01)", "--accept_changes", "--resume"):
            assert words in said, said
        monkeypatch.setattr(reconstruct._Weights, "step", STEP)
        lower = {**given, "reconstruct_learning_rate": 1e-3, "resume": "true"}
        assert main(arguments(place, **lower)) == 2
        assert main(arguments(place, **lower, accept_changes="reconstruct_learning_rate")) == 0
