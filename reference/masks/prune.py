"""The registry of pruning methods, behind one call. A new method is one file in masks/ and its record here."""

from __future__ import annotations

from reference import _checks
from reference._checks import Array, Mask
from reference.masks import admm, alps, magnitude, pruner_zero, sparsegpt, taylor, wanda

METHODS = {
    method.name: method
    for method in (
        magnitude.METHOD,
        wanda.METHOD,
        sparsegpt.METHOD,
        alps.METHOD,
        admm.METHOD,
        pruner_zero.METHOD,
        taylor.METHOD,
    )
}


def prune(
    method: str,
    weight: Array,
    statistic: Array | None,
    kept: Mask,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
) -> tuple[Array, Mask]:
    """Prune one projection further; its mask only shrinks.

    Source: LoSA, Algorithm 1, with any of METHODS.

    Parameters: method, one of METHODS; weight (out, in), the merged weight; statistic of its calibration input or of its
    gradients, as the method's record makes it: `wanda.input_norm` (in,) for wanda, `sparsegpt.hessian` (in, in) for
    sparsegpt, alps and admm, `pruner_zero.gradient_size` (out, in) for pruner_zero, the sum of the gradients (out, in) for
    taylor, None for magnitude; kept bool (out, in), the current mask; either sparsity in [0, 1] or nm = (n, m). Returns:
    (weight, zero where pruned and updated by a method that moves weights; mask bool (out, in), True = kept).

    Ties: as the method says; already pruned weights are pruned first.

    *Deviation*: see `select.demote_pruned`. Each group of a method (a row for wanda, a block of columns for sparsegpt) is
    pruned at the sparsity of `select.rest_sparsity`, so that the projection as a whole reaches the sparsity asked for.

    >>> prune("magnitude", [[0.0, 1.0, 2.0, 3.0]], None, [[False, True, True, True]], sparsity=0.5)
    (array([[0., 0., 2., 3.]]), array([[False, False,  True,  True]]))
    >>> W, kept = [[0, 0, 0, 0], [1.0, 2, 3, 4]], [[False] * 4, [True] * 4]
    >>> prune("wanda", W, [1, 1, 1, 1], kept, sparsity=0.75)[1]  # six zeros asked, four already there
    array([[False, False, False, False],
           [False, False,  True,  True]])
    """
    if (found := METHODS.get(method)) is None:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if (sparsity is None) == (nm is None):
        raise ValueError(f"sparsity is {sparsity} and nm is {nm}; give one of the two")
    if (statistic is None) == found.needs_statistic:
        raise ValueError(
            f"statistic is missing; {method} needs one"
            if statistic is None
            else f"statistic is given; {method} takes none"
        )
    if nm is not None:
        _checks.integer("m", nm[1], 1)
    W = _checks.array("weight", weight, "out", "in")
    kept = _checks.mask("kept", kept, W, "weight")
    amount = sparsity if nm is None else (nm[0], nm[1])
    assert amount is not None
    return found.prune(W, statistic, kept, amount)
