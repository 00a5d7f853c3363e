"""The memory of training: the adapters with their gradients and moments, and the passes of a micro-batch."""

from __future__ import annotations

import math

import torch

from torch_impl import schedule
from torch_impl.engine.calibration import compiles
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.sizes import Sizes


def adapters(config: Config, sizes: Sizes, cards: int) -> dict[str, int]:
    """Return the adapters at the last step, with the highest ranks; several cards also hold the gradients as one message."""
    if not config.training.finetune:
        return {}
    size = sizes.adapters(schedule.mean_rank(config.prune.steps, config.adapter.initial_rank))
    return {"adapters": size, "gradients": size * (2 if cards > 1 else 1), "moments": 2 * size}


def micro_batch(config: Config, cards: int) -> int:
    """Return the number of sequences that a card trains on at once."""
    training = config.training
    return min(training.per_device_train_batch_size, math.ceil(training.batch_size / cards))


def micro_batches(config: Config, sizes: Sizes, place: Place) -> dict[str, int]:
    """Return the memory of the forward and backward pass of one micro-batch after the other."""
    training = config.training
    tokens = micro_batch(config, place.cards) * config.text.train_seqlen
    merged = sizes.prunable * sizes.itemsize
    holds = _holds_merged(config, sizes, place)
    compiled = compiles(training.compiling, sizes.prunable, torch.device(place.kind))
    of_block = tokens * sizes.kept_for_backward(compiled, not holds and not training.gradient_checkpointing)
    # The gradient of a weight is a full matrix until it is contracted, and so is a merged weight that is not held, and an
    # unpacked one.
    work = sizes.largest_projection * sizes.itemsize * (1 if holds else 3 if training.compressed else 2)
    logits = sizes.loss(tokens, training.loss == "kl")
    if training.gradient_checkpointing:
        kept, work = sizes.stream(tokens), of_block + work
    else:
        kept = of_block
    return {
        "merged": merged if holds else 0,
        "activations": kept * len(sizes.blocks),
        **({"work": work} if work > logits else {"logits": logits}),
    }


def _holds_merged(config: Config, sizes: Sizes, place: Place) -> bool:
    """Return whether merged weights are held during training; see `TrainingConfig.hold_merged`."""
    wanted = config.training.hold_merged
    if config.training.compressed:
        return False
    if place.cards > 1 or wanted != "auto":
        return place.cards == 1 and wanted == "on"
    needed = 2 * sizes.weights() + 2 * sizes.prunable * sizes.itemsize
    return place.kind != "cuda" or needed <= place.free
