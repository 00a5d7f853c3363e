"""Shared by all commands: option parsing, one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import transformers
from safetensors import SafetensorError

# If this environment variable is set, commands print the traceback of an error.
TRACEBACK = "LOSA_TRACEBACK"
# Errors raised with a message for the user, and errors of files and devices.
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError, SafetensorError)
# Maximum characters of a message: those of libraries may list every tensor.
LONGEST = 1000


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for bad options, like for any other bad input. Options cannot be abbreviated."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError, which names an option by its first spelling."""
        message = re.sub(r"^argument (--[^/:]+)[^:]*:", r"argument \1:", message)
        raise ValueError(f"{message}; see --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments. Errors: ValueError naming an unknown option and similar known ones."""
        options, extra = self.parse_known_args(args, namespace)
        self.refuse(extra)
        return options

    def refuse(self, extra: Sequence[str]) -> None:
        """Refuse unknown words. Errors: ValueError naming the first one."""
        if extra:
            # A word after an unknown option is probably its value.
            word = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            raise ValueError(f"{word} is not an option{closest(word, self._option_string_actions)}; see --help")


def closest(word: str, known: Iterable[str]) -> str:
    """Ask whether a similar known word was meant; return nothing if none is similar."""
    # Leave out the alternative spelling of options with hyphens.
    found = difflib.get_close_matches(word, [name for name in known if "-" not in name.lstrip("-")], n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def command(work: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Turn `work`, which gets the arguments, into the main function of a command.

    It returns the exit status: that of `work`, 0 if it returns none. For an error, it prints one line to standard error and
    returns 2 for an expected error, 1 for an unexpected exception, 130 after Ctrl-C and 143 after SIGTERM.
    """

    @functools.wraps(work)
    def main(arguments: Sequence[str] | None = None) -> int:
        transformers.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            # Bars redraw their line; a log would keep every redraw.
            transformers.utils.logging.disable_progress_bar()
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for stream in (sys.stdout, sys.stderr):
            # Print characters that the terminal cannot show as escapes.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return work(sys.argv[1:] if arguments is None else arguments) or 0
        except SystemExit:
            raise
        except BrokenPipeError as error:
            # The reader of the output has closed it, as `head` does.
            _leave_output()
            return _end(error) if error.filename else 128 + signal.SIGPIPE
        except BaseException as error:  # panics of tokenizers are not Exceptions
            return _end(error)

    return main


def say(text: str) -> None:
    """Print the result. The work is done, so a closed or full standard output only causes a warning."""
    try:
        print(text, flush=True)
    except OSError as error:
        _leave_output()
        with suppress(OSError):
            print(f"warning: cannot write to standard output ({error.strerror})", file=sys.stderr)


def _leave_output() -> None:
    """Redirect standard output to nowhere, so that nothing is written when the interpreter ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(error: BaseException) -> int:
    """Print the error; return the exit status."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    status, words = _judge(error)
    with suppress(OSError):
        line = " ".join("; ".join([words, *getattr(error, "__notes__", ())]).split())
        print(f"error: {process()}{line}", file=sys.stderr, flush=True)
    return status


def _judge(error: BaseException) -> tuple[int, str]:
    """Return (exit status, message)."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "number", signal.SIGINT), str(error) or "interrupted"
    message = str(error)
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} … ({len(message):,} characters)"
    if isinstance(error, EXPECTED):
        return 2, message or type(error).__name__
    if isinstance(error, MemoryError):
        return 2, f"this machine is out of memory: {message or 'use smaller sizes'}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(Path(place.filename).parts[-2:])
    return 1, (
        f"{type(error).__name__} in {where}, line {place.lineno}: {message or 'no message'}; this is a bug: "
        f"rerun with {TRACEBACK}=1 for the traceback and report it"
    )


def process() -> str:
    """Return a prefix with this process's number; empty for process 0, which alone prints results."""
    several = os.environ.get("WORLD_SIZE", "") not in ("", "1")
    number = os.environ.get("RANK", "0") if several else "0"
    return "" if number == "0" else f"process {number}: "
