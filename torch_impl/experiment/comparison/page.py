"""tables.html: the tables and curves of a comparison in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from torch_impl.experiment.comparison.document import Section
from torch_impl.experiment.comparison.tables import Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 } th { background: #f5f5f2; font-weight: 600 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td.word, th.word { text-align: left } tr:hover td { background: #fafaf7 }
.published { background: #fdf6e3 } .published caption::after { content: " · published"; color: #b58900; font-weight: 400 }
p.note { color: #555; font-size: .9rem; margin: .2rem 0; max-width: 62rem }
pre { background: #f5f5f2; padding: .5rem .8rem; border-radius: 6px; overflow-x: auto } img { max-width: 100% }
"""


def write(path: Path, title: str, sections: Sequence[Section], pictures: Sequence[Sequence[str]]) -> None:
    """Write the page. pictures: files beside it, of each section."""
    body = "\n".join(_section(one, path.parent, files) for one, files in zip(sections, pictures, strict=True))
    name = html.escape(title)
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>{STYLE}</style>
<h1>{name}</h1>
{body}
</html>
"""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _section(section: Section, folder: Path, pictures: Sequence[str]) -> str:
    facts = "".join(
        f"<pre>{html.escape(fact.strip())}</pre>" if fact.startswith("    ") else _note(fact) for fact in section.facts
    )
    first, *others = map(_table, section.tables)
    shown = "".join(_picture(folder / name) for name in pictures)
    return f"<h2>{html.escape(section.title)}</h2>{facts}{first}{shown}{''.join(others)}"


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(path.stem)}"></p>'


def _table(table: Table) -> str:
    head, *rows = table.cells
    words = [any(not _looks_like_figure(row[column]) for row in rows) for column in range(len(head))]
    lines = "".join(_line(row, "td", words) for row in rows)
    kind = ' class="published"' if table.published else ""
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<div class=wide><table{kind}>{caption}{_line(head, 'th', words)}{lines}</table></div>" + "".join(
        map(_note, table.notes)
    )


def _looks_like_figure(cell: str) -> bool:
    return not cell or cell == "diverged" or cell.lstrip("*+−")[:1].isdigit()


def _line(cells: Sequence[str], tag: str, words: Sequence[bool]) -> str:
    shown = "".join(
        f"<{tag}{' class=word' if word else ''}>{_bold(html.escape(cell))}</{tag}>"
        for cell, word in zip(cells, words, strict=True)
    )
    return f"<tr>{shown}</tr>"


def _bold(text: str) -> str:
    return f"<b>{text[2:-2]}</b>" if text.startswith("**") and text.endswith("**") else text
