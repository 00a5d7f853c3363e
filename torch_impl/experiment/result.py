"""The result of a run, as losa_result.json holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.rates import PLAIN
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import provenance
from torch_impl.experiment.config import Config
from torch_impl.experiment.footprint import Footprints
from torch_impl.experiment.material import Material


@dataclass(frozen=True)
class Measured:
    """What was measured of one model; seconds: that it took to make it."""

    perplexity: float
    sparsity: float
    seconds: float


@dataclass(frozen=True)
class MeasuredModels:
    """The models of a run that were measured. one_shot: the trained one-shot model, if the run was asked for it."""

    dense: Measured
    pruned_at_once: Measured
    losa: Measured
    one_shot: Measured | None = None


@dataclass(frozen=True)
class Row(Measured):
    """The same with the bytes of all weights, as saved and if the zeros were not stored; of pruned models that are not saved, those
    of the saved one."""

    bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of all weights: of the dense model, of the saved one with pruned projections as a bitmap and their kept values, and of
    the saved one as it is, if it is smaller than the dense one."""

    dense: int
    packed: int
    smaller: int | None = None


@dataclass(frozen=True)
class Verification:
    """What was found when the saved model was read again. reloaded: how; sparsity_pruned_and_saved: of each projection."""

    reloaded: str
    largest_logit_difference: float
    projections: int
    sparsity_pruned_and_saved: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Result:
    """The figures of a run, and the options that they depend on."""

    model: str
    family: str
    method: str
    sparsity_type: str
    target_sparsity: float
    dense: Row
    pruned_at_once: Row
    losa: Row
    perplexity_after_step: list[float]
    evaluation: dict[str, Any]
    """Which text the perplexities are of."""
    train_examples: int
    lr_schedule: str
    loss: str
    step_shares: list[float]
    verification: Verification
    seconds_in_all: float
    seed: int
    learning_rate: float | None
    """None without fine-tuning."""
    ranks: list[int]
    """Of the adapters at the last step; none without fine-tuning."""
    reconstruct_epochs: int
    rates: str
    """layer_sparsity: how the sparsity of the blocks was chosen."""
    finetuned: bool
    steps: int
    peak_memory: dict[str, int]
    """Bytes."""
    samples: dict[str, dict[str, str]]
    """Prompt and text of dense and losa, if the models were in memory."""
    software: dict[str, str | None]
    texts: dict[str, str]
    """Name of the text for each purpose, without the path."""
    dtype: str
    """Precision of the run and of the saved weights, which may be another than that of the base model's files."""
    dense_blocks: list[int] = field(default_factory=lambda: [0, 0])
    """Blocks at the front and at the back that were not pruned."""
    license: str | None = None
    """Of the base model, if its card names one."""
    one_shot: Row | None = None
    """The trained one-shot model; with --baselines one_shot."""
    footprints: Footprints | None = None
    """Of structured pruning in one process, whose saved model is smaller."""

    @property
    def is_at_once(self) -> bool:
        """Return whether the run itself is one-shot pruning; `pruned_at_once` then repeats its figures."""
        more = self.finetuned or self.reconstruct_epochs or any(self.dense_blocks)
        return self.steps == 1 and self.rates == PLAIN and not more

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def summarise(
    config: Config,
    material: Material,
    family: str,
    measured: MeasuredModels,
    saved: SavedBytes,
    after_step: list[float],
    verification: pretrained.Verification,
    reloaded: str,
    seconds: float,
    records: Sequence[StepRecord],
    samples: dict[str, dict[str, str]],
    footprints: Footprints | None = None,
) -> Result:
    """Build the result of a run. seconds: in all."""

    def pruned(found: Measured) -> Row:
        as_saved = saved.dense if saved.smaller is None else saved.smaller
        return Row(**asdict(found), bytes=as_saved, packed_bytes=saved.packed)

    return Result(
        model=config.model.model,
        family=family,
        method=config.prune.prune_method,
        sparsity_type=config.prune.sparsity_type,
        target_sparsity=config.prune.final_sparsity,
        dense=Row(**asdict(measured.dense), bytes=saved.dense, packed_bytes=saved.dense),
        pruned_at_once=pruned(measured.pruned_at_once),
        losa=pruned(measured.losa),
        one_shot=None if measured.one_shot is None else pruned(measured.one_shot),
        perplexity_after_step=after_step,
        evaluation=material.evaluation_facts,
        train_examples=len(material.examples),
        lr_schedule=config.training.lr_schedule,
        loss=config.training.loss,
        step_shares=config.text.shares(config.prune.steps),
        verification=Verification(
            reloaded=reloaded,
            largest_logit_difference=verification.logit_difference,
            projections=len(verification.zeros),
            sparsity_pruned_and_saved=verification.zeros,
        ),
        seconds_in_all=seconds,
        seed=config.output.seed,
        learning_rate=config.training.learning_rate if config.training.finetune else None,
        ranks=records[-1].ranks,
        reconstruct_epochs=config.reconstruction.reconstruct_epochs,
        rates=config.prune.layer_sparsity,
        dense_blocks=config.prune.dense_blocks,
        finetuned=config.training.finetune,
        steps=config.prune.steps,
        peak_memory=provenance.peak_memory(material.model.device),
        samples=samples,
        software=provenance.software(),
        texts=_texts(config),
        dtype=str(material.model.dtype).removeprefix("torch."),
        footprints=footprints,
        license=provenance.license_in(pretrained.folder_of(material.model)),
    )


def _texts(config: Config) -> dict[str, str]:
    options = config.text
    named = {"calibration": options.calibration_data, "evaluation": options.eval_data}
    if config.training.finetune:
        named["fine-tuning"] = options.finetune_data
    return {purpose: Path(name).name if Path(name).exists() else name for purpose, name in named.items()}
