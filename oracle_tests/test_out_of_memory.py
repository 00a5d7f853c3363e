"""What a run does when the device's memory is full: smaller batches, remembered when it resumes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from oracle_tests.interruptions import Counting, Stop, outcome, same, settings, tiny
from oracle_tests.processes import in_processes
from oracle_tests.spread_runs import run_out_of_memory
from oracle_tests.spread_runs import settings as spread_settings
from torch_impl import losa
from torch_impl.engine import calibration, gradients
from torch_impl.engine.batches import Example
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import sum_loss
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import PruneConfig


def test_training_goes_on_in_smaller_micro_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Memory runs out in the second micro-batch of an optimizer step, when the first has left its gradients."""
    setup = settings(gradient_accumulation_steps=2, warmup_ratio=0.0)
    model, ids, parts = tiny()
    model.config.attention_dropout = 0.0
    for block in Decoder(model).blocks:
        block.self_attn.attention_dropout = 0.0
    plain = losa.run(copy.deepcopy(model), ids, parts, setup)
    calls: list[int] = []

    def limited(model: nn.Module, batch: Example, dense: nn.Module | None) -> torch.Tensor:
        calls.append(len(batch["input_ids"]))
        if len(calls) > 3 and calls[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum_loss(model, batch, dense)

    monkeypatch.setattr(gradients, "sum_loss", limited)
    checkpointer = Checkpointer(RunCheckpoints(tmp_path))
    smaller = losa.run(model, ids, parts, setup, checkpointer=checkpointer)
    assert calls == [2, 1, 2, 2, 1, 1, 1, 1, 1]
    assert "reducing per_device_train_batch_size from 2 to 1" in caplog.text
    assert caplog.text.count("reducing ") == 1, "once for the whole run"
    assert checkpointer.progress.micro_batch_size == 1
    for record, expected in zip(smaller, plain, strict=True):
        assert record.losses == pytest.approx(expected.losses, rel=1e-5)


def test_calibration_goes_on_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Memory runs out in the middle of a sweep: in one batch of one block, once the streams are half-way."""
    setup = settings(finetune=False)
    plain = outcome(setup)
    forward, calls = calibration.Stream.forward, []

    def limited(self: calibration.Stream, block: nn.Module, index: int, batch: int, rows: slice) -> torch.Tensor:
        calls.append(rows.stop - rows.start)
        if len(calls) > 30 and rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, block, index, batch, rows)

    monkeypatch.setattr(calibration.Stream, "forward", limited)
    checkpointer = Counting(tmp_path)
    records, tensors = outcome(setup, checkpointer)
    assert "reducing calibration_batch_size from 4 to 2" in caplog.text
    assert checkpointer.progress.calibration_batch_size == 2
    for record, expected in zip(records, plain[0], strict=True):
        assert record["errors"] == pytest.approx(expected["errors"], rel=1e-4)
    assert all(float((tensors[name] != tensor).float().mean()) < 0.01 for name, tensor in plain[1].items())


def test_blocks_of_a_window_are_trained_once_wherever_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a window, in the stream that waits, and in the one that is computed again behind the training."""
    setup = replace(
        settings(finetune=False),
        prune=PruneConfig(steps=1, layer_sparsity="uniform"),
        reconstruction=ReconstructionConfig(1, 1e-2, 4, 2),
    )
    model, ids, _ = tiny(num_hidden_layers=5)
    forward, calls, enough = calibration.Stream.forward, [0], 10**9

    def limited(self: calibration.Stream, block: nn.Module, index: int, batch: int, rows: slice) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > enough and rows.stop - rows.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, block, index, batch, rows)

    monkeypatch.setattr(calibration.Stream, "forward", limited)
    [plain] = losa.run(copy.deepcopy(model), ids, [], setup)
    whole = calls[0]
    for enough in range(2, whole, 4):
        calls[0] = 0
        [record] = losa.run(copy.deepcopy(model), ids, [], setup)
        assert record.errors == pytest.approx(plain.errors, rel=1e-4), f"after {enough} batches"


def test_a_batch_of_one_that_is_too_much_is_an_error() -> None:
    def never(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        find_executable_batch_size(never, 4, "size")


def test_smaller_batches_are_remembered_when_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out once while calibrating and once while training; stopped and resumed, no batch is larger again."""
    setup = settings()
    forward = calibration.Stream.forward
    full: set[str] = set()
    sizes: dict[str, list[int]] = {}

    def once(kind: str, size: int, fits: int) -> None:
        if kind not in full and size > fits:
            full.add(kind)
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes[kind].append(size)

    def limited_loss(model: nn.Module, batch: Example, dense: nn.Module | None) -> torch.Tensor:
        once("training", len(batch["input_ids"]), 1)
        return sum_loss(model, batch, dense)

    def limited(self: calibration.Stream, block: nn.Module, index: int, batch: int, rows: slice) -> torch.Tensor:
        once("calibration", rows.stop - rows.start, 2)
        return forward(self, block, index, batch, rows)

    def begin() -> None:
        full.clear()
        sizes.update(training=[], calibration=[])

    monkeypatch.setattr(gradients, "sum_loss", limited_loss)
    monkeypatch.setattr(calibration.Stream, "forward", limited)
    begin()
    counted = Counting(tmp_path / "all")
    plain = outcome(setup, counted)
    assert full == {"training", "calibration"}
    for stop in (1, 4, counted.count - 1):
        begin()
        with pytest.raises(Stop):
            outcome(setup, Counting(tmp_path / str(stop), stop))
        assert same(outcome(setup, Checkpointer(RunCheckpoints(tmp_path / str(stop)))), plain), (
            f"stopped at checkpoint {stop}"
        )
        assert full == {"training", "calibration"}
        assert set(sizes["training"]) == {1}, f"stopped at checkpoint {stop}"
        assert set(sizes["calibration"]) <= {1, 2}, f"stopped at checkpoint {stop}"


def test_no_process_of_several_takes_smaller_batches_alone() -> None:
    """They would not take part in the same number of sums: the one whose memory is full ends, and with it the others."""
    with pytest.raises(RuntimeError, match=r"(?s)process 1: .*OutOfMemoryError") as caught:
        in_processes(2, run_out_of_memory, spread_settings(), 1)
    assert "silent" not in str(caught.value)
