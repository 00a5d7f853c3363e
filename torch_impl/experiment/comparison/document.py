"""The document of a comparison: a section for each matrix, with its tables; Markdown of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch_impl.experiment.comparison import costs, tables
from torch_impl.experiment.comparison.matrix import Comparison, Group, Matrix
from torch_impl.experiment.comparison.recipes import DENSE, LOSA
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.comparison.rows import Row, row_of
from torch_impl.experiment.comparison.tables import SPLIT, Table
from torch_impl.experiment.progress import clock

PAPER = "The paper's models"


@dataclass(frozen=True)
class Section:
    """The rows and tables of one matrix. facts: what was run, where, on what. The last section may have the paper's figures
    alone, and no rows."""

    matrix: Matrix
    title: str
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    tables: tuple[Table, ...]


def sections(
    comparison: Comparison, groups: Sequence[Sequence[Group]], results: Results, command: str
) -> list[Section]:
    """Return a section for each matrix, and one of the paper's models if it has figures at these sparsities, or of LoSA.

    groups: of each matrix, as `select` left them. command: that runs them.
    """
    found = []
    for number, (matrix, of_matrix) in enumerate(zip(comparison.matrices, groups, strict=True), 1):
        everything = [row_of(group, results) for group in of_matrix]
        rows = tuple(row for row in everything if row.outcomes or row.tuning)
        if all(row.group.recipe.treatment == DENSE for row in rows):
            continue
        title = matrix.title or (comparison.title if len(groups) == 1 else f"{comparison.title}, part {number}")
        facts = _facts(rows, len(everything) - len(rows), command)
        found.append(Section(matrix, title, facts, rows, tuple(_tables(rows, matrix))))
    if closing := tuple(_of_paper(found)):
        found.append(Section(found[-1].matrix, PAPER, (), (), closing))
    return found


def _of_paper(found: Sequence[Section]) -> Iterator[Table]:
    """Yield published figures of every sparsity once, and the estimated cost of larger models."""
    rows = [row for section in found for row in section.rows if row.group.recipe.treatment != DENSE]
    for sparsity, structured in dict.fromkeys(
        (dict(row.group.varied).get("sparsity", ""), row.smaller) for row in rows
    ):
        if table := tables.beside(sparsity, structured):
            yield table
    if any(row.group.recipe.name == LOSA for row in rows):
        yield costs.estimated()


def _facts(rows: Sequence[Row], missing: int, command: str) -> tuple[str, ...]:
    outcomes = [outcome for row in rows for outcome in row.outcomes.values()]
    hardware = sorted({f"{o.facts['hardware']}, {o.facts['dtype']}" for o in outcomes if "hardware" in o.facts})
    versions = sorted(
        {f"{o.facts['software']['version']}, torch {o.facts['torch']}" for o in outcomes if "torch" in o.facts}
    )
    seconds = sum(sum(outcome.seconds.values()) for outcome in outcomes)
    lines = [f"    {command}"]
    if hardware:
        lines.append(
            f"{len(outcomes)} reported runs, {clock(seconds)} in all, on {'; '.join(hardware)} (losa {'; '.join(versions)})."
        )
    if missing:
        lines.append(f"{missing} rows have no result yet and are left out.")
    return tuple(lines)


def _tables(rows: Sequence[Row], matrix: Matrix) -> Iterator[Table]:
    trained = [row for row in rows if row.group.recipe.treatment != DENSE]
    split = [name for name in SPLIT if name in matrix.varied]
    if found := tables.overview(rows, trained, matrix):
        yield found
    for values in itertools.product(*(dict.fromkeys(dict(r.group.varied)[name] for r in trained) for name in split)):
        chosen = dict(zip(split, values, strict=True))
        inside = [row for row in rows if _belongs(row, chosen)]
        yield tables.main(inside, rows, matrix, chosen)
    if found := tables.tuning(trained, matrix):
        yield found
    if found := costs.measured(rows, matrix):
        yield found
    if found := tables.failures(rows):
        yield found


def _belongs(row: Row, chosen: Mapping[str, str]) -> bool:
    """Return whether a row is in the table of these values. The dense model has no sparsity."""
    varied = dict(row.group.varied)
    return all(varied.get(name, value) == value for name, value in chosen.items())


def markdown(found: Sequence[Section], pictures: Sequence[Sequence[str]] = ()) -> str:
    """Format sections in Markdown. pictures: files of each section."""
    lines: list[str] = []
    for section, files in zip(found, pictures or [()] * len(found), strict=True):
        lines += [f"## {section.title}", "", *(line for fact in section.facts for line in (fact, ""))]
        for number, table in enumerate(section.tables):
            lines += [f"**{table.title}**", "", *_markdown_table(table), ""]
            lines += [line for note in table.notes for line in (note, "")]
            if number == 0:
                lines += [line for name in files for line in (f"![{name}]({name})", "")]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in table.cells]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
