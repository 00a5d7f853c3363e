"""Emulate the memory ownership of CUDA graphs on a CPU: a replay that would read freed memory raises an error.

A capture records every operation. The graph owns tensors made inside it; it holds only a weak reference to outside memory, as
a real graph holds only an address. A replay repeats the operations on that memory's current contents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


class FreedMemoryError(AssertionError):
    """A replay would have read freed memory."""


class _Outside:
    """A tensor from outside a capture: its memory, shape and strides."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._memory = StorageWeakRef(tensor.untyped_storage())
        self._look = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        """Restore the tensor. Errors: FreedMemoryError."""
        if self._memory.expired():
            raise FreedMemoryError(f"a captured operation reads {tuple(self._look[1])} {self._dtype}, which was freed")
        storage = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._look)


class Graph(TorchDispatchMode):
    """Replaces `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any]] = []
        self._inside: set[int] = set()
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in self._tensors((args, kwargs)):
            memory = tensor.untyped_storage()
            if memory._cdata not in self._inside and memory._cdata not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(memory)
                self._before[memory._cdata] = (whole, whole.clone())
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in self._tensors((args, kwargs))}
        for tensor in self._tensors(result):
            if tensor.untyped_storage()._cdata not in given:
                self._inside.add(tensor.untyped_storage()._cdata)
        self._calls.append((func, tree_map(self._known, (args, kwargs)), tree_map(self._known, result)))
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]

    def _known(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach() if leaf.untyped_storage()._cdata in self._inside else _Outside(leaf)

    def end(self) -> None:
        """Restore outside memory: a real capture executes nothing."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation. Errors: FreedMemoryError."""
        self.replays += 1
        for func, given, result in self._calls:
            args, kwargs = tree_map(lambda leaf: leaf.tensor() if isinstance(leaf, _Outside) else leaf, given)
            memories = {tensor.untyped_storage()._cdata for tensor in self._tensors((args, kwargs))}
            again, before = func(*args, **kwargs), tree_flatten(result)[0]
            for new, old in zip(tree_flatten(again)[0], before, strict=True):
                # Views and in-place results keep their place.
                if isinstance(new, torch.Tensor) and new.untyped_storage()._cdata not in memories:
                    old.copy_(new)


@contextmanager
def _capture(graph: Graph, pool: Any = None) -> Iterator[None]:
    try:
        with graph:
            yield
    finally:
        graph.end()


def emulate(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Replace CUDA's graphs by these. Returns a list that collects all graphs made from now on."""
    made: list[Graph] = []

    def make() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return made
