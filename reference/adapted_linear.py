"""The projections of a model with their adapters, and what a step does to them: resize, train, merge.

Nothing is changed in place: each function takes the projections and returns new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reference import adapter, rank
from reference._checks import Array, Mask
from reference.llama import Block, Llama
from reference.settings import Settings


@dataclass(frozen=True)
class AdaptedLinear:
    """One projection: its frozen weight (out, in), zero where pruned, and its adapter A (r, in), B (out, r)."""

    weight: Array
    A: Array
    B: Array

    @property
    def mask(self) -> Mask:
        """Return the mask, bool (out, in), True = kept."""
        return self.weight != 0

    def merged(self, scale: float) -> Array:
        """Return M⊙(W + s·BA)."""
        return adapter.effective_weight(self.weight, self.A, self.B, scale)


Layers = dict[str, AdaptedLinear]
"""The projections of one block, by name, in order of use."""


def attach_adapters(model: Llama) -> list[Layers]:
    """Give every projection of every block an adapter of rank 0."""
    return [
        {name: AdaptedLinear(w, np.zeros((0, w.shape[1])), np.zeros((len(w), 0))) for name, w in block.weights.items()}
        for block in model.blocks
    ]


def merge_adapters(model: Llama, layers: Sequence[Layers], scale: float) -> Llama:
    """Merge all adapters: return the model with projections M⊙(W + s·BA). This model is saved.

    Source: LoSA, Eq. 1. model: all but the projections is taken from it. layers: one entry per block. scale: s.
    Returns: a plain model, its weights exactly zero where pruned. *Deviation*: none.
    """
    return model.with_weights([{name: layer.merged(scale) for name, layer in of_block.items()} for of_block in layers])


def merged_block(block: Block, layers: Layers, settings: Settings) -> Block:
    return replace(block, weights={name: layer.merged(settings.scale) for name, layer in layers.items()})


def zero_shares(layers: Sequence[Layers]) -> Array:
    """Compute the share of zeros in each block's projections (L,)."""
    return np.array([(~np.concatenate([p.mask.ravel() for p in block.values()])).mean() for block in layers])


def resize(layers: Sequence[Layers], ranks: Sequence[int], step: int, settings: Settings) -> list[Layers]:
    """Give all adapted projections of a block its rank. New rows depend only on run, step, block and projection."""
    return [
        {
            name: _resize_layer(layer, ranks[index], (settings.seed, step, index, number), settings)
            if settings.adapts(name)
            else layer
            for number, (name, layer) in enumerate(of_block.items())
        }
        for index, of_block in enumerate(layers)
    ]


def _resize_layer(layer: AdaptedLinear, new_rank: int, seed: tuple[int, ...], settings: Settings) -> AdaptedLinear:
    weight, A, B = layer.weight, layer.A, layer.B
    if settings.rank_shrink == "fold" and new_rank < len(A):
        weight = rank.fold_adapter(weight, A, B, new_rank, settings.scale)
    new_rows = adapter.initial_rows(max(0, new_rank - len(A)), A.shape[1], seed)
    return AdaptedLinear(weight, *rank.resize_adapter(A, B, new_rank, new_rows))


def parameters(layers: Sequence[Layers]) -> list[Array]:
    """List the trained parameters: A and B of every projection, in order."""
    return [P for of_block in layers for layer in of_block.values() for P in (layer.A, layer.B)]


def with_parameters(layers: Sequence[Layers], parameters: Sequence[Array]) -> list[Layers]:
    values = iter(parameters)
    return [
        {name: AdaptedLinear(layer.weight, A=next(values), B=next(values)) for name, layer in of_block.items()}
        for of_block in layers
    ]
