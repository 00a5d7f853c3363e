"""--report_to tensorboard: the events, read back, are those of metrics.jsonl, also after an interruption."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oracle_tests.small_runs import arguments, events, fails, make_place
from torch_impl import losa
from torch_impl.commands import compare
from torch_impl.experiment import metrics
from torch_impl.run import main

Points = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Points:
    """Return (step, value) of all points by tag."""
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected_of(lines: list[dict]) -> Points:
    """Return the points of a run's metrics, without its seconds."""
    points: Points = defaultdict(list)
    step = 0
    for line in lines:
        if line["event"] == "train":
            for name in ("loss", "learning_rate"):
                points[f"train/{name}"].append((len(points[f"train/{name}"]) + 1, line[name]))
        elif line["event"] == "perplexity":
            name = line["model"].replace(", ", "_").replace(" ", "_")
            points[f"perplexity/{name}"].append((line.get("step", step), line["value"]))
        else:
            step = line["step"]
            points["step/sparsity_asked"].append((step, line["target"]))
            points["step/largest_error"].append((step, max(line["errors"])))
            for name, key in (
                ("sparsity", "realised"),
                ("error", "errors"),
                ("importance", "importance"),
                ("rank", "ranks"),
            ):
                for block, value in enumerate(line[key]):
                    points[f"{name}_of_block/0{block}"].append((step, value))
    return points


def check(place: Path, name: str) -> Points:
    found = read(place / name / "tensorboard")
    seconds = {tag: found.pop(tag) for tag in sorted(found) if tag.startswith("seconds/")}
    assert list(seconds) == ["seconds/importance", "seconds/prune", "seconds/train"]
    assert all([step for step, _ in points] == [1, 2] for points in seconds.values())
    expected = expected_of(events(place, name))
    assert set(found) == set(expected)
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag
    return found


def test_events_are_the_metrics_also_of_a_run_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    place = make_place(tmp_path)
    options = {"report_to": "tensorboard", "save_every": 2, "eval_windows": 2}
    assert main(arguments(place, **options, output_dir=place / "whole")) == 0
    assert f"tensorboard --logdir {place}" in capsys.readouterr().err
    whole = check(place, "whole")
    assert len(whole["train/loss"]) == 4
    assert [step for step, _ in whole["perplexity/losa"]] == [1, 2]

    # Two optimizer steps beyond the last checkpoint, which are done again.
    log = metrics.Metrics.log

    def stop(self: metrics.Metrics, event: str, **values: object) -> None:
        log(self, event, **values)
        if event == "train" and (values["step"], values["optimizer_step"]) == (2, 2):
            raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "log", stop)
        assert main(arguments(place, **options)) == 2
    assert len(read(place / ".out.partial" / "tensorboard")["train/loss"]) == 4
    assert main([*arguments(place, **options), "--resume"]) == 0
    assert check(place, "out") == whole


def test_events_of_a_resumed_run_that_had_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no option of the result: a run may be resumed with it, or without."""
    place = make_place(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(losa, "_train_adapters", lambda *_: 1 / 0)
        assert main(arguments(place, eval_windows=2)) == 1
    assert main([*arguments(place, eval_windows=2, report_to="tensorboard"), "--resume"]) == 0
    check(place, "out")


def test_without_tensorboard_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    place, find = make_place(tmp_path), importlib.util.find_spec
    argv = arguments(place, report_to="wandb")
    fails(capsys, place, argv, ["report_to is 'wandb'; allowed: none, tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    argv = arguments(place, report_to="tensorboard")
    for words in (argv, [*argv, "--dry_run"]):
        fails(capsys, place, words, ['pip install "losa-oracle[tensorboard]"'])
    assert main(arguments(place, report_to="none", dry_run="true")) == 0
    assert compare.main(["quick", "--report_to", "tensorboard"]) == 2
    assert "report_to" in capsys.readouterr().err
