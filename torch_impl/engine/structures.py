"""Structured pruning of a block: which heads and channels it has, and which go. Read beside `_prune_structures` of the spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import AdaptedLinear, block_adapters
from torch_impl.engine.families import Family
from torch_impl.llm_pruner import structure_sum
from torch_impl.masks import structured
from torch_impl.masks.method import Method


@dataclass(frozen=True)
class Structures:
    """The structures of one block: numbers of key-value heads and of channels, and the prunable weights of one of each."""

    heads: int
    channels: int
    head_weights: int
    channel_weights: int

    @classmethod
    def of(cls, block: nn.Module, family: Family) -> Structures:
        """Count those of a block, by its attention's `head_dim` and the shapes of its projections."""
        sizes = {name: weight.numel() for name, weight in family.weights_of(block).items()}
        attention = sum(size for name, size in sizes.items() if family.coupled(name)[0] == family.reads_heads)
        heads = family.key_value_heads(block)
        channels = family.weights_of(block)[family.reads_channels].shape[1]
        return cls(heads, channels, attention // heads, (sum(sizes.values()) - attention) // channels)

    def removed(self, sparsity: float, multiple: int, last: bool) -> tuple[int, int]:
        """Return the numbers of heads and channels that the block has lost at this sparsity."""
        return structured.removed_structures(
            sparsity, self.heads, self.channels, self.head_weights, self.channel_weights, multiple, last
        )

    @property
    def weights(self) -> int:
        """Return the number of the block's prunable weights."""
        return self.heads * self.head_weights + self.channels * self.channel_weights

    def share(self, removed: tuple[int, int]) -> float:
        """Return the share of the block's weights that these numbers of heads and channels have."""
        return (removed[0] * self.head_weights + removed[1] * self.channel_weights) / self.weights


@torch.no_grad()
def remove_structures(
    block: nn.Module,
    family: Family,
    method: Method,
    statistics: Mapping[str, torch.Tensor],
    sparsity: float,
    multiple: int,
    last: bool,
) -> None:
    """Remove heads and channels of an adapted block, until it has this sparsity, and with them all that belongs to them.

    statistics: by projection, if the method needs them. multiple, last: as for `Structures.removed`. Process 0 decides.
    """
    found, layers = Structures.of(block, family), block_adapters(block, family)
    score, kept = method.structural_score, {}
    assert score is not None
    heads, channels = found.removed(sparsity, multiple, last)
    for name, count, many in (
        (family.reads_heads, found.heads, heads),
        (family.reads_channels, found.channels, channels),
    ):
        if method.sums_structures:
            of_structures = _summed(layers, family, score, statistics, name, count)
        else:
            of_weights = score(layers[name].merged(), method.prepare(statistics.get(name)))
            of_structures = structured.structure_score(of_weights, count)
        there = structured.kept_structures(layers[name].mask, count)
        kept[name] = structured.structure_mask(of_structures, many, there)
    for name, layer in layers.items():
        reader, axis = family.coupled(name)
        mask = structured.coupled_mask(kept[reader], (layer.out_features, layer.in_features), axis)
        layer.remove(mask)
        distributed.broadcast_from_owner(layer.weight.detach(), 0)


def _summed(
    layers: Mapping[str, AdaptedLinear],
    family: Family,
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    statistics: Mapping[str, torch.Tensor],
    reader: str,
    count: int,
) -> torch.Tensor:
    """Sum the scores of all weights that go with each structure (count,). A process has statistics of what it owns."""
    total = torch.zeros(count, dtype=torch.float64, device=layers[reader].weight.device)
    for name, statistic in statistics.items():
        of, axis = family.coupled(name)
        if of == reader:
            total += structure_sum(score(layers[name].merged(), statistic), count, axis)
    return distributed.all_reduce(total)
