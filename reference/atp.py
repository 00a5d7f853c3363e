"""ATP: rates in arithmetic progression over the depth, the first block the least sparse.

Legend: L blocks, s the target sparsity, β the difference of the rates of two neighbours.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array


def progression(target: float, blocks: int, step: float) -> Array:
    """Compute rates that rise by the same step from block to block, with the target as their mean.

    Source: ATP (arXiv 2502.14770), Eq. 5.

        ρ_l = s − β (L − 1) / 2 + β l,   l = 0 … L − 1

    Parameters: target s in [0, 1]; blocks L; step β from 0 to `largest_step`. Returns: ρ (L,).

    *Deviation*: none.

    >>> progression(0.5, 3, 0.1)
    array([0.4, 0.5, 0.6])
    """
    _checks.number("target", target, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    _checks.number("step", step, 0.0, largest_step(target, blocks) * (1 + 1e-9))
    rates = target + step * (np.arange(blocks) - (blocks - 1) / 2)
    return np.clip(rates, 0.0, 1.0)


def largest_step(target: float, blocks: int) -> float:
    """Compute the largest β with which all rates are from 0 to 1.

    Source: ATP (arXiv 2502.14770), Eq. 6.

        β ≤ min(2 s, 2 (1 − s)) / (L − 1)

    Parameters: target s in [0, 1]; blocks L. Returns: β ≥ 0; 0 for one block. *Deviation*: none.

    >>> largest_step(0.75, 3)
    0.25
    """
    _checks.number("target", target, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    return 2 * min(target, 1 - target) / max(1, blocks - 1)


def candidate_steps(target: float, blocks: int, count: int = 9) -> Array:
    """List the values of β to try.

    Source: ATP (arXiv 2502.14770) tries every multiple of 0.002.

        β_k = k / (count − 1) · β_max,   k = 0 … count − 1

    Parameters: target s in [0, 1]; blocks L; count ≥ 2. Returns: (count,), the first is 0: uniform rates.

    *Deviation*: a fixed number of candidates, whatever L is. With 32 blocks at 70 % they are 0.0024 apart (decision 45).

    >>> candidate_steps(0.75, 3, count=3)
    array([0.   , 0.125, 0.25 ])
    """
    _checks.integer("count", count, 2)
    return np.arange(count) / (count - 1) * largest_step(target, blocks)
