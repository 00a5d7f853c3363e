"""Run the cells of a comparison in an order that lets learning rates be chosen first. Several processes share the work."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_impl.experiment.comparison.cells import Workshop
from torch_impl.experiment.comparison.matrix import Cell, Group
from torch_impl.experiment.comparison.results import DIVERGED, DONE, FAILED, Outcome, Results
from torch_impl.experiment.comparison.statistics import best_rate, perplexity
from torch_impl.experiment.progress import clock

Say = Callable[[str], None]
PAUSE = 2.0  # seconds between looks at what other processes have finished


@dataclass(frozen=True)
class Slot:
    """A place in the order of work. seed: None for a run to choose a learning rate by, `cell`; else the run that is reported."""

    group: Group
    cell: Cell
    seed: int | None = None

    def __str__(self) -> str:
        if self.seed is None or len(self.group.rates) <= 1:
            return str(self.cell)
        rates = ", ".join(f"{rate:g}" for rate in self.group.rates)
        return f"{dataclasses.replace(self.cell, rate=None)}, the best learning rate of {rates}"

    def resolve(self, results: Results) -> Cell | None:
        """Return the cell; None if the learning rate cannot be chosen yet, because a run of `Group.tuning` is missing."""
        if self.seed is None or len(self.group.rates) <= 1:
            return self.cell
        if not tuned(self.group, results):
            return None
        return self.group.final(self.seed, chosen_rate(self.group, results))

    def done(self, results: Results) -> bool:
        """Return whether the run has ended, and not failed."""
        cell = self.resolve(results)
        outcome = None if cell is None else results.get(cell.key)
        return outcome is not None and outcome.finished


def tuned(group: Group, results: Results) -> bool:
    """Return whether all runs to choose a learning rate by have ended, be it in failure."""
    return all(results.get(cell.key) is not None for cell in group.tuning())


def tuning_outcomes(group: Group, results: Results) -> dict[float, Outcome]:
    """Return the runs that learning rates are chosen by, as far as they have ended, be it in failure, by rate."""
    found = {cell.rate: results.get(cell.key) for cell in group.tuning()}
    return {rate: outcome for rate, outcome in found.items() if rate is not None and outcome is not None}


def chosen_rate(group: Group, results: Results) -> float | None:
    """Return the learning rate to report; None if nothing is trained. If all diverged, the first."""
    if len(group.rates) <= 1:
        return group.rates[0] if group.rates else None
    best = best_rate({rate: outcome.tuning for rate, outcome in tuning_outcomes(group, results).items()})
    return group.rates[0] if best is None else best


def cells_of(group: Group, results: Results) -> list[Cell]:
    """Return the runs of a group, as far as they are known: what is reported only once the learning rate is chosen."""
    found = group.tuning()
    if not found or tuned(group, results):
        rate = chosen_rate(group, results)
        found += [group.final(seed, rate) for seed in group.seeds]
    return found


def slots(groups: Sequence[Group]) -> list[Slot]:
    """Return the order of work, each run once: first all learning rates, then what is reported, one seed after the other.

    Runs that need the same model and text follow each other. A report that is a run of the first kind, whatever rate is chosen,
    has no slot of its own.
    """
    tuning: dict[str, Slot] = {}
    for group in groups:
        for cell in group.tuning():
            tuning.setdefault(cell.key, Slot(group, cell))
    found: dict[tuple[str, ...], Slot] = {}
    for seed in dict.fromkeys(seed for group in groups for seed in group.seeds):
        for group in groups:
            if seed in group.seeds:
                reports = [group.final(seed, rate) for rate in group.rates or (None,)]
                if not all(cell.key in tuning for cell in reports):
                    chosen_by = (cell.key for cell in group.tuning())
                    found.setdefault((reports[0].key, *chosen_by), Slot(group, reports[0], seed))
    return [*_by_material(tuning.values()), *_by_material(found.values())]


def _by_material(work: Iterable[Slot]) -> list[Slot]:
    together: defaultdict[str, list[Slot]] = defaultdict(list)
    for slot in work:
        together[slot.cell.material].append(slot)
    return [slot for of_material in together.values() for slot in of_material]


def run(work: Sequence[Slot], results: Results, workshop: Workshop, say: Say) -> int:
    """Do the work that nobody has done or is doing. Return the number of runs that other processes are still doing.

    A learning rate that another process is about to choose is waited for. Runs that failed before are tried again.
    """
    worker = _Worker(work, results, workshop, say)
    with results.at_work():
        while True:
            elsewhere = waiting = 0
            before = len(worker.tried)
            for slot in work:
                cell = slot.resolve(results)
                if cell is None:
                    waiting += 1
                elif not worker.run(cell):
                    elsewhere += 1
            if elsewhere and len(worker.tried) > before:
                continue  # what others did at the beginning of this pass may have ended
            if not waiting:
                return elsewhere
            time.sleep(PAUSE)


class _Worker:
    """Runs the cells that need it and that no other process runs."""

    def __init__(self, work: Sequence[Slot], results: Results, workshop: Workshop, say: Say) -> None:
        self._work, self._results, self._workshop, self._say = work, results, workshop, say
        self._start = time.time()
        self.tried: set[str] = set()
        self._several = len({_model(slot.cell) for slot in work}) > 1
        self._progress = _Progress(work, results)

    def run(self, cell: Cell) -> bool:
        """Run a cell if it needs it. Return False while another process runs it."""
        if self._settled(cell):
            return True
        with self._results.claim(cell.key) as mine:
            if mine and not self._settled(cell):
                began = time.perf_counter()
                outcome = self._workshop.run(cell)
                self._results.put(cell.key, outcome)
                self.tried.add(cell.key)
                if outcome.finished:
                    self._progress.took(cell, time.perf_counter() - began)
                self._report(cell, outcome)
            return mine

    def _settled(self, cell: Cell) -> bool:
        """Return whether a cell is finished, or was tried in vain since this process began."""
        found = self._results.get(cell.key)
        if found is None or found.finished:
            return found is not None
        return cell.key in self.tried or self._results.written(cell.key) > self._start

    def _report(self, cell: Cell, outcome: Outcome) -> None:
        count, undone = len(self._work), [slot for slot in self._work if not self._ended(slot)]
        left = self._progress.left(undone, self._results.processes())
        model = f"{_model(cell)}, " if self._several else ""
        self._say(f"[{count - len(undone)}/{count}] {model}{cell}: {result_of(outcome)}{left}")

    def _ended(self, slot: Slot) -> bool:
        cell = slot.resolve(self._results)
        return cell is not None and self._settled(cell)


def _model(cell: Cell) -> str:
    return Path(cell.config.model.model).name


def result_of(outcome: Outcome) -> str:
    """Describe a run's result in a few words."""
    if outcome.status in (FAILED, DIVERGED):
        return f"{outcome.status} ({outcome.error})"
    name, losses = next(iter(outcome.losses.items()))
    accuracy = f", accuracy {outcome.zero_shot['mean']:.2%}" if outcome.zero_shot else ""
    return f"perplexity {perplexity(losses):.2f} on {name}{accuracy}, {clock(sum(outcome.seconds.values()))}"


