"""The registry of pruning methods, behind one call. A new method is one file in masks/ and its record in `METHODS`.

Spec: reference/masks/prune.py.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_impl import _checks
from torch_impl.masks import admm, alps, magnitude, pruner_zero, sparsegpt, taylor, wanda
from torch_impl.masks.method import Method

METHODS = {
    method.name: method
    for method in (
        magnitude.METHOD,
        wanda.METHOD,
        sparsegpt.METHOD,
        alps.METHOD,
        admm.METHOD,
        pruner_zero.METHOD,
        taylor.METHOD,
    )
}


def prune(
    method: str,
    weight: torch.Tensor,
    statistic: torch.Tensor | None,
    kept: torch.Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one projection further; return (weight, mask ⊆ kept), both (out, in).

    statistic: of the calibration input, as the method's record makes it. Give either sparsity or nm = (n, m).
    """
    if (found := METHODS.get(method)) is None:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if (statistic is None) != (found.statistic is None):
        raise ValueError(
            f"statistic is missing; {method} needs one"
            if statistic is None
            else f"statistic is given; {method} takes none"
        )
    return prune_prepared(found, weight, found.prepare(statistic), kept, sparsity, nm)


def prune_prepared(
    method: Method,
    weight: torch.Tensor,
    prepared: Any,
    kept: torch.Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune as `prune` does, with a statistic that `method.prepare` has prepared for all projections of one input."""
    if (sparsity is None) == (nm is None):
        raise ValueError(f"sparsity is {sparsity} and nm is {nm}; give one of the two")
    if nm is not None:
        _checks.integer("m", nm[1], 1)
    W = _checks.finite("weight", weight, "out", "in")
    kept = _checks.mask("kept", kept, W, "weight")
    amount = sparsity if nm is None else (nm[0], nm[1])
    assert amount is not None
    return method.prune(W, prepared, kept, amount)
