"""How the products of cuda_rows.cu and cuda_staged.cu are divided among a GPU's processors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_impl import tiles

# As in cuda_panels.h: bytes of a warp's barriers, and panels that it loads ahead.
BARRIERS, SLOTS = 16, 2
# As in cuda_strips.h: bytes of the counts of a panel's bits and of the sums of 16 x 8, tiles of eight rows of x, warps on a
# processor.
COUNTS, SUMS, MOST_TILES, MOST_ROW_WARPS = 64, 640, 4, 24
# As in cuda_staged.cu: bytes of a row of x in a tile, of a part's barriers, blocks of a cluster.
PITCH, CONTROL, CLUSTERS = 288, 32, (1, 2, 4, 8)
# Guesses. A processor reads so many bytes a cycle from the second-level cache; a panel takes so many accesses of shared memory,
# one a cycle, beside those of x; with fewer warps a processor waits; a block takes so many cycles to begin and end.
BYTES_A_CYCLE, ACCESSES, ENOUGH_WARPS, TURN = 25, 105, 16, 1500


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

    strips: of a warp; share: panels of a strip that a warp multiplies; groups: of warps in a block, each with strips of its own;
    cluster: blocks that share a strip, 0 for the kernel of cuda_rows.cu.
    """

    strips: int
    share: int
    groups: int
    cluster: int = 0

    def warps(self, panels: int) -> tuple[int, int]:
        """Return the warps of a block: of a group, and in all."""
        across = -(-panels // self.share)
        across = -(-across // max(1, self.cluster))
        return across, across * self.groups

    def shared(self, panels: int, slot: int) -> int:
        """Return the shared memory of a block in bytes."""
        across, warps = self.warps(panels)
        x = across * (SLOTS * MOST_TILES * 8 * PITCH + CONTROL) if self.cluster else 0
        return warps * rows_kernel_bytes(slot, self.strips) + x


def rows_kernel_bytes(slot: int, strips: int) -> int:
    """Return the shared memory of a warp's panels in bytes."""
    return max(strips * (SLOTS * slot + COUNTS) + BARRIERS, strips * MOST_TILES * SUMS)


def choose_rows_plan(rows: int, panels: int, slot: int, card: Card) -> Division:
    """Choose how cuda_rows.cu multiplies.

    Zeros if a block's panels do not fit in shared memory. The numbers of warps are guesses.
    """
    all_strips = -(-rows // tiles.ROWS)
    for strips in (2, 1):
        blocks = -(-all_strips // strips)
        if strips > 1 and blocks < 0.9 * card.processors:
            # Some processors would have no block.
            continue
        fitting = min(MOST_ROW_WARPS, card.shared // rows_kernel_bytes(slot, strips))
        share = -(-panels // max(1, min(8 if blocks > card.processors else 24, fitting)))
        share = min(share, tiles.LANES - 1 - SLOTS)
        if -(-panels // share) <= fitting:
            return Division(strips, share, 1)
    return Division(0, 0, 0)


def most_warps(strips: int, batch: int) -> int:
    """Return how many warps of cuda_staged.cu have enough registers."""
    return 20 if strips == 2 and batch > 16 else MOST_ROW_WARPS


def staged_divisions(panels: int, slot: int, card: Card, batch: int) -> Iterator[Division]:
    """Yield the ways to divide a product that cuda_staged.cu can take. batch: rows of x."""
    for cluster in CLUSTERS:
        for strips in (1, 2):
            for groups in range(1, 13):
                for share in range(1, min(panels, tiles.LANES - 1 - SLOTS) + 1):
                    found = Division(strips, share, groups, cluster)
                    across, warps = found.warps(panels)
                    wasted = across * cluster * share > 1.2 * panels
                    if (
                        4 <= warps <= most_warps(strips, batch)
                        and found.shared(panels, slot) <= card.shared
                        and not wasted
                    ):
                        yield found


def estimate(division: Division, rows: int, panels: int, slot: int, card: Card, batch: int) -> float:
    """Estimate the cycles of a product by cuda_staged.cu."""
    across, warps = division.warps(panels)
    strips, most = division.strips * division.groups, most_warps(division.strips, batch)
    blocks = division.cluster * -(-rows // (tiles.ROWS * strips))
    # The last blocks run beside nothing, so the fullest processor counts.
    fullest = -(-blocks // card.processors)
    resident = min(fullest, (card.shared + 1024) // (division.shared(panels, slot) + 1024), most // warps)
    columns = across * division.share
    accesses = fullest * strips * columns * (ACCESSES + 16 * -(-batch // 8) / division.strips)
    read = fullest * columns * (strips * slot + 2 * tiles.COLUMNS * batch)
    return max(accesses * max(1, ENOUGH_WARPS / (warps * resident)), read / BYTES_A_CYCLE) + TURN * fullest / resident


def choose_staged_plan(rows: int, panels: int, slot: int, card: Card, batch: int = 32) -> Division:
    """Choose how cuda_staged.cu multiplies; zeros if nothing fits."""
    ways = list(staged_divisions(panels, slot, card, batch))
    return min(ways, key=lambda way: estimate(way, rows, panels, slot, card, batch), default=Division(0, 0, 0))
