"""Reports of a run: the closing table, the model card, and a page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine.record import StepRecord
from torch_impl.experiment import plots
from torch_impl.experiment.result import Comparison, Result, Row
from torch_impl.experiment.text.sources import ALL
from torch_impl.masks.pattern import Pattern

# Report a difference between two sparsities if it is larger than this.
VISIBLE = 5e-4


def _rows(result: Result) -> list[tuple[Row, str]]:
    return [(result.dense, "dense"), (result.pruned_at_once, "pruned at once"), (result.losa, "LoSA")]


def _cells(result: Result) -> list[list[str]]:
    cells = [["", "perplexity", "sparsity", "on disk", "if packed", "time"]]
    for row, title in _rows(result):
        cells.append(
            [
                title,
                f"{row.perplexity:,.2f}",
                _sparsity(row.sparsity, result.target_sparsity, pruned=row is not result.dense),
                _bytes(row.bytes),
                _bytes(row.packed_bytes),
                f"{row.seconds:.1f} s" if row.seconds else "",
            ]
        )
    return cells


def _sparsity(found: float, asked: float, pruned: bool) -> str:
    """Format a sparsity; add the requested one if they differ visibly."""
    return f"{found:.2%}" + (f" (asked: {asked:.2%})" if pruned and abs(found - asked) > VISIBLE else "")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def table(result: Result) -> str:
    """Format the closing table as text."""
    cells = _cells(result)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["", *lines, "", *_notes(result)])


def _notes(result: Result) -> list[str]:
    facts, checks = result.evaluation, result.verification
    shares = ", ".join(f"{share:.0%}" for share in result.step_shares)
    return [
        *_why_not_as_asked(result),
        _measured_on(facts),
        f"Trained on {result.train_examples} sequences in parts of {shares}; loss {result.loss}, "
        f"learning rate {result.lr_schedule.replace('_', ' ')}.",
        f"Reloaded {checks.reloaded}: every pruned weight of {checks.projections} projections is zero, logits "
        f"within {checks.largest_logit_difference:.1e} of the unmerged model's.",
        "The saved model stores its zeros, so it is as large and as fast as before. To store a bitmap and the kept values "
        "instead, run python -m torch_impl.pack.",
    ]


def _why_not_as_asked(result: Result) -> list[str]:
    """Explain why the sparsity is not the requested one."""
    found, asked = result.losa.sparsity, result.target_sparsity
    if abs(found - asked) <= VISIBLE:
        return []
    if Pattern.parse(result.sparsity_type).group is not None:
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


def model_card(result: Result) -> str:
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
            f"# {Path(result.model).name}, pruned to {result.losa.sparsity:.1%} by LoSA",
            "",
            f"Method {result.method}, pattern {result.sparsity_type}. A plain Hugging Face model: the adapters are merged.",
            "",
            *lines,
            "",
            *(f"- {note}" for note in _notes(result)),
            "",
        ]
    )


def write(folder: Path, result: Result, records: Sequence[StepRecord]) -> None:
    """Write report.html and its plots; without matplotlib, the page says how to get them."""
    try:
        pictures = plots.draw(folder, result, records)
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
        f"<td>{result.perplexity_after_step[r.step - 1]:.2f}</td><td>{sum(r.seconds.values()):.1f}</td></tr>"
        for r in records
    )
    title = html.escape(Path(result.model).name)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>LoSA: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child {{ text-align: left }} figure {{ margin: 1.5rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #555 }}
</style>
<h1>{title}: {result.losa.sparsity:.1%} zeros, {result.method}, {result.sparsity_type}</h1>
<table><tr>{head}</tr>{body}</table><ul>{notes}</ul>
<h2>Step by step</h2>
<table><tr><th>step</th><th>sparsity</th><th>of blocks</th><th>ranks</th><th>largest error</th>
<th>perplexity</th><th>seconds</th></tr>
{steps}</table>{images}{missing}</html>
"""
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def compared(found: Comparison) -> str:
    """Format a variant of `compare` as a line."""
    values = " ".join(map(_perplexity, found.perplexity))
    tried = ", ".join(f"{float(rate):g}: {_perplexity(value)}" for rate, value in found.tuning.items())
    spread = f"±{found.stdev or 0.0:.2f}"
    return (
        f"{found.variant:<40}{_perplexity(found.mean):>8} {spread}  [{values}]  at {found.learning_rate:g}  ({tried})"
    )


def _perplexity(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.2f}"
