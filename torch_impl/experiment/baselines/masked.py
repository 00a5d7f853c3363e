"""Baselines that keep the zeros: no training, our masked adapter in one shot, every kept weight, and LoSA itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from torch_impl import losa as algorithm
from torch_impl.engine.adapted_linear import adapters, merge_adapters
from torch_impl.engine.batches import Example
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import Settings, TrainingConfig
from torch_impl.experiment.baselines.baseline import Costs, OnProgress, Trained, finish, prune, train
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.experiment.one_shot import trained_one_shot


def none(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Prune, and train nothing."""
    costs = Costs(model.device)
    prune(model, dense, material, config, costs, trains=False)
    return finish(model, count=0, steps=0, costs=costs)


def sparse_lora(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train our masked adapters after one shot, with uniform rates and ranks: Algorithm 1 with T = 1."""
    return _by_algorithm_1(model, dense, material, trained_one_shot(config.settings), [1.0], on_progress)


def losa(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Run Algorithm 1 as configured. Its parts end with whole batches, so that it takes as many optimizer steps as the others."""
    shares = config.text.shares(config.prune.steps)
    return _by_algorithm_1(model, dense, material, config.settings, shares, on_progress)


def _by_algorithm_1(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    settings: Settings,
    shares: Sequence[float],
    on_progress: OnProgress | None,
) -> Trained:
    parts = whole_batches(material.examples, shares, settings.training)
    total, done = settings.training.optimizer_steps(len(material.examples)), itertools.count(1)

    def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
        if on_progress is not None:
            on_progress(next(done), total, loss)

    costs = Costs(model.device)
    records = algorithm.run(
        model, material.calibration, parts, settings, on_loss=on_loss, dense=dense, on_part=costs.on_part
    )
    costs.add_records(records)
    count = sum(layer.A.numel() + layer.B.numel() for layer in adapters(model))
    merge_adapters(Decoder(model))
    return finish(model, count, sum(len(record.losses) for record in records), costs)


def whole_batches(examples: Sequence[Example], shares: Sequence[float], config: TrainingConfig) -> list[list[Example]]:
    """Split the examples by shares into parts that end with whole batches, so that no part adds an optimizer step.

    Errors: ValueError if there are fewer batches than parts.
    """
    size, count = config.batch_size, config.optimizer_steps(len(examples))
    if count < len(shares):
        raise ValueError(
            f"{len(examples)} training examples make {count} batches of {size}, fewer than the {len(shares)} steps; "
            "use fewer steps, more examples or smaller batches"
        )
    ends = [0]
    for left, share in zip(range(len(shares) - 1, -1, -1), itertools.accumulate(shares), strict=True):
        ends.append(min(max(round(share * count), ends[-1] + 1), count - left))
    return [list(examples[start * size : end * size]) for start, end in itertools.pairwise(ends)]


def full(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train every kept weight of the projections, in float32 at least: the ceiling for adapters at the same tokens."""
    costs = Costs(model.device)
    decoder, dtype = prune(model, dense, material, config, costs), model.dtype
    module: nn.Module = model
    module.to(torch.promote_types(dtype, torch.float32))
    count = sum(int(weight.count_nonzero()) for weight in decoder.weights)
    handles = [_train_kept(weight) for weight in decoder.weights]
    steps = train(model, dense, material, config, costs, on_progress)
    for handle in handles:
        handle.remove()
    module.to(dtype)
    return finish(model, count, steps, costs)


def _train_kept(weight: torch.Tensor) -> RemovableHandle:
    """Let a weight (out, in) be trained where it is not 0. Return a handle to the hook that masks its gradient.

    A pruned weight has no gradient, so AdamW leaves it exactly 0: its moments and its decay are 0.
    """
    kept = weight != 0
    weight.requires_grad_(True)
    handle: RemovableHandle = weight.register_hook(lambda gradient: gradient * kept)
    return handle
