"""The figures of a comparison: statistics, the order of work, what a table says; and the files it is read from."""

from __future__ import annotations

import itertools
import math
import statistics as plain
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from tiny_models.random_models import random_model
from torch_impl.experiment import config
from torch_impl.experiment.baselines.decoding import DecodingCost
from torch_impl.experiment.comparison import (
    cells,
    costs,
    curves,
    document,
    page,
    published,
    reading,
    recipes,
    running,
    statistics,
    tables,
)
from torch_impl.experiment.comparison.matrix import Cell, Comparison, Group
from torch_impl.experiment.comparison.results import DIVERGED, DONE, FAILED, Outcome, Results
from torch_impl.experiment.comparison.rows import Row, row_of
from torch_impl.experiment.evaluate import perplexity, window_losses
from torch_impl.experiment.material import OtherText
from torch_impl.experiment.sections import MOST_SEED

FILE = """
title = "A comparison"
[options]
nsamples = 8
seqlen = 32
rmi_samples = 4
[[matrix]]
prune_method = ["wanda", "magnitude"]
sparsity = [0.5, 0.7, "2:4"]
recipes = ["none", "losa", "mine"]
seeds = [0, 1]
learning_rates = [1e-3, 1e-2]
[recipes.mine]
title = "mine | yours"
preset = "paper"
options = { steps = 3, loss = "kl" }
"""


def read(folder: Path, text: str = FILE, **options: Any) -> Comparison:
    path = folder / "some.toml"
    path.write_text(text, encoding="utf-8")
    return reading.read(path, **{"options": {}, **options})


def groups_of(comparison: Comparison, *only: str) -> list[list[Group]]:
    return reading.select([comparison.groups(matrix) for matrix in comparison.matrices], only)


class Pretended:
    """Carries out cells by saying that they were: losses follow from the labels."""

    def __init__(self, stop_at: int | None = None, ends: dict[str, str] | None = None, seconds: float = 0.0) -> None:
        self.ran: list[str] = []
        self._stop_at, self._ends, self._seconds = stop_at, ends or {}, seconds

    def run(self, cell: Cell) -> Outcome:
        if len(self.ran) == self._stop_at:
            raise KeyboardInterrupt
        self.ran.append(cell.key)
        time.sleep(self._seconds)
        status = self._ends.get(str(cell), DONE)
        if status != DONE:
            return Outcome(cell.labels, status, "loss nan")
        rate = 0.0 if cell.rate is None else abs(math.log10(cell.rate) + 2)
        base = (
            2
            + rate
            + 0.1 * cell.seed
            + 0.01 * len(cell.recipe.name)
            + float(dict(cell.varied).get("sparsity", 0) == "0.7")
        )
        noise = np.random.default_rng(int(cell.key, 16)).normal(0, 0.01, 8)
        return Outcome(
            cell.labels, DONE, tuning=math.exp(base), losses={"stdlib": (base + noise).tolist()}, hashes={"stdlib": "same"},
            unmerged=cell.unmerged, seconds={"prune": 2.0, "train": 3.0}, facts=FACTS,
            tokens_per_second={} if cell.recipe.name == "dense" else {"packed": 45.0, "dense": 20.0},
            gib={"prune": 1.5, "train": 2.5}, trained=1_500_000, zero_shot={
                "accuracy": {"piqa": 0.5 + 0.02 * cell.seed, "boolq": 0.6}, "mean": 0.55 + 0.01 * cell.seed,
                "stderr": {"piqa": 0.01 + 0.05 * cell.seed, "boolq": 0.02}, "version": "0.4",
            },
        )  # fmt: skip


FACTS = {
    "hardware": "CPU",
    "dtype": "float32",
    "torch": "2",
    "software": {"version": "1"},
    "windows": {"seqlen": 32},
}


def done(folder: Path, comparison: Comparison, **how: Any) -> tuple[list[list[Group]], Results]:
    groups, results = groups_of(comparison), Results(folder)
    flat = list(itertools.chain.from_iterable(groups))
    running.run(running.slots(flat), results, Pretended(**how), lambda _: None)  # type: ignore[arg-type]
    return groups, results


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[list[Group]], Results, document.Section]:
    """A comparison that is done, to read."""
    folder = tmp_path_factory.mktemp("made")
    comparison = read(folder, f'{FILE}treatment = "sora"\n')
    groups, results = done(folder, comparison)
    section, closing = document.sections(comparison, groups, results, "losa compare some.toml")
    assert (closing.title, closing.rows) == ("The paper's models", ())
    section = replace(section, tables=(*section.tables, *closing.tables))
    return comparison, groups, results, section


@pytest.mark.parametrize("values", [[4.0, 6.0, 8.0], [1.5, 1.25], [3.0]])
def test_mean_and_deviation(values: list[float]) -> None:
    found = statistics.spread(values)
    assert found.mean == pytest.approx(sum(values) / len(values))
    if len(values) == 1:
        assert found.deviation is None
    else:
        assert found.deviation == pytest.approx(plain.stdev(values)) == pytest.approx(np.std(values, ddof=1))
    assert statistics.spread([*values, None]) == statistics.Spread(None, None, len(values) + 1)
    assert statistics.spread([]) == statistics.Spread(None, None, 0)


@pytest.mark.parametrize("seeds", [1, 3])
def test_significance_is_scipy_s_paired_test_over_windows(seeds: int) -> None:
    generator = np.random.default_rng(0)
    ours, theirs = ({s: generator.normal(3, 0.5, 20).tolist() for s in range(seeds)} for _ in range(2))
    found = statistics.paired({**ours, 7: [0.0] * 20}, {**theirs, 8: [9.0] * 20})
    assert found is not None, "seeds that only one has do not count"
    a, b = (np.mean([of[seed] for seed in range(seeds)], axis=0) for of in (ours, theirs))
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.windows == 20


def test_a_difference_in_nats_is_shown_as_one_of_perplexity() -> None:
    """exp(0.5) = 1.649."""
    assert tables.significance(statistics.Paired(0.5, 0.2, 8)) == "+64.9 %, p = 0.200"
    assert tables.significance(statistics.Paired(-0.5, 0.0002, 8)) == "−39.3 %, p < 0.001"
    assert tables.significance(statistics.Paired(math.log(9.9), 0.0002, 8)) == "+890.0 %, p < 0.001"
    assert tables.significance(statistics.Paired(math.log(1234.0), 0.0002, 8)) == "1,234 times, p < 0.001"
    assert tables.significance(None) == ""


def test_what_another_process_mended_is_seen(tmp_path: Path) -> None:
    one, other = Results(tmp_path), Results(tmp_path)
    for status in (FAILED, DONE):
        other.put("key", Outcome({"recipe": "losa"}, status))
        found = one.get("key")
        assert found is not None
        assert found.status == status


def test_significance_needs_the_same_windows() -> None:
    one = {0: [1.0, 2.0, 3.0]}
    assert statistics.paired(one, {0: [1.0, 2.0]}) is None
    assert statistics.paired(one, {1: [1.0, 2.0, 3.0]}) is None
    assert statistics.paired({0: [1.0]}, {0: [2.0]}) is None
    assert statistics.paired(one, one) == statistics.Paired(0.0, 1.0, 3)
    assert statistics.paired(one, {0: [2.0, 3.0, 4.0]}) == statistics.Paired(-1.0, 0.0, 3)


@pytest.mark.parametrize(
    ("tuning", "best"),
    [
        ({1e-3: 5.0, 1e-2: 4.0, 1e-1: 6.0}, 1e-2),
        ({1e-3: math.nan, 1e-2: 4.0}, 1e-2),
        ({1e-3: 5.0, 1e-2: None}, 1e-3),
        ({1e-3: -math.inf, 1e-2: 4.0}, 1e-2),
        ({1e-3: math.inf, 1e-2: math.nan, 1e-1: 1e9}, 1e-1),
        ({1e-3: math.nan, 1e-2: None}, None),
    ],
)
def test_a_diverged_rate_is_never_the_best(tuning: dict[float, float | None], best: float | None) -> None:
    assert statistics.best_rate(tuning) == best


