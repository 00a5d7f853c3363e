"""Decode token by token with Hugging Face's models, caches, samplers and stopping criteria; on a GPU with a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from torch_impl.decode.compiled_blocks import FusedBlocks
from torch_impl.decode.fused_step import FusedStep
from torch_impl.decode.fused_step import fuse as fuse_step
from torch_impl.engine import finite
from torch_impl.engine.graphs import Captured
from torch_impl.engine.progress import note

# Tokens decoded before a graph is captured, so that all libraries and kernels are loaded.
WARM_UP = 2
KERNELS: tuple[str, ...] = ("cuda",)
"""Types of the devices on which decoding uses the kernels of fused_step.py where it can."""
Result = TypeVar("Result")


def fixed_shapes(cache: Cache | None) -> bool:
    """Return whether a cache reads and writes the same tensors on the model's device for every token."""
    # A sliding window's cache computes in Python where to write, and a graph would not repeat that.
    return isinstance(cache, StaticCache) and not any(cache.is_sliding) and not cache.offloading


def capture(work: Callable[[], Result], model: PreTrainedModel, cache: Cache, *others: Any) -> Captured[Result] | None:
    """Capture a call of the model with its cache; if that is impossible, say so and return None.

    others: what else it uses. Errors: torch.OutOfMemoryError.
    """
    module: nn.Module = model
    cached = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    try:
        return Captured(work, [*cached, *module.parameters(), *module.buffers(), *others])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        note(f"decoding: CUDA graph capture failed, so decoding is slower ({_reason(error)})")
        return None


class NextToken:
    """Compute the logits of the next token from a model and its cache.

    With a static cache on a GPU, the work is captured once in a CUDA graph and replayed for every token. Then a token takes
    as long as its kernels, not as long as Python takes to launch them. `fuse` compiles the blocks to fewer kernels, with or
    without a graph. `kernels` takes kernels of ours instead, where the model's structure allows that. If either fails, a line
    on standard error says so and the model runs without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        batch: int = 1,
        graph: bool = True,
        fuse: bool = False,
        kernels: bool | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self._model, self._cache = model, cache
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        fixed = fixed_shapes(cache)
        self.captures = graph and fixed and device.type == "cuda"
        self.fuses = fuse and fixed
        self.kernels = (device.type in KERNELS if kernels is None else kernels) and isinstance(cache, StaticCache)
        self._fused: FusedBlocks | FusedStep | None = None
        self._warm = 0
        self._graph: Captured[torch.Tensor] | None = None

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ids (b, 1) to logits (b, vocabulary). The next call may overwrite the logits."""
        self._ids.copy_(ids)
        if not self.captures or self._warm < WARM_UP:
            self._warm += 1
            return self._prepare() if self._fused is None else self._forward()
        if self._graph is None:
            self._graph = capture(self._forward, self._model, self._cache, self._ids, self._fused)
            self.captures = self._graph is not None
        return self._forward() if self._graph is None else self._graph.replay()

    def _prepare(self) -> torch.Tensor:
        """Fuse or compile the blocks and call them; while the cache is empty, call the model as it is."""
        if not self._cache.is_initialized:
            return self._forward()
        if self.kernels:
            self._fused = fuse_step(self._model, self._cache)
            self.kernels = self._fused is not None
        return self._compile() if self.fuses and self._fused is None else self._forward()

    def _compile(self) -> torch.Tensor:
        # Compilation may fail after some blocks have already counted the token in the cache.
        counted = [(tensor, tensor.clone()) for layer in self._cache.layers for tensor in _counters(layer)]
        try:
            with warnings.catch_warnings():
                # torch's warnings while compiling concern the author of the model.
                warnings.simplefilter("ignore")
                self._fused = FusedBlocks(self._model, self._cache)  # type: ignore[arg-type]
                return self._forward()
        except (RuntimeError, ValueError) as error:
            note(f"decoding: compilation failed, so decoding is slower ({_reason(error)})")
        self.fuses, self._fused = False, None
        for tensor, earlier in counted:
            tensor.copy_(earlier)
        return self._forward()

    def _forward(self) -> torch.Tensor:
        with self._fused.in_place() if self._fused else nullcontext():
            logits: torch.Tensor = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True).logits
        return logits[:, -1]


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _counters(layer: Any) -> list[torch.Tensor]:
    """Return the tensors of a cache layer besides keys and values: its token counts."""
    return [t for name, t in vars(layer).items() if isinstance(t, torch.Tensor) and name not in ("keys", "values")]


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    past_key_values: Cache,
    streamer: BaseStreamer,
    fuse: bool = False,
    **_: Any,
) -> torch.Tensor:
    """Run the loop of `model.generate(..., custom_generate=decode)` for prompts (b, n) without padding.

    Returns prompt and new ids. Rows that end early are padded. From the same logits, it samples the same tokens as
    `generate`. fuse: use compiled blocks, whose sums may round differently.

    Errors: finite.NotFiniteError if logits are not finite, before sampling from them.
    """
    streamer.put(input_ids.cpu())
    following = NextToken(model, past_key_values, len(input_ids), fuse=fuse)
    ids = input_ids
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    logits = model(input_ids=ids, past_key_values=past_key_values, use_cache=True, logits_to_keep=1).logits[:, -1]
    while True:
        # The maximum is not finite if any logit is NaN or infinity. Minus infinity is valid: it rules a token out.
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise finite.locate(model, ids)
        scores = logits_processor(ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        draws = generation_config.do_sample
        token = torch.multinomial(scores.softmax(-1), 1) if draws else scores.argmax(-1, keepdim=True)
        if len(ids) > 1:
            padding: Any = generation_config._pad_token_tensor
            token = torch.where(ended[:, None], padding, token)
        ids = torch.cat([ids, token], 1)
        streamer.put(token.flatten().cpu())
        # A criterion checks the last token only.
        ended |= stopping_criteria(ids, scores)  # type: ignore[arg-type]
        if bool(ended.all()):
            streamer.end()
            return ids
        logits = following(token)
