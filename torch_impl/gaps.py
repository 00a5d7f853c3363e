"""A sparse matrix as its kept values and the gaps between them, a row for each lane of a warp. Spec: reference/gaps.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_impl import _checks

LANES = 32
"""Rows of a strip, one for each lane of a warp."""
ENTRIES = 8
"""Entries of a row in a group, which a lane reads at once."""
MOST_GAP = 15
"""The largest gap: 4 bits."""
QUAD = 4
"""Entries of a row that lie in one section, if there are sections."""
SLAB = 2**24
"""About so many weights at a time, for each of which some 64 bytes of memory are needed if it is kept."""


def pack_gaps(
    weight: torch.Tensor, section: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack weight (out, in) into (values (groups, 32, 8), gaps (groups, 32, 8) uint8, starts (strips + 1,), order (out,))."""
    weight = _checks.tensor("weight", weight, "out", "in").contiguous()
    if section is not None:
        _checks.integer("section", section, 1)
    rows = len(weight)
    lengths = torch.cat([slab[1] for slab in _slabs(weight, section)])
    order = lengths.argsort(descending=True, stable=True)
    starts, plain = _starts(lengths[order]), _starts(lengths)
    if 32 * int(plain[-1]) <= 33 * int(starts[-1]):
        starts, order = plain, torch.arange(rows, device=weight.device)
    position = torch.empty_like(order)
    position[order] = torch.arange(rows, device=weight.device)
    # Row r begins at entry first[r] of all, its next group LANES * ENTRIES entries on.
    first = (starts[position // LANES] * LANES + position % LANES) * ENTRIES
    groups = int(starts[-1])
    values = weight.new_zeros(groups * LANES * ENTRIES)
    gaps = _fillers(lengths[order], starts).flatten()
    for top, _, kept, row, number, gap in _slabs(weight, section):
        place = first[top:][row] + number // ENTRIES * (LANES * ENTRIES) + number % ENTRIES
        values[place[: len(kept)]] = weight[top:].flatten()[kept]
        gaps[place] = gap.to(torch.uint8)
    return values.view(groups, LANES, ENTRIES), gaps.view(groups, LANES, ENTRIES), starts, order


def unpack_gaps(
    values: torch.Tensor, gaps: torch.Tensor, starts: torch.Tensor, order: torch.Tensor, rows: int, columns: int
) -> torch.Tensor:
    """Restore the weight (rows, columns) from its entries, with +0 where no value is stored."""
    values = _checks.tensor("values", values, "groups", "32", "8", empty=True)
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    _check(values, gaps, starts, order, rows)
    strip = torch.repeat_interleave(starts.diff())
    column = gaps.cumsum(-1)
    before = _running(column[..., -1])
    column += (before[:-1] - before[starts[:-1]][strip])[..., None]
    beyond = (column >= columns).flatten(1).any(1)
    if bool(beyond.any()):
        raise ValueError(f"gaps leads beyond column {columns - 1} in strip {int(strip[beyond][0])}")
    row = nn.functional.pad(order, (0, -rows % LANES)).view(-1, LANES)[strip]
    kept = values != 0
    weight = values.new_zeros(rows * columns)
    weight[column.add_(row[..., None], alpha=columns)[kept]] = values[kept]
    entries, places = int(kept.sum()), int(weight.count_nonzero())
    if entries != places:
        raise ValueError(f"values has {entries} entries other than 0, but gaps leads to {places} places")
    return weight.view(rows, columns)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Return each strip's first group, and the end, by the number of entries of each row in order."""
    longest = nn.functional.pad(lengths, (0, -len(lengths) % LANES)).view(-1, LANES).amax(1)
    return _running(-(-longest // ENTRIES))


def _slabs(
    weight: torch.Tensor, section: int | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield a slab's first row, its rows' numbers of entries, the places of its kept values in the slab, and of each of these,
    and then of what fills sections up, row, number and gap.
    """
    columns = weight.shape[1]
    quad, width = (1, columns) if section is None else (QUAD, section)
    sections = -(-columns // width)
    step = max(1, SLAB // columns)
    for top in range(0, len(weight), step):
        slab = weight[top : top + step]
        kept = slab.flatten().nonzero()[:, 0]
        row, column = kept // columns, kept % columns
        part = row * sections + column // width
        distance = column - nn.functional.pad(column, (1, 0))[:-1]
        begins = row.diff(prepend=row.new_full((1,), -1)) > 0
        distance[begins] = column[begins]
        fillers = (distance - 1).clamp_(min=0) // MOST_GAP
        entries = _running(fillers + 1)
        before = entries[_running(part.bincount(minlength=len(slab) * sections))]
        # The first entry of each section of each row, and the end.
        first = _running(-(-before.diff() // quad) * quad)
        number = first[part] - first[row * sections] + entries[1:] - 1 - before[part]
        rows, numbers = [row], [number]
        for spare in range(1, quad):
            filled = (first.diff() - before.diff() >= spare).nonzero()[:, 0]
            rows.append(filled // sections)
            numbers.append(first[filled + 1] - spare - first[rows[-1] * sections])
        gap = nn.functional.pad(distance - MOST_GAP * fillers, (0, sum(map(len, rows[1:]))))
        yield top, first[::sections].diff(), kept, torch.cat(rows), torch.cat(numbers), gap


def _fillers(lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return gaps (groups, 32, 8): 15 for every entry that a row has, by the rows' numbers of entries in the order of lanes."""
    strip = torch.repeat_interleave(starts.diff())
    group = torch.arange(len(strip), device=starts.device) - starts[strip]
    number = group[:, None, None] * ENTRIES + torch.arange(ENTRIES, device=starts.device)
    own = nn.functional.pad(lengths, (0, -len(lengths) % LANES)).view(-1, LANES)[strip]
    return (number < own[..., None]).view(torch.uint8) * MOST_GAP


def _running(counts: torch.Tensor) -> torch.Tensor:
    """Return 0, then the running sums along the first axis, as int64."""
    return torch.cat([counts.new_zeros((1, *counts.shape[1:]), dtype=torch.int64), counts.cumsum(0)])


def _check(values: torch.Tensor, gaps: Any, starts: Any, order: Any, rows: int) -> None:
    """Check what can be checked without following the entries."""
    strips = -(-rows // LANES)
    if values.shape[1:] != (LANES, ENTRIES):
        raise ValueError(f"values has shape {tuple(values.shape)}; allowed: (groups, {LANES}, {ENTRIES})")
    _checks.typed("gaps", gaps, torch.uint8, tuple(values.shape))
    _checks.typed("starts", starts, torch.int64, (strips + 1,))
    _checks.typed("order", order, torch.int64, (rows,))
    if bool((gaps > MOST_GAP).any()):
        raise ValueError(f"gaps holds {int(gaps.max())}; allowed: 0 to {MOST_GAP}")
    if int(starts[0]) != 0 or int(starts[-1]) != len(values) or bool((starts.diff() < 0).any()):
        raise ValueError(f"starts does not rise from 0 to {len(values)}, the number of groups")
    if not torch.equal(order.sort().values, torch.arange(rows, device=order.device)):
        raise ValueError(f"order does not hold each of 0 to {rows - 1} once")
    if bool(values[int(starts[-2]) :, rows - (strips - 1) * LANES :].any()):
        raise ValueError(f"values has an entry other than 0 in a lane after row {rows - 1}")
