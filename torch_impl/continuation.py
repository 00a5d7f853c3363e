"""Continue token ids by what a model predicts. Spec: reference/continuation.py; with a model: experiment/text/written.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch_impl import _checks


def next_token(logits: torch.Tensor, uniforms: torch.Tensor, excluded: Sequence[int] = ()) -> torch.Tensor:
    """Draw a token (n,) for each row of logits (n, v): min { j : p_0 + … + p_j > u }, p = softmax without `excluded`.

    Computed in float64, so that rounding does not shift the distribution of a large vocabulary.
    """
    _checks.finite("logits", logits, "n", "v")
    _checks.tensor("uniforms", uniforms, "n")
    low, high = uniforms.min(), uniforms.max()
    if len(uniforms) != len(logits) or low < 0 or high >= 1:
        raise ValueError(f"uniforms has {len(uniforms)} entries of {low} to {high}; allowed: {len(logits)} in [0, 1)")
    out = sorted({_checks.integer("excluded", token, 0, logits.shape[1] - 1) for token in excluded})
    if len(out) == logits.shape[1]:
        raise ValueError(f"excluded has all {len(out)} tokens; allowed: fewer")
    p = logits.double().index_fill(1, torch.tensor(out, dtype=torch.int64, device=logits.device), -torch.inf).softmax(1)
    sums = p.cumsum(1)
    first = torch.searchsorted(sums, uniforms.double().to(sums.device)[:, None].contiguous(), right=True)[:, 0]
    last = next(token for token in reversed(range(logits.shape[1])) if token not in out)
    return first.clamp_max(last)


def continue_text(
    predict: Callable[[torch.Tensor], torch.Tensor],
    prompts: torch.Tensor,
    uniforms: torch.Tensor,
    excluded: Sequence[int] = (),
) -> torch.Tensor:
    """Continue prompts (n, t) by k tokens, with uniforms (n, k). predict: ids (n, t) → logits (n, v) of the next token."""
    kind = prompts.dtype if isinstance(prompts, torch.Tensor) else type(prompts).__name__
    if not isinstance(prompts, torch.Tensor) or prompts.is_floating_point() or prompts.dtype == torch.bool:
        raise TypeError(f"prompts has dtype {kind}; allowed: an integer dtype")
    _checks.tensor("uniforms", uniforms, "n", "k", empty=True)
    if prompts.dim() != 2 or len(prompts) != len(uniforms):
        raise ValueError(
            f"prompts has shape {tuple(prompts.shape)}; allowed: ({len(uniforms)}, t), a row for each of uniforms"
        )
    ids = prompts.long()
    for column in uniforms.unbind(1):
        token = next_token(predict(ids), column, excluded)
        ids = torch.cat([ids, token[:, None]], 1)
    return ids
