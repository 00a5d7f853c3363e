"""Figures of a comparison: perplexity, mean and deviation over seeds, a paired test over windows, the chosen learning rate.

Decision record: docs/decisions/0048-significance-over-windows.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; no deviation of a single one. None: one of them diverged."""

    mean: float | None
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """A paired t-test over windows. difference: mean over the windows, in nats per token; negative is better."""

    difference: float
    p: float
    windows: int


def perplexity(losses: Sequence[float]) -> float:
    """Return the perplexity of windows of equal length from their mean losses per token."""
    return math.exp(math.fsum(losses) / len(losses))


def spread(values: Sequence[float | None]) -> Spread:
    """Return mean and deviation of one value per seed; None marks one that diverged."""
    found = [value for value in values if value is not None]
    if not found or len(found) < len(values):
        return Spread(None, None, len(values))
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), deviation, len(found))


def best_rate(tuning: Mapping[float, float | None]) -> float | None:
    """Return the learning rate with the lowest perplexity. None, NaN and infinity mark one that diverged; None if all did."""
    finite = {rate: value for rate, value in tuning.items() if value is not None and math.isfinite(value)}
    return min(finite, key=lambda rate: finite[rate]) if finite else None


def paired(losses: Mapping[int, Sequence[float]], reference: Mapping[int, Sequence[float]]) -> Paired | None:
    """Compare two recipes window by window: losses by seed, averaged over the seeds that both have.

    Two-sided t-test of the mean difference being 0. None with fewer than two windows, or no common seed, or if the windows
    are not the same.
    """
    seeds = sorted(losses.keys() & reference.keys())
    lengths = {len(of_seed[seed]) for of_seed in (losses, reference) for seed in seeds}
    if not seeds or len(lengths) != 1 or min(lengths) < 2:
        return None
    ours, theirs = (
        [statistics.fmean(window) for window in zip(*(of[seed] for seed in seeds), strict=True)]
        for of in (losses, reference)
    )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    if error == 0:
        return Paired(mean, 1.0 if mean == 0 else 0.0, count)
    return Paired(mean, float(2 * stats.t.sf(abs(mean / error), count - 1)), count)