class _Progress:
    """Estimates the time left from the runs that have ended: of the same recipe and kind (those that are reported may be asked
    questions, too), of the same recipe, or all."""

    def __init__(self, work: Sequence[Slot], results: Results) -> None:
        self._seconds: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
        for slot in work:
            cell = slot.resolve(results)
            outcome = None if cell is None else results.get(cell.key)
            # One that diverged has no seconds.
            if cell is not None and outcome is not None and outcome.status == DONE:
                self.took(cell, sum(outcome.seconds.values()))

    def took(self, cell: Cell, seconds: float) -> None:
        """Record the duration of a run."""
        self._seconds[cell.recipe.name, cell.final].append(seconds)

    def left(self, undone: Sequence[Slot], processes: int) -> str:
        """Describe the time that the rest takes if as many processes go on as now; nothing if it is all done, or none has ended."""
        seconds = [self._expected(slot) for slot in undone if self._seconds]
        return f"; about {clock(max(sum(seconds) / max(1, processes), *seconds))} left" if seconds else ""

    def _expected(self, slot: Slot) -> float:
        recipe, final = slot.cell.recipe.name, slot.cell.final
        own = self._seconds.get((recipe, final)) or self._seconds.get((recipe, not final))
        return statistics.fmean(own or [value for values in self._seconds.values() for value in values])
