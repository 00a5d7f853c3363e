"""Argument checks of the spec. Each error is one line: the argument, its value and what is allowed.

Every function with a formula checks its arguments and raises TypeError or ValueError. So docstrings list only the errors
that do not follow from their Parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]

SLACK = 1e-9
"""Relative slack for rounding when two budgets are compared."""


def array(name: str, value: Any, *axes: str, empty: bool = False, finite: bool = True) -> Array:
    """Convert `value` to float64, one named axis per dimension; a first axis "..." stands for any number of axes.

    empty: allow an array without entries. finite: refuse NaN and infinity.
    """
    try:
        result = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array of real numbers") from error
    leading = axes[0] == "..."
    fits = result.ndim >= len(axes) - 1 if leading else result.ndim == len(axes)
    if not fits or (result.size == 0 and not empty):
        allowed = f"({', '.join(axes)}){'' if empty else ', none of them 0'}"
        raise ValueError(f"{name} has shape {result.shape}; allowed: {allowed}")
    if finite and not np.isfinite(result).all():
        raise ValueError(f"{name} holds NaN or infinity; allowed: finite numbers")
    return result


def same_shape(name: str, value: Any, like: NDArray[Any], like_name: str) -> None:
    """Check that `value` has the shape of `like`."""
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {value.shape}; allowed: {like.shape}, the shape of {like_name}")


def mask(name: str, value: Any, like: NDArray[Any], like_name: str) -> Mask:
    """Check that `value` is a bool array of the shape of `like`."""
    result = np.asarray(value)
    if result.dtype != np.bool_:
        raise TypeError(f"{name} has dtype {result.dtype}; allowed: bool, True = kept")
    same_shape(name, result, like, like_name)
    return result


def typed(name: str, value: Any, dtype: type, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Check for an array of exactly this dtype, and of this shape unless it is None."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: an array of real numbers")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: {np.dtype(dtype)}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}; allowed: {shape}")
    return value


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Check that `value` is a finite real number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is {value!r}; allowed: a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; allowed: a finite number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed: {low} {'or more' if high == math.inf else f'to {high}'}")
    return float(value)


def integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """Check that `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; allowed: an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; allowed: {low} {'or more' if high is None else f'to {high}'}")
    return int(value)


def square(name: str, value: Any) -> Array:
    """Convert `value` to a square float64 matrix."""
    result = array(name, value, "n", "n")
    if result.shape[0] != result.shape[1]:
        raise ValueError(f"{name} has shape {result.shape}; allowed: (n, n)")
    return result


def scores(value: Any) -> Array:
    """Convert `value` to a float64 matrix (out, in) of scores without NaN; infinities are allowed."""
    result = array("score", value, "out", "in", finite=False)
    if np.isnan(result).any():
        raise ValueError("score holds NaN; allowed: numbers")
    return result


def token_ids(name: str, value: Ids, vocabulary: int, least: int = 0) -> Ids:
    """Check token ids (n, t), each at least `least` and below `vocabulary`."""
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {ids.dtype}; allowed: integers")
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"{name} has shape {ids.shape}; allowed: (n, t), none of them 0")
    if ids.min() < least or ids.max() >= vocabulary:
        raise ValueError(f"{name} holds {ids.min()} to {ids.max()}; allowed: {least} to {vocabulary - 1}")
    return ids
