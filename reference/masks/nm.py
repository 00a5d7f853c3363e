"""N:M patterns: keep the N best of every M consecutive inputs of a row."""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask


def nm_mask(score: Array, n: int, m: int) -> Mask:
    """Keep the n highest scores of every m consecutive inputs of a row.

    Source: LoSA, Section 4 (2:4, mixed 2:4); Mishra et al. 2021 (arXiv 2104.08378).

    Parameters: score (out, in), in a multiple of m, −inf allowed; n from 0 to m; m. Returns: bool (out, in),
    True = kept; exactly n per group.

    Ties: the lower column is pruned first.

    *Deviation*: none. 2:8 keeps 2 of 8: 75 % zeros.

    >>> nm_mask([[1, 4, 3, 2, 0, 0, 0, 0]], 2, 4)
    array([[False,  True,  True, False, False, False,  True,  True]])
    """
    score = _checks.scores(score)
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    if score.shape[1] % m:
        raise ValueError(f"m is {m}; allowed: a divisor of the {score.shape[1]} inputs")
    groups = score.reshape(len(score), -1, m)
    order = np.argsort(groups, axis=2, kind="stable")
    mask = np.ones(groups.shape, dtype=bool)
    np.put_along_axis(mask, order[:, :, : m - n], False, axis=2)
    return mask.reshape(score.shape)


def kept_per_group(sparsity: float, m: int) -> int:
    """Return N of N:M at one step of the schedule.

    Source: ours; the zeros of a group grow with s_t.

        N_t = M − rint(s_t · M)

    Parameters: sparsity s_t in [0, 1]; m. Returns: N_t, 0 to m. A half is rounded to an even number of zeros (slack
    1e-9 for the rounding of s_t).

    *Deviation*: the paper does not say how an N:M pattern grows.

    >>> [kept_per_group(s, 4) for s in (0.1, 0.2, 0.4, 0.5)]  # zeros: 0.4, 0.8, 1.6, 2
    [4, 3, 2, 2]
    """
    _checks.number("sparsity", sparsity, 0.0, 1.0)
    _checks.integer("m", m, 1)
    return int(m - np.rint(round(sparsity * m, 9)))
