"""Allocate bits to a model's weights, for `quantise`: by block, or by projection.

Legend: L blocks; P projections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import SLACK, Array
from reference.quantise import FEWEST_BITS, MOST_BITS


def allocate_bits(importance: Array, mean_bits: float, choices: Sequence[int]) -> NDArray[np.int64]:
    """Choose the bits of each block's weights: the more important a block, the more bits, with exactly the given mean.

    Source: ours (decision 50), after Eq. 5.

        max_b Σ I_l b_l   subject to   Σ b_l = L · b̄,   b_l one of the choices

    The choices bound how far a block may be from the mean, as δ does in `allocate_sparsity`. Found block by block, in order of
    increasing importance: for every sum of bits that the blocks so far can have, keep the best way to have it.

    Parameters: importance I (L,); mean_bits b̄, between the smallest and the largest choice; choices, one or more numbers of
    bits, 1 or more. Returns: b (L,) int64.

    Ties: of equal sums Σ I b, that with the smallest Σ b², so that equally important blocks differ least; then that which
    gives fewer bits to the less important blocks, equal importances by lower index. Sums are compared without rounding.

    Errors: ValueError with the nearest means, if no choice of bits has this mean.

    *Deviation*: the paper names bits as a further use of its importances, without a rule.

    >>> allocate_bits([0.9, 0.5, 0.7, 0.8], mean_bits=5, choices=(3, 4, 8))
    array([8, 4, 4, 4])
    """
    importance = _checks.array("importance", importance, "L")
    L = len(importance)
    if not len(choices):
        raise ValueError(f"choices is {choices}; allowed: one or more numbers of bits")
    choices = sorted({_checks.integer("choices", bits, 1) for bits in choices})
    mean_bits = _checks.number("mean_bits", mean_bits, choices[0], choices[-1])

    order = np.argsort(importance, kind="stable")
    exact = [Fraction(value) for value in importance]
    # All denominators are powers of two, so the largest makes every I an integer.
    common = max(value.denominator for value in exact)
    # By sum of bits: (−Σ I b, Σ b², bits in order of increasing importance), the smallest of its kind.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for block in order:
        ways: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        weight = int(exact[block] * common)
        for total, (cost, squares, given) in best.items():
            for bits in choices:
                way = (cost - weight * bits, squares + bits**2, (*given, bits))
                ways[total + bits] = min(way, ways.get(total + bits, way))
        best = ways
    total = round(L * mean_bits)
    if abs(total - L * mean_bits) > SLACK * total or total not in best:
        below, above = max(t for t in best if t < L * mean_bits), min(t for t in best if t > L * mean_bits)
        raise ValueError(
            f"mean_bits is {mean_bits}; allowed for {L} blocks: {below / L:g} or {above / L:g}, the nearest"
        )
    allocated = np.empty(L, dtype=np.int64)
    allocated[order] = best[total][2]
    return allocated


def nearby_bits(mean_bits: float) -> tuple[int, ...]:
    """List the numbers of bits that a block may have at a given mean, as choices of `allocate_bits`.

    Source: ours (decision 50).

        ⌊b̄⌋ − 1, …, ⌈b̄⌉ + 1,   those from 2 to 8

    Parameters: mean_bits b̄ from 2 to 8. Returns: increasing numbers of bits.

    *Deviation*: none known.

    >>> nearby_bits(4), nearby_bits(2.5)
    ((3, 4, 5), (2, 3, 4))
    """
    _checks.number("mean_bits", mean_bits, FEWEST_BITS, MOST_BITS)
    return tuple(range(max(FEWEST_BITS, math.floor(mean_bits) - 1), min(MOST_BITS, math.ceil(mean_bits) + 1) + 1))


def allocate_bits_by_harm(
    harm: Array, sizes: Sequence[int], mean_bits: float, choices: Sequence[int]
) -> NDArray[np.int64]:
    """Choose the bits of each projection so that the sum of the harms is smallest, at a mean over all weights.

    Source: ours (decision 50): a multiple-choice knapsack, by dynamic programming.

        min_b Σ_p harm_p(b_p)   subject to   Σ_p n_p b_p ≤ b̄ Σ_p n_p,   b_p one of the choices

    Projection by projection: for every number of bits that those so far can take, keep the least harm.

    Parameters: harm (P, choices), of each projection with each of the choices; sizes n (P,), weights of each projection, 1 or
    more; mean_bits b̄, between the smallest and the largest choice; choices, increasing numbers of bits, 1 or more. Returns: b
    (P,) int64.

    Ties: of equal sums, that with the fewest bits in all, then fewer bits for the last projection, the last but one and so on.
    Sums are of float64, in order of the projections.

    *Deviation*: none known.

    >>> harm = [[9.0, 4.0, 1.0], [5.0, 1.0, 0.5]]  # the mean of 4 and 4 has a harm of 5, that of 5 and 3 one of 6
    >>> allocate_bits_by_harm(harm, [10, 10], 4, (3, 4, 5)), allocate_bits_by_harm(harm, [10, 30], 4, (3, 4, 5))
    (array([4, 4]), array([4, 4]))
    >>> allocate_bits_by_harm(harm, [1, 1], 4.5, (3, 4, 5))
    array([5, 4])
    """
    harm = _checks.array("harm", harm, "projections", "choices")
    choices = [_checks.integer("choices", bits, 1) for bits in choices]
    if len(choices) != harm.shape[1] or choices != sorted(set(choices)):
        raise ValueError(
            f"choices is {choices}; allowed: {harm.shape[1]} increasing numbers of bits, one for each harm"
        )
    sizes = [_checks.integer("sizes", size, 1) for size in sizes]
    if len(sizes) != len(harm):
        raise ValueError(f"sizes has {len(sizes)} entries; allowed: {len(harm)}, one for each projection")
    mean_bits = _checks.number("mean_bits", mean_bits, choices[0], choices[-1])

    most = mean_bits * sum(sizes) * (1 + SLACK)
    # By bits taken: (harm, bits of the last projection, of the last but one, …), the smallest.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for of_projection, size in zip(harm, sizes, strict=True):
        ways: dict[int, tuple[float, tuple[int, ...]]] = {}
        for taken, (so_far, given) in best.items():
            for bits, more in zip(choices, of_projection, strict=True):
                way = (so_far + float(more), (bits, *given))
                ways[taken + size * bits] = min(way, ways.get(taken + size * bits, way))
        best = ways
    _, _, reverse = min((so_far, taken, given) for taken, (so_far, given) in best.items() if taken <= most)
    return np.array(reverse[::-1], dtype=np.int64)
