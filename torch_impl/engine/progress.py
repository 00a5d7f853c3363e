"""Progress for people: a bar on a terminal, otherwise nothing but a line a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from torch_impl.engine import distributed

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Show a bar while going through the items, in process 0 and if standard error is a terminal: a log keeps every redraw."""
    hidden = None if distributed.is_main_process() else True
    shown: Iterable[Item] = tqdm(items, desc=description, total=total, leave=False, disable=hidden)
    return shown
