"""The least-squares problem behind ALPS and ADMM: reproduce a projection's outputs with few weights.

    error(Z) = Tr((W − Z) H (W − Z)ᵀ)

Legend: W (out × in) one projection's weight, Z its pruned weight, M (out × in) the support of Z, H (in × in) the Hessian of
the calibration input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.method import Amount
from reference.masks.nm import nm_mask
from reference.masks.select import demote_pruned, matrix_mask
from reference.masks.sparsegpt import DAMPING_RETRIES


def keep_largest(values: Array, kept: Mask, amount: Amount) -> Mask:
    """Choose the support: the entries of largest magnitude in the whole matrix, or the n largest of every m inputs of a row.

    Source: ALPS (NeurIPS 2024), the projection onto k weights or onto N:M.

    Parameters: values (out, in); kept bool (out, in), the entries to choose from; amount, a sparsity ρ in [0, 1] or (n, m).
    Returns: bool (out, in), a subset of kept. If fewer entries are kept than asked for, it is all of them.

    Ties: the first in row-major order is pruned first.

    *Deviation*: the published code chooses from all entries; here pruned weights stay pruned.

    >>> keep_largest([[-3, 1, 2, 0]], np.array([[True, True, False, True]]), 0.5)
    array([[ True,  True, False, False]])
    """
    score = demote_pruned(np.abs(_checks.array("values", values, "out", "in")), kept)
    mask = nm_mask(score, *amount) if isinstance(amount, tuple) else matrix_mask(score, amount)
    return mask & kept


def refine(
    weight: Array, start: Array, hessian: Array, support: Mask, steps: int = 10, tolerance: float = 1e-4
) -> Array:
    """Reduce the error of a pruned weight on its support, by conjugate gradients, each row on its own.

    Source: Hestenes & Stiefel 1952, on each row's problem restricted to its support; ALPS (NeurIPS 2024), Section 3.3.

        R = M ⊙ ((W − Z) H);   P = R;   then up to `steps` times, for each row:
          Z += a P,  a = ‖R‖² / (P H Pᵀ);   R' = R − a M ⊙ (P H);   P = R' + ‖R'‖² / ‖R‖² · P

    Parameters: weight W (out, in); start Z₀ (out, in), zero outside the support; hessian H (in, in), positive definite;
    support M bool (out, in); steps; tolerance: a row is done when ‖R‖ ≤ tolerance · ‖M ⊙ (W H)‖. Returns: Z (out, in). Its
    error is never above that of the start; after as many steps as a row has entries, it is the least possible.

    *Deviation*: the published code checks the residual of all inputs, including those outside the support.

    >>> refine([[1, 2]], [[0, 2]], [[2, 2], [2, 4]], np.array([[False, True]]))  # 4 z = (1·2 + 2·4) is solved in one step
    array([[0. , 2.5]])
    """
    W = _checks.array("weight", weight, "out", "in")
    Z = _checks.array("start", start, "out", "in")
    _checks.same_shape("start", Z, W, "weight")
    H = _checks.square("hessian", hessian)
    support = _checks.mask("support", support, W, "weight")
    _checks.integer("steps", steps, 0)
    _checks.number("tolerance", tolerance, 0.0)
    enough = tolerance**2 * (np.where(support, W @ H, 0.0) ** 2).sum(axis=1)
    R = np.where(support, (W - Z) @ H, 0.0)
    P, squares = R, (R**2).sum(axis=1)
    for _ in range(steps):
        busy = squares > enough
        if not busy.any():
            break
        product = np.where(support, P @ H, 0.0)
        curvature = np.where(busy, (P * product).sum(axis=1), 1.0)
        a = np.where(busy, squares / curvature, 0.0)[:, None]
        Z, R = Z + a * P, R - a * product
        left = (R**2).sum(axis=1)
        P = R + np.where(busy, left / np.where(busy, squares, 1.0), 0.0)[:, None] * P
        squares = left
    return Z


@dataclass(frozen=True)
class Problem:
    """The least-squares problem in scaled inputs, where every input has the same weight.

        H̃ = (H + damping) / (s sᵀ),  s = √diag(H + damping);   W̃ = W ⊙ s;   H̃ = Q Λ Qᵀ

    scale: s (in,). hessian: H̃ (in, in), ones on the diagonal. values, vectors: Λ (in,) and Q (in, in).
    """

    scale: Array
    hessian: Array
    values: Array
    vectors: Array

    @classmethod
    def of(cls, hessian: Array, damping: float) -> Problem:
        """Damp, scale and decompose a Hessian H (in, in). damping: the share of mean(diag H) added to the diagonal.

        Errors: ValueError with the damping values tried, if H is not positive definite with 1, 10 or 100 times the damping.
        """
        H = _checks.square("hessian", hessian)
        _checks.number("damping", damping, 0.0)
        tried = []
        for factor in DAMPING_RETRIES:
            tried.append(damping * factor)
            damped = H + tried[-1] * np.diag(H).mean() * np.eye(len(H))
            if np.diag(damped).min() <= 0:
                continue
            scale = np.sqrt(np.diag(damped))
            scaled = damped / np.outer(scale, scale)
            values, vectors = np.linalg.eigh(scaled)
            if values[0] > 0:
                return cls(scale, scaled, values, vectors)
        raise ValueError(f"hessian is not positive definite with damping {', '.join(f'{d:g}' for d in tried)}")

    def solve(self, right: Array, shift: float) -> Array:
        """Compute right (H̃ + ρI)⁻¹ for the rows of `right` (out, in) and the shift ρ."""
        return (right @ self.vectors) / (self.values + shift) @ self.vectors.T

    def prune(self, search: Search, weight: Array, amount: Amount, kept: Mask | None) -> tuple[Array, Mask]:
        """Prune a weight (out, in) by `search` in scaled inputs. If it has no more entries than asked for, it stays as it is."""
        W = _checks.array("weight", weight, "out", "in")
        size = W.shape[1]
        if len(self.scale) != size:
            raise ValueError(f"hessian has shape {self.hessian.shape}; allowed: ({size}, {size}), the weight's inputs")
        kept = np.ones(W.shape, dtype=bool) if kept is None else _checks.mask("kept", kept, W, "weight")
        scaled = W * self.scale
        largest = keep_largest(scaled, kept, amount)
        if not scaled[~largest].any():
            return W.copy(), largest
        Z, support = search(self, scaled, kept, amount)
        return Z / self.scale, support


Search = Callable[[Problem, Array, Mask, Amount], tuple[Array, Mask]]
"""(problem, W̃, kept, amount) → (pruned W̃, its support)."""
