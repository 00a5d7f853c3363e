"""ADMM pruning: choose the support while the weights adapt to it. Spec: reference/masks/admm.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.least_squares import Problem, keep_largest, method
from torch_impl.masks.method import Amount
from torch_impl.masks.nm import kept_per_group
from torch_impl.schedule import cubic_sparsity

# Share of mean(diag H) added to the diagonal.
DAMPING = 0.1
# Iterations in all, and those that choose the support anew.
ITERATIONS, CHOOSING = 20, 15
PENALTY = 1.0


def admm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    damping: float = DAMPING,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a share of the whole matrix by ADMM, in float32 at least; return (weight, mask), both (out, in).

    hessian: (in, in). kept: weights not yet pruned; the others stay pruned.
    Errors: ValueError with the damping values tried, if the Hessian is not positive definite.
    """
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    return Problem.of(hessian, damping).prune(_search, weight, sparsity, kept)


def admm_nm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n: int,
    m: int,
    damping: float = DAMPING,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune by ADMM, keeping n of every m consecutive inputs of a row; m divides in."""
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    return Problem.of(hessian, damping).prune(_search, weight, (n, m), kept)


def _search(problem: Problem, W: torch.Tensor, kept: torch.Tensor, amount: Amount) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the support of a scaled weight (out, in); return the weights on it and the support."""
    G, U, support, zeros = W @ problem.hessian, torch.zeros_like(W), kept, float((~kept).double().mean())
    for iteration in range(1, ITERATIONS + 1):
        near = W + U
        if iteration <= CHOOSING:
            support = keep_largest(near, kept, _amount(amount, iteration, zeros))
        Z = near.masked_fill_(~support, 0.0)
        U.add_(W).sub_(Z)
        W = problem.solve(Z.sub_(U).mul_(PENALTY).add_(G), PENALTY)
    return U.add_(W).masked_fill_(~support, 0.0), support


def _amount(amount: Amount, iteration: int, zeros: float) -> Amount:
    """Return how much is pruned at an iteration, from a share of zeros to the amount asked for."""
    final = 1 - amount[0] / amount[1] if isinstance(amount, tuple) else amount
    sparsity = cubic_sparsity(iteration, CHOOSING, final, min(zeros, final))
    return (kept_per_group(sparsity, amount[1]), amount[1]) if isinstance(amount, tuple) else sparsity


METHOD = method("admm", _search, DAMPING)
