"""Decoding token by token on Hugging Face's models, caches, samplers and stopping rules; on a GPU a token is one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import BaseStreamer

# Tokens launched kernel by kernel before one is captured: libraries and kernels are loaded by then.
WARM_UP = 2


class NextToken:
    """Logits of the token after the one given, by a model and the cache of what it has seen.

    With a static cache on a GPU the work is captured once and replayed for every token: it then takes as long as its
    kernels, not as long as Python takes to launch them.
    """

    def __init__(self, model: nn.Module, cache: Cache, batch: int = 1, graph: bool = True) -> None:
        device = next(model.parameters()).device
        self._model, self._cache = model, cache
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        # A sliding window's cache decides in Python where to write, which a graph would not do again.
        fixed = isinstance(cache, StaticCache) and not any(cache.is_sliding)
        self.captures = graph and fixed and device.type == "cuda"
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (b, 1) → logits (b, vocabulary), which the next call may overwrite."""
        self._ids.copy_(ids)
        if not self.captures or self._warm < WARM_UP:
            self._warm += 1
            return self._forward()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _forward(self) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True).logits
        return logits[:, -1]


def decode(
    model: nn.Module,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    past_key_values: Cache,
    streamer: BaseStreamer,
    **_: Any,
) -> torch.Tensor:
    """The loop of `model.generate(..., custom_generate=decode)` for prompts (b, n) without padding: prompt and new ids.

    Draws what `generate` itself would draw from the same logits.
    """
    streamer.put(input_ids.cpu())
    following = NextToken(model, past_key_values, len(input_ids))
    ids = input_ids
    logits = model(input_ids=ids, past_key_values=past_key_values, use_cache=True, logits_to_keep=1).logits[:, -1]
    while True:
        scores = logits_processor(ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        draws = generation_config.do_sample
        token = torch.multinomial(scores.softmax(-1), 1) if draws else scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        streamer.put(token.flatten().cpu())
        if bool(stopping_criteria(ids, scores).all()):
            streamer.end()
            return ids
        logits = following(token)
