"""ADMM pruning: choose the support while the weights adapt to it, in few iterations.

Legend: W (out × in) one projection's weight, H (in × in) the Hessian of its calibration input, M the support, Z and U (out × in)
as in the paper: the weights on the support and the scaled dual variable.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.least_squares import Problem, keep_largest
from reference.masks.method import Amount, Method
from reference.masks.nm import kept_per_group
from reference.masks.sparsegpt import hessian as input_hessian
from reference.schedule import cubic_sparsity

# Share of mean(diag H) added to the diagonal.
DAMPING = 0.1
# Iterations in all, and those that choose the support anew.
ITERATIONS, CHOOSING = 20, 15
PENALTY = 1.0


def admm(
    weight: Array, hessian: Array, sparsity: float, damping: float = DAMPING, kept: Mask | None = None
) -> tuple[Array, Mask]:
    """Prune a share of the whole matrix; the weights adapt while the support shrinks.

    Source: Boža 2024 (arXiv 2401.02938), Algorithms 1 and 2.

        min over Z = M ⊙ Z of Tr((W₀ − Z) H (W₀ − Z)ᵀ),   in scaled inputs, see `least_squares.Problem`
        W = W₀,  U = 0,  ρ = 1;   repeat 20 times:
          in the first 15 iterations, M = top-k of (W + U)
          Z = M ⊙ (W + U);   U += W − Z;   W = (H W₀ + ρ (Z − U))(H + ρI)⁻¹
        result: M ⊙ (W + U)

    k falls by the schedule of `cubic_sparsity`, from the entries that are kept to those asked for at the 15th iteration.

    Parameters: weight W₀ (out, in); hessian H (in, in); sparsity, the share of zeros in [0, 1]; damping, the share of mean(diag
    H) added to the diagonal; kept bool (out, in), the weights not yet pruned, default all. The others stay pruned.

    Returns: (W' (out, in), zero where pruned; mask bool (out, in), True = kept).

    Ties: the first in row-major order is pruned first.

    Errors: as `least_squares.Problem.of`.

    *Deviation*: the published code ignores earlier masks, and damps after scaling. Here a weight that already has enough
    zeros stays as it is.

    >>> W, mask = admm([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 0.5, damping=0.0)
    >>> mask
    array([[False,  True]])
    >>> W.round(2)  # on its way to (1·2 + 2·4) / 4
    array([[0.  , 2.51]])
    """
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    return Problem.of(hessian, damping).prune(_search, weight, sparsity, kept)


def admm_nm(
    weight: Array, hessian: Array, n: int, m: int, damping: float = DAMPING, kept: Mask | None = None
) -> tuple[Array, Mask]:
    """Prune by ADMM, keeping n of every m consecutive inputs of a row.

    Source: Boža 2024 (arXiv 2401.02938). The kept weights of a group fall by the same schedule (`nm.kept_per_group`).

    Parameters: as for `admm`; n from 0 to m; m, a divisor of in. Returns: as `admm`.

    Ties: the lower column of a group is pruned first.

    Errors: as `admm`.

    *Deviation*: as `admm`; the published code asks for n of m from the first iteration on.

    >>> admm_nm([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 1, 2, damping=0.0)[1]
    array([[False,  True]])
    """
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    return Problem.of(hessian, damping).prune(_search, weight, (n, m), kept)


def _search(problem: Problem, W: Array, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
    """Choose the support of a scaled weight (out, in); return the weights on it and the support."""
    G, U, zeros = W @ problem.hessian, np.zeros(W.shape), float((~kept).mean())
    for iteration in range(1, ITERATIONS + 1):
        if iteration <= CHOOSING:
            support = keep_largest(W + U, kept, _amount(amount, iteration, zeros))
        Z = np.where(support, W + U, 0.0)
        U = U + W - Z
        W = problem.solve(G + PENALTY * (Z - U), PENALTY)
    return np.where(support, W + U, 0.0), support


def _amount(amount: Amount, iteration: int, zeros: float) -> Amount:
    """Return how much is pruned at an iteration, from a share of zeros to the amount asked for."""
    final = 1 - amount[0] / amount[1] if isinstance(amount, tuple) else amount
    sparsity = cubic_sparsity(iteration, CHOOSING, final, min(zeros, final))
    return (kept_per_group(sparsity, amount[1]), amount[1]) if isinstance(amount, tuple) else sparsity


def _prune_further(weight: Array, hessian: Array, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
    return Problem.of(hessian, DAMPING).prune(_search, weight, amount, kept)


METHOD = Method("admm", _prune_further, statistic=input_hessian)
