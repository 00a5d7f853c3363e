"""The masked low-rank adapter as pure functions. Spec: reference/adapter.py; the layer that trains: engine/adapted_linear.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torch_impl import _checks, _kernels


def effective_weight(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute M⊙(W + s·BA), M = W ≠ 0, (out, in), in float32 at least (LoSA, Eq. 1)."""
    _operands(weight, A, B, scale)
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scale).masked_fill_(weight == 0, 0.0)


def merge(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute the effective weight, rounded once to the weight's dtype."""
    _operands(weight, A, B, scale)
    if _kernels.usable(weight, A, B) and len(A) and A.dtype == torch.float32:
        return _kernels.merge(weight, A, B, scale)
    return effective_weight(weight, A, B, scale).to(weight.dtype)


def merge_into(merged: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> None:
    """Merge into an existing tensor (out, in), so that its address stays the same."""
    _operands(weight, A, B, scale)
    if _kernels.usable(weight, A, B) and len(A) and A.dtype == torch.float32:
        _kernels.merge(weight, A, B, scale, merged)
    else:
        merged.copy_(merge(weight, A, B, scale))


def masked_lora(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute y = x W̃ᵀ for x (..., in), in x's dtype; W̃ is rounded to the weight's dtype first (LoSA, Eq. 1)."""
    effective = merge(weight, A, B, scale)
    _input(x, weight)
    return x @ effective.T.to(x.dtype)


def masked_lora_grad(
    x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, grad_y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute (dx (..., in), dA (r, in), dB (out, r)) from dy (..., out): the derivative of LoSA, Eq. 1."""
    effective = merge(weight, A, B, scale)
    _input(x, weight)
    _checks.tensor("grad_y", grad_y, "...", "out", empty=True)
    if grad_y.shape != (*x.shape[:-1], len(weight)):
        raise ValueError(f"grad_y has shape {tuple(grad_y.shape)}; allowed: {(*x.shape[:-1], len(weight))}")
    dy = grad_y.reshape(-1, weight.shape[0])
    dx = (dy @ effective.to(dy.dtype)).view_as(x)
    return dx, *contract_gradient(dy.T @ x.reshape(-1, weight.shape[1]), weight, A, B, scale)


def contract_gradient(
    G: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (dA (r, in), dB (out, r)) = (s Bᵀ(M⊙G), s (M⊙G)Aᵀ) from G = dyᵀx (out, in). G is overwritten."""
    if _kernels.usable(G, weight, A, B) and len(A) and A.dtype == torch.float32:
        return _kernels.contract(G, weight, A, B, scale)
    masked = G.masked_fill_(weight == 0, 0.0).to(A.dtype)
    return (B.T @ masked).mul_(scale), (masked @ A.T).mul_(scale)


def initial_rows(count: int, in_features: int, seed: Sequence[int]) -> torch.Tensor:
    """Sample new rows of A (count, in) from U(−1/√in, 1/√in), float64 on the CPU, by NumPy: the same on every machine."""
    _checks.integer("count", count, 0)
    _checks.integer("in_features", in_features, 1)
    for part in seed:
        _checks.integer("seed", part, 0)
    bound = 1 / np.sqrt(in_features)
    return torch.from_numpy(np.random.default_rng(list(seed)).uniform(-bound, bound, (count, in_features)))


def rebase(weight: torch.Tensor, merged: torch.Tensor, updated: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute M'⊙(W + (updated − merged)), the base weight after pruning; all (out, in), in the weight's dtype."""
    weight = _checks.tensor("weight", weight, "out", "in")
    for name, value in (("merged", merged), ("updated", updated)):
        _checks.same_shape(name, _checks.tensor(name, value, "out", "in"), weight, "weight")
    _checks.mask("mask", mask, weight, "weight")
    change = _checks.wide(updated) - _checks.wide(merged)
    return change.add_(weight).masked_fill_(~mask, 0.0).to(weight.dtype)


def _operands(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> None:
    _checks.tensor("weight", weight, "out", "in")
    _checks.tensor("A", A, "r", "in", empty=True)
    _checks.tensor("B", B, "out", "r", empty=True)
    if A.shape[1] != weight.shape[1]:
        raise ValueError(f"A has shape {tuple(A.shape)}; allowed: (r, {weight.shape[1]})")
    if B.shape != (len(weight), len(A)):
        raise ValueError(f"B has shape {tuple(B.shape)}; allowed: ({len(weight)}, {len(A)})")
    _checks.number("scale", scale)


def _input(x: torch.Tensor, weight: torch.Tensor) -> None:
    _checks.tensor("x", x, "...", "in", empty=True)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., {weight.shape[1]})")
