"""What the documents say: links lead somewhere, tables are those of the results beside them, commands have options that exist."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from oracle_tests.small_runs import ROOT
from torch_impl import cli
from torch_impl.experiment.comparison import document, reading
from torch_impl.experiment.comparison.results import Results

PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "reference").glob("*.md"),
    *(ROOT / "examples").glob("*.md"),
]
MEASURED = sorted(path.parent for path in (ROOT / "docs" / "results").glob("*/results.json"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).lower() for head in heads)
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_comparison_is_listed() -> None:
    folder = ROOT / "docs" / "results"
    listed = re.findall(
        r"^\| \[([a-z_0-9]+\.toml)\]", (folder / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.toml"))


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_the_tables_are_those_of_the_results(folder: Path) -> None:
    """`losa compare docs/results/NAME.toml --tables docs/results/NAME` writes them again. Estimates are no results."""
    comparison = reading.read(folder.with_suffix(".toml"), {})
    groups = [comparison.groups(matrix) for matrix in comparison.matrices]
    *measured, _ = document.sections(comparison, groups, Results(folder), "losa")
    said = document.markdown(measured)
    tables = re.findall(r"^\*\*(.+)\*\*$", said, flags=re.MULTILINE)
    written = (folder / "tables.md").read_text(encoding="utf-8")
    assert len(tables) >= 2
    for title in tables:
        assert f"**{title}**" in written
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert not [line for line in rows if line not in written.splitlines()]


def commands_of(page: Path) -> Iterator[list[str]]:
    """The commands of a page from the program's name on: `losa run --seed 1`, `oracle_tests.programs.gpu_rows --sweep`."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    command = re.compile(r"(?:\blosa |-m torch_impl\.(?=\w+\b[^.])|-m (?=oracle_tests\.programs\.))([\w.]+\b.*)")
    for line in (*(line for fence in fences for line in fence.replace("\\\n", " ").splitlines()), *inline):
        found = command.search(" ".join(line.split()))
        if found and "NAME" not in found[1]:
            yield found[1].partition("#")[0].split()


def options_of(words: Sequence[str], capsys: pytest.CaptureFixture) -> set[str]:
    """The options that the help of a command lists."""
    name = words[0]
    main = importlib.import_module(name).main if "." in name else functools.partial(_losa, words)
    with pytest.raises(SystemExit):
        main(["--help-all" if name in ("run", "plan") else "--help"])
    return set(re.findall(r"--\w[\w-]*", capsys.readouterr().out))


def _losa(words: Sequence[str], arguments: Sequence[str]) -> int:
    return cli.main([*words, *arguments])


def test_commands_of_the_pages_have_options_that_exist(capsys: pytest.CaptureFixture) -> None:
    known: dict[tuple[str, ...], set[str]] = {}
    # What was new once may be gone.
    for page in (page for page in PAGES if page.name != "CHANGELOG.md"):
        for words in commands_of(page):
            given = {re.split(r"[^\w-]", word.lstrip("["))[0] for word in words if word.lstrip("[").startswith("--")}
            key = tuple(words[:2] if words[:2] == ["bench", "decode"] else words[:1])
            if key not in known and (given or "." in key[0]):
                known[key] = options_of(key, capsys)
            assert not given - known.get(key, set()), f"{page}: {' '.join(words)}"
    assert len(known) > 12


def test_the_readme_names_every_program_for_gpus() -> None:
    programs = {path.stem for path in (ROOT / "oracle_tests/programs").glob("gpu_*.py")}
    assert programs == set(re.findall(r"`(gpu_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
