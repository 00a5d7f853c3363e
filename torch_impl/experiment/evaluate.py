"""Perplexity in windows that do not overlap."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int) -> float:
    """exp of the mean negative log-likelihood per predicted token, in float32 at least.

    windows: token ids (n, t). The first token of a window is not predicted, so n·(t − 1) are: the convention of the
    pruning literature (GPTQ, SparseGPT, Wanda).
    """
    device = next(model.parameters()).device
    total = 0.0
    for ids in tqdm(windows.split(batch_size), desc="perplexity", leave=False):
        ids = ids.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(min(total / (len(windows) * (windows.shape[1] - 1)), 700.0))
