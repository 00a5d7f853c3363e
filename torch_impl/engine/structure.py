"""Check that a run's settings work with a model and that its weights are finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import AdaptedLinear
from torch_impl.engine.checkpoints.contents import check_finite
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.rates import RULES
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig
from torch_impl.engine.structures import Structures
from torch_impl.sparsity import middle_sparsity


def check_structure(model: PreTrainedModel, settings: Settings) -> Decoder:
    """Check everything that does not need the weights; return the decoder of `model`.

    Errors: ValueError as `check_base`; for an unknown structure, projections that are not plain linears, too few blocks for
    layer_sparsity, a number of inputs that is not a multiple of M, or heads and channels that cannot be removed as asked.
    """
    decoder = Decoder(model)
    check_base(settings.training, distributed.processes())
    blocks, family = decoder.blocks, decoder.family
    if len(blocks) < (least := settings.prune.rule.least_blocks):
        others = [rule.name for rule in RULES.values() if rule.least_blocks <= len(blocks)]
        raise ValueError(
            f"layer_sparsity {settings.prune.layer_sparsity!r} needs {least} or more decoder blocks, and the model has "
            f"{len(blocks)}; use layer_sparsity {', '.join(others)}"
        )
    check_plain(decoder, (nn.Linear, AdaptedLinear))
    rates = _final_rates(decoder, settings.prune)
    for index, block in enumerate(blocks):
        for name, weight in family.weights_of(block).items():
            inputs = weight.shape[1]
            if settings.prune.group is not None and inputs % settings.prune.group[1]:
                raise ValueError(
                    f"sparsity_type {settings.prune.sparsity_type!r} needs a multiple of {settings.prune.group[1]} inputs, and "
                    f"{family.full_name(index, name)} has {inputs}; use another sparsity_type"
                )
        if settings.prune.pattern.structured:
            _check_structures(block, index, family, settings.prune, rates[index])
    return decoder


def check_plain(decoder: Decoder, kinds: tuple[type, ...] = (nn.Linear,)) -> None:
    """Check that all projections are layers of these kinds with floating-point weights. Errors: ValueError naming another."""
    family = decoder.family
    for index, block in enumerate(decoder.blocks):
        for name, projection in family.projections_of(block).items():
            # Quantised projections are linears, too, whose weights are codes.
            weight: Any = getattr(projection, "weight", None)
            if not isinstance(projection, kinds) or not weight.is_floating_point():
                kind = type(projection)
                package = kind.__module__.partition(".")[0]
                raise ValueError(
                    f"{family.full_name(index, name)} is a {package}.{kind.__name__}; give a plain model: merge other adapters "
                    "first, and take the model before packing or quantisation"
                )


def check_base(training: TrainingConfig, processes: int) -> None:
    """Check the form of the base weights. Errors: ValueError if several processes are to share compressed ones."""
    if processes > 1 and training.compressed:
        raise ValueError(
            f"train_base is {training.train_base!r}, which several processes do not support (each holds its rows of the weights); "
            "use one process or train_base dense"
        )


def _final_rates(decoder: Decoder, config: PruneConfig) -> list[float]:
    """Return the sparsity that each block must be able to reach: of dense blocks 0, of the others what makes up.

    Errors: ValueError if dense_blocks leaves too few weights to prune.
    """
    weights, (first, last) = torch.tensor(decoder.prunable_weights, dtype=torch.float64), config.dense_blocks
    blocks = len(weights)
    if first + last >= blocks:
        raise ValueError(
            f"dense_blocks is {first} {last}, and the model has {blocks} decoder blocks; leave one or more to prune"
        )
    most = float(weights[first : blocks - last].sum() / weights.sum())
    if config.final_sparsity > most:
        raise ValueError(
            f"sparsity_ratio is {config.final_sparsity}, and dense_blocks {first} {last} leaves {most:.1%} of the weights to "
            "prune; use a lower one, or fewer dense blocks"
        )
    inner = middle_sparsity(config.final_sparsity, weights, torch.zeros_like(weights), first, last)
    return [inner if config.prunes(index, blocks) else 0.0 for index in range(blocks)]


def _check_structures(block: nn.Module, index: int, family: Family, config: PruneConfig, rate: float) -> None:
    """Check that whole heads and channels of a block can go, and as many as its rate asks for.

    Errors: ValueError for modules that mix heads or channels, too few channels, or a sparsity that leaves too little.
    """
    check_separable(block, index, family, "another sparsity_type than 'structured'")
    found, multiple = Structures.of(block, family), config.channel_multiple
    if found.channels < multiple:
        raise ValueError(
            f"channel_multiple is {multiple}, and the MLP of {family.full_name(index)} has {found.channels} channels; use "
            f"{found.channels} or less"
        )
    removed = found.removed(rate, multiple, last=True)
    short = rate - found.share(removed)
    if found.channels - removed[1] == multiple and short * found.weights > multiple * found.channel_weights / 2 + 1:
        raise ValueError(
            f"sparsity_ratio is {config.final_sparsity}, but {family.full_name(index)} can lose only {removed[0]} of {found.heads} "
            f"key-value heads and {removed[1]} of {found.channels} channels: use at most "
            f"{config.final_sparsity * found.share(removed) / rate:.3f}"
        )


def check_separable(block: nn.Module, index: int, family: Family, instead: str) -> None:
    """Check that heads and channels of a block can go alone. Errors: ValueError naming what mixes them, and what to use instead."""
    projections = set(family.projections)
    head_dim = family.head_dim(block)
    for name, module in block.named_modules():
        apart = name in projections or not f"{name}.".startswith(family.inside)
        mixed = [p for p in module.parameters(recurse=False) if p.shape != (head_dim,)]
        if not head_dim or (mixed and not apart):
            raise ValueError(
                f"{family.full_name(index, name)} is a {type(module).__name__} over all heads or channels, so none can be removed "
                f"alone; use {instead}"
            )


def check_weights(block: nn.Module, index: int, family: Family) -> None:
    """Check block `index`. Errors: ValueError naming a tensor that holds NaN or infinity."""
    named = ((name, distributed.local(tensor)) for name, tensor in block.state_dict().items())
    check_finite(((family.full_name(index, name), tensor) for name, tensor in named))


def check_model(model: PreTrainedModel, settings: Settings) -> Decoder:
    """Check structure and weights; return the decoder of `model`.

    Errors: ValueError as `check_structure`, or naming a tensor that holds NaN or infinity.
    """
    decoder = check_structure(model, settings)
    check_finite((name, distributed.local(tensor)) for name, tensor in model.state_dict().items())
    return decoder
