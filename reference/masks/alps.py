"""ALPS: search for the best support and its weights together, then solve for the weights.

Legend: W (out × in) one projection's weight, H (in × in) the Hessian of its calibration input, M the support, B, D and V
(out × in) as in the paper: the weights free of the support, the weights on it, and the dual variable that pulls them together.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.least_squares import Problem, keep_largest, refine
from reference.masks.method import Amount, Method
from reference.masks.sparsegpt import hessian as input_hessian

# Share of mean(diag H) added to the diagonal.
DAMPING = 0.01
ITERATIONS = 300
# The penalty ρ at the start, and how many iterations it stays before it is changed.
PENALTY, EVERY = 0.1, 3
# If more than this share of the support changes, ρ grows by the factor.
GROWTH = ((0.1, 1.3), (0.005, 1.2))
# From this iteration on, stop when less than this share of the support changes.
SETTLED_FROM, SETTLED = 30, 3e-4


def alps(
    weight: Array, hessian: Array, sparsity: float, damping: float = DAMPING, kept: Mask | None = None
) -> tuple[Array, Mask]:
    """Prune a share of the whole matrix; choose support and weights so that the output changes least.

    Source: ALPS (NeurIPS 2024), Algorithms 1 and 2.

        min over Z of Tr((W − Z) H (W − Z)ᵀ),  at most k entries of Z not 0;   in scaled inputs, see `least_squares.Problem`
        B = D = top-k of W,  V = 0;   G = W H;   repeat with a growing penalty ρ:
          B = (G − V + ρD)(H + ρI)⁻¹;   D = top-k of (B + V/ρ);   V += ρ (B − D)
        then `least_squares.refine` on the support of D

    After every third iteration ρ grows: by 1.3 if more than 10 % of the support has changed, by 1.2 if more than 0.5 %, else by
    1.1. Before it has grown for the first time, a change below 0.5 % means that ρ is too large already: it is divided by 5, and
    the search starts again, or goes on if nothing has changed. The search ends when nothing changes, from iteration 30 on when less
    than 0.03 % of the support changes, or after 300 iterations.

    Parameters: weight W (out, in); hessian H (in, in); sparsity, the share of zeros in [0, 1]; damping, the share of mean(diag
    H) added to the diagonal; kept bool (out, in), the weights not yet pruned, default all. The others stay pruned.

    Returns: (W' (out, in), zero where pruned; mask bool (out, in), True = kept).

    Ties: the first in row-major order is pruned first.

    Errors: as `least_squares.Problem.of`.

    *Deviation*: the published code ignores earlier masks. Here a weight that already has enough zeros stays as it is.

    >>> alps([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 0.5, damping=0.0)  # without the first: 4 z = 1·2 + 2·4
    (array([[0. , 2.5]]), array([[False,  True]]))
    """
    return Problem.of(hessian, damping).prune(_search, weight, _checks.number("sparsity", sparsity, 0.0, 1.0), kept)


def alps_nm(
    weight: Array, hessian: Array, n: int, m: int, damping: float = DAMPING, kept: Mask | None = None
) -> tuple[Array, Mask]:
    """Prune with ALPS, keeping n of every m consecutive inputs of a row.

    Source: ALPS (NeurIPS 2024): the same with the projection onto N:M.

    Parameters: as for `alps`; n from 0 to m; m, a divisor of in. Returns: as `alps`.

    Ties: the lower column of a group is pruned first.

    Errors: as `alps`.

    *Deviation*: as `alps`.

    >>> alps_nm([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 1, 2, damping=0.0)
    (array([[0. , 2.5]]), array([[False,  True]]))
    """
    return Problem.of(hessian, damping).prune(_search, weight, (n, m), kept)


def _search(problem: Problem, W: Array, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
    """Search for the support of a scaled weight (out, in), then refine the weights on it; return both."""
    G = W @ problem.hessian
    first = support = earlier = keep_largest(W, kept, amount)
    D, V, rho, grown = np.where(first, W, 0.0), np.zeros(W.shape), PENALTY, False
    for iteration in range(1, ITERATIONS + 1):
        B = problem.solve(G - V + rho * D, rho)
        near = B + V / rho
        support = keep_largest(near, kept, amount)
        D = np.where(support, near, 0.0)
        V = V + rho * (B - D)
        if iteration % EVERY:
            continue
        changed, earlier = float((support != earlier).sum() / max(1, support.sum())), support
        if (changed == 0 and grown) or (changed < SETTLED and iteration >= SETTLED_FROM):
            break
        rho, grown = _next_penalty(rho, changed, grown)
        if changed and not grown:
            D, V = np.where(first, W, 0.0), np.zeros(W.shape)
    return refine(W, D, problem.hessian, support), support


def _next_penalty(rho: float, changed: float, grown: bool) -> tuple[float, bool]:
    """Return ρ after a share of the support has changed, and whether it has ever grown."""
    for share, factor in GROWTH:
        if changed > share:
            return rho * factor, True
    return (rho * 1.1, True) if grown else (rho / 5, False)


def _prune_further(weight: Array, hessian: Array, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
    return Problem.of(hessian, DAMPING).prune(_search, weight, amount, kept)


METHOD = Method("alps", _prune_further, statistic=input_hessian)
