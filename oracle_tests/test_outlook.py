"""A plan for cards that need not be here: does the run fit, what would make it fit, how long does it take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oracle_tests.small_runs import arguments, make_place
from torch_impl import cli
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.planning import outlook as module
from torch_impl.experiment.planning.cards import CARDS, GIB, Card, card_of_device, find_card
from torch_impl.experiment.planning.outlook import Outlook, outlook
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.table import sizes_of

SIZES = sizes_of("llama-2-7b")


def found(card: str, operations: int = 10**18, cards: int = 1, **changes: object) -> tuple[Config, Outlook]:
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    config = parse(["--config", "llama_7b", "--model", "a/b", *words])
    chosen = find_card(card)
    return config, outlook(config, SIZES, Place("cuda", cards, chosen.free), chosen, operations)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H100 80GB", CARDS[1]),
        ("h100", CARDS[1]),
        ("H200", CARDS[0]),
        ("a100 40gb", CARDS[3]),
        ("RTX 4090", CARDS[5]),
        ("80GB", Card("80GB", 80, None)),
        ("96 GB", Card("96GB", 96, None)),
    ],
)
def test_cards_by_name(name: str, card: Card) -> None:
    assert find_card(name) == card
    assert card.name.replace(" ", "").endswith(f"{card.memory}GB")
    assert card.free == int(0.97 * card.memory * GIB)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("A100", "did you mean A100 80GB or A100 40GB?"), ("H100 80G", "did you mean H100 80GB"), ("TPU", "such as 80GB")],
)
def test_cards_that_are_none(name: str, meant: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "--plan_for", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: plan_for is '{name}'; give one of H200 141GB, H100 80GB")
    assert meant in said


def test_cards_by_what_torch_calls_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100 80GB",
        "NVIDIA H200": "H200 141GB",
        "NVIDIA GeForce RTX 4090": "RTX 4090 24GB",
    }
    for name, card in names.items():
        assert card_of_device(name) == find_card(card)
    assert card_of_device("Tesla T4") is None


def test_hours_are_operations_by_speed() -> None:
    """The 7B run that the share is measured on: 2,500 micro-batches of 4 × 512 in five steps, 7.1 minutes on an H200."""
    sweeps = 2 * SIZES.prunable * 2048 * (64 + 3 * 128) * 5
    _, whole = found("H200", sweeps + 6 * SIZES.prunable * 2500 * 4 * 512)
    assert whole.hours is not None
    assert 60 * whole.hours == pytest.approx(7.1, rel=0.03)
    assert found("H200")[1].hours == pytest.approx(1e18 / (0.6 * 989e12) / 3600)
    assert found("H200", cards=4)[1].hours == pytest.approx(1e18 / (0.6 * 989e12) / 3600 / 4)
    assert found("80GB")[1].hours is None
    wide = replace(SIZES, itemsize=4)
    config, _ = found("H200")
    assert outlook(config, wide, Place("cuda", 1, 2**40), find_card("H200"), 1).hours is None


def test_what_fits_needs_no_remedy() -> None:
    config, on = found("H100")
    assert (on.fits, on.remedies) == (True, ())
    assert on.free == int(0.9 * find_card("H100").free)
    assert peak(config, SIZES, Place("cuda", 1, find_card("H100").free)).device.total <= on.free


def test_what_does_not_fit_fits_with_each_remedy() -> None:
    """Weights and dense copy of 7B take 25 GiB, so one RTX 4090 never holds them; more do, and one block at a time does."""
    config, on = found("RTX 4090", per_device_train_batch_size=8)
    assert not on.fits
    words = [options for options, _ in on.remedies]
    assert len(words) == 3
    assert words[0].startswith("--devices ")
    assert words[1].startswith("--train_base int8 --offload on --calibration_batch_size 1")
    assert words[2].startswith("--steps 1 --finetune false")
    again = {"preset": "paper", **dict(zip(*[(w.removeprefix("--") for w in words[1].split())] * 2, strict=True))}
    assert on.remedies[1][1] == peak(found("RTX 4090", **again)[0], SIZES, Place("cuda")).device.total <= on.free
    place = Place("cuda", int(words[0].split()[1]), find_card("RTX 4090").free)
    assert on.remedies[0][1] == peak(config, SIZES, place).device.total <= on.free
    fewer = replace(place, cards=place.cards // 2)
    assert fewer.cards == 1 or peak(config, SIZES, fewer).device.total > on.free


def test_a_smaller_model_is_made_in_memory() -> None:
    """So blocks from disk are no remedy."""
    _, on = found("RTX 4090", per_device_train_batch_size=8, sparsity_type="structured", sparsity_ratio=0.2)
    assert [options.split()[0] for options, _ in on.remedies] == ["--devices"]


def test_smaller_batches_may_suffice() -> None:
    config, on = found("A100 40GB", per_device_train_batch_size=32)
    assert not on.fits
    words, needed = on.remedies[0]
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 64" in words
    smaller = parse(["--config", "llama_7b", "--model", "a/b", *words.split()])
    assert peak(smaller, SIZES, Place("cuda", 1, find_card("A100 40GB").free)).device.total == needed <= on.free
    assert smaller.training.batch_size == config.training.batch_size, "the same run"


def test_a_run_may_fit_on_the_given_text_alone() -> None:
    """The best preset on 7B needs 72 GiB for text that the model writes; without it, 80 GB suffice."""
    _, on = found("H100", preset="best")
    assert not on.fits
    [(words, needed)] = [remedy for remedy in on.remedies if remedy[0].startswith("--written_per_sample 0")]
    changed, fits = found("H100", preset="best", **dict([words.removeprefix("--").split()]))
    assert fits.fits
    assert needed == peak(changed, SIZES, Place("cuda", 1, find_card("H100").free)).device.total <= on.free
    _, smaller = found("H100", preset="best", per_device_train_batch_size=64)
    [words] = [options for options, _ in smaller.remedies if options.startswith("--written_per_sample 0")]
    assert "--written_per_sample 0 --calibration_batch_size 1" in words
    assert not [options for options, _ in found("RTX 4090")[1].remedies if options.startswith("--written_per_sample")]


@pytest.mark.parametrize(
    ("card", "changes", "words"),
    [
        (
            "H100",
            {"preset": "best"},
            "--steps 1 --finetune false --written_per_sample 0 --offload on --reconstruct_window 2 (",
        ),
        ("H200", {"preset": "best"}, "--steps 1 --finetune false --written_per_sample 0 --offload on ("),
        ("H100", {"preset": "quick", "offload": "off"}, "--offload on ("),
        ("H100", {"baselines": "one_shot"}, "--steps 1 --finetune false --offload on, without --baselines ("),
    ],
)
def test_a_large_model_gets_a_command_that_works(card: str, changes: dict[str, object], words: str) -> None:
    """70B, whose weights take 129 GiB twice, on one card."""

    def given(**options: object) -> list[str]:
        texts = {"calibration_data": "c4", "finetune_data": "c4", "eval_data": "c4"}
        return [
            word for name, value in ({"model": "a/b"} | texts | options).items() for word in (f"--{name}", str(value))
        ]

    large, chosen = sizes_of("llama-2-70b"), find_card(card)
    place = Place("cuda", 1, chosen.free)
    offered, needed = outlook(parse(given(**changes)), large, place, chosen, 1).remedies[-1]
    assert words in offered
    changes.pop("baselines", None)
    command = offered.partition(" (")[0].partition(",")[0].split()
    found = peak(parse([*given(**changes), *command]), large, place)
    assert (found.offloaded, found.device.total) == (True, needed)
    assert needed <= int(0.9 * chosen.free)


def test_nothing_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CARDS_TRIED", (2,))
    assert found("1GB")[1].remedies == ()


def test_the_plan_says_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = make_place(tmp_path)
    options = arguments(place, device=None)
    assert cli.main(["plan", *options, "--plan_for", "H100", "--dtype", "bfloat16"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " device cuda " in said
    assert "fits H100 80GB yes: 69.8 GiB of a card may be used" in said
    assert "at 60% of 989 TFLOP/s a card" in said
    for words, why in (
        (["80GB", "--dtype", "bfloat16"], "unknown for 80GB of any card; name one of H200 141GB, H100 80GB"),
        (["H100", "--dtype", "float32"], "unknown in float32; --dtype bfloat16 shows them"),
    ):
        assert cli.main(["plan", *options, "--plan_for", *words]) == 0
        assert f"hours (estimated)               {why}" in capsys.readouterr().out
    # Text of the hub is not read, so it is not too short.
    options = arguments(place, device=None, calibration_data="c4", finetune_data="c4", eval_data="c4")
    words = ["--train_seqlen", "9000", "--per_device_train_batch_size", "64"]
    assert cli.main(["plan", *options, *words, "--plan_for", "1GB"]) == 0
    said = capsys.readouterr().out
    assert "fits 1GB                        NO: 0.9 GiB of a card may be used" in said
    assert "  would fit at " in said
    assert cli.main(["plan", *arguments(place), "--plan_for", "H100"]) == 2
    assert "device is 'cpu' and plan_for is given" in capsys.readouterr().err
    assert cli.main(["run", *options, "--plan_for", "H100"]) == 2
    assert "plan_for is 'H100'; it is for plans: losa plan" in capsys.readouterr().err
