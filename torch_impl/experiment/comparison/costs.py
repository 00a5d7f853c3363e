"""What a comparison's recipes cost: measured seconds and memory of each part, and an estimate for models of 7B to 70B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from torch_impl.experiment.comparison import published
from torch_impl.experiment.comparison.matrix import Matrix
from torch_impl.experiment.comparison.recipes import DENSE, LOSA, read
from torch_impl.experiment.comparison.results import DONE
from torch_impl.experiment.comparison.rows import Row
from torch_impl.experiment.comparison.tables import Table, axes, name_of
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.planning.cards import Card, find_card
from torch_impl.experiment.planning.dry_run import work_of
from torch_impl.experiment.planning.outlook import CARDS_TRIED, REACHED
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import phases
from torch_impl.experiment.planning.table import sizes_of

PARTS = {"importance": "rates", "prune": "prune", "reconstruct": "reconstruct", "train": "train"}
DECODING = ("decode", "decode dense")
SIZES = {"7B": "llama-2-7b", "8B": "llama-3-8b", "13B": "llama-2-13b", "30B": "llama-30b", "70B": "llama-2-70b"}
CARD = "A100 80GB"
GIB = 2**30


def measured(rows: Sequence[Row], matrix: Matrix) -> Table | None:
    """Return seconds and GiB of each part of every recipe, means over sparsities and seeds."""
    columns = axes(matrix, beside=("sparsity",))
    together: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.group.recipe.treatment != DENSE and any(run.status == DONE for run in row.ended.values()):
            varied = dict(row.group.varied)
            together.setdefault((*(varied[name] for name in columns), name_of(row)), []).append(row)
    lines = []
    for names, of_name in together.items():
        seconds = [_mean([row.mean_of("seconds", part) or 0.0 for row in of_name]) for part in PARTS]
        times = ["" if f"{value:.1f}" == "0.0" else f"{value:,.1f}" for value in seconds]
        peaks = [_most([row.mean_of("gib", part) for row in of_name]) for part in (*PARTS, *DECODING)]
        trained = [count for row in of_name if (count := row.mean_of("trained")) is not None]
        lines.append(
            [
                *names,
                *times,
                f"{sum(seconds):,.1f}",
                # A part that is left out has a peak, too: that of what is there before.
                *(peak if time else "" for peak, time in zip(peaks, times, strict=False)),
                *peaks[len(times) :],
                f"{_mean(trained) / 1e6:,.2f}" if trained else "",
            ]
        )
    if not lines:
        return None
    head = [*columns, "", *(f"{part}, s" for part in PARTS.values()), "in all, s"]
    head += [*(f"{part}, GiB" for part in (*PARTS.values(), *DECODING)), "trained, millions"]
    kept = [column for column in range(len(head)) if column <= len(columns) or any(line[column] for line in lines)]
    cells = [tuple(line[column] for column in kept) for line in (head, *lines)]
    note = (
        "Means over sparsities and seeds. Several processes may have shared a card, which makes them slower. "
        "Rates: measuring the importances of the blocks. GiB: peak of the device's tensors in each part."
    )
    if any(head[column].startswith(DECODING) for column in kept):
        note += " Decode: the model, smaller or packed, and all that it allocates while its speed is measured."
    return Table("Cost of each part", tuple(cells), (note,))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _most(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{max(found):,.2f}" if found else ""


def estimated() -> Table:
    """Return the paper's overhead table for our code: seconds of each part with the paper's settings, by the planner's models."""
    card = find_card(CARD)
    lines = [
        (
            size,
            recipe.title,
            *_estimate(_config(size, {**recipe.preset, **recipe.options}), geometry, card),
            *_beside(size, recipe.name),
        )
        for size, geometry in SIZES.items()
        for recipe in (read({}, "")[name] for name in (LOSA, "best"))
    ]
    head = (
        "parameters", "", "rates, s", "prune, s", "reconstruct, s", "train, s", "hours in all", "most memory in",
        "GiB a card", f"{CARD} cards", "published: rates, s", "published: ranks, s",
    )  # fmt: skip
    notes = (
        f"Not measured: operations counted by the planner at {REACHED:.0%} of the card's {card.tflops} TFLOP/s, and its byte "
        "model; the paper's settings (128 × 2,048 tokens of calibration, 10,000 sequences of 1,024, five steps), full length. "
        "Ranks come with pruning: the errors are measured in the same sweep. In all: with the text that the model writes.",
        "Published: seconds a step of the paper's code on one A100 80GB (review page of arXiv 2502.14816); five steps in all.",
    )
    return Table("Estimated cost of larger models", (head, *lines), notes)


def _config(size: str, options: object) -> Config:
    assert isinstance(options, dict)
    name = {"8B": "7B", "30B": "13B"}.get(size, size).lower()
    given = [word for key, words in options.items() for word in (f"--{key}", *words)]
    return parse(["--config", f"llama_{name}", "--model", SIZES[size], *given])


def _estimate(config: Config, geometry: str, card: Card) -> Iterator[str]:
    sizes = sizes_of(geometry)
    tried = [(cards, phases(config, sizes, Place("cuda", cards, card.free))) for cards in (1, *CARDS_TRIED)]
    cards, found = next((t for t in tried if max(parts.total for parts in t[1].values()) <= card.free), tried[-1])
    speed = REACHED * (card.tflops or math.nan) * 1e12 * cards
    work = work_of(config, sizes)
    uniform = dataclasses.replace(config, prune=dataclasses.replace(config.prune, layer_sparsity="uniform"))
    pruning = work_of(uniform, sizes).sweeps
    for operations in (work.sweeps - pruning, pruning, work.reconstruction, work.training):
        yield f"{operations / speed:,.0f}" if operations else ""
    yield f"{work.total / speed / 3600:.2f}"
    phase = max(found, key=lambda name: found[name].total)
    yield from (phase, f"{found[phase].total / GIB:.0f}", str(cards))


def _beside(size: str, recipe: str) -> tuple[str, str]:
    """Return the paper's seconds for rates and ranks."""
    if recipe != LOSA:
        return "", ""
    rates, ranks = published.OVERHEAD[int(size.removesuffix("B"))]
    return str(rates), str(ranks)
