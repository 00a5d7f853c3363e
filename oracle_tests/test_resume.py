"""Runs that are stopped in any way resume to the same bits; what they do when something is wrong."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from oracle_tests.interruptions import Counting, Stop, flip, outcome, same, settings, tiny
from oracle_tests.small_runs import ROOT, arguments, events
from tiny_models.random_models import random_model
from torch_impl import losa
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import adapters, attach_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.resume import state
from torch_impl.engine.resume.checkpointer import Checkpointer, Interrupted, Progress
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.resume.run_folder import run_folder
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment import job
from torch_impl.experiment.planning import checks
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.run import main

# --- state ---


def test_base_weights_are_one_bit_each_where_that_says_all() -> None:
    dense = random_model("llama-gqa")
    family = Decoder(dense).family
    model = copy.deepcopy(dense)
    attach_adapters(Decoder(model), 1.0)
    block, dense_block = Decoder(model).blocks[0], Decoder(dense).blocks[0]
    first, second, third = list(family.projections)[:3]
    with torch.no_grad():
        for layer in adapters(block):
            layer.weight.mul_(torch.rand(layer.weight.shape) < 0.5).add_(0.0)
        block.get_submodule(second).weight[0, 0] += 1
        block.get_submodule(third).weight[0, 0] = -0.0
    tensors = state.block_tensors(block, dense_block, family)
    assert tensors[f"{first}.mask"].nbytes * 8 == block.get_submodule(first).weight.numel()
    assert {f"{second}.weight", f"{third}.weight"} <= set(tensors)
    fresh = copy.deepcopy(dense)
    attach_adapters(Decoder(fresh), 1.0)
    restored = Decoder(fresh).blocks[0]
    state.restore_block(restored, dense_block, family, tensors)
    for layer, other in zip(adapters(restored), adapters(block), strict=True):
        assert torch.equal(layer.weight.view(torch.int32), other.weight.view(torch.int32))


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> list[float]:
        numpy = (np.random.normal(), np.random.random())  # noqa: NPY002 - of two normal numbers drawn, one waits
        return [float(torch.rand(())), *numpy, random.random(), random.gauss()]

    draw()
    kept = state.random_tensors()
    expected = draw()
    draw()
    state.restore_random(kept)
    assert draw() == expected


def test_without_a_checkpoint_the_files_that_grow_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of an attempt that got nowhere\n")
    Checkpointer(RunCheckpoints(tmp_path / "none"), attached=(tmp_path / "metrics.jsonl",)).restore_attached()
    assert not (tmp_path / "metrics.jsonl").exists()


# --- Algorithm 1 ---


@pytest.mark.parametrize(
    ("method", "pattern", "every", "epochs"),
    [
        ("wanda", "unstructured", 1, 0),
        ("sparsegpt", "mixed-2:4", 3, 0),
        ("wanda", "unstructured", 2, 1),
        ("pruner_zero", "2:4", 3, 0),
        ("wanda", "structured", 3, 1),
        ("taylor", "structured", 3, 1),
    ],
)
def test_a_run_goes_on_from_any_point_to_the_same_bits(
    tmp_path: Path, method: str, pattern: str, every: int, epochs: int
) -> None:
    """With reconstruction in windows of two blocks a checkpoint holds both of them."""
    setup = replace(settings(method, pattern), reconstruction=ReconstructionConfig(epochs, 1e-2, 4, 2))
    plain = outcome(setup)
    counted = Counting(tmp_path / "all")
    assert same(outcome(setup, counted), plain), "writing checkpoints changes nothing"
    # Gradients are those of the whole model before a step, so its blocks are saved together.
    blocks = 1 if method in ("pruner_zero", "taylor") else len(plain[0][0]["sparsity"])
    # Every block, every optimizer step and the end of both steps.
    assert counted.count == 2 * blocks + sum(len(record["losses"]) for record in plain[0]) + 2
    for stop in range(1, counted.count, every):
        folder = tmp_path / str(stop)
        with pytest.raises(Stop):
            outcome(setup, Counting(folder, stop))
        torch.manual_seed(stop)
        assert same(outcome(setup, Checkpointer(RunCheckpoints(folder))), plain), f"stopped at checkpoint {stop}"


def test_a_run_that_stops_at_every_point_ends_too(tmp_path: Path) -> None:
    setup = settings()
    plain = outcome(setup)
    for _ in range(40):
        try:
            found = outcome(setup, Counting(tmp_path, 1))
        except Stop:
            continue
        assert same(found, plain)
        return
    pytest.fail("no progress")


@pytest.mark.parametrize(("every", "of_training"), [(1, 2 + 3), (2, 1 + 2), (100, 1 + 1)])
def test_every_so_many_optimizer_steps_and_the_last_of_a_step_are_saved(
    tmp_path: Path, every: int, of_training: int
) -> None:
    counted = Counting(tmp_path, save_every=every)
    records = outcome(settings(), counted)[0]
    assert [len(record["losses"]) for record in records] == [2, 3]
    blocks = len(records[0]["sparsity"])
    assert counted.count == 2 * blocks + of_training + 2


def test_damage_to_a_file_of_any_kind_goes_back_one_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file keeps its size, so only its SHA-256 reveals the change; three blocks and two optimizer steps are saved."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("one event")
    with pytest.raises(Stop):
        outcome(settings(), Counting(tmp_path / "points", 5, attached=(metrics,)))
    whole = RunCheckpoints(tmp_path / "points")
    whole.open_last()
    names = {"adapters", "block-000", "block-001", "block-002", "optimizer", "random"}
    assert set(whole.parts) == {"metrics.jsonl", *(f"{name}.safetensors" for name in names)}
    assert len(Checkpointer(whole).progress.losses) == 2
    for part, entry in whole.parts.items():
        damaged = shutil.copytree(tmp_path / "points", tmp_path / f"damaged {part}")
        flip(damaged / entry.file)
        assert len(Checkpointer(RunCheckpoints(damaged)).progress.losses) == 1, f"a damaged {part} is used"
        assert f"{entry.file} does not match its SHA-256" in caplog.text


def test_base_weights_that_took_over_dropped_ranks_are_written(tmp_path: Path) -> None:
    dense, other = (tiny()[0] for _ in range(2))
    model = copy.deepcopy(dense)
    for one in (model, other):
        attach_adapters(Decoder(one), 1.0)
    checkpointer = Checkpointer(RunCheckpoints(tmp_path))
    checkpointer.begin(Decoder(model), Decoder(dense), Progress())
    for layer in adapters(model):
        layer.set_base(layer.weight + 1)
    checkpointer.resized(base_moved=True)
    checkpointer.noted()
    Checkpointer(RunCheckpoints(tmp_path)).begin(Decoder(other), Decoder(dense), Progress())
    for ours, theirs in zip(adapters(other), adapters(model), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_progress_in_words() -> None:
    """A run of two steps that had ended was resumed at step 3."""
    assert str(Progress()) == "step 1, 0 blocks pruned"
    assert str(Progress(step=2, block=3, records=[{}])) == "step 2, 3 blocks pruned"
    assert str(Progress(step=2, block=3, records=[{}], losses=[1.0])) == "step 2, 1 optimizer steps done"
    assert str(Progress(step=3, records=[{}, {}])) == "the end of step 2"


# --- the command line ---


def weights(place: Path, name: str = "out") -> dict[str, torch.Tensor]:
    return load_file(place / name / "model" / "model.safetensors")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_at_the_next_point_and_the_run_goes_on(
    place: Path, at_clip: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_impl.experiment.report_page.write", lambda *_: None)
    # Ten seconds pass between two looks at the clock: to the dense and the one-shot model, to each step, and to the end.
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=itertools.count(step=10.0).__next__))
    assert main(arguments(place, output_dir=place / "whole")) == 0
    for name, number in (("SIGINT", signal.SIGINT), ("SIGTERM", signal.SIGTERM)):
        at_clip(2, lambda _, number=number: os.kill(os.getpid(), number))
        assert main(arguments(place, resume=name == "SIGTERM")) == 128 + number
        said = capsys.readouterr().err
        assert f"interrupted by {name}" in said
        assert "--resume" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (place / "out").exists()
    at_clip(0, lambda _: None)

    assert main(arguments(place)) == 2
    said = capsys.readouterr().err
    assert "unfinished run" in said
    assert "--resume" in said
    assert main(arguments(place, resume="true", learning_rate=5e-3, prune_method="magnitude")) == 2
    said = capsys.readouterr().err
    assert "learning_rate is 0.005, the run began with 0.01; prune_method is 'magnitude', the run began" in said
    assert main(arguments(place, resume="true")) == 0
    assert all(torch.equal(tensor, weights(place)[name]) for name, tensor in weights(place, "whole").items())
    assert events(place) == events(place, "whole")
    results = [json.loads((place / name / "losa_result.json").read_text()) for name in ("whole", "out")]
    assert [result["seconds_in_all"] for result in results] == [50, 50], "what was done before it was stopped counts"
    assert {entry.name for entry in place.iterdir()} == {"model", "text.txt", "whole", "out"}
    assert {entry.name for entry in (place / "out").iterdir()} == {
        "model", "losa_config.toml", "environment.json", "metrics.jsonl", "steps.json", "losa_result.json"
    }  # fmt: skip
    assert main(arguments(place, resume="true")) == 2
    assert "its run is finished" in capsys.readouterr().err


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_at_once(place: Path, at_clip: Callable, capsys: pytest.CaptureFixture) -> None:
    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still there")

    at_clip(1, twice)
    assert main(arguments(place)) == 130
    assert "error: interrupted; progress saved in" in capsys.readouterr().err


def test_nan_stops_with_the_state_kept_and_a_lower_rate_can_go_on(
    place: Path, at_clip: Callable, capsys: pytest.CaptureFixture
) -> None:
    def poison(parameters: list[nn.Parameter]) -> None:
        assert parameters[0].grad is not None
        parameters[0].grad[0, 0] = float("nan")

    at_clip(2, poison)
    assert main(arguments(place)) == 2
    said = capsys.readouterr().err
    for words in ("optimizer step", "gradient norm nan", "lower learning_rate", "--resume", "--accept_changes"):
        assert words in said
    changed = {"resume": "true", "learning_rate": 5e-3, "accept_changes": "learning_rate"}
    assert main(arguments(place, **changed)) == 0
    rates = [event["learning_rate"] for event in events(place) if event["event"] == "train"]
    assert max(rates[1:]) <= 5e-3
    assert main(arguments(place, accept_changes="seed")) == 2
    assert "accept_changes is seed; allowed: learning_rate" in capsys.readouterr().err


def test_a_hessian_that_will_not_factor_later_keeps_the_state(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plain, calls = losa.masks.prune_prepared, []

    def prune(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 60:
            raise ValueError("hessian is not positive definite with damping 0.01, 0.1, 1")
        return plain(*given, **named)

    monkeypatch.setattr(losa.masks, "prune_prepared", prune)
    assert main(arguments(place, prune_method="sparsegpt")) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"block \d, \S+, 6 calibration sequences: hessian is not .* damping 0.01, 0.1, 1; .*--resume", said
    )
    assert main(arguments(place, prune_method="sparsegpt", resume="true")) == 0


def test_exploding_gradients_are_clipped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3e4, 4e4])
    training._clip([parameter], 1.0, TrainingConfig(max_grad_norm=1.0), "train 1/2, optimizer step 3")
    assert float(parameter.grad.norm()) == pytest.approx(1.0)
    assert "train 1/2, optimizer step 3: gradient norm 5e+04, clipped to 1" in caplog.text


def test_without_clipping_nothing_is_said_to_be_clipped(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3e4, 4e4])
    training._clip([parameter], 1.0, TrainingConfig(max_grad_norm=0), "step 3")
    assert parameter.grad.tolist() == [3e4, 4e4]
    assert not caplog.text
    with pytest.raises(FloatingPointError, match=r"lower learning_rate .*set max_grad_norm \(now 0, no clipping\)"):
        training._clip([parameter], float("nan"), TrainingConfig(max_grad_norm=0), "step 3")


def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with run_folder(target, False, False) as folder:
        (folder / "file").write_text("x")
        command = (
            "import sys; from pathlib import Path; from torch_impl.engine.resume.run_folder import run_folder\n"
            "try:\n    with run_folder(Path(sys.argv[1]), False, True): pass\n"
            "except ValueError as error: print(error)"
        )
        other = subprocess.run(
            [sys.executable, "-c", command, str(target)], capture_output=True, text=True, cwd=ROOT, timeout=120
        )
        assert "in use by another process" in other.stdout
    assert [entry.name for entry in target.iterdir()] == ["file"]


def test_too_little_disk_or_memory_is_told_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(checks.shutil, "disk_usage", lambda _: usage)
        assert main(arguments(place)) == 2
    assert re.search(r"output_dir .*GiB of disk are free, but the run needs about", capsys.readouterr().err)
    monkeypatch.setattr(checks, "free_bytes", lambda _: 50_000)
    assert main(arguments(place)) == 2
    assert re.search(r"device cpu: .*GiB of memory are free, but the run needs", capsys.readouterr().err)
    assert {entry.name for entry in place.iterdir()} == {"model", "text.txt"}


def test_the_disk_estimate_covers_what_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With full base weights in every checkpoint: SparseGPT and folding."""
    largest = 0

    class Watching(RunCheckpoints):
        def commit(self, given: Any) -> int:
            nonlocal largest
            number = super().commit(given)
            largest = max(largest, sum(file.stat().st_size for file in self._folder.iterdir()))
            return number

    monkeypatch.setattr("torch_impl.experiment.job.RunCheckpoints", Watching)
    options = arguments(place, prune_method="sparsegpt", rank_shrink="fold", save_every=1)
    assert main(options) == 0
    from torch_impl.experiment.config import parse

    model = random_model("llama-gqa")
    estimate = checks.disk(parse(options), Sizes.of(Decoder(model), torch.float32), offloaded=False)
    assert largest <= estimate.checkpoints + estimate.report <= 20 * largest


def test_an_interruption_is_a_keyboard_interrupt() -> None:
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_a_handful_of_faults() -> None:
    """Some faults that only another process can survive; `make faults` has more."""
    done = subprocess.run(
        [sys.executable, "-m", "oracle_tests.programs.faults", "--faults", "6", "--seed", "3"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^in all +6 .* 0$", done.stdout, re.MULTILINE)
