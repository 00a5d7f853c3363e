"""Reports of a run: the closing table, the model card, and a page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine.record import StepRecord
from torch_impl.experiment.text.sources import ALL
from torch_impl.masks.pattern import Pattern

# Report a difference between two sparsities if it is larger than this.
VISIBLE = 5e-4
ROWS = (("dense", "dense"), ("pruned_at_once", "pruned at once"), ("losa", "LoSA"))


def _cells(result: dict[str, Any]) -> list[list[str]]:
    cells = [["", "perplexity", "sparsity", "on disk", "if packed", "time"]]
    for key, title in ROWS:
        row = result[key]
        cells.append(
            [
                title,
                f"{row['perplexity']:,.2f}",
                _sparsity(row["sparsity"], result["target_sparsity"], pruned=key != "dense"),
                _bytes(row["bytes"]),
                _bytes(row["packed_bytes"]),
                f"{row['seconds']:.1f} s" if row["seconds"] else "",
            ]
        )
    return cells


def _sparsity(found: float, asked: float, pruned: bool) -> str:
    """Format a sparsity; add the requested one if they differ visibly."""
    return f"{found:.2%}" + (f" (asked: {asked:.2%})" if pruned and abs(found - asked) > VISIBLE else "")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def table(result: dict[str, Any]) -> str:
    """Format the closing table as text."""
    cells = _cells(result)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["", *lines, "", *_notes(result)])


def _notes(result: dict[str, Any]) -> list[str]:
    facts, checks = result["evaluation"], result["verification"]
    shares = ", ".join(f"{share:.0%}" for share in result["step_shares"])
    return [
        *_why_not_as_asked(result),
        _measured_on(facts),
        f"Trained on {result['train_examples']} sequences in parts of {shares}; loss {result['loss']}, "
        f"learning rate {result['lr_schedule'].replace('_', ' ')}.",
        f"Reloaded {checks['reloaded']}: every pruned weight of {checks['projections']} projections is zero, logits "
        f"within {checks['largest_logit_difference']:.1e} of the unmerged model's.",
        "The saved model stores its zeros, so it is as large and as fast as before. To store a bitmap and the kept values "
        "instead, run python -m torch_impl.pack.",
    ]


def _why_not_as_asked(result: dict[str, Any]) -> list[str]:
    """Explain why the sparsity is not the requested one."""
    found, asked = result["losa"]["sparsity"], result["target_sparsity"]
    if abs(found - asked) <= VISIBLE:
        return []
    if Pattern.parse(result["sparsity_type"]).group is not None:
        why = "blocks differ in size, or parts of the model already had more zeros than the pattern"
    elif found > asked:
        why = "parts of the model were already sparser"
    else:
        why = "the number of pruned weights is rounded down in each row or group, which is visible if rows are short"
    return [f"Requested {asked:.2%} zeros, got {found:.2%}: {why}."]


def _measured_on(facts: dict[str, Any]) -> str:
    """Describe the evaluation text."""
    part = facts["split"]
    if facts["end_of_document"]:
        part += ": the end of a document"
    elif facts["documents"] < facts["documents_of_source"]:
        part += f": {facts['documents']:,} of {facts['documents_of_source']:,} documents"
    if facts["first_windows_only"]:
        part = "the first windows of it" if part == ALL else f"{part}, the first windows"
    removed = [f"{count:,} of {text}" for text, count in facts["documents_left_out"].items() if count]
    return (
        f"Perplexity per token on {facts['source']} ({part}): {facts['windows']} windows of {facts['seqlen']} tokens, "
        f"sha256 {facts['sha256'][:12]}."
        + (f" Evaluation documents removed from other texts: {', '.join(removed)}." if removed else "")
    )


def model_card(result: dict[str, Any]) -> str:
    """Write the text of the saved model's README.md."""
    rows = _cells(result)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [sparse, losa]",
            "---",
            f"# {Path(result['model']).name}, pruned to {result['losa']['sparsity']:.1%} by LoSA",
            "",
            f"Method {result['method']}, pattern {result['sparsity_type']}. A plain Hugging Face model: the adapters are merged.",
            "",
            *lines,
            "",
            *(f"- {note}" for note in _notes(result)),
            "",
        ]
    )


