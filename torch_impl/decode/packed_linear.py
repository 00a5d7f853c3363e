"""A linear layer over a packed weight: decoding multiplies with the packed form, a prompt unpacks one weight at a time."""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import packed
from torch_impl.decode import cpu, cuda
from torch_impl.engine.decoder import Decoder
from torch_impl.packed import PARTS

# Up to this many rows of input, the CPU kernels are faster than unpacking. They read the weight once per eight rows.
DECODE_ROWS = 32

_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, _Packed] = weakref.WeakValueDictionary()


class _Packed(nn.Module):
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
        rows = x.reshape(-1, x.shape[-1])
        if self.layout is not None and 1 <= len(rows) <= cuda.MOST_ROWS:
            y = cuda.matvec(self.layout, rows, self.bias)
        else:
            y = nn.functional.linear(rows, self.unpacked(), self.bias)
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


class PackedLinear(_Packed):
    """y = x Wᵀ + b, where W (out, in) is a bitmap and its kept values, on any device. Nothing is trainable.

    bitmap, values, offsets: as `packed.pack` returns them; bias: (out,) or None. On a GPU with kernels for the dtype,
    `layout` replaces them, or the layout of a `group` of layers, in which this weight's rows begin at `start`. A state_dict
    always holds bitmap, values and offsets, without kept zeros.

    Errors: as `packed.check`. Tensors on the meta device are not checked: fill the buffers, then call `loaded`.
    """

    bitmap: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor

    def __init__(
        self,
        bitmap: torch.Tensor,
        values: torch.Tensor,
        offsets: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__(len(bitmap))
        if not bitmap.is_meta:
            packed.check(bitmap, values, offsets, columns)
        self.in_features, self.kept = columns, len(values)
        self.group: PackedGroup | None = None
        self.start = 0
        # The packed layers with the same input, this one among them.
        self.together: list[PackedLinear] = []
        for name, value in (("bitmap", bitmap), ("values", values), ("offsets", offsets), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())
        self._settle()

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """Pack a linear layer."""
        bitmap, values, offsets = packed.pack(linear.weight.detach())
        return cls(bitmap, values, offsets, linear.in_features, linear.bias)

    @property
    def positions(self) -> int:
        """Return the size of the matrix, zeros included."""
        return self.in_features * self.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Return the weight's dtype."""
        return self.values.dtype if self._on_gpu is None else self._on_gpu.dtype

    def loaded(self, dtype: torch.dtype) -> None:
        """Check the buffers that have been filled, and cast them. Errors: as `packed.check`."""
        packed.check(self.bitmap, self.values, self.offsets, self.in_features)
        self._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def unpacked(self) -> torch.Tensor:
        """Unpack the weight (out, in)."""
        if self.group is not None:
            return self.group.unpacked()[self.start : self.start + self.out_features]
        if self.layout is not None:
            return cuda.unpack(self.layout)
        return packed.expand(self.bitmap, self.values, self.in_features)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out), in the weight's dtype. On a GPU, a CUDA graph can capture it."""
        y: torch.Tensor
        if torch.compiler.is_compiling():
            if self.group is None:
                y = torch.ops.losa.packed_linear(x, self.handle, self.out_features)
                return y
            # All layers of the group request this product; `compiled_blocks` computes it once.
            y = torch.ops.losa.packed_linear(x, self.group.handle, self.group.out_features)
            return y[..., self.start : self.start + self.out_features]
        if self.group is not None and x.numel() <= cuda.MOST_ROWS * self.in_features:
            return self.group.share(x, self.start)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output of this layer alone, without its group."""
        rows = x.reshape(-1, self.in_features)
        if self._on_gpu is not None or x.device.type != "cpu" or len(rows) > DECODE_ROWS:
            return super().product(x)
        y = cpu.linear(rows, self.bitmap, self.values, self.offsets, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        sparsity = 1 - self.kept / self.positions
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={sparsity:.4f}"

    def _settle(self) -> None:
        """Convert to the GPU's layout if there are kernels. All building and synchronising happens here, not in `forward`.

        The last of the layers with the same input to arrive groups them.
        """
        if self._on_gpu is not None or self.values.is_meta or not _has_kernels(self.values):
            return
        self._hold(cuda.pack_rows(self.unpacked()))
        for name in PARTS:
            self.register_buffer(name, None)
        if all(layer.layout is not None for layer in self.together):
            _group(self.together)

    def _drop_zeros(self) -> None:
        """Remove kept values that a cast to a narrower dtype has rounded to 0."""
        if not self.values.is_meta and not bool(self.values.all()):
            dense = packed.expand(self.bitmap, self.values, self.in_features)
            for name, value in zip(PARTS, packed.pack(dense), strict=True):
                self.register_buffer(name, value)
            self.kept = len(self.values)

    def _restore(self) -> None:
        """Convert back to bitmap, values and offsets, and leave the group."""
        if self._on_gpu is None:
            return
        for name, value in zip(PARTS, packed.pack(self.unpacked()), strict=True):
            self.register_buffer(name, value)
        self.kept = len(self.values)
        self._drop()
        self.group, self.start = None, 0

    def _join(self, group: PackedGroup, start: int) -> None:
        """Use rows of a group's layout instead of an own layout."""
        self._drop()
        self.group, self.start = group, start

    @property
    def _on_gpu(self) -> cuda.Layout | None:
        """Return the layout that holds the weight: its own or the group's."""
        return self.layout if self.group is None else self.group.layout

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """Implement `to`, `cuda`, `half` and the like: another device or dtype may need the other form."""
        layout = self._on_gpu
        if layout is not None:
            old = torch.empty(0, dtype=layout.dtype, device=layout.data.device)
            new = fn(old)
            if (new.device, new.dtype) != (old.device, old.dtype):
                self._restore()
        values = self.values
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        if values is not None and values.dtype != self.values.dtype:
            self._drop_zeros()
        self._settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._on_gpu is not None:
            for name, value in zip(PARTS, packed.pack(self.unpacked()), strict=True):
                destination[prefix + name] = value

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)  # type: ignore[no-untyped-call]
        self._settle()


