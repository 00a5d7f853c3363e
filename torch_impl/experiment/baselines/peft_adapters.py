"""LoRA and AdaLoRA by Hugging Face's peft. Their adapters fill zeros if merged, so they stay beside the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

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
from torch_impl.experiment.baselines.rank_allocator import allocate_at_once
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material

if TYPE_CHECKING:
    from peft import AdaLoraModel

NAME = "default"
# AdaLoRA's budget: it starts at 3/2 of the final rank and falls between these shares of the optimizer steps.
SURPLUS, WARM, SETTLED = 1.5, 0.1, 0.7
# The ranks are chosen about this often.
CHOICES = 100
ORTHOGONALITY = 0.5


def lora(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train dense low-rank adapters after one shot."""
    costs = Costs(model.device)
    decoder = prune(model, dense, material, config, costs)
    attach_lora(decoder, config.settings.mean_rank, config.adapter.scale, config.output.seed)
    count = trainable_count(model)
    steps = train(model, dense, material, config, costs, on_progress)
    return finish(model, count, steps, costs)


def adalora(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    on_progress: OnProgress | None = None,
) -> Trained:
    """Train adapters in the form of singular values, whose ranks fall to a budget while they train."""
    costs = Costs(model.device)
    total = config.training.optimizer_steps(len(material.examples))
    if total < 2:
        raise ValueError(f"adalora needs 2 or more optimizer steps, and {len(material.examples)} examples make {total}")
    decoder = prune(model, dense, material, config, costs)
    tuner = attach_adalora(decoder, config.settings.mean_rank, config.adapter.scale, total, config.output.seed)
    count = trainable_count(model)
    extra = Extra(penalty(tuner), tuner.update_and_allocate)
    steps = train(model, dense, material, config, costs, on_progress, extra)
    return finish(model, count, steps, costs)


def attach_lora(decoder: Decoder, rank: int, scale: float, seed: int) -> None:
    """Give all projections adapters of one rank."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, **_common(decoder, scale * rank)), decoder.model)
    _widen(decoder.model)


def attach_adalora(decoder: Decoder, rank: int, scale: float, total: int, seed: int) -> AdaLoraModel:
    """Give all projections adapters whose mean rank falls to `rank` within `total` optimizer steps, 2 or more."""
    from peft import AdaLoraConfig, AdaLoraModel

    torch.manual_seed(seed)
    settings = AdaLoraConfig(
        init_r=round(SURPLUS * rank),
        target_r=rank,
        total_step=total,
        tinit=int(WARM * total),
        tfinal=total - max(2, int(SETTLED * total)),
        deltaT=max(1, total // CHOICES),
        **_common(decoder, scale * rank),
    )
    tuner = AdaLoraModel(decoder.model, {NAME: settings}, NAME)
    _widen(decoder.model)
    allocate_at_once(tuner)
    return tuner


def _common(decoder: Decoder, alpha: float) -> dict[str, Any]:
    """Return the options of both. alpha: peft scales by alpha / r."""
    return {
        "target_modules": list(decoder.family.projections),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _widen(model: nn.Module) -> None:
    """Hold what is trained in float32 at least. Freeze AdaLoRA's count of ranks, which peft trains where dtypes differ."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def penalty(tuner: AdaLoraModel) -> Callable[[], torch.Tensor]:
    """Return AdaLoRA's penalty: 0.5 · mean ‖PᵀP − I‖_F over all A (by rows) and B (by columns)."""
    # Alike matrices are multiplied together: hundreds of products of their own would take longer than the optimizer step.
    alike: defaultdict[tuple[bool, torch.Size], list[torch.Tensor]] = defaultdict(list)
    for name, matrix in tuner.model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            alike[".lora_A." in name, matrix.shape].append(matrix)

    def distance() -> torch.Tensor:
        rows = [torch.stack(found) if by_rows else torch.stack(found).mT for (by_rows, _), found in alike.items()]
        grams = torch.cat([matrices @ matrices.mT for matrices in rows])
        identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        return ORTHOGONALITY * torch.linalg.matrix_norm(grams - identity).mean()

    return distance
