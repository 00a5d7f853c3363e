"""Every figure of the dry run, and of what is held against disk and memory before a run, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.plans import PLAIN, SMALL, config
from oracle_tests.small_runs import arguments, make_place
from tiny_models.random_models import random_model, save_random_model
from torch_impl.engine import distributed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.config import parse
from torch_impl.experiment.planning import checks, dry_run, phases, show
from torch_impl.experiment.planning.checks import Disk
from torch_impl.experiment.planning.dry_run import Plan, Work, make_plan
from torch_impl.experiment.planning.parts import Parts, Peak, Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.traffic import CalibrationTraffic, StepTraffic, calibration_traffic, step_traffic


def _sizes(dtype: torch.dtype = torch.float32) -> Sizes:
    return Sizes.of(Decoder(random_model("llama-gqa")), dtype)


# --- disk, and the least memory ---

# LLaMA of three blocks: see test_memory. An adapter of one rank has `RANK` entries.
PROJECTIONS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
PARAMETERS = 257 * 32 + 32 + 3 * (PROJECTIONS + 2 * 32)
RANK = 3 * (2 * 64 + 2 * 48 + 3 * 80)


@pytest.mark.parametrize(
    ("changes", "block", "files", "written", "ranks"),
    [
        # Of each block two files, and three of one, of a window's two or of all that checkpoints may differ by; three checkpoints
        # of adapters.
        ({}, PROJECTIONS // 8, 2, 3, 7),
        ({"steps": 5}, PROJECTIONS // 8, 2, 3, 10),
        ({"prune_method": "sparsegpt"}, PROJECTIONS * 4, 2, 3, 7),
        ({"reconstruct_epochs": 1}, PROJECTIONS * 4, 2, 3, 7),
        ({"reconstruct_epochs": 1, "reconstruct_window": 2}, PROJECTIONS * 4, 3, 3, 7),
        ({"rank_shrink": "fold"}, PROJECTIONS * 4, 3, 3, 7),
        ({"prune_method": "pruner_zero"}, PROJECTIONS // 8, 3, 3, 7),
        ({"prune_method": "taylor", "sparsity_type": "structured"}, PROJECTIONS // 8, 3, 3, 7),
        ({"keep_points": 1}, PROJECTIONS // 8, 1, 2, 7),
        ({"keep_points": 4}, PROJECTIONS // 8, 2, 5, 7),
        ({"keep_points": 4, "rank_shrink": "fold"}, PROJECTIONS * 4, 5, 5, 7),
        ({"finetune": "false"}, PROJECTIONS // 8, 2, 3, 0),
    ],
)
def test_disk(changes: dict[str, Any], block: int, files: int, written: int, ranks: int) -> None:
    assert checks.disk(config(**changes), _sizes(), offloaded=False) == Disk(
        model=PARAMETERS * 4,
        # Value and two moments in float32.
        checkpoints=block * (3 * files + written) + written * 12 * ranks * RANK,
        report=2**20,
    )


def test_an_offloaded_run_resumes_from_the_model_that_it_writes() -> None:
    found = checks.disk(config(**PLAIN), _sizes(), offloaded=True)
    assert found == Disk(model=PARAMETERS * 4, checkpoints=0, report=2**20)
    assert found.total == PARAMETERS * 4 + 2**20
    windows = config(**PLAIN, reconstruct_epochs=1, reconstruct_window=2)
    # Two checkpoints and the one being written hold both blocks of a window.
    assert checks.disk(windows, _sizes(), offloaded=True).checkpoints == 3 * 2 * PROJECTIONS * 4


def test_least_memory() -> None:
    """Streams and adapters are not there at once: the larger of the two counts."""
    streams, adapters = 2 * 4 * 2 * 32 * 4, 7 * RANK * 16
    assert streams < adapters
    assert checks.least_memory(config(), _sizes()) == PARAMETERS * 4 + adapters
    assert checks.least_memory(config(finetune="false"), _sizes()) == PARAMETERS * 4 + streams
    assert checks.least_memory(config(nsamples=400), _sizes()) == PARAMETERS * 4 + 100 * streams


def test_too_little_of_either_is_refused_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama-gqa")
    some = config(nsamples=100, seqlen=10)
    (tmp_path / "left over").write_bytes(b"x" * 5000)
    there = 512 * (tmp_path / "left over").stat().st_blocks
    disk = checks.disk(some, _sizes(), offloaded=False).total
    free = {"disk": disk - there, "memory": checks.least_memory(some, _sizes())}
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free["disk"]}))
    monkeypatch.setattr(checks, "free_bytes", lambda device: free["memory"])
    checks.check(model, some, tmp_path)
    free["memory"] -= 1
    with pytest.raises(ValueError, match=r"device cpu: only 0\.00 GiB of memory are free"):
        checks.check(model, some, tmp_path)
    free["disk"] -= 1
    with pytest.raises(ValueError, match=r"output_dir losa-b-wanda-0\.7: only 0\.00\d GiB of disk are free"):
        checks.check(model, some, tmp_path)
    free.update(disk=3 * 2**30, memory=5 * 2**30)
    monkeypatch.setattr(checks, "least_memory", lambda *_: 6 * 2**30)
    with pytest.raises(ValueError, match=r"5\.00 GiB of memory are free, but the run needs at least 6\.00 GiB"):
        checks.check(model, some, tmp_path)
    with pytest.raises(ValueError, match=r"3\.000 GiB of disk are free, but the run needs about 7\.500 GiB \(so\)"):
        checks.check_disk(15 * 2**29, "so", some, tmp_path / "nothing here")


# --- the plan ---

TEXTS = {"calibration_data": "alpaca-gpt4", "finetune_data": "c4", "eval_data": "wikitext2"}


@pytest.fixture
def much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory on every device."""
    monkeypatch.setattr("torch_impl.experiment.planning.parts.free_bytes", lambda device: 10**12)


