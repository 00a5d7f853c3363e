"""Progress: in a log a line a minute with the time left, on a terminal a bar."""

from __future__ import annotations

import ast
import io
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import torch_impl
from torch_impl.engine import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which passes by 50 s an item."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def _pass(items: Iterable[int], clock: list[float]) -> list[int]:
    found = []
    for item in items:
        found.append(item)
        clock[0] += 50
    return found


def test_a_log_gets_a_line_a_minute(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    assert _pass(progress.bar(range(6), "prune"), clock) == list(range(6))
    assert capsys.readouterr().err.splitlines() == [
        "prune: 2 of 6, 01:40; about 03:20 left",
        "prune: 4 of 6, 03:20; about 01:40 left",
    ]


@pytest.mark.parametrize(("total", "line"), [(4, "2 of 4, 01:40; about 01:40 left"), (None, "2 of ?, 01:40")])
def test_items_without_a_length_may_be_given_one(
    total: int | None, line: str, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    assert _pass(progress.bar(iter(range(4)), "read", total), clock) == list(range(4))
    assert capsys.readouterr().err.splitlines() == [f"read: {line}"]


def test_a_short_loop_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.bar(range(100), "prune")) == list(range(100))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    assert list(progress.bar(range(3), "prune")) == [0, 1, 2]
    assert "prune: 100%" in sys.stderr.getvalue() or "prune:   0%" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_only_the_main_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    monkeypatch.setattr(progress.distributed, "is_main_process", lambda: False)
    assert _pass(progress.bar(range(6), "prune"), clock) == list(range(6))
    progress.note("pruned")
    assert capsys.readouterr().err == ""


class _Full(io.StringIO):
    """Standard error on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_standard_error_ends_no_work(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr(sys, "stderr", _Full())
    progress.note("pruned")
    assert _pass(progress.bar(range(6), "prune"), clock) == list(range(6))


def test_nobody_else_writes_to_standard_error() -> None:
    """A line printed by hand would end a run if standard error is full, and come from every process."""
    package = Path(torch_impl.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                to = [keyword.value for keyword in node.keywords if keyword.arg == "file"]
                to += [node.func.value] if isinstance(node.func, ast.Attribute) and node.func.attr == "write" else []
                if any(ast.unparse(stream) == "sys.stderr" for stream in to):
                    found.add(str(path.relative_to(package)))
    # The others print the line with which a command ends.
    assert found == {"engine/progress.py", "experiment/command.py", "cli.py"}
