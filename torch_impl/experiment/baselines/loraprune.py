"""LoRAPrune: heads and channels go while LoRA trains. Formula: reference/loraprune.py."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from torch_impl import _checks
from torch_impl.adapter import effective_weight
from torch_impl.engine.adapted_linear import AdaptedLinear, block_adapters, merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.graphs import Repeater
from torch_impl.engine.structures import Structures
from torch_impl.engine.training import Extra
from torch_impl.experiment.baselines.baseline import Costs, OnProgress, Trained, finish, train, trainable_count
from torch_impl.experiment.baselines.by_structure import OfStructures, check_blocks, counts, cut_block, ends
from torch_impl.experiment.baselines.structured import attach_lora, check
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.llm_pruner import rates_between, sum_of
from torch_impl.loraprune import average, score_of
from torch_impl.masks.structured import coupled_mask, structure_mask
from torch_impl.schedule import cubic_sparsity

# The first tenth of the blocks and the last block stay whole.
FIRST, LAST_BLOCKS = 1 / 10, 1
# Structures go at every tenth optimizer step, in a short run more often, until this share of the steps is done.
INTERVAL, SETTLED = 10, 0.8


class Pruner:
    """Scores the structures of the middle blocks at every optimizer step, and removes some of them on a cubic schedule.

    kept: by block, what is left, by the projection that reads it. cuda_graphs: whether to capture the scoring on CUDA.
    """

    def __init__(self, decoder: Decoder, sparsity: float, total: int, cuda_graphs: bool = True) -> None:
        self._decoder, self._sparsity = decoder, sparsity
        self._interval = max(1, min(INTERVAL, total // 10))
        self._events = max(1, int(SETTLED * total) // self._interval)
        self._weights = torch.tensor(decoder.prunable_weights, dtype=torch.float64)
        self._ends = ends(len(decoder.blocks), FIRST, LAST_BLOCKS / len(decoder.blocks))
        self._structures = [Structures.of(block, decoder.family) for block in decoder.blocks]
        rates_between(sparsity, self._weights, *self._ends)
        device, numbers = decoder.weights[0].device, [counts(s, decoder.family) for s in self._structures]
        self._scores: list[OfStructures] = [
            {name: torch.zeros(u, dtype=torch.float64, device=device) for name, u in of_block.items()}
            for of_block in numbers
        ]
        self.kept: list[OfStructures] = [
            {name: torch.ones_like(score, dtype=torch.bool) for name, score in of_block.items()}
            for of_block in self._scores
        ]
        self._repeat = Repeater(cuda_graphs, "LoRAPrune")
        self._gradients: list[torch.Tensor | None] = []
        self._scoring: Callable[[], None] = self._score

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Take the adapters' gradients of an optimizer step, the first one being 1, before it moves the adapters."""
        used = [t for index in self._middle for layer in self._layers(index).values() for t in (layer.A, layer.B)]
        gradients = [parameter.grad for parameter in used]
        if len(gradients) == len(self._gradients) and all(map(operator.is_, gradients, self._gradients)):
            self._scoring()
        else:
            # Uncaptured, which loads the kernels; a graph uses the gradients by address.
            self._score()
            weights = [layer.weight for index in self._middle for layer in self._layers(index).values()]
            self._gradients = gradients
            self._scoring = self._repeat(self._score, (used, gradients, weights, self._scores))
        event, rest = divmod(step, self._interval)
        if not rest and event <= self._events:
            self._prune(event)

    @property
    def _middle(self) -> range:
        return range(self._ends[0], len(self.kept) - self._ends[1])

    def _layers(self, index: int) -> dict[str, AdaptedLinear]:
        return block_adapters(self._decoder.blocks[index], self._decoder.family)

    def _score(self) -> None:
        """Update all scores in place, without waiting for the device: thousands of kernels, which a graph launches at once."""
        family = self._decoder.family
        for index in self._middle:
            layers = self._layers(index)
            for reader, before in self._scores[index].items():
                parts = [
                    sum_of(_score_of(layer), len(before), family.coupled(name)[1])
                    for name, layer in layers.items()
                    if family.coupled(name)[0] == reader
                ]
                before.copy_(average(before, torch.stack(parts)))

    def _prune(self, event: int) -> None:
        family, target = self._decoder.family, cubic_sparsity(event, self._events, self._sparsity)
        rates = rates_between(target, self._weights, *self._ends).tolist()
        for index in self._middle:
            removed = self._structures[index].removed(rates[index], 1, event == self._events)
            kept, scores = self.kept[index], self._scores[index]
            for reader, score in scores.items():
                _checks.finite(f"the score of block {index}, {reader},", score, "u")
            self.kept[index] = {
                name: structure_mask(scores[name], count, kept[name])
                for name, count in zip(scores, removed, strict=True)
            }
            for name, layer in self._layers(index).items():
                reader, axis = family.coupled(name)
                # In place, so that the graphs of training stay as they are.
                layer.remove(coupled_mask(self.kept[index][reader], (layer.out_features, layer.in_features), axis))


def _score_of(layer: AdaptedLinear) -> torch.Tensor:
    assert layer.A.grad is not None
    assert layer.B.grad is not None
    merged = effective_weight(layer.weight, layer.A, layer.B, layer.scale)
    return score_of(merged, layer.A, layer.B, layer.A.grad, layer.B.grad)


def loraprune(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train LoRA while heads and channels go, and make the model smaller at the end."""
    check(material, config)
    if not config.training.finetune:
        raise ValueError("LoRAPrune prunes while it trains; leave out --finetune false")
    costs, decoder = Costs(model.device), Decoder(model)
    check_blocks(decoder)
    attach_lora(decoder, config)
    total = config.training.optimizer_steps(len(material.examples))
    pruner = Pruner(decoder, config.prune.final_sparsity, total, config.training.cuda_graphs)
    count = trainable_count(model)
    steps = train(model, dense, material, config, costs, on_progress, Extra(before=pruner.before))
    with costs.of("prune"):
        merge_adapters(decoder)
        for block, kept in zip(decoder.blocks, pruner.kept, strict=True):
            cut_block(block, decoder.family, kept)
    return finish(model, count=count, steps=steps, costs=costs)
