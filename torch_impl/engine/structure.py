"""Whether a run's settings can be carried out on a model, and whether its weights are numbers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine import distributed
from torch_impl.engine.checkpoints.contents import check_finite
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.rates import RULES
from torch_impl.engine.settings import Settings


def check_structure(model: PreTrainedModel, settings: Settings) -> Decoder:
    """The decoder of `model`, after checking what can be checked without its weights.

    Errors: ValueError for an unknown structure, fewer than three blocks with RMI, or inputs that M does not divide.
    """
    decoder = Decoder(model)
    blocks, family = decoder.blocks, decoder.family
    if len(blocks) < (least := settings.prune.rule.least_blocks):
        others = [rule.name for rule in RULES.values() if rule.least_blocks <= len(blocks)]
        raise ValueError(
            f"layer_sparsity is {settings.prune.layer_sparsity!r} and the model has {len(blocks)} decoder blocks; "
            f"allowed: {least} or more, or layer_sparsity {', '.join(others)}"
        )
    for index, block in enumerate(blocks):
        for name, weight in family.weights_of(block).items():
            inputs = weight.shape[1]
            if settings.prune.group is not None and inputs % settings.prune.group[1]:
                raise ValueError(
                    f"sparsity_type is {settings.prune.sparsity_type!r} and {family.full_name(index, name)} has "
                    f"{inputs} inputs; allowed: a multiple of {settings.prune.group[1]}"
                )
    return decoder


def check_weights(block: nn.Module, index: int, family: Family) -> None:
    """Errors: ValueError naming a tensor of block number `index` that holds NaN or infinity."""
    named = ((name, distributed.local(tensor)) for name, tensor in block.state_dict().items())
    check_finite(((family.full_name(index, name), tensor) for name, tensor in named))


def check_model(model: PreTrainedModel, settings: Settings) -> Decoder:
    """The decoder of `model`, after checking that these settings can be carried out on it.

    Errors: ValueError as for `check_structure`, or naming a tensor that holds NaN or infinity.
    """
    decoder = check_structure(model, settings)
    check_finite((name, distributed.local(tensor)) for name, tensor in model.state_dict().items())
    return decoder
