"""Curves of perplexity and decoding speed against sparsity. They need matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch_impl.experiment.comparison.document import Section
from torch_impl.experiment.comparison.recipes import DENSE
from torch_impl.experiment.comparison.rows import Row
from torch_impl.experiment.comparison.statistics import Spread
from torch_impl.experiment.comparison.tables import axes, name_of

# What a file name, and a link to it in Markdown, cannot have.
NO_FILE_NAME = re.compile(r"[^\w.+-]+")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
# As many more than colours that no two rows have both alike: of a single point, no line tells them apart.
MARKERS = "osD^vPX*<>p"
WIDE = 4  # panels beside each other
Point: TypeAlias = tuple[float, float, float]
"""Share of zeros, mean and deviation."""
Lines: TypeAlias = dict[str, list[Point]]
ZEROS, GONE = "share of zeros", "share of the blocks' weights that was to go"


def draw(folder: Path, sections: Sequence[Section]) -> list[list[str]]:
    """Write a picture for each figure that was measured at several sparsities. Return the file names of each section.

    Errors: ImportError without matplotlib.
    """
    return [
        list(_of_section(folder, section, number)) if section.rows else [] for number, section in enumerate(sections, 1)
    ]


def _of_section(folder: Path, section: Section, number: int) -> Iterator[str]:
    texts = list(section.rows[-1].group.base.measures.texts)
    kinds: list[tuple[str, str, Callable[[Row], Spread | None], bool]] = [
        (f"perplexity-{text}", f"perplexity on {text}", lambda row, text=text: row.perplexity(text), True)  # type: ignore[misc]
        for text in texts
    ]
    smaller = any(row.smaller for row in section.rows)
    speed, share = ("tokens/s", GONE) if smaller else ("tokens/s with packed weights", ZEROS)
    kinds.append(("speed", speed, lambda row: _speed(row, "packed"), False))
    for kind, label, value, logarithmic in kinds:
        divided = panels(section, value)
        if any(len(points) > 1 for lines in divided.values() for points in lines.values()):
            name = f"{number}-{NO_FILE_NAME.sub('-', kind)}.png"
            _picture(folder / name, divided, _level(section, value), (share, label), logarithmic)
            yield name


def _speed(row: Row, side: str) -> Spread | None:
    value = row.mean_of("tokens_per_second", side)
    return None if value is None else Spread(value, None, 1)


def series(section: Section, value: Callable[[Row], Spread | None]) -> Lines:
    """Return the points of every line of the picture, by name, in order of sparsity."""
    return {", ".join(filter(None, name)): points for name, points in _points(section, value).items()}


def panels(section: Section, value: Callable[[Row], Spread | None]) -> dict[str, Lines]:
    """Return the lines of each panel of the picture, by its title: one panel, or one for each recipe where lines are many."""
    found = _points(section, value)
    several = len({of_matrix for of_matrix, _ in found}) > 1 and len({recipe for _, recipe in found}) > 1
    if not several or len(found) <= len(COLOURS):
        return {"": series(section, value)}
    divided: dict[str, Lines] = {}
    for (of_matrix, recipe), points in found.items():
        divided.setdefault(recipe, {})[of_matrix] = points
    return divided


def _points(section: Section, value: Callable[[Row], Spread | None]) -> dict[tuple[str, str], list[Point]]:
    """Return points by the values of the matrix that name a line, and its recipe."""
    found: dict[tuple[str, str], list[Point]] = {}
    columns = axes(section.matrix, beside=("sparsity",))
    for row in section.rows:
        varied = dict(row.group.varied)
        spread = value(row)
        if (
            row.group.recipe.treatment == DENSE
            or spread is None
            or spread.mean is None
            or ":" in varied.get("sparsity", ":")
        ):
            continue
        name = ", ".join(varied[column] for column in columns), name_of(row)
        found.setdefault(name, []).append((float(varied["sparsity"]), spread.mean, spread.deviation or 0.0))
    return {name: sorted(points) for name, points in found.items()}


def look(number: int) -> tuple[str, str]:
    """Return colour and marker of a row."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _level(section: Section, value: Callable[[Row], Spread | None]) -> float | None:
    dense = [row for row in section.rows if row.group.recipe.treatment == DENSE]
    spread = value(dense[0]) if len(dense) == 1 else None
    return None if spread is None else spread.mean


def _picture(
    path: Path,
    divided: dict[str, Lines],
    dense: float | None,
    labels: tuple[str, str],
    logarithmic: bool,
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, ScalarFormatter

    count = len(divided)
    high, wide = math.ceil(count / WIDE), min(count, WIDE)
    drawing = Figure(figsize=(9, 5) if count == 1 else (2 + 3 * wide, 1 + 3 * high), layout="constrained")
    grid: Any = drawing.subplots(high, wide, sharex=True, squeeze=False)
    looks = {name: number for number, name in enumerate(dict.fromkeys(n for lines in divided.values() for n in lines))}
    shares = sorted({share for lines in divided.values() for points in lines.values() for share, _, _ in points})
    legend: dict[str, Any] = {}
    for number, axis in enumerate(grid.flat):
        if number >= count:
            axis.set_visible(False)
            # Nothing is below the panel above, which shows the shares.
            grid[high - 2, number % wide].xaxis.set_tick_params(labelbottom=True)
            continue
        title, lines = list(divided.items())[number]
        for name, points in lines.items():
            places, means, deviations = zip(*points, strict=True)
            colour, marker = look(looks[name])
            style = "-" if looks[name] < len(COLOURS) else "--"
            legend[name] = axis.errorbar(
                places, means, deviations, color=colour, linestyle=style, capsize=3, marker=marker, markersize=5
            )
        if dense is not None:
            legend["dense"] = axis.axhline(dense, color="0.45", linestyle=":")
        axis.set_title(title, fontsize="medium")
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xticks(shares)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if count == 1:
        grid[0, 0].set(xlabel=labels[0], ylabel=labels[1])
    else:
        drawing.supxlabel(labels[0], fontsize="medium")
        drawing.supylabel(f"{labels[1]} (each panel has a scale of its own)", fontsize="medium")
    # The dense model is the last name, below the lines.
    names = [*looks, *(["dense"] if dense is not None else [])]
    drawing.legend([legend[name] for name in names], names, loc="outside right center", frameon=False)
    drawing.savefig(path, dpi=130)
