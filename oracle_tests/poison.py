"""Fill uninitialised memory with NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


def fill(tensor: torch.Tensor) -> None:
    """Fill a tensor with NaN, or with all bits set if its dtype has no NaN."""
    with torch.no_grad():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.bool, torch.uint8) and tensor.is_contiguous():
            tensor.view(torch.uint8).fill_(255)


@contextmanager
def poisoned() -> Iterator[None]:
    """Make torch's uninitialised tensors NaN, so that reading them before writing shows."""
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _filled(getattr(owner, name))))
        yield


def _filled(make: Any) -> Any:
    def made(*arguments: Any, **options: Any) -> torch.Tensor:
        result: torch.Tensor = make(*arguments, **options)
        if result.device.type != "meta":
            fill(result)
        return result

    return made
