"""What the memory model says: the devices of a run, the memory in use at the same time, and the peak."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from torch_impl.engine.memory import free_bytes

# Free memory to assume for an unknown machine: more than any machine has.
UNBOUNDED = 2**60


@dataclass(frozen=True)
class Place:
    """The devices of a run: cards of one kind (cuda or cpu), and the free bytes on each of them and on the host."""

    kind: str
    cards: int = 1
    free: int = UNBOUNDED
    free_host: int = UNBOUNDED

    @classmethod
    def here(cls, device: torch.device, cards: int = 1) -> Place:
        """Describe this machine with its current free memory."""
        return cls(device.type, cards, free_bytes(device), free_bytes(torch.device("cpu")))


@dataclass(frozen=True)
class Parts:
    """Memory in use at the same time, in bytes, by purpose."""

    weights: int = 0
    """Weights of the pruned model: with several cards, the card's rows; offloaded, those outside the blocks."""
    dense_copy: int = 0
    reloaded: int = 0
    """Weights of the reloaded result."""
    blocks: int = 0
    """Whole blocks: gathered from all cards, or between disk and device."""
    outside: int = 0
    """Weights outside the blocks, gathered from all cards."""
    merged: int = 0
    """Merged weights that are held."""
    adapters: int = 0
    gradients: int = 0
    moments: int = 0
    streams: int = 0
    """Hidden states of all sequences."""
    activations: int = 0
    """Activations kept for the backward pass."""
    work: int = 0
    """Work on a block: computing it, pruning it, or its backward pass."""
    logits: int = 0
    """Logits, and the loss over them."""
    reconstruction: int = 0
    """Training the weights of a block."""
    statistics: int = 0
    """A pruning method's statistics of the gradients of all blocks."""
    masks: int = 0
    process: int = 0
    """Python, torch and CUDA's libraries, in host memory."""

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(self.by_name().values())

    def by_name(self) -> dict[str, int]:
        """Return the nonzero entries by name."""
        return {part.name: getattr(self, part.name) for part in fields(self) if getattr(self, part.name)}


@dataclass(frozen=True)
class Peak:
    """Memory in use when a run needs most of a card, and on the host.

    phase: importance, calibration, reconstruction, training, evaluation or verification; offloaded: the dense, pruning or
    verifying sweep.
    """

    offloaded: bool
    phase: str
    device: Parts
    host: Parts
