"""SoRA's gated adapter as pure functions. Spec: reference/sora.py; its training: experiment/baselines/sora.py."""

from __future__ import annotations

import torch
from torch.nn import functional

from torch_impl import _checks


def gated_lora(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute Δ = s·(g ⊙ xAᵀ)Bᵀ for x (..., in), in the adapter's dtype; differentiable."""
    _checks.tensor("x", x, "...", "in", empty=True)
    _checks.tensor("A", A, "r", "in", empty=True)
    _checks.tensor("B", B, "out", "r", empty=True)
    _checks.tensor("gate", gate, "r", empty=True)
    _checks.number("scale", scale)
    if A.shape != (len(gate), x.shape[-1]):
        raise ValueError(f"A has shape {tuple(A.shape)}; allowed: {(len(gate), x.shape[-1])}")
    if B.shape[1] != len(gate):
        raise ValueError(f"B has shape {tuple(B.shape)}; allowed: (out, {len(gate)})")
    return functional.linear(functional.linear(x.to(A.dtype), A) * gate, B) * scale


def soft_threshold(values: torch.Tensor, amount: float) -> torch.Tensor:
    """Compute sign(v)·max(|v| − amount, 0) of values (n,)."""
    _checks.tensor("values", values, "n", empty=True)
    _checks.number("amount", amount, 0)
    return values.sign() * (values.abs() - amount).clamp_min(0)
