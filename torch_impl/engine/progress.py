"""Progress for people: a bar on a terminal; in a log a line a minute; notes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from typing import TypeVar

from tqdm import tqdm

from torch_impl.engine import distributed

EVERY = 60.0
"""Seconds between two lines in a log."""
Item = TypeVar("Item")


def note(line: str) -> None:
    """Print a line to standard error, in process 0. If it is closed or full, drop the line: work of hours does not fail for it."""
    if distributed.is_main_process():
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Show progress while going through the items, in process 0.

    Standard error gets a bar if it is a terminal. Otherwise, as a log keeps every redraw, it gets a line every `EVERY` seconds.
    """
    if not distributed.is_main_process():
        return items
    if not sys.stderr.isatty():
        return _lines(items, description, total)
    shown: Iterable[Item] = tqdm(items, desc=description, total=total, leave=False)
    return shown


def _lines(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    count = len(items) if total is None and isinstance(items, Sized) else total
    begun = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= EVERY:
            told = now
            passed = tqdm.format_interval(now - begun)
            left = f"; about {tqdm.format_interval((now - begun) / done * (count - done))} left" if count else ""
            note(f"{description}: {done} of {count or '?'}, {passed}{left}")
        yield item
