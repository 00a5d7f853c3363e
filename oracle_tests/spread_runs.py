"""Work for tests with several processes: whole runs of a tiny float64 LLaMA, with checkpoints."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from oracle_tests.llama_pair import float64_llama, random_llama, to_hugging_face
from reference import llama
from tiny_models.random_models import random_model
from torch_impl import losa
from torch_impl.bench.large import device_peak
from torch_impl.engine import adapted_linear, distributed, gradients, statistics
from torch_impl.engine.batches import IGNORED, Example
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients, sum_loss
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.sections import TextConfig

SIZES = llama.Sizes(vocabulary=32, hidden=16, intermediate=20, heads=4, kv_heads=2, norm_eps=1e-5, rope_theta=500.0)


def settings(**changes: Any) -> Settings:
    training = {"loss": "kl", "learning_rate": 1e-2, "warmup_ratio": 0.0, "per_device_train_batch_size": 2}
    training |= {
        name: changes.pop(name) for name in ("loss", "gradient_checkpointing", "hold_merged") if name in changes
    }
    shrink = changes.pop("rank_shrink", "truncate")
    epochs, window = changes.pop("reconstruct_epochs", 0), changes.pop("reconstruct_window", 1)
    return Settings(
        prune=PruneConfig(steps=2, **{"sparsity_ratio": 0.6, **changes}),
        adapter=AdapterConfig(initial_rank=3, max_rank=5, rank_shrink=shrink),
        # Seven sequences, which no number of processes divides evenly.
        calibration=CalibrationConfig(nsamples=7, seqlen=6, rmi_samples=5, calibration_batch_size=2),
        training=TrainingConfig(gradient_accumulation_steps=2, **training),
        # Three batches of the seven sequences, which processes cannot share evenly.
        reconstruction=ReconstructionConfig(epochs, 1e-2, 3, window),
    )


def model(tied: bool = True) -> Any:
    return to_hugging_face(random_llama(SIZES, 3, tied, seed=1, biased=True))


def parts() -> list[list[Example]]:
    """Two parts of training data; the last optimizer step of each has one sequence, and some first tokens have no labels."""
    generator = np.random.default_rng(3)

    def example(start: int) -> Example:
        row = torch.tensor(generator.integers(SIZES.vocabulary, size=generator.integers(4, 9)))
        labels = row.clone()
        labels[:start] = IGNORED
        return {"input_ids": row, "labels": labels}

    return [[example(k % 3) for k in range(count)] for count in (5, 9)]


@dataclass(frozen=True)
class Outcome:
    """Records of every step, and weights and masks of the merged model by projection."""

    records: list[losa.StepRecord]
    weights: dict[str, np.ndarray]


class Fatal(Checkpointer):
    """A checkpointer with a checkpoint at every opportunity; one process dies by SIGKILL before the n-th is written."""

    def __init__(self, folder: Path, n: int | None = None) -> None:
        super().__init__(RunCheckpoints(folder), save_every=1)
        self._left = n

    def _save(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0 and distributed.process_index() == distributed.processes() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        super()._save()


def run(
    case: Settings, folder: Path | None = None, checkpoints: Path | None = None, fatal: int | None = None
) -> Outcome:
    """Run LoSA on all processes; process 0 returns the outcome. checkpoints, fatal: see `Fatal`."""
    ours = model()
    decoder = Decoder(ours)
    ids = torch.tensor(np.random.default_rng(2).integers(SIZES.vocabulary, size=(7, 6)))
    with float64_llama():
        checkpointer = None if checkpoints is None else Fatal(checkpoints, fatal)
        records = losa.run(ours, ids, parts(), case, checkpointer=checkpointer)
    if not distributed.is_sharded(ours):
        adapted_linear.merge_adapters(decoder)
        return Outcome(records, {n: p.detach().numpy() for n, p in ours.named_parameters()})
    masks = fsdp.merge(decoder)
    for name, mask in masks.items():
        weight = ours.get_submodule(name).weight
        assert distributed.local(weight).shape == mask.shape
        assert len(mask) == len(weight) // distributed.processes()
    pretrained.check_zeros(Path("in memory"), ours, masks)
    if folder is not None:
        fsdp.save(decoder, folder)
    weights = {
        n: distributed.full_tensor(p.detach()) for n, p in ours.named_parameters() if not n.endswith((".A", ".B"))
    }
    return Outcome(records, {n: w.numpy() for n, w in weights.items()})


def run_out_of_memory(case: Settings, process: int) -> None:
    """Run LoSA where one process runs out of memory for any micro-batch but the smallest."""

    def limited(ours: Any, batch: Example, dense: Any) -> torch.Tensor:
        if distributed.process_index() == process and len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum_loss(ours, batch, dense)

    gradients.sum_loss = limited
    try:
        run(case)
    finally:
        gradients.sum_loss = sum_loss


def gram(features: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Compute `statistics.gram_of` from this process's share of the sequences."""
    own = distributed.own_sequences(torch.tensor(features), "rows").to(dtype)
    return statistics.gram_of(own).numpy()


