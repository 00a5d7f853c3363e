"""A linear layer over a packed weight: decoding multiplies with it as it is, a prompt unpacks one projection at a time."""

from __future__ import annotations

import torch
from torch import nn

from torch_impl import packed
from torch_impl.engine import cpu_decode, cuda_decode

# Up to so many rows of input the kernels, which read the weight once for every eight, beat unpacking it first.
DECODE_ROWS = 32


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, W (out, in) as a bitmap and its kept values, on whatever device they are.

    bitmap, values, offsets: what `packed.pack` returns, checked here; bias: (out,) or None. Nothing is trained. On a GPU
    with kernels the first call puts the layout that they read in the place of all three, so that there is one copy.

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
        self.in_features, self.out_features = columns, len(bitmap)
        self._layout: cuda_decode.Layout | None = None
        for name, value in (("bitmap", bitmap), ("values", values), ("offsets", offsets), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The same layer, packed."""
        bitmap, values, offsets = packed.pack(linear.weight.detach())
        return cls(bitmap, values, offsets, linear.in_features, linear.bias)

    def unpacked(self) -> torch.Tensor:
        """The weight (out, in), made anew."""
        if self._layout is not None:
            return cuda_decode.unpack(self._layout)
        return packed.expand(self.bitmap, self.values, self.in_features)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) → (..., out), in x's dtype, which is the weight's."""
        rows = x.reshape(-1, self.in_features)
        if x.is_cuda and self._layout is None and x.dtype in cuda_decode.DTYPES and cuda_decode.available()[0]:
            self._lay_out()
        if self._layout is not None and 1 <= len(rows) <= cuda_decode.MOST_ROWS:
            y = cuda_decode.matvec(self._layout, rows, self.bias)
        elif x.device.type == "cpu" and len(rows) <= DECODE_ROWS:
            y = cpu_decode.linear(rows, self.bitmap, self.values, self.offsets, self.bias)
        else:
            y = nn.functional.linear(rows, self.unpacked(), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _lay_out(self) -> None:
        """Exchange the packed weight for the GPU's layout of it."""
        self._layout = cuda_decode.pack_rows(self.unpacked())
        self.bitmap, self.values, self.offsets = (part[:0].clone() for part in (self.bitmap, self.values, self.offsets))
        for name, tensor in self._layout.tensors().items():
            self.register_buffer(f"layout_{name}", tensor, persistent=False)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