def plan(place: Path, **changes: object) -> Plan:
    return make_plan(parse(arguments(place, **{**SMALL, "rmi_samples": 3, **TEXTS, "dry_run": "true", **changes})))


def test_a_plan(tmp_path: Path, much: None) -> None:
    place = make_place(tmp_path)
    found = plan(place)
    some = found.config
    assert found == Plan(
        config=some,
        family="gated",
        device="cpu",
        dtype="float32",
        cards=1,
        blocks=3,
        parameters=PARAMETERS,
        prunable=3 * PROJECTIONS,
        # 0.7 (1 − (1 − t/2)³)
        sparsity=(0.7 * 7 / 8, 0.7),
        ranks=(6, 7),
        memory=peak(some, _sizes(), Place("cpu")),
        step_traffic=StepTraffic(0, 0),
        calibration_traffic=CalibrationTraffic(0, 0, 0, 0, 0),
        disk=checks.disk(some, _sizes(), offloaded=False),
        work=Work(
            # A multiplication and an addition for each weight: once to measure importance, three times to prune.
            sweeps=2 * 2 * 3 * PROJECTIONS * (3 * 2 + 3 * 4 * 2),
            reconstruction=0,
            # Forward, and backward for twice that.
            training=6 * 3 * PROJECTIONS * 8 * 2,
        ),
    )


def test_work_of_other_plans(tmp_path: Path, much: None) -> None:
    place = make_place(tmp_path)
    assert plan(place, loss="kl", reconstruct_epochs=5, reconstruct_batch_size=3).work == Work(
        sweeps=2 * 2 * 3 * PROJECTIONS * (3 * 2 + 3 * 4 * 2),
        reconstruction=2 * 6 * 3 * PROJECTIONS * 4 * 2 * 5,
        training=8 * 3 * PROJECTIONS * 8 * 2,
    )
    # Windows of one, two and two blocks; the waiting stream, and one more pass after each later training.
    assert plan(place, reconstruct_epochs=5, reconstruct_batch_size=3, reconstruct_window=2).work == Work(
        sweeps=2 * 2 * 3 * PROJECTIONS * (3 * 2 + 5 * 4 * 2),
        reconstruction=2 * 6 * 5 * PROJECTIONS * 4 * 2 * 5,
        training=6 * 3 * PROJECTIONS * 8 * 2,
    )
    assert plan(place, layer_sparsity="uniform", finetune="false").work == Work(
        sweeps=2 * 2 * 3 * PROJECTIONS * 3 * 4 * 2, reconstruction=0, training=0
    )
    # Gradients of the calibration sequences: forward, forward again and backward, which counts as two.
    for options in ({"prune_method": "pruner_zero"}, {"prune_method": "taylor", "sparsity_type": "structured"}):
        assert plan(place, layer_sparsity="uniform", finetune="false", **options).work == Work(
            sweeps=2 * 2 * 3 * PROJECTIONS * 7 * 4 * 2, reconstruction=0, training=0
        )


def test_a_plan_of_an_offloaded_run(tmp_path: Path, much: None) -> None:
    found = plan(make_place(tmp_path), **PLAIN, offload="on", dtype="bfloat16")
    assert found.memory == peak(found.config, _sizes(torch.bfloat16), Place("cpu"))
    assert (found.memory.offloaded, found.dtype, found.ranks) == (True, "bfloat16", ())
    assert found.disk == Disk(model=PARAMETERS * 2)


