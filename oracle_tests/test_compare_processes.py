"""The command that compares, started several times with one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_tests.small_comparisons import FILE, words
from oracle_tests.small_runs import make_place
from torch_impl.commands import compare
from torch_impl.experiment.comparison import cells
from torch_impl.experiment.comparison.matrix import Cell
from torch_impl.experiment.comparison.results import Outcome, Results


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("compare"))


def test_the_last_of_several_processes_writes_the_tables(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has claimed a run, then dies; the command is started again."""
    out, text = tmp_path / "out", FILE.replace('"none", "sparse_lora", "losa"', '"none"')

    def make(cell: Cell, material: cells.Material) -> cells.Trained:
        if cell.recipe.name == "none":
            raise RuntimeError("no memory")
        return cells.Trained(material.model, 0, 0, {}, {})

    monkeypatch.setattr(cells, "make", make)
    given = words(place, text, output=out)
    keys: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(cells.Workshop, "run", lambda _, cell: keys.append(cell.key) or Outcome(cell.labels, "diverged"))
        assert compare.main([*given[:1], *words(place, text, output=tmp_path / "other")[1:]]) == 0
    capsys.readouterr()
    with Results(out).claim(keys[-1]) as mine:
        assert mine
        assert compare.main(given) == 0
        assert "1 runs are under way in other processes, which will write the tables" in capsys.readouterr().out
        assert not (out / "tables.md").exists()
    assert compare.main(given) == 2
    captured = capsys.readouterr()
    assert "error: 1 runs failed" in captured.err
    assert "RuntimeError: no memory" in captured.out
    assert (out / "tables.md").exists()
    assert not list((out / ".claims").iterdir())


def test_processes_that_do_parts_end_with_one_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each --only does its part and writes all that there is. What fails in one part is no failure of the other."""
    text = FILE.replace(
        "sparsity = [0.5]", 'sparsity = [0.5, "2:4"]\nprune_method = ["wanda", "magnitude"]\nseeds = [0, 1]'
    )
    given = words(place, text, output=tmp_path / "out")
    ran: list[str] = []

    def run(_: cells.Workshop, cell: Cell) -> Outcome:
        ran.append(cell.key)
        if cell.recipe.name == "losa":
            return Outcome(cell.labels, "failed", "no memory")
        facts = {"model": "model", "windows": {"seqlen": 8}}
        return Outcome(cell.labels, "done", tuning=3.0, losses={"text.txt": [1.0, 2.0]}, facts=facts)

    monkeypatch.setattr(cells.Workshop, "run", run)
    parts = [["recipe=losa"], ["recipe=none,sparse_lora", "sparsity=0.5"], ["recipe=none,sparse_lora", "sparsity=2:4"]]
    assert [compare.main([*given, "--only", *only]) for only in parts] == [2, 0, 0]
    assert len(ran) == len(set(ran)) == 1 + 4 * (2 + 3 + 3)
    capsys.readouterr()
    last = (tmp_path / "out" / "tables.md").read_text()
    assert compare.main(given) == 2
    whole = (tmp_path / "out" / "tables.md").read_text()
    assert last == whole
    assert len(Results(tmp_path / "out").together()) == len(set(ran))

    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "results.json").write_bytes((tmp_path / "out" / "results.json").read_bytes())
    (tmp_path / "new").mkdir()
    assert (
        compare.main([*words(place, text, output=None), "--tables", *map(str, (tmp_path / "new", tmp_path / "added"))])
        == 0
    )
    assert (tmp_path / "new" / "tables.md").read_text() == whole
    ran.clear()
    assert compare.main([*words(place, text, output=tmp_path / "added"), "--only", "recipe=none,sparse_lora"]) == 0
    assert ran == [], "results.json is enough to run nothing again"
