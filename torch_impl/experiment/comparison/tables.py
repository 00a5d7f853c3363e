"""The tables of a comparison, as text in cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch_impl.experiment.comparison import published
from torch_impl.experiment.comparison.matrix import Matrix
from torch_impl.experiment.comparison.recipes import LOSA
from torch_impl.experiment.comparison.results import DIVERGED, Outcome
from torch_impl.experiment.comparison.rows import Row, reference_of
from torch_impl.experiment.comparison.statistics import Paired, Spread

# Axes that get a table each; the others become columns.
SPLIT = ("model", "sparsity")
NOTHING = ""


@dataclass(frozen=True)
class Table:
    """Cells as text, the first row is the head. published: the figures are the paper's."""

    title: str
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    published: bool = False


def percent(value: str) -> str:
    """Name a sparsity: a share in percent, a pattern as it is."""
    return value if ":" in value or not _is_number(value) else f"{100 * float(value):g} %"


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def label_of(value: object) -> str:
    """Name a value of a varied option, as rows do."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def axes(matrix: Matrix, beside: Sequence[str] = SPLIT) -> list[str]:
    """Return the varied options that rows are named by: those with several values, without `beside`."""
    return [name for name, values in matrix.varied.items() if name not in beside and len(values) > 1]


def name_of(row: Row) -> str:
    """Name a row's recipe; say if its adapters are not merged."""
    return row.group.recipe.title + (" (unmerged)" if row.unmerged else "")


def _names(row: Row, columns: Sequence[str]) -> list[str]:
    varied = dict(row.group.varied)
    return [
        *(percent(varied.get(name, "")) if name == "sparsity" else varied.get(name, "") for name in columns),
        name_of(row),
    ]


def figure(spread: Spread | None, digits: int = 2) -> str:
    """Format mean ± deviation; nothing if there is none."""
    if spread is None:
        return NOTHING
    if spread.mean is None:
        return "diverged"
    text = f"{spread.mean:,.{digits}f}"
    return text if spread.deviation is None else f"{text} ± {spread.deviation:,.{digits}f}"


def significance(found: Paired | None) -> str:
    """Format the difference in perplexity and its p value; from ten times on as a multiple."""
    if found is None:
        return NOTHING
    times = math.exp(found.difference)
    change = f"{times:,.0f} times" if times >= 10 else f"{100 * (times - 1):+.1f} %".replace("-", "−")
    return f"{change}, p < 0.001" if found.p < 0.001 else f"{change}, p = {found.p:.3f}"


def overview(rows: Sequence[Row], trained: Sequence[Row], matrix: Matrix) -> Table | None:
    """Return perplexity by sparsity, if there are several."""
    sparsities = [label_of(value) for value in matrix.varied.get("sparsity", ())]
    sparsities = [s for s in sparsities if any(dict(row.group.varied).get("sparsity") == s for row in trained)]
    if len(sparsities) < 2:
        return None
    columns = axes(matrix, beside=("sparsity",))
    text = next(iter(trained[0].group.base.measures.texts))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        values = {label_of(dict(row.group.varied).get("sparsity", ""))} & set(sparsities) or set(sparsities)
        line = found.setdefault(tuple(_names(row, columns)), {})
        line.update(dict.fromkeys(values, figure(row.perplexity(text))))
    head = [*columns, "", *map(percent, sparsities)]
    cells = [tuple(head), *((*names, *(line.get(s, NOTHING) for s in sparsities)) for names, line in found.items())]
    return Table(f"Perplexity on {text} by sparsity", tuple(cells))


