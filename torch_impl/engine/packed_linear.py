"""A linear layer over a packed weight: decoding multiplies with it as it is, a prompt unpacks one projection at a time."""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torch_impl import packed
from torch_impl.engine import cpu_decode, cuda_decode

# Up to so many rows of input the CPU's kernels, which read the weight once for every eight, beat unpacking it first.
DECODE_ROWS = 32
PARTS = ("bitmap", "values", "offsets")

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, W (out, in) as a bitmap and its kept values, on whatever device they are.

    bitmap, values, offsets: what `packed.pack` returns, checked here; bias: (out,) or None. Nothing is trained.
    On a GPU with kernels for the dtype, `layout` takes their place; a state_dict holds them all the same, without kept zeros.

    Errors: ValueError or TypeError naming what does not fit.
    """

    bitmap: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        bitmap: torch.Tensor,
        values: torch.Tensor,
        offsets: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        packed.check(bitmap, values, offsets, columns)
        self.in_features, self.out_features, self.kept = columns, len(bitmap), len(values)
        self.layout: cuda_decode.Layout | None = None
        for name, value in (("bitmap", bitmap), ("values", values), ("offsets", offsets), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())
        self._settle()
        self._enlist()

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The same layer, packed."""
        bitmap, values, offsets = packed.pack(linear.weight.detach())
        return cls(bitmap, values, offsets, linear.in_features, linear.bias)

    def unpacked(self) -> torch.Tensor:
        """The weight (out, in), made anew."""
        if self.layout is not None:
            return cuda_decode.unpack(self.layout)
        return packed.expand(self.bitmap, self.values, self.in_features)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out), in x's dtype, which is the weight's. On a GPU it can be captured in a CUDA graph."""
        if torch.compiler.is_compiling():
            result: torch.Tensor = torch.ops.losa.packed_linear(x, self.handle, self.out_features)
            return result
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` gives; compiled code calls it as one operation, through `handle`."""
        rows = x.reshape(-1, self.in_features)
        if self.layout is not None and 1 <= len(rows) <= cuda_decode.MOST_ROWS:
            y = cuda_decode.matvec(self.layout, rows, self.bias)
        elif self.layout is None and x.device.type == "cpu" and len(rows) <= DECODE_ROWS:
            y = cpu_decode.linear(rows, self.bitmap, self.values, self.offsets, self.bias)
        else:
            y = nn.functional.linear(rows, self.unpacked(), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print` shows."""
        sparsity = 1 - self.kept / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={sparsity:.4f}"

    def _enlist(self) -> None:
        """Take a number of its own, by which compiled code finds this layer.

        A tensor, since a plain number would be a constant of the code, which is the same for all blocks.
        """
        number = next(_numbers)
        self.handle = torch.tensor(number)
        _layers[number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layer."""
        super().__setstate__(state)
        self._enlist()

    def _settle(self) -> None:
        """Take the GPU's form where it has kernels for it; all building and waiting is done here, none in `forward`."""
        if self.layout is not None or not _has_kernels(self.values):
            return
        self.layout = cuda_decode.pack_rows(self.unpacked())
        for name, value in self.layout.tensors().items():
            self.register_buffer(f"layout_{name}", value, persistent=False)
        for name in PARTS:
            self.register_buffer(name, None)

    def _restore(self) -> None:
        """Back to bitmap, values and offsets."""
        if self.layout is None:
            return
        for name, value in zip(PARTS, packed.pack(self.unpacked()), strict=True):
            self.register_buffer(name, value)
        self.kept = len(self.values)
        for name in self.layout.tensors():
            delattr(self, f"layout_{name}")
        self.layout = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """What `to`, `cuda`, `half` and the like do: another device or dtype may want the other form."""
        if self.layout is not None:
            old = torch.empty(0, dtype=self.layout.dtype, device=self.layout.data.device)
            new = fn(old)
            if (new.device, new.dtype) != (old.device, old.dtype):
                self._restore()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.layout is not None:
            self.layout = replace(self.layout, **{n: getattr(self, f"layout_{n}") for n in self.layout.tensors()})
        self._settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not None:
            for name, value in zip(PARTS, packed.pack(self.unpacked()), strict=True):
                destination[prefix + name] = value

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)  # type: ignore[no-untyped-call]
        self._settle()


@torch.library.custom_op("losa::packed_linear", mutates_args=())
def _product(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return _layers[int(handle)].product(x)


@_product.register_fake
def _shape(x: torch.Tensor, handle: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _has_kernels(values: torch.Tensor) -> bool:
    """Whether a GPU multiplies with these as they are; if it could not, that is said once."""
    if values.device.type != "cuda":
        return False
    usable, reason = cuda_decode.available()
    if usable and values.dtype not in cuda_decode.DTYPES:
        usable, reason = False, f"they take bfloat16 and float16, not {str(values.dtype).removeprefix('torch.')}"
    if not usable:
        _say(f"packed weights: no kernels for this GPU, a slower path instead ({reason})")
    return usable


@functools.cache
def _say(line: str) -> None:
    """Print a line to standard error, once."""
    print(line, file=sys.stderr)
