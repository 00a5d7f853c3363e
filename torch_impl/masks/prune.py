"""The registry of pruning methods, behind one call. A new method is one file in masks/ and one line in `METHODS`.

Spec: reference/masks/prune.py.
"""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks.nm import nm_mask
from torch_impl.masks.select import demote_pruned, matrix_mask, rest_sparsity, row_mask
from torch_impl.masks.sparsegpt import BLOCK_SIZE, sparsegpt, sparsegpt_nm
from torch_impl.masks.wanda import wanda_score

METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    method: str,
    weight: torch.Tensor,
    statistic: torch.Tensor | None,
    kept: torch.Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one projection further; return (weight, mask ⊆ kept), both (out, in).

    statistic: None for magnitude, `wanda.input_norm` for wanda, `sparsegpt.hessian` for sparsegpt. Give either sparsity or
    nm = (n, m).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if (sparsity is None) == (nm is None):
        raise ValueError(f"sparsity is {sparsity} and nm is {nm}; give one of the two")
    if (statistic is None) != (method == "magnitude"):
        raise ValueError(
            f"statistic is missing; {method} needs one"
            if statistic is None
            else f"statistic is given; {method} takes none"
        )
    if nm is not None:
        _checks.integer("m", nm[1], 1)
    W = _checks.finite("weight", weight, "out", "in")
    kept = _checks.mask("kept", kept, W, "weight")
    if sparsity is not None:
        sparsity = rest_sparsity(*_groups(method, kept), sparsity)

    if statistic is not None and method == "sparsegpt":
        if nm is None:
            assert sparsity is not None
            return sparsegpt(W, statistic, sparsity, kept=kept)
        return sparsegpt_nm(W, statistic, *nm, block_size=nm[1] * max(1, BLOCK_SIZE // nm[1]), kept=kept)
    score = demote_pruned(W.abs() if statistic is None else wanda_score(W, statistic), kept)
    if nm is not None:
        mask = nm_mask(score, *nm)
    else:
        assert sparsity is not None
        mask = matrix_mask(score, sparsity) if method == "magnitude" else row_mask(score, sparsity)
    mask &= kept
    return W.masked_fill(~mask, 0.0), mask


def _groups(method: str, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count (zeros, entries), each (groups,) on the CPU, of each group in which a method compares scores."""
    rows, columns = kept.shape
    if method == "wanda":
        full, size = kept.sum(1), torch.full((rows,), columns)
    elif method == "sparsegpt":
        full = torch.stack([part.sum() for part in kept.split(BLOCK_SIZE, dim=1)])
        size = rows * torch.tensor([part.shape[1] for part in kept.split(BLOCK_SIZE, dim=1)])
    else:
        full, size = kept.sum()[None], torch.tensor([kept.numel()])
    sizes = size.double()
    return sizes - full.cpu().double(), sizes