class PackedGroup(_Packed):
    """Packed layers with the same input, stacked in one GPU layout: one product for all.

    weights: (out, in) each; biases: (out,) or None each. A state_dict holds the layers, not the group.
    """

    layout: cuda.Layout

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        # Without in_features: a module that has it counts as a projection.
        super().__init__(sum(len(weight) for weight in weights))
        self.sizes = [len(weight) for weight in weights]
        self.starts = list(itertools.accumulate(self.sizes[:-1], initial=0))
        self._hold(cuda.pack_rows(torch.cat(list(weights))))
        bias = None
        if any(given is not None for given in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if given is None else given for w, given in pairs])
        self.register_buffer("bias", bias, persistent=False)
        self._shares: tuple[weakref.ref[torch.Tensor], Any, dict[int, torch.Tensor]] | None = None

    def unpacked(self) -> torch.Tensor:
        """Unpack the weights (rows, in)."""
        return cuda.unpack(self.layout)

    def share(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Return the rows from `start` on of `product(x)`. The first layer that calls this computes the product for all.

        Each layer takes its rows once, as long as x is the same tensor and unmodified. A tensor of `torch.inference_mode` does
        not record modifications, so each layer computes the product itself.
        """
        known = self._shares
        if known is not None and known[0]() is x and known[1] == _moment(x):
            own = known[2].pop(start, None)
            if own is not None:
                return own
        parts = dict(zip(self.starts, self.product(x).split(self.sizes, -1), strict=True))
        own = parts.pop(start)
        self._shares = None if x.is_inference() else (weakref.ref(x), _moment(x), parts)
        return own

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached rows."""
        return {**self.__dict__, "_shares": None}

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"rows={' + '.join(map(str, self.sizes))}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedGroup:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        return self


def _moment(x: torch.Tensor) -> tuple[int, bool]:
    """Return a value that changes when the tensor is modified, or when a CUDA graph capture begins or ends."""
    return x._version, x.is_cuda and torch.cuda.is_current_stream_capturing()


def group_projections(model: PreTrainedModel) -> None:
    """Group the packed projections of a block that share an input into one product on a GPU: q, k and v; gate and up.

    A layer leaves its group when it is moved, cast or loaded. When all of them are on a GPU, they form a group again.
    Errors: ValueError if the model's family is unknown.
    """
    decoder = Decoder(model)
    for index in range(len(decoder.blocks)):
        projections = decoder.projections(index)
        for names in decoder.family.inputs:
            join([projections[name] for name in names])


def join(modules: Sequence[nn.Module]) -> None:
    """Group the modules that are packed, now and whenever all of them are on a GPU. They must share one input."""
    layers = [module for module in modules if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.together = layers
    _group([layer for layer in layers if layer.layout is not None])


def _group(layers: Sequence[PackedLinear]) -> None:
    """Group layers, packed on a GPU, that share one input, if they are two or more of one dtype on one device."""
    if len(layers) < 2:
        return
    weights = [layer.unpacked() for layer in layers]
    if len({(weight.dtype, weight.device) for weight in weights}) == 1:
        group = PackedGroup(weights, [layer.bias for layer in layers])
        for layer, start in zip(layers, group.starts, strict=True):
            layer._join(group, start)


@torch.library.custom_op("losa::packed_linear", mutates_args=())
def _product(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return _numbered[int(handle)].product(x)


@_product.register_fake
def _shape(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _has_kernels(values: torch.Tensor) -> bool:
    """Return whether there are GPU kernels for these values; if a GPU has none, print why once."""
    if values.device.type != "cuda":
        return False
    usable, reason = cuda.available()
    if usable and values.dtype not in cuda.DTYPES:
        usable, reason = False, f"they support bfloat16 and float16, not {str(values.dtype).removeprefix('torch.')}"
    if not usable:
        _say(f"packed weights: GPU kernels are not available, so decoding is slower ({reason})")
    return usable


@functools.cache
def _say(line: str) -> None:
    """Print a line to standard error, once."""
    print(line, file=sys.stderr)