def write(folder: Path, result: dict[str, Any], records: Sequence[StepRecord]) -> None:
    """Write report.html and its plots; without matplotlib, the page says how to get them."""
    try:
        pictures = _draw(folder, result, records)
        missing = ""
    except ImportError:
        pictures, missing = [], '<p>Plots need matplotlib: <code>pip install "losa-oracle[report]"</code>.</p>'
    cells = _cells(result)
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells[1:])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(result))
    images = "".join(
        f'<figure><img src="{name}" alt="{text}"><figcaption>{text}</figcaption></figure>' for name, text in pictures
    )
    steps = "".join(
        f"<tr><td>{r.step}</td><td>{r.target:.2%}</td><td>{min(r.sparsity):.2%} – {max(r.sparsity):.2%}</td>"
        f"<td>{f'{min(r.ranks)} – {max(r.ranks)}' if r.ranks else ''}</td><td>{max(r.errors):.4f}</td>"
        f"<td>{result['perplexity_after_step'][r.step - 1]:.2f}</td><td>{sum(r.seconds.values()):.1f}</td></tr>"
        for r in records
    )
    title = html.escape(Path(result["model"]).name)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>LoSA: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child {{ text-align: left }} figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
</style>
<h1>{title}: {result["losa"]["sparsity"]:.1%} zeros, {result["method"]}, {result["sparsity_type"]}</h1>
<table><tr>{head}</tr>{body}</table><ul>{notes}</ul>
<h2>Step by step</h2>
<table><tr><th>step</th><th>sparsity</th><th>of blocks</th><th>ranks</th><th>largest error</th>
<th>perplexity</th><th>seconds</th></tr>
{steps}</table>{images}{missing}</html>
"""
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _draw(folder: Path, result: dict[str, Any], records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    """Write the plots. Return (file, caption) of each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    def figure(name: str, x: str, y: str) -> tuple[Figure, Any]:
        drawing = Figure(figsize=(8, 4.2), layout="constrained")
        axes = drawing.subplots()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        return drawing, axes

    from matplotlib import colormaps

    colours = [colormaps["viridis"](0.9 * k / max(1, len(records) - 1)) for k in range(len(records))]
    pictures = []
    for name, label, caption in (
        ("sparsity", "share of zeros", "Sparsity of every block after each step"),
        ("ranks", "ranks", "Ranks of every block's adapters at each step"),
        ("errors", "reconstruction error", "Reconstruction error of every block when pruned at each step"),
    ):
        if not getattr(records[0], name):
            continue
        drawing, axes = figure(name, "block", label)
        for record, colour in zip(records, colours, strict=True):
            values = getattr(record, name)
            axes.plot(range(len(values)), values, marker="o", markersize=4, color=colour, label=f"step {record.step}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "ranks":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        drawing.savefig(folder / f"{name}.png", dpi=130)
        pictures.append((f"{name}.png", caption))

    losses = [loss for record in records for loss in record.losses]
    if losses:
        drawing, axes = figure("loss", "optimizer step", f"training loss ({result['loss']}), per token")
        axes.plot(losses, color="0.75", linewidth=0.8, label="every optimizer step")
        window = max(1, len(losses) // 40)
        smooth = [sum(losses[k - window : k]) / window for k in range(window, len(losses) + 1)]
        axes.plot(range(window - 1, len(losses)), smooth, color="#0072b2", label=f"mean of {window}")
        position = 0
        for record in records[:-1]:
            position += len(record.losses)
            axes.axvline(position, color="0.4", linestyle=":", linewidth=1)
        axes.legend(frameon=False)
        drawing.savefig(folder / "loss.png", dpi=130)
        pictures.append(("loss.png", "Training loss; dotted lines: the model is pruned further"))

    drawing, axes = figure("perplexity", "step", "held-out perplexity")
    steps = [record.step for record in records]
    axes.plot(steps, result["perplexity_after_step"], marker="o", color="#0072b2", label="LoSA")
    for key, title, shade, style in (
        ("dense", "dense", "#009e73", "--"),
        ("pruned_at_once", "pruned at once", "#d55e00", "-."),
    ):
        value = result[key]["perplexity"]
        axes.axhline(value, color=shade, linestyle=style, label=f"{title}: {value:,.2f}")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for record, value in zip(records, result["perplexity_after_step"], strict=True):
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
    pictures.append(("perplexity.png", "Held-out perplexity after every step, and the sparsity reached"))
    return pictures
