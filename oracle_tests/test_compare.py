"""The command that compares: real runs of a tiny model, what it refuses before any work, what it writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oracle_tests.small_comparisons import FILE, words
from oracle_tests.small_runs import ROOT, make_place, watched_windows
from torch_impl.commands import compare
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines.decoding import DecodingCost
from torch_impl.experiment.baselines.structured import kept_parameters
from torch_impl.experiment.comparison import cells, reading
from torch_impl.experiment.comparison.matrix import Cell
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.planning import dry_run
from torch_impl.experiment.text import written


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("compare"))


def test_a_comparison(place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two rates diverges. Tuning and reported windows never overlap; the command runs nothing twice."""
    seen = watched_windows(monkeypatch)
    given = words(place, eval_windows=7)
    assert compare.main([*given, "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("\n6 runs\n")
    assert compare.main(given) == 0
    said = capsys.readouterr()
    assert "[1/6] 0.5, sparse_lora, seed 0, learning rate 1e+30: diverged (" in said.err
    for reported, tuned in zip(seen[::2], seen[1::2], strict=True):
        assert (len(tuned), len(reported)) == (3, 4)
        assert not {tuple(row.tolist()) for row in reported} & {tuple(row.tolist()) for row in tuned}
        assert torch.equal(reported, seen[0]), "the same windows for all"
    found = json.loads((place / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert sorted(outcome["status"] for outcome in found.values()) == ["diverged"] * 2 + ["done"] * 4
    assert {outcome["facts"]["model"] for outcome in found.values()} == {"model"}, "no path of this machine"
    assert {outcome["facts"]["windows"]["seqlen"] for outcome in found.values()} == {seen[0].shape[1]}
    dense = next(outcome for outcome in found.values() if outcome["labels"]["recipe"] == "dense")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    of_windows = [math.exp(model(windows, labels=windows).loss.item()) for windows in seen[:2]]
    reported = math.exp(sum(dense["losses"]["text.txt"]) / 4)
    assert [reported, dense["tuning"]] == pytest.approx(of_windows, rel=1e-4)
    table = [line for line in said.out.splitlines() if line.startswith("| LoSA, as in the paper")]
    assert len(table) == 3, "figures, learning rates, costs"
    assert "| 0.01 |" in table[0]
    assert table[1].endswith("** | diverged |")
    assert "**Published in the paper" not in said.out
    for name in ("tables.md", "tables.html"):
        assert (place / "out" / name).stat().st_size > 1000
    by_recipe = {o["labels"]["recipe"]: o["seconds"].keys() for o in found.values() if o["status"] == "done"}
    assert by_recipe["dense"] == {"evaluate"}
    assert {"prune", "evaluate"} <= by_recipe["none"] <= {"importance", "prune", "evaluate"}
    assert {"importance", "prune", "train", "evaluate"} <= by_recipe["losa"]

    before = {path: path.stat().st_mtime_ns for path in (place / "out" / "cells").iterdir()}
    monkeypatch.setattr(cells, "make", lambda *_: pytest.fail("it runs again"))
    assert compare.main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in (place / "out" / "cells").iterdir()} == before
    again = capsys.readouterr().out
    assert again == said.out
    assert compare.main([*given, "--dry_run"]) == 0
    assert capsys.readouterr().out.endswith("\n6 runs, 6 of them done\n")
    tables = ["--tables", str(place / "out")]
    assert compare.main([*words(place, eval_windows=7, output=None), *tables]) == 0
    assert capsys.readouterr().out == again
    written_before = (place / "out" / "tables.md").read_text()
    assert compare.main([*words(place, eval_windows=8, output=None), *tables]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(f"error: tables {place / 'out'} has no result of these runs; give")
    )
    assert compare.main([*words(place, eval_windows=7, output=None), *tables, "--dry_run"]) == 2
    assert "leave out --dry_run" in capsys.readouterr().err
    assert (place / "out" / "tables.md").read_text() == written_before


def test_what_fails_is_said_and_the_others_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = FILE.replace('"none", "sparse_lora", "losa"', '"none", "broken"')
    plain = cells.make

    def make(cell: Cell, material: cells.Material) -> cells.Trained:
        if cell.config.prune.steps == 3:
            raise RuntimeError("CUDA out of\nmemory")
        return plain(cell, material)

    monkeypatch.setattr(cells, "make", make)
    out = tmp_path / "out"
    assert compare.main(words(place, text, output=out)) == 2
    said = capsys.readouterr()
    [line] = [line for line in said.err.splitlines() if "broken" in line]
    assert "0.5, broken, seed 0: failed (RuntimeError: CUDA out of memory)" in line
    assert said.err.splitlines()[-1].startswith("error: 1 runs failed; see the last table, and run the command again")
    assert "| 0.5 | broken | 0 |  | failed | RuntimeError: CUDA out of memory |" in said.out
    monkeypatch.setattr(cells, "make", plain)
    assert compare.main(words(place, text, output=out)) == 0
    assert "failed" not in capsys.readouterr().out


def test_an_unmerged_baseline_with_tasks_and_speed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks and speed are measured of what is reported alone, not to choose a learning rate."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    lines = [{"goal": f"the {n}", "sol1": "cat sat", "sol2": "dog sat", "label": n % 2} for n in range(4)]
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = f"""speed = true
    [texts]
    one = {json.dumps(str(place / "text.txt"))}
    two = {{ source = "stdlib", protocol = "documents" }}
    [tasks]
    names = ["piqa"]
    data = "zero"
    limit = 3
    [[matrix]]
    sparsity = 0.5
    recipes = ["sora"]
    learning_rates = [1e-3, 1e-2]
    """
    given = words(place, text, eval_data=None, eval_windows=4, train_examples=8, output=tmp_path / "out", data=tmp_path)
    monkeypatch.setattr(cells, "decoding_cost", lambda *_, **__: DecodingCost(dense=20.0, packed=45.0))
    assert compare.main(given) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("| SoRA (unmerged) |"))
    head = next(line for line in out.splitlines() if line.startswith("|  | one | two |"))
    shown = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert float(shown["piqa"]) == float(shown["mean"])
    assert shown["tokens/s"] == "45.0 (2.25×)"
    outcomes = Results(tmp_path / "out").together().values()
    measured = [outcome for outcome in outcomes if outcome.zero_shot]
    assert [(o.labels["recipe"], bool(o.tokens_per_second)) for o in measured] in (
        [("dense", False), ("sora", True)], [("sora", True), ("dense", False)],
    )  # fmt: skip
    assert {o.zero_shot["documents"]["piqa"] for o in measured} == {3}
    assert {o.labels["recipe"]: o.sparsity for o in measured} == {"dense": 0.0, "sora": None}, "its adapters fill zeros"
    assert len(outcomes) == 4
    assert {name: len(losses) for name, losses in measured[0].losses.items()} == {"one": 2, "two": 2}
    assert len(set(measured[0].hashes.values())) == 2, "of each text its own"
    assert "lm-eval" in out
    assert "the first 3 documents of each task" in out


def test_only_what_runs_needs_its_packages(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is said before any run, but neither for a part without it nor for tables of what others ran."""
    monkeypatch.setattr("torch_impl.experiment.baselines.baseline.find_spec", lambda _: None)
    monkeypatch.setattr(cells, "make", lambda *_: pytest.fail("it runs"))
    given = words(place, FILE.replace('"sparse_lora"', '"lora"'), output=tmp_path / "out")
    assert compare.main(given) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: recipe 'lora': baseline lora needs peft; install it: pip install")
    )
    assert compare.main([*given, "--dry_run", "--only", "recipe=losa"]) == 0
    (tmp_path / "there").mkdir()
    tables = words(place, FILE.replace('"sparse_lora"', '"lora"'), output=None)
    assert compare.main([*tables, "--tables", str(tmp_path / "there")]) == 2
    assert "has no result of these runs" in capsys.readouterr().err, "it asks for no package"


def test_the_file_of_the_documentation_is_read(tmp_path: Path) -> None:
    """Every key that docs/compare.md explains, in one file that is accepted."""
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```toml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
    comparison = reading.read(tmp_path / "shown.toml", {})
    [groups] = [comparison.groups(matrix) for matrix in comparison.matrices]
    assert len(groups) == 1 + 3 * 2 * 6


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ('[texts]\na = "stdlib"\nb = "missing.txt"', "[texts]: b is 'missing.txt', which does not exist"),
        ('[tasks]\nnames = ["pica"]\ndata = "zero"', "tasks has pica, and from tasks_data come only"),
        ('[tasks]\nnames = ["paper"]\ndata = "zero"', "zero"),
    ],
)
def test_texts_and_tasks_are_looked_for_before_any_run(
    more: str, line: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.setattr(cells, "make", lambda *_: pytest.fail("it runs"))
    changes = {"eval_data": None} if "[texts]" in more else {}
    assert compare.main([*words(place, f"{more}\n{FILE}", output=tmp_path / "out", **changes), "--dry_run"]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_parts_of_several_options_narrow_down_together(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [*words(place, output=tmp_path / "out"), "--dry_run", "--only", "recipe=none", "--only", "sparsity=0.5"]
    assert compare.main(given) == 0
    assert capsys.readouterr().out.splitlines() == ["dense, seed 0", "0.5, none, seed 0", "2 runs"]


def test_a_dry_run_lists_the_runs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert compare.main([*words(place, output=out), "--dry_run", "--only", "recipe=losa"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "0.5, losa, seed 0, learning rate 1e+30", "0.5, losa, seed 0, learning rate 0.01",
        "dense, seed 0", "3 runs",
    ]  # fmt: skip
    assert not out.exists()


def test_a_model_is_loaded_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all checks and for all seeds, whose text differs; a run does not depend on what ran before it."""
    text = FILE.replace('"none", "sparse_lora", "losa"', '"sparse_lora", "none"').replace("1e30, ", "")
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda *given: calls.append(name) or function(*given)

    monkeypatch.setattr(cells.pretrained, "load", counted("load", cells.pretrained.load))
    monkeypatch.setattr(dry_run, "outline", counted("outline", dry_run.outline))
    given = words(place, text, output=tmp_path / "out")
    assert compare.main([*given, "--seeds", "0", "1"]) == 0
    assert calls == ["outline", "load"]
    assert compare.main([*words(place, text, output=tmp_path / "alone"), "--seeds", "0", "1", "--only", "seed=1"]) == 0
    together, alone = (Results(tmp_path / name).together() for name in ("out", "alone"))
    assert {o.labels["seed"] for o in together.values()} == {"0", "1"}
    later = [key for key, outcome in alone.items() if outcome.labels["seed"] == "1"]
    assert len(later) == 2
    assert all(together[key].losses == alone[key].losses for key in later)


def test_peaks_are_in_gib_and_parts_that_take_no_time_are_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, peaks = {"prune": 2.0, "train": 1e-5}, {"prune": 3 * 2**30}
    monkeypatch.setattr(cells, "make", lambda _, m: cells.Trained(m.model, 0, 0, seconds, peaks))
    text = FILE.replace('"none", "sparse_lora", "losa"', '"none"')
    assert compare.main(words(place, text, output=tmp_path / "out")) == 0
    for outcome in Results(tmp_path / "out").together().values():
        assert outcome.gib == {"prune": 3.0}
        assert outcome.seconds.keys() == {"prune", "evaluate"}
        assert outcome.seconds["prune"] == 2.0


BAD: list[tuple[dict[str, object], list[str]]] = [
    ({"learning_rates": "1e-3 nan"}, ["learning_rates", "nan"]),
    ({"learning_rates": "0"}, ["learning_rates", "0.0", "above 0"]),
    ({"learning_rates": "fast"}, ["learning_rates", "fast"]),
    ({"seeds": "0 -1"}, ["seeds", "-1"]),
    ({"seed": 3}, ["--seed", "--seeds"]),
    ({"learning_rate": 1e-3}, ["--learning_rate", "--learning_rates"]),
    ({"sparsity_ratio": 0.7}, ["--sparsity_ratio", "the comparison's file"]),
    ({"output_dir": "out"}, ["--output_dir"]),
    ({"resume": "true"}, ["--resume"]),
    ({"colour": "blue"}, ["--colour"]),
    ({"nsample": "4"}, ["--nsample", "did you mean --nsamples"]),
    ({"steps": 30}, ["steps", "max_rank"]),
    ({"model": "no/such/model"}, ["no/such/model"]),
    ({"calibration_data": "nothing.txt"}, ["nothing.txt"]),
    ({"data": "nowhere"}, ["data nowhere is not a folder"]),
    ({"tables": "nowhere"}, ["tables nowhere is not a folder"]),
    ({"output": "/dev/null/out"}, ["output /dev/null/out cannot be written"]),
    ({"only": "recipe=lossa"}, ["recipe=lossa", "this comparison has losa, none, sparse_lora"]),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=str)
def test_bad_input_is_refused_before_any_work(
    place: Path,
    changes: dict[str, object],
    said: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cells, "make", lambda *_: pytest.fail("it trains"))
    assert compare.main(words(place, **changes)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for word in said:
        assert word in line


def test_a_recipe_that_would_ignore_an_option_is_refused_before_any_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "make", lambda *_: pytest.fail("it trains"))
    text = FILE.replace('"none", "sparse_lora", "losa"', '"sora", "losa"')
    assert compare.main(words(place, text, train_base="packed", output=tmp_path / "out")) == 2
    assert "error: recipe 'sora': train_base is packed, and baseline sora keeps" in capsys.readouterr().err


def test_one_window_cannot_be_halved(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare.main(words(place, eval_windows=1, output=tmp_path)) == 2
    assert "has only 1 window; give 2 or more" in capsys.readouterr().err


def test_a_file_is_needed(capsys: pytest.CaptureFixture) -> None:
    for given in ([], ["--seeds", "0"]):
        assert compare.main(given) == 2
        assert (
            "FILE is missing; give a TOML file, or quick, as the first word: losa compare quick"
            in capsys.readouterr().err
        )
    assert compare.main(["no.toml"]) == 2
    assert "comparison no.toml does not exist; give a TOML file or quick" in capsys.readouterr().err


def test_what_a_model_writes_is_written_once(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a later process, for another recipe; another seed has its own."""
    counted: list[int] = []
    plain = written.written_windows

    def write(*given: Any) -> torch.Tensor:
        counted.append(given[-1])
        return plain(*given)

    monkeypatch.setattr(written, "written_windows", write)
    text = 'title = "x"\n[options]\nwritten_per_sample = 1\n[[matrix]]\nsparsity = [{}]\nrecipes = ["none"]\nseeds = [{}]\n'
    for sparsity, seed in ((0.5, 0), (0.6, 0), (0.6, 1)):
        assert compare.main(words(place, text.format(sparsity, seed), output=tmp_path / "out")) == 0
    assert counted == [0, 1]
    assert len(list((tmp_path / "out" / "written").iterdir())) == 2


def test_kept_models_are_those_that_were_measured(place: Path, tmp_path: Path) -> None:
    """A smaller one is saved smaller; the dense one is not saved."""
    text = """[[matrix]]
    sparsity = 0.5
    recipes = ["sparse_lora", "structured_alone"]
    learning_rates = [1e-3, 1e-2]
    """
    given = [*words(place, text, train_examples=8, output=tmp_path / "out"), "--keep_models"]
    assert compare.main(given) == 0
    folders = {path.name.split("-seed")[0]: path for path in (tmp_path / "out" / "models").iterdir()}
    assert sorted(folders) == ["0.5-sparse_lora", "0.5-structured_alone"]
    sizes: list[int] = []
    outcomes = {o.labels["recipe"]: o for o in Results(tmp_path / "out").together().values() if "recipe" in o.labels}
    for name, recipe in (("0.5-sparse_lora", "sparse_lora"), ("0.5-structured_alone", "structured_alone")):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folders[name]),
            AutoTokenizer.from_pretrained(folders[name]),
        )
        assert len(tokenizer("the cat")["input_ids"]) > 1
        assert kept_parameters(Decoder(model)) == outcomes[recipe].parameters
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] < sizes[0]


def test_models_of_two_matrices_are_kept_beside_each_other(place: Path, tmp_path: Path) -> None:
    """Their rows have the same names."""
    matrix = '[[matrix]]\nsparsity = 0.5\nrecipes = ["none"]\noptions = {{ rmi_samples = {} }}\n'
    given = [
        *words(place, matrix.format(2) + matrix.format(3), rmi_samples=None, output=tmp_path / "out"),
        "--keep_models",
    ]
    assert compare.main(given) == 0
    outcomes = Results(tmp_path / "out").together()
    keys = {key for key, outcome in outcomes.items() if outcome.labels["recipe"] == "none"}
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {f"0.5-none-seed-0-{key}" for key in keys}
    assert len(keys) == 2
