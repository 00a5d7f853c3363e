"""Decoder blocks compiled for one token at a time: everything between the projections becomes a few kernels.

All blocks share one compiled function, called with the block and its layer of the cache. So compiling takes as long as for
one block. torch caches the compiled code on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from transformers import Cache, PreTrainedModel, StaticCache

from torch_impl.engine.decoder import Decoder


class _Once(CustomGraphPass):  # type: ignore[misc]
    """Compute the product that all layers of a group request only once; torch removes such duplicates only in training."""

    def __call__(self, graph: Graph) -> None:
        """Remove duplicate products. In this pass the graph still has no in-place writes."""
        first: dict[Any, Node] = {}
        for node in list(graph.nodes):
            if getattr(node.target, "namespace", None) == "losa":
                same = first.setdefault((node.target, node.args), node)
                if same is not node:
                    node.replace_all_uses_with(same)
                    graph.erase_node(node)

    def uuid(self) -> bytes:
        """Identify this version of the pass in torch's cache on disk."""
        return get_hash_for_files((__file__,))


class _OneLayer(Cache):
    """One layer of another cache, for any layer index: the compiled code would treat an index as a constant."""

    def __init__(self, layer: Any) -> None:
        own: Any = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, torch.Tensor):
                # The same memory without the static-address mark, which older versions of torch also compile in.
                setattr(own, name, value.detach())
        self._own = own
        super().__init__(layers=[own])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the layer; return all its keys and values."""
        result: tuple[torch.Tensor, torch.Tensor] = self._own.update(key_states, value_states, *args, **kwargs)
        return result


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def _compile() -> Callable[..., Any]:
    """Compile a copy of `_call`. With a copy per model and cache, torch's recompilation limit applies to each separately."""
    own = FunctionType(_call.__code__.replace(), _call.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={"post_grad_custom_pre_pass": _Once()})


class FusedBlocks:
    """The compiled blocks of a model over a static cache that is already in use; `in_place` makes the model call them.

    Errors: ValueError if the model's family is unknown or its layers slide. The first call raises RuntimeError if
    compilation fails.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache) -> None:
        if any(cache.is_sliding) or not cache.is_initialized:
            raise ValueError("cache slides or is empty; give a static cache that is in use")
        decoder = Decoder(model)
        block_call = _compile()
        self._calls: dict[nn.Module, Callable[..., Any]] = {
            block: self._over(block_call, block, _OneLayer(layer))
            for block, layer in zip(decoder.blocks, cache.layers, strict=True)
        }
        # The modules before and after the blocks: rotary angles, the last norm.
        for module in decoder.body.children():
            if module is not decoder.blocks and not isinstance(module, (nn.Embedding, nn.Linear)):
                self._calls[module] = self._plain(_compile(), module)

    @staticmethod
    def _over(compiled: Callable[..., Any], block: nn.Module, cache: Cache) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled(block, *args, **{**kwargs, "past_key_values": cache})

        return call

    @staticmethod
    def _plain(compiled: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled(module, *args, **kwargs)

        return call

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the model calls the compiled blocks."""
        before = {module: module._compiled_call_impl for module in self._calls}
        try:
            for module, call in self._calls.items():
                module._compiled_call_impl = call
            yield
        finally:
            for module, earlier in before.items():
                module._compiled_call_impl = earlier
