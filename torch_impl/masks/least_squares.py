"""The least-squares problem behind ALPS and ADMM: reproduce a projection's outputs with few weights.

Spec: reference/masks/least_squares.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from torch_impl import _checks
from torch_impl.masks.method import Amount, Method
from torch_impl.masks.nm import nm_mask
from torch_impl.masks.select import demote_pruned, matrix_mask
from torch_impl.masks.select import workspace as choosing
from torch_impl.masks.sparsegpt import DAMPING_RETRIES, HESSIAN


def keep_largest(values: torch.Tensor, kept: torch.Tensor, amount: Amount) -> torch.Tensor:
    """Choose the largest |values| (out, in) among `kept`, of the whole matrix or of every m inputs; return bool (out, in)."""
    score = demote_pruned(_checks.tensor("values", values, "out", "in").abs(), kept)
    mask = nm_mask(score, *amount) if isinstance(amount, tuple) else matrix_mask(score, amount)
    return mask & kept


def refine(
    weight: torch.Tensor,
    start: torch.Tensor,
    hessian: torch.Tensor,
    support: torch.Tensor,
    steps: int = 10,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Reduce the error Tr((W − Z) H (W − Z)ᵀ) of Z, starting at `start`, on its support; conjugate gradients, row by row.

    weight, start, support: (out, in). hessian: (in, in), positive definite.
    """
    W = _checks.tensor("weight", weight, "out", "in")
    Z = _checks.tensor("start", start, "out", "in")
    _checks.same_shape("start", Z, W, "weight")
    H = _checks.square("hessian", hessian)
    pruned = ~_checks.mask("support", support, W, "weight")
    _checks.integer("steps", steps, 0)
    _checks.number("tolerance", tolerance, 0.0)
    enough = (W @ H).masked_fill_(pruned, 0.0).square_().sum(1).mul_(tolerance**2)
    R = ((W - Z) @ H).masked_fill_(pruned, 0.0)
    P, squares, Z = R.clone(), R.square().sum(1), Z.clone()
    for _ in range(steps):
        busy = squares > enough
        if not bool(busy.any()):
            break
        product = (P @ H).masked_fill_(pruned, 0.0)
        curvature = torch.where(busy, torch.linalg.vecdot(P, product), 1.0)
        a = torch.where(busy, squares / curvature, 0.0)[:, None]
        Z.addcmul_(a, P)
        R.addcmul_(a, product, value=-1.0)
        left = R.square().sum(1)
        P.mul_(torch.where(busy, left / squares, 0.0)[:, None]).add_(R)
        squares = left
    return Z


@dataclass(frozen=True)
class Problem:
    """The least-squares problem in scaled inputs: H̃ = Q Λ Qᵀ with ones on the diagonal, W̃ = W ⊙ s.

    scale: s (in,). hessian: H̃ (in, in). values, vectors: Λ (in,) and Q (in, in).
    """

    scale: torch.Tensor
    hessian: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float) -> Problem:
        """Damp, scale and decompose a Hessian (in, in), in float64; the result has the Hessian's dtype, float32 at least.

        Errors: ValueError with the damping values tried, if H is not positive definite with 1, 10 or 100 times the damping.
        """
        H = _checks.finite("hessian", _checks.square("hessian", hessian), "n", "n")
        _checks.number("damping", damping, 0.0)
        tried = []
        for factor in DAMPING_RETRIES:
            tried.append(damping * factor)
            damped = H.to(torch.float64, copy=True)
            damped.diagonal().add_(tried[-1] * damped.diagonal().mean())
            if float(damped.diagonal().min()) <= 0:
                continue
            scale = damped.diagonal().sqrt()
            damped.div_(scale).div_(scale[:, None])
            values, vectors = torch.linalg.eigh(damped)
            if float(values[0]) > 0:
                return cls(scale, damped, values, vectors).to(torch.promote_types(H.dtype, torch.float32))
        raise ValueError(f"hessian is not positive definite with damping {', '.join(f'{d:g}' for d in tried)}")

    def to(self, dtype: torch.dtype) -> Problem:
        """Convert to another dtype."""
        return Problem(*(part.to(dtype) for part in (self.scale, self.hessian, self.values, self.vectors)))

    def solve(self, right: torch.Tensor, shift: float) -> torch.Tensor:
        """Compute right (H̃ + ρI)⁻¹ for the rows of `right` (out, in) and the shift ρ."""
        return (right @ self.vectors).div_(self.values + shift) @ self.vectors.T

    def prune(
        self, search: Search, weight: torch.Tensor, amount: Amount, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prune a weight (out, in) by `search` in scaled inputs. If it has no more entries than asked for, it stays as it is."""
        W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
        size = W.shape[1]
        if len(self.scale) != size:
            shape = tuple(self.hessian.shape)
            raise ValueError(f"hessian has shape {shape}; allowed: ({size}, {size}), the weight's inputs")
        kept = torch.ones(W.shape, dtype=torch.bool, device=W.device) if kept is None else kept
        problem = self.to(W.dtype)
        scaled = W * problem.scale
        largest = keep_largest(scaled, _checks.mask("kept", kept, W, "weight"), amount)
        if not bool(scaled[~largest].any()):
            return weight.clone(), largest
        Z, support = search(problem, scaled, kept, amount)
        return Z.div_(problem.scale).to(weight.dtype), support


Search = Callable[[Problem, torch.Tensor, torch.Tensor, Amount], tuple[torch.Tensor, torch.Tensor]]
"""(problem, W̃, kept, amount) → (pruned W̃, its support)."""


def workspace(rows: int, columns: int, itemsize: int) -> int:
    """Return the peak bytes (see `Workspace`): decomposing the Hessian in float64, or the search with the result of that.

    The decomposition takes the matrix, its eigenvectors and two more for LAPACK. The search takes eight copies of the weight,
    some masks and choosing.
    """
    wide, entries = max(4, itemsize), rows * columns
    return max(33 * columns**2, 2 * wide * columns**2 + entries * (8 * wide + 6) + choosing(entries, wide))


def method(name: str, search: Search, damping: float) -> Method:
    """Make the record of a method that chooses weights and support by `search`. damping: share of mean(diag H) added to it."""

    def prune(
        weight: torch.Tensor, problem: Problem, kept: torch.Tensor, amount: Amount
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return problem.prune(search, weight, amount, kept)

    prepare = functools.partial(Problem.of, damping=damping)
    return Method(name, prune, workspace, HESSIAN, moves_weights=True, prepare=prepare)