def test_losses_of_windows_are_those_of_their_tokens() -> None:
    model = random_model("llama-gqa").eval()
    ids = torch.randint(257, (5, 12), generator=torch.Generator().manual_seed(0))
    found = window_losses(model, ids, 2)
    with torch.no_grad():
        chances = model(input_ids=ids).logits.double().log_softmax(-1)
    for row, losses, loss in zip(ids, chances, found, strict=True):
        expected = -sum(float(losses[t, row[t + 1]]) for t in range(11)) / 11
        assert loss == pytest.approx(expected, rel=1e-5)
    assert statistics.perplexity(found) == pytest.approx(perplexity(model, ids, 3), rel=1e-6)


def test_the_order_of_work(tmp_path: Path) -> None:
    flat = list(itertools.chain.from_iterable(groups_of(read(tmp_path))))
    work = running.slots(flat)
    names = [(slot.cell.key, slot.seed, slot.group.recipe.name, slot.group.varied) for slot in work]
    assert len(names) == len(set(names)) == len(work)
    # 6 choices of 2 options; 2 rates of 2 recipes, one of them reported, and their other seed; 2 seeds of a third; the dense model.
    assert len(work) == 6 * 2 * 2 + 6 * 2 + 6 * 2 + 1


def test_a_row_of_two_matrices_is_run_with_the_seeds_and_rates_of_both(tmp_path: Path) -> None:
    """Each matrix chooses its rate with its own first seed, so that the second seed may be reported with another rate."""
    matrix = '[[matrix]]\nsparsity = 0.5\nrecipes = ["losa"]\nlearning_rates = [1e-3, 1e-2]\nseeds = [0, 2]\n'
    comparison = read(tmp_path, matrix + matrix.replace("[0, 2]", "[1, 2]"))
    groups, results = groups_of(comparison), Results(tmp_path)

    class Torn(Pretended):
        def run(self, cell: Cell) -> Outcome:
            return replace(super().run(cell), tuning=1.0 if (cell.seed, cell.rate) in ((0, 1e-3), (1, 1e-2)) else 2.0)

    running.run(running.slots([*groups[0], *groups[1]]), results, Torn(), lambda _: None)  # type: ignore[arg-type]
    rows = [row_of(of_matrix[1], results) for of_matrix in groups]
    assert [(row.rate, sorted(row.outcomes)) for row in rows] == [(1e-3, [0, 2]), (1e-2, [1, 2])]


def test_the_reference_is_named(tmp_path: Path) -> None:
    """Rows of any values are compared with the row of the same values but for those of the reference."""
    text = FILE.replace("seeds = [0, 1]", 'seeds = [0]\nreference = { recipe = "none", prune_method = "magnitude" }')
    comparison = read(tmp_path, text)
    groups, results = done(tmp_path, comparison)
    section, _ = document.sections(comparison, groups, results, "losa")
    table = next(table for table in section.tables if table.title == "50 %")
    column = table.cells[0].index("against no training, prune_method magnitude")
    filled = {line[:2] for line in table.cells[1:] if line[column]}
    assert ("wanda", "no training") in filled
    assert ("magnitude", "no training") not in filled
    assert table.notes[1].startswith("Against no training, prune_method magnitude: change in perplexity on stdlib")


def test_what_needs_the_same_text_follows_each_other(tmp_path: Path) -> None:
    """The best recipe calibrates on text that the model writes, each seed on other text."""
    text = FILE.replace('"none", "losa"', '"none", "best", "losa"')
    work = running.slots(list(itertools.chain.from_iterable(groups_of(read(tmp_path, text)))))
    materials = [slot.cell.material for slot in work]
    changes = sum(before != after for before, after in itertools.pairwise(materials))
    assert len(set(materials)) == 4, "two texts, with and without what the model writes"
    assert changes == 3, (
        "first what chooses learning rates, then the second seed, each with and without what is written"
    )


