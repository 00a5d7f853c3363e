"""Decoding with sparse weights on a GPU: a layout made on load, and y = W x by hand-written CUDA.

It is compiled on first use (cuda.cu), by torch's own builder into its cache. `available` says whether that works
here; the layout itself is plain tensors, made and unpacked on any device.
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
"""Largest batch that the kernels take at once."""
# As in cuda.cu: what a warp takes of shared memory beside panels, and how many panels it has on their way.
SCRATCH, BARRIERS, SLOTS = 512, 16, 2
# Panels begin at multiples of so many bytes, as the copy engine wants it.
PIECE = 16
# Warps of a block, where blocks are many, and where all are there at once.
WARPS, MORE_WARPS = 8, 11
MOST_WARPS = 32


@dataclass(frozen=True)
class Card:
    """What a launch depends on: by default an H100's or H200's."""

    processors: int = 132
    shared: int = 227 * 1024
    """Bytes of shared memory that one block may have."""
    early: bool = True
    """Whether a kernel may begin before the last one ends."""

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Card:
        """That of a GPU; elsewhere the default."""
        if device.type != "cuda":
            return Card()
        properties: Any = torch.cuda.get_device_properties(device)
        # Older versions of torch do not tell; all but a kilobyte of a processor's is what a block may have.
        shared = getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_multiprocessor - 1024
        )
        return Card(properties.multi_processor_count, shared, properties.major >= 9)


@dataclass(frozen=True)
class Layout:
    """A sparse weight (rows, columns) as a GPU reads it: panels of 16 rows by 128 columns, a strip of 16 rows after the other.

    A panel is its bitmap and its values as tiles.py makes them, filled up to a multiple of 16 bytes.

    data (bytes,) uint8: the panels; starts (panels + 1,) int32: where each begins, in pieces of 16 bytes; panels: of a strip;
    slot: bytes of the largest panel; dtype: of the weight.
    """

    rows: int
    columns: int
    panels: int
    slot: int
    dtype: torch.dtype
    data: torch.Tensor
    starts: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @functools.cached_property
    def pointers(self) -> list[ctypes.c_void_p]:
        """Where the tensors are, as the kernels are told: decoding makes thousands of calls a second."""
        return [ctypes.c_void_p(tensor.data_ptr()) for tensor in self.tensors().values()]

    def __getstate__(self) -> dict[str, Any]:
        """A copy has pointers of its own."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def pack_rows(weight: torch.Tensor) -> Layout:
    """The layout of a weight (out, in) in bf16 or fp16, on its device; zeros of either sign are left out.

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
        # A kernel may read its weights before the one before it has ended, so they must be there.
        torch.cuda.current_stream(weight.device).synchronize()
    return layout


def unpack(layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns): by a kernel where there is one, else in torch."""
    if layout.data.is_cuda and available()[0]:
        dense = torch.empty(layout.rows, layout.columns, dtype=layout.dtype, device=layout.data.device)
        _call("losa_expand", layout, dense, numbers=())
        return dense
    starts = layout.starts.long()
    bitmaps = layout.data[_map_places(starts)]
    values = layout.data.view(layout.dtype)[_value_places(starts, tiles.count(bitmaps))]
    return tiles.unpack_tiles(bitmaps, values, layout.rows, layout.columns)


def _map_places(starts: torch.Tensor) -> torch.Tensor:
    """(panels, 256) bytes of the data that are bitmaps; starts int64."""
    return PIECE * starts[:-1, None] + torch.arange(tiles.MAP, device=starts.device)


def _value_places(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(kept,) 16-bit numbers of the data that are values, behind each panel's bitmap; starts and counts int64."""
    first = (PIECE * starts[:-1] + tiles.MAP) // 2 - (counts.cumsum(0) - counts)
    places = torch.repeat_interleave(first, counts)
    places += torch.arange(len(places), device=places.device)
    return places


def matvec(layout: Layout, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y (b, out) = x (b, in) · Wᵀ (+ bias), sums in float32, rounded once; b from 1 to 8 on a GPU.

    On a GPU it can be captured in a CUDA graph: it waits for nothing. On the CPU, and on a GPU without the kernels, the
    weight is unpacked. x has the weight's dtype. Errors: ValueError or TypeError naming the argument.
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
        # Rows so long that a block's panels do not fit.
        return functional.linear(x, unpack(layout), bias)
    numbers = (int(x.dtype == torch.float16), len(x), share, int(card.early))
    _call("losa_matvec", layout, x, bias, y, numbers=numbers)
    return y


def _choose_share(rows: int, panels: int, processors: int) -> int:
    """Panels of a strip that a warp takes, at most as many as it has lanes to keep where they begin, where the last one ends,
    and what is asked for behind it."""
    few = rows <= tiles.ROWS * 2 * processors
    return min(-(-panels // (MORE_WARPS if few else WARPS)), tiles.LANES - 1 - SLOTS)


def _call(name: str, layout: Layout, *tensors: torch.Tensor | None, numbers: tuple[int, ...]) -> None:
    """Launch on the current stream of the layout's device."""
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
    """(whether the kernels run here, else why not in one line); builds them on the first call."""
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
    """The compiled kernels. Errors: OSError or RuntimeError if there is no compiler."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("cuda.cu")
    with warnings.catch_warnings():
        # Which cards to build for: those that are there.
        warnings.simplefilter("ignore")
        path = cpp_extension.load("losa_cuda_decode", [str(source)], extra_cuda_cflags=["-O3"], is_python_module=False)
    return ctypes.CDLL(str(path))
