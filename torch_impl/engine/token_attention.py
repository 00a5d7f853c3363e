"""Attention of one new token over a static cache, written so that torch.compile makes few kernels that fill the GPU.

PyTorch's own kernels for it take the mask as numbers to add, copy keys and values where heads share them, and give a head
to one processor each. Here scores, softmax and the sum over values are plain sums, spread over all keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "losa_one_token"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What `sdpa` gives for query (b, heads, 1, d), key and value (b, shared heads, n, d): (b, 1, heads, d), sums in float32.

    attention_mask: (b or 1, 1, 1, n), True where the token looks, or None for everywhere. Errors: ValueError for what `sdpa`
    knows and this does not.
    """
    for name in ("softcap", "position_bias", "s_aux"):
        if others.get(name) is not None:
            raise ValueError(f"attention has {name}; allowed: none")
    batch, heads, tokens, width = query.shape
    if tokens != 1:
        raise ValueError(f"query has {tokens} tokens; allowed: 1")
    shared = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    # (b, shared heads, heads that share one, 1, d) meets (b, shared heads, 1, n, d).
    grouped = query.view(batch, shared, heads // shared, 1, width).float() * scale
    scores = (grouped * key[:, :, None].float()).sum(-1)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask.view(-1, 1, 1, key.shape[2]), float("-inf"))
    weights = scores.softmax(-1)
    y = (weights[..., None] * value[:, :, None].float()).sum(-2)
    return y.to(query.dtype).view(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