def test_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after five runs, continued by three that share the folder. None runs twice, not even one that fails for all."""
    monkeypatch.setattr(running, "PAUSE", 0.01)
    flat = list(itertools.chain.from_iterable(groups_of(read(tmp_path))))
    work, ends = running.slots(flat), {"wanda, 0.5, none, seed 1": FAILED}
    first = Pretended(stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        running.run(work, Results(tmp_path), first, lambda _: None)  # type: ignore[arg-type]
    assert not list((tmp_path / ".claims").iterdir()), "whoever stops gives its claim back"

    workers = [Pretended(ends=ends, seconds=0.01) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        elsewhere = list(pool.map(lambda one: running.run(work, Results(tmp_path), one, lambda _: None), workers))  # type: ignore[arg-type]
    assert all(worker.ran for worker in workers)
    ran = [key for worker in (first, *workers) for key in worker.ran]
    assert len(ran) == len(set(ran))
    # Of each tuned row, the run with the chosen rate and the first seed is one of those that chose it.
    assert len(ran) == 6 * 2 * 2 + 6 * 2 * 1 + 6 * 2 + 1
    assert 0 in elsewhere, "the last to end knows that it is"
    nothing = Pretended()
    running.run([slot for slot in work if slot.cell.recipe.name != "none"], Results(tmp_path), nothing, lambda _: None)  # type: ignore[arg-type]
    assert nothing.ran == []


def test_what_another_process_has_just_ended_is_not_repeated(tmp_path: Path) -> None:
    """It ended between the look at its result and the claim."""

    class Late(Results):
        @contextmanager
        def claim(self, key: str) -> Iterator[bool]:
            self.put(key, Outcome({}, DIVERGED))
            with super().claim(key) as mine:
                yield mine

    nothing = Pretended()
    assert running.run(running.slots(groups_of(read(tmp_path))[0]), Late(tmp_path), nothing, lambda _: None) == 0  # type: ignore[arg-type]
    assert nothing.ran == []


def test_what_failed_is_tried_again_and_what_diverged_is_not(tmp_path: Path) -> None:
    comparison = read(tmp_path)
    name = "wanda, 0.5, none, seed 0"
    ends = {
        name: FAILED,
        "wanda, 0.5, none, seed 1": DIVERGED,
        "wanda, 0.5, losa, seed 0, learning rate 0.01": DIVERGED,
    }
    groups, results = done(tmp_path, comparison, ends=ends)
    [row] = [
        row_of(g, results) for g in groups[0] if (g.recipe.name, *dict(g.varied).values()) == ("losa", "wanda", "0.5")
    ]
    assert (row.rate, row.tuning[1e-2].status) == (1e-3, DIVERGED)
    text = document.markdown(document.sections(comparison, groups, results, "losa"))
    assert "| wanda, 0.5 | no training | 0 |  | failed | loss nan |" in text
    again = Pretended()
    running.run(running.slots(groups[0]), Results(tmp_path), again, lambda _: None)  # type: ignore[arg-type]
    assert len(again.ran) == 1
    assert results.get(again.ran[0]).labels["recipe"] == "none"  # type: ignore[union-attr]


def test_a_learning_rate_that_failed_is_said_and_not_called_diverged(tmp_path: Path) -> None:
    """One rate of each of two rows failed, all of a third: they are listed once each, and the command counts them."""
    comparison = read(tmp_path)
    rate, other = "learning rate 0.01", "learning rate 0.001"
    ends = {f"wanda, {s}, losa, seed 0, {rate}": FAILED for s in ("0.5", "0.7", "2:4")}
    ends |= {f"wanda, 2:4, losa, seed {seed}, {other}": FAILED for seed in (0, 1)}
    groups, results = done(tmp_path, comparison, ends=ends)
    section, _ = document.sections(comparison, groups, results, "losa")
    tuning = next(table for table in section.tables if table.title.startswith("Learning rates"))
    line = next(line for line in tuning.cells if line[:3] == ("wanda", "50 %", "LoSA, as in the paper"))
    assert line[3].startswith("**")
    assert line[4] == "failed"
    failures = next(table for table in section.tables if "failed" in table.title)
    listed = sorted((line[0], *line[2:5]) for line in failures.cells[1:])
    expected = [("wanda, 0.5", "0", "0.01", "failed"), ("wanda, 0.7", "0", "0.01", "failed")]
    expected += [("wanda, 2:4", "0", "0.001", "failed"), ("wanda, 2:4", "0", "0.01", "failed")]
    assert listed == [*expected, ("wanda, 2:4", "1", "0.001", "failed")]
    assert sum(len(row.failed) for row in section.rows) == 5


def test_a_reported_run_that_failed_counts_beside_the_one_that_chose_its_rate(made: tuple[Any, ...]) -> None:
    """With tasks or speed these are two runs of the same labels."""
    row = next(row for row in made[-1].rows if row.group.recipe.name == "losa")
    broken = replace(row.outcomes[0], status=FAILED)
    both = replace(row, outcomes={**row.outcomes, 0: broken}, tuning={**row.tuning, row.rate: row.outcomes[0]})
    assert both.failed == [broken]
    assert replace(both, tuning={row.rate: broken}).failed == [broken], "one run that is both is listed once"


def test_costs_are_of_runs_that_ended_well(tmp_path: Path) -> None:
    """A row that diverged has no seconds, which are not zero seconds."""
    rates = ("0.001", "0.01")
    ends = {f"wanda, 0.5, losa, seed {seed}, learning rate {rate}": DIVERGED for seed in (0, 1) for rate in rates}
    groups, results = done(tmp_path, read(tmp_path), ends=ends)
    section, _ = document.sections(read(tmp_path), groups, results, "losa")
    table = next(table for table in section.tables if table.title == "Cost of each part")
    assert ("wanda", "LoSA, as in the paper", "2.0", "3.0", "5.0", "1.50", "2.50", "1.50") in table.cells


def test_a_seed_that_diverged_is_not_left_out_of_the_accuracy(tmp_path: Path) -> None:
    comparison = read(tmp_path)
    failed = {"wanda, 0.5, losa, seed 1, learning rate 0.01": FAILED}
    groups, results = done(tmp_path, comparison, ends={"wanda, 0.5, none, seed 1": DIVERGED, **failed})
    section, _ = document.sections(comparison, groups, results, "losa")
    table = next(table for table in section.tables if table.title == "50 %")
    line = dict(zip(table.cells[0], table.cells[2], strict=True))
    assert (line["prune_method"], line[""]) == ("wanda", "no training")
    assert [line[name] for name in ("stdlib", "piqa", "boolq", "mean")] == ["diverged"] * 4
    assert line["tokens/s"] == "45.0 (2.25×)"
    rows = [dict(zip(table.cells[0], row, strict=True)) for row in table.cells if row[0] == "wanda"]
    assert [row["seeds"] for row in rows] == ["2", "1 of 2", "2"], "a run that failed is no result"


def test_a_recipe_has_one_name_whether_it_diverged_or_not(tmp_path: Path) -> None:
    """Its adapters stay unmerged; without training it has none."""
    comparison = read(tmp_path, f'{FILE}treatment = "sora"\n')
    rates = ("0.001", "0.01")
    ends = {f"wanda, 0.5, mine, seed {seed}, learning rate {rate}": DIVERGED for seed in (0, 1) for rate in rates}
    groups, results = done(tmp_path, comparison, ends=ends)
    section, _ = document.sections(comparison, groups, results, "losa")
    for title in ("Perplexity on stdlib by sparsity", "Cost of each part"):
        table = next(table for table in section.tables if table.title == title)
        assert [line[:2] for line in table.cells if line[1].startswith("mine")] == [
            ("wanda", "mine | yours (unmerged)"), ("magnitude", "mine | yours (unmerged)"),
        ]  # fmt: skip
    [untrained] = groups_of(read(tmp_path, f'{FILE}treatment = "sora"\n', options={"finetune": ["false"]}))
    assert not any(group.base.unmerged for group in untrained)


def test_matrices_of_one_title_have_their_own_pictures(tmp_path: Path) -> None:
    matrix = FILE[FILE.index("[[matrix]]") : FILE.index("[recipes.mine]")] + 'title = "Same"\n'
    start, end = FILE[: FILE.index("[[matrix]]")], FILE[FILE.index("[recipes.mine]") :]
    comparison = read(tmp_path, start + matrix + matrix.replace("0.5, 0.7", "0.6, 0.8") + end)
    groups, results = done(tmp_path, comparison)
    sections = document.sections(comparison, groups, results, "losa")
    pictures = curves.draw(tmp_path, sections)
    assert pictures == [[f"{n}-perplexity-stdlib.png", f"{n}-speed.png"] for n in (1, 2)] + [[]]
    text = document.markdown(sections, pictures)
    assert [text.count(f"![{name}]") for files in pictures for name in files] == [1] * 4
    page.write(tmp_path / "tables.html", "A", sections, pictures)
    html = (tmp_path / "tables.html").read_text(encoding="utf-8")
    assert [html.count(f'alt="{Path(name).stem}"') for files in pictures for name in files] == [1] * 4


def test_the_time_left_is_that_of_runs_like_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each recipe its own; reported runs with tasks are longer than those to choose a rate by. What has failed is not left. The
    longest run takes its time, however many processes there are."""
    seconds = {("losa", False): 10.0, ("losa", True): 40.0, ("none", True): 5.0, ("dense", True): 1.0}
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])

    class Timed(Pretended):
        def run(self, cell: Cell) -> Outcome:
            now[0] += seconds[cell.recipe.name, cell.final]
            return super().run(cell)

    text = """[tasks]
    names = ["piqa"]
    [[matrix]]
    sparsity = 0.5
    recipes = ["none", "losa"]
    seeds = [0, 1]
    learning_rates = [1e-3, 1e-2]
    """
    work, lines = running.slots(groups_of(read(tmp_path, text))[0]), []
    ends = {"0.5, none, seed 1": FAILED}
    running.run(work, Results(tmp_path / "one"), Timed(ends=ends), lines.append)  # type: ignore[arg-type]
    order = ["losa", "losa", "dense", "none", "losa", "none", "losa"]
    assert [slot.cell.recipe.name for slot in work] == order
    mean = (10 + 10 + 1) / 3
    left = [6 * 10, 5 * 10, 2 * mean + 2 * 10, 5 + 2 * 10, 5 + 40, 40, 0]
    told = [line.partition("; about ")[2] for line in lines]
    assert told == [f"{running.clock(value)} left" if value else "" for value in left]
    assert [line.partition("]")[0] for line in lines] == [f"[{n}/7" for n in range(1, 8)]
    for processes, first in ((2, "0:30"), (8, "0:10")):
        lines.clear()
        monkeypatch.setattr(Results, "processes", lambda _, processes=processes: processes)
        running.run(work, Results(tmp_path / f"{processes}"), Timed(), lines.append)  # type: ignore[arg-type]
        assert lines[0].endswith(f"; about {first} left"), "they share six runs of 10 seconds"
        assert lines[-2].endswith("; about 0:40 left")


