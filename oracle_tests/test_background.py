"""Checkpoints written in a thread while the run goes on: the same files as without one, whatever the disk does."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.interruptions import Counting, Stop, outcome, same, settings, tiny
from torch_impl.engine.adapted_linear import adapters, attach_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.resume import run_checkpoints, state
from torch_impl.engine.resume.background import WAITING, Background
from torch_impl.engine.resume.checkpointer import Checkpointer, Interrupted, Progress
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment import job
from torch_impl.experiment.config import Config
from torch_impl.experiment.offloaded_job import run_offloaded

BEYOND = 30
"""Seconds that nothing here takes."""


def test_actions_are_done_in_order_while_others_wait() -> None:
    background, gate, done = Background(threaded=True), threading.Event(), []
    background.do(gate.wait, BEYOND)
    for number in range(WAITING - 1):
        background.do(done.append, number)
    assert done == [], "the caller goes on before the first is done"
    threading.Timer(0.05, gate.set).start()
    background.do(done.append, WAITING)
    background.wait()
    assert done == [*range(WAITING - 1), WAITING]


def test_no_more_than_a_few_wait() -> None:
    """Each may hold a block's weights."""
    background, gate = Background(threaded=True), threading.Event()
    for _ in range(WAITING):
        background.do(gate.wait, BEYOND)
    begin = time.perf_counter()
    threading.Timer(0.2, gate.set).start()
    background.do(int)
    assert time.perf_counter() - begin > 0.1


def test_after_a_failure_nothing_is_done_and_it_is_raised() -> None:
    background, done = Background(threaded=True), []

    def fail() -> None:
        raise OSError("no space left on device")

    background.do(fail)
    with pytest.raises(OSError, match="no space left"):
        background.wait()
    background.do(done.append, 1)
    background.wait()
    assert done == []


def test_without_a_thread_actions_are_done_at_once() -> None:
    background, done = Background(threaded=False), []
    background.do(done.append, 1)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        background.do(divmod, 1, 0)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files take so long that the run is always ahead of them."""
    write = run_checkpoints.save_tensors

    def slowly(*given: Any) -> None:
        time.sleep(0.02)
        write(*given)

    monkeypatch.setattr(run_checkpoints, "save_tensors", slowly)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_goes_on_from_a_checkpoint_of_the_thread(tmp_path: Path, stop: int) -> None:
    setup = settings("sparsegpt")
    plain = outcome(setup)
    checkpointer = Counting(tmp_path, stop, in_background=True)
    with pytest.raises(Stop), checkpointer.stopping_at_checkpoints():
        outcome(setup, checkpointer)
    again = Checkpointer(RunCheckpoints(tmp_path))
    assert str(again.progress) == str(checkpointer.progress)
    torch.manual_seed(stop)
    assert same(outcome(setup, again), plain)


def test_a_checkpoint_holds_what_was_there_when_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before weights, adapters and notes have changed."""
    write, gate = run_checkpoints.save_tensors, threading.Event()

    def gated(*given: Any) -> None:
        gate.wait(BEYOND)
        write(*given)

    monkeypatch.setattr(run_checkpoints, "save_tensors", gated)
    model = tiny()[0]
    dense = copy.deepcopy(model)
    attach_adapters(Decoder(model), 1.0)
    checkpointer = Checkpointer(RunCheckpoints(tmp_path), in_background=True)
    checkpointer.begin(Decoder(model), Decoder(dense), Progress())
    layer = adapters(model)[0]
    layer.resize(2, (0,))
    layer.set_base(layer.weight + 1)
    checkpointer.notes["after_step"] = [7.5]
    expected = {"A": layer.A.detach().clone(), "base": layer.weight.clone()}
    # Adapters, a block, the random generators and the manifest: as many as may wait.
    checkpointer.resized(base_moved=False)
    checkpointer.pruned(0, 0)
    with torch.no_grad():
        layer.A.add_(1)
        layer.weight.add_(1)
    checkpointer.notes["after_step"].append(9.5)
    gate.set()
    checkpointer.end()
    again = RunCheckpoints(tmp_path)
    assert again.open_last()["notes"] == {"after_step": [7.5]}
    assert torch.equal(again.get("adapters")["0.A"], expected["A"])
    [base] = [tensor for name, tensor in again.get("block-000").items() if "q_proj" in name]
    assert torch.equal(base, expected["base"])


def test_the_state_of_an_optimizer_is_a_copy() -> None:
    """Its step counts lie in host memory, wherever the moments are."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    kept = state.optimizer_tensors(optimizer)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert kept["0.step"] == 1


@pytest.mark.usefixtures("slow")
def test_a_run_ends_with_all_its_checkpoints_written(tmp_path: Path) -> None:
    outcome(settings(), Checkpointer(RunCheckpoints(tmp_path / "thread"), 1, in_background=True))
    files = sorted(file.name for file in (tmp_path / "thread").iterdir())
    outcome(settings(), Checkpointer(RunCheckpoints(tmp_path / "none"), 1))
    assert files == sorted(file.name for file in (tmp_path / "none").iterdir())
    modes = {file.stat().st_mode for folder in ("thread", "none") for file in (tmp_path / folder).iterdir()}
    assert len(modes) == 1, "colleagues who may read one file of a run may read all"


@pytest.mark.usefixtures("slow")
def test_a_signal_stops_a_run_only_when_its_checkpoint_is_on_disk(tmp_path: Path) -> None:
    checkpointer = Checkpointer(RunCheckpoints(tmp_path), 1, in_background=True)
    checkpointer._stop = 15
    with pytest.raises(Interrupted):
        outcome(settings(), checkpointer)
    assert str(Checkpointer(RunCheckpoints(tmp_path)).progress) == "step 1, 1 blocks pruned"


def test_a_full_disk_ends_the_run_at_the_last_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = run_checkpoints.save_tensors, []

    def fill(tensors: Any, file: Path) -> None:
        if "block-001" in file.name:
            raise OSError(28, "No space left on device")
        written.append(file.name)
        write(tensors, file)

    monkeypatch.setattr(run_checkpoints, "save_tensors", fill)
    with pytest.raises(OSError, match="No space left"):
        outcome(settings(), Checkpointer(RunCheckpoints(tmp_path), 1, in_background=True))
    assert [name for name in written if "block" in name] == ["000001-block-000.safetensors.tmp"]
    assert str(Checkpointer(RunCheckpoints(tmp_path)).progress) == "step 1, 1 blocks pruned"


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_runs_on_a_gpu_write_in_the_background_if_their_blocks_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, offloaded: bool, trained: bool
) -> None:
    class Opened(Exception):  # noqa: N818 - the run has come far enough
        pass

    def opened(*given: Any) -> None:
        raise Opened(given[-1])

    monkeypatch.setattr(job, "Checkpointer", opened)
    monkeypatch.setattr(job.pretrained, "choose_device", lambda name: torch.device(device))
    config = Config(training=TrainingConfig(finetune=trained))
    with pytest.raises(Opened) as found:
        (run_offloaded if offloaded else job.run_in_memory)(config, tmp_path)
    assert found.value.args == (device == "cuda" and (trained or not offloaded),)
