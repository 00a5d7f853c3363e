"""Instructions of a GPU in Python, to follow what a lane of a kernel reads."""

from __future__ import annotations


def permute(a: int, b: int, which: int) -> int:
    """PRMT: four of the eight bytes of two words, by three bits of a nibble each."""
    together = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(together[which >> 4 * i & 7] for i in range(4)), "little")
