"""What baselines that remove rows, columns or blocks have in common: the model becomes smaller, then LoRA heals it.

There are no zeros that an adapter could fill, so it is merged. See docs/baselines.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from torch_impl.engine.adapted_linear import adapters, attach_adapters, merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines.baseline import Costs, OnProgress, Trained, Work, finish, train, trainable_count
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material

Remove = Callable[[Decoder, Material, Config], None]
"""Makes a model smaller in place, by the calibration sequences of the material. It runs without gradients."""


def smaller(remove: Remove) -> Work:
    """Return the work of a baseline that removes parts of a model, and heals it with LoRA if the run trains."""

    def work(
        model: PreTrainedModel,
        dense: PreTrainedModel,
        material: Material,
        config: Config,
        on_progress: OnProgress | None = None,
    ) -> Trained:
        check(material, config)
        costs, decoder = Costs(model.device), Decoder(model)
        with costs.of("prune"), torch.no_grad():
            remove(decoder, material, config)
        count = steps = 0
        if config.training.finetune:
            attach_lora(decoder, config)
            count = trainable_count(model)
            steps = train(model, dense, material, config, costs, on_progress)
            merge_adapters(decoder)
        return finish(model, count=count, steps=steps, costs=costs)

    return work


def check(material: Material, config: Config) -> None:
    """Errors: ValueError if there is nothing to train on, the sparsity is a pattern of zeros, or an option would do nothing."""
    if config.training.finetune and not material.examples:
        raise ValueError("there are no training examples; use --finetune false")
    if config.prune.group is not None:
        raise ValueError(
            f"sparsity_type is {config.prune.sparsity_type}, and this baseline removes whole structures; give a share"
        )
    if any(config.prune.dense_blocks):
        raise ValueError(
            f"dense_blocks is {config.prune.dense_blocks}, and this baseline chooses by itself what stays; leave it out"
        )
    if config.reconstruction.reconstruct_epochs:
        raise ValueError(
            f"reconstruct_epochs is {config.reconstruction.reconstruct_epochs}, and this baseline reconstructs nothing; "
            "use --reconstruct_epochs 0"
        )


def attach_lora(decoder: Decoder, config: Config) -> None:
    """Give all projections adapters of the run's mean rank. Without zeros, the masked adapter is LoRA."""
    attach_adapters(decoder, config.adapter.scale)
    for number, layer in enumerate(adapters(decoder.model)):
        layer.resize(config.settings.mean_rank, (config.output.seed, 2, number))


def matrices(decoder: Decoder) -> list[torch.Tensor]:
    """Return the matrices of all blocks: the projections and those that pruning has added."""
    return [tensor for block in decoder.blocks for tensor in block.state_dict().values() if tensor.dim() == 2]


def gone_share(decoder: Decoder, dense: Decoder) -> float:
    """Compute the share of the dense model's prunable weights that a plain model has lost: the sparsity of LoSA, Eq. 5.

    A weight is lost if it is 0 or its row, column or block is not there any more. A matrix that pruning has added to a block
    counts as weights that are left.
    """
    left = sum(int(tensor.count_nonzero()) for tensor in matrices(decoder))
    return 1 - left / sum(dense.prunable_weights)


def kept_parameters(decoder: Decoder) -> int:
    """Count the numbers of the whole model that are not 0: tied ones once, and matrices that pruning has added."""
    tensors = [*decoder.model.parameters(), *(tensor for tensor in matrices(decoder))]
    found = {tensor.data_ptr(): int(tensor.count_nonzero()) for tensor in tensors if tensor.numel()}
    return sum(found.values())
