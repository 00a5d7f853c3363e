"""Figures of a comparison of two texts, from results given by hand: every column, mean and unit of its tables and curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from torch_impl.experiment.comparison import (
    costs,
    curves,
    document,
    reading,
    recipes,
    rows,
    running,
    statistics,
    tables,
)
from torch_impl.experiment.comparison.matrix import Cell
from torch_impl.experiment.comparison.results import DONE, Outcome, Results
from torch_impl.experiment.planning.cards import find_card
from torch_impl.experiment.planning.dry_run import work_of
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import phases
from torch_impl.experiment.planning.table import sizes_of

FILE = """
title = "By hand"
[options]
nsamples = 8
seqlen = 32
rmi_samples = 4
[texts]
A = "stdlib"
B = { source = "stdlib", protocol = "documents" }
[[matrix]]
sparsity = [0.5, 0.7]
recipes = ["none", "losa"]
seeds = [0, 1]
learning_rates = [1e-3, 1e-2]
"""
# Perplexity on A by recipe and sparsity: of seed 0, of seed 1. On B it is twice that, without training three times.
PERPLEXITY = {
    ("none", "0.5"): (40.0, 44.0),
    ("none", "0.7"): (80.0, 84.0),
    ("losa", "0.5"): (20.0, 24.0),
    ("losa", "0.7"): (50.0, 52.0),
}
TUNING = {("0.5", 1e-3): 21.0, ("0.5", 1e-2): 22.0, ("0.7", 1e-3): 53.0, ("0.7", 1e-2): 51.0}
SECONDS = {
    "none": {"importance": 0.02, "prune": 2.0},
    "losa": {"importance": 1.0, "prune": 6.0, "train": 8.0, "evaluate": 100.0},
}
FACTS = {
    "hardware": "CPU",
    "dtype": "float32",
    "torch": "2",
    "software": {"version": "1"},
    "windows": {"seqlen": 32},
}


class ByHand:
    """Carries out cells by giving these figures."""

    def run(self, cell: Cell) -> Outcome:
        recipe, sparsity = cell.recipe.name, dict(cell.varied).get("sparsity", "")
        found = PERPLEXITY.get((recipe, sparsity), (10.0, 10.0))[cell.seed]
        times = 3 if recipe == "none" else 2
        more = 2 if sparsity == "0.7" else 1
        return Outcome(
            cell.labels,
            DONE,
            tuning=TUNING.get((sparsity, cell.rate or 0.0)),
            # Windows of A differ by 0.2 around the mean, with the sign of the seed; B has other ones.
            losses={"A": [math.log(found) + x for x in (0.1, -0.1, 0.2, -0.2)], "B": [math.log(times * found)] * 2},
            hashes={"A": "a", "B": "b"},
            seconds={part: more * value for part, value in SECONDS.get(recipe, {}).items()},
            gib={"prune": 1.0 * more, "train": 3.0 / more, "decode": 0.5, "decode dense": 0.75}
            if recipe == "losa"
            else {"importance": 0.25, "train": 0.75},
            trained=1_500_000 + more * 500_000 if recipe == "losa" else None,
            parameters=134_200_000,
            sparsity=0.25,
            facts=FACTS,
        )


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> document.Section:
    return section_of(tmp_path_factory.mktemp("by_hand"), FILE)


def section_of(folder: Path, file: str) -> document.Section:
    """Run a comparison by hand."""
    (folder / "some.toml").write_text(file)
    comparison = reading.read(folder / "some.toml", {})
    groups, results = [comparison.groups(matrix) for matrix in comparison.matrices], Results(folder)
    running.run(running.slots(groups[0]), results, ByHand(), lambda _: None)  # type: ignore[arg-type]
    return document.sections(comparison, groups, results, "losa")[0]


def rows_of(section: document.Section, title: str) -> dict[str, dict[str, str]]:
    table = next(table for table in section.tables if table.title.startswith(title))
    return {line[0]: dict(zip(table.cells[0], line, strict=True)) for line in table.cells[1:]}


def test_each_text_has_its_column_and_the_first_is_compared(section: document.Section) -> None:
    """40 and 44 have mean 42 and deviation 2.83. Against LoSA's 20 and 24 every window's loss is (ln 2 + ln 44/24) / 2 higher."""
    found = rows_of(section, "50 %")
    assert {name: (line["A"], line["B"]) for name, line in found.items()} == {
        "dense": ("10.00", "20.00"),
        "no training": ("42.00 ± 2.83", "126.00 ± 8.49"),
        "LoSA, as in the paper": ("22.00 ± 2.83", "44.00 ± 5.66"),
    }
    change = 100 * (math.sqrt(2 * 44 / 24) - 1)
    assert found["no training"]["against the paper's LoSA"] == f"+{change:.1f} %, p < 0.001"
    assert [found["LoSA, as in the paper"][name] for name in ("learning rate", "seeds")] == ["0.001", "2"]
    table = next(table for table in section.tables if table.title == "50 %")
    assert table.notes[0].startswith(
        "Perplexity per token on the second half of the windows of 32 tokens (4 of A, 2 of B);"
    )
    assert "the first half of A." in table.notes[0]


def test_a_table_names_its_sparsity_also_if_there_is_one_alone(tmp_path: Path) -> None:
    found = section_of(tmp_path, FILE.replace("sparsity = [0.5, 0.7]", "sparsity = [0.7]"))
    assert found.tables[0].title == "70 %"


def test_the_overview_is_of_the_first_text(section: document.Section) -> None:
    found = rows_of(section, "Perplexity on A by sparsity")
    assert found["dense"] == {"": "dense", "50 %": "10.00", "70 %": "10.00"}
    assert found["LoSA, as in the paper"]["70 %"] == "51.00 ± 1.41"


def test_the_rate_with_the_lowest_perplexity_is_bold_in_its_column(section: document.Section) -> None:
    table = next(table for table in section.tables if table.title.startswith("Learning rates"))
    assert table.cells == (
        ("sparsity", "", "0.001", "0.01"),
        ("50 %", "LoSA, as in the paper", "**21.00**", "22.00"),
        ("70 %", "LoSA, as in the paper", "53.00", "**51.00**"),
    )


def test_costs_are_means_of_seconds_and_the_largest_peaks(section: document.Section) -> None:
    """At 70 % everything takes twice the seconds; peaks are 1 and 2 GiB, 3 and 1.5, and 2 and 2.5 million are trained. What
    measuring takes is no cost; a mean of 0.03 s is shown as nothing, as is the peak of such a part and of one that is left out."""
    found = rows_of(section, "Cost of each part")
    parts = (
        "rates, s",
        "prune, s",
        "train, s",
        "in all, s",
        "prune, GiB",
        "train, GiB",
        "decode, GiB",
        "decode dense, GiB",
    )
    assert [found["LoSA, as in the paper"][part] for part in parts] == [
        "1.5",
        "9.0",
        "12.0",
        "22.5",
        "2.00",
        "3.00",
        "0.50",
        "0.75",
    ]
    assert found["LoSA, as in the paper"]["trained, millions"] == "2.25"
    assert "rates, GiB" not in found["no training"]
    [table] = [table for table in section.tables if table.title == "Cost of each part"]
    assert table.notes[0].endswith(
        "Decode: the model, smaller or packed, and all that it allocates while its speed is measured."
    )
    assert [found["no training"][part] for part in parts] == ["", "3.0", "", "3.0", "", "", "", ""]


def test_a_smaller_model_s_share_and_parameters(section: document.Section) -> None:
    row = section.rows[-1]
    assert (tables._share(row), tables._millions(row)) == ("25.0 %", "134.20")


def test_reported_runs_are_counted_with_their_seconds(section: document.Section) -> None:
    """The dense one, and two seeds of two recipes at two sparsities: 2 · 3 · 2 s, and 2 · 3 · 115 s."""
    assert section.facts[1].startswith("9 reported runs, 11:42 in all, on CPU, float32")


def test_each_curve_is_of_its_text(section: document.Section, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, tuple[Any, ...]] = {}
    monkeypatch.setattr(
        curves, "_picture", lambda path, panels, dense, labels, _: drawn.update({labels[1]: (panels[""], dense)})
    )
    assert curves.draw(tmp_path, [section]) == [["1-perplexity-A.png", "1-perplexity-B.png"]]
    for label, times in (("perplexity on A", 1), ("perplexity on B", 2)):
        lines, dense = drawn[label]
        assert dense == pytest.approx(10.0 * times)
        # Means and sample deviations of 20 and 24, and of 50 and 52.
        expected = [(0.5, 22.0 * times, math.sqrt(8) * times), (0.7, 51.0 * times, math.sqrt(2) * times)]
        assert lines["LoSA, as in the paper"] == list(map(pytest.approx, expected))


@pytest.mark.parametrize("smaller", [False, True])
def test_curves_say_what_is_gone_and_how_it_is_decoded(
    smaller: bool, section: document.Section, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Smaller models have no zeros, and nothing in them is packed."""
    labels: list[tuple[str, str]] = []
    monkeypatch.setattr(rows.Row, "smaller", smaller)
    monkeypatch.setattr(curves, "_speed", lambda row, side: statistics.Spread(1.0, None, 1))
    monkeypatch.setattr(curves, "_picture", lambda path, lines, dense, given, _: labels.append(given))
    curves.draw(tmp_path, [section])
    share = "share of the blocks' weights that was to go" if smaller else "share of zeros"
    speed = "tokens/s" if smaller else "tokens/s with packed weights"
    assert labels == [(share, "perplexity on A"), (share, "perplexity on B"), (share, speed)]