def main(inside: Sequence[Row], rows: Sequence[Row], matrix: Matrix, chosen: Mapping[str, str]) -> Table:
    """Return all figures of the rows of one sparsity and model."""
    columns = axes(matrix)
    measures = inside[-1].group.base.measures
    texts = list(measures.texts)
    tasks = _tasks(inside)
    smaller = any(row.smaller for row in inside)
    optional: list[tuple[str, Callable[[Row], str]]] = [
        ("sparsity", lambda row: _share(row) if smaller else NOTHING),
        ("parameters, millions", lambda row: _millions(row) if smaller else NOTHING),
        ("tokens/s", _speed),
        ("learning rate", lambda row: NOTHING if row.rate is None else f"{row.rate:g}"),
        ("seeds", lambda row: str(len(row.ended)) + (f" of {len(row.group.seeds)}" if row.missing else "")),
    ]
    compared = any(reference_of(row, rows, matrix) for row in inside)
    against = f"against {_reference(matrix)}"
    head = [*columns, "", *texts, *([against] if compared else []), *tasks]
    lines = []
    for row in inside:
        line = [*_names(row, columns), *(figure(row.perplexity(text)) for text in texts)]
        if compared:
            line.append(significance(row.compared(reference_of(row, rows, matrix), texts[0])))
        line += [_accuracy(row, task) for task in tasks]
        lines.append(line)
    for name, value in optional:
        values = [value(row) for row in inside]
        if any(values):
            head.append(name)
            lines = [[*line, text] for line, text in zip(lines, values, strict=True)]
    title = ", ".join(percent(value) for value in chosen.values()) or "Results"
    return Table(
        title, (tuple(head), *map(tuple, lines)), tuple(_notes(inside, against if compared else "", texts, tasks))
    )


def _reference(matrix: Matrix) -> str:
    """Name the rows that the others are compared with."""
    others = {name: value for name, value in matrix.reference.items() if name != "recipe"}
    recipe = next((r for r in matrix.recipes if r.name == matrix.reference["recipe"]), None)
    title = "the paper's LoSA" if recipe is None or recipe.name == LOSA else recipe.title
    return ", ".join([title, *(f"{name} {value}" for name, value in others.items())])


