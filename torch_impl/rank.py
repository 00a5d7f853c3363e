"""Measure reconstruction errors, allocate ranks, resize adapters. Spec: reference/rank.py."""

from __future__ import annotations

import torch

from torch_impl import _checks


def reconstruction_error(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Compute e of LoSA, Eq. 6, from a block's outputs (tokens, hidden) in the dense and in the pruned model."""
    D, S = _checks.tensor("dense", dense, "tokens", "hidden"), _checks.tensor("sparse", sparse, "tokens", "hidden")
    _checks.same_shape("sparse", S, D, "dense")
    D, S = _checks.wide(D), _checks.wide(S)
    return float(error_of_sums((D - S).square().sum(0), D.square().sum(0)))


def error_of_sums(difference: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Average Σ(D−S)² / ΣD² over channels, given both sums (hidden,). A channel with ΣD² = 0 counts 0 or 1, as in the spec."""
    silent = energy == 0
    return torch.where(silent, (difference > 0).to(energy.dtype), difference / energy.masked_fill(silent, 1.0)).mean()


def allocate_ranks(errors: torch.Tensor, mean_rank: float, min_rank: int = 1, max_rank: int = 16) -> torch.Tensor:
    """Allocate ranks (L,) int64 in proportion to errors (L,), within bounds, Σ = rint(L · mean_rank) (LoSA, Eq. 7)."""
    errors = _checks.finite("errors", errors, "L").double()
    if float(errors.min()) < 0:
        raise ValueError(f"errors holds {float(errors.min())}; allowed: 0 or more")
    _checks.integer("min_rank", min_rank, 0)
    _checks.integer("max_rank", max_rank, min_rank)
    _checks.number("mean_rank", mean_rank, min_rank, max_rank)
    L = len(errors)
    total = round(L * mean_rank)
    peak = errors.max()
    shares = (errors / peak) / (errors / peak).sum() if float(peak) > 0 else torch.full_like(errors, 1 / L)
    ranks = torch.round(shares * L * mean_rank, decimals=9).round().clamp(min_rank, max_rank).long()
    while (left := total - int(ranks.sum())) != 0:
        # One pass: each of the next `left` blocks with room changes by one.
        order = torch.sort(errors, stable=True, descending=left > 0).indices
        has_room = (ranks[order] < max_rank) if left > 0 else (ranks[order] > min_rank)
        ranks[order[has_room][: abs(left)]] += 1 if left > 0 else -1
    return ranks


def resize_adapter(
    A: torch.Tensor, B: torch.Tensor, rank: int, new_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change the rank of A (r, in) and B (out, r): grow by `new_rows` and zero columns, or drop the last ranks."""
    _adapter(A, B)
    _checks.integer("rank", rank, 0)
    r = len(A)
    if rank <= r:
        return A[:rank].clone(), B[:, :rank].clone()
    if new_rows is None:
        raise ValueError(f"new_rows is None; growing from rank {r} to {rank} needs {rank - r} or more rows")
    _checks.tensor("new_rows", new_rows, "rows", "in")
    if len(new_rows) < rank - r or new_rows.shape[1] != A.shape[1]:
        raise ValueError(f"new_rows has shape {tuple(new_rows.shape)}; allowed: ({rank - r} or more, {A.shape[1]})")
    return torch.cat([A, new_rows[: rank - r].to(A)]), torch.cat([B, B.new_zeros(len(B), rank - r)], dim=1)


def fold_adapter(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Add the masked product of the ranks from `rank` on to the weight (out, in); round to the weight's dtype."""
    weight = _checks.tensor("weight", weight, "out", "in")
    _adapter(A, B)
    if (len(B), A.shape[1]) != weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed: ({len(B)}, {A.shape[1]}), the shape of B A")
    _checks.integer("rank", rank, 0, len(A))
    _checks.number("scale", scale)
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    folded = torch.addmm(weight.to(wide), B[:, rank:].to(wide), A[rank:].to(wide), alpha=scale)
    return folded.masked_fill_(weight == 0, 0.0).to(weight.dtype)


def _adapter(A: torch.Tensor, B: torch.Tensor) -> None:
    _checks.tensor("A", A, "r", "in", empty=True)
    _checks.tensor("B", B, "out", "r", empty=True)
    if len(A) != B.shape[1]:
        raise ValueError(f"B has shape {tuple(B.shape)}; allowed: (out, {len(A)}), the rank of A")
