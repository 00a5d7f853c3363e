"""HSIC: the dependence between two representations of the same samples. Spec: reference/hsic.py."""

from __future__ import annotations

import torch

from torch_impl import _checks

# A representation is constant if centring shrinks its Gram matrix below this share: what is left is rounding.
CONSTANT = {torch.float64: 1e-13, torch.float32: 1e-5}
# Columns of half-precision features that are widened to float32 at a time, to save memory.
CHUNK = 1 << 16


def linear_gram(features: torch.Tensor) -> torch.Tensor:
    """Compute K = X Xᵀ (n, n) of features X (n, d), in float32 at least (LoSA, Section 3.1)."""
    features = _checks.tensor("features", features, "n", "d")
    first, *rest = features.split(CHUNK, dim=1)
    gram = _checks.wide(first) @ _checks.wide(first).T
    for part in rest:
        part = _checks.wide(part)
        gram.addmm_(part, part.T)
    return gram


def center(gram: torch.Tensor) -> torch.Tensor:
    """Compute K̃ = H K H (n, n), H = I − 11ᵀ/n, by subtracting row and column means (LoSA, Eq. 4)."""
    gram = _checks.wide(_checks.square("gram", gram))
    gram = gram - gram.mean(0, keepdim=True)
    return gram - gram.mean(1, keepdim=True)


def hsic(gram_x: torch.Tensor, gram_y: torch.Tensor) -> float:
    """Compute tr(K̃_x K̃_y) / (n − 1)² of two Gram matrices (n, n), n ≥ 2 (LoSA, Eq. 4)."""
    gram_x, gram_y = _pair(gram_x, gram_y)
    return float((center(gram_x) * center(gram_y).T).sum() / (len(gram_x) - 1) ** 2)


def nhsic(gram_x: torch.Tensor, gram_y: torch.Tensor) -> float:
    """Compute HSIC normalised to [0, 1]; 0 if either representation is constant (LoSA, Eq. 4)."""
    gram_x, gram_y = _pair(gram_x, gram_y)
    unit_x, unit_y = unit_grams(gram_x), unit_grams(gram_y)
    return float((unit_x * unit_y).sum().clamp(0.0, 1.0))


def unit_grams(grams: torch.Tensor) -> torch.Tensor:
    """Centre Gram matrices (..., n, n) and divide them by their norms; 0 for a constant representation."""
    grams = _checks.wide(grams)
    centred = grams - grams.mean(-2, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    norm = torch.linalg.matrix_norm(centred, keepdim=True)
    constant = norm <= CONSTANT[grams.dtype] * torch.linalg.matrix_norm(grams, keepdim=True)
    return torch.where(constant, torch.zeros((), dtype=grams.dtype, device=grams.device), centred / norm)


def _pair(gram_x: torch.Tensor, gram_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gram_x, gram_y = _checks.square("gram_x", gram_x), _checks.square("gram_y", gram_y)
    _checks.same_shape("gram_y", gram_y, gram_x, "gram_x")
    if len(gram_x) < 2:
        raise ValueError(f"gram_x has n = {len(gram_x)} samples; allowed: n = 2 or more")
    return gram_x, gram_y