def _tasks(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(t for row in rows for o in row.ended.values() if o.zero_shot for t in o.zero_shot["accuracy"])
    return [*found, "mean"] if found else []


def _accuracy(row: Row, task: str) -> str:
    return figure(row.accuracy(task), 1)


def _speed(row: Row) -> str:
    """Format tokens per second, and how many times that is the dense model's: each run's beside it, on a machine as busy."""
    speeds = [outcome.tokens_per_second for outcome in row.ended.values() if outcome.tokens_per_second]
    if not speeds:
        return NOTHING
    packed, times = fmean(of["packed"] for of in speeds), fmean(of["packed"] / of["dense"] for of in speeds)
    return f"{packed:,.1f} ({times:.2f}×)"


def _share(row: Row) -> str:
    """Format the share of the blocks' weights that are gone."""
    share = row.mean_of("sparsity")
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _millions(row: Row) -> str:
    """Format the number of the whole model's parameters that are left."""
    count = row.mean_of("parameters")
    return NOTHING if count is None else f"{count / 1e6:,.2f}"


def _notes(rows: Sequence[Row], against: str, texts: Sequence[str], tasks: Sequence[str]) -> Iterator[str]:
    several = max((len(row.ended) for row in rows), default=0) > 1
    yield (
        f"Perplexity per token on the second half of the windows{_windows(rows, texts)}; learning rates are chosen on the first "
        f"half of {texts[0]}. " + ("± is the standard deviation over seeds." if several else "One seed.")
    )
    if any(len({o.hashes.get(text) for row in rows for o in row.ended.values() if o.losses}) > 1 for text in texts):
        yield "Not all rows are measured on the same windows: compare no perplexities between those that are not."
    if against:
        yield (
            f"{against[0].upper()}{against[1:]}: change in perplexity on {texts[0]}, two-sided paired t-test over its windows, not "
            "corrected for the number of rows. It says whether these models differ on more text of this kind, not whether those "
            "of other seeds would."
        )
    if tasks:
        measured = next(o for row in rows for o in row.ended.values() if o.zero_shot)
        limit = rows[-1].group.base.measures.limit
        errors = [error for row in rows for task in tasks if task != "mean" and (error := row.standard_error(task))]
        yield (
            f"Zero-shot accuracy (plain acc) in percent by lm-eval {measured.zero_shot['version']}"
            + (f", the first {limit} documents of each task" if limit else "")
            + (f"; standard error of a task {min(errors):.1f} to {max(errors):.1f}." if errors else ".")
        )
    if any(row.smaller for row in rows):
        yield (
            "Sparsity: share of the weights of the dense model's blocks that are gone, as zeros or with their rows, columns or "
            "blocks; matrices that a method adds to a block count against it. Smaller models are decoded as they are, others "
            "packed."
        )
    if any(row.unmerged for row in rows):
        yield "Unmerged: the adapters stay beside the sparse weights, because merging them would fill zeros."


def _windows(rows: Sequence[Row], texts: Sequence[str]) -> str:
    outcome: Outcome | None = next((o for row in rows for o in row.ended.values() if o.losses), None)
    if outcome is None:
        return ""
    counts = ", ".join(f"{len(outcome.losses[text])} of {text}" for text in texts if text in outcome.losses)
    return f" of {outcome.facts['windows']['seqlen']} tokens ({counts})"


def beside(sparsity: str, structured: bool = False) -> Table | None:
    """Return the paper's figures at this sparsity, of smaller models if structured."""
    rows = published.rows(sparsity, structured)
    if not rows:
        return None
    head = ("", "model", "method", "", "WikiText-2", *published.TASKS, "mean")
    cells = (
        (
            published.MARK,
            r.model,
            r.method,
            r.treatment,
            NOTHING if r.perplexity is None else f"{r.perplexity:.2f}",
            *(f"{a:.2f}" for a in r.accuracy),
            f"{r.average:.2f}",
        )
        for r in rows
    )
    return Table(
        f"Published in the paper, {percent(sparsity)}{' structured' if structured else ''}: other models than ours",
        (head, *cells),
        (
            "The paper's own figures (arXiv 2502.14816 and its review page), nothing of them measured here."
            + (
                " It took LoRAPrune's and LoRAShear's accuracies from LoRAShear's paper (arXiv 2310.18356)."
                if structured
                else ""
            ),
        ),
        published=True,
    )


def tuning(rows: Sequence[Row], matrix: Matrix) -> Table | None:
    """Return the perplexities that learning rates were chosen by."""
    rates = sorted({rate for row in rows for rate in row.group.rates})
    tuned = [row for row in rows if row.tuning]
    if not tuned:
        return None
    columns = axes(matrix, beside=())
    cells = []
    for row in tuned:
        values = {rate: o.status if o.tuning is None else f"{o.tuning:,.2f}" for rate, o in row.tuning.items()}
        shown = (f"**{values[r]}**" if r == row.rate else values.get(r, NOTHING) for r in rates)
        cells.append((*_names(row, columns), *shown))
    head = (*columns, "", *(f"{rate:g}" for rate in rates))
    return Table("Learning rates: perplexity on the windows they are chosen by", (head, *cells), ("Bold: chosen.",))


def failures(rows: Sequence[Row]) -> Table | None:
    """Return the reported runs that diverged, and all that failed, also those to choose a learning rate by."""
    found = [
        (
            ", ".join(value for _, value in row.group.varied),
            name_of(row),
            outcome.labels["seed"],
            outcome.labels.get("learning_rate", NOTHING),
            outcome.status,
            outcome.error or "",
        )
        for row in rows
        for outcome in (*(o for o in row.outcomes.values() if o.status == DIVERGED), *row.failed)
    ]
    if not found:
        return None
    return Table("Runs that diverged or failed", (("", "recipe", "seed", "learning rate", "", "error"), *found))
