"""Check that a run's settings work with a model and that its weights are finite."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import AdaptedLinear
from torch_impl.engine.checkpoints.contents import check_finite
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.rates import RULES
from torch_impl.engine.settings import Settings


def check_structure(model: PreTrainedModel, settings: Settings) -> Decoder:
    """Check everything that does not need the weights; return the decoder of `model`.

    Errors: ValueError for an unknown structure, projections that are not plain linears, too few blocks for layer_sparsity, or a
    number of inputs that is not a multiple of M.
    """
    decoder = Decoder(model)
    blocks, family = decoder.blocks, decoder.family
    if len(blocks) < (least := settings.prune.rule.least_blocks):
        others = [rule.name for rule in RULES.values() if rule.least_blocks <= len(blocks)]
        raise ValueError(
            f"layer_sparsity {settings.prune.layer_sparsity!r} needs {least} or more decoder blocks, and the model has "
            f"{len(blocks)}; use layer_sparsity {', '.join(others)}"
        )
    for index, block in enumerate(blocks):
        for name, projection in family.projections_of(block).items():
            if not isinstance(projection, nn.Linear | AdaptedLinear):
                raise ValueError(
                    f"{family.full_name(index, name)} is a {type(projection).__name__}; give a plain model: merge other "
                    "adapters first, and take the model before packing or quantisation"
                )
        for name, weight in family.weights_of(block).items():
            inputs = weight.shape[1]
            if settings.prune.group is not None and inputs % settings.prune.group[1]:
                raise ValueError(
                    f"sparsity_type {settings.prune.sparsity_type!r} needs a multiple of {settings.prune.group[1]} inputs, and "
                    f"{family.full_name(index, name)} has {inputs}; use another sparsity_type"
                )
    return decoder


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
