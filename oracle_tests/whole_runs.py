"""One run for both packages: a model, its texts and settings, and production's result."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from oracle_tests.llama_pair import HF_NAMES, float64_llama, random_llama, to_hugging_face
from reference import llama
from reference import losa as reference_losa
from reference.adapted_linear import AdaptedLinear
from reference.loss import IGNORED
from torch_impl import losa as torch_losa
from torch_impl.engine import adapted_linear
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig

Weights = list[dict[str, np.ndarray]]


SIZES = {
    "mha": llama.Sizes(vocabulary=17, hidden=8, intermediate=16, heads=2, kv_heads=2),
    "gqa": llama.Sizes(vocabulary=32, hidden=16, intermediate=24, heads=4, kv_heads=2, norm_eps=1e-5, rope_theta=500.0),
    "mqa": llama.Sizes(vocabulary=13, hidden=16, intermediate=8, heads=4, kv_heads=1),
}


@dataclass(frozen=True)
class Case:
    """One run: a model, its texts, settings for both packages, and production's own settings (batch sizes, memory)."""

    sizes: llama.Sizes
    blocks: int
    tied: bool
    settings: reference_losa.Settings
    micro_batch: int
    accumulation: int
    calibration_batch: int
    hold_merged: str
    checkpointing: bool
    seed: int
    biased: bool = False
    widths: tuple[int, ...] = ()
    """Widths of the blocks' MLPs, in turn; default: that of `sizes`."""
    start: tuple[float, ...] = ()
    """Initial shares of zeros of the blocks, in turn; default: none."""
    silent: float = 0.0
    """Share of zero rows in every projection, as a structured pruner leaves them."""
    unlabelled: bool = False
    """Whether the second example of every part has no labels."""

    def model(self) -> llama.Llama:
        dense = random_llama(self.sizes, self.blocks, self.tied, self.seed, self.biased, self.widths)
        generator = np.random.default_rng([self.seed, 3])
        shares = islice(cycle(self.start or [0.0]), self.blocks)

        def sparse(weight: np.ndarray, share: float) -> np.ndarray:
            loud = np.arange(len(weight)) >= round(self.silent * len(weight))
            return weight * (generator.random(weight.shape) >= share) * loud[:, None]

        return dense.with_weights(
            [
                {name: sparse(weight, share) for name, weight in block.weights.items()}
                for share, block in zip(shares, dense.blocks, strict=True)
            ]
        )

    def calibration(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 1]).integers(self.sizes.vocabulary, size=(5, 6))

    def parts(self) -> list[list[reference_losa.Example]]:
        """Parts of unequal size, sequences of unequal length, some without labels on their first tokens, or without any.

        If a sequence has labels, its last token has one. If the first prediction of a sequence were the only one of a step,
        queries and keys would learn nothing (a first token attends only to itself): their gradient is 0, rounding makes it 1e-17
        in one package, Adam divides by its size, and the next step amplifies the difference.
        """
        generator = np.random.default_rng([self.seed, 2])

        def example(number: int) -> reference_losa.Example:
            row = generator.integers(self.sizes.vocabulary, size=generator.integers(4, 9))
            labels = row.copy()
            labels[: generator.integers(0, 4)] = IGNORED
            if self.unlabelled and number == 1:
                labels[:] = IGNORED
            return {"input_ids": row, "labels": labels}

        steps = self.settings.steps if self.settings.finetune else 0
        return [[example(number) for number in range(generator.integers(4, 9))] for _ in range(steps)]


PLAIN = Case(
    sizes=SIZES["gqa"],
    blocks=4,
    tied=True,
    settings=reference_losa.Settings(steps=5, rmi_samples=5, learning_rate=2e-2, batch_size=2, rank_shrink="fold"),
    micro_batch=1,
    accumulation=2,
    calibration_batch=2,
    hold_merged="on",
    checkpointing=False,
    seed=6,
)


def special(**changes: Any) -> Case:
    """The plain run with three quick steps and the given fields of the case or of its settings."""
    ours = {name: changes.pop(name) for name in list(changes) if name not in {field.name for field in fields(Case)}}
    ours = {"steps": 3, "learning_rate": 1e-2, **ours}
    return replace(PLAIN, **changes, settings=replace(PLAIN.settings, **ours))


def _taken(kind: type, values: dict[str, Any], **changes: Any) -> Any:
    """Make a production config from the reference's settings of the same names."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values} | changes)


def production_settings(case: Case) -> Settings:
    values = asdict(case.settings)
    pattern = {} if case.settings.group is None else {"sparsity_ratio": None}
    return Settings(
        prune=_taken(PruneConfig, values, **pattern),
        adapter=_taken(AdapterConfig, values),
        reconstruction=_taken(ReconstructionConfig, values),
        calibration=_taken(
            CalibrationConfig, values, nsamples=5, seqlen=6, calibration_batch_size=case.calibration_batch
        ),
        training=_taken(
            TrainingConfig,
            values,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.accumulation,
            hold_merged=case.hold_merged,
            gradient_checkpointing=case.checkpointing,
        ),
        seed=case.settings.seed,
    )


@dataclass(frozen=True)
class Production:
    """Result of torch_impl.losa.run: a record of each step with the layers at its end, and the merged weights."""

    records: list[reference_losa.StepRecord]
    merged: Weights


def run_production(case: Case, dtype: torch.dtype = torch.float64) -> Production:
    """Run production with the model in `dtype`; in float64 Hugging Face's norms and angles are float64, too."""
    model = to_hugging_face(case.model()).to(dtype)
    decoder = Decoder(model)
    records: list[reference_losa.StepRecord] = []

    def snapshot(record: torch_losa.StepRecord) -> None:
        values = record.as_dict()
        values.pop("seconds")
        blocks = [
            {
                name: AdaptedLinear(
                    *(
                        getattr(block.get_submodule(hf), what).double().detach().numpy().copy()
                        for what in ("weight", "A", "B")
                    )
                )
                for name, hf in HF_NAMES.items()
            }
            for block in decoder.blocks
        ]
        records.append(reference_losa.StepRecord(**values, layers=blocks))

    parts = [[{k: torch.tensor(v) for k, v in example.items()} for example in part] for part in case.parts()]
    with float64_llama() if dtype == torch.float64 else nullcontext():
        torch_losa.run(model, torch.tensor(case.calibration()), parts, production_settings(case), snapshot)
    adapted_linear.merge_adapters(decoder)
    merged = [
        {name: block.get_submodule(hf).weight.double().detach().numpy() for name, hf in HF_NAMES.items()}
        for block in decoder.blocks
    ]
    return Production(records, merged)
