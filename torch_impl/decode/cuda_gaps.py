"""Decoding with sparse values and gaps on a GPU: the layout of cuda_gaps.cu, computed on load. The product is `cuda.matvec`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch.nn import functional

from torch_impl import gaps
from torch_impl.decode import cuda
from torch_impl.decode.cuda_plan import MOST_PARTS, Card, choose_parts, choose_together, gaps_kernel_bytes

# As in cuda_gaps.h: bytes of a group's gaps, after its values, and of a group of values.
NIBBLES = gaps.LANES * gaps.ENTRIES // 2
GROUP = 2 * gaps.LANES * gaps.ENTRIES + NIBBLES
HALF = gaps.ENTRIES // 2
MOST_COLUMNS = 2**16
"""A part's first column has 16 bits."""


@dataclass(frozen=True)
class GapLayout(cuda.Layout):
    """A sparse weight (rows, columns) as a GPU reads it: each row's values and gaps (gaps.py), in strips of 32 rows.

    A panel is a part of a strip, some of its groups: what one warp multiplies.

    data: the groups, each its values, lane by lane, and then its gaps: four bytes a lane, byte j with that of entry j in its
    lower half and of entry 4 + j in its upper one. starts int32: the first group of each part (strips * panels + 1), the row
    of each lane of each strip (rows), the column that each lane has reached before each part (strips, panels, 32) in 16 bits.
    slot: bytes of a group; sizes: rows of the weights that are stacked, each with its own order; paired: whether the second half
    of the strips has the rows of the first, half of all rows further on, as gate and up must.
    """

    PANEL: ClassVar[int] = gaps.ENTRIES
    MOST_ROWS: ClassVar[int] = 8
    sizes: tuple[int, ...] = ()
    paired: bool = False

    @property
    def strips(self) -> int:
        """Return the number of strips."""
        return -(-self.rows // gaps.LANES)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return values, gaps, starts and order as `gaps.pack_gaps` does."""
        starts, order, *_ = self._index()
        groups = self.data.view(-1, self.slot)[int(starts[0]) : int(starts[-1])]
        values = self._values(groups[:, :-NIBBLES].contiguous()).view(-1, gaps.LANES, gaps.ENTRIES)
        return values, _read_gaps(groups), (starts - starts[0])[:: self.panels].long(), order.long()

    def _values(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the values of groups by their bytes."""
        return stored.view(self.dtype)

    def _index(self) -> Sequence[torch.Tensor]:
        """Return the parts of `starts`."""
        panels = self.strips * self.panels
        return self.starts.split([panels + 1, self.rows, panels * gaps.LANES // 2])

    def shared(self, warps: int, rows: int = 1) -> int:
        """Return the shared memory of a block of warps in bytes, for so many rows of x."""
        return gaps_kernel_bytes(self.columns, warps, rows)

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Restore the dense weight (rows, columns) by torch, rounded once."""
        return gaps.unpack_gaps(*self.parts(), self.rows, self.columns).to(dtype)

    @functools.cached_property
    def plan(self) -> list[int]:
        """Return the numbers that the operators need, `Plan` of cuda_operators.cpp, computed once."""
        card = Card.of(self.data.device)
        together = choose_together(self.rows, self.panels, card.processors)
        warps = self.panels * together
        fitting = [rows for rows in (8, 4, 2, 1) if self.shared(warps, rows) <= card.shared]
        shape = (self.rows, self.columns, self.panels, self.slot, int(self.dtype == torch.float16))
        early = card.early + (card.early and cuda.LAUNCH_FIRST)
        at_once = max(fitting, default=0)
        endings = 1, int(self.paired and 2 * self.panels <= MOST_PARTS)
        return [
            *shape,
            int(at_once > 0),
            early,
            self.MOST_ROWS,
            self.code_bits,
            at_once,
            0,
            0,
            0,
            together,
            *endings,
            1,
        ]

    def ends(self, halves: bool, read: int, rows: int) -> bool:
        """Return whether a block can multiply so many rows by a strip, or by one of each half, and hold `read` more bytes."""
        at_once = next(count for count in (1, 2, 4, 8) if count >= rows)
        shared = self.shared(self.panels << halves, at_once) + read
        return bool(self.plan[cuda.GATED if halves else cuda.ALONE]) and shared <= Card.of(self.data.device).shared

    def stacked(self, others: Sequence[cuda.Layout]) -> cuda.Layout | None:
        """Return the rows of layouts of this kind below each other, or None if one but the last ends within a strip."""
        layouts = [own for own in (self, *others) if isinstance(own, GapLayout)]
        if any(own.rows % gaps.LANES for own in layouts[:-1]):
            return None
        starts, order, scales, groups, rows = [self.starts.new_zeros(1)], [], [], 0, 0
        for own in layouts:
            own_starts, own_order, _, *rest = own._index()
            starts.append(own_starts[own.panels :: own.panels] + groups)
            order.append(own_order + rows)
            scales += rest
            groups += len(own.data) // own.slot
            rows += own.rows
        sizes = tuple(size for own in layouts for size in own.sizes)
        joined = replace(self, rows=rows, data=torch.cat([own.data for own in layouts]), sizes=sizes)
        return indexed(joined, torch.cat(starts), torch.cat(order), scales)

    def part(self, start: int, rows: int) -> cuda.Layout | None:
        """Return some rows as a layout that shares the data, or None if they are not whole strips of whole weights."""
        ends = [sum(self.sizes[:count]) for count in range(len(self.sizes) + 1)]
        if start not in ends or start + rows not in ends or start % gaps.LANES:
            return None
        first, last = start // gaps.LANES, -(-(start + rows) // gaps.LANES)
        starts, order, *of_strips = self._index()
        own = (
            starts[first * self.panels : last * self.panels + 1],
            order[start : start + rows] - start,
            *(tensor.view(self.strips, -1)[first:last] for tensor in of_strips),
        )
        sizes = self.sizes[ends.index(start) : ends.index(start + rows)]
        return replace(
            self, rows=rows, starts=torch.cat([tensor.flatten() for tensor in own]), sizes=sizes, paired=False
        )


def pack_gaps_rows(weight: torch.Tensor, parts: int | None = None) -> GapLayout:
    """Pack a weight (out, in) in bf16 or fp16, on its device; zeros of either sign are left out.

    parts: of a strip; default: as suits the device (cuda_plan.py). Errors: TypeError for another dtype.
    """
    if weight.dtype not in cuda.DTYPES:
        raise TypeError(f"weight has dtype {weight.dtype}; allowed: bfloat16 or float16")
    values, own, starts, order = gaps.pack_gaps(weight.detach())
    rows, columns = weight.shape
    data = torch.cat([values.flatten(1).view(torch.uint8), join_gaps(own)], 1).flatten()
    layout = GapLayout(rows, columns, 0, GROUP, weight.dtype, data, starts, (rows,))
    return indexed(layout, starts.int(), order.int(), (), parts)


Kind = TypeVar("Kind", bound=GapLayout)


def indexed(
    layout: Kind,
    starts: torch.Tensor,
    order: torch.Tensor,
    scales: Sequence[torch.Tensor],
    parts: int | None = None,
) -> Kind:
    """Divide a layout, of which only `panels` and `starts` are not set, into parts. Waits for its data.

    starts: the first group of each strip, and the end; order: as `gaps.pack_gaps`; both int32. scales: int32, of each strip.
    """
    columns, data = layout.columns, layout.data
    if parts is None:
        parts = choose_parts(len(order), columns, Card.of(data.device).processors)
    if columns > MOST_COLUMNS:
        parts = 1
    strips = starts.diff()[:, None]
    first = (starts[:-1, None] + strips * torch.arange(parts, device=data.device) // parts).flatten()
    first = torch.cat([first, starts[-1:]]).int()
    together = torch.cat([first, order, _columns_before(data.view(-1, layout.slot), first, parts), *scales])
    cuda.complete(data)
    half = len(order) // 2
    paired = len(order) % (2 * gaps.LANES) == 0 and torch.equal(order[:half] + half, order[half:])
    return replace(layout, panels=parts, starts=together, paired=paired)


def join_gaps(own: torch.Tensor) -> torch.Tensor:
    """Return bytes of numbers of 4 bits (groups, 32, 8): byte j has number j in its lower half, number 4 + j in its upper one."""
    return (own[..., :HALF] | own[..., HALF:] << 4).flatten(1)


def _columns_before(groups: torch.Tensor, first: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the column that each lane has reached before each part, two numbers of 16 bits in each int32."""
    reached = functional.pad(_read_gaps(groups).sum(-1).cumsum(0), (0, 0, 1, 0))[first[:-1]]
    reached = reached.view(-1, parts, gaps.LANES)
    return (reached - reached[:, :1]).to(torch.int16).flatten().view(torch.int32)


def _read_gaps(groups: torch.Tensor) -> torch.Tensor:
    """Return the gaps (groups, 32, 8) of groups of bytes."""
    return split_gaps(groups[:, -NIBBLES:])


def split_gaps(stored: torch.Tensor) -> torch.Tensor:
    """Undo `join_gaps`."""
    pairs = stored.view(-1, gaps.LANES, HALF)
    return torch.cat([pairs & 15, pairs >> 4], -1)