class Received(TorchDispatchMode):
    """Count the bytes that this process receives in collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = distributed.processes()
        name = str(func)
        if name.startswith("c10d."):
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            own = {"allreduce_": 2 * (count - 1) / count, "_allgather_base_": (count - 1) / count, "broadcast_": 1.0}
            kind = name.split(".")[1]
            # In an all-to-all exchange this process keeps its own rows of its columns.
            stays = args[1].nbytes * first.nbytes / self.exchanged if kind == "alltoall_base_" else 0.0
            self.bytes[kind] += int(first.nbytes * own.get(kind, 1.0) - stays)
        return func(*args, **(kwargs or {}))

    exchanged = 1
    """Bytes of the features of all sequences, which `alltoall_base_` exchanges."""


def received(method: str, epochs: int, window: int, rule: str) -> tuple[dict[str, int], dict[str, int], int]:
    """Measure bytes received in one calibration and one optimizer step of a float32 model, and bytes of frozen rows held."""
    ours = random_model("llama")
    config = spread_config(method, epochs, window, rule)
    calibration, training_config = config.calibration, config.training
    ids = torch.randint(257, (8, 16), generator=torch.Generator().manual_seed(0))
    case = Settings(
        prune=config.prune,
        calibration=calibration,
        training=dataclasses.replace(training_config, finetune=False),
        reconstruction=config.reconstruction,
    )
    with Received() as calibrating:
        calibrating.exchanged = len(ids) * 16 * 32 * 4
        losa.run(ours, ids, [], case)
    dense = fsdp.copy_model(ours)
    for number, layer in enumerate(adapted_linear.adapters(ours)):
        layer.resize(6, (number,))
    held = sum(p.to_local().nbytes for p in ours.parameters() if isinstance(p, DTensor))
    batch = [{"input_ids": row, "labels": row} for row in ids]
    with Gradients(ours, dense, training_config) as gradients:
        # FSDP2 records passes without gradients too, and prefetches one block needlessly in the first backward after them.
        gradients.of(batch)
        with Received() as stepping:
            gradients.of(batch)
    return dict(calibrating.bytes), dict(stepping.bytes), held


def spread_config(method: str, epochs: int = 0, window: int = 1, rule: str = "rmi") -> Config:
    """Options of the run that is measured."""
    return Config(
        prune=PruneConfig(prune_method=method, steps=1, layer_sparsity=rule),
        calibration=CalibrationConfig(nsamples=8, seqlen=16, rmi_samples=8, calibration_batch_size=4),
        training=TrainingConfig(loss="kl", per_device_train_batch_size=2, gradient_accumulation_steps=4),
        reconstruction=ReconstructionConfig(epochs, 3e-3, 3, window),
    )


def peak_config(tokens: int) -> Config:
    """Options of an optimizer step and an evaluation whose memory is measured."""
    return Config(
        prune=PruneConfig(prune_method="magnitude", steps=1),
        calibration=CalibrationConfig(nsamples=8, seqlen=16, rmi_samples=8),
        training=TrainingConfig(loss="ce", per_device_train_batch_size=2, gradient_accumulation_steps=2),
        text=TextConfig(train_seqlen=tokens, eval_seqlen=tokens, eval_batch_size=2),
    )


def peak_model(vocabulary: int) -> Any:
    """A float32 LLaMA whose weights are large beside a few tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=False)).eval()


def peaks(vocabulary: int, tokens: int) -> dict[str, int]:
    """Measure the bytes of all tensors of this process at the peak of an optimizer step and of an evaluation.

    The smallest peak of three: gloo's thread may release a gathered block late, which holds a block or two more.
    """
    ours, config = peak_model(vocabulary), peak_config(tokens)
    dense = fsdp.copy_model(ours)
    for part in (ours, dense):
        adapted_linear.attach_adapters(Decoder(part), 1.0)
        distributed.shard(Decoder(part), torch.device("cpu"))
    for number, layer in enumerate(adapted_linear.adapters(ours)):
        layer.resize(config.adapter.initial_rank, (number,))
    ids = torch.randint(vocabulary, (4, tokens), generator=torch.Generator().manual_seed(0))
    batch = [{"input_ids": row, "labels": row} for row in ids]
    with Gradients(ours, None, config.training) as gradients:
        gradients.of(batch)
        held = _held(ours, dense)
        training = min(device_peak(lambda: gradients.of(batch), torch.device("cpu"))[0] for _ in range(3))
    for parameter in ours.parameters():
        parameter.grad = None
    evaluation = min(device_peak(lambda: perplexity(ours, ids, 2), torch.device("cpu"))[0] for _ in range(3))
    return {"training": held + training, "evaluation": _held(ours, dense) + evaluation}


def all_peaks(cases: list[tuple[int, int]]) -> list[dict[str, int]]:
    return [peaks(*case) for case in cases]


def _held(*models: Any) -> int:
    """Bytes of the rows, adapters and gradients that a process holds."""
    found = [parameter for model in models for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in found if parameter.grad is not None]
    return sum(distributed.local(tensor.detach()).nbytes for tensor in (*found, *gradients))
