"""Actions on files that a thread of its own carries out in order, so that a GPU need not wait for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

WAITING = 4
"""So many actions wait at most: each may hold the weights of one block."""


class Background:
    """Carries out actions one after the other, in a thread if `threaded`, else at once.

    After an action that failed none is carried out; its exception is raised by the next call that waits for it.
    """

    def __init__(self, threaded: bool) -> None:
        self._executor = ThreadPoolExecutor(1, "checkpoints") if threaded else None
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def do(self, action: Callable[..., Any], *arguments: Any) -> None:
        """Carry out an action after those before it; wait while too many do. What it is given must not change until then."""
        if self._executor is None:
            action(*arguments)
            return
        while len(self._waiting) >= WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._executor.submit(self._attempt, action, *arguments))

    def wait(self) -> None:
        """Wait until everything is done. Errors: that of the action that failed."""
        while self._waiting:
            self._waiting.popleft().result()

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            action(*arguments)
        except BaseException:
            self._failed = True
            raise
