"""Every figure of the dry run, and of what is held against disk and memory before a run, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.small_runs import arguments, make_place
from oracle_tests.tiny_material import SIZES
from tiny_models.random_models import random_model, save_random_model
from torch_impl.engine import memory
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.planning import checks, dry_run, footprint, scaling
from torch_impl.experiment.planning.sizes import Sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# What is held besides, in the phases of `SIZES`: two bytes for each of 1000 weights; at step 2, seven ranks.
BOTH = {"weights": 2000, "dense copy": 2000}
ADAPTERS = {"adapters and optimizer": 7 * 70 * 4 * 4}
SMALL = {
    "nsamples": 4, "seqlen": 2, "calibration_batch_size": 2, "eval_seqlen": 2, "eval_batch_size": 1, "steps": 2,
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "train_examples": 8, "train_seqlen": 2,
}  # fmt: skip
PLAIN = {"steps": 1, "finetune": "false"}


def config(**changes: object) -> Config:
    options = {"model": "a/b", **SMALL, **changes}
    return parse([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by kind of device."""
    bytes_free = {"cpu": 10**12, "cuda": 10**12}
    for module in (footprint, memory):
        monkeypatch.setattr(module, "free_bytes", lambda device: bytes_free[device.type])
    return bytes_free


# --- one device, all in memory ---

