"""Decoding with sparse weights on a GPU: a layout computed on load, and y = W x in CUDA.

torch compiles the kernels, and cuda_operators.cpp that makes operators of torch of them, on first use and caches them. `available`
tells whether that works on this machine. The layout is plain tensors; it can be packed and unpacked on any device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional

from torch_impl import tiles
from torch_impl.decode.cuda_plan import (
    BARRIERS,
    MOST_SHARE,
    SCRATCH,
    SLOTS,
    Card,
    Division,
    choose_plan,
    choose_rows_plan,
)

DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 64
"""Up to this many rows of input, the kernels are faster than unpacking: 7B's shapes at 60 to 80 % zeros; at 50 % up to 48, 1B's up
to 48 (one H200, gpu_rows)."""
AT_ONCE = 32
"""Rows of input per reading of a weight: more than 8 by the kernel of cuda_rows.cu."""
GATED_WARPS = 16
"""Warps per block of the product that ends in SiLU(gate) · up: half of them multiply gate's rows, half up's."""
LAUNCH_FIRST = True
"""Whether a kernel of a fused block lets the next one load weights before it has its own input: 445 instead of 425 tokens/s for 7B
at 70 % (one H200, gpu_fused)."""
# Panels start at multiples of this many bytes, as the copy engine requires.
PIECE = 16
# The places in a plan: panels per warp, strips per block, panels per warp in a block with one strip and in one of gate and up.
SHARE, TOGETHER, ALONE, GATED = 5, 13, 14, 15


@dataclass(frozen=True)
class Layout:
    """A sparse weight (rows, columns) as a GPU reads it: panels of 16 × 128, stored strip by strip of 16 rows.

    A panel is its bitmap and its values, as in tiles.py, padded to a multiple of 16 bytes.

    data (bytes,) uint8: the panels; starts (panels + 1,) int32: the start of each, in units of 16 bytes; panels: number per
    strip; slot: bytes of the largest panel; dtype: of the weight.
    """

    TABLE: ClassVar[int] = 0
    """Bytes of a block's shared memory besides its warps'."""
    PANEL: ClassVar[int] = tiles.COLUMNS
    """Columns of a panel."""
    MOST_ROWS: ClassVar[int] = MOST_ROWS
    """Up to this many rows of input, the kernels are faster than unpacking."""
    rows: int
    columns: int
    panels: int
    slot: int
    dtype: torch.dtype
    data: torch.Tensor
    starts: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def code_bits(self) -> int:
        """Return the bits of a code in the panels; 0 for values."""
        return 0

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Restore the dense weight (rows, columns) by torch, rounded once."""
        starts = self.starts.long()
        bitmaps = self.data[_map_places(starts)]
        values = self.data.view(self.dtype)[_value_places(starts, tiles.count(bitmaps))]
        return tiles.unpack_tiles(bitmaps, values, self.rows, self.columns).to(dtype)

    @functools.cached_property
    def plan(self) -> list[int]:
        """Return the numbers that the operators need, `Plan` of cuda_operators.cpp, computed once."""
        card = Card.of(self.data.device)
        fitting = (card.shared - self.TABLE) // (self.shared(1) - self.TABLE)
        few = choose_plan(self.rows, self.panels, self.PANEL, fitting, card.processors)
        # Not measured in blocks with one strip: eight warps, as before.
        alone = few.share if few.groups <= 1 else -(-self.panels // 8)
        shape = (self.rows, self.columns, self.panels, self.slot)
        rows_plan = Division(0, 0, 0) if self.code_bits else choose_rows_plan(self.rows, self.panels, self.slot, card)
        early = card.early + (card.early and LAUNCH_FIRST)
        numbers = (int(self.dtype == torch.float16), few.share, early, self.MOST_ROWS, self.code_bits, AT_ONCE)
        return [*shape, *numbers, *rows_plan, few.groups, alone, self._gated_share(card.shared), 0]

    def shared(self, warps: int) -> int:
        """Return the shared memory of a block of warps of cuda_decode.h, in bytes."""
        return self.TABLE + warps * (SLOTS * self.slot + BARRIERS + SCRATCH)

    def ends(self, halves: bool, read: int, rows: int) -> bool:
        """Return whether a block can multiply so many rows by a strip, or by one of each half, and hold `read` more bytes."""
        share = self.plan[GATED if halves else ALONE]
        if not share:
            return False
        # A thread for each number of a strip.
        warps = max(-(-self.panels // share) << halves, -(-rows * tiles.ROWS // tiles.LANES))
        return self.shared(warps) + read <= Card.of(self.data.device).shared

    def _gated_share(self, most: int) -> int:
        """Choose how many panels one warp reads if half of the rows are a gate's; 0 if that is impossible."""
        if self.rows % (2 * tiles.ROWS):
            return 0
        fitting = (most - squares_bytes(self.columns)) // self.shared(2)
        warps = min(GATED_WARPS // 2, fitting, self.panels)
        share = -(-self.panels // warps) if warps > 0 else tiles.LANES
        return share if share <= MOST_SHARE else 0

    @functools.cached_property
    def product(self) -> Any:
        """Return the operator that multiplies with the weight, or None without kernels; looked up once."""
        usable = self.data.is_cuda and available()[0]
        return torch.ops.losa_cuda_decode.linear.default if usable else None

    def stacked(self, others: Sequence[Layout]) -> Layout | None:
        """Return the rows of layouts of this kind below each other, or None as `stack`."""
        layouts, offset, starts = [self, *others], 0, [self.starts[:1]]
        if any(layout.rows % tiles.ROWS for layout in layouts[:-1]):
            return None
        for layout in layouts:
            starts.append(layout.starts[1:] + offset)
            offset += len(layout.data) // PIECE
        data = torch.cat([layout.data for layout in layouts])
        rows, slot = sum(layout.rows for layout in layouts), max(layout.slot for layout in layouts)
        complete(data)
        return replace(self, rows=rows, slot=slot, data=data, starts=torch.cat(starts))

    def part(self, start: int, rows: int) -> Layout | None:
        """Return some rows as a layout that shares the data, or None if they are not whole strips of panels."""
        if start % tiles.ROWS or rows % tiles.ROWS:
            return None
        first, last = (row // tiles.ROWS * self.panels for row in (start, start + rows))
        return replace(self, rows=rows, starts=self.starts[first : last + 1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is cached: a copy may be on another device."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def squares_bytes(columns: int) -> int:
    """Return the shared memory for the sums of squares of eight rows, and what they make, in bytes."""
    return 4 * 8 * (-(-columns // tiles.ROWS) + 1)


def pack_rows(weight: torch.Tensor) -> Layout:
    """Pack a weight (out, in) in bf16 or fp16, on its device; zeros of either sign are left out.

    Errors: TypeError for another dtype.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}; allowed: bfloat16 or float16")
    rows, columns = weight.shape
    bitmaps, values = tiles.pack_tiles(weight.detach())
    counts = tiles.count(bitmaps)
    starts = functional.pad((-(-(tiles.MAP + 2 * counts) // PIECE)).cumsum(0), (1, 0))
    data = torch.zeros(int(starts[-1]) * PIECE, dtype=torch.uint8, device=weight.device)
    data[_map_places(starts)] = bitmaps
    data.view(torch.int16)[_value_places(starts, counts)] = values.view(torch.int16)
    slot = int(starts.diff().max()) * PIECE
    layout = Layout(rows, columns, -(-columns // tiles.COLUMNS), slot, weight.dtype, data, starts.to(torch.int32))
    complete(data)
    return layout


def complete(data: torch.Tensor) -> None:
    """Wait for a layout's data: a kernel may read its weights before the previous kernel ends."""
    if data.is_cuda:
        torch.cuda.current_stream(data.device).synchronize()


def stack(layouts: Sequence[Layout]) -> Layout | None:
    """Stack the rows of layouts of one kind, or return None if one that is not the last ends within a strip of panels."""
    return layouts[0].stacked(layouts[1:])


def unpack(layout: Layout) -> torch.Tensor:
    """Restore the dense weight (rows, columns), by a kernel if available, else by torch."""
    if layout.product is not None:
        dense: torch.Tensor = torch.ops.losa_cuda_decode.expand(layout.data, layout.starts, layout.plan)
        return dense
    return layout.expanded(layout.dtype)


def _map_places(starts: torch.Tensor) -> torch.Tensor:
    """Return the positions (panels, 256) of the bitmap bytes in the data; starts int64."""
    return PIECE * starts[:-1, None] + torch.arange(tiles.MAP, device=starts.device)


def _value_places(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the positions (kept,) of the 16-bit values in the data, after each panel's bitmap; starts, counts int64."""
    first = (PIECE * starts[:-1] + tiles.MAP) // 2 - (counts.cumsum(0) - counts)
    places = torch.repeat_interleave(first, counts)
    places += torch.arange(len(places), device=places.device)
    return places


def matvec(layout: Layout, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute y (..., out) = x (..., in) · Wᵀ (+ bias) with float32 sums, rounded once.

    x has the weight's dtype. On a GPU the call never synchronises, so a CUDA graph can capture it. For more rows
    than the layout's MOST_ROWS, on the CPU, or without kernels, the weight is unpacked first.
    """
    if layout.product is not None:
        y: torch.Tensor = layout.product(x, layout.data, layout.starts, layout.plan, bias)
        return y
    if x.dim() < 1 or x.shape[-1] != layout.columns:
        raise ValueError(f"x has shape {list(x.shape)}; allowed: [..., {layout.columns}]")
    if x.dtype != layout.dtype:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {layout.dtype}, the weight's")
    with torch.no_grad():
        wide = functional.linear(x.float(), layout.expanded(torch.float32), None if bias is None else bias.float())
        return wide.to(x.dtype)


def matvec_parts(
    layout: Layout, x: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]
) -> Sequence[torch.Tensor]:
    """Compute `matvec` of several weights stacked in one layout: y (..., size) of each."""
    if layout.product is not None:
        parts: list[torch.Tensor] = torch.ops.losa_cuda_decode.linear_parts.default(
            x, layout.data, layout.starts, layout.plan, bias, sizes
        )
        return parts
    return matvec(layout, x, bias).split(sizes, -1)


@functools.cache
def available() -> tuple[bool, str]:
    """Return (whether the kernels run on this machine, otherwise why not in one line); build them on the first call."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.cuda.get_device_capability()[0] < 8:
        return False, "the GPU is older than compute capability 8.0"
    try:
        _library()
    except (OSError, RuntimeError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        return False, f"cuda.cu cannot be built: {reason.strip()[:200]}"
    return True, ""


@functools.cache
def _library() -> None:
    """Build the kernels and load their operators. Errors: OSError or RuntimeError if there is no compiler."""
    from torch.utils import cpp_extension

    from torch_impl.decode.cpu import announce

    names = ("cuda.cu", "cuda_rows.cu", "cuda_coded.cu", "cuda_gaps.cu", "cuda_coded_gaps.cu", "cuda_operators.cpp")
    sources = [Path(__file__).with_name(name) for name in names]
    with warnings.catch_warnings():
        # torch warns that it builds only for the GPUs of this machine, which is intended.
        warnings.simplefilter("ignore")
        announce("losa_cuda_decode", *sources)
        cpp_extension.load(
            "losa_cuda_decode",
            [str(source) for source in sources],
            extra_cflags=["-O2"],
            extra_cuda_cflags=["-O3"],
            is_python_module=False,
        )
    torch.library.register_fake("losa_cuda_decode::linear", _shape)


def _shape(
    x: torch.Tensor, data: torch.Tensor, starts: torch.Tensor, plan: list[int], bias: torch.Tensor | None
) -> torch.Tensor:
    """Return an empty y, for torch.compile."""
    return x.new_empty(*x.shape[:-1], plan[0])
