"""Tokens, examples, settings and models for tests of single parts of a run."""

from __future__ import annotations

import torch
from torch import nn
from transformers.generation import BaseStreamer

from tiny_models.random_models import random_model
from torch_impl.engine import adapted_linear, batches
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig
from torch_impl.experiment.planning.sizes import BlockShapes, Sizes

# Of a model small enough to work out every figure by hand.
# Two bytes a number. Blocks of 280 prunable weights and 300 in all, of 240 and 260; 200 numbers outside.
SIZES = Sizes(
    itemsize=2,
    blocks=(
        BlockShapes(((12, 8), (12, 8), (11, 8), (20,)), ((12, 8), (12, 8), (11, 8))),
        BlockShapes(((8, 12), (12, 8), (6, 8), (20,)), ((8, 12), (12, 8), (6, 8))),
    ),
    outside=((17, 8), (64,)),
    inputs=(8, 8, 8, 12),
    hidden=8,
    width=12,
    gated=True,
    keys=4,
    vocabulary=17,
)


def token_ids(model: nn.Module, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def settings(**changes: object) -> Settings:
    """Settings of two quick steps."""
    training = TrainingConfig(
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        **changes.pop("training", {}),  # type: ignore[arg-type]
    )
    adapter = AdapterConfig(initial_rank=3, **changes.pop("adapter", {}))  # type: ignore[arg-type]
    return Settings(
        prune=PruneConfig(**{"steps": 2, "sparsity_ratio": None, **changes}),  # type: ignore[arg-type]
        adapter=adapter,
        calibration=CalibrationConfig(nsamples=6, seqlen=12, rmi_samples=4, calibration_batch_size=4),
        training=training,
    )


def parts_for(model: nn.Module, steps: int, rows: int = 8, length: int = 12) -> list[list[dict[str, torch.Tensor]]]:
    ids = token_ids(model, steps * rows, length, seed=5)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    return [examples[t * rows : (t + 1) * rows] for t in range(steps)]


class Heard(BaseStreamer):
    """A streamer that records what it receives."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def prompt(batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 200, (batch, 7), generator=torch.Generator().manual_seed(3))


def adapted_model(name: str = "llama-gqa") -> nn.Module:
    model = random_model(name).double().eval()
    adapted_linear.attach_adapters(Decoder(model), 2.0)
    for number, layer in enumerate(adapted_linear.adapters(model)):
        layer.resize(2, (number,))
    return model


def examples_for(model: nn.Module, lengths: list[int], seed: int = 0) -> list[batches.Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(model.config.vocab_size, (n,), generator=generator) for n in lengths]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]