TRAINED = {
    # 150 tokens in each of two blocks, 240 bytes each (test_memory); the loss takes 4 bytes a logit, and 8 in part.
    "merged weights": 520 * 2,
    "activations": 150 * 240 * 2,
    "loss or a block's backward": 150 * 17 * (4 + 8),
}
# Blocks compiled, or computed again in backward: see test_memory.
CASES: list[tuple[str, dict[str, Any], torch.device, str, dict[str, int]]] = [
    (
        "calibration", {"nsamples": 64, "seqlen": 32}, CPU, "calibration",
        {**BOTH, **ADAPTERS, "merged weights of a block": 600, "streams of hidden states": 2 * 64 * 32 * 8 * 2,
         "work on a block": 2 * 32 * 72 * 2},
    ),
    (
        "calibration in large batches", {"nsamples": 64, "seqlen": 32, "calibration_batch_size": 100}, CPU, "calibration",
        {**BOTH, **ADAPTERS, "merged weights of a block": 600, "streams of hidden states": 2 * 64 * 32 * 8 * 2,
         "work on a block": 64 * 32 * 72 * 2},
    ),
    (
        "in one step nothing is merged meanwhile", {"nsamples": 64, "seqlen": 32, **PLAIN}, CPU, "calibration",
        {**BOTH, "streams of hidden states": 2 * 64 * 32 * 8 * 2, "work on a block": 2 * 32 * 72 * 2},
    ),
    (
        "logits of evaluation", {"eval_seqlen": 700, "eval_batch_size": 5}, CPU, "evaluation",
        {**BOTH, **ADAPTERS, "logits or work on a block": 5 * 700 * 72 * 2},
    ),
    (
        "one window of evaluation", {"eval_seqlen": 3500}, CPU, "evaluation",
        {**BOTH, **ADAPTERS, "logits or work on a block": 17 * 3500 * (2 + 8)},
    ),
    (
        "verification", {"eval_seqlen": 3500, **PLAIN}, CPU, "verification",
        {"weights": 2000, "reloaded weights": 2000, "logits or work on a block": 17 * 3500 * 10, "masks": 520},
    ),
    (
        "reconstruction", {"nsamples": 64, "seqlen": 32, "reconstruct_epochs": 1, "reconstruct_batch_size": 100}, CPU,
        "reconstruction",
        # Of each weight of the larger block 16 bytes, two merged, a rounded one with its gradient, a mask; of each token 240
        # and its error twice in float32.
        {**BOTH, **ADAPTERS, "streams of hidden states": 2 * 64 * 32 * 8 * 2,
         "training of a block": 280 * (16 + 4 + 4 + 1) + 64 * 32 * (240 + 2 * 4 * 8)},
    ),
    ("training", {"train_seqlen": 50}, CPU, "training", {**BOTH, **ADAPTERS, **TRAINED}),
    (
        "training with the dense model's predictions", {"loss": "kl", "train_seqlen": 50}, CPU, "training",
        {**BOTH, **ADAPTERS, **TRAINED, "loss or a block's backward": 150 * 17 * (3 * 2 + 4 * 4)},
    ),
    (
        "training without held weights", {"hold_merged": "off", "train_seqlen": 50}, CPU, "training",
        {**BOTH, **ADAPTERS, **{name: amount for name, amount in TRAINED.items() if name != "merged weights"}},
    ),
    (
        "checkpointed activations", {"gradient_checkpointing": "true", "train_seqlen": 99}, CPU, "training",
        # A hidden state of each token in each block; one block's activations and gradient are more than the loss.
        {**BOTH, **ADAPTERS, "merged weights": 1040, "activations": 297 * 8 * 2 * 2,
         "loss or a block's backward": 297 * 240 + 96 * 2},
    ),
    (
        "compiled blocks", {"compile_blocks": "on", "train_seqlen": 99}, CPU, "training",
        {**BOTH, **ADAPTERS, "merged weights": 1040, "activations": 297 * (16 + 24 + 2 * 12) * 2 * 2,
         "loss or a block's backward": 297 * 17 * 12},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "device", "phase", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_phase_that_takes_most(
    changes: dict[str, Any], device: torch.device, phase: str, parts: dict[str, int], free: dict[str, int]
) -> None:
    found = footprint.footprint(config(offload="off", **changes), SIZES, device)
    assert (found.streamed, found.phase, found.device, found.host) == (False, phase, parts, parts)
    assert found.device_bytes == found.host_bytes == sum(parts.values())


def test_a_gradient_as_a_whole_matrix_may_be_more_than_the_loss(free: dict[str, int]) -> None:
    """One token, whose loss takes 204 bytes, or 22 a logit; a gradient of 96 weights, and a merged weight that is not held."""
    one = {"train_seqlen": 2, "per_device_train_batch_size": 1}
    for changes, expected in (({}, 408), ({"hold_merged": "off"}, 408), ({"loss": "kl"}, 2 * 17 * 22)):
        assert footprint._training(config(**one, **changes), SIZES, CPU)["loss or a block's backward"] == expected
    large = replace(SIZES, largest_projection=300)
    for changes, expected in (({}, 600), ({"hold_merged": "off"}, 1200)):
        assert footprint._training(config(**one, **changes), large, CPU)["loss or a block's backward"] == expected


def test_on_a_gpu_merged_weights_are_held_if_half_of_what_is_free_suffices(free: dict[str, int]) -> None:
    large = {"train_seqlen": 99}
    free["cuda"] = 2 * 2000 + 2 * 520 * 2
    found = footprint.footprint(config(**large), SIZES, CUDA)
    assert found.device["merged weights"] == 520 * 2
    assert found.host == {"weights": 2000, "masks": 520}, "the model is read and saved, masks are kept there"
    free["cuda"] -= 1
    assert "merged weights" not in footprint.footprint(config(**large), SIZES, CUDA).device
    assert "merged weights" in footprint.footprint(config(hold_merged="on", **large), SIZES, CUDA).device
    compiled = footprint.footprint(config(compile_blocks="on", **large), SIZES, CUDA).device
    assert compiled["activations"] == 297 * (16 + 24 + 12) * 2 * 2, "one product of the MLP is made again"
    again = footprint.footprint(config(compile_blocks="on", gradient_checkpointing="true", **large), SIZES, CUDA).device
    assert again["loss or a block's backward"] == max(297 * 17 * 12, 297 * (16 + 24 + 2 * 12) * 2 + 2 * 96 * 2)


# --- one device, block by block ---


def test_what_does_not_fit_is_left_on_disk_if_the_run_can_do_that(free: dict[str, int]) -> None:
    plain = config(**PLAIN)
    needed = footprint.footprint(config(offload="off", **PLAIN), SIZES, CUDA)
    for kind, amount in (("cuda", needed.device_bytes), ("cpu", needed.host_bytes)):
        free[kind] = -(-amount * 10 // 9)
        assert not footprint.footprint(plain, SIZES, CUDA).streamed, f"just fits {kind}"
        free[kind] -= 2
        assert footprint.footprint(plain, SIZES, CUDA).streamed, f"just does not fit {kind}"
        assert not footprint.footprint(config(), SIZES, CUDA).streamed, "not with fine-tuning"
        assert not footprint.footprint(config(offload="off", **PLAIN), SIZES, CUDA).streamed
        free[kind] = 10**12
    assert footprint.footprint(config(offload="on", **PLAIN), SIZES, CUDA).streamed


def test_a_run_block_by_block(free: dict[str, int]) -> None:
    """Outside the blocks 200 weights, two blocks of 300; hidden states of 16 bytes a token."""
    some = {
        "offload": "on",
        "nsamples": 10,
        "seqlen": 3,
        "rmi_samples": 6,
        "eval_seqlen": 7,
        "eval_windows": 3,
        **PLAIN,
    }
    work = 96 * 47
    base = {"outside the blocks": 400, "a block and the next": 1200, "work on a block": work}
    found = footprint.footprint(config(**some), SIZES, CUDA)
    assert (found.streamed, found.phase) == (True, "pruning sweep")
    assert found.device == {**base, "streams of hidden states": 16 * (2 * 30 + 2 * 7)}
    assert found.host == {"a block read and one written": 1200, "streams of hidden states": 0}
    found = footprint.footprint(config(**some), SIZES, CPU)
    assert found.host == {**found.device, "a block written": 600}

    found = footprint.footprint(config(**{**some, "eval_windows": 9}), SIZES, CUDA)
    assert found.phase == "verifying sweep"
    verifying = {**base, "outside the blocks": 800, "streams of hidden states": 16 * (63 + 14)}
    assert found.device == verifying
    without = config(**{**some, "eval_seqlen": 2, "eval_windows": 60000})
    free["cuda"] = 1200 + work + 400 + 16 * 4 + 10
    found = footprint.footprint(without, SIZES, CUDA)
    assert found.device["streams of hidden states"] <= 16 * 4, "what finds no room is kept by the host"
    assert found.host["streams of hidden states"] >= 16 * 120000
    free["cuda"] = 10**12
    dense = footprint.footprint(config(**{**some, "rmi_samples": 10, "seqlen": 30}), SIZES, CUDA)
    assert dense.device["streams of hidden states"] == 16 * (2 * 300 + 14)
    endless = config(**{name: value for name, value in some.items() if name != "eval_windows"})
    assert footprint.footprint(endless, SIZES, CUDA).device["streams of hidden states"] == 16 * (340_000 + 14)
    trained = config(reconstruct_epochs=2, reconstruct_batch_size=4, **some)
    assert footprint.footprint(trained, SIZES, CUDA).device["work on a block"] == max(
        work, 280 * 25 + 4 * 3 * (240 + 64)
    )


# --- disk, and the least memory ---

# LLaMA of three blocks: see test_memory. An adapter of one rank has `RANK` entries.
PROJECTIONS = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
PARAMETERS = 257 * 32 + 32 + 3 * (PROJECTIONS + 2 * 32)
RANK = 3 * (2 * 64 + 2 * 48 + 3 * 80)


@pytest.mark.parametrize(
    ("changes", "block", "files", "written", "ranks"),
    [
        # Of each block two files, and three of one or all that points may differ by; three points of adapters.
        ({}, PROJECTIONS // 8, 2, 3, 7),
        ({"steps": 5}, PROJECTIONS // 8, 2, 3, 10),
        ({"prune_method": "sparsegpt"}, PROJECTIONS * 4, 2, 3, 7),
        ({"reconstruct_epochs": 1}, PROJECTIONS * 4, 2, 3, 7),
        ({"rank_shrink": "fold"}, PROJECTIONS * 4, 3, 3, 7),
        ({"keep_points": 1}, PROJECTIONS // 8, 1, 2, 7),
        ({"keep_points": 4}, PROJECTIONS // 8, 2, 5, 7),
        ({"keep_points": 4, "rank_shrink": "fold"}, PROJECTIONS * 4, 5, 5, 7),
        ({"finetune": "false"}, PROJECTIONS // 8, 2, 3, 0),
    ],
)
def test_disk(changes: dict[str, Any], block: int, files: int, written: int, ranks: int) -> None:
    model = random_model("llama-gqa")
    assert checks.disk(model, Decoder(model).family, config(**changes), 4) == {
        "merged model": PARAMETERS * 4,
        # Value and two moments in float32.
        "points": block * (3 * files + written) + written * 12 * ranks * RANK,
        "report": 2**20,
    }


def test_least_memory() -> None:
    model = random_model("llama-gqa")
    assert checks.memory(model, Decoder(model).family, config(), 4) == {
        "dense copy": PARAMETERS * 4,
        "streams of hidden states and copies": 2 * 4 * 2 * 32 * 4,
        "adapters and optimizer": 7 * RANK * 16,
    }


def test_too_little_of_either_is_refused_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama-gqa")
    family, some = Decoder(model).family, config(nsamples=100, seqlen=10)
    (tmp_path / "left over").write_bytes(b"x" * 5000)
    there = 512 * (tmp_path / "left over").stat().st_blocks
    disk = sum(checks.disk(model, family, some, 4).values())
    # Streams and adapters are not there at once: the larger of the two counts.
    least = PARAMETERS * 4 + max(2 * 1000 * 32 * 4, 7 * RANK * 16)
    free = {"disk": disk - there, "memory": least}
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free["disk"]}))
    monkeypatch.setattr(checks, "_free_memory", lambda _: free["memory"])
    checks.check(model, family, some, tmp_path)
    free["memory"] -= 1
    with pytest.raises(ValueError, match=r"device cpu: 0\.00 GiB of memory are free"):
        checks.check(model, family, some, tmp_path)
    free["disk"] -= 1
    with pytest.raises(ValueError, match=r"output_dir losa-b-wanda-0\.7: 0\.00\d GiB of disk are free"):
        checks.check(model, family, some, tmp_path)
    free.update(disk=3 * 2**30, memory=5 * 2**30)
    monkeypatch.setattr(
        checks, "memory", lambda *_: {"streams of hidden states and copies": 0, "adapters and optimizer": 6 * 2**30}
    )
    with pytest.raises(ValueError, match=r"5\.00 GiB of memory are free; allowed: 6\.00 GiB"):
        checks.check(model, family, some, tmp_path)
    with pytest.raises(ValueError, match=r"3\.000 GiB of disk are free; allowed: about 7\.500 GiB \(so\)"):
        checks.check_disk(15 * 2**29, "so", some, tmp_path / "nothing here")


# --- the plan ---


def test_a_plan(tmp_path: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    options = {
        **SMALL,
        "rmi_samples": 3,
        "calibration_data": "alpaca-gpt4",
        "finetune_data": "c4",
        "eval_data": "wikitext2",
    }
    some = parse(arguments(place, **options))
    found = dry_run.make_plan(some)
    taken = footprint.footprint(some, Sizes.of(*_model_and_family(), torch.float32), CPU)
    assert found == {
        "model": str(place / "model"),
        "family": "gated",
        "device": "cpu",
        "dtype": "float32",
        "blocks": 3,
        "parameters": PARAMETERS,
        "prunable weights": 3 * PROJECTIONS,
        # 0.7 (1 − (1 − t/2)³)
        "sparsity after each step": [0.6125, 0.7],
        "mean rank of each step": [6, 7],
        "calibration": "4 × 2 tokens of alpaca-gpt4",
        "fine-tuning": "8 × 2 tokens of c4, shares [0.1, 0.9], 2 optimizer steps",
        "evaluation": "windows of 2 tokens of wikitext2",
        "weights": "in memory",
        "most memory is taken in": taken.phase,
        "device memory": taken.device,
        "host memory": taken.host,
        "disk, bytes": checks.disk(*_model_and_family(), some, 4),
        "floating-point operations": {
            # A multiplication and an addition for each weight: once to measure importance, three times to prune.
            "sweeps": 2 * 2 * 3 * PROJECTIONS * (3 * 2 + 3 * 4 * 2),
            "reconstruction": 0,
            # Forward, and backward for twice that.
            "training": 6 * 3 * PROJECTIONS * 8 * 2,
        },
        "output": str(place / "out"),
    }  # fmt: skip
    more = parse(arguments(place, **options, loss="kl", reconstruct_epochs=5, reconstruct_batch_size=3))
    assert dry_run.make_plan(more)["floating-point operations"] == {
        "sweeps": found["floating-point operations"]["sweeps"],
        "reconstruction": 2 * 6 * 3 * PROJECTIONS * 4 * 2 * 5,
        "training": 8 * 3 * PROJECTIONS * 8 * 2,
    }
    assert dry_run.make_plan(more)["reconstruction"].startswith(
        "5 epochs of each block at each step, 10 optimizer steps"
    )
    less = dry_run.make_plan(parse(arguments(place, **{**options, **PLAIN}, offload="on", dtype="bfloat16")))
    assert less["weights"] == "one block at a time from the model's files"
    assert (less["mean rank of each step"], less["fine-tuning"]) == ([], "none")
    assert less["floating-point operations"]["training"] == 0
    assert (less["dtype"], less["disk, bytes"]["merged model"]) == ("bfloat16", PARAMETERS * 2)
    many = dry_run.make_plan(parse([*arguments(place, **options), "--dry_run", "--devices", "2"]))
    layout = scaling.layout_of(*_model_and_family(), 4)
    assert many["memory of each of 2 cards"] == scaling.memory(layout, some, 2)
    # The last step has the most ranks.
    assert many["received by each in an optimizer step"] == scaling.training_traffic(layout, some, 2, 7)
    assert many["received by each in the calibration of a step"] == scaling.calibration_traffic(layout, some, 2)
    assert not {"weights", "most memory is taken in", "device memory", "host memory"} & set(many)


def test_a_tied_head_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where config.json alone is known, as of a hub id."""
    folder = save_random_model(tmp_path / "model", "llama-gqa")
    assert dry_run.make_plan(config(model=folder))["parameters"] == PARAMETERS
    monkeypatch.setattr(pretrained, "local_folder", lambda name, weights: folder)
    assert dry_run.make_plan(config(model="some/where"))["parameters"] == PARAMETERS


def _model_and_family() -> tuple[Any, Any]:
    model = random_model("llama-gqa")
    return model, Decoder(model).family


def test_a_plan_as_text() -> None:
    gib = 2**30
    shown = dry_run.show_plan(
        {
            "model": "a/b",
            "parameters": 1_234_567,
            "device memory": {"weights": 3 * gib, "dense copy": gib // 2},
            "disk, bytes": {"merged model": 5 * gib // 4, "report": gib},
            "floating-point operations": {"sweeps": 25 * 10**11, "training": 10**12},
            "memory of each of 2 cards": {"weights": 7 * gib},
        }
    )
    assert shown.splitlines() == [
        "model                           a/b",
        "parameters                      1,234,567",
        "device memory                   3.50 GiB at once (estimated), of it",
        "  weights                           3.00 GiB",
        "  dense copy                        0.50 GiB",
        "disk, most at once              2.25 GiB (estimated), of it",
        "  merged model                      1.25 GiB",
        "  report                            1.00 GiB",
        "work, sweeps                          2.50 TFLOP",
        "work, training                        1.00 TFLOP",
        "memory of each of 2 cards",
        "  weights                           7.00 GiB",
    ]


# --- many cards ---

# Two blocks of a (5, 4), a (4, 6), a (6, 4) and a norm; outside an embedding of 9 rows and a norm. Two bytes a number.
LAYOUT = scaling.Layout(
    blocks=2,
    block=((5, 4), (4, 6), (6, 4), (4,)),
    outside=((9, 4), (4,)),
    projections=((5, 4), (4, 6), (6, 4)),
    inputs=(4, 6),
    size=2,
)
# On three cards the fullest holds 2, 2, 2 and 2 rows of a block, 3 and 2 of what lies outside.
HELD = 2 * 2 * (2 * 4 + 2 * 6 + 2 * 4 + 2) + 2 * (3 * 4 + 2)
BLOCK = 3 * 2 * (2 * 4 + 2 * 6 + 2 * 4 + 2)
OUTSIDE = 3 * 2 * (3 * 4 + 2)
ENTRIES = 2 * (9 + 10 + 10)


def test_memory_of_one_of_three_cards() -> None:
    some = config(nsamples=10, seqlen=5, prune_method="sparsegpt")
    calibrating = {
        "weights": HELD,
        "dense copy": HELD,
        "whole blocks": 4 * BLOCK,
        "embeddings and head, whole": OUTSIDE,
        # Four of ten sequences, dense and pruned.
        "streams of hidden states": 2 * 4 * 5 * 4 * 2,
        "Hessians of a block": 4 * (16 + 36),
    }
    trained = {
        "adapters and optimizer": 7 * ENTRIES * 4 * 5,
        "merged weights": 24 * 2,
        # Two of six sequences of two tokens: 8 + 4 · 6/4 hidden states of each in each of two blocks, and logits.
        "activations": 2 * 2 * (2 * 14 * 4 * 2 + 9 * (2 + 8)),
    }
    train = 2 * HELD + 4 * BLOCK + OUTSIDE + sum(trained.values())
    assert scaling.memory(LAYOUT, some, 3) == {**calibrating, **trained, "largest at once": train}
    longer = scaling.memory(LAYOUT, config(nsamples=100, seqlen=5), 3)
    most = 2 * HELD + 4 * BLOCK + OUTSIDE + 2 * 34 * 5 * 4 * 2
    assert longer["largest at once"] == most + trained["adapters and optimizer"], "streams are gone when adapters train"
    again = scaling.memory(LAYOUT, config(gradient_checkpointing="true", prune_method="magnitude", train_seqlen=900), 3)
    assert again["activations"] == 2 * 900 * ((2 + 14) * 4 * 2 + 9 * 10)
    parts = ("adapters and optimizer", "merged weights", "activations")
    assert again["largest at once"] == 2 * HELD + 4 * BLOCK + OUTSIDE + sum(again[part] for part in parts)
    assert "Hessians of a block" not in again
    plain = scaling.memory(LAYOUT, config(**PLAIN), 3)
    assert plain["largest at once"] == sum(value for name, value in plain.items() if name != "largest at once")
    assert "activations" not in plain
    rebuilt = scaling.memory(LAYOUT, config(reconstruct_epochs=1, reconstruct_batch_size=4), 3)
    # 68 weights of 25 bytes; two of four sequences of two tokens, 14 hidden states in bf16 and two in float32.
    assert rebuilt["training of a block"] == 68 * 25 + 2 * 2 * (14 * 2 + 8) * 4


def test_memory_of_a_single_card() -> None:
    found = scaling.memory(LAYOUT, config(), 1)
    assert found["weights"] == found["dense copy"] == 2 * (2 * (68 + 4) + 36 + 4)
    assert (found["whole blocks"], found["embeddings and head, whole"]) == (0, 0)
    assert found["adapters and optimizer"] == 7 * ENTRIES * 4 * 4
    assert found["merged weights"] == 2 * 68 * 2
    assert found["activations"] == 3 * 2 * (2 * 14 * 4 * 2 + 9 * 10)


def test_bytes_received_by_one_of_three_cards() -> None:
    few = {"nsamples": 10, "seqlen": 5, "rmi_samples": 7}
    some = config(**few)
    # Six sequences on three cards: two each, one micro-batch; the model twice. Gradients and a loss in float64.
    expected = {"weights": 2 * HELD * 2, "gradients": 2 * (4 * 7 * ENTRIES + 8) * 2 // 3}
    assert scaling.training_traffic(LAYOUT, some, 3, 7) == expected
    assert scaling.training_traffic(LAYOUT, config(loss="kl"), 3, 7)["weights"] == 3 * HELD * 2
    many = config(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert scaling.training_traffic(LAYOUT, many, 3, 7)["weights"] == 3 * 2 * HELD * 2
    assert scaling.training_traffic(LAYOUT, some, 1, 7) == {"weights": 0, "gradients": 0}
    block, outside = BLOCK // 3, OUTSIDE // 3
    # Sums of inputs' squares in float32, of two errors' sums and of Gram matrices in float64.
    sums = 4 * (4 + 6) + 2 * 8 * 4 + 8 * 49
    assert scaling.calibration_traffic(LAYOUT, some, 3) == {
        "weights": (3 * 2 * block + 2 * outside) * 2,
        "pruned weights": 2 * 68 * 2,
        "statistics": 2 * 2 * sums * 2 // 3,
        "gradients of reconstruction": 0,
        # Of seven samples three are here; of 20 columns seven.
        "features": 2 * 4 * 7 * 2,
    }
    # Ten sequences in batches of three are four steps an epoch; each sums all gradients of a block, and once its channels' energy.
    trains = scaling.calibration_traffic(LAYOUT, config(**few, reconstruct_epochs=2, reconstruct_batch_size=3), 3)
    assert trains["gradients of reconstruction"] == 2 * 2 * (8 * 4 * 68 + 8 * 4) * 2 // 3
    assert trains["weights"] == (3 * 2 * block + 3 * outside) * 2, "what calls a block is recorded once more"
    uniform = scaling.calibration_traffic(LAYOUT, config(layer_sparsity="uniform", prune_method="sparsegpt"), 3)
    assert uniform["weights"] == (2 * 2 * block + outside) * 2
    assert uniform["statistics"] == 2 * 2 * (4 * (16 + 36) + 2 * 8 * 4) * 2 // 3
    assert uniform["features"] == 0
    magnitude = scaling.calibration_traffic(LAYOUT, config(layer_sparsity="uniform", prune_method="magnitude"), 3)
    assert magnitude["statistics"] == 2 * 2 * 2 * 8 * 4 * 2 // 3
    assert set(scaling.calibration_traffic(LAYOUT, some, 1).values()) == {0}


def test_a_layout_is_read_off_the_model() -> None:
    assert scaling.layout_of(*_model_and_family(), 4) == scaling.Layout(
        blocks=3,
        block=((32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48), (32,), (32,)),
        outside=((257, 32), (32,)),
        projections=((32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)),
        inputs=(32, 32, 32, 48),
        size=4,
    )
