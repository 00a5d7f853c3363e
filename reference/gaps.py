"""A sparse matrix as its kept values and the gaps between them, a row for each lane of a GPU's warp.

Legend: an entry (g, v) of a row is a gap g from 0 to 15 and a value v. The first entry lies in column g, every other one g
columns after the entry before it. An entry of value 0 only moves on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

LANES = 32
"""Rows of a strip, one for each lane of a warp."""
ENTRIES = 8
"""Entries of a row in a group, which a lane reads at once: 16 bytes of 16-bit values."""
MOST_GAP = 15
"""The largest gap: 4 bits."""
QUAD = 4
"""Entries of a row that lie in one section, if there are sections."""


def pack_gaps(
    weight: Array, section: int | None = None
) -> tuple[Array, NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Write each row as entries, and cut the rows into strips of 32.

    Source: ours; MACKO (Macko and Boža, arXiv 2511.13061) has 4-bit gaps and fillers too, and a warp for a row.

        row: of each kept value v, d columns after the one before, or in column d if it is the first:
             ⌈d/15⌉ − 1 fillers (15, 0), if d > 15, then (what is left of d, v)
        section, if given: so many columns. After its last value, (0, 0) up to a multiple of 4 entries. So if codes of a section
             share a scale (quantise.py), the last of four entries tells which scale they have
        order: the rows by their number of entries, the longest first; equally long ones stay in order. If the rows as they are
             make at most 1/32 more groups, as they are
        strip: the next 32 rows of that order, each filled up with (0, 0) to the longest one's number, rounded up to groups of 8
        groups: strip by strip, from left to right; in each, 8 entries of lane 0, then 8 of lane 1, …

    Parameters: weight (out, in), or codes; section ≥ 1, or None for no sections.
    Returns: (values (groups, 32, 8), gaps (groups, 32, 8) uint8, starts (strips + 1,) int64, each strip's first group, order
    (out,) int64, the row of each lane of each strip). A weight of +0 or −0 is left out. Lanes after the last row are empty.
    A strip without a kept value has no group.

    *Deviation*: none.

    >>> weight = np.zeros((2, 40))
    >>> weight[1, [0, 3, 39]] = 7, 8, 9
    >>> values, gaps, starts, order = pack_gaps(weight)
    >>> values[0, 1], gaps[0, 1]  # 39 − 3 = 15 + 15 + 6
    (array([7., 8., 0., 0., 9., 0., 0., 0.]), array([ 0,  3, 15, 15,  6,  0,  0,  0], dtype=uint8))
    >>> values.shape, starts, order
    ((1, 32, 8), array([0, 1]), array([0, 1]))
    """
    weight = _checks.array("weight", weight, "out", "in", finite=False)
    if section is not None:
        _checks.integer("section", section, 1)
    rows = [_entries(row, section) for row in weight]
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    if 32 * _starts(lengths)[-1] <= 33 * _starts(lengths[order])[-1]:
        order = np.arange(len(rows))
    starts = _starts(lengths[order])
    values = np.zeros((starts[-1], LANES, ENTRIES))
    gaps = np.zeros(values.shape, dtype=np.uint8)
    for position, row in enumerate(order):
        strip, lane = divmod(position, LANES)
        for number, (gap, value) in enumerate(rows[row]):
            group, place = divmod(number, ENTRIES)
            gaps[starts[strip] + group, lane, place] = gap
            values[starts[strip] + group, lane, place] = value
    return values, gaps, starts, order


def unpack_gaps(
    values: Array, gaps: NDArray[np.uint8], starts: NDArray[np.int64], order: NDArray[np.int64], rows: int, columns: int
) -> Array:
    """Restore the weight from its entries.

    Source: ours, the inverse of `pack_gaps`.

    Parameters: values, gaps, starts, order as `pack_gaps` returns them; rows, columns: of the weight. Strips may have more
    groups than they need, and their rows may be in any order.
    Returns: the weight (rows, columns), with +0 where no value is stored.

    Errors: ValueError or TypeError for a wrong shape or dtype; a gap above 15; starts that do not count the groups; an order
    that does not hold each row once; an entry beyond the last column; a value in a lane after the last
    row; two values in one place.

    *Deviation*: none.

    >>> unpack_gaps(*pack_gaps([[3, 4, 0, 5]]), 1, 4)
    array([[3., 4., 0., 5.]])
    """
    values = _checks.array("values", values, "groups", "32", "8", empty=True, finite=False)
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    _check(values, gaps, starts, order, rows)
    weight = np.zeros((rows, columns))
    for strip in range(len(starts) - 1):
        for lane in range(LANES):
            column = 0
            for group in range(starts[strip], starts[strip + 1]):
                for gap, value in zip(gaps[group, lane], values[group, lane], strict=True):
                    column += int(gap)
                    if column >= columns:
                        raise ValueError(f"gaps leads beyond column {columns - 1} in strip {strip}")
                    if value != 0:
                        weight[order[strip * LANES + lane], column] = value
    kept, found = np.count_nonzero(values), np.count_nonzero(weight)
    if kept != found:
        raise ValueError(f"values has {kept} entries other than 0, but gaps leads to {found} places")
    return weight


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each strip's first group, and the end, by the number of entries of each row in order."""
    longest = [lengths[first : first + LANES].max() for first in range(0, len(lengths), LANES)]
    return np.cumsum([0, *(-(-most // ENTRIES) for most in longest)], dtype=np.int64)


def _entries(row: Array, section: int | None) -> list[tuple[int, float]]:
    """List the entries (gap, value) of a row."""
    entries: list[tuple[int, float]] = []
    before = 0
    columns = np.flatnonzero(row)
    for number, column in enumerate(columns):
        while column - before > MOST_GAP:
            entries.append((MOST_GAP, 0.0))
            before += MOST_GAP
        entries.append((int(column) - before, float(row[column])))
        before = int(column)
        last = number + 1 == len(columns)
        if section is not None and (last or columns[number + 1] // section != column // section):
            entries += [(0, 0.0)] * (-len(entries) % QUAD)
    return entries


def _check(values: Array, gaps: Any, starts: Any, order: Any, rows: int) -> None:
    """Check what can be checked without following the entries."""
    strips = -(-rows // LANES)
    if values.shape[1:] != (LANES, ENTRIES):
        raise ValueError(f"values has shape {values.shape}; allowed: (groups, {LANES}, {ENTRIES})")
    _checks.typed("gaps", gaps, np.uint8, values.shape)
    _checks.typed("starts", starts, np.int64, (strips + 1,))
    _checks.typed("order", order, np.int64, (rows,))
    if gaps.max(initial=0) > MOST_GAP:
        raise ValueError(f"gaps holds {gaps.max()}; allowed: 0 to {MOST_GAP}")
    if starts[0] != 0 or starts[-1] != len(values) or (np.diff(starts) < 0).any():
        raise ValueError(f"starts does not rise from 0 to {len(values)}, the number of groups")
    if not np.array_equal(np.sort(order), np.arange(rows)):
        raise ValueError(f"order does not hold each of 0 to {rows - 1} once")
    if values[starts[-2] :, rows - (strips - 1) * LANES :].any():
        raise ValueError(f"values has an entry other than 0 in a lane after row {rows - 1}")
