"""The registry of pruning methods, behind one call. A new method is one file in masks/ and its record in `METHODS`.

Spec: reference/masks/prune.py.
"""

from __future__ import annotations

import torch

from torch_impl import _checks
from torch_impl.masks import magnitude, sparsegpt, wanda

METHODS = {method.name: method for method in (magnitude.METHOD, wanda.METHOD, sparsegpt.METHOD)}


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
    if (sparsity is None) == (nm is None):
        raise ValueError(f"sparsity is {sparsity} and nm is {nm}; give one of the two")
    if (statistic is None) != (found.statistic is None):
        raise ValueError(
            f"statistic is missing; {method} needs one"
            if statistic is None
            else f"statistic is given; {method} takes none"
        )
    if nm is not None:
        _checks.integer("m", nm[1], 1)
    W = _checks.finite("weight", weight, "out", "in")
    kept = _checks.mask("kept", kept, W, "weight")
    amount = sparsity if nm is None else (nm[0], nm[1])
    assert amount is not None
    return found.prune(W, statistic, kept, amount)
