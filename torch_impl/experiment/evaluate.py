"""Perplexity on non-overlapping windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from torch_impl.engine import distributed, finite
from torch_impl.engine.calibration import Stream, finish
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.progress import bar

# The largest mean loss with a finite exponential in float64.
LARGEST = math.log(sys.float_info.max)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; at the end, give its modules the modes that they had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int, name: str = "the model") -> float:
    """Compute the perplexity: exp of the mean negative log-likelihood per predicted token, in float32 at least.

    windows: token ids (n, t). The first token of a window is not predicted, so there are n·(t − 1) predictions, as usual in
    the pruning literature (GPTQ, SparseGPT, Wanda). Several processes share the batches. name: of the model, for errors.

    Errors: FloatingPointError if the perplexity is not finite, with the first module whose output is not.
    """
    device = next(model.parameters()).device
    total = 0.0
    batches = windows.split(batch_size)
    rounds = range(distributed.process_index(), distributed.process_index() + len(batches), distributed.processes())
    for own in bar(rounds, "perplexity"):
        # A sharded model runs in all processes at once, so a process without a batch repeats the first one.
        ids = batches[own if own < len(batches) else 0].to(device)
        loss = _loss_sum(model(input_ids=ids, use_cache=False).logits, ids)
        if not math.isfinite(loss) and distributed.processes() == 1:
            raise finite.locate(model, ids, name)
        total += loss if own < len(batches) else 0.0
    return _perplexity(distributed.all_reduce_number(total), windows, model, name, "output of the model")


@torch.no_grad()
def window_losses(model: nn.Module, windows: torch.Tensor, batch_size: int, name: str = "the model") -> list[float]:
    """Compute the mean negative log-likelihood per predicted token of each window, as `perplexity`, in one process.

    Errors: FloatingPointError if one is not finite, or if the perplexity of all is not.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    for ids in bar(windows.to(device).split(batch_size), "perplexity"):
        losses += _losses(model(input_ids=ids, use_cache=False).logits, ids).tolist()
        if not all(map(math.isfinite, losses)):
            raise finite.locate(model, ids, name)
    _perplexity(math.fsum(losses), windows, model, name, "output of the model")
    return [loss / (windows.shape[1] - 1) for loss in losses]


@torch.no_grad()
def stream_perplexity(decoder: Decoder, windows: torch.Tensor, stream: Stream, name: str) -> float:
    """Compute the perplexity from a stream of the windows that has passed all blocks."""
    total = 0.0
    for _, rows in stream.batches():
        logits = finish(decoder, windows[rows], stream.states(rows))
        total += _loss_sum(logits, windows[rows].to(stream.device))
    return _perplexity(total, windows, decoder.model, name, "output of the model's head")


def _loss_sum(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum the loss over the predicted tokens of windows (n, t)."""
    return float(_losses(logits, ids).sum())


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sum the loss over the predicted tokens of each window (n, t), one at a time: float32 logits are large."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = [
        functional.cross_entropy(window[:-1].to(wide), row[1:], reduction="sum")
        for window, row in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses)


def _perplexity(total: float, windows: torch.Tensor, model: nn.Module, name: str, where: str) -> float:
    """Compute the perplexity from the summed loss. where: the part of the model to name if the loss is not finite."""
    dtype: Any = model.dtype
    if not math.isfinite(total):
        raise finite.NotFiniteError(where, dtype, name)
    mean = total / (len(windows) * (windows.shape[1] - 1))
    if mean >= LARGEST:
        named = str(dtype).removeprefix("torch.")
        raise FloatingPointError(f"{name}: perplexity is not finite; mean loss {mean:.4g} per token in {named}")
    return math.exp(mean)
