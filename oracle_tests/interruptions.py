"""Runs of Algorithm 1 that stop at a checkpoint, and damage to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiny_models.random_models import random_model
from torch_impl import losa
from torch_impl.engine import batches
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig


class Stop(Exception):  # noqa: N818 - asked for
    """The run has reached the checkpoint at which the test stops it."""


class Counting(Checkpointer):
    """Count checkpoints, and stop right after checkpoint `after`."""

    def __init__(
        self,
        folder: Path,
        after: int = 0,
        save_every: int = 1,
        attached: tuple[Path, ...] = (),
        in_background: bool = False,
    ) -> None:
        super().__init__(RunCheckpoints(folder), save_every, attached, in_background)
        self.after, self.count = after, 0

    def _save(self) -> None:
        super()._save()
        self.count += 1
        if self.count == self.after:
            raise Stop


def tiny(**changes: Any) -> tuple[nn.Module, torch.Tensor, list[list[batches.Example]]]:
    """Model, calibration tokens and two parts of training data. Dropout makes the random generators matter."""
    model = random_model("llama-gqa", attention_dropout=0.1, **changes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (6, 12), generator=generator)
    rows = torch.randint(model.config.vocab_size, (8, 10), generator=generator)
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return model, ids, [examples[:3], examples[3:]]


def settings(method: str = "wanda", pattern: str = "unstructured", **changes: Any) -> Settings:
    return Settings(
        prune=PruneConfig(prune_method=method, sparsity_type=pattern, steps=2),
        adapter=AdapterConfig(initial_rank=2, rank_shrink="fold"),
        calibration=CalibrationConfig(nsamples=6, seqlen=12, calibration_batch_size=4),
        training=TrainingConfig(
            **{
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "loss": "kl",
                **changes,
            }
        ),
    )


def outcome(setup: Settings, checkpointer: Checkpointer | None = None) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Run Algorithm 1; return its records without times and the merged model's tensors."""
    model, ids, parts = tiny()
    records = [record.as_dict() for record in losa.run(model, ids, parts, setup, checkpointer=checkpointer)]
    for record in records:
        record.pop("seconds")
    merge_adapters(Decoder(model))
    return records, model.state_dict()


def same(one: tuple, other: tuple) -> bool:
    return one[0] == other[0] and all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
