"""Calibration sequences that the dense model writes itself. Spec: reference/continuation.py."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from torch_impl import continuation
from torch_impl.decode.next_token import NextToken
from torch_impl.engine import distributed
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.progress import bar, note
from torch_impl.experiment.evaluate import eval_mode

PROMPT = 32
"""Tokens of the calibration text at the start of each sequence, at most half of it."""
AT_ONCE = 128
WRITTEN = "written_calibration.safetensors"
"""The file of a run's folder that keeps the sequences."""


def with_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: torch.Tensor,
    count: int,
    seed: int,
    kept: Path | None = None,
) -> torch.Tensor:
    """Return the calibration windows (n, t) and, after them, `count` sequences of t tokens that the model writes.

    kept: a file to keep them in; if it holds those of the same windows, they are not written again. A model samples other
    tokens when its sums round differently, so a resumed run could not go on with new ones.
    """
    if not count:
        return windows
    check_can_write(count, distributed.processes())
    if kept is None:
        return torch.cat([windows, written_windows(model, tokenizer, windows, count, seed)])
    key = f"{hashlib.sha256(windows.numpy().tobytes()).hexdigest()}.{count}.{seed}"
    found = load_file(kept) if kept.exists() else {}
    if key not in found:
        note(f"the model writes {count:,} calibration sequences of {windows.shape[1]:,} tokens")
        found = {key: written_windows(model, tokenizer, windows, count, seed).int()}
        # Whole or not at all: a run may be interrupted here, and another process may write the same.
        save_tensors(found, beside := kept.with_suffix(f".{os.getpid()}.part"))
        beside.replace(kept)
    return torch.cat([windows, found[key].long()])


def check_can_write(count: int, processes: int) -> None:
    """Check that the model is in one process. Errors: ValueError naming written_per_sample."""
    if count and processes > 1:
        raise ValueError(
            f"written_per_sample is above 0, and the model is spread over {processes} processes; use --written_per_sample 0 and "
            "more text (--nsamples), or one process"
        )


@torch.no_grad()
def written_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, windows: torch.Tensor, count: int, seed: int
) -> torch.Tensor:
    """Let the model continue pieces of calibration windows (n, t) at temperature 1; return token ids (count, t).

    Each sequence begins with the begin-of-text token and up to `PROMPT` tokens of a window; no token that begins or ends a text
    is drawn. The batch is halved if the device runs out of memory.
    """
    generator = np.random.default_rng((seed, 1))
    length = windows.shape[1]
    prompts = _prompts(tokenizer, windows, count, generator)
    uniforms = torch.from_numpy(generator.random((count, length - prompts.shape[1])))
    excluded = _special(model, tokenizer)
    device = model.device

    def attempt(size: int) -> torch.Tensor:
        parts = list(zip(prompts.split(size), uniforms.split(size), strict=True))
        ticks = iter(bar(range(len(parts) * uniforms.shape[1]), "write text"))
        rows = [
            continuation.continue_text(_Predict(model, length, ticks), some.to(device), draws, excluded).cpu()
            for some, draws in parts
        ]
        return torch.cat(rows)

    with eval_mode(model):
        return find_executable_batch_size(attempt, min(AT_ONCE, count), "sequences to write at once")[0]


def _prompts(
    tokenizer: PreTrainedTokenizerBase | None, windows: torch.Tensor, count: int, generator: np.random.Generator
) -> torch.Tensor:
    """Cut a piece out of each window in turn, at a random place."""
    length = windows.shape[1]
    begin = None if tokenizer is None else tokenizer.bos_token_id
    size = min(PROMPT, length // 2)
    starts = torch.from_numpy(generator.integers(0, length - size + 1, count))
    rows = torch.arange(count) % len(windows)
    pieces = windows[rows[:, None], starts[:, None] + torch.arange(size)]
    if begin is None or size + 1 >= length:
        return pieces
    return torch.cat([torch.full((count, 1), begin), pieces], 1)


def _special(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids that never occur within a text."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found: list[int] = [] if tokenizer is None else list(tokenizer.all_special_ids)
    for value in (getattr(part, name, None) for part in (model.config, model.generation_config) for name in names):
        found += value if isinstance(value, list) else [] if value is None else [value]
    # A tokenizer may know tokens that the model has no row for.
    rows = model.get_output_embeddings().weight.shape[0]
    return sorted({token for token in found if 0 <= token < rows})


class _Predict:
    """Predicts the token after some ids; each call has one more than the last."""

    def __init__(self, model: PreTrainedModel, length: int, ticks: Iterator[int]) -> None:
        self._model, self._length, self._ticks = model, length, ticks
        self._following: NextToken | None = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (n, v) for ids (n, t)."""
        next(self._ticks, None)
        if self._following is not None:
            return self._following(ids[:, -1:])
        cache = StaticCache(config=self._model.config, max_cache_len=self._length)
        self._following = NextToken(self._model, cache, len(ids))
        found = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return found.clone()
