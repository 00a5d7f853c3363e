"""Plots of a run. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine.record import StepRecord
from torch_impl.experiment.report import rows_of, title_of
from torch_impl.experiment.result import Result


def draw(folder: Path, result: Result, records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    """Write the plots. Return (file, caption) of each. Errors: ImportError without matplotlib."""
    found = []
    for name, label, caption in (
        ("sparsity", "share of zeros", "Sparsity of every block after each step"),
        ("ranks", "ranks", "Ranks of every block's adapters at each step"),
        ("errors", "reconstruction error", "Reconstruction error of every block when pruned at each step"),
    ):
        if getattr(records[0], name):
            _blocks(folder, records, name, label)
            found.append((f"{name}.png", caption))
    if any(record.losses for record in records):
        _losses(folder, result, records)
        found.append(("loss.png", "Training loss; dotted lines: the model is pruned further"))
    _perplexities(folder, result, records)
    return [*found, ("perplexity.png", "Held-out perplexity after every step, and the sparsity asked for")]


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.2), layout="constrained")
    axes = drawing.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _blocks(folder: Path, records: Sequence[StepRecord], name: str, label: str) -> None:
    """Plot a figure of every block, a line for each step."""
    from matplotlib import colormaps

    drawing, axes = _figure("block", label)
    for number, record in enumerate(records):
        colour = colormaps["viridis"](0.9 * number / max(1, len(records) - 1))
        values = getattr(record, name)
        axes.plot(range(len(values)), values, marker="o", markersize=4, color=colour, label=f"step {record.step}")
    _whole_numbers(axes.xaxis)
    if name == "ranks":
        _whole_numbers(axes.yaxis)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    drawing.savefig(folder / f"{name}.png", dpi=130)


def _losses(folder: Path, result: Result, records: Sequence[StepRecord]) -> None:
    """Plot the loss of every optimizer step, and its moving mean."""
    losses = [loss for record in records for loss in record.losses]
    drawing, axes = _figure("optimizer step", f"training loss ({result.loss}), per token")
    axes.plot(losses, color="0.75", linewidth=0.8, label="every optimizer step")
    window = max(2, len(losses) // 40)
    smooth = [sum(losses[k - window : k]) / window for k in range(window, len(losses) + 1)]
    axes.plot(range(window - 1, len(losses)), smooth, color="#0072b2", label=f"mean of {window}")
    position = 0
    for record in records[:-1]:
        position += len(record.losses)
        axes.axvline(position, color="0.4", linestyle=":", linewidth=1)
    _whole_numbers(axes.xaxis)
    axes.legend(frameon=False)
    drawing.savefig(folder / "loss.png", dpi=130)


def _perplexities(folder: Path, result: Result, records: Sequence[StepRecord]) -> None:
    """Plot the perplexity after each step beside that of the other models."""
    drawing, axes = _figure("step", "held-out perplexity")
    steps = [record.step for record in records]
    axes.plot(steps, result.perplexity_after_step, marker="o", color="#0072b2", label=title_of(result))
    looks = (("#009e73", "--"), ("#d55e00", "-."), ("#cc79a7", ":"))
    for (row, title), (shade, style) in zip(rows_of(result)[:-1], looks, strict=False):
        axes.axhline(row.perplexity, color=shade, linestyle=style, label=f"{title}: {row.perplexity:,.2f}")
    axes.set_yscale("log")
    _whole_numbers(axes.xaxis)
    for record, value in zip(records, result.perplexity_after_step, strict=True):
        axes.annotate(
            f"{value:.2f}\n{record.target:.0%}",
            (record.step, value),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.margins(y=0.15)
    drawing.savefig(folder / "perplexity.png", dpi=130)
