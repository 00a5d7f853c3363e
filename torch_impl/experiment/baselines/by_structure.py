"""LLM-Pruner and FLAP: heads and channels go by a score of each. Formulas: reference/llm_pruner.py and reference/flap.py."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_impl.engine.blocks import sweep_gradients
from torch_impl.engine.calibration import start_stream
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.gradient_sweep import weight_gradient
from torch_impl.engine.structure import check_separable
from torch_impl.engine.structures import Structures
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.flap import compensation, fluctuation, remove_lowest, standardised
from torch_impl.llm_pruner import rates_between, structure_sum, taylor_score
from torch_impl.masks.structured import cut, structure_mask

OfStructures = dict[str, torch.Tensor]
"""Scores or what is kept (u,) of a block's structures, by the projection that reads them."""
# Shares of the blocks that LLM-Pruner leaves whole: at 7B the first 4 and the last 2 of 32.
FIRST, LAST = 1 / 8, 1 / 16


def counts(structures: Structures, family: Family) -> dict[str, int]:
    """Return the numbers of a block's structures by the projection that reads them."""
    return {family.reads_heads: structures.heads, family.reads_channels: structures.channels}


def check_blocks(decoder: Decoder) -> None:
    """Errors: ValueError naming a module that mixes the heads or channels of a block."""
    for index, block in enumerate(decoder.blocks):
        check_separable(block, index, decoder.family, "SLEB, which removes whole blocks")


def cut_block(block: nn.Module, family: Family, kept: OfStructures) -> None:
    """Leave heads and channels out of a block of plain linears. At least one of each stays."""
    for name, linear in family.projections_of(block).items():
        assert isinstance(linear, nn.Linear)
        reader, axis = family.coupled(name)
        if linear.bias is not None and axis == 0:
            linear.bias = nn.Parameter(cut(linear.bias.detach(), kept[reader], 0), requires_grad=False)
        linear.weight = nn.Parameter(cut(linear.weight.detach(), kept[reader], axis), requires_grad=False)
        linear.out_features, linear.in_features = linear.weight.shape
    attention: Any = block.get_submodule(family.reads_heads.rpartition(".")[0])
    if hasattr(attention, "num_heads"):
        # OPT's, which has no groups of queries; others count the rows that there are.
        attention.num_heads = int(kept[family.reads_heads].sum())


# --- LLM-Pruner ---


def llm_pruner(decoder: Decoder, material: Material, config: Config) -> None:
    """Remove the heads and channels of the middle blocks that the calibration loss depends on least."""
    check_blocks(decoder)
    blocks, family, sparsity = decoder.blocks, decoder.family, config.prune.final_sparsity
    weights = torch.tensor(decoder.prunable_weights, dtype=torch.float64)
    rates = rates_between(sparsity, weights, *ends(len(blocks), FIRST, LAST)).tolist()
    taylor = Taylor(decoder)
    sweep_gradients(decoder, material.calibration, config.calibration.calibration_batch_size, taylor)
    for block, structures, scores, rate in zip(blocks, taylor.structures, taylor.scores, rates, strict=True):
        removed = dict(zip(scores, structures.removed(rate, 1, last=True), strict=True))
        everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        kept = {name: structure_mask(score, removed[name], everything[name]) for name, score in scores.items()}
        cut_block(block, family, kept)


def ends(blocks: int, first: float, last: float) -> tuple[int, int]:
    """Return how many blocks stay whole at the front and at the back: the nearest to these shares."""
    return int(first * blocks + 0.5), int(last * blocks + 0.5)


class Taylor:
    """Collects the first-order scores of all structures. scores: by block, heads first."""

    def __init__(self, decoder: Decoder) -> None:
        self._family = decoder.family
        self.structures = [Structures.of(block, decoder.family) for block in decoder.blocks]
        self.scores: list[OfStructures] = [{} for _ in self.structures]
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Take a projection's input and the gradient by its output for one batch."""
        found = weight_gradient(x, grad_y)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Score the structures of a block that has seen all batches."""
        for reader, count in counts(self.structures[index], self._family).items():
            parts = [
                structure_sum(taylor_score(weight, self._sums[name]), count, self._family.coupled(name)[1])
                for name, weight in weights.items()
                if self._family.coupled(name)[0] == reader
            ]
            self.scores[index][reader] = torch.stack(parts).sum(0)
        self._sums.clear()


# --- FLAP ---


def flap(decoder: Decoder, material: Material, config: Config) -> None:
    """Remove the heads and channels of the whole model whose inputs fluctuate least; biases stand for their mean.

    The best head and the best channel of every block stay.
    """
    check_blocks(decoder)
    family = decoder.family
    moments = input_moments(decoder, material, config)
    scores, sizes, places = [], [], []
    for index, block in enumerate(decoder.blocks):
        structures, weights = Structures.of(block, family), family.weights_of(block)
        own = (structures.head_weights, structures.channel_weights)
        for (name, count), size in zip(counts(structures, family).items(), own, strict=True):
            score = standardised(fluctuation(weights[name], moments[index][name][1]), count)
            # On the CPU: sums of a threshold on CUDA are not bit-identical.
            scores.append(score.index_fill(0, score.argmax(), torch.inf).cpu())
            sizes.append(torch.full_like(scores[-1], size))
            places.append((index, name))
    kept = remove_lowest(torch.cat(scores), torch.cat(sizes), config.prune.final_sparsity).to(decoder.weights[0].device)
    parts = dict(zip(places, kept.split([len(score) for score in scores]), strict=True))
    for index, block in enumerate(decoder.blocks):
        of_block = {name: parts[index, name] for name in (family.reads_heads, family.reads_channels)}
        for name, mask in of_block.items():
            _compensate(block.get_submodule(name), moments[index][name][0], mask)
        cut_block(block, family, of_block)


def _compensate(linear: nn.Module, mean: torch.Tensor, kept: torch.Tensor) -> None:
    """Add to the bias of a projection what its inputs (in,) of structures that go (u,) add on average."""
    assert isinstance(linear, nn.Linear)
    bias = compensation(linear.weight.detach(), mean, kept.repeat_interleave(len(mean) // len(kept)))
    bias = bias if linear.bias is None else bias + linear.bias.detach()
    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)


def input_moments(
    decoder: Decoder, material: Material, config: Config
) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Return mean and variance (in,) over all calibration tokens of what reads heads and channels in each block."""
    family, found = decoder.family, []
    stream = start_stream(decoder, material.calibration, config.calibration.calibration_batch_size)
    tokens = stream.hidden.shape[0] * stream.hidden.shape[1]
    for index, block in enumerate(decoder.blocks):
        sums: dict[str, torch.Tensor] = {}

        def watch(name: str, sums: dict[str, torch.Tensor], module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + torch.stack([x.sum(0), x.square().sum(0)])

        handles = [
            block.get_submodule(name).register_forward_pre_hook(partial(watch, name, sums))
            for name in (family.reads_heads, family.reads_channels)
        ]
        stream.advance(block, index)
        for handle in handles:
            handle.remove()
        means = {name: both / tokens for name, both in sums.items()}
        found.append({name: (mean, (square - mean**2).clamp_min(0)) for name, (mean, square) in means.items()})
    return found
