"""Losses over a large vocabulary, a few rows at a time, so that not all logits are widened to float32 at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

# Logits that are widened at once: in float32 they fit in the cache of a large GPU.
AT_ONCE = 2**22


class _SummedCrossEntropy(torch.autograd.Function):
    """Saves the logits in their own dtype and widens them again in backward; the gradient is rounded once."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignored, ctx.wide = ignored, torch.promote_types(logits.dtype, torch.float32)
        parts = [
            functional.nll_loss(rows.log_softmax(-1, ctx.wide), wanted, ignore_index=ignored, reduction="sum")
            for rows, wanted in zip(*_split(logits, targets), strict=True)
        ]
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows, wanted, to in zip(*_split(logits, targets, result), strict=True):
            # softmax(logits) minus 1 at the target, for rows that count.
            change = rows.softmax(-1, ctx.wide)
            counts = (wanted != ctx.ignored)[:, None]
            place = wanted[:, None].masked_fill(~counts, 0)
            change.scatter_(1, place, change.gather(1, place) - 1)
            to.copy_(change.mul_(grads[0] * counts))
        return result, None, None


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, ignored: int) -> torch.Tensor:
    """Compute Σ −log softmax(logits)[target] over the rows, () in float32 at least.

    logits (n, vocabulary) in any dtype; targets (n,), class numbers, or `ignored` to skip a row.
    """
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits, targets, ignored)
    return loss


class _SummedDivergence(torch.autograd.Function):
    """Saves both models' logits in their own dtype and widens them again in backward; the gradient is rounded once."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, teacher, counts)
        ctx.wide = torch.promote_types(logits.dtype, torch.float32)
        parts = []
        for rows, goal, counted in zip(*_split(logits, teacher, counts), strict=True):
            wanted = goal.log_softmax(-1, ctx.wide)
            apart = wanted - rows.log_softmax(-1, ctx.wide)
            parts.append(apart.mul_(wanted.exp_()).sum(-1).masked_fill(~counted, 0.0).sum())
        return torch.stack(parts).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, teacher, counts = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows, goal, counted, to in zip(*_split(logits, teacher, counts, result), strict=True):
            # softmax(logits) minus the teacher's, for rows that count.
            change = rows.softmax(-1, ctx.wide).sub_(goal.softmax(-1, ctx.wide))
            to.copy_(change.mul_(grads[0] * counted[:, None]))
        return result, None, None


def summed_divergence(logits: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Compute Σ KL(softmax(teacher) ‖ softmax(logits)) over the rows with `counts`, () in float32 at least.

    logits, teacher (n, vocabulary) in any dtype; counts (n,) bool. Only logits get a gradient.
    """
    divergence: torch.Tensor = _SummedDivergence.apply(logits, teacher, counts)
    return divergence


def _split(logits: torch.Tensor, *others: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    rows = max(1, AT_ONCE // logits.shape[1])
    return [tensor.split(rows) for tensor in (logits, *others)]
