"""A linear layer over a packed weight: decoding multiplies with it as it is, a prompt unpacks one projection at a time."""

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

from torch_impl import packed
from torch_impl.decode import cpu, cuda
from torch_impl.engine.families import decoder_blocks, find_family

# Up to so many rows of input the CPU's kernels, which read the weight once for every eight, beat unpacking it first.
DECODE_ROWS = 32
PARTS = ("bitmap", "values", "offsets")

_numbers = itertools.count()
_numbered: weakref.WeakValueDictionary[int, _Packed] = weakref.WeakValueDictionary()


class _Packed(nn.Module):
    """A packed weight (out, in), perhaps as a GPU's layout, which is held as buffers, and its product."""

    bias: torch.Tensor | None

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.layout: cuda.Layout | None = None
        self._enlist()

    def unpacked(self) -> torch.Tensor:
        """The weight (out, in), made anew."""
        raise NotImplementedError

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out); compiled code calls it as one operation, through `handle`."""
        rows = x.reshape(-1, x.shape[-1])
        if self.layout is not None and 1 <= len(rows) <= cuda.MOST_ROWS:
            y = cuda.matvec(self.layout, rows, self.bias)
        else:
            y = nn.functional.linear(rows, self.unpacked(), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _enlist(self) -> None:
        """Take a number of its own, by which compiled code finds this weight.

        A tensor, since a plain number would be a constant of the code, which is the same for all blocks.
        """
        number = next(_numbers)
        self.handle = torch.tensor(number)
        _numbered[number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another weight."""
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
        """Take the layout's tensors as the buffers now are."""
        if self.layout is not None:
            self.layout = replace(self.layout, **{n: getattr(self, f"layout_{n}") for n in self.layout.tensors()})


class PackedLinear(_Packed):
    """y = x Wᵀ + b, W (out, in) as a bitmap and its kept values, on whatever device they are.

    bitmap, values, offsets: what `packed.pack` returns, checked here; bias: (out,) or None. Nothing is trained.
    On a GPU with kernels for the dtype, `layout` takes their place, or that of a `group` of layers whose rows from `start` on
    are the weight; a state_dict holds them all the same, without kept zeros.

    Errors: ValueError or TypeError naming what does not fit.
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
        packed.check(bitmap, values, offsets, columns)
        self.in_features, self.kept = columns, len(values)
        self.group: PackedGroup | None = None
        self.start = 0
        for name, value in (("bitmap", bitmap), ("values", values), ("offsets", offsets), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())
        self._settle()

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The same layer, packed."""
        bitmap, values, offsets = packed.pack(linear.weight.detach())
        return cls(bitmap, values, offsets, linear.in_features, linear.bias)

    def unpacked(self) -> torch.Tensor:
        """The weight (out, in), made anew."""
        if self.group is not None:
            return self.group.unpacked()[self.start : self.start + self.out_features]
        if self.layout is not None:
            return cuda.unpack(self.layout)
        return packed.expand(self.bitmap, self.values, self.in_features)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out), in x's dtype, which is the weight's. On a GPU it can be captured in a CUDA graph."""
        y: torch.Tensor
        if torch.compiler.is_compiling():
            if self.group is None:
                y = torch.ops.losa.packed_linear(x, self.handle, self.out_features)
                return y
            # All layers of the group ask for this; `fused_blocks` sees to it that it is worked out once.
            y = torch.ops.losa.packed_linear(x, self.group.handle, self.group.out_features)
            return y[..., self.start : self.start + self.out_features]
        if self.group is not None and x.numel() <= cuda.MOST_ROWS * self.in_features:
            return self.group.share(x, self.start)
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, by this layer alone."""
        rows = x.reshape(-1, self.in_features)
        if self._on_gpu is not None or x.device.type != "cpu" or len(rows) > DECODE_ROWS:
            return super().product(x)
        y = cpu.linear(rows, self.bitmap, self.values, self.offsets, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print` shows."""
        sparsity = 1 - self.kept / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={sparsity:.4f}"

    def _settle(self) -> None:
        """Take the GPU's form where it has kernels for it; all building and waiting is done here, none in `forward`."""
        if self._on_gpu is not None or not _has_kernels(self.values):
            return
        self._hold(cuda.pack_rows(self.unpacked()))
        for name in PARTS:
            self.register_buffer(name, None)

    def _restore(self) -> None:
        """Back to bitmap, values and offsets, out of any group."""
        if self._on_gpu is None:
            return
        for name, value in zip(PARTS, packed.pack(self.unpacked()), strict=True):
            self.register_buffer(name, value)
        self.kept = len(self.values)
        self._drop()
        self.group, self.start = None, 0

    def _join(self, group: PackedGroup, start: int) -> None:
        """Be rows of a group instead of a layout of its own."""
        self._drop()
        self.group, self.start = group, start

    @property
    def _on_gpu(self) -> cuda.Layout | None:
        """The layout that holds the weight, its own or the group's."""
        return self.layout if self.group is None else self.group.layout

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """What `to`, `cuda`, `half` and the like do: another device or dtype may want the other form."""
        layout = self._on_gpu
        if layout is not None:
            old = torch.empty(0, dtype=layout.dtype, device=layout.data.device)
            new = fn(old)
            if (new.device, new.dtype) != (old.device, old.dtype):
                self._restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
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
    """Packed layers with the same input, their rows one below the other in one layout on a GPU: one product for all.

    weights: (out, in) each; biases: (out,) or None each. No state_dict holds any of it: that is for the layers.
    """

    layout: cuda.Layout

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        # No in_features: what has that is a projection of a family.
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
        """The weights (rows, in), made anew."""
        return cuda.unpack(self.layout)

    def share(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """What the layer whose rows begin at `start` has of `product(x)`: the first layer to ask works it out for all.

        Each fetches its share once, of the same tensor and while it is as it was. A tensor of `torch.inference_mode` does
        not tell whether it was written to, so there every layer works it out for itself.
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
        """A copy has no shares waiting."""
        return {**self.__dict__, "_shares": None}

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"rows={' + '.join(map(str, self.sizes))}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedGroup:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        return self


def _moment(x: torch.Tensor) -> tuple[int, bool]:
    """What changes if a tensor is written to, or if a CUDA graph is to hold what is done with it."""
    return x._version, x.is_cuda and torch.cuda.is_current_stream_capturing()


def group_projections(model: nn.Module) -> None:
    """Make the packed projections of a block that have the same input one product on a GPU: q, k and v; gate and up.

    A layer that is moved, cast or loaded afterwards works alone again. Errors: ValueError if the model's family is unknown.
    """
    family = find_family(model)
    for block in decoder_blocks(model, family):
        for names in family.inputs:
            join([block.get_submodule(name) for name in names])


def join(modules: Sequence[nn.Module]) -> None:
    """Make a group of those that are packed on a GPU, if they are two or more of one dtype. They must have the same input."""
    layers = [module for module in modules if isinstance(module, PackedLinear) and module.layout is not None]
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
    """Whether a GPU multiplies with these as they are; if it could not, that is said once."""
    if values.device.type != "cuda":
        return False
    usable, reason = cuda.available()
    if usable and values.dtype not in cuda.DTYPES:
        usable, reason = False, f"they take bfloat16 and float16, not {str(values.dtype).removeprefix('torch.')}"
    if not usable:
        _say(f"packed weights: no kernels for this GPU, a slower path instead ({reason})")
    return usable


@functools.cache
def _say(line: str) -> None:
    """Print a line to standard error, once."""
    print(line, file=sys.stderr)