def test_no_two_rows_of_a_curve_look_alike() -> None:
    """A row that was measured at one sparsity is a single point, without a line."""
    assert len({curves.look(number) for number in range(40)}) == 40


def test_the_estimate_s_hours_and_memory_are_those_of_all_parts() -> None:
    """Reconstruction and written text too. Several cards share the work: their operations a second add up."""
    table = costs.estimated()
    rows = [dict(zip(table.cells[0], line, strict=True)) for line in table.cells[1:]]
    for row in rows:
        recipe = next(r for r in recipes.read({}, "").values() if r.title == row[""])
        config, sizes = (
            costs._config(row["parameters"], {**recipe.preset, **recipe.options}),
            sizes_of(costs.SIZES[row["parameters"]]),
        )
        work, cards = work_of(config, sizes), int(row["A100 80GB cards"])
        speed = 0.6 * 312e12 * cards
        assert row["reconstruct, s"] == (f"{work.reconstruction / speed:,.0f}" if work.reconstruction else "")
        shown = (work.sweeps + work.reconstruction + work.training) / speed
        # The text that the model writes is in the hours alone.
        assert (work.writing > 0) == (recipe.name == "best")
        assert row["hours in all"] == f"{(shown + work.writing / speed) / 3600:.2f}"
        parts = [float(row[f"{part}, s"].replace(",", "") or 0) for part in ("rates", "prune", "reconstruct", "train")]
        assert sum(parts) == pytest.approx(shown, abs=2)
        found = phases(config, sizes, Place("cuda", cards, find_card("A100 80GB").free))
        assert row["GiB a card"] == f"{max(part.total for part in found.values()) / 2**30:.0f}"
        assert found[row["most memory in"]].total == max(part.total for part in found.values())
    assert [row["published: rates, s"] for row in rows if row["published: rates, s"]] == [
        "48",
        "34",
        "74",
        "140",
        "332",
    ]
    assert [row["published: ranks, s"] for row in rows if row["published: ranks, s"]] == [
        "46",
        "32",
        "71",
        "132",
        "321",
    ]
