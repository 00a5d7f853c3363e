"""How the products of cuda.cu, cuda_coded.cu, cuda_rows.cu and cuda_gaps.h are divided among a GPU's processors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_impl import tiles

# As in cuda_panels.h: bytes of a warp's barriers and sums, and panels that it loads ahead.
BARRIERS, SCRATCH, SLOTS = 16, 512, 2
# As in cuda_rows.cu: bytes of the counts of a panel's bits and of the sums of 16 x 8, tiles of eight rows of x.
COUNTS, SUMS, MOST_TILES = 64, 640, 4
# A warp's lanes hold the starts of its panels, the end of the last one, and SLOTS starts after it.
MOST_SHARE = tiles.LANES - 1 - SLOTS
# Warps that a processor holds, and so a block, by their registers; of cuda_rows.cu fewer.
MOST_WARPS, MOST_ROW_WARPS = 32, 24


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


class Division(NamedTuple):
    """How a product is divided.

    strips: of a warp; share: panels of a strip that a warp multiplies; groups: of warps in a block, each with strips of its own.
    Zeros: it cannot be, as a block's panels do not fit in shared memory.
    """

    strips: int
    share: int
    groups: int

    def warps(self, panels: int) -> int:
        """Return the warps of a block."""
        return -(-panels // self.share) * self.groups


def choose_plan(rows: int, panels: int, width: int, fitting: int, processors: int) -> Division:
    """Choose how up to eight rows of x are multiplied.

    If all strips can be multiplied at once, a processor has some 16 warps, and a warp 256 to 1024 columns. A block takes several
    strips if it has up to 12 warps then, and every processor as many strips. Otherwise blocks follow one another: they have one
    strip, and eight warps of four panels or more. The numbers are what suits 7B's shapes on an H200 (gpu_codes --sweep).

    width: columns of a panel; fitting: warps that fit in a processor's shared memory.
    """
    fitting = min(fitting, MOST_WARPS)
    of_processor = -(-rows // (tiles.ROWS * processors))
    share = min(max(panels * of_processor // 16, 256 // width), 1024 // width, panels)
    across = -(-panels // share)
    if across * of_processor <= fitting:
        even = [groups for groups in range(1, of_processor + 1) if of_processor % groups == 0 and groups * across <= 12]
        return Division(1, share, max(even, default=1))
    share = min(max(-(-panels // 8), 4), MOST_SHARE, panels)
    return Division(1, share, 1) if -(-panels // share) <= fitting else Division(0, 0, 0)


def rows_kernel_bytes(slot: int, strips: int) -> int:
    """Return the shared memory of a warp's panels in bytes."""
    return max(strips * (SLOTS * slot + COUNTS), strips * MOST_TILES * SUMS) + BARRIERS


def choose_rows_plan(rows: int, panels: int, slot: int, card: Card) -> Division:
    """Choose how cuda_rows.cu multiplies.

    A processor with one block has 24 warps. Several have eight each: in one group, or in two, whose warps have twice the panels,
    if all strips can be multiplied at once only so. The numbers are what suits 7B's shapes on an H200 (gpu_rows --sweep).
    """
    all_strips = -(-rows // tiles.ROWS)
    for strips in (2, 1):
        blocks = -(-all_strips // strips)
        if strips > 1 and blocks < 0.9 * card.processors:
            # Some processors would have no block.
            continue
        fitting = min(MOST_ROW_WARPS, card.shared // rows_kernel_bytes(slot, strips))
        of_processor = -(-blocks // card.processors)
        halved = 4 * of_processor <= fitting < 8 * of_processor and panels <= 4 * MOST_SHARE
        warps = 24 if of_processor == 1 else 4 if halved else 8
        share = min(-(-panels // max(1, min(warps, fitting))), MOST_SHARE)
        found = Division(strips, share, 1 + halved)
        if found.warps(panels) <= fitting:
            return found
    return Division(0, 0, 0)


# Warps that a processor holds for the kernel of cuda_gaps.h, of a block with several strips, and of a strip.
GAP_WARPS, SHARED_GAP_WARPS, MOST_PARTS = 48, 16, 32
# Columns that a part has at least, and the parts of a strip where a processor has more strips than fit at once.
LEAST_COLUMNS, LEAST_PARTS = 128, 8


def gaps_kernel_bytes(columns: int, warps: int, rows: int) -> int:
    """Return the shared memory of a block of cuda_gaps.h in bytes: so many rows of x, and the warps' sums."""
    return -(-columns * rows * 2 // 16) * 16 + warps * rows * tiles.LANES * 4


def choose_parts(rows: int, columns: int, processors: int) -> int:
    """Choose the parts of a strip in cuda_gaps.h, a warp for each: so many that a processor has some 48 warps."""
    of_processor = -(-rows // (tiles.LANES * processors))
    parts = max(min(GAP_WARPS // of_processor, MOST_PARTS), LEAST_PARTS)
    return min(parts, max(columns // LEAST_COLUMNS, 1))


def choose_together(rows: int, parts: int, processors: int) -> int:
    """Choose the strips of a block of cuda_gaps.h: several if it has up to 16 warps, and every processor as many strips."""
    of_processor = -(-rows // (tiles.LANES * processors))
    even = [n for n in range(1, of_processor + 1) if of_processor % n == 0 and n * parts <= SHARED_GAP_WARPS]
    return max(even, default=1)
