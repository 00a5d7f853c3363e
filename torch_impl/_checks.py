"""Argument checks of production. Each error is one line: the argument, its value and what is allowed.

Reading a value waits for the GPU. So values are checked only where a wrong one would otherwise go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

MOST = 10**9
# Relative slack for rounding when two budgets are compared.
SLACK = 1e-9
# Names that a message lists before it only says how many more there are.
SHOWN = 3


def tensor(name: str, value: Any, *axes: str, empty: bool = False) -> torch.Tensor:
    """Check for a floating-point tensor, one named axis per dimension; a first axis "..." stands for any number of axes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")
    if not value.is_floating_point():
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: a floating-point dtype")
    fits = value.dim() >= len(axes) - 1 if axes[0] == "..." else value.dim() == len(axes)
    if not fits or (value.numel() == 0 and not empty):
        allowed = f"({', '.join(axes)}){'' if empty else ', none of them 0'}"
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {allowed}")
    return value


def typed(name: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Check for a tensor of exactly this dtype, and of this shape unless it is None."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}; allowed: a tensor")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: {str(dtype).removeprefix('torch.')}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed: {shape}")
    return value


def finite(name: str, value: Any, *axes: str) -> torch.Tensor:
    """Check for a tensor without NaN or infinity. Use it for small tensors, or where the result would hide them."""
    result = tensor(name, value, *axes)
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"{name} holds NaN or infinity; allowed: finite numbers")
    return result


def same_shape(name: str, value: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Check that `value` has the shape of `like`."""
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; allowed: {tuple(like.shape)}, the shape of {like_name}"
        )


def mask(name: str, value: Any, like: torch.Tensor, like_name: str) -> torch.Tensor:
    """Check that `value` is a bool tensor of the shape of `like`."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; allowed: bool, True = kept")
    same_shape(name, value, like, like_name)
    return value


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Check that `value` is a finite real number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; allowed: a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; allowed: a finite number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; allowed: {low} {'or more' if high == math.inf else f'to {high}'}")
    return float(value)


def integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """Check that `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {value!r}; allowed: an integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; allowed: {low} {'or more' if high is None else f'to {high}'}")
    return int(value)


def count(name: str, value: int, low: int = 1, most: int = MOST) -> int:
    """Check that `value` is an integer from `low` to `most`, so that absurd sizes are refused before any allocation."""
    number = integer(name, value, low)
    if number > most:
        raise ValueError(f"{name} is {value}; allowed: at most {most}")
    return number


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Check that `value` is one of the `allowed` words."""
    if value not in (words := tuple(allowed)):
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(words)}")
    return value


def few(names: Iterable[str]) -> str:
    """List the first names and the number of further ones."""
    every = [name if len(name) <= 100 else f"{name[:100]}…" for name in names]
    more = f" and {len(every) - SHOWN:,} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def square(name: str, value: Any) -> torch.Tensor:
    """Check that `value` is a square matrix."""
    result = tensor(name, value, "n", "n")
    if result.shape[0] != result.shape[1]:
        raise ValueError(f"{name} has shape {tuple(result.shape)}; allowed: (n, n)")
    return result


def scores(value: Any) -> torch.Tensor:
    """Check for a matrix (out, in) of scores without NaN; infinities are allowed."""
    result = tensor("score", value, "out", "in")
    if bool(torch.isnan(result).any()):
        raise ValueError("score holds NaN; allowed: numbers")
    return result


def wide(value: torch.Tensor) -> torch.Tensor:
    """Widen half precision to float32; float32 and float64 stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