def test_runs_that_did_not_end_well_do_not_say_how_long_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before this process began one diverged, whose seconds nobody knows; in it the first two fail at once."""
    monkeypatch.setattr(running.time, "perf_counter", itertools.count().__next__)
    work, results, lines = running.slots(groups_of(read(tmp_path))[0]), Results(tmp_path), []
    results.put(work[0].cell.key, Outcome(work[0].cell.labels, DIVERGED))
    ends = {str(slot.cell): FAILED for slot in work[1:3]}
    running.run(work[:5], results, Pretended(ends=ends), lines.append)  # type: ignore[arg-type]
    assert ["left" in line for line in lines] == [False, False, True, False]
    assert lines[2].endswith("; about 0:01 left")


def test_processes_that_were_killed_do_not_count(tmp_path: Path) -> None:
    """Their files stay behind, those of the runs, too."""
    results = Results(tmp_path)
    with results.at_work(), Results(tmp_path).at_work(), results.claim("a run"):
        (tmp_path / ".claims" / "process-killed").touch()
        (tmp_path / ".claims" / "another run").touch()
        assert results.processes() == 2
        assert not (tmp_path / ".claims" / "process-killed").exists()
    assert results.processes() == 0


def test_progress_counts_the_whole_matrix(tmp_path: Path) -> None:
    flat = list(itertools.chain.from_iterable(groups_of(read(tmp_path))))
    lines: list[str] = []
    running.run(running.slots(flat), Results(tmp_path), Pretended(), lines.append)  # type: ignore[arg-type]
    assert lines[0].startswith("[1/49] wanda, 0.5, losa, seed 0, learning rate 0.001: perplexity 20")
    assert "; about 0:" in lines[0]
    assert "left" not in lines[-1]


def test_a_row_s_figures(made: tuple[Any, ...]) -> None:
    """Mean, deviation, change and p of the printed table, from the cells themselves."""
    _, groups, results, section = made
    table = next(table for table in section.tables if table.title == "70 %")
    cells = [dict(zip(table.cells[0], line, strict=True)) for line in table.cells[1:]]
    line = next(cell for cell in cells if cell["prune_method"] == "wanda" and cell[""].startswith("mine"))
    chosen = {
        name: {
            seed: outcome.losses["stdlib"]
            for seed in (0, 1)
            for group in groups[0]
            if (group.recipe.name, dict(group.varied).get("sparsity")) == (name, "0.7")
            and dict(group.varied)["prune_method"] == "wanda"
            and (outcome := results.get(group.final(seed, 1e-2).key))
        }
        for name in ("mine", "losa")
    }
    values = [math.exp(sum(losses) / len(losses)) for losses in chosen["mine"].values()]
    assert line["stdlib"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    ours, theirs = (np.mean(list(chosen[name].values()), axis=0) for name in ("mine", "losa"))
    p, change = stats.ttest_rel(ours, theirs).pvalue, 100 * (math.exp((ours - theirs).mean()) - 1)
    words = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    assert line["against the paper's LoSA"] == f"{change:+.1f} %, {words}".replace("-", "−")
    assert (line["learning rate"], line["seeds"], line["tokens/s"]) == ("0.01", "2", "45.0 (2.25×)")
    assert (line["piqa"], line["boolq"], line["mean"]) == ("51.0 ± 1.4", "60.0 ± 0.0", "55.5 ± 0.7")
    assert "by lm-eval 0.4; standard error of a task 1.0 to 2.0." in table.notes[2]
    overview = section.tables[0]
    assert overview.cells[0] == ("prune_method", "", "50 %", "70 %", "2:4")
    assert next(row for row in overview.cells if row[1].startswith("mine"))[3] == line["stdlib"]


def test_windows_that_differ_are_not_compared(made: tuple[Any, ...]) -> None:
    comparison, groups, results, _ = made
    rows = [row_of(group, results) for group in groups[0]]
    row = next(row for row in rows if row.group.recipe.name == "none")
    reference = tables.reference_of(row, rows, comparison.matrices[0])
    assert reference is not None
    assert row.compared(reference, "stdlib") is not None
    other = replace(row, outcomes={s: replace(o, hashes={"stdlib": "other"}) for s, o in row.outcomes.items()})
    assert other.compared(reference, "stdlib") is None
    assert reference.compared(reference, "stdlib") is None


def test_speeds_are_compared_run_by_run(made: tuple[Any, ...]) -> None:
    """One of two seeds ran on a machine that was ten times as busy: 3 and 1 times the dense speed are 2 times."""
    row = next(row for row in made[-1].rows if row.group.recipe.name == "losa")
    speeds = {0: {"packed": 300.0, "dense": 100.0}, 1: {"packed": 10.0, "dense": 10.0}}
    row = replace(row, outcomes={s: replace(o, tokens_per_second=speeds[s]) for s, o in row.outcomes.items()})
    table = tables.main([row], [row], made[0].matrices[0], {})
    assert dict(zip(*table.cells, strict=True))["tokens/s"] == "155.0 (2.00×)"


def test_rows_on_other_windows_are_told(made: tuple[Any, ...]) -> None:
    comparison, _, _, section = made
    matrix, note = comparison.matrices[0], "Not all rows are measured on the same windows"
    rows = section.rows
    assert not any(note in line for table in section.tables for line in table.notes)
    other = replace(rows[-1], outcomes={s: replace(o, hashes={"stdlib": "x"}) for s, o in rows[-1].outcomes.items()})
    table = tables.main([*rows[:-1], other], rows, matrix, {})
    assert [line.startswith(note) for line in table.notes] == [False, True, *[False] * (len(table.notes) - 2)]


def test_unmerged_and_published_rows_are_marked(made: tuple[Any, ...], tmp_path: Path) -> None:
    section = made[-1]
    for table in section.tables:
        body = table.cells[1:]
        marked = [line[0] == published.MARK for line in body]
        assert all(marked) if table.published else not any(marked), "never ours and the paper's in one body"
        for line in body:
            named = [cell for cell in line if cell.startswith("mine")]
            assert all(cell == "mine | yours (unmerged)" for cell in named)
    beside = {table.title.split(",")[1].split(":")[0].strip() for table in section.tables if table.published}
    assert beside == {"70 %", "2"}, "at 70 % and 2:4 the paper has rows, at 50 % it has none"
    text = document.markdown([section])
    assert "mine \\| yours (unmerged)" in text
    assert "    losa compare some.toml\n" in text
    assert "on CPU, float32" in text
    pictures = curves.draw(tmp_path, [section])
    assert pictures == [["1-perplexity-stdlib.png", "1-speed.png"]]
    page.write(tmp_path / "tables.html", "A & B", [section], pictures)
    html = (tmp_path / "tables.html").read_text(encoding="utf-8")
    assert "<title>A &amp; B</title>" in html
    assert html.count('<table class="published">') == 2
    assert "data:image/png;base64," in html


def test_costs(made: tuple[Any, ...]) -> None:
    """Measured: every part's mean seconds. Estimated: 6 operations per weight and token, 10,000 sequences, one A100."""
    section = made[-1]
    table = next(table for table in section.tables if table.title == "Cost of each part")
    head = ("prune_method", "", "prune, s", "train, s", "in all, s", "prune, GiB", "train, GiB", "trained, millions")
    assert table.cells[0] == head
    assert ("wanda", "LoSA, as in the paper", "2.0", "3.0", "5.0", "1.50", "2.50", "1.50") in table.cells
    assert len(table.cells) == 1 + 2 * 3
    estimated = costs.estimated()
    cells = [dict(zip(estimated.cells[0], line, strict=True)) for line in estimated.cells[1:]]
    losa = next(line for line in cells if line["parameters"] == "7B" and line[""] == "LoSA, as in the paper")
    prunable = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert losa["train, s"] == f"{6 * prunable * 10_000 * 1024 / (0.6 * 312e12):,.0f}"
    assert losa["rates, s"] == f"{5 * 2 * prunable * 64 * 2048 / (0.6 * 312e12):,.0f}"
    assert (losa["published: rates, s"], losa["published: ranks, s"], losa["A100 80GB cards"]) == ("48", "46", "1")
    assert {line["parameters"] for line in cells} == {"7B", "8B", "13B", "30B", "70B"}
    assert section.tables[-1] == estimated


def test_rows_without_a_result_are_left_out(tmp_path: Path) -> None:
    comparison = read(tmp_path)
    groups, results = groups_of(comparison, "recipe=none", "seed=0"), Results(tmp_path)
    running.run(running.slots(groups[0]), results, Pretended(), lambda _: None)  # type: ignore[arg-type]
    section, _ = document.sections(comparison, groups_of(comparison), results, "losa")
    assert {row.group.recipe.name for row in section.rows} == {"dense", "none"}
    assert section.facts[-1] == "12 rows have no result yet and are left out."
    table = next(table for table in section.tables if table.title == "50 %")
    assert table.cells[-1][-1] == "1 of 2"


def test_names_of_pictures_are_names_of_files(made: tuple[Any, ...], tmp_path: Path) -> None:
    """Whatever a text is called."""
    section = made[-1]

    def renamed(row: Row) -> Row:
        base = row.group.base
        measures = replace(base.measures, texts={"a/b c": OtherText("stdlib")})
        losses = {seed: replace(run, losses={"a/b c": run.losses["stdlib"]}) for seed, run in row.outcomes.items()}
        return replace(row, group=replace(row.group, base=replace(base, measures=measures)), outcomes=losses)

    shown = replace(section, rows=tuple(map(renamed, section.rows)))
    [names] = curves.draw(tmp_path, [shown])
    assert names[0] == "1-perplexity-a-b-c.png"
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_curves_are_of_shares_alone(made: tuple[Any, ...]) -> None:
    section = made[-1]
    lines = curves.series(section, lambda row: row.perplexity("stdlib"))
    assert len(lines) == 6
    assert all([share for share, _, _ in points] == [0.5, 0.7] for points in lines.values())
    spread = next(row for row in section.rows if row.group.recipe.name == "losa").perplexity("stdlib")
    assert spread is not None
    assert lines["wanda, LoSA, as in the paper"][0] == (0.5, spread.mean, spread.deviation)


