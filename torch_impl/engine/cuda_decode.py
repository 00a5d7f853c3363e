"""Decoding with sparse weights on a GPU: a layout made on load, and y = W x by hand-written CUDA.

It is compiled on first use (cuda_decode.cu), by torch's own builder into its cache. `available` says whether that works
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

from torch_impl import gaps

LANES = 32
GAP_BITS = (2, 3, 4)
DTYPES = (torch.bfloat16, torch.float16)
MOST_ROWS = 8
"""Largest batch that the kernels take at once."""
# Shared memory that every block takes beside what it asks for.
SHARED_OF_BLOCK = 1024
# Two bytes of x for every column of two, four or eight rows at once.
BATCHES = (8, 4, 2, 1)
# Chunks that lie together in memory, so that one copy brings values and codes.
GROUP = 16
# As in cuda_layout.cuh and cuda_decode.cu: chunks of one copy, and copies that a warp has on their way, for up to two rows of
# x and for more; bytes of the barrier that counts one in.
PIECE = 64
PIECES, FEW_PIECES = 4, 2
BARRIER = 8


@dataclass(frozen=True)
class Card:
    """What a launch depends on: by default an H100's or H200's."""

    processors: int = 132
    shared: int = 227 * 1024
    """Bytes of shared memory that one block may have."""
    shared_of_processor: int = 228 * 1024
    early: bool = True
    """Whether a kernel may begin before the last one ends."""

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Card:
        """That of a GPU; elsewhere the default."""
        if device.type != "cuda":
            return Card()
        properties: Any = torch.cuda.get_device_properties(device)
        of_processor = properties.shared_memory_per_multiprocessor
        # Older versions of torch do not tell; it is all but what every block takes.
        shared = getattr(properties, "shared_memory_per_block_optin", of_processor - SHARED_OF_BLOCK)
        return Card(properties.multi_processor_count, shared, of_processor, properties.major >= 9)


@dataclass(frozen=True)
class Layout:
    """A sparse weight (rows, columns) as a GPU reads it.

    A task is 32 rows by one of `segments` segments of columns; each of its 32 lanes follows one stream of
    `gaps.pack_gaps`. A task's chunks are stored step by step: chunk k of every lane that has one, lane by lane, so that
    what a warp loads is one piece of memory.

    data (groups, bytes) uint8: 16 chunks in the order above, first all values, then bits 0-15 of all codes of a chunk side
    by side (0-31 with four bits each), then bits 16-23 (with three bits each); counts (tasks, 32) uint8: chunks of each
    lane; bases (tasks + 1,) int32: a task's first chunk, and where the last one's end. dtype: of the weight.
    """

    rows: int
    columns: int
    segment: int
    segments: int
    gap_bits: int
    dtype: torch.dtype
    data: torch.Tensor
    counts: torch.Tensor
    bases: torch.Tensor

    @staticmethod
    def group_bytes(gap_bits: int) -> tuple[int, int, int]:
        """Bytes of a group's parts: (values, low bits of the codes, high bits)."""
        return 16 * GROUP, GROUP * (4 if gap_bits == 4 else 2), GROUP * (gap_bits == 3)

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


