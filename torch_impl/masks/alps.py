"""ALPS: search for the best support and its weights together, then solve for the weights. Spec: reference/masks/alps.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.least_squares import Problem, keep_largest, method, refine
from torch_impl.masks.method import Amount

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
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    damping: float = DAMPING,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a share of the whole matrix with ALPS, in float32 at least; return (weight, mask), both (out, in).

    hessian: (in, in). kept: weights not yet pruned; the others stay pruned.
    Errors: ValueError with the damping values tried, if the Hessian is not positive definite.
    """
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)
    return Problem.of(hessian, damping).prune(_search, weight, sparsity, kept)


def alps_nm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n: int,
    m: int,
    damping: float = DAMPING,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune with ALPS, keeping n of every m consecutive inputs of a row; m divides in."""
    return Problem.of(hessian, damping).prune(_search, weight, (n, m), kept)


def _search(problem: Problem, W: torch.Tensor, kept: torch.Tensor, amount: Amount) -> tuple[torch.Tensor, torch.Tensor]:
    """Search for the support of a scaled weight (out, in), then refine the weights on it; return both."""
    G = W @ problem.hessian

    def start() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = keep_largest(W, kept, amount)
        return W.masked_fill(~first, 0.0), torch.zeros_like(W), first

    D, V, support = start()
    earlier, rho, grown = support, PENALTY, False
    for iteration in range(1, ITERATIONS + 1):
        B = problem.solve(D.mul_(rho).add_(G).sub_(V), rho)
        D = torch.add(B, V, alpha=1 / rho)
        support = keep_largest(D, kept, amount)
        D.masked_fill_(~support, 0.0)
        V.add_(B.sub_(D), alpha=rho)
        if iteration % EVERY:
            continue
        changed = int((support != earlier).sum()) / max(1, int(support.sum()))
        earlier = support
        if (changed == 0 and grown) or (changed < SETTLED and iteration >= SETTLED_FROM):
            break
        rho, grown = _next_penalty(rho, changed, grown)
        if changed and not grown:
            D, V, _ = start()
    del G, V, B
    return refine(W, D, problem.hessian, support), support


def _next_penalty(rho: float, changed: float, grown: bool) -> tuple[float, bool]:
    """Return ρ after a share of the support has changed, and whether it has ever grown."""
    for share, factor in GROWTH:
        if changed > share:
            return rho * factor, True
    return (rho * 1.1, True) if grown else (rho / 5, False)


METHOD = method("alps", _search, DAMPING)