def test_many_lines_have_a_panel_for_each_recipe(
    made: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section, value = made[-1], lambda row: row.perplexity("stdlib")
    lines = curves.series(section, value)
    assert curves.panels(section, value) == {"": lines}, "six lines are in one"
    monkeypatch.setattr(curves, "COLOURS", curves.COLOURS[:5])
    divided = curves.panels(section, value)
    assert {
        f"{name}, {recipe}": points for recipe, inside in divided.items() for name, points in inside.items()
    } == lines
    assert list(divided) == list(dict.fromkeys(name.partition(", ")[2] for name in lines))
    assert all(list(inside) == ["wanda", "magnitude"] for inside in divided.values())
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr(curves, "WIDE", 2)
    assert curves.draw(tmp_path, [section]) == [["1-perplexity-stdlib.png", "1-speed.png"]]
    *shown, rest = drawn[0].axes
    assert [axis.get_title() for axis in shown] == list(divided)
    assert not rest.get_visible()
    for axis, inside in zip(shown, divided.values(), strict=True):
        lines_of = [box.lines[0].get_xydata().tolist() for box in axis.containers]
        assert lines_of == [[[share, mean] for share, mean, _ in points] for points in inside.values()]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["wanda", "magnitude", "dense"]


def test_a_recipe_and_its_matrix_do_not_contradict_each_other(tmp_path: Path) -> None:
    """Else the row would be named after one and made by the other."""
    text = """[[matrix]]
    sparsity = 0.5
    prune_method = ["wanda"]
    recipes = ["mine"]
    [recipes.mine]
    options = { prune_method = "magnitude" }
    """
    with pytest.raises(
        ValueError, match="recipe 'mine' has prune_method magnitude, and its matrix wanda; leave one out"
    ):
        groups_of(read(tmp_path, text))
    assert len(groups_of(read(tmp_path, text.replace('["wanda"]', '["magnitude"]')))) == 1


def test_published_figures_stand_once_whatever_matrix_has_their_sparsity(tmp_path: Path) -> None:
    comparison = read(tmp_path, FILE + FILE[FILE.index("[[matrix]]") : FILE.index("[recipes.mine]")])
    groups, results = done(tmp_path, comparison)
    *ours, closing = document.sections(comparison, groups, results, "losa")
    assert [len(section.rows) for section in ours] == [19, 19]
    assert not any(table.published for section in ours for table in section.tables)
    assert [table.title.split(":")[0] for table in closing.tables] == [
        "Published in the paper, 70 %", "Published in the paper, 2", "Estimated cost of larger models",
    ]  # fmt: skip
    text = document.markdown([*ours, closing], [["curve.png"], [], []])
    assert text.index("**Perplexity on") < text.index("![curve.png]") < text.index("**50 %**")


def test_a_matrix_has_options_of_its_own_and_may_need_a_folder(tmp_path: Path) -> None:
    """It wins over the file's options and loses to the command line's; without its model and text it is left out."""
    more = """[[matrix]]
    optional = true
    sparsity = 0.5
    recipes = ["losa"]
    options = { model = "tiny", calibration_data = "a.txt", finetune_data = "a.txt", eval_data = "a.txt", nsamples = 6 }
    """
    assert len(read(tmp_path, FILE + more).matrices) == 1
    assert len(read(tmp_path, FILE + more, data=tmp_path).matrices) == 1
    (tmp_path / "tiny").mkdir()
    (tmp_path / "a.txt").touch()
    assert len(read(tmp_path, FILE + more, data=tmp_path, options={"model": ["x"]}).matrices) == 1
    for options, nsamples in (({}, 6), ({"nsamples": ["7"]}, 7)):
        comparison = read(tmp_path, FILE + more, data=tmp_path, options=options)
        first, second = groups_of(comparison)
        assert {group.base.config.calibration.nsamples for group in second} == {nsamples}
        assert {group.base.config.calibration.nsamples for group in first} == {nsamples if options else 8}
        for group in second:
            text = group.base.config.text
            assert group.base.config.model.model == str(tmp_path / "tiny")
            assert {text.calibration_data, text.finetune_data, text.eval_data} == {str(tmp_path / "a.txt")}
            assert list(group.base.measures.texts) == ["a.txt"]
        assert len({group.base.key for of_matrix in (first, second) for group in of_matrix[:1]}) == 2
    alone = more.replace("tiny", "other")
    with pytest.raises(ValueError, match=r"needs models and texts; give --data FOLDER with other, a\.txt$"):
        read(tmp_path, alone, data=tmp_path)
    with pytest.raises(ValueError, match="eval_data has no effect"):
        read(tmp_path, f'[texts]\nb = "b.txt"\n{FILE.strip().partition(chr(10))[2]}\n{more}', data=tmp_path)
    with_text = FILE.replace("[options]", '[texts]\nb = "b.txt"\n[options]')
    for old, new in (
        ("nsamples = 8", "nsamples = 8\neval_protocol = 'c4'"),
        ("[[matrix]]", "[[matrix]]\neval_protocol = ['c4', 'documents']"),
        ("steps = 3", "steps = 3, eval_protocol = 'c4'"),
    ):
        with pytest.raises(ValueError, match=r"eval_protocol has no effect in this command with \[texts\]"):
            read(tmp_path, with_text.replace(old, new))
    with pytest.raises(ValueError, match=r"matrix 2, options: 'nsample' is not an option"):
        read(tmp_path, FILE + more.replace("nsamples", "nsample"), data=tmp_path)


def test_published_averages_are_those_of_their_rows() -> None:
    for row in published.ROWS:
        # LoRAPrune's is printed as 60.05, and its accuracies have the mean 60.08.
        bound = 0.04 if row.method == "LoRAPrune" else 0.015
        assert sum(row.accuracy) / len(published.TASKS) == pytest.approx(row.average, abs=bound), row


def test_published_perplexities_are_those_of_the_paper_s_tables() -> None:
    """Typed again from the paper: by model, sparsity and method, in the order of the table."""
    found: dict[tuple[str, str, str], list[float | None]] = {}
    for row in published.ROWS:
        if not row.structured:
            found.setdefault((row.model, row.sparsity, row.method), []).append(row.perplexity)
    assert found == {
        ("LLaMA-2-7B", "0.7", "dense"): [5.12],
        ("LLaMA-2-7B", "0.7", "SparseGPT"): [27.42, 11.26, 11.06, 10.82],
        ("LLaMA-2-7B", "0.7", "Wanda"): [79.67, 12.74, 12.57, 12.08, 11.89, 10.94],
        ("LLaMA-2-7B", "0.7", "Pruner-Zero"): [103.15, 11.56, 10.78],
        ("LLaMA-2-7B", "0.7", "ALPS"): [19.31, 10.83, 10.28],
        ("LLaMA-2-7B", "2:4", "Wanda"): [11.02, 8.27, 7.91],
        ("LLaMA-2-7B", "mixed-2:4", "Wanda"): [7.72],
        ("OPT-13B", "0.7", "Wanda"): [19.75, 20.72, 20.55, 21.48],
    }


def test_published_rows_of_smaller_models_stand_apart() -> None:
    """As the review page has them; in the order of our tasks, which is another one. LoRAShear gives no perplexity."""
    table = tables.beside("0.2", structured=True)
    assert table is not None
    assert table.published
    assert tables.beside("0.2") is None
    assert tables.beside("0.7", structured=True) is None
    head, *lines = table.cells
    found = {line[2]: dict(zip(head, line, strict=True)) for line in lines}
    perplexities = {
        "dense": "5.69",
        "SliceGPT": "8.71",
        "LLM-Pruner": "8.14",
        "LoRAPrune": "7.63",
        "LoRAShear": "",
        "Wanda-SP": "7.07",
    }
    assert {name: line["WikiText-2"] for name, line in found.items()} == perplexities
    assert [found["LoRAShear"][task] for task in ("BoolQ", "PIQA", "OBQA")] == ["70.17", "76.89", "39.97"]
    assert [found["SliceGPT"][task] for task in ("HellaSwag", "ARC-e", "mean")] == ["45.67", "53.62", "46.99"]
    assert {line["model"] for line in found.values()} == {"LLaMA-7B"}


def test_results_survive_without_their_cells(tmp_path: Path) -> None:
    """results.json holds all, and is enough for tables."""
    comparison = read(tmp_path)
    groups, results = done(tmp_path, comparison)
    keys = [cell.key for group in groups[0] for cell in running.cells_of(group, results)]
    found = {key: results.get(key) for key in keys}
    results.collect()
    for file in (tmp_path / "cells").iterdir():
        file.unlink()
    again = Results(tmp_path)
    assert {key: again.get(key) for key in keys} == found == again.together()
    again.put("other", Outcome({}, DIVERGED))
    Results(tmp_path).collect()
    assert Results(tmp_path).together().keys() == {*keys, "other"}, "runs that others did meanwhile count"


def test_results_of_several_folders(tmp_path: Path) -> None:
    """Those of the first folder count most, but a failure never counts more than a result. Reading changes no other folder."""
    own, second, third = (Results(tmp_path / name) for name in ("own", "second", "third"))
    for folder, outcomes in (
        (own, {"a": DIVERGED, "b": FAILED, "c": FAILED}),
        (second, {"a": "done", "b": "done", "d": "done", "e": FAILED}),
        (third, {"d": DIVERGED, "e": DIVERGED, "f": FAILED}),
    ):
        for key, status in outcomes.items():
            folder.put(key, Outcome({"of": folder.folder.name}, status))
    second.collect()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json") if path.parts[-2] != "own"}
    for _ in range(2):
        merged = Results(own.folder, [second.folder, third.folder])
        found = {key: merged.get(key) for key in "abcdef"}
        assert {key: (outcome.labels["of"], outcome.status) for key, outcome in found.items() if outcome} == {
            "a": ("own", DIVERGED), "b": ("second", "done"), "c": ("own", FAILED), "d": ("second", "done"),
            "e": ("third", DIVERGED), "f": ("third", FAILED),
        }  # fmt: skip
        merged.collect()
        assert own.together() == found
    assert {path: path.read_bytes() for path in before} == before


def test_processes_that_do_parts_choose_one_learning_rate(tmp_path: Path) -> None:
    """Those of the second seed wait for the runs of the first, which choose it."""
    whole, second = (groups_of(read(tmp_path), *only) for only in ((), ("seed=1",)))
    kept = [group for group in whole[0] if 1 in group.seeds or group.recipe.treatment == "dense"]
    assert [g.tuning() for g in second[0]] == [g.tuning() for g in kept]
    assert any(g.tuning() and g.seeds == (1,) and g.tuning()[0].seed == 0 for g in second[0])


@pytest.mark.parametrize("text", ["{", "[]", '{"labels": {}}', '{"labels": {}, "status": "done", "colour": 1}'])
def test_a_corrupt_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "abc.json").write_text(text)
    with pytest.raises(ValueError, match=r"abc\.json is .*; delete it and run the comparison again"):
        Results(tmp_path).get("abc")


