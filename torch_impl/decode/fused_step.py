"""One token through the decoder blocks in eight launches a block: what is between the products is three kernels of ours.

norm · q, k, v · attention · o · norm · gate, up · SiLU · down: the projections are the model's own modules, dense or packed, and
the cache is Hugging Face's. Where all are packed in bf16 and it is faster, five launches do it (packed_step.py). Which models
compute this is found by structure, and checked against the model itself on random tokens. Nothing is compiled but the kernels,
which are few and small.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from torch_impl.decode import fused_kernels, packed_step
from torch_impl.decode import fused_operations as operations
from torch_impl.decode.fused_kernels import MOST_SHARED, Attention
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.progress import note

# The modules of a body, a block, its attention, which may norm each head's query and key too, and its MLP; no others.
BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "act_fn", "down_proj")
# Tokens of the check.
CHECKED = 4
# Relative difference between the model's own results and these: both sides round, and blocks add that up.
ALLOWED = {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}
ALLOWED_OTHERWISE = 1e-4


class FusedStep:
    """The step of one token per row over a static cache that is already in use; `in_place` makes the model take it.

    Errors: ValueError saying why the model does not compute this; `fused_kernels.ERRORS` if the kernels cannot run.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        decoder = Decoder(model)
        reason = _obstacle_in_cache(cache) or _obstacle(decoder, cache)
        if reason:
            raise ValueError(reason)
        self._body, self._cache = decoder.body, cache
        self._step = _checked_step(decoder, cache)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the model takes the fused step for one token per row, and its own for everything else."""
        before, self._body._compiled_call_impl = self._body._compiled_call_impl, self._call
        try:
            yield
        finally:
            self._body._compiled_call_impl = before

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        ids, cache = given.pop("input_ids", None), given.pop("past_key_values", None)
        one = ids is not None and ids.shape == (len(self._step.layers[0].attention.keys), 1)
        if not one or cache is not self._cache or given.pop("use_cache", True) is not True or args or given:
            return self._body._call_impl(*args, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self._step(ids), past_key_values=cache)


def fuse(model: PreTrainedModel, cache: Cache) -> FusedStep | None:
    """Return the fused step of a model over a static cache in use; if there is none, say why and return None."""
    try:
        return FusedStep(model, cache)
    except fused_kernels.ERRORS as error:
        note(f"decoding: fused kernels are not used ({_brief(error)})")
        return None


class _Layer:
    """A decoder block by its parts."""

    def __init__(self, block: Any, cache: Any, cos: torch.Tensor, sin: torch.Tensor) -> None:
        own, mlp = block.self_attn, block.mlp
        self.norms = [
            (norm.weight, norm.variance_epsilon) for norm in (block.input_layernorm, block.post_attention_layernorm)
        ]
        self.qkv, self.o = (own.q_proj, own.k_proj, own.v_proj), own.o_proj
        self.gate_up, self.down = (mlp.gate_proj, mlp.up_proj), mlp.down_proj
        heads = own.o_proj.in_features // cache.keys.shape[-1]
        norms = (own.q_norm, own.k_norm) if hasattr(own, "q_norm") else ()
        given = {"gains": tuple(norm.weight for norm in norms), "eps": norms[0].variance_epsilon} if norms else {}
        parts = (cos, sin, cache.keys, cache.values, cache.cumulative_length)
        self.attention = Attention(heads, *parts, own.scaling, **given)


class _Step:
    """The body of a model over one cache: ids (b, 1) to hidden states (b, 1, d) after the last norm."""

    def __init__(self, decoder: Decoder, cache: Any, five: bool) -> None:
        body: Any = decoder.body
        longest, weight = cache.layers[0].keys.shape[2], body.embed_tokens.weight
        positions = torch.arange(longest, device=weight.device)[None]
        # Both halves of a head turn by the same angles.
        cos, sin = (x[0, :, : x.shape[-1] // 2].contiguous() for x in body.rotary_emb(weight[:1, None], positions))
        self.layers = [
            _Layer(block, layer, cos, sin) for block, layer in zip(decoder.blocks, cache.layers, strict=True)
        ]
        self._embed, self._norm = body.embed_tokens, (body.norm.weight, body.norm.variance_epsilon)
        self._counts = [layer.attention.filled for layer in self.layers]
        self.packed = packed_step.blocks(self.layers) if five else []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        x = self._embed(ids)[:, 0]
        x, total = (packed_step.through(self.packed, x, self._norm[0]), None) if self.packed else self._by_modules(x)
        torch._foreach_add_(self._counts, 1)
        return operations.add_norm(x, total, *self._norm)[0][:, None]

    def _by_modules(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map hidden states (b, d) to what the last block adds, and what to."""
        total = None
        for layer in self.layers:
            first, second = layer.norms
            normed, total = operations.add_norm(x, total, *first)
            # Packed projections of one input share one product.
            q, k, v = (project(normed) for project in layer.qkv)
            x = layer.o(operations.attend(q, k, v, layer.attention))
            normed, total = operations.add_norm(x, total, *second)
            gate, up = (project(normed) for project in layer.gate_up)
            x = layer.down(operations.gated(gate, up))
        return x, total


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _obstacle(decoder: Decoder, cache: Any) -> str | None:
    """Return why a model's structure is not the one that is fused, or None."""
    body: Any = decoder.body
    devices = {tensor.device for tensor in (*body.parameters(), *body.buffers())}
    if len(devices) > 1:
        return "the model is on several devices"
    reason = _differs("the body", body, BODY)
    if reason:
        return reason
    rotary = str(getattr(body.rotary_emb, "rope_type", ""))
    if "dynamic" in rotary or rotary == "longrope":
        return f"rotary embedding {rotary} depends on the length of the text"
    found = map(_obstacle_in_block, decoder.blocks, cache.layers)
    return next((reason for reason in found if reason), None) or _obstacle_in_norm("the last norm", body.norm)