def test_a_plan_for_several_gpus(tmp_path: Path, much: None) -> None:
    """Of GPUs that need not be here; of this machine's CPU, if it is asked for."""
    place = make_place(tmp_path)
    for device, kind in (("auto", "cuda"), ("cpu", "cpu")):
        found = plan(place, device=device, devices=2, dtype="float32")
        some = found.config
        assert (found.cards, found.device) == (2, kind)
        assert found.memory == peak(some, _sizes(), Place(kind, 2))
        assert found.step_traffic == step_traffic(some, _sizes(), 2)
        assert found.calibration_traffic == calibration_traffic(some, _sizes(), 2)
    assert plan(place, device="auto", devices=2).dtype == "float32", "that of the model's files"
    single, other = (plan(place, device="cpu", **more) for more in ({"devices": 1}, {}))
    assert single == replace(other, config=single.config)


def test_launched_processes_are_planned_for(tmp_path: Path, much: None, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    monkeypatch.setattr(distributed, "launched", lambda: 3)
    found = plan(place, device="cpu")
    assert (found.cards, found.memory) == (3, peak(found.config, _sizes(), Place("cpu", 3)))
    assert not dry_run.offloads(parse(arguments(place, **PLAIN)))
    for changes, named in (
        ({**PLAIN, "offload": "on"}, "offload is 'on'"),
        ({"hold_merged": "on"}, "hold_merged is 'on'"),
    ):
        with pytest.raises(ValueError, match=named):
            dry_run.offloads(parse(arguments(place, **changes)))
        with pytest.raises(ValueError, match=named):
            plan(place, **changes)
    assert plan(place, device="cpu", **PLAIN, hold_merged="on").cards == 3, "nothing is trained"


def test_a_tied_head_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where config.json alone is known, as of a hub id."""
    folder = save_random_model(tmp_path / "model", "llama-gqa")
    assert make_plan(config(model=folder)).parameters == PARAMETERS
    monkeypatch.setattr(pretrained, "local_folder", lambda name, weights: folder)
    assert make_plan(config(model="some/where")).parameters == PARAMETERS


# --- as text ---

GIB = 2**30
SHOWN = Plan(
    config=config(nsamples=128, calibration_data="c4", eval_data="wikitext2", output_dir="out", steps=2),
    family="gated",
    device="cuda",
    dtype="bfloat16",
    cards=1,
    blocks=32,
    parameters=1_234_567,
    prunable=1_000_000,
    sparsity=(0.6125, 0.70000001),
    ranks=(6, 7),
    memory=Peak(False, "training", Parts(weights=3 * GIB, dense_copy=GIB // 2), Parts(masks=GIB)),
    step_traffic=StepTraffic(5 * GIB, GIB),
    calibration_traffic=CalibrationTraffic(1 * GIB, 2 * GIB, 3 * GIB, 4 * GIB, 5 * GIB),
    disk=Disk(model=5 * GIB // 4, checkpoints=2 * GIB, report=GIB),
    work=Work(sweeps=25 * 10**11, reconstruction=0, training=10**12),
)


def test_a_plan_as_text() -> None:
    assert show.plan_text(SHOWN).splitlines() == [
        "model                           a/b",
        "family                          gated",
        "device                          cuda",
        "dtype                           bfloat16",
        "blocks                          32",
        "parameters                      1,234,567",
        "prunable weights                1,000,000",
        "pruning                         wanda, unstructured, rmi rates",
        "sparsity after each step        [0.6125, 0.7]",
        "mean rank of each step          [6, 7]",
        "calibration                     128 × 2 tokens of c4",
        "fine-tuning                     8 × 2 tokens of stdlib, shares [0.1, 0.9], 3 optimizer steps, loss ce, "
        "learning rate 0.0002",
        "evaluation                      windows of 2 tokens of wikitext2",
        "weights                         in memory",
        "peak memory in                  training",
        "device memory                   3.50 GiB at the peak (estimated):",
        "  weights                           3.00 GiB",
        "  dense copy                        0.50 GiB",
        "host memory                     1.00 GiB at the peak (estimated):",
        "  masks                             1.00 GiB",
        "disk                            4.25 GiB at the peak (estimated):",
        "  merged model                      1.25 GiB",
        "  checkpoints to resume from        2.00 GiB",
        "  report                            1.00 GiB",
        "work, sweeps                        2.50 TFLOP",
        "work, training                      1.00 TFLOP",
        "output                          out",
    ]


def test_a_plan_for_many_cards_as_text() -> None:
    lines = show.plan_text(replace(SHOWN, cards=8)).splitlines()
    assert "weights                         in memory, 1/8 of the rows on each card" in lines
    start = lines.index("memory of each of 8 cards       3.50 GiB at the peak (estimated):")
    assert lines[start + 3 : start + 14] == [
        "host memory of each process     1.00 GiB at the peak (estimated):",
        "  masks                             1.00 GiB",
        "received by each in an optimizer step",
        "  weights                           5.00 GiB",
        "  gradients                         1.00 GiB",
        "received by each in the calibration of a step",
        "  weights                           1.00 GiB",
        "  pruned weights                    2.00 GiB",
        "  statistics                        3.00 GiB",
        "  gradients of reconstruction       4.00 GiB",
        "  features                          5.00 GiB",
    ]
    plain = show.plan_text(replace(SHOWN, cards=8, config=config(finetune="false")))
    assert "optimizer step" not in plain
    assert "fine-tuning                     none" in plain


def test_other_plans_as_text() -> None:
    trained = config(nsamples=4, reconstruct_epochs=5, reconstruct_batch_size=3)
    # Batches of 6: 1 sequence, then 11; an optimizer step does not reach into the next part.
    lines = show.plan_text(replace(SHOWN, config=config(train_examples=12))).splitlines()
    assert [line for line in lines if "shares [0.1, 0.9], 3 optimizer steps, loss ce" in line]
    assert (
        "reconstruction                  5 epochs of each block at each step, 10 optimizer steps, learning rate 0.003"
        in show.plan_text(replace(SHOWN, config=trained)).splitlines()
    )
    # Of four sequences and four that the model writes.
    written = config(nsamples=4, written_per_sample=1, reconstruct_epochs=5, reconstruct_batch_size=3)
    assert "5 epochs of each block at each step, 15 optimizer steps" in show.plan_text(replace(SHOWN, config=written))
    windows = replace(trained, reconstruction=replace(trained.reconstruction, reconstruct_window=2))
    assert "5 epochs of each window of 2 blocks at each step" in show.plan_text(replace(SHOWN, config=windows))
    ends = config(finetune="false", prune_method="magnitude")
    ends = replace(ends, prune=replace(ends.prune, dense_blocks=[2, 1]))
    lines = show.plan_text(replace(SHOWN, config=ends)).splitlines()
    assert (
        "pruning                         magnitude, unstructured, uniform rates, not the first 2 and last 1 blocks"
        in lines
    )
    offloaded = replace(SHOWN.memory, offloaded=True, phase="pruning")
    lines = show.plan_text(replace(SHOWN, memory=offloaded)).splitlines()
    assert "weights                         offloaded: one block at a time from disk" in lines
    assert "peak memory in                  the pruning sweep" in lines


def test_a_plan_says_how_many_windows_are_measured_and_rounds_no_hours_to_none() -> None:
    few = config(eval_windows=1234, eval_data="wikitext2", eval_seqlen=64)
    lines = show.plan_text(replace(SHOWN, config=few)).splitlines()
    assert "evaluation                      the first 1,234 windows of 64 tokens of wikitext2" in lines
    assert (show._hours(0.004), show._hours(0.0125), show._hours(7.0)) == ("less than 0.01", "0.01", "7.00")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0.00 MiB"),
        (3 * 2**19, "1.50 MiB"),
        (10 * 2**20, "10.00 MiB"),
        (11 * 2**20, "0.01 GiB"),
        (7 * 2**29, "3.50 GiB"),
    ],
)
def test_sizes_are_binary(count: int, shown: str) -> None:
    assert show._size(count) == shown


def test_everything_that_a_plan_may_hold_has_a_name() -> None:
    """All parts, and all phases."""
    assert show.PARTS.keys() == Parts.__dataclass_fields__.keys()
    assert show.DISK.keys() == Disk.__dataclass_fields__.keys()
    assert show.WORK.keys() == Work.__dataclass_fields__.keys()
    assert show.STEP.keys() == StepTraffic.__dataclass_fields__.keys()
    assert show.CALIBRATION.keys() == CalibrationTraffic.__dataclass_fields__.keys()
    every = config(reconstruct_epochs=1, prune_method="pruner_zero")
    in_memory = set(phases.phases(every, _sizes(), Place("cuda")))
    assert show.PHASES.keys() == in_memory | {"dense", "pruning", "verifying"}
