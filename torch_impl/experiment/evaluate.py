"""Perplexity in windows that do not overlap."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from torch_impl.engine import distributed


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int) -> float:
    """exp of the mean negative log-likelihood per predicted token, in float32 at least.

    windows: token ids (n, t). The first token of a window is not predicted, so n·(t − 1) are: the convention of the
    pruning literature (GPTQ, SparseGPT, Wanda). Several processes take turns at the batches.
    """
    device = next(model.parameters()).device
    total = 0.0
    batches = windows.split(batch_size)
    rounds = range(distributed.number(), distributed.number() + len(batches), distributed.processes())
    for own in tqdm(rounds, desc="perplexity", leave=False, disable=not distributed.leads()):
        # A sharded model runs in all processes or in none: who has no batch left sees the first again.
        ids = batches[own if own < len(batches) else 0].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
        total += loss if own < len(batches) else 0.0
    total = distributed.total_of(total)
    return math.exp(min(total / (len(windows) * (windows.shape[1] - 1)), 700.0))
