"""A linear layer over a packed weight whose kept values are codes of a few bits with scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from torch_impl import packed
from torch_impl.decode import cpu, cuda, cuda_layouts
from torch_impl.decode.packed_group import Packed
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.packed import CODED


class CodedLinear(PackedLinear):
    """y = x Wᵀ + b, where W (out, in) is a bitmap, the codes of its kept values, and a scale for every 128 columns of a row.

    parts: bitmap, codes, offsets as `packed.pack_codes` returns them, and scales (out, ⌈in/128⌉) float16, in the order of
    `packed.CODED`. dtype: of inputs, outputs and bias; casting changes it alone, not codes and scales. On a GPU with kernels for
    the dtype, `layout` holds codes and scales, as does host memory. Its kind
    depends on `sequences`. A state_dict always holds the codes.

    Errors: as `packed.check_codes`.
    """

    names: ClassVar[tuple[str, ...]] = CODED
    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        parts: Sequence[torch.Tensor],
        columns: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
        sequences: int = 1,
    ) -> None:
        Packed.__init__(self, len(parts[0]))
        self._dtype, self.bits = dtype, parts[1].shape[1]
        # The parts of a weight that is in a layout.
        self._on_host: dict[str, torch.Tensor] = {}
        self._fill(parts, columns, bias, sequences)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of inputs and outputs."""
        return self._dtype

    def check(self) -> None:
        """Check the buffers. Errors: as `packed.check_codes`."""
        packed.check_codes(self.bitmap, self.codes, self.scales, self.offsets, self.in_features)
        self.bits = self.codes.shape[1]

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the parts of the packed weight by name, wherever they are."""
        return self._on_host or {name: getattr(self, name) for name in self.names}

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"{super().extra_repr()}, bits={self.bits}"

    def _count(self) -> int:
        return 0 if self.offsets.is_meta else int(self.offsets[-1])

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        parts: Any = self._buffers
        return cpu.linear_coded(x, parts["bitmap"], parts["codes"], parts["scales"], parts["offsets"], parts["bias"])

    def _lay_out(self) -> cuda.Layout:
        codes = packed.expand_codes(self.bitmap, self.codes, self.in_features)
        return cuda_layouts.lay_out_codes(codes, self.scales, self.bits, self._dtype, self.sequences)

    def _settle(self) -> None:
        parts = self.stored()
        super()._settle()
        if self._on_gpu is not None and not self._on_host:
            self._on_host = {name: value.cpu() for name, value in parts.items()}

    def _drop_zeros(self) -> None:
        """Keep all codes, in any dtype."""

    def _restore(self) -> None:
        super()._restore()
        self._on_host = {}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CodedLinear:
        """Implement `to` and the like: codes and scales move, only the dtype of inputs and outputs changes."""
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if tensor is self.scales and new.dtype != tensor.dtype else new

        super()._apply(moved, recurse)
        return self


def layer_of(
    parts: Sequence[torch.Tensor],
    columns: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    sequences: int = 1,
) -> PackedLinear:
    """Return the layer of a packed weight's parts. dtype: of a layer of codes, whose parts do not tell it."""
    if len(parts) == len(CODED):
        return CodedLinear(parts, columns, dtype, bias, sequences)
    bitmap, values, offsets = parts
    return PackedLinear(bitmap, values, offsets, columns, bias, sequences)
