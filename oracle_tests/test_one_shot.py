"""--baselines one_shot: the row is the run that one would start by hand for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oracle_tests.small_runs import arguments, events, fails, make_place
from torch_impl.experiment.config import parse
from torch_impl.experiment.planning import dry_run
from torch_impl.run import main

BY_HAND = {"steps": 1, "layer_sparsity": "uniform", "rank_allocation": "uniform"}


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "one shot, trained"),
        (
            {
                "steps": 3,
                "loss": "kl",
                "lr_schedule": "whole_run",
                "reconstruct_epochs": 1,
                "gradient_checkpointing": "true",
            },
            "one shot, reconstructed and trained",
        ),
    ],
    ids=["paper", "best"],
)
def test_the_row_is_the_run_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, title: str) -> None:
    place = make_place(tmp_path)
    options = {"eval_windows": 2, **changes}
    assert main(arguments(place, **options, baselines="one_shot")) == 0
    printed = capsys.readouterr()
    assert title in printed.out
    assert "one shot, trained, for comparison" in printed.err
    found = json.loads((place / "out" / "losa_result.json").read_text())
    assert title in (place / "out" / "report.html").read_text()
    assert events(place)[-1]["model"] == "one shot, trained"
    # The mean of the run's mean ranks 6, 7 and 8 is 7; of 6 and 7 it is rounded down.
    by_hand = {**options, **BY_HAND, "initial_rank": 7 if "steps" in changes else 6}
    assert main(arguments(place, **by_hand, output_dir=place / "by_hand")) == 0
    expected = json.loads((place / "by_hand" / "losa_result.json").read_text())
    assert found["one_shot"].pop("seconds") > 0
    assert expected["losa"].pop("seconds") > 0
    assert found["one_shot"].pop("packed_bytes") == pytest.approx(expected["losa"].pop("packed_bytes"), rel=0.02)
    assert found["one_shot"] == expected["losa"]
    assert expected["one_shot"] is None
    assert found["losa"]["perplexity"] != found["one_shot"]["perplexity"]


def test_it_is_planned_and_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = make_place(tmp_path)
    for words in (["lora"], ["one_shot", "lora"]):
        fails(capsys, place, [*arguments(place), "--baselines", *words], ["baselines is lora; allowed: one_shot"])
    argv = arguments(place, baselines="one_shot", finetune="false")
    fails(capsys, place, argv, ["baselines is one_shot, which trains, with finetune False"])
    alone = dry_run.make_plan(parse(arguments(place, reconstruct_epochs=2, layer_sparsity="uniform"))).work
    both = dry_run.make_plan(
        parse(arguments(place, reconstruct_epochs=2, layer_sparsity="uniform", baselines="one_shot"))
    ).work
    assert both.training == 2 * alone.training
    # Two steps, and one more.
    assert (2 * both.sweeps, 2 * both.reconstruction) == (3 * alone.sweeps, 3 * alone.reconstruction)
