"""What Algorithm 1 refuses before it starts, in both packages, and production's clock."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests.tiny_material import parts_for, settings, token_ids
from reference import adapted_linear as spec_adapted
from reference import losa as spec
from tiny_models.random_models import random_model
from torch_impl import hsic, losa, rank
from torch_impl.engine.adapted_linear import AdaptedLinear, adapters
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.record import Clock
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings
from torch_impl.engine.training import lr_factor
from torch_impl.masks.prune import METHODS


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (PruneConfig, "prune_method", "best"),
        (PruneConfig, "layer_sparsity", "best"),
        (PruneConfig, "steps", 0),
        (PruneConfig, "sparsity_ratio", 1.0),
        (PruneConfig, "sparsity_ratio", -0.1),
        (PruneConfig, "sparsity_type", "2of4"),
        (PruneConfig, "sparsity_type", "mixed-unstructured"),
        (PruneConfig, "sparsity_type", "5:4"),
        (PruneConfig, "sparsity_type", "0:4"),
        (AdapterConfig, "rank_allocation", "best"),
        (AdapterConfig, "rank_shrink", "best"),
        (AdapterConfig, "lora_r", 0),
        (AdapterConfig, "initial_rank", 0),
        (AdapterConfig, "initial_rank", 17),
    ],
)
def test_settings_that_cannot_be_are_refused(part: Any, name: str, value: Any) -> None:
    for build in (spec.Settings, part):
        with pytest.raises(ValueError, match=f"^{name} is '?{value}'?; allowed: "):
            build(**{name: value})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PruneConfig(prune_method="best"),
            f"prune_method is 'best'; allowed: {', '.join(METHODS)}",
        ),
        (
            lambda: PruneConfig(layer_sparsity="best"),
            "layer_sparsity is 'best'; allowed: rmi, uniform, owl, atp, lamp, gradient",
        ),
        (lambda: PruneConfig(steps=0), "steps is 0; allowed: 1 or more"),
        (lambda: PruneConfig(sparsity_ratio=1.0), "sparsity_ratio is 1.0; allowed: 0 up to, not including, 1"),
        (lambda: PruneConfig(sparsity_ratio=1.5), "sparsity_ratio is 1.5; allowed: 0 up to, not including, 1"),
        (
            lambda: PruneConfig(sparsity_type="2of4"),
            "sparsity_type is '2of4'; allowed: unstructured, N:M, mixed-N:M, structured",
        ),
        (lambda: PruneConfig(sparsity_type="0:4"), "sparsity_type is '0:4'; allowed: N from 1 to M"),
        (lambda: PruneConfig(sparsity_type="5:4"), "sparsity_type is '5:4'; allowed: N from 1 to M"),
        (
            lambda: PruneConfig(sparsity_ratio=0.7, sparsity_type="1:4"),
            "sparsity_ratio is 0.7; allowed with sparsity_type 1:4: 0.75",
        ),
        (
            lambda: PruneConfig(dense_blocks=[4]),
            "dense_blocks has 1 numbers; give two: blocks at the front and at the back",
        ),
        (lambda: PruneConfig(dense_blocks=[0, -1]), "dense_blocks is -1; allowed: 0 or more"),
        (
            lambda: PruneConfig(sparsity_type="2:4", dense_blocks=[1, 0]),
            "dense_blocks is [1, 0], and sparsity_type 2:4 says how much every block keeps; leave one of them out",
        ),
        (lambda: AdapterConfig(rank_allocation="best"), "rank_allocation is 'best'; allowed: error, uniform"),
        (lambda: AdapterConfig(rank_shrink="best"), "rank_shrink is 'best'; allowed: truncate, fold"),
        (lambda: AdapterConfig(adapted="none"), "adapted is 'none'; allowed: all, attention, mlp"),
        (lambda: AdapterConfig(lora_r=0), "lora_r is 0; allowed: 1 or more"),
        (
            lambda: AdapterConfig(initial_rank=17),
            "initial_rank is 17; allowed: min_rank 1 (1 or more) to max_rank 16",
        ),
        (
            lambda: Settings(PruneConfig(steps=12)),
            "steps is 12, so the mean rank would reach 17, above max_rank 16; use fewer steps, a lower initial_rank or "
            "a higher max_rank",
        ),
    ],
)
def test_refusals_say_what_is_allowed(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build()


def test_the_last_values_that_are_allowed() -> None:
    assert PruneConfig(sparsity_ratio=0.0).final_sparsity == 0.0
    assert PruneConfig(sparsity_type="1:4").group == (1, 4)
    assert PruneConfig(sparsity_type="4:4").final_sparsity == 0.0
    assert PruneConfig(sparsity_ratio=0.75, sparsity_type="mixed-1:4").final_sparsity == 0.75
    assert AdapterConfig(lora_r=1, lora_alpha=3.0).scale == 3.0
    assert AdapterConfig(initial_rank=16).initial_rank == 16
    assert Settings(PruneConfig(steps=11)).prune.steps == 11


def test_large_blocks_weigh_more() -> None:
    """No family has blocks of unequal size; the rates would still meet the target of the whole model."""
    importance, weights = torch.tensor([0.1, 0.5, 0.3]).double(), torch.tensor([1.0, 5.0, 2.0]).double()
    rates, groups = losa.block_targets(PruneConfig(), 0.5, importance, weights, torch.zeros(3).double())
    assert float(weights @ rates / weights.sum()) == pytest.approx(0.5, abs=1e-12)
    assert groups == [None] * 3


@pytest.mark.parametrize(
    ("shares", "sizes", "target", "initial", "rates"),
    [
        # (1 · 0.5 + 3 · 0.25 + 12 · 0) / 16; the plain mean would be 0.25.
        ([0.5, 0.25, 0.0], [1.0, 3.0, 12.0], 0.7, 0.078125, [0.5, 0.25, 0.0]),
        ([0.5, 0.25, 0.0], [1.0, 3.0, 12.0], 0.0777, 0.078125, [0.5, 0.25, 0.0]),
        # A few zeros of a dense model, all in a small block.
        ([0.009, 0.0, 0.0], [1.0, 3.0, 12.0], 0.7, 0.0, [0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.002], [1.0, 3.0, 12.0], 0.7, 0.0015, [0.0, 0.0, 0.002]),
        # More than is asked.
        ([0.0, 0.0, 0.5], [1.0, 3.0, 12.0], 0.3, None, None),
    ],
)
def test_a_run_starts_from_the_sparsity_of_all_weights_together(
    shares: list[float], sizes: list[float], target: float, initial: float | None, rates: list[float] | None
) -> None:
    """By block sizes, in both packages."""
    ours = lambda: losa.initial_rates(  # noqa: E731
        *(torch.tensor(v, dtype=torch.float64) for v in (shares, sizes)), PruneConfig(sparsity_ratio=target)
    )
    rows = [np.r_[np.zeros(round(2000 * share)), np.ones(2000 - round(2000 * share))] for share in shares]
    layers = [{"q": spec_adapted.AdaptedLinear(row[None], np.zeros((0, 2000)), np.zeros((1, 0)))} for row in rows]
    theirs = lambda: spec.initial_rates(layers, np.array(sizes), spec.Settings(sparsity_ratio=target))  # noqa: E731
    for side in (ours, theirs):
        if initial is None:
            with pytest.raises(ValueError, match=r"sparsity_ratio is 0\.3.*0\.3750"):
                side()
        else:
            found, of_blocks = side()
            assert found == pytest.approx(initial, abs=1e-15)
            assert list(map(float, of_blocks)) == rates


@pytest.mark.parametrize("rule", ["rmi", "lamp"])
def test_a_model_with_a_zero_more_than_is_asked_for_keeps_it(rule: str) -> None:
    """A weight that is 0 by chance made the floor larger than the target."""
    model = random_model("llama")
    zeros = 0
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data.flatten()[: weight.numel() // 2 + (not zeros)] = 0
            zeros += int((weight == 0).sum())
    options = settings(prune_method="magnitude", sparsity_ratio=0.5, layer_sparsity=rule, training={"finetune": False})
    records = losa.run(model, token_ids(model, 6, 12), [], options)
    assert sum(int((layer.weight == 0).sum()) for layer in adapters(model)) == zeros
    assert all(0.5 < record.target < 0.501 for record in records)


def test_ranks_keep_to_the_settings_bounds() -> None:
    setup = Settings(PruneConfig(steps=1), AdapterConfig(min_rank=3, initial_rank=4, max_rank=6))
    assert losa._allocate_ranks(setup, 1, [0.0, 0.0, 1.0, 1.0]) == [3, 3, 5, 5]
    # Two errors closer than float32 can tell: the second is smaller, so it gives up the rank that is one too many.
    assert losa._allocate_ranks(setup, 1, [3.5 + 1e-10, 3.5, 5.0]) == [4, 3, 5]


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity_ratio is 0\.7; allowed with sparsity_type 2:4: 0\.5"):
        PruneConfig(sparsity_ratio=0.7, sparsity_type="2:4")
    assert PruneConfig(sparsity_ratio=0.5, sparsity_type="2:4").final_sparsity == 0.5
    with pytest.raises(ValueError, match="steps is 12"):
        spec.Settings(steps=12)
    with pytest.raises(ValueError, match="steps is 12, so the mean rank would reach 17, above max_rank 16;"):
        Settings(PruneConfig(steps=12))


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [8, 0]])
def test_parts_that_do_not_fit_the_steps_are_refused(sizes: list[int]) -> None:
    """Before anything is changed."""
    model = random_model("llama")
    parts = [part[:size] for part, size in zip(parts_for(model, len(sizes)), sizes, strict=True)]
    message = rf"parts has {len(sizes)} parts of \{sizes} examples; give 2 parts, none empty".replace("]", r"\]")
    with pytest.raises(ValueError, match=message):
        losa.run(model, token_ids(model, 6, 12), parts, settings())
    assert not any("A" in name.split(".") for name, _ in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = Clock(torch.device(device))
    clock.lap("first")
    clock.lap("second")
    assert waited == [torch.device(device)] * (2 if device == "cuda" else 0)
    assert list(clock.laps) == ["first", "second"]
    assert all(seconds >= 0 for seconds in clock.laps.values())


def test_what_is_inside_a_part_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning takes 1 + 3 seconds, of which it is interrupted for 5 by reconstruction."""
    now = iter([0.0, 1.0, 6.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    heard: list[str] = []
    clock = Clock(torch.device("cpu"), on_part=heard.append)
    with clock.inside("reconstruct", "prune"):
        pass
    clock.lap("prune")
    assert clock.laps == {"prune": 4.0, "reconstruct": 5.0}
    assert heard == ["prune", "reconstruct", "prune"]


def test_reconstruction_is_a_part_of_its_own() -> None:
    model, heard = random_model("llama"), list[str]()
    setup = replace(settings(steps=1), reconstruction=ReconstructionConfig(reconstruct_epochs=1))
    [record] = losa.run(model, token_ids(model, 6, 12), parts_for(model, 1), setup, on_part=heard.append)
    blocks = len(record.sparsity)
    assert heard == ["importance", *["prune", "reconstruct"] * blocks, "prune", "train"]
    assert record.seconds.keys() == set(heard)
    assert all(seconds > 0 for seconds in record.seconds.values())


def test_observers_hear_every_step_as_it_was() -> None:
    model = random_model("llama")
    steps: list[losa.StepRecord] = []
    heard: list[tuple[int, int, float, float]] = []
    records = losa.run(
        model,
        token_ids(model, 6, 12),
        parts_for(model, 2),
        settings(),
        steps.append,
        lambda *what: heard.append(what),
    )
    assert [record.step for record in records] == [1, 2]
    assert [record.as_dict() for record in records] == [record.as_dict() for record in steps]
    for record in records:
        assert list(record.seconds) == ["importance", "prune", "train"]
        assert all(0 < seconds < 600 for seconds in record.seconds.values())
        assert [loss for step, _, loss, _ in heard if step == record.step] == record.losses
        assert [number for step, number, _, _ in heard if step == record.step] == list(range(len(record.losses)))
    assert all(0 < rate < 1 for _, number, _, rate in heard if number)


class Stopping(Checkpointer):
    """A checkpointer at whose point number `last` a run ends."""

    def __init__(self, folder: Path, last: int) -> None:
        super().__init__(RunCheckpoints(folder), save_every=1)
        self._left = last

    def _save(self) -> None:
        super()._save()
        self._left -= 1
        if not self._left:
            raise InterruptedError


@pytest.mark.parametrize(("pattern", "dtype"), [("1:2", torch.bfloat16), ("7:8", torch.float32)], ids=str)
def test_where_nothing_is_pruned_yet_nothing_is_trained(
    pattern: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    dense = random_model("llama", dtype=dtype)
    ids, parts = token_ids(dense, 6, 12), parts_for(dense, 5)
    setup = settings(sparsity_type=pattern, steps=5, training={"loss": "kl", "warmup_ratio": 0.0})
    model = copy.deepcopy(dense)
    heard: list[tuple[int, int, float, float]] = []

    def look(record: losa.StepRecord) -> None:
        if record.step == 1:
            for name, module in model.named_modules():
                if isinstance(module, AdaptedLinear):
                    assert torch.equal(module.merged(), dense.get_submodule(name).weight), name

    records = losa.run(model, ids, parts, setup, look, lambda *what: heard.append(what))
    assert [bool(record.losses) for record in records] == [False, True, True, True, True]
    assert {step for step, *_ in heard} == {2, 3, 4, 5}
    assert "step 1 of 5: nothing is pruned yet, so training is skipped; its 8 examples are not used" in caplog.text
    setup = settings(sparsity_type=pattern, steps=5, training={"warmup_ratio": 0.0})
    assert all(record.losses for record in losa.run(copy.deepcopy(dense), ids, parts, setup))


def test_a_run_goes_on_behind_a_step_without_training(tmp_path: Path) -> None:
    """Interrupted at its last block, after it, and in the step behind it: the same bits, the same learning rates."""
    setup = settings(sparsity_type="1:2", training={"loss": "kl", "lr_schedule": "whole_run"}, steps=5)
    results = []
    for last in (None, 3, 4, 8):
        model = random_model("llama")
        ids, parts = token_ids(model, 6, 12), parts_for(model, 5)
        heard: list[tuple[int, int, float, float]] = []
        listen = lambda *what, heard=heard: heard.append(what)  # noqa: E731
        if last is not None:
            with pytest.raises(InterruptedError):
                losa.run(model, ids, parts, setup, on_loss=listen, checkpointer=Stopping(tmp_path / str(last), last))
            model = random_model("llama")
        checkpointer = None if last is None else Checkpointer(RunCheckpoints(tmp_path / str(last)))
        records = losa.run(model, ids, parts, setup, on_loss=listen, checkpointer=checkpointer)
        assert [len(record.losses) for record in records] == [0, 2, 2, 2, 2]
        results.append((heard, [layer.merged() for layer in adapters(model)]))
    # The schedule of ten optimizer steps goes on behind the two that are left out.
    assert [rate for *_, rate in results[0][0]] == [1e-2 * lr_factor(done, 10, 0.3) for done in range(2, 10)]
    for told, weights in results[1:]:
        assert told == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1], strict=True))


def test_silent_channels_count_one_if_they_differ_at_all() -> None:
    """Entry by entry: silent and equal, silent and a little off, energy of one, and an ordinary one."""
    difference, energy = torch.tensor([0.0, 0.5, 0.5, 1.0]).double(), torch.tensor([0.0, 0.0, 1.0, 4.0]).double()
    shares = [float(rank.error_of_sums(d, e)) for d, e in zip(difference.split(1), energy.split(1), strict=True)]
    assert shares == [0.0, 1.0, 0.5, 0.25]
    assert float(rank.error_of_sums(difference, energy)) == 0.4375


def test_small_features_are_not_constant() -> None:
    """What counts as constant is measured against the features' own size."""
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = hsic.linear_gram(features * 1e-6)
    assert float(hsic.nhsic(small, hsic.linear_gram(features))) == pytest.approx(1.0)