def _obstacle_in_block(block: Any, cache: Any) -> str | None:
    reason = _differs("a block", block, BLOCK)
    own = block.self_attn
    named = HEAD_NORMS if hasattr(own, "q_norm") else ()
    reason = reason or _differs("attention", own, ATTENTION + named) or _differs("the MLP", block.mlp, MLP)
    if reason:
        return reason
    norms = [block.input_layernorm, block.post_attention_layernorm, *(getattr(own, name) for name in named)]
    reason = next(filter(None, (_obstacle_in_norm("a block's norm", norm) for norm in norms)), None)
    if reason:
        return reason
    some = torch.linspace(-3, 3, 7)
    if not torch.allclose(block.mlp.act_fn(some), functional.silu(some)):
        return "the MLP's activation is not SiLU"
    _, groups, _, channels = cache.keys.shape
    shared = own.o_proj.in_features // channels // groups
    if any(len(norm.weight) != channels for norm in norms[2:]):
        return "attention does not norm head by head"
    return f"{shared} heads share keys; the kernel supports {MOST_SHARED}" if shared > MOST_SHARED else None


def _obstacle_in_norm(where: str, norm: Any) -> str | None:
    names = [name for name, _ in (*norm.named_parameters(), *norm.named_buffers())]
    return None if names == ["weight"] and hasattr(norm, "variance_epsilon") else f"{where} is not RMSNorm"


def _differs(where: str, module: nn.Module, names: tuple[str, ...]) -> str | None:
    found = {name for name, _ in module.named_children()}
    other, missing = sorted(found - set(names)), sorted(set(names) - found)
    if other:
        return f"{where} has {', '.join(other)}"
    return f"{where} has no {', '.join(missing)}" if missing else None


def _obstacle_in_cache(cache: Cache) -> str | None:
    if not isinstance(cache, StaticCache) or cache.offloading:
        return "the cache is not static, or offloaded"
    if any(cache.is_sliding):
        return "layers slide"
    if not cache.is_initialized:
        return "the cache is empty; give one that is in use"
    return None


def _checked_step(decoder: Decoder, cache: Any) -> _Step:
    """Return a step that computes what the model does: in five launches a block if possible, otherwise in eight."""
    five = packed_step.FIVE is not False
    step = _Step(decoder, cache, five)
    try:
        _check(decoder, cache, five)
    except fused_kernels.ERRORS as error:
        if not step.packed:
            raise
        note(f"decoding: blocks take eight launches, not five ({_brief(error)})")
        step = _Step(decoder, cache, False)
        _check(decoder, cache, False)
    return step


def _check(decoder: Decoder, cache: Any, five: bool) -> None:
    """Compare a token with the model's own, on random tokens and a small cache. Errors: ValueError if they differ."""
    body: Any = decoder.body
    weight = body.embed_tokens.weight
    shape = (len(cache.layers[0].keys), CHECKED)
    ids = torch.randint(len(weight), shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
    theirs: Any = StaticCache(config=decoder.model.config, max_cache_len=CHECKED)
    body._call_impl(input_ids=ids[:, :-1], past_key_values=theirs, use_cache=True)
    ours = copy.deepcopy(theirs)
    expected = body._call_impl(input_ids=ids[:, -1:], past_key_values=theirs, use_cache=True).last_hidden_state
    results = [(_Step(decoder, ours, five)(ids[:, -1:]), expected)]
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        results += [
            (own.keys, other.keys),
            (own.values, other.values),
            (own.cumulative_length, other.cumulative_length),
        ]
    apart = max(float((own.double() - other.double()).norm() / other.double().norm()) for own, other in results)
    allowed = ALLOWED.get(weight.dtype, ALLOWED_OTHERWISE)
    # NaN is not within it either.
    if not apart <= allowed:
        raise ValueError(f"their result differs from the model's by {apart:.1e}, allowed {allowed:.1e}")
