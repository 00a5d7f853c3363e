"""The registry of pruning methods, behind one call. A new method is one file in masks/ and one line here."""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.nm import nm_mask
from reference.masks.select import demote_pruned, matrix_mask, rest_sparsity, row_mask
from reference.masks.sparsegpt import BLOCK_SIZE, sparsegpt, sparsegpt_nm
from reference.masks.wanda import wanda_score

METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    method: str,
    weight: Array,
    statistic: Array | None,
    kept: Mask,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
) -> tuple[Array, Mask]:
    """Prune one projection further; its mask only shrinks.

    Source: LoSA, Algorithm 1, with the scores of magnitude, Wanda or SparseGPT.

    Parameters: method, one of METHODS; weight (out, in), the merged weight; statistic of its calibration input: None for
    magnitude, `wanda.input_norm` (in,) for wanda, `sparsegpt.hessian` (in, in) for sparsegpt; kept bool (out, in), the
    current mask; either sparsity in [0, 1] or nm = (n, m). Returns: (weight, zero where pruned and updated by SparseGPT;
    mask bool (out, in), True = kept).

    Ties: as the method says; already pruned weights are pruned first.

    *Deviation*: see `select.demote_pruned`. Each group of a method (a row for wanda, a block of columns for sparsegpt) is
    pruned at the sparsity of `select.rest_sparsity`, so that the projection as a whole reaches the sparsity asked for.

    >>> prune("magnitude", [[0.0, 1.0, 2.0, 3.0]], None, np.array([[False, True, True, True]]), sparsity=0.5)
    (array([[0., 0., 2., 3.]]), array([[False, False,  True,  True]]))
    >>> W = np.array([[0, 0, 0, 0], [1.0, 2, 3, 4]])
    >>> prune("wanda", W, np.ones(4), W != 0, sparsity=0.75)[1]  # six zeros asked, four already there
    array([[False, False, False, False],
           [False, False,  True,  True]])
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if (sparsity is None) == (nm is None):
        raise ValueError(f"sparsity is {sparsity} and nm is {nm}; give one of the two")
    if (statistic is None) != (method == "magnitude"):
        raise ValueError(
            f"statistic is missing; {method} needs one"
            if statistic is None
            else f"statistic is given; {method} takes none"
        )
    if nm is not None:
        _checks.integer("m", nm[1], 1)
    W = _checks.array("weight", weight, "out", "in")
    kept = _checks.mask("kept", kept, W, "weight")
    if sparsity is not None:
        sparsity = rest_sparsity(*_groups(method, kept), sparsity)

    if statistic is not None and method == "sparsegpt":
        if nm is not None:
            return sparsegpt_nm(W, statistic, *nm, block_size=nm[1] * max(1, BLOCK_SIZE // nm[1]), kept=kept)
        assert sparsity is not None
        return sparsegpt(W, statistic, sparsity, kept=kept)
    score = demote_pruned(np.abs(W) if statistic is None else wanda_score(W, statistic), kept)
    if nm is not None:
        mask = nm_mask(score, *nm)
    else:
        assert sparsity is not None
        mask = matrix_mask(score, sparsity) if method == "magnitude" else row_mask(score, sparsity)
    mask &= kept
    return np.where(mask, W, 0.0), mask


def _groups(method: str, kept: Mask) -> tuple[Array, Array]:
    """Count (zeros, entries) of each group in which a method compares scores: rows, blocks of columns, or the matrix."""
    if method == "wanda":
        parts = list(kept)
    elif method == "sparsegpt":
        parts = [kept[:, start : start + BLOCK_SIZE] for start in range(0, kept.shape[1], BLOCK_SIZE)]
    else:
        parts = [kept]
    return np.array([(~part).sum() for part in parts], dtype=np.float64), np.array([float(part.size) for part in parts])
