"""Let Hugging Face's `generate` replay each token of a packed model as a CUDA graph, where it would compile a plain model.

With `cache_implementation="static"` on a GPU, `generate` asks the model for a compiled call. For a packed model that is
`CapturedCall`: ready after a few tokens instead of a minute, and with the same kernels as the uncompiled model, or with those of
fused_step.py.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from torch_impl.decode import next_token
from torch_impl.decode.fused_step import FusedStep, fuse
from torch_impl.decode.next_token import WARM_UP, capture, fixed_shapes
from torch_impl.engine.graphs import Captured

# What a model returns beside logits if asked.
KEPT = ("output_attentions", "output_hidden_states", "output_router_logits")
# What says which cached tokens a token sees, and where it is; without padding that is every token, and behind them.
PLACES = ("attention_mask", "position_ids")
Path = tuple[str, ...]


def capture_in_generate(model: PreTrainedModel) -> None:
    """Make `model.generate(..., cache_implementation="static")` capture a token on a GPU; a `compile_config` still compiles."""
    model.get_compiled_call = functools.partial(_call, model)  # type: ignore[method-assign]


def _call(model: PreTrainedModel, compile_config: CompileConfig | None = None) -> Any:
    if compile_config is not None:
        return type(model).get_compiled_call(model, compile_config)
    return CapturedCall(model)


class CapturedCall:
    """The call of a model with the tokens of one `generate`. Calls for one token per row become a graph; others run as they are.

    The next call may overwrite the logits, which `generate` copies.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._kind: Any = None
        self._seen = 0
        self._inputs: dict[Path, torch.Tensor] = {}
        self._graph: Captured[Any] | None = None
        self._fused: FusedStep | None = None
        module: nn.Module = model
        self._devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        self._captures = len(self._devices) == 1 and model.device.type == "cuda"

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """Call the model with keyword arguments; return its output."""
        kind = self._kind_of(inputs) if self._captures else None
        if kind is None:
            return self._model(**inputs)
        if kind != self._kind:
            # Another cache or other shapes: the earlier graph is of no more use.
            self._kind, self._seen, self._graph, self._fused = kind, 0, None, None
            if self._model.device.type in next_token.KERNELS and _sees_all(inputs):
                self._fused = fuse(self._model, inputs["past_key_values"])
        if self._fused is not None:
            inputs = {name: value for name, value in inputs.items() if name not in PLACES}
        self._seen += 1
        if self._seen <= WARM_UP:
            return self._forward(**inputs)
        if self._graph is None:
            self._inputs = {path: tensor.clone() for path, tensor in _tensors(inputs).items()}
            work = functools.partial(self._forward, **_with(inputs, self._inputs))
            self._graph = capture(work, self._model, inputs["past_key_values"], self._inputs, self._fused)
            self._captures = self._graph is not None
        if self._graph is None:
            return self._forward(**inputs)
        given = _tensors(inputs)
        for path, tensor in self._inputs.items():
            tensor.copy_(given[path])
        return self._graph.replay()

    def _forward(self, **inputs: Any) -> Any:
        with self._fused.in_place() if self._fused else nullcontext():
            return self._model(**inputs)

    def _kind_of(self, inputs: dict[str, Any]) -> Any:
        """Return what calls of one graph have in common, or None if a call cannot be captured."""
        tensors, cache, ids = _tensors(inputs), inputs.get("past_key_values"), inputs.get("input_ids")
        held = {path[0] for path in tensors}
        settings = {name: value for name, value in inputs.items() if name not in held and value is not cache}
        # `generate` keeps attentions and hidden states of all tokens, but no copies.
        kept = any(inputs.get(name, getattr(self._model.config, name, False)) for name in KEPT)
        known = all(map(_is_setting, settings.values()))
        if kept or not known or not fixed_shapes(cache):
            return None
        if not isinstance(ids, torch.Tensor) or ids.shape[1] != 1:
            return None
        if {tensor.device for tensor in tensors.values()} != self._devices:
            return None
        return cache, settings, {path: (tensor.shape, tensor.dtype) for path, tensor in tensors.items()}


def _is_setting(value: Any) -> bool:
    """Return whether an argument without tensors is one that the graphs of two calls can be told apart by."""
    if isinstance(value, dict):
        return all(map(_is_setting, value.values()))
    return value is None or isinstance(value, bool | int)


def _tensors(inputs: dict[str, Any]) -> dict[Path, torch.Tensor]:
    """Return the tensors among the arguments by where they are: some models get a dict of masks, one for each type of layer."""
    found: dict[Path, torch.Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            found[(name,)] = value
        elif isinstance(value, dict):
            found |= {(name, *path): tensor for path, tensor in _tensors(value).items()}
    return found


def _with(inputs: dict[str, Any], tensors: dict[Path, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments with other tensors."""
    made = dict(inputs)
    for (name, *rest), tensor in tensors.items():
        made[name] = _with(made[name], {tuple(rest): tensor}) if rest else tensor
    return made


def _sees_all(inputs: dict[str, Any]) -> bool:
    """Return whether the token of each row sees all cached tokens and stands behind them. Later tokens of `generate` do, too."""
    cache, mask, positions = inputs["past_key_values"], *(inputs.get(name) for name in PLACES)
    if not cache.is_initialized:
        return False
    count = cache.get_seq_length()
    seen = torch.arange(cache.layers[0].keys.shape[2], device=count.device) <= count
    own_mask = all(
        each is None or (each.dtype == torch.bool and each.dim() == 4 and bool((each == seen).all()))
        for each in (mask.values() if isinstance(mask, dict) else [mask])
    )
    return own_mask and (positions is None or bool((positions == count).all()))
