"""Decoding with sparse weights on a GPU: a layout computed on load, and y = W x in CUDA.

torch compiles cuda.cu on first use and caches it. `available` tells whether that works on this machine. The layout is
plain tensors; it can be packed and unpacked on any device.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from torch_impl import tiles

DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 8
"""Largest batch of one kernel call."""
# As in cuda.cu: a warp's shared memory besides panels, and the number of panels it loads ahead.
SCRATCH, BARRIERS, SLOTS = 512, 16, 2
# Panels start at multiples of this many bytes, as the copy engine requires.
PIECE = 16
# Warps per block if there are many blocks, and if all blocks run at once.
WARPS, MORE_WARPS = 8, 11
MOST_WARPS = 32


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that a launch depends on; the defaults are those of an H100 or H200."""

    processors: int = 132
    shared: int = 227 * 1024
    """Shared memory per block, in bytes."""
    early: bool = True
    """Whether a kernel may start before the previous one ends."""

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Card:
        """Return the properties of a GPU; for other devices the defaults."""
        if device.type != "cuda":
            return Card()
        properties: Any = torch.cuda.get_device_properties(device)
        # Older versions of torch do not report it: a block may use all but 1 KiB of a processor's shared memory.
        shared = getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_multiprocessor - 1024
        )
        return Card(properties.multi_processor_count, shared, properties.major >= 9)


@dataclass(frozen=True)
class Layout:
    """A sparse weight (rows, columns) as a GPU reads it: panels of 16 × 128, stored strip by strip of 16 rows.

    A panel is its bitmap and its values, as in tiles.py, padded to a multiple of 16 bytes.

    data (bytes,) uint8: the panels; starts (panels + 1,) int32: the start of each, in units of 16 bytes; panels: number per
    strip; slot: bytes of the largest panel; dtype: of the weight.
    """

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

    @functools.cached_property
    def pointers(self) -> list[ctypes.c_void_p]:
        """Return the tensors' addresses for the kernels; cached, because decoding makes thousands of calls a second."""
        return [ctypes.c_void_p(tensor.data_ptr()) for tensor in self.tensors().values()]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached pointers: a copy has other addresses."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


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
    if weight.is_cuda:
        # A kernel may read its weights before the previous kernel ends, so they must be complete.
        torch.cuda.current_stream(weight.device).synchronize()
    return layout


def unpack(layout: Layout) -> torch.Tensor:
    """Restore the dense weight (rows, columns), by a kernel if available, else by torch."""
    if layout.data.is_cuda and available()[0]:
        dense = torch.empty(layout.rows, layout.columns, dtype=layout.dtype, device=layout.data.device)
        _call("losa_expand", layout, dense, numbers=())
        return dense
    starts = layout.starts.long()
    bitmaps = layout.data[_map_places(starts)]
    values = layout.data.view(layout.dtype)[_value_places(starts, tiles.count(bitmaps))]
    return tiles.unpack_tiles(bitmaps, values, layout.rows, layout.columns)


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
    """Compute y (b, out) = x (b, in) · Wᵀ (+ bias) with float32 sums, rounded once; b from 1 to 8 on a GPU.

    x has the weight's dtype. On a GPU the call never synchronises, so a CUDA graph can capture it. On the CPU, or without
    kernels, the weight is unpacked first.
    """
    if x.dim() != 2 or x.shape[1] != layout.columns:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (b, {layout.columns})")
    if x.dtype != layout.dtype:
        raise TypeError(f"x has dtype {x.dtype}; allowed: {layout.dtype}, the weight's")
    if not (layout.data.is_cuda and available()[0]):
        wide = functional.linear(x.float(), unpack(layout).float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    if not 1 <= len(x) <= MOST_ROWS:
        raise ValueError(f"x has {len(x)} rows; allowed: 1 to {MOST_ROWS}")
    x = x.contiguous()
    y = x.new_empty(len(x), layout.rows)
    card = Card.of(x.device)
    share = _choose_share(layout.rows, layout.panels, card.processors)
    warps = -(-layout.panels // share)
    if warps > MOST_WARPS or warps * (SLOTS * layout.slot + BARRIERS + SCRATCH) > card.shared:
        # The rows are too long: a block's panels do not fit in shared memory.
        return functional.linear(x, unpack(layout), bias)
    numbers = (int(x.dtype == torch.float16), len(x), share, int(card.early))
    _call("losa_matvec", layout, x, bias, y, numbers=numbers)
    return y


def _choose_share(rows: int, panels: int, processors: int) -> int:
    """Choose how many panels of a strip one warp reads.

    Its lanes hold the panels' starts, the end of the last one, and SLOTS starts after it; that limits the number.
    """
    few = rows <= tiles.ROWS * 2 * processors
    return min(-(-panels // (MORE_WARPS if few else WARPS)), tiles.LANES - 1 - SLOTS)


def _call(name: str, layout: Layout, *tensors: torch.Tensor | None, numbers: tuple[int, ...]) -> None:
    """Launch a kernel on the current CUDA stream of the layout's device."""
    others = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]
    device = layout.data.device
    with torch.cuda.device(device):
        queue = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        shape = (layout.rows, layout.columns, layout.panels, layout.slot)
        error = getattr(_library(), name)(*layout.pointers, *others, *shape, *numbers, queue)
    if error:
        raise RuntimeError(f"{name} failed with CUDA error {error}")


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
def _library() -> Any:
    """Build and load the kernels. Errors: OSError or RuntimeError if there is no compiler."""
    from torch.utils import cpp_extension

    from torch_impl.decode.cpu import announce

    source = Path(__file__).with_name("cuda.cu")
    with warnings.catch_warnings():
        # torch warns that it builds only for the GPUs of this machine, which is intended.
        warnings.simplefilter("ignore")
        announce("losa_cuda_decode", source)
        path = cpp_extension.load("losa_cuda_decode", [str(source)], extra_cuda_cflags=["-O3"], is_python_module=False)
    return ctypes.CDLL(str(path))
