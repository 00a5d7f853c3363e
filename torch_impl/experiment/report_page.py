"""report.html: one file with the figures of a run, its plots, its blocks, its settings and a sample of text."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine.record import StepRecord
from torch_impl.experiment import plots
from torch_impl.experiment.model_card import name_of
from torch_impl.experiment.report import cells_of, is_smaller, notes_of, title_of
from torch_impl.experiment.result import Result

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.table { overflow-x: auto; margin: 1rem 0 } .result tr:last-child { font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
details td:last-child { white-space: normal; overflow-wrap: anywhere; text-align: left }
td:first-child, th:first-child { text-align: left } figure { margin: 1.5rem 0 } img { max-width: 100% }
figcaption { color: #555 } details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 }
blockquote { margin: .5rem 0; padding: .6rem 1rem; background: #f5f5f2; border-radius: 6px; white-space: pre-wrap;
  font-family: ui-monospace, monospace; font-size: .85rem } .prompt { color: #777 }
"""


def write(
    folder: Path,
    result: Result,
    records: Sequence[StepRecord],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Write the page and its plots, which are also inside the page; without matplotlib, it says how to get them."""
    try:
        pictures, missing = plots.draw(folder, result, records), ""
    except ImportError:
        pictures, missing = [], '<p>Plots need matplotlib: <code>pip install "losa-oracle[report]"</code>.</p>'
    title = html.escape(name_of(result.model))
    cells, kind = cells_of(result), "smaller blocks" if is_smaller(result) else "zeros"
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>LoSA: {title}</title>
<style>{STYLE}</style>
<h1>{title}: {result.losa.sparsity:.1%} {kind}, {html.escape(result.method)}, {html.escape(result.sparsity_type)}</h1>
<div class="result">{_table(cells[0], cells[1:])}</div>
<ul>{"".join(f"<li>{html.escape(note)}</li>" for note in notes_of(result))}</ul>
{_samples(result)}
<h2>Step by step</h2>
{_steps(result, records)}
{"".join(_figure(folder / name, text) for name, text in pictures)}{missing}
<h2>Block by block, after the last step</h2>
{_blocks(records)}
<h2>Settings and environment</h2>
{"".join(_details(name, values) for name, values in config.items())}
{_details("environment", environment)}
{_details("software", result.software | {f"peak memory, {n}": f"{b / 2**30:.2f} GiB" for n, b in result.peak_memory.items()})}
</html>
"""
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    shown = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="table"><table><tr>{titles}</tr>{shown}</table></div>'


def _samples(result: Result) -> str:
    """Show what the models write after the same prompt."""
    titles = {"dense": "dense", "losa": title_of(result)}
    quotes = [
        f"<p>{html.escape(titles[name])}</p><blockquote><span class=prompt>{html.escape(found['prompt'])}</span>"
        f"{html.escape(found['text'])}</blockquote>"
        for name, found in result.samples.items()
    ]
    how = "<p>The most likely token each time, after the beginning of the evaluation text.</p>"
    return f"<h2>What it writes</h2>{how}{''.join(quotes)}" if quotes else ""


def _steps(result: Result, records: Sequence[StepRecord]) -> str:
    head = ("step", "sparsity asked", "of blocks", "ranks", "largest error", "perplexity", "seconds")
    rows = (
        (
            r.step,
            f"{r.target:.2%}",
            f"{min(r.sparsity):.2%} – {max(r.sparsity):.2%}",
            f"{min(r.ranks)} – {max(r.ranks)}" if r.ranks else "",
            f"{max(r.errors):.4f}",
            f"{result.perplexity_after_step[r.step - 1]:.2f}",
            f"{sum(r.seconds.values()):.1f}",
        )
        for r in records
    )
    return _table(head, rows)


def _blocks(records: Sequence[StepRecord]) -> str:
    last = records[-1]
    head = ("block", "importance", "sparsity asked", "zeros", "error", "rank")
    rows = (
        (
            index,
            f"{last.importance[index]:.4f}" if last.importance else "",
            f"{last.sparsity[index]:.2%}",
            f"{last.realised[index]:.2%}",
            f"{last.errors[index]:.4f}",
            last.ranks[index] if last.ranks else "",
        )
        for index in range(len(last.sparsity))
    )
    return _table(head, rows)


def _figure(picture: Path, text: str) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    shown = html.escape(text)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{shown}"><figcaption>{shown}</figcaption></figure>'


def _details(name: str, values: Mapping[str, Any]) -> str:
    rows = ((key, "" if value is None else value) for key, value in values.items())
    return f"<details><summary>{html.escape(name)}</summary>{_table(('option', 'value'), rows)}</details>"
