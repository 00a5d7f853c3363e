"""What all commands share: one line for every exception, the exit status, options that are checked."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence

import pytest
from safetensors import SafetensorError

from torch_impl.commands import compare, generate, pack, run
from torch_impl.engine.resume.checkpointer import Interrupted
from torch_impl.experiment import command

COMMANDS = {"run": run.main, "generate": generate.main, "pack": pack.main, "compare": compare.main}


class Panic(BaseException):
    """A panic of the tokenizers library, which is not an Exception."""


def ending_in(error: BaseException) -> Callable[..., int]:
    @command.command
    def main(arguments: Sequence[str]) -> None:
        raise error

    return main


def with_note(error: BaseException, note: str) -> BaseException:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("seed is -1;\n  allowed: 0 or more"), 2, "seed is -1; allowed: 0 or more"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "[Errno 2] No such file: 'a.txt'"),
        (RuntimeError(), 2, "RuntimeError"),
        (FloatingPointError("loss nan"), 2, "loss nan"),
        (SafetensorError("I/O error: No space left"), 2, "I/O error: No space left"),
        (json.JSONDecodeError("bad", "x", 0), 2, "bad: line 1 column 1 (char 0)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"), 2, "'utf-8' codec can't decode byte 0xff"),
        (MemoryError(), 2, "this machine is out of memory: use smaller sizes"),
        (with_note(OSError("disk full"), "rerun with --resume"), 2, "disk full; rerun with --resume"),
        (AttributeError("no x"), 1, "AttributeError in oracle_tests/test_command.py, line"),
        (KeyError("x"), 1, "'x'; this is a bug: rerun with LOSA_TRACEBACK=1"),
        (TypeError(), 1, "no message"),
        (IndexError("i"), 1, "IndexError"),
        (ImportError("no module"), 1, "ImportError"),
        (AssertionError(), 1, "AssertionError"),
        (Panic("index out of range"), 1, "Panic in"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (with_note(KeyboardInterrupt(), "nothing was written"), 130, "interrupted; nothing was written"),
        (Interrupted(15), 143, "interrupted by SIGTERM"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_exception_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending_in(error)([]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert line in said
    assert said.count("\n") == 1
    monkeypatch.setenv(command.TRACEBACK, "1")
    assert ending_in(error)([]) == status
    more = capsys.readouterr().err
    assert "Traceback (most recent call last)" in more
    assert more.splitlines()[-1] == said.rstrip("\n")


def test_a_message_as_long_as_a_book_is_cut(capsys: pytest.CaptureFixture) -> None:
    assert ending_in(with_note(ValueError("x" * 11711), "a note"))([]) == 2
    said = capsys.readouterr().err
    assert len(said) < 1100
    assert said.endswith("… (11,711 characters); a note\n")


@pytest.mark.parametrize(("rank", "size", "prefix"), [("1", "2", "process 1: "), ("0", "2", ""), ("1", "1", "")])
def test_who_speaks(
    rank: str, size: str, prefix: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RANK left in the environment by something else is ignored."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert ending_in(ValueError("bad"))([]) == 2
    assert capsys.readouterr().err == f"error: {prefix}bad\n"
    monkeypatch.delenv("WORLD_SIZE")
    assert command.process() == ""


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_what_is_done_stays_done_when_nobody_can_read_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    command.say("all is well")
    assert capsys.readouterr().err == "warning: cannot write to standard output (No space left on device)\n"

    @command.command
    def main(arguments: Sequence[str]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert main([]) == 128 + 13
    assert capsys.readouterr().err == ""


def test_letters_that_a_terminal_lacks_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert command.command(lambda arguments: command.say("α × \udcff"))([]) == 0
    assert raw.getvalue() == b"\\u03b1 \\xd7 \\udcff\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--devise", "cpu"], "--devise is not an option; did you mean --device"),
        (["--devise=cpu"], "--devise is not an option; did you mean --device"),
        (["--zzz"], "--zzz is not an option; see --help"),
        (["--devic", "cpu"], "--devic is not an option; did you mean --device"),
    ],
)
def test_unknown_options(name: str, words: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    needed = {"generate": ["model", "--prompt", "x"], "pack": ["model", "out"], "compare": ["quick"]}.get(name, [])
    assert COMMANDS[name]([*needed, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_both_that_look_alike_are_offered(capsys: pytest.CaptureFixture) -> None:
    assert run.main(["--sparsity", "0.5"]) == 2
    assert "did you mean --sparsity_type or --sparsity_ratio?" in capsys.readouterr().err