def keys(comparison: Comparison) -> set[str]:
    return {cell.key for of_matrix in groups_of(comparison) for group in of_matrix for cell in group.tuning()}


# Options whose two values give other results.
CHANGES = {
    "seqlen": ("16", "32"), "eval_windows": ("4", "6"), "eval_seqlen": ("32", "64"), "eval_data": ("stdlib", "c4"),
    "calibration_data": ("stdlib", "c4"), "finetune_data": ("stdlib", "c4"), "model": ("a/b", "a/c"), "train_examples": ("8", "9"),
    "dtype": ("float32", "bfloat16"), "calibration_batch_size": ("4", "8"),
}  # fmt: skip


def test_changed_settings_are_new_cells_and_another_place_is_not(tmp_path: Path) -> None:
    before = keys(read(tmp_path))
    assert len(before) == 24
    for old, new in (("nsamples = 8", "nsamples = 16"), ('loss = "kl"', 'loss = "ce"'), ("1e-3, 1e-2", "2e-3, 2e-2")):
        after = keys(read(tmp_path, FILE.replace(old, new)))
        assert (len(before & after) > 0) == (old == 'loss = "kl"')
        assert before != after
    short = '[[matrix]]\nsparsity = 0.5\nrecipes = ["losa"]\nlearning_rates = [1e-3, 1e-2]\n'
    every = {name: ["c4"] for name in ("calibration_data", "finetune_data", "eval_data")} | {"model": ["a/b"]}
    for option, values in CHANGES.items():
        one, two = (keys(read(tmp_path, short, options={**every, option: [value]})) for value in values)
        assert not one & two, option
    second = "[texts]\none = 'stdlib'\ntwo = {{ source = 'stdlib', protocol = '{}' }}\n" + short
    every.pop("eval_data")
    one, two = (keys(read(tmp_path, second.format(name), options=every)) for name in ("c4", "documents"))
    assert not one & two, "the second text's protocol"
    options = {"device": ["cpu"], "eval_batch_size": ["3"], "model": ["a/b/tiny"], "calibration_data": ["c4"]}
    options |= {"finetune_data": ["x/t.txt"], "eval_data": ["c4"]}
    elsewhere = {
        **options,
        "device": ["cuda"],
        "model": ["z/tiny"],
        "finetune_data": ["y/t.txt"],
        "eval_batch_size": ["9"],
    }
    assert keys(read(tmp_path, options=options)) == keys(read(tmp_path, options=elsewhere)) != before


def test_tasks_from_the_hub_and_from_a_folder_are_other_runs(tmp_path: Path) -> None:
    """Their documents differ. Figures of either are never shown as those of the other; the folder may lie anywhere."""
    text = FILE.replace("[[matrix]]", "[tasks]\nnames = ['piqa']\n[[matrix]]")
    found = [
        text,
        text.replace("names", "data = 'zeroshot'\nnames"),
        text.replace("names", "data = '/x/zeroshot'\nnames"),
    ]
    found.append(found[1].replace("data =", "limit = 3\ndata ="))
    hub, folder, elsewhere, limited = ([g.base.key for g in groups_of(read(tmp_path, t))[0]] for t in found)
    assert not set(hub) & set(folder)
    assert folder == elsewhere
    assert not set(folder[1:]) & set(limited)


def test_the_dense_model_is_measured_and_named_for_each_choice_that_its_figures_depend_on(tmp_path: Path) -> None:
    text = FILE.replace("[[matrix]]", "[[matrix]]\neval_seqlen = [16, 32]")
    dense = [group for group in groups_of(read(tmp_path, text))[0] if group.recipe.treatment == "dense"]
    assert [group.varied for group in dense] == [(("eval_seqlen", "16"),), (("eval_seqlen", "32"),)]


def test_a_recipe_s_own_text_makes_no_second_dense_line(tmp_path: Path) -> None:
    [groups] = groups_of(read(tmp_path, FILE.replace("steps = 3", 'steps = 3, calibration_data = "c4"')))
    assert {g.base.config.text.calibration_data for g in groups if g.recipe.name == "mine"} == {"c4"}
    dense = [group for group in groups if group.recipe.treatment == "dense"]
    [same] = [group for group in groups_of(read(tmp_path))[0] if group.recipe.treatment == "dense"]
    assert [group.base.key for group in dense] == [same.base.key]


def test_texts_are_encoded_once_by_each_model_s_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells.zero_shot, "load_tasks", lambda *_: {})
    more = "[texts]\none = 'stdlib'\n[tasks]\nnames = ['piqa']\n[[matrix]]\nmodel = ['one', 'other']"
    data = "calibration_data = 'stdlib'\nfinetune_data = 'stdlib'\n"
    text = FILE.replace("[[matrix]]", more).replace("nsamples", f"{data}nsamples")
    workshop, known = cells.Workshop(), {}
    for group in groups_of(read(tmp_path, text))[0]:
        name = group.base.config.model.model
        tokens = workshop.questions(group.base, SimpleNamespace(tokenizer=name))[1]  # type: ignore[arg-type]
        assert tokens.tokenizer == name
        assert known.setdefault(name, tokens) is tokens
    assert known.keys() == {"one", "other"}


