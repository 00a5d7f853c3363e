"""A pytest plugin that records which functions of torch_impl each test calls, in its own process and its child processes.

`mutants` loads it with LOSA_REACH set to a folder. Every process appends lines there: test, tab, function. Calls of a fixture with
a wider scope than one test count for every test of the file.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import IO, Any

import pytest

FOLDER = "LOSA_REACH"
TEST = "LOSA_REACH_TEST"
ROOT = str(Path(__file__).resolve().parents[2]) + os.sep
WATCHED = ROOT + "torch_impl" + os.sep

_seen: set[CodeType] = set()
_file: IO[str] | None = None


def function_name(code: CodeType) -> str:
    """Name the innermost function around some code as `mutations` does: lambdas and comprehensions belong to it."""
    parts = code.co_qualname.split(".")
    while parts and parts[-1].startswith("<"):
        parts.pop()
    return ".".join(parts)


def _on_call(frame: FrameType, event: str, argument: Any) -> None:
    code = frame.f_code
    if code in _seen or not code.co_filename.startswith(WATCHED):
        return
    _seen.add(code)
    test = os.environ.get(TEST)
    if test:
        _write(f"{test}\t{code.co_filename.removeprefix(ROOT)}::{function_name(code)}\n")


def _write(line: str) -> None:
    global _file
    if _file is None:
        _file = (Path(os.environ[FOLDER]) / f"{os.getpid()}.tsv").open("a", buffering=1, encoding="utf-8")
    _file.write(line)


def _forked() -> None:
    global _file
    _file = None
    _seen.clear()


def start() -> None:
    """Trace this process from now on, and those forked from it."""
    os.register_at_fork(after_in_child=_forked)
    threading.settrace(_on_call)
    sys.settrace(_on_call)


def _now(test: str) -> None:
    os.environ[TEST] = test
    _seen.clear()
    # A test may have switched tracing off, as a debugger would.
    sys.settrace(_on_call)


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER in os.environ:
        start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _now(item.nodeid)
    result = yield
    _now("")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[Any]:
    test = os.environ.get(TEST, "")
    if fixturedef.scope != "function":
        _now(test.partition("::")[0])
    result = yield
    if fixturedef.scope != "function":
        _now(test)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record outcome and seconds of every phase."""
    if FOLDER in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
        _write(json.dumps([report.nodeid, report.outcome, report.duration]) + "\n")
