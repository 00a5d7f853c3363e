"""Wanda: score each weight by its magnitude times the norm of its input. Spec: reference/masks/wanda.py."""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.method import InputStatistic, Method
from torch_impl.masks.select import row_mask


def input_norm(inputs: torch.Tensor) -> torch.Tensor:
    """Compute ‖X_j‖₂ (in,) of calibration inputs X (tokens, in), in float32 at least (Wanda, Eq. 1)."""
    X = _checks.tensor("inputs", inputs, "tokens", "in")
    return torch.linalg.vector_norm(X, dim=0, dtype=torch.promote_types(X.dtype, torch.float32))


def wanda_score(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """Compute |W_ij| · ‖X_j‖₂ (out, in), in float32 at least (Wanda, Eq. 1)."""
    weight = _checks.finite("weight", weight, "out", "in")
    norm = _checks.wide(_checks.finite("input_norm", input_norm, "in"))
    if len(norm) != weight.shape[1] or float(norm.min()) < 0:
        raise ValueError(
            f"input_norm has shape {tuple(norm.shape)} and minimum {float(norm.min())}; "
            f"allowed: ({weight.shape[1]},), 0 or more"
        )
    return weight.abs() * norm


def wanda_mask(weight: torch.Tensor, input_norm: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Prune the lowest Wanda scores of each row; return bool (out, in), True = kept (Wanda, Algorithm 1)."""
    return row_mask(wanda_score(weight, input_norm), sparsity)


INPUT_NORM = InputStatistic(
    part=lambda inputs, samples: input_norm(inputs).square(), finish=torch.sqrt, entries=lambda inputs: inputs
)
METHOD = Method.by_score("wanda", wanda_score, INPUT_NORM)