def test_speed_is_measured_of_reported_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of those to choose a learning rate by, nor of the dense model, nor unasked; gib says what both models took."""
    monkeypatch.setattr(cells, "decoding_cost", lambda *_, **__: DecodingCost(20.0, 45.0, 300, 200))
    model, dense = random_model("llama"), random_model("llama", seed=1)
    found = []
    for speed in ("true", "false"):
        text = f"speed = {speed}\n{FILE}"
        [group] = [
            g
            for g in groups_of(read(tmp_path, text), "recipe=losa", "sparsity=0.7", "prune_method=wanda")[0]
            if g.rates
        ]
        final = group.final(group.seeds[0], group.rates[0])
        for cell, of in ((final, model), (final, dense), (group.tuning()[0], model)):
            found.append(cells._decoding(cell, of, dense))
    figures = {"packed": 45.0, "dense": 20.0}, {"decode": 200, "decode dense": 300}
    assert found == [figures, *[({}, {})] * 5]


def test_recipes_steps_and_ranks(tmp_path: Path) -> None:
    """The mean rank over all steps is 8 whatever the steps; varied options win over recipes, recipes over [options]."""
    text = FILE.replace("nsamples = 8", "nsamples = 8\nstep_shares = [0.5, 0.5]")
    text = text.replace('prune_method = ["wanda", "magnitude"]', "steps = [1, 3, 5, 10]").replace(
        '0.5, 0.7, "2:4"', "0.5"
    )
    [groups] = groups_of(read(tmp_path, text), "recipe=losa,mine")
    found = {(g.recipe.name, g.base.config.prune.steps): g.base.config for g in groups if g.recipe.name != "dense"}
    assert {key: c.adapter.initial_rank for key, c in found.items() if key[0] == "losa"} == {
        ("losa", 1): 8, ("losa", 3): 7, ("losa", 5): 6, ("losa", 10): 3,
    }  # fmt: skip
    assert {c.training.loss for key, c in found.items() if key[0] == "losa"} == {"ce"}
    assert found["mine", 3].training.loss == "kl"
    assert found["mine", 3].text.step_shares == [1 / 3] * 3


def test_options_win_over_a_recipe_s_preset_and_its_own_options_over_both(tmp_path: Path) -> None:
    """Of the file, of a matrix and of the command line. What is not to be trained is not."""
    more = {"steps": "2", "loss": '"ce"', "finetune": "true"}
    written = "\n".join(f"{name} = {value}" for name, value in more.items())
    words = {name: [value.strip('"')] for name, value in more.items()}
    of_matrix = ", ".join(f"{name} = {value}" for name, value in more.items())
    for comparison in (
        read(tmp_path, FILE.replace("nsamples = 8", f"nsamples = 8\n{written}")),
        read(tmp_path, FILE.replace("[[matrix]]", f"[[matrix]]\noptions = {{ {of_matrix} }}")),
        read(tmp_path, options=words),
    ):
        [groups] = groups_of(comparison)
        found = {
            g.recipe.name: (c.prune.steps, c.training.loss, c.training.finetune, c.adapter.initial_rank)
            for g in groups
            if (c := g.base.config) and g.recipe.name != "dense"
        }
        assert found == {"none": (1, "ce", False, 8), "losa": (2, "ce", True, 7), "mine": (3, "kl", True, 7)}


def test_text_is_left_for_training_if_options_ask_for_training(tmp_path: Path) -> None:
    """A recipe's preset alone said whether the comparison trains."""
    text = FILE.replace('recipes = ["none", "losa", "mine"]', 'recipes = ["mine"]').replace('"paper"', '"quick"')
    for more, finetunes in (("", False), ("\nfinetune = true", True), ("\nfinetune = 'yes'", True)):
        [groups] = groups_of(read(tmp_path, text.replace("nsamples = 8", f"nsamples = 8{more}")))
        assert {group.base.finetunes for group in groups} == {finetunes}
    for values, finetunes in (("[true, false]", True), ("[false]", False)):
        [groups] = groups_of(read(tmp_path, text.replace("[[matrix]]", f"[[matrix]]\nfinetune = {values}")))
        assert {group.base.finetunes for group in groups} == {finetunes}


def test_an_option_that_no_row_takes_is_refused(tmp_path: Path) -> None:
    alone = FILE.replace('recipes = ["none", "losa", "mine"]', 'recipes = ["mine"]')
    says = r"\[options\]: steps has no effect: every matrix or recipe sets its own"
    for text in (alone, FILE.replace("[[matrix]]", "[[matrix]]\nsteps = [2, 3]")):
        with pytest.raises(ValueError, match=f"comparison some.toml, {says}"):
            read(tmp_path, text.replace("nsamples = 8", "nsamples = 8\nsteps = 2"))
        with pytest.raises(ValueError, match=r"^--steps has no effect"):
            read(tmp_path, text, options={"steps": ["2"]})
    of_matrix = FILE.replace("[[matrix]]", "[[matrix]]\noptions = { steps = 4 }")
    with pytest.raises(ValueError, match=says):
        read(tmp_path, of_matrix.replace("nsamples = 8", "nsamples = 8\nsteps = 2"))
    assert read(tmp_path, of_matrix, options={"steps": ["2"]}).options["steps"] == ["2"]
    for text in (
        alone.replace("[[matrix]]", "[[matrix]]\noptions = { steps = 4 }"),
        of_matrix.replace("[[matrix]]", "[[matrix]]\nsteps = [2, 3]"),
    ):
        with pytest.raises(ValueError, match="matrix 1, options: steps has no effect: the matrix varies it, or each"):
            read(tmp_path, text)


def test_shipped_recipes_and_comparisons_can_be_read() -> None:
    shipped = recipes.read({"lora": {"learning_rates": [0.5]}}, "here")
    assert (shipped["lora"].title, shipped["lora"].learning_rates) == ("LoRA", (0.5,)), (
        "an own recipe changes what it says"
    )
    assert {"none", "lora", "adalora", "sora", "sparse_lora", "losa", "best"} <= shipped.keys()
    assert config.parse(_words(shipped["losa"])).settings == config.parse(["--preset", "paper"]).settings
    assert config.parse(_words(shipped["best"])).settings == config.parse(["--preset", "best"]).settings
    one = config.parse(_words(shipped["sparse_lora"]))
    assert (one.prune.steps, one.prune.layer_sparsity, one.adapter.rank_allocation) == (1, "uniform", "uniform")
    for path in (reading.find("quick"), *Path("docs/results").glob("*.toml")):
        groups = groups_of(reading.read(path, {}))
        assert all(of_matrix[0].recipe.name == "dense" and len(of_matrix) > 1 for of_matrix in groups)


def _words(recipe: recipes.Recipe) -> list[str]:
    return [word for name, values in {**recipe.preset, **recipe.options}.items() for word in (f"--{name}", *values)]


def test_seeds_and_rates_of_the_command_line_replace_the_file_s(tmp_path: Path) -> None:
    """Also the rates that a recipe has of its own."""
    text = FILE.replace('preset = "paper"', 'preset = "paper"\nlearning_rates = [5e-3]')
    [groups] = groups_of(read(tmp_path, text))
    assert {(g.recipe.name, g.seeds, g.rates) for g in groups if g.rates} == {
        ("losa", (0, 1), (1e-3, 1e-2)),
        ("mine", (0, 1), (5e-3,)),
    }
    [groups] = groups_of(read(tmp_path, text, seeds=[3, 4, 3], rates=[1e-4, 2e-4]))
    assert {(g.seeds, g.rates) for g in groups if g.recipe.name in ("losa", "mine")} == {((3, 4), (1e-4, 2e-4))}
    assert {g.seeds for g in groups if g.recipe.name == "none"} == {(3, 4)}


def test_only_narrows_down(tmp_path: Path) -> None:
    comparison = read(tmp_path)
    [groups] = groups_of(comparison, "recipe=losa,none", "sparsity=0.7,2:4", "seed=1", "learning_rate=0.01")
    assert groups[0].recipe.name == "dense"
    assert {(g.recipe.name, dict(g.varied)["sparsity"]) for g in groups[1:]} == {
        (recipe, sparsity) for recipe in ("losa", "none") for sparsity in ("0.7", "2:4")
    }
    assert {g.seeds for g in groups[1:]} == {(1,)}
    assert {g.rates for g in groups[1:]} == {(), (0.01,)}
    text = FILE + '[[matrix]]\nsparsity = 0.9\nrecipes = ["none"]\n'
    with pytest.raises(
        ValueError, match=r"^only has recipe=losa sparsity=0.9, which no run has together; leave one out$"
    ):
        groups_of(read(tmp_path, text), "recipe=losa", "sparsity=0.9")


def test_a_part_has_its_own_dense_models_alone(tmp_path: Path) -> None:
    text = FILE.replace("prune_method = ", 'model = ["one", "two"]\nprune_method = ')
    options = {name: ["stdlib"] for name in ("calibration_data", "finetune_data", "eval_data")}
    [groups] = groups_of(read(tmp_path, text, options=options), "model=two")
    assert [dict(g.varied)["model"] for g in groups if g.recipe.name == "dense"] == ["two"]
    [groups] = groups_of(read(tmp_path, text, options=options), "recipe=losa")
    assert [dict(g.varied)["model"] for g in groups if g.recipe.name == "dense"] == ["one", "two"]


