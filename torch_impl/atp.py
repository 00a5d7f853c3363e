"""ATP: rates in arithmetic progression over the depth, the first block the least sparse. Spec: reference/atp.py."""

from __future__ import annotations

import torch

from torch_impl import _checks


def progression(target: float, blocks: int, step: float) -> torch.Tensor:
    """Compute rates ρ_l = s + β (l − (L − 1) / 2), float64 (L,)."""
    _checks.number("target", target, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    _checks.number("step", step, 0.0, largest_step(target, blocks) * (1 + 1e-9))
    rates = target + step * (torch.arange(blocks, dtype=torch.float64) - (blocks - 1) / 2)
    return rates.clamp(0.0, 1.0)


def largest_step(target: float, blocks: int) -> float:
    """Compute the largest β with which all rates are from 0 to 1: min(2s, 2(1 − s)) / (L − 1); 0 for one block."""
    _checks.number("target", target, 0.0, 1.0)
    _checks.integer("blocks", blocks, 1)
    return 2 * min(target, 1 - target) / max(1, blocks - 1)


def candidate_steps(target: float, blocks: int, count: int = 9) -> torch.Tensor:
    """List the values of β to try, float64 (count,): evenly spaced from 0 to the largest."""
    _checks.integer("count", count, 2)
    return torch.arange(count, dtype=torch.float64) / (count - 1) * largest_step(target, blocks)
