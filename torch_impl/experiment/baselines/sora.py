"""SoRA: adapters whose ranks drop out by a gate. Formula: reference/sora.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import adapter
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.training import Extra
from torch_impl.experiment.baselines.baseline import (
    Costs,
    OnProgress,
    Trained,
    finish,
    prune,
    train,
    trainable_count,
)
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.sora import gated_lora, soft_threshold

# Of the published example: λ, the weight of mean |g| in the loss, and λ₂, the threshold after each step.
PENALTY = 10.0
THRESHOLD = 3e-4


class GatedLinear(nn.Module):
    """A frozen linear layer with a gated adapter beside it.

    A (r, in) starts like LoRA's, B (out, r) at 0, the gate (r,) at N(0, 1).
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, seed: tuple[int, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, scale
        self.base_layer = linear.requires_grad_(False)
        like = linear.weight.new_empty(0, dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        gate = np.random.default_rng([*seed, 1]).standard_normal(rank)
        self.A = nn.Parameter(adapter.initial_rows(rank, self.in_features, seed).to(like))
        self.B = nn.Parameter(like.new_zeros(self.out_features, rank))
        self.gate = nn.Parameter(torch.from_numpy(gate).to(like))

    @property
    def weight(self) -> torch.Tensor:
        """Return the frozen weight (out, in)."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        y: torch.Tensor = self.base_layer(x)
        return y + gated_lora(x, self.A, self.B, self.gate, self.scale).to(y.dtype)


def attach(decoder: Decoder, rank: int, scale: float, seed: int) -> list[GatedLinear]:
    """Replace all projections with `GatedLinear`s; freeze all other parameters."""
    model: nn.Module = decoder.model
    model.requires_grad_(False)
    layers = []
    for index, block in enumerate(decoder.blocks):
        for number, (name, linear) in enumerate(decoder.projections(index).items()):
            assert isinstance(linear, nn.Linear)
            layers.append(GatedLinear(linear, rank, scale, (seed, 1, index, number)))
            block.set_submodule(name, layers[-1])
    return layers


def gated(layers: list[GatedLinear]) -> Extra:
    """Return what SoRA adds to an optimizer step: the penalty on the gates, and the threshold after the step.

    The gates' AdamW is that of A and B: AdamW treats every number by itself, so one optimizer or two are the same.
    """

    gates: list[torch.Tensor] = [layer.gate for layer in layers]
    ranks = [len(gate) for gate in gates]

    def penalty() -> torch.Tensor:
        return PENALTY * torch.cat(gates).abs().mean()

    # All gates at once: one by one they are six operations for each of some hundred projections.
    @torch.no_grad()
    def after(_: int) -> None:
        torch._foreach_copy_(gates, list(soft_threshold(torch.cat(gates), THRESHOLD).split(ranks)))

    return Extra(penalty, after)


def sora(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train gated adapters after one shot. They stay beside the weights."""
    costs = Costs(model.device)
    decoder = prune(model, dense, material, config, costs)
    layers = attach(decoder, config.settings.mean_rank, config.adapter.scale, config.output.seed)
    count = trainable_count(model)
    steps = train(model, dense, material, config, costs, on_progress, gated(layers))
    return finish(model, count, steps, costs)
