"""An adapted projection whose base weight is packed, or rounded and packed, and unpacked at each use.

Nothing of it stays between uses: a forward pass unpacks the weight, its backward pass unpacks it again. Spec: reference/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torch_impl import _unpacking, base, packed
from torch_impl.engine.adapted_linear import AdaptedLinear, block_adapters
from torch_impl.engine.families import Family
from torch_impl.engine.masked_linear import unpacking_linear
from torch_impl.engine.settings import DENSE, INT8
from torch_impl.packed import CODED, PARTS

# Entries that are packed at once; the work on them takes some 30 bytes each.
AT_ONCE = 2**24


class CompressedLinear(AdaptedLinear):
    """`AdaptedLinear` over the parts of a packed weight, `packed.PARTS` or, with rounded values, `packed.CODED`.

    layer: the one to take the place of, with its adapter. parts: of its base, by name. dtype: of the unpacked weight.
    """

    def __init__(self, layer: AdaptedLinear, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias, self.scale, self.A, self.B = layer.bias, layer.scale, layer.A, layer.B
        self.recomputed, self.input_hook, self._held = False, layer.input_hook, None
        self.dtype = dtype
        self._fill(parts)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Unpack the base weight (out, in)."""
        parts, columns = self.parts, self.in_features
        bitmap, offsets = parts["bitmap"], parts["offsets"]
        here = _unpacking.usable(bitmap, self.dtype)
        if "codes" in parts:
            codes, scales = parts["codes"], parts["scales"]
            if here:
                return _unpacking.unpack_coded(bitmap, codes, scales, offsets, columns, self.dtype)
            return packed.expand_coded(bitmap, codes, scales, columns, self.dtype)
        values = parts["values"]
        if here:
            return _unpacking.unpack(bitmap, values, offsets, columns)
        return packed.expand(bitmap, values, columns)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """Return the parts of the packed weight by name."""
        return {name: part for name, part in self._buffers.items() if part is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        return self._forward_apart(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_apart(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_hook is not None:
            self.input_hook(x)
        if torch.is_grad_enabled() and self._held is None:
            return self._product(x)
        return nn.functional.linear(x, self.merged() if self._held is None else self._held, self.bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return unpacking_linear(x, lambda: self.weight, self.A, self.B, self.bias, self.scale)

    @torch.no_grad()
    def hold(self) -> None:
        """Build the merged weight and use it until `release`, without gradients."""
        self._held = self.merged()

    @torch.no_grad()
    def set_base(self, weight: torch.Tensor) -> None:
        """Replace the base weight; rounded values keep the scales of groups that have only lost weights."""
        self.release()
        scales = self.parts.get("scales")
        self._fill(_packed(weight) if scales is None else _coded(weight, scales))

    def _fill(self, parts: Mapping[str, torch.Tensor]) -> None:
        for name, part in parts.items():
            self.register_buffer(name, part.to(self.A.device), persistent=False)


def compress_block(block: nn.Module, family: Family, values: str) -> None:
    """Compress the base weights of a block's adapted projections. values: see `TrainingConfig.train_base`; dense does nothing."""
    for name, layer in block_adapters(block, family).items():
        if values != DENSE and not isinstance(layer, CompressedLinear):
            weight = layer.weight.detach()
            parts = _coded(weight, None) if values == INT8 else _packed(weight)
            block.set_submodule(name, CompressedLinear(layer, parts, weight.dtype))


def restore_compressed(block: nn.Module, name: str, parts: Mapping[str, torch.Tensor]) -> None:
    """Give projection `name` of a block the parts of a packed base."""
    layer = block.get_submodule(name)
    assert isinstance(layer, AdaptedLinear)
    dtype = layer.dtype if isinstance(layer, CompressedLinear) else layer.weight.dtype
    block.set_submodule(name, CompressedLinear(layer, parts, dtype))


def _packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pack a weight, some rows at once."""
    # A negative zero is not kept.
    found = [packed.pack(rows.masked_fill(rows == 0, 0.0)) for rows in weight.split(_rows(weight))]
    bitmaps, values, offsets = zip(*found, strict=True)
    return dict(zip(PARTS, (torch.cat(bitmaps), torch.cat(values), _joined(offsets)), strict=True))


def _coded(weight: torch.Tensor, scales: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Round a weight to codes of a byte, and pack them."""
    codes, scales = base.round_base(weight, scales)
    found = [packed.pack(rows.to(torch.int16).view(torch.float16)) for rows in codes.split(_rows(codes))]
    bitmaps, values, offsets = zip(*found, strict=True)
    stream = torch.cat([own.view(torch.int16).to(torch.int8) for own in values])
    # As `packed.pack_codes`: eight codes in a row, filled up with zeros.
    stream = nn.functional.pad(stream, (0, -len(stream) % 8)).view(torch.uint8).view(-1, 8)
    return dict(zip(CODED, (torch.cat(bitmaps), stream, scales, _joined(offsets)), strict=True))


def _rows(matrix: torch.Tensor) -> int:
    return max(1, AT_ONCE // matrix.shape[1])


def _joined(offsets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Join the offsets of consecutive rows."""
    counts = torch.cat([own.diff() for own in offsets])
    return nn.functional.pad(counts.cumsum(0), (1, 0))
