"""A token through decoder blocks in five launches a block, if all projections are packed: norms and SiLU are parts of the products.

q, k, v · attention · o · gate, up · down: see cuda_endings.py. One rounding differs from Hugging Face's: theirs are of x / root and
of that times the norm's gain, these of x · gain; the product of that is divided by the root in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl import tiles
from torch_impl.decode import cuda, cuda_endings, cuda_gaps
from torch_impl.decode import fused_operations as operations
from torch_impl.decode.fused_attention import Attention
from torch_impl.decode.packed_linear import PackedLinear

FIVE: bool | None = None
"""Whether blocks take five launches where they can; None: where that is faster, as `pays` tells; otherwise eight."""
FEWEST_COLUMNS = 3072
"""With gaps at 70 %, five launches decode 621 and 923 tokens/s of 7B's and 3B's shapes, 4096 and 3072 wide, eight 596 and 899; of
1B's, 2048 wide, 1680 and 1761; of 7B's with panels 429 and 440 (one H200, gpu_fused)."""


@dataclass(frozen=True)
class Product:
    """A packed weight, or several stacked ones."""

    layout: cuda.Layout
    bias: torch.Tensor | None
    sizes: list[int]

    @staticmethod
    def of(modules: Sequence[nn.Module]) -> Product | None:
        """Return the weights of modules with one input, if they are packed, are on a GPU as one layout and have no hooks."""
        layers = [module for module in modules if isinstance(module, PackedLinear)]
        if len(layers) < len(modules) or any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
            return None
        sizes = [layer.out_features for layer in layers]
        held: Any = layers[0].group or layers[0]
        if len(layers) == 1 and layers[0].group is not None:
            return None
        if len(layers) > 1 and any(layer.group is not held for layer in layers):
            return None
        if held.layout is None or getattr(held, "sizes", sizes) != sizes:
            return None
        return Product(held.layout, held.bias, sizes)

    def fits(self, ending: str, rows: int) -> bool:
        """Return whether the product of so many rows can end so."""
        return cuda_endings.fits(self.layout, ending, rows)


@dataclass(frozen=True)
class Block:
    """A decoder block of packed projections. norms: gain and eps of its two norms."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    attention: Attention
    norms: Sequence[tuple[torch.Tensor, float]]

    @staticmethod
    def of(layer: Any) -> Block | None:
        """Return a block of `fused_step` if its products can compute what is around them, or None."""
        qkv, gate_up = Product.of(layer.qkv), Product.of(layer.gate_up)
        o, down = Product.of([layer.o]), Product.of([layer.down])
        if qkv is None or o is None or gate_up is None or down is None:
            return None
        gate, up = gate_up.sizes
        plain = all(gain.dtype == cuda_endings.DTYPE and gain.is_contiguous() for gain, _ in layer.norms)
        rows = len(layer.attention.keys)
        if not plain or gate != up or gate % tiles.ROWS or rows > cuda_endings.MOST_ROWS:
            return None
        ends = (qkv, "normed"), (o, "added"), (gate_up, "swiglu"), (down, "added")
        fitting = all(product.fits(ending, rows) for product, ending in ends)
        return Block(qkv, o, gate_up, down, layer.attention, layer.norms) if fitting else None

    def __call__(
        self, total: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor, gain: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to the residual in place; return (total · gain, its squares). gain: of the norm that follows the block."""
        qkv, o, gate_up, down = self.qkv, self.o, self.gate_up, self.down
        (_, first), (second_gain, second) = self.norms
        joined = cuda_endings.normed(qkv.layout, scaled, squares, first, qkv.bias)
        q, k, v = joined.split(qkv.sizes, 1)
        heads = operations.attend(q, k, v, self.attention)
        scaled, squares = cuda_endings.added(o.layout, heads, total, second_gain, o.bias)
        inner = cuda_endings.swiglu(gate_up.layout, scaled, squares, second, gate_up.bias)
        return cuda_endings.added(down.layout, inner, total, gain, down.bias)


def pays(block: Block) -> bool:
    """Return whether five launches are faster than eight: with gaps, if the model is wide enough."""
    layout = block.qkv.layout
    return isinstance(layout, cuda_gaps.GapLayout) and not layout.code_bits and layout.columns >= FEWEST_COLUMNS


def blocks(layers: Sequence[Any]) -> list[Block]:
    """Return the layers of `fused_step` as such blocks, or none if one of them cannot be, or eight launches are faster."""
    found = [Block.of(layer) for layer in layers]
    whole = [block for block in found if block is not None and (FIVE or pays(block))]
    return whole if len(whole) == len(found) else []


def through(all_blocks: Sequence[Block], x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Map the hidden states (b, d) before the blocks, which are overwritten, to those after. last: gain of the last norm."""
    gains = [block.norms[0][0] for block in all_blocks] + [last]
    scaled, squares = operations.begin(x, gains[0])
    for block, gain in zip(all_blocks, gains[1:], strict=True):
        scaled, squares = block(x, scaled, squares, gain)
    return x
