"""What all commands have in common: checked options, one line on what went wrong, the exit status."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import transformers
from safetensors import SafetensorError

# Set to anything, it has every command print the traceback of what ended it.
TRACEBACK = "LOSA_TRACEBACK"
# What the code raises on purpose, with a message for the user, and what files and devices raise.
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError, SafetensorError)
# Characters of a message: other people's may hold a list of every tensor.
LONGEST = 1000


class Parser(argparse.ArgumentParser):
    """Bad options are one line and a ValueError, like every other bad input; no option may be abbreviated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Errors: ValueError, always."""
        raise ValueError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Errors: ValueError naming what is no option, and the option that looks like it."""
        options, extra = self.parse_known_args(args, namespace)
        self.refuse(extra)
        return options

    def refuse(self, extra: Sequence[str]) -> None:
        """Errors: ValueError if there are words that belong to no option."""
        if extra:
            # What follows an unknown option is most likely its value.
            word = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            raise ValueError(f"{word} is not an option{closest(word, self._option_string_actions)}; see --help")


def closest(word: str, known: Iterable[str]) -> str:
    """A question after a word that is not known: which of the known ones was meant; nothing if none looks like it."""
    # Every option may be spelled with hyphens, too.
    found = difflib.get_close_matches(word, [name for name in known if "-" not in name.lstrip("-")], n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def command(work: Callable[[Sequence[str]], None]) -> Callable[..., int]:
    """Make the main function of a command of `work`, which gets the arguments.

    It returns the exit status: 0; or after one line on standard error 2 for what the code refuses, 1 for an exception
    that it does not foresee, 130 (143) after Ctrl-C (SIGTERM).
    """

    @functools.wraps(work)
    def main(arguments: Sequence[str] | None = None) -> int:
        transformers.utils.logging.set_verbosity_error()
        for stream in (sys.stdout, sys.stderr):
            # A terminal without the letter shows its number.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            work(sys.argv[1:] if arguments is None else arguments)
            return 0
        except SystemExit:
            raise
        except BrokenPipeError as error:
            # Whoever reads this command's output has seen enough.
            _leave_output()
            return _end(error) if error.filename else 128 + signal.SIGPIPE
        except BaseException as error:  # the tokenizers' panics are no Exceptions
            return _end(error)

    return main


def say(text: str) -> None:
    """Print what the work has come to. It is done by then, so whether anybody can read it changes nothing."""
    try:
        print(text, flush=True)
    except OSError as error:
        _leave_output()
        with suppress(OSError):
            print(f"warning: standard output cannot be written ({error.strerror})", file=sys.stderr)


def _leave_output() -> None:
    """Let nothing more go to standard output, not even when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: BaseException) -> int:
    """Say what went wrong. Returns the exit status."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    status, words = _judge(error)
    with suppress(OSError):
        line = " ".join("; ".join([words, *getattr(error, "__notes__", ())]).split())
        print(f"error: {process()}{line}", file=sys.stderr, flush=True)
    return status


def _judge(error: BaseException) -> tuple[int, str]:
    """(exit status, what went wrong)."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT), str(error) or "interrupted"
    message = str(error)
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} … ({len(message):,} characters)"
    if isinstance(error, EXPECTED):
        return 2, message or type(error).__name__
    if isinstance(error, MemoryError):
        return 2, f"this machine's memory is full: {message or 'take smaller sizes'}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(Path(place.filename).parts[-2:])
    return 1, (
        f"{type(error).__name__} in {where}, line {place.lineno}: {message or 'no message'}; this is not foreseen: "
        f"{TRACEBACK}=1 shows where it comes from"
    )


def process() -> str:
    """Which process speaks, if it is not the first of several, which alone prints results."""
    several = os.environ.get("WORLD_SIZE", "") not in ("", "1")
    number = os.environ.get("RANK", "0") if several else "0"
    return "" if number == "0" else f"process {number}: "
