"""JSON that every reader takes: no NaN, no infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any


def dumps(value: Any, what: str, indent: int | None = None) -> str:
    """The JSON text of plain values.

    Errors: FloatingPointError naming the first figure of `what` that is not finite: JSON has no such number.
    """
    for place, number in _not_finite(value, what):
        raise FloatingPointError(f"{place} is {number}; allowed in JSON: finite numbers")
    return json.dumps(value, indent=indent, allow_nan=False)


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}, {key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{number}]")
