"""The figures of each row of a comparison, from the outcomes of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_impl.experiment.comparison import statistics
from torch_impl.experiment.comparison.matrix import Group, Matrix
from torch_impl.experiment.comparison.results import DIVERGED, DONE, FAILED, Outcome, Results
from torch_impl.experiment.comparison.running import chosen_rate, tuned, tuning_outcomes
from torch_impl.experiment.comparison.statistics import Paired, Spread


@dataclass(frozen=True)
class Row:
    """A group with the outcomes of its reported runs, by seed. rate: the chosen learning rate. tuning: the runs that chose
    it, by rate."""

    group: Group
    rate: float | None
    tuning: Mapping[float, Outcome]
    outcomes: Mapping[int, Outcome]

    @property
    def ended(self) -> dict[int, Outcome]:
        """Return the outcomes that are results: done or diverged."""
        return {seed: outcome for seed, outcome in self.outcomes.items() if outcome.status != FAILED}

    @property
    def failed(self) -> list[Outcome]:
        """Return the runs that failed: those that would be reported, and those to choose a learning rate by."""
        # Without tasks and speed, one run is both.
        runs: list[Outcome] = []
        for outcome in (*self.outcomes.values(), *self.tuning.values()):
            if outcome.status == FAILED and outcome not in runs:
                runs.append(outcome)
        return runs

    @property
    def missing(self) -> int:
        """Return the number of seeds that have no result yet."""
        return len(self.group.seeds) - len(self.ended)

    @property
    def unmerged(self) -> bool:
        """Return whether the model runs with separate adapters."""
        return self.group.base.unmerged

    @property
    def smaller(self) -> bool:
        """Return whether the model becomes smaller instead of sparse."""
        return self.group.base.smaller

    def perplexity(self, text: str) -> Spread | None:
        """Return the perplexity of a text over the seeds; None without a result."""
        return statistics.spread([o.perplexity(text) for o in self.ended.values()]) if self.ended else None

    def accuracy(self, task: str) -> Spread | None:
        """Return the accuracy of a task in percent over the seeds; "mean" is that over the tasks. None if not measured."""
        found = [
            None
            if o.status == DIVERGED
            else 100 * (o.zero_shot["mean"] if task == "mean" else o.zero_shot["accuracy"][task])
            for o in self.ended.values()
            if o.zero_shot or o.status == DIVERGED
        ]
        return statistics.spread(found) if found else None

    def standard_error(self, task: str) -> float | None:
        """Return the standard error of a task's accuracy in percent, of the first seed; None if not measured."""
        found = [outcome.zero_shot["stderr"].get(task) for outcome in self._measured()]
        return 100 * found[0] if found and found[0] is not None else None

    def _measured(self) -> list[Outcome]:
        return [outcome for outcome in self.ended.values() if outcome.zero_shot]

    def mean_of(self, name: str, part: str | None = None) -> float | None:
        """Return the mean over the seeds of a number of the outcome, or of one part of `seconds` or `gib`."""
        values = [getattr(outcome, name) for outcome in self.ended.values() if outcome.status == DONE]
        found = [value if part is None else value.get(part) for value in values]
        numbers = [value for value in found if value is not None]
        return math.fsum(numbers) / len(numbers) if numbers else None

    def compared(self, reference: Row | None, text: str) -> Paired | None:
        """Compare with another row on the windows of a text; None if the windows differ or one of the two has none."""
        if reference is None or reference is self:
            return None
        ours, theirs = (
            {seed: o for seed, o in row.ended.items() if o.status == DONE and text in o.losses}
            for row in (self, reference)
        )
        if len({outcome.hashes.get(text) for outcome in (*ours.values(), *theirs.values())}) != 1:
            return None
        return statistics.paired(
            {seed: outcome.losses[text] for seed, outcome in ours.items()},
            {seed: outcome.losses[text] for seed, outcome in theirs.items()},
        )


def row_of(group: Group, results: Results) -> Row:
    """Read the results of a group."""
    if len(group.rates) > 1 and not tuned(group, results):
        return Row(group, None, tuning_outcomes(group, results), {})
    rate = chosen_rate(group, results)
    found = {seed: results.get(group.final(seed, rate).key) for seed in group.seeds}
    there = {seed: outcome for seed, outcome in found.items() if outcome is not None}
    return Row(group, rate, tuning_outcomes(group, results), there)


def reference_of(row: Row, rows: Sequence[Row], matrix: Matrix) -> Row | None:
    """Return the row to compare with: the one of the same varied options, except those that the reference names."""
    wanted = {**dict(row.group.varied), **matrix.reference}
    recipe = wanted.pop("recipe")
    return next((r for r in rows if r.group.recipe.name == recipe and dict(r.group.varied) == wanted), None)
