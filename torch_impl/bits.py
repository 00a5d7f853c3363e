"""Allocate bits to a model's weights. Spec: reference/bits.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_impl import _checks
from torch_impl._checks import SLACK
from torch_impl.quantise import FEWEST_BITS, MOST_BITS


def allocate_bits(importance: torch.Tensor, mean_bits: float, choices: Sequence[int]) -> torch.Tensor:
    """Choose the bits (L,) int64 of each block's weights, Σ b = L · mean_bits: max Σ I b, then min Σ b², without rounding.

    Errors: ValueError with the nearest means, if no choice of bits has this mean.
    """
    importance = _checks.finite("importance", importance, "L").double()
    L = len(importance)
    if not len(choices):
        raise ValueError(f"choices is {choices}; allowed: one or more numbers of bits")
    choices = sorted({_checks.integer("choices", bits, 1) for bits in choices})
    mean_bits = _checks.number("mean_bits", mean_bits, choices[0], choices[-1])
    gains, order = _in_integers(importance)

    # tables[k]: the best (Σ I b, −Σ b²) of the k most important blocks, by their sum of bits.
    tables: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for gain in reversed(gains):
        table: dict[int, tuple[int, int]] = {}
        for total, (value, even) in tables[-1].items():
            for bits in choices:
                found = (value + gain * bits, even - bits * bits)
                table[total + bits] = max(found, table.get(total + bits, found))
        tables.append(table)
    left = round(L * mean_bits)
    reachable = tables.pop()
    if abs(left - L * mean_bits) > SLACK * left or left not in reachable:
        below, above = max(t for t in reachable if t < L * mean_bits), min(t for t in reachable if t > L * mean_bits)
        raise ValueError(
            f"mean_bits is {mean_bits}; allowed for {L} blocks: {below / L:g} or {above / L:g}, the nearest"
        )
    value, even = reachable[left]
    allocated = torch.empty(L, dtype=torch.int64)
    # The less important a block, the fewer of the bits that keep the best in reach.
    for block, gain in zip(order, gains, strict=True):
        rest = tables.pop()
        bits = next(b for b in choices if rest.get(left - b) == (value - gain * b, even + b * b))
        allocated[block] = bits
        left, value, even = left - bits, value - gain * bits, even + bits * bits
    return allocated.to(importance.device)


def nearby_bits(mean_bits: float) -> tuple[int, ...]:
    """List the numbers of bits that a block may have: from one below the mean's floor to one above its ceiling, from 2 to 8."""
    _checks.number("mean_bits", mean_bits, FEWEST_BITS, MOST_BITS)
    return tuple(range(max(FEWEST_BITS, math.floor(mean_bits) - 1), min(MOST_BITS, math.ceil(mean_bits) + 1) + 1))


def allocate_bits_by_harm(
    harm: torch.Tensor, sizes: Sequence[int], mean_bits: float, choices: Sequence[int]
) -> torch.Tensor:
    """Choose the bits (P,) int64 of each projection: min Σ harm, with a mean over all weights of at most mean_bits.

    harm: (P, choices); sizes: weights of each projection; choices: increasing numbers of bits. Ties: fewer bits in all, then
    for the last projection, and so on.
    """
    harm = _checks.finite("harm", harm, "projections", "choices").double().cpu()
    choices = [_checks.integer("choices", bits, 1) for bits in choices]
    if len(choices) != harm.shape[1] or choices != sorted(set(choices)):
        raise ValueError(
            f"choices is {choices}; allowed: {harm.shape[1]} increasing numbers of bits, one for each harm"
        )
    sizes = [_checks.integer("sizes", size, 1) for size in sizes]
    if len(sizes) != len(harm):
        raise ValueError(f"sizes has {len(sizes)} entries; allowed: {len(harm)}, one for each projection")
    mean_bits = _checks.number("mean_bits", mean_bits, choices[0], choices[-1])

    # Bits are counted in units that all sizes are multiples of.
    unit = math.gcd(*sizes)
    most = math.floor(mean_bits * sum(sizes) * (1 + SLACK) / unit)
    best = torch.full((most + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    taken: list[torch.Tensor] = []
    for of_projection, size in zip(harm.tolist(), sizes, strict=True):
        ways = torch.full((len(choices), most + 1), math.inf, dtype=torch.float64)
        for way, bits, more in zip(ways, choices, of_projection, strict=True):
            step = size // unit * bits
            way[step:] = best[: max(0, most + 1 - step)] + more
        # Of equal harms, the fewest bits.
        best, chosen = ways.min(0).values, torch.zeros(most + 1, dtype=torch.int8)
        for number in reversed(range(len(choices))):
            chosen[ways[number] == best] = number
        taken.append(chosen)
    left = int((best == best.min()).nonzero()[0])
    allocated = []
    for chosen, size in zip(reversed(taken), reversed(sizes), strict=True):
        allocated.append(choices[int(chosen[left])])
        left -= size // unit * allocated[-1]
    return torch.tensor(allocated[::-1], dtype=torch.int64)


def _in_integers(importance: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the importances in increasing order, times a common power of two that makes them integers, and the blocks."""
    increasing, order = torch.sort(importance, stable=True)
    ratios = [value.as_integer_ratio() for value in increasing.tolist()]
    common = max(denominator for _, denominator in ratios)
    return [numerator * (common // denominator) for numerator, denominator in ratios], order.tolist()
