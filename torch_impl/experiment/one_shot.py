"""The row "one shot, trained" of the report (--baselines one_shot): what the steps of LoSA are worth."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from torch_impl import losa
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.rates import PLAIN
from torch_impl.engine.settings import Settings
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material


def trained_one_shot(settings: Settings) -> Settings:
    """Return settings that prune once, at uniform rates, and train adapters of one rank: the run's mean over its steps."""
    return replace(
        settings,
        prune=replace(settings.prune, steps=1, layer_sparsity=PLAIN),
        adapter=replace(settings.adapter, initial_rank=settings.mean_rank, rank_allocation="uniform"),
    )


def prune_and_train(config: Config, material: Material) -> float:
    """Turn the run's model, pruned and merged, into the trained one-shot model. Return the seconds that this took.

    The dense weights are read from disk again, so there are two models in memory, as in the run.
    """
    options = config.model
    dense, _ = pretrained.load(options.model, material.model.device, options.dtype, options.trust_remote_code)
    _copy_weights(dense, material.model)
    start = time.perf_counter()
    settings = trained_one_shot(config.settings)
    losa.run(material.model, material.calibration, [material.examples], settings, dense=dense.requires_grad_(False))
    fsdp.merge(Decoder(material.model))
    return time.perf_counter() - start


@torch.no_grad()
def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    for name, value in source.named_parameters():
        target.get_parameter(name).copy_(value)
