"""Compare results of the two packages; every failure names the quantity, the index and both values."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def to_numpy(value: Any) -> np.ndarray:
    """Convert a tensor of any dtype, an array or a number to an array; bf16 becomes float32, exactly."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)


def assert_exact(name: str, reference: Any, production: Any) -> None:
    """Check for the same shape, dtype and values."""
    ref, out = to_numpy(reference), to_numpy(production)
    assert ref.shape == out.shape, f"{name}: shape {out.shape}, the spec's is {ref.shape}"
    assert ref.dtype == out.dtype, f"{name}: dtype {out.dtype}, the spec's is {ref.dtype}"
    if not np.array_equal(ref, out):
        index = tuple(int(i) for i in np.argwhere(ref != out)[0])
        raise AssertionError(
            f"{name}: {int((ref != out).sum())} of {ref.size} differ, first at {index}: "
            f"{out[index]}, the spec's is {ref[index]}"
        )


def assert_close(
    name: str,
    reference: Any,
    production: Any,
    tolerance: float,
    scale: Any = None,
    floor: float = 0.0,
) -> None:
    """Check that every difference is at most `tolerance` times `scale`, or `floor`, and that neither side holds NaN.

    scale: what roundings are relative to, one number or one per entry; default: the largest entry.
    """
    ref, out = to_numpy(reference).astype(np.float64), to_numpy(production).astype(np.float64)
    assert ref.shape == out.shape, f"{name}: shape {out.shape}, the spec's is {ref.shape}"
    assert np.isfinite(ref).all(), f"{name}: the spec's holds NaN or infinity"
    assert np.isfinite(out).all(), f"{name}: holds NaN or infinity"
    if ref.size == 0:
        return
    difference = np.abs(ref - out)
    sizes = np.broadcast_to(np.abs(ref).max() if scale is None else to_numpy(scale), ref.shape)
    excess = difference - tolerance * sizes - max(floor, np.finfo(float).tiny)
    worst = np.unravel_index(excess.argmax(), excess.shape)
    ratio = np.sqrt((difference**2).mean()) / max(np.sqrt((ref**2).mean()), np.finfo(float).tiny)
    assert excess[worst] <= 0, (
        f"{name}: off by {difference[worst]:.3e} at {tuple(int(i) for i in worst)}: {out[worst]!r}, the spec's is "
        f"{ref[worst]!r}; RMS ratio {ratio:.3e}, allowed {tolerance:.3e} of {float(sizes[worst]):.3e}"
    )


def assert_masks_agree(name: str, reference: Any, production: Any, score: Any, tolerance: float) -> None:
    """Check that masks differ only where the score is within `tolerance` of the row's threshold.

    The threshold of a row lies between its highest pruned and its lowest kept score. Both masks prune equally many.
    """
    ref, out, score = to_numpy(reference), to_numpy(production), to_numpy(score).astype(np.float64)
    assert ref.shape == out.shape, f"{name}: shape {out.shape}, the spec's is {ref.shape}"
    assert (ref.sum(1) == out.sum(1)).all(), f"{name}: rows do not keep as many weights as the spec's"
    for row in np.flatnonzero((ref != out).any(1)):
        threshold = score[row][~ref[row]].max()
        distance = np.abs(score[row] - threshold)[ref[row] != out[row]]
        assert distance.max() <= tolerance * abs(threshold), (
            f"{name}: row {row} differs from the spec's at a score {distance.max():.3e} from its threshold {threshold:.3e}"
        )


def outcome(function: Callable[..., Any], case: dict[str, Any]) -> str | None:
    """Kind and message of the refusal, in words that do not depend on the package; None if there is none."""
    try:
        function(**case)
    except (ValueError, TypeError) as error:
        words = str(error).replace("an array of real numbers", "a tensor")
        words = re.sub(r"\b(is|has dtype) (torch\.)?(bool|float64|u?int64|uint8|str|<U\d)\b", "is X", words)
        # Sums in another order differ in the last digits.
        words = re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.9g}", words)
        return f"{type(error).__name__}: {words}"
    return None
