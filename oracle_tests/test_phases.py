"""The byte model: what each phase holds on one card, on many and offloaded, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from oracle_tests.plans import PLAIN, config
from oracle_tests.small_runs import ROOT
from oracle_tests.tiny_material import SIZES
from torch_impl.engine import memory
from torch_impl.experiment.planning import phases
from torch_impl.experiment.planning.parts import Parts, Peak, Place
from torch_impl.experiment.planning.phases import PROCESS, peak
from torch_impl.experiment.planning.table import sizes_of

CPU, CUDA = Place("cpu"), Place("cuda")
# Two bytes for each of 760 weights; at step 2, seven ranks of 113 entries in float32.
WEIGHTS = 760 * 2
ADAPTERS = 7 * 113 * 4
TRAINED = Parts(adapters=ADAPTERS, gradients=ADAPTERS, moments=2 * ADAPTERS)
# What Wanda gathers of a block: the norms of its inputs.
NORMS = (3 * 8 + 12) * 4
BOTH = Parts(weights=WEIGHTS, dense_copy=WEIGHTS)


def plus(*parts: Parts, **more: int) -> Parts:
    added = {name: sum(getattr(part, name) for part in parts) for name in Parts.__dataclass_fields__}
    return Parts(**{name: size + more.get(name, 0) for name, size in added.items()})


def test_parts_add_up() -> None:
    parts = Parts(weights=3, masks=4)
    assert (parts.total, parts.by_name()) == (7, {"weights": 3, "masks": 4})


# --- one card, all in memory ---

# 150 tokens in each of two blocks, 240 bytes each (test_memory.py); the loss takes 4 bytes a logit, and 8 in part.
TRAINING = plus(BOTH, TRAINED, merged=520 * 2, activations=150 * 240 * 2, logits=150 * 17 * (4 + 8))
LONG = {"nsamples": 64, "seqlen": 32}
STREAMS = 2 * 64 * 32 * 8 * 2
# Blocks compiled, or computed again in backward: see test_memory.
CASES: list[tuple[str, dict[str, Any], str, Parts]] = [
    (
        "calibration", LONG, "calibration",
        plus(BOTH, TRAINED, merged=300 * 2, streams=STREAMS, work=NORMS + 2 * 32 * 72 * 2),
    ),
    (
        "calibration in large batches", {**LONG, "calibration_batch_size": 100}, "calibration",
        plus(BOTH, TRAINED, merged=300 * 2, streams=STREAMS, work=NORMS + 64 * 32 * 72 * 2),
    ),
    (
        "in one step nothing is merged meanwhile", {**LONG, **PLAIN}, "calibration",
        plus(BOTH, streams=STREAMS, work=NORMS + 2 * 32 * 72 * 2),
    ),
    (
        "nor without adapters", {**LONG, "finetune": "false"}, "calibration",
        plus(BOTH, streams=STREAMS, work=NORMS + 2 * 32 * 72 * 2),
    ),
    (
        "a batch of windows", {"eval_seqlen": 700, "eval_batch_size": 5}, "evaluation",
        plus(BOTH, TRAINED, work=5 * 700 * 72 * 2),
    ),
    (
        "logits of a window", {"eval_seqlen": 3500, "eval_batch_size": 1}, "evaluation",
        plus(BOTH, TRAINED, logits=17 * 3500 * (2 + 8)),
    ),
    (
        "verification", {"eval_seqlen": 3500, **PLAIN}, "verification",
        Parts(weights=WEIGHTS, reloaded=WEIGHTS, logits=17 * 3500 * 10, masks=520),
    ),
    (
        "reconstruction", {**LONG, "reconstruct_epochs": 1, "reconstruct_batch_size": 100}, "reconstruction",
        # Of each weight of the larger block 16 bytes, two merged, a rounded one with its gradient, a mask; of each token 240
        # and its error twice in float32.
        plus(BOTH, TRAINED, streams=STREAMS, reconstruction=280 * (16 + 4 + 4 + 1) + 64 * 32 * (240 + 2 * 4 * 8)),
    ),
    (
        "reconstruction in windows of two blocks",
        {**LONG, "reconstruct_epochs": 1, "reconstruct_batch_size": 100, "reconstruct_window": 2}, "reconstruction",
        # A third stream waits before the window; only the last block has an error.
        plus(
            BOTH, TRAINED, streams=3 * STREAMS // 2, reconstruction=2 * 280 * 25 + 64 * 32 * (2 * 240 + 2 * 4 * 8)
        ),
    ),
    ("training", {"train_seqlen": 50}, "training", TRAINING),
    (
        "training with the dense model's predictions", {"loss": "kl", "train_seqlen": 50}, "training",
        replace(TRAINING, logits=150 * 17 * (3 * 2 + 4 * 4)),
    ),
    (
        "training without held weights", {"hold_merged": "off", "train_seqlen": 50}, "training",
        replace(TRAINING, merged=0),
    ),
    (
        "checkpointed activations", {"gradient_checkpointing": "true", "train_seqlen": 99}, "training",
        # A hidden state of each token in each block; one block's activations and gradient are more than the loss.
        replace(TRAINING, activations=297 * 8 * 2 * 2, logits=0, work=297 * 240 + 96 * 2),
    ),
    (
        "compiled blocks", {"compile_blocks": "on", "train_seqlen": 99}, "training",
        replace(TRAINING, activations=297 * (16 + 24 + 2 * 12) * 2 * 2, logits=297 * 17 * 12),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "phase", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_phase_that_takes_most(changes: dict[str, Any], phase: str, parts: Parts) -> None:
    assert peak(config(offload="off", **changes), SIZES, CPU) == Peak(False, phase, parts, parts)


def test_logits_of_a_large_vocabulary_are_more_than_the_work() -> None:
    large = replace(SIZES, vocabulary=500)
    found = phases.phases(config(eval_seqlen=30, eval_batch_size=3), large, CPU)
    logits = 500 * 30 * (3 * 2 + 8)
    assert found["evaluation"] == plus(BOTH, TRAINED, logits=logits)
    assert found["verification"] == Parts(weights=WEIGHTS, reloaded=WEIGHTS, logits=logits, masks=520)


def test_a_gradient_as_a_whole_matrix_may_be_more_than_the_loss() -> None:
    """Two tokens, whose loss takes 12 bytes a logit, or 22; a gradient of 96 weights, and a merged weight that is not held."""
    one = {"train_seqlen": 2, "per_device_train_batch_size": 1}

    def trained(sizes: Any, **changes: object) -> tuple[int, int]:
        found = phases.phases(config(**one, **changes), sizes, CPU)["training"]
        return found.logits, found.work

    for changes, expected in (({}, 408), ({"hold_merged": "off"}, 408), ({"loss": "kl"}, 2 * 17 * 22)):
        assert trained(SIZES, **changes) == (expected, 0)
    few = replace(SIZES, vocabulary=2)
    assert trained(few) == (0, 96 * 2)
    assert trained(few, hold_merged="off") == (0, 2 * 96 * 2)


def test_on_a_gpu_merged_weights_are_held_if_half_of_what_is_free_suffices() -> None:
    large = {"train_seqlen": 99}
    enough = 2 * WEIGHTS + 2 * 520 * 2
    found = peak(config(**large), SIZES, Place("cuda", free=enough))
    assert found.device.merged == 520 * 2
    assert found.host == Parts(weights=WEIGHTS, masks=520, process=PROCESS), (
        "the model is read and saved, masks are kept there"
    )
    assert peak(config(**large), SIZES, Place("cuda", free=enough - 1)).device.merged == 0
    assert peak(config(hold_merged="on", **large), SIZES, Place("cuda", free=enough - 1)).device.merged == 520 * 2
    assert peak(config(hold_merged="off", **large), SIZES, CUDA).device.merged == 0

    def compiled(free: int, **more: object) -> Parts:
        return peak(config(compile_blocks="on", **large, **more), SIZES, Place("cuda", free=free)).device

    assert compiled(enough).activations == 297 * (16 + 24 + 2 * 12) * 2 * 2
    assert compiled(enough - 1).activations == 297 * (16 + 24 + 12) * 2 * 2, "one product of the MLP is made again"
    again = compiled(enough - 1, gradient_checkpointing="true")
    assert (again.logits, again.work) == (297 * 17 * 12, 0)
    assert 297 * 17 * 12 > 297 * (16 + 24 + 2 * 12) * 2 + 2 * 96 * 2


def test_what_is_free_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_impl.experiment.planning.parts.free_bytes", {"cuda": 5, "cpu": 7}.get)
    monkeypatch.setattr("torch_impl.experiment.planning.parts.torch.device", str)
    assert Place.here(type("Device", (str,), {"type": "cuda"})("cuda"), 3) == Place("cuda", 3, free=5, free_host=7)


def test_free_memory_counts_what_the_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    assert memory.free_bytes(device) == 130
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 77}))
    assert memory.free_bytes(torch.device("cpu")) == 77


# --- one card, offloaded ---


def test_what_does_not_fit_is_left_on_disk_if_the_run_can_do_that() -> None:
    plain = config(**PLAIN)
    needed = peak(config(offload="off", **PLAIN), SIZES, CUDA)
    for name, amount in (("free", needed.device.total), ("free_host", needed.host.total)):
        fits = -(-amount * 10 // 9)
        assert not peak(plain, SIZES, replace(CUDA, **{name: fits})).offloaded, f"just fits {name}"
        short = replace(CUDA, **{name: fits - 2})
        assert peak(plain, SIZES, short).offloaded, f"just does not fit {name}"
        assert not peak(config(), SIZES, short).offloaded, "not with fine-tuning"
        assert not peak(config(offload="off", **PLAIN), SIZES, short).offloaded
        assert not peak(plain, SIZES, replace(short, cards=2)).offloaded, "nor on several cards"
    assert peak(config(offload="on", **PLAIN), SIZES, CUDA).offloaded


SOME = {
    "offload": "on",
    "nsamples": 10,
    "seqlen": 3,
    "rmi_samples": 6,
    "layer_sparsity": "rmi",
    "eval_seqlen": 7,
    "eval_windows": 3,
    **PLAIN,
}


def test_an_offloaded_run() -> None:
    """Outside the blocks 200 weights, two blocks of 300; hidden states of 16 bytes a token."""
    base = Parts(weights=400, blocks=2 * 300 * 2, work=NORMS + 96 * 23)
    found = peak(config(**SOME), SIZES, CUDA)
    assert (found.offloaded, found.phase) == (True, "pruning")
    assert found.device == replace(base, streams=16 * (2 * 30 + 2 * 7))
    assert found.host == Parts(blocks=1200, process=PROCESS)
    found = peak(config(**SOME), SIZES, CPU)
    assert found.host == replace(found.device, blocks=1800), "one being written"

    found = peak(config(**{**SOME, "eval_windows": 9}), SIZES, CUDA)
    assert found.phase == "verifying"
    assert found.device == replace(base, reloaded=400, streams=16 * (63 + 14))
    dense = peak(config(**{**SOME, "eval_windows": 40, "nsamples": 20, "rmi_samples": 20}), SIZES, CUDA)
    assert dense.phase == "dense"
    assert dense.device == replace(base, streams=16 * (60 + 280))
    uniform = peak(config(**{**SOME, "rmi_samples": 10, "layer_sparsity": "uniform"}), SIZES, CUDA)
    assert uniform.device.streams == 16 * (2 * 30 + 2 * 7)


def test_an_offloaded_run_in_windows() -> None:
    """Two more blocks, a third stream, the training of three blocks; and a copy of each block that a checkpoint holds."""
    some = config(**SOME, reconstruct_epochs=1, reconstruct_window=3)
    found = peak(some, SIZES, CUDA)
    assert found.phase == "pruning"
    assert found.device == Parts(
        weights=400,
        blocks=4 * 300 * 2,
        streams=16 * (3 * 30 + 2 * 7),
        reconstruction=3 * 280 * 25 + 8 * 3 * (3 * 240 + 64),
    )
    assert found.host == Parts(blocks=3 * 300 * 2, process=PROCESS)
    assert peak(some, SIZES, CPU).host == replace(found.device, blocks=6 * 300 * 2)


@pytest.mark.parametrize("method", ["pruner_zero", "taylor"])
def test_a_method_that_needs_gradients(method: str) -> None:
    """Ten sequences of three tokens, 16 bytes each, and once more before each of two blocks; 520 sums of four bytes. A batch
    of six tokens takes 240 bytes each for its activations (test_memory.py), the block's input, its output's gradient and three
    states of the MLP's width 12; four bytes for each of 280 weights, and eight for each of 96 of one projection."""
    some = {**SOME, "prune_method": method, "layer_sparsity": "uniform", "calibration_batch_size": 2}
    work = 6 * (240 + (2 * 8 + 3 * 12) * 2) + 280 * 4 + 96 * 8
    plain = {**some, "offload": "off"}
    states, before, sums = 480, 2 * 480, 520 * 4
    expected = plus(BOTH, merged=300 * 2, streams=states, work=work)
    assert phases.phases(config(**plain), SIZES, CUDA)["gradients"] == expected
    assert phases.phases(config(**plain), SIZES, CPU)["gradients"] == plus(expected, streams=before, statistics=sums)
    assert phases.phases(config(**plain), SIZES, CPU)["calibration"].statistics == sums
    assert peak(config(**plain), SIZES, CUDA).host == Parts(
        weights=WEIGHTS, streams=before, statistics=sums, process=PROCESS
    )
    # Each of two cards has half of the sequences, and prunes half of the projections.
    halves = phases.phases(config(**plain), SIZES, replace(CPU, cards=2))["gradients"]
    assert (halves.streams, halves.statistics) == (states // 2 + before // 2, sums // 2)
    found = peak(config(**some), SIZES, CUDA)
    assert found.device == Parts(weights=400, blocks=2 * 300 * 2, work=work, streams=3 * states + 16 * 2 * 7)
    assert found.host == Parts(blocks=1200, streams=before, statistics=sums, process=PROCESS)
    # A long vocabulary makes the loss of a sequence, three tokens at 4 bytes a logit and 8 in part, larger.
    large = phases.phases(config(**plain), replace(SIZES, vocabulary=500), CUDA)["gradients"]
    assert (large.work, large.logits) == (0, 3 * 500 * (4 + 8))


def test_hidden_states_that_find_no_room_are_kept_by_the_host() -> None:
    without = config(**{**SOME, "eval_seqlen": 2, "eval_windows": 60000})
    found = peak(without, SIZES, replace(CUDA, free=1200 + NORMS + 96 * 23 + 400 + 16 * 4 + 10))
    assert found.device.streams <= 16 * 4
    assert found.host.streams >= 16 * 120000
    dense = peak(config(**{**SOME, "rmi_samples": 10, "seqlen": 30}), SIZES, CUDA)
    assert dense.device.streams == 16 * (2 * 300 + 14)
    endless = config(**{name: value for name, value in SOME.items() if name != "eval_windows"})
    assert peak(endless, SIZES, CUDA).device.streams == 16 * (340_000 + 14)


def test_each_sweep_has_the_room_to_itself() -> None:
    """The pruning sweep needs 16 · 74 bytes, more than what the others leave of just enough."""
    enough = phases.working(config(**SOME), SIZES).total + 400 + 16 * 74
    found = peak(config(**SOME), SIZES, replace(CUDA, free=-(-enough * 10 // 9)))
    assert (found.device.streams, found.host.streams) == (16 * 74, 0)
    # 600 bytes hold the streams of the last sweep, 16 · 35, but not the calibration's, 16 · 60.
    less = enough - 16 * 74 + 600
    assert peak(config(**SOME), SIZES, replace(CUDA, free=-(-less * 10 // 9))).host.streams == 16 * 60


def test_the_largest_piece_of_work_on_a_block() -> None:
    """Pruning, a batch of windows, its logits, or training the block."""
    base = Parts(blocks=2 * 300 * 2)
    assert phases.working(config(**SOME), SIZES) == replace(base, work=NORMS + 96 * 23)
    windows = config(**{**SOME, "eval_batch_size": 3, "eval_seqlen": 50})
    assert phases.working(windows, SIZES) == replace(base, work=150 * 72 * 2)
    assert phases.working(windows, replace(SIZES, vocabulary=500)) == replace(base, logits=500 * 50 * 14)
    batches = config(**{**SOME, "calibration_batch_size": 100, "seqlen": 20})
    assert phases.working(batches, SIZES) == replace(base, work=NORMS + 200 * 72 * 2)
    trained = config(reconstruct_epochs=2, reconstruct_batch_size=4, **SOME)
    assert phases.working(trained, SIZES) == replace(base, reconstruction=280 * 25 + 4 * 3 * (240 + 64))
    few = config(reconstruct_epochs=2, reconstruct_batch_size=400, **SOME)
    assert phases.working(few, SIZES).reconstruction == 280 * 25 + 30 * (240 + 64)


# --- many cards ---

# Rows and whole blocks of three cards: see test_memory.
HELD = SIZES.weights(cards=3)
BLOCK, OUTSIDE = 3 * 103 * 2, 3 * 70 * 2
THREE = Place("cuda", 3)
ROWS = Parts(weights=HELD, dense_copy=HELD)
# All gradients are summed in one message.
SPREAD = Parts(adapters=ADAPTERS, gradients=2 * ADAPTERS, moments=2 * ADAPTERS)


def test_phases_of_one_of_three_cards() -> None:
    some = config(nsamples=10, seqlen=50, calibration_batch_size=16, reconstruct_epochs=1, reconstruct_batch_size=4)
    found = phases.phases(some, SIZES, THREE)
    passing = Parts(blocks=3 * BLOCK, outside=OUTSIDE)
    # Four of ten sequences, dense and pruned.
    streams = 2 * 4 * 50 * 8 * 2
    assert found["calibration"] == plus(
        ROWS, SPREAD, streams=streams, blocks=3 * BLOCK, merged=300 * 2, work=NORMS + 4 * 50 * 72 * 2
    )
    assert found["reconstruction"] == plus(
        ROWS, SPREAD, streams=streams, blocks=2 * BLOCK, reconstruction=280 * 25 + 2 * 50 * (240 + 64)
    )
    two = phases.phases(replace(some, reconstruction=replace(some.reconstruction, reconstruct_window=2)), SIZES, THREE)
    assert two["reconstruction"].streams == 3 * streams // 2
    assert two["reconstruction"].blocks == 3 * BLOCK
    # Two of six sequences of two tokens.
    assert found["training"] == plus(ROWS, SPREAD, passing, activations=4 * 240 * 2, logits=4 * 17 * 12)
    assert found["evaluation"] == plus(ROWS, SPREAD, passing, logits=17 * 2 * 10)
    assert found["verification"] == plus(Parts(weights=HELD, reloaded=HELD), passing, logits=17 * 2 * 10)
    on_cpu = phases.phases(some, SIZES, replace(THREE, kind="cpu"))["verification"]
    assert on_cpu == replace(found["verification"], masks=174), "a third of 520, rounded up"


def test_large_embeddings_are_gathered_before_any_block() -> None:
    large = replace(SIZES, outside=((3000, 8),))
    rows = 3000 // 3 * 8 * 2
    whole = 3 * rows
    found = phases.phases(config(), large, THREE)
    assert found["training"].blocks == found["evaluation"].blocks == BLOCK
    assert found["training"].outside == found["verification"].outside == 2 * whole
    # To embed the sequences; no block is there yet.
    held = large.weights(cards=3)
    assert found["calibration"] == plus(
        Parts(weights=held, dense_copy=held), SPREAD, streams=2 * 2 * 2 * 16, outside=2 * whole
    )


def test_a_host_of_many_cards_never_has_the_whole_model() -> None:
    assert peak(config(), SIZES, THREE).host == Parts(blocks=300 * 2, masks=174, process=PROCESS)
    large = replace(SIZES, outside=((3000, 8),))
    assert peak(config(), large, THREE).host.blocks == 3000 * 8 * 2
    found = peak(config(), SIZES, replace(THREE, kind="cpu"))
    assert found.host == found.device


def test_merged_weights_are_never_held_on_several_cards() -> None:
    """Not even one of the MLP's products if the blocks are compiled, unless they are computed again as a whole."""
    found = phases.phases(config(compile_blocks="on", train_seqlen=99), SIZES, THREE)["training"]
    assert (found.merged, found.activations) == (0, 2 * 99 * (16 + 24 + 12) * 2 * 2)
    assert phases.phases(config(hold_merged="on"), SIZES, THREE)["training"].merged == 0
    again = phases.phases(
        config(compile_blocks="on", train_seqlen=99, gradient_checkpointing="true"), replace(SIZES, vocabulary=2), THREE
    )["training"]
    assert (again.merged, again.activations) == (0, 2 * 99 * 8 * 2 * 2)
    assert again.work == 2 * 99 * (16 + 24 + 2 * 12) * 2 + 2 * 96 * 2


@pytest.mark.parametrize("changes", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_many_cards_hold_no_more_than_one(changes: dict[str, Any]) -> None:
    """But for what is gathered, and the message of the gradients."""
    one = phases.phases(config(**changes), SIZES, replace(CUDA, cards=1))
    for cards in (2, 4):
        many = phases.phases(config(**changes), SIZES, replace(CUDA, cards=cards))
        assert many.keys() == one.keys()
        for phase, parts in many.items():
            for name, size in parts.by_name().items():
                if name not in ("blocks", "outside", "gradients") and (phase, name) != ("training", "work"):
                    assert size <= getattr(one[phase], name), f"{phase}: {name}"


def test_the_host_memory_of_a_whole_run_is_as_planned() -> None:
    """7B on an H200, measured; the parts of the plan are its weights, its masks and the process itself."""
    measured = json.loads((ROOT / "docs/results/whole_run/llama-2-7b.json").read_text(encoding="utf-8"))
    planned = peak(config(), sizes_of("llama-2-7b"), CUDA).host
    assert list(planned.by_name()) == ["weights", "masks", "process"]
    assert planned.total == pytest.approx(measured["result"]["peak_memory"]["host"], rel=0.02)