def test_what_is_measured_on_other_windows_is_another_run(tmp_path: Path) -> None:
    """A comparison without training measures all of a text, of which one with training leaves some for it."""
    place = tmp_path / "text.txt"
    place.write_text("words")
    for other, same in ((str(place), False), ("c4", True)):
        options = {"finetune_data": [other], "eval_data": [str(place)], "calibration_data": ["c4"]}
        keys = []
        for compared in ('["none"]', '["none", "losa"]'):
            [groups] = groups_of(read(tmp_path, FILE.replace('["none", "losa", "mine"]', compared), options=options))
            keys.append([group.final(0, None).key for group in groups if group.recipe.name in ("dense", "none")])
        assert len(set(keys[0])) == len(keys[0]) == 1 + 2 * 3
        assert (keys[0] == keys[1]) == same


def test_a_rank_that_is_chosen_stays(tmp_path: Path) -> None:
    """Without one it follows from the number of steps."""
    text = FILE.replace("seeds =", "initial_rank = [6, 7]\nseeds =")
    [groups] = groups_of(read(tmp_path, text))
    ranks = {(g.recipe.name, dict(g.varied)["initial_rank"]): g.base.config.adapter.initial_rank for g in groups[1:]}
    assert ranks == {(recipe, rank): int(rank) for recipe in ("none", "losa", "mine") for rank in ("6", "7")}
    [groups] = groups_of(read(tmp_path))
    assert {g.base.config.adapter.initial_rank for g in groups if g.recipe.name == "mine"} == {7}


BAD: dict[str, tuple[str, str, str]] = {
    "a key": ("[options]", "[option]", "'option' is not known; did you mean options?"),
    "an option": ("nsamples", "nsample", "'nsample' is not an option of losa run; did you mean nsamples?"),
    "a varied option": ("prune_method", "prune_methods", "'prune_methods' is not an option of losa run; did you mean prune_method"),
    "an option of where": ("nsamples = 8", 'output_dir = "x"', "output_dir has no effect in a comparison"),
    "a sparsity as an option": ("sparsity =", "sparsity_ratio =", "sparsity_ratio has no effect in a comparison; use sparsity"),
    "a recipe": ('"losa", "mine"', '"loza", "mine"', "recipe 'loza' does not exist; did you mean losa"),
    "no recipes": ('recipes = ["none", "losa", "mine"]', "", "has no recipes; give recipes = [...], of none"),
    "a treatment": ('preset = "paper"', 'treatment = "lore"', "treatment is 'lore'; allowed: none, lora"),
    "a preset": ('preset = "paper"', 'preset = "papers"', "preset is 'papers'; allowed: paper, best, quick"),
    "a recipe's key": ('preset = "paper"', 'presets = "paper"', "'presets' is not known; did you mean preset"),
    "a recipe's option": ("steps = 3", "step = 3", "'step' is not an option of losa run; did you mean steps?"),
    "a seed": ("seeds = [0, 1]", "seeds = [0, -1]", "seeds has -1; allowed: 0 to"),
    "no seeds": ("seeds = [0, 1]", "seeds = []", "seeds is empty; give one or more"),
    "a rate": ("1e-3, 1e-2", "1e-3, -1e-2", "learning_rates has -0.01; allowed: finite numbers above 0"),
    "a rate that is no number": ("1e-3, 1e-2", "1e-3, nan", "learning_rates has nan; allowed: finite numbers above 0"),
    "twice the same": ("0.5, 0.7", "0.5, 0.5", "sparsity is [0.5, 0.5, '2:4']; give one or more values, each once"),
    "no matrix": ("[[matrix]]", "[texts]", "has no [[matrix]]; give one"),
    "no TOML": ("nsamples = 8", "nsamples = 8 8", "is not TOML: "),
    "a sparsity in words": ('"2:4"', '"unstructured"', "sparsity has 'unstructured'; allowed: shares of zeros"),
    "the same title": ("mine | yours", "no training", "recipes 'none' and 'mine' have the same title, 'no training'"),
    "a recipe that is a list": ('"losa", "mine"', '["losa"]', "recipe ['losa'] does not exist"),
    "a treatment that is a number": ('preset = "paper"', "treatment = 5", "treatment is 5; allowed: none"),
    "a speed": ("[options]", 'speed = "true"\n[options]', "speed is 'true'; allowed: true or false"),
    "another row's recipe": ("seeds =", 'reference = "best"\nseeds =', "recipe is best; this matrix has none, losa, mine"),
    "another row's value": ("seeds =", "reference = { sparsity = 0.55 }\nseeds =", "sparsity is 0.55; this matrix has 0.5, 0.7"),
    "a reference that is a number": ("seeds =", "reference = 5\nseeds =", "reference is 5; give a recipe, or a table"),
    "a value": ('"2:4"', '"2:5:3"', "sparsity_type is '2:5:3'; allowed: unstructured, N:M, mixed-N:M, structured"),
    "a share": ("0.5, 0.7", "50", "sparsity_ratio is 50.0; allowed: 0 up to, not including, 1; did you mean 0.5?"),
    "a reference": ("seeds =", "reference = { steps = 5 }\nseeds =", "'steps' is not known; use recipe, prune_method, sparsity"),
    "a text": ("[[matrix]]", "[texts]\na = 1\n[[matrix]]", "a is 1; give a source of text as eval_data takes it"),
    "a protocol": ("[[matrix]]", "[texts]\na = { source = 'c4', protocol = 'c5' }\n[[matrix]]", "protocol is 'c5'"),
    "tasks": ("[[matrix]]", "[tasks]\nnames = 'piqa'\n[[matrix]]", "names is 'piqa'; give a list of tasks"),
    "a limit": ("[[matrix]]", "[tasks]\nnames = ['piqa']\nlimit = 0\n[[matrix]]", "limit is 0"),
}  # fmt: skip


def test_the_largest_seed_is_one(tmp_path: Path) -> None:
    [groups] = groups_of(read(tmp_path, FILE.replace("seeds = [0, 1]", f"seeds = [0, {MOST_SEED}]")))
    assert groups[-1].seeds == (0, MOST_SEED)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    old, new, line = BAD[name]
    assert old in FILE
    with pytest.raises(ValueError) as error:  # noqa: PT011
        groups_of(read(tmp_path, FILE.replace(old, new, 1)))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_files_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reading.find("quick").name == "compare_quick.toml"
    Path("quick").write_text(FILE)
    assert reading.find("quick") == Path("quick")
    with pytest.raises(
        FileNotFoundError, match="comparison quik does not exist; give a TOML file or quick; did you mean quick"
    ):
        reading.find("quik")


def test_the_data_folder_has_models_and_texts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "tiny").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (data / name).write_text("words")
    texts = '[texts]\nown = "b.txt"\nhub = { source = "c4", protocol = "documents" }\n'
    text = FILE.replace("[[matrix]]", f'{texts}[tasks]\nnames = ["piqa"]\ndata = "zero"\n[[matrix]]')
    text = text.replace(
        "nsamples = 8", 'nsamples = 8\nmodel = "org/tiny"\ncalibration_data = "a.txt"\nfinetune_data = "c4"'
    )
    [groups] = groups_of(read(tmp_path, text, data=data))
    cell = groups[1].base
    assert cell.config.model.model == str(data / "tiny")
    assert cell.config.text.calibration_data == str(data / "a.txt")
    assert cell.config.text.finetune_data == "c4"
    assert cell.config.text.eval_data == str(data / "b.txt")
    assert cell.measures.texts == {"own": OtherText(str(data / "b.txt")), "hub": OtherText("c4", "documents")}
    assert cell.measures.data == "zero"
    [elsewhere] = groups_of(read(tmp_path, text))
    assert [group.base.key for group in groups] == [group.base.key for group in elsewhere]


def test_options_of_a_run_are_read_as_parsers_do() -> None:
    assert reading.command_options(["--nsamples", "4", "--step-shares", "0.5", "0.5", "--dtype=float64", "--deterministic"]) == {
        "nsamples": ["4"], "step_shares": ["0.5", "0.5"], "dtype": ["float64"], "deterministic": ["True"],
    }  # fmt: skip
