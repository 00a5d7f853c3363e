"""The comparison of variants: which learning rate it chooses, what it refuses before any work, what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from oracle_tests.small_runs import arguments, make_place
from torch_impl.experiment import compare
from torch_impl.experiment.config import parse


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("compare"))


def words(place: Path, **changes: object) -> list[str]:
    """Options of a small comparison."""
    given = {"output_dir": None, "learning_rate": None, "learning_rates": "1e-2", "seeds": "0", **changes}
    variants = given.pop("variants", "one shot")
    return [*arguments(place, **given), "--variants", *([variants] if isinstance(variants, str) else variants)]


@pytest.mark.parametrize(
    ("tuning", "best"),
    [
        ({1e-3: 5.0, 1e-2: 4.0, 1e-1: 6.0}, 1e-2),
        ({1e-3: math.nan, 1e-2: 4.0}, 1e-2),
        ({1e-3: 5.0, 1e-2: math.nan}, 1e-3),
        ({1e-3: -math.inf, 1e-2: 4.0}, 1e-2),
        ({1e-3: math.inf, 1e-2: math.nan, 1e-1: 1e9}, 1e-1),
        ({1e-3: math.nan, 1e-2: math.inf}, 1e-3),
    ],
)
def test_a_diverged_rate_is_never_the_best(tuning: dict[float, float], best: float) -> None:
    assert compare.best_rate(tuning) == best


def test_a_rate_that_diverges_counts_as_infinite(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of two rates diverges; of the two variants one has no other. Strict JSON, whatever comes out."""
    file = tmp_path / "figures.json"
    variants = ["one shot", "LoSA, one schedule, KL"]
    assert compare.main(words(place, learning_rates="1e30 1e-2", json=file, variants=variants)) == 0
    shown = capsys.readouterr().out
    figures = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert figures["dense"] > 1
    for record in figures["variants"]:
        assert record["variant"] in shown
        assert record["learning_rate"] == 1e-2
        assert record["tuning"]["1e+30"] is None
        assert record["mean"] == record["perplexity"][0] > 1
        assert record["tuning"]["0.01"] != record["mean"], "tuned on one half, measured on the other"
    assert "1e+30: diverged" in shown
    assert "learning rate 1e+30: " in caplog.text

    assert compare.main(words(place, learning_rates="1e30", json=file)) == 0
    [record] = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))["variants"]
    assert (record["mean"], record["perplexity"], record["stdev"]) == (None, [None], None)
    assert "diverged" in capsys.readouterr().out


BAD: list[tuple[dict[str, object], list[str]]] = [
    ({"learning_rates": "1e-3 nan"}, ["learning_rates", "nan"]),
    ({"learning_rates": "0"}, ["learning_rates", "0.0", "above 0"]),
    ({"learning_rates": "1e-3 -1"}, ["learning_rates", "-1"]),
    ({"learning_rates": "inf"}, ["learning_rates", "inf"]),
    ({"learning_rates": "fast"}, ["learning_rates", "fast"]),
    ({"seeds": "0 -1"}, ["seeds", "-1"]),
    ({"seeds": "zero"}, ["seeds", "zero"]),
    ({"json": "missing/folder/a.json"}, ["json", "missing/folder", "existing folder"]),
    ({"json": "."}, ["json", "existing folder"]),
    ({"variants": "two shots"}, ["two shots", "one shot, KL"]),
    ({"seed": 3}, ["--seed", "--seeds"]),
    ({"learning_rate": 1e-3}, ["--learning_rate", "--learning_rates"]),
    ({"output_dir": "out"}, ["--output_dir", "--json"]),
    ({"resume": "true"}, ["--resume"]),
    ({"colour": "blue"}, ["--colour"]),
    ({"finetune": "false"}, ["finetune", "learning rates"]),
    ({"steps": 30, "variants": "LoSA, one schedule, KL"}, ["steps", "max_rank"]),
    ({"model": "no/such/model"}, ["no/such/model"]),
    ({"calibration_data": "nothing.txt"}, ["nothing.txt"]),
    ({"eval_windows": 1}, ["1 window", "2 or more"]),
    ({"train_examples": 3, "steps": 4, "variants": "LoSA, one schedule, KL"}, ["3 training examples", "too few"]),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=str)
def test_bad_input_is_refused_before_any_work(
    place: Path,
    changes: dict[str, object],
    said: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare.losa, "run", lambda *_: pytest.fail("it trains"))
    assert compare.main(words(place, **changes)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in said:
        assert word in line


def test_one_shot_takes_the_labels_and_its_twin_the_dense_model() -> None:
    """Whatever the configuration's own loss is: the embedded model's is kl."""
    config = parse([])
    assert config.training.loss == "kl"
    losses = {name: compare.variant_config(config, name, 1e-3, 0).training.loss for name in compare.VARIANTS}
    assert losses == {name: "kl" if "KL" in name else "ce" for name in compare.VARIANTS}