def _choose_bits(weight: torch.Tensor) -> int:
    """Bits of a code that make the layout smallest, within 2 %, by the gaps of some rows; three, split in memory, are slowest."""
    rows = weight[:: max(1, len(weight) // 64)]
    sizes = {bits: len(gaps.pack_gaps(rows, weight.shape[1], bits)[0]) * (16 + bits) for bits in GAP_BITS}
    return next(bits for bits in (2, 4, 3) if sizes[bits] <= 1.02 * min(sizes.values()))


def _room(rows: int, card: Card) -> int:
    """Bytes of shared memory that let as many blocks of 32 rows share a processor as should: two kernels' where one has a
    block a processor, else one kernel's, evenly."""
    each = -(-rows // (LANES * card.processors))
    together = 2 if each == 1 else each if each <= 4 else 3
    return min(card.shared, card.shared_of_processor // together - SHARED_OF_BLOCK)


def _choose_segments(rows: int, columns: int, gap_bits: int, card: Card) -> int:
    """Columns of a segment. A block has a warp for every segment, as many as fit, but not so many that rows are in shreds.

    With all blocks on the card at once, none waits; with one of the next kernel beside one of this, that one's weights
    come while this one ends. More beside each other would be dealt out unevenly.
    """
    few = 2 * -(-rows // LANES) <= card.processors
    room = card.shared if few else _room(rows, card)
    # Room for two rows of x, and a little more, since segments are rounded up.
    warps = min((room - 4 * columns - 1024) // _feed(gap_bits, 2), columns // (128 if few else 192), 32)
    # A lane counts its chunks in a byte, so long rows take more warps.
    segment = -(-columns // max(warps, -(-columns // (8 * 248)), 1))
    return max(-(-segment // 8) * 8, 8)


def pack_rows(weight: torch.Tensor, segment: int | None = None, gap_bits: int | None = None) -> Layout:
    """The layout of a weight (out, in) in bf16 or fp16, on its device; zeros of either sign are left out.

    segment, gap_bits: set for tests; else what is fastest and smallest. Errors: TypeError for another dtype.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}; allowed: bfloat16 or float16")
    weight = weight.detach()
    rows, columns = weight.shape
    gap_bits = _choose_bits(weight) if gap_bits is None else gap_bits
    if segment is None:
        segment = _choose_segments(rows, columns, gap_bits, Card.of(weight.device))
    values, codes, chunks = gaps.pack_gaps(weight, segment, gap_bits)
    counts = chunks.new_zeros(-(-rows // LANES) * LANES, chunks.shape[1])
    counts[:rows] = chunks
    # Up to 32 rows, reshaping alone would leave it transposed in memory.
    counts = counts.view(-1, LANES, chunks.shape[1]).transpose(1, 2).reshape(-1, LANES).contiguous()
    order = _order(counts, rows, chunks)
    shifts = gap_bits * torch.arange(gaps.CHUNK, device=weight.device)
    words = (codes.view(-1, gaps.CHUNK)[order].long() << shifts).sum(1)
    unused = -len(order) % GROUP
    words = functional.pad(words, (0, unused))
    parts = [
        functional.pad(values.view(-1, gaps.CHUNK)[order], (0, 0, 0, unused)).view(torch.uint8),
        words.to(torch.int32 if gap_bits == 4 else torch.int16)[:, None].view(torch.uint8),
        (words >> 16).to(torch.uint8)[:, None] if gap_bits == 3 else words.new_zeros(len(words), 0, dtype=torch.uint8),
    ]
    layout = Layout(
        rows,
        columns,
        segment,
        chunks.shape[1],
        gap_bits,
        weight.dtype,
        torch.cat([part.reshape(len(words) // GROUP, GROUP * part.shape[1]) for part in parts], 1),
        counts.to(torch.uint8),
        functional.pad(counts.sum(1).cumsum(0), (1, 0)).to(torch.int32),
    )
    if weight.is_cuda:
        # A kernel may read its weights before the one before it has ended, so they must be there.
        torch.cuda.current_stream(weight.device).synchronize()
    return layout


def _order(counts: torch.Tensor, rows: int, chunks: torch.Tensor) -> torch.Tensor:
    """For every stored chunk its number among those of `gaps.pack_gaps`; counts (tasks, 32), chunks (rows, segments)."""
    steps = torch.arange(int(counts.max()), device=counts.device)
    task, step, lane = torch.nonzero(steps[None, :, None] < counts[:, None, :], as_tuple=True)
    segments = chunks.shape[1]
    stream = (task // segments * LANES + lane) * segments + task % segments
    first = chunks.flatten().cumsum(0) - chunks.flatten()
    return first[stream] + step


def unpack(layout: Layout) -> torch.Tensor:
    """The dense weight (rows, columns): by a kernel where there is one, else in torch."""
    if layout.data.is_cuda and available()[0]:
        dense = torch.zeros(layout.rows, layout.columns, dtype=layout.dtype, device=layout.data.device)
        _call("losa_expand", layout, dense, numbers=(layout.gap_bits,))
        return dense
    counts = layout.counts.long().view(-1, layout.segments, LANES).transpose(1, 2).reshape(-1, layout.segments)
    chunks = counts[: layout.rows].contiguous()
    order = _order(layout.counts.long(), layout.rows, chunks)
    stored, words = (part[: len(order)] for part in stored_chunks(layout))
    shifts = layout.gap_bits * torch.arange(gaps.CHUNK, device=words.device)
    codes = (words[:, None] >> shifts & (2**layout.gap_bits - 1)).to(torch.uint8)
    values = torch.empty_like(stored)
    values[order] = stored
    placed = torch.empty_like(codes)
    placed[order] = codes
    return gaps.unpack_gaps(values.flatten(), placed.flatten(), chunks, layout.columns, layout.segment)


def stored_chunks(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """All chunks in the order of memory: values (chunks, 8), codes of a chunk side by side (chunks,) int64."""
    values, low, high = layout.data.split(Layout.group_bytes(layout.gap_bits), 1)
    words = low.contiguous().view(torch.int32 if layout.gap_bits == 4 else torch.int16).flatten().long()
    words &= 0xFFFFFFFF if layout.gap_bits == 4 else 0xFFFF
    if layout.gap_bits == 3:
        words |= high.flatten().long() << 16
    return values.contiguous().view(layout.dtype).view(-1, gaps.CHUNK), words


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
    half = int(x.dtype == torch.float16)
    most = next((b for b in BATCHES if _shared(layout.segment, layout.segments, layout.gap_bits, b) <= card.shared), 0)
    if not most:
        # Rows so long that not even one fits beside the weights on their way.
        return functional.linear(x, unpack(layout), bias)
    for first in range(0, len(x), most):
        part = x[first : first + most]
        numbers = (layout.gap_bits, half, len(part), _room(layout.rows, card), int(card.early))
        _call("losa_matvec", layout, part, bias, y[first : first + most], numbers=numbers)
    return y


def _feed(gap_bits: int, batch: int) -> int:
    """Bytes of shared memory that a warp takes for chunks on their way."""
    pieces = PIECES if batch <= 2 else FEW_PIECES
    return pieces * (PIECE // GROUP * sum(Layout.group_bytes(gap_bits)) + BARRIER)


def _shared(segment: int, segments: int, gap_bits: int, batch: int) -> int:
    """Bytes of shared memory that a block takes for so many rows of x and for chunks on their way."""
    numbers = 2 * batch * (segments * segment + 2 * gaps.CHUNK)
    return segments * _feed(gap_bits, batch) + max(numbers, 4 * batch * segments * LANES)


def _call(name: str, layout: Layout, *tensors: torch.Tensor | None, numbers: tuple[int, ...]) -> None:
    """Launch on the current stream of the layout's device."""
    others = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]
    device = layout.data.device
    with torch.cuda.device(device):
        queue = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        shape = (layout.rows, layout.columns, layout.segment, layout.segments)
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
        return False, f"cuda_decode.cu cannot be built: {reason.strip()[:200]}"
    return True, ""


@functools.cache
def _library() -> Any:
    """The compiled kernels. Errors: OSError or RuntimeError if there is no compiler."""
    from torch.utils import cpp_extension

    source = Path(__file__).with_name("cuda_decode.cu")
    with warnings.catch_warnings():
        # Which cards to build for: those that are there.
        warnings.simplefilter("ignore")
        path = cpp_extension.load("losa_cuda_decode", [str(source)], extra_cuda_cflags=["-O3"], is_python_module=False)
    return ctypes.CDLL(str(path))
