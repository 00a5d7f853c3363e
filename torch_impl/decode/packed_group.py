"""The product with a packed weight as compiled code and CUDA graphs call it, and the product with several weights at once."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_impl.decode import cuda

_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()


class Packed(nn.Module):
    """A packed weight (out, in) and its product. On a GPU, buffers hold the weight's layout."""

    bias: torch.Tensor | None

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.layout: cuda.Layout | None = None
        self._enlist()

    def unpacked(self) -> torch.Tensor:
        """Unpack the weight (out, in)."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out). Compiled code calls this as one operation, through `handle`."""
        # Between Python's lines a GPU waits: no attribute here goes through `nn.Module.__getattr__`.
        layout = self.layout
        if layout is not None and 0 < x.numel() <= layout.MOST_ROWS * layout.columns:
            return cuda.matvec(layout, x, self._buffers["bias"])
        return self._multiply_unpacked(x)

    @torch.no_grad()
    def _multiply_unpacked(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.unpacked(), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _enlist(self) -> None:
        """Register this weight under a number by which compiled code finds it.

        The number is a tensor: all blocks share the compiled code, and a Python number would be compiled in.
        """
        number = next(_numbers)
        self.handle = torch.tensor(number, device="cpu")
        _numbered[number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register a copy as a weight of its own."""
        super().__setstate__(state)
        self._enlist()

    def _hold(self, layout: cuda.Layout) -> None:
        self.layout = layout
        for name, value in layout.tensors().items():
            self.register_buffer(f"layout_{name}", value, persistent=False)

    def _drop(self) -> None:
        for name in list(self._buffers):
            if name.startswith("layout_"):
                delattr(self, name)
        self.layout = None

    def _follow(self) -> None:
        """Update the layout's tensors from the buffers."""
        if self.layout is not None:
            self.layout = replace(self.layout, **{n: getattr(self, f"layout_{n}") for n in self.layout.tensors()})


class PackedGroup(Packed):
    """Packed layers with the same input, stacked in one GPU layout: one product for all.

    layout: of all rows; sizes: rows of each layer; biases: (out,) or None each. A state_dict holds the layers, not the group.
    """

    layout: cuda.Layout

    def __init__(self, layout: cuda.Layout, sizes: Sequence[int], biases: Sequence[torch.Tensor | None]) -> None:
        # Without in_features: a module that has it counts as a projection.
        super().__init__(layout.rows)
        self.sizes = list(sizes)
        self.starts = list(itertools.accumulate(self.sizes[:-1], initial=0))
        self._hold(layout)
        bias = None
        if any(given is not None for given in biases):
            zeros = (torch.zeros(size, dtype=layout.dtype, device=layout.data.device) for size in sizes)
            bias = torch.cat([zero if given is None else given for zero, given in zip(zeros, biases, strict=True)])
        self.register_buffer("bias", bias, persistent=False)
        self._shares: tuple[weakref.ref[torch.Tensor], Any, dict[int, torch.Tensor]] | None = None
        # The layouts of single layers: rows of the group's. None: they are not whole strips.
        self._layouts: dict[int, cuda.Layout | None] = {}

    def unpacked(self) -> torch.Tensor:
        """Unpack the weights (rows, in)."""
        return cuda.unpack(self.layout)

    def unpacked_part(self, start: int) -> torch.Tensor:
        """Unpack the weight (out, in) of the layer whose rows begin at `start`."""
        layout = self._layout_of(start)
        return self.unpacked()[self._rows(start)] if layout is None else cuda.unpack(layout)

    def share(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Return the product of the layer whose rows begin at `start`. The first layer that calls this computes it for all.

        Each layer takes its rows once, as long as x is the same tensor and unmodified. A tensor of `torch.inference_mode` does
        not record modifications, so each layer computes its product itself.
        """
        if x.is_inference():
            return self._part(x, start)
        known, moment = self._shares, _moment(x)
        if known is not None and known[0]() is x and known[1] == moment:
            own = known[2].pop(start, None)
            if own is not None:
                return own
        products = cuda.matvec_parts(self.layout, x, self._buffers["bias"], self.sizes)
        parts = dict(zip(self.starts, products, strict=True))
        own = parts.pop(start)
        # `nn.Module.__setattr__` would take longer than the rest.
        self.__dict__["_shares"] = (weakref.ref(x), moment, parts)
        return own

    def _part(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Compute the rows of one layer: alone if they are whole strips, otherwise with all others."""
        layout, rows = self._layout_of(start), self._rows(start)
        if layout is None:
            return self.product(x)[..., rows]
        bias = self._buffers["bias"]
        return cuda.matvec(layout, x, None if bias is None else bias[rows])

    def _rows(self, start: int) -> slice:
        return slice(start, start + self.sizes[self.starts.index(start)])

    def _layout_of(self, start: int) -> cuda.Layout | None:
        """Return the layout of one layer, or None if its rows are not whole strips."""
        if start not in self._layouts:
            rows = self._rows(start)
            self._layouts[start] = self.layout.part(start, rows.stop - start)
        return self._layouts[start]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached rows and layouts."""
        return {**self.__dict__, "_shares": None, "_layouts": {}}

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"rows={' + '.join(map(str, self.sizes))}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedGroup:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        self._layouts.clear()
        return self


def _moment(x: torch.Tensor) -> tuple[int, bool]:
    """Return a value that changes when the tensor is modified, or when a CUDA graph capture begins or ends."""
    return x._version, x.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.library.custom_op("losa::packed_linear", mutates_args=())
def _product(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return _numbered[int(handle)].product(x)


@_product.register_fake
def _shape(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
