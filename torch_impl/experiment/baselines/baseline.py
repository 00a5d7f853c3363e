"""What baselines have in common: the record of one, its result, one-shot pruning, training over all examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Protocol

import torch
from transformers import PreTrainedModel

from torch_impl import losa
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import trainable
from torch_impl.engine.record import Clock, StepRecord
from torch_impl.engine.settings import DENSE, Settings
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material

OnProgress = Callable[[int, int, float], None]
"""Called after every optimizer step with the steps done, the steps in total and the loss."""


@dataclass
class Costs:
    """Seconds and, on CUDA, peak bytes on the device of the parts of a baseline."""

    device: torch.device
    seconds: Counter[str] = field(default_factory=Counter)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Measure one part."""
        clock = Clock(self.device, on_part=self.on_part)
        yield
        clock.lap(part)
        self.seconds.update(clock.laps)

    def on_part(self, part: str) -> None:
        """Count the peak since the last call as that of a part which has ended."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peak_bytes[part] = max(peak, self.peak_bytes.get(part, 0))
            torch.cuda.reset_peak_memory_stats(self.device)

    def add_records(self, records: Sequence[StepRecord]) -> None:
        """Add the seconds of the steps of Algorithm 1, which tell its parts apart."""
        for record in records:
            self.seconds.update(record.seconds)


@dataclass
class Trained:
    """The result of a baseline.

    model: works with generate, lm-eval and perplexity. trainable: number of parameters that were trained, at their largest.
    seconds: of the parts importance, prune, reconstruct and train. peak_bytes: on the device, by part; empty on the CPU.
    """

    model: PreTrainedModel
    trainable: int
    optimizer_steps: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int]


class Work(Protocol):
    """How a baseline prunes and trains: see `Baseline.run`."""

    def __call__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        material: Material,
        config: Config,
        on_progress: OnProgress | None = None,
    ) -> Trained: ...


@dataclass(frozen=True)
class Baseline:
    """One way to fine-tune a pruned model. needs: packages that it imports; the extra `baselines` installs them.

    structured: it makes the model smaller by a method of its own, and trains only if the run does. dense_base: it trains beside
    dense weights alone, and cannot compress them (`TrainingConfig.train_base`). unmerged: its adapters stay beside the weights,
    because merging them would fill zeros.
    """

    name: str
    label: str
    work: Work
    needs: tuple[str, ...] = ()
    structured: bool = False
    dense_base: bool = False
    unmerged: bool = False

    def check(self) -> None:
        """Check that the packages are here. Errors: ValueError saying what to install."""
        if missing := [name for name in self.needs if find_spec(name) is None]:
            raise ValueError(
                f'baseline {self.name} needs {", ".join(missing)}; install it: pip install "losa-oracle[baselines]"'
            )

    def check_options(self, config: Config) -> None:
        """Errors: ValueError naming an option that this baseline would ignore."""
        if self.dense_base and config.training.compressed:
            raise ValueError(
                f"train_base is {config.training.train_base}, and baseline {self.name} keeps its base weights dense; "
                "use --train_base dense"
            )

    def run(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        material: Material,
        config: Config,
        on_progress: OnProgress | None = None,
    ) -> Trained:
        """Prune and train `model`, a copy of the dense one, in place. dense: the original, which stays as it is.

        Errors: as `check` and `check_options`; ValueError if there is too little to train on; FloatingPointError if training
        diverges.
        """
        self.check()
        self.check_options(config)
        return self.work(model, dense, material, config, on_progress)


def one_shot(settings: Settings) -> Settings:
    """Return the settings that prune in one shot, with the configuration's rates, and train nothing."""
    return dataclasses.replace(
        settings,
        prune=dataclasses.replace(settings.prune, steps=1),
        training=dataclasses.replace(settings.training, finetune=False, train_base=DENSE),
    )


def prune(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    costs: Costs,
    trains: bool = True,
) -> Decoder:
    """Prune in one shot; the model is plain again. Return its decoder.

    Errors: ValueError if it trains next, and there are no examples.
    """
    if trains and not material.examples:
        raise ValueError("there are no training examples; leave out --finetune false, or take the baseline none")
    records = losa.run(model, material.calibration, [], one_shot(config.settings), dense=dense, on_part=costs.on_part)
    decoder = Decoder(model)
    merge_adapters(decoder)
    costs.add_records(records)
    return decoder


def train(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    material: Material,
    config: Config,
    costs: Costs,
    on_progress: OnProgress | None,
    extra: training.Extra | None = None,
) -> int:
    """Train what requires gradients, one epoch over all examples with one schedule. Return the number of optimizer steps."""
    total = config.training.optimizer_steps(len(material.examples))

    def on_loss(step: int, loss: float, _: float) -> None:
        if on_progress is not None:
            on_progress(step + 1, total, loss)

    with costs.of("train"):
        losses = training.train(
            model, dense, material.examples, config.training, (0, total), on_loss=on_loss, extra=extra
        )
    return len(losses)


def finish(model: PreTrainedModel, count: int, steps: int, costs: Costs) -> Trained:
    """Freeze the model and state what it took. count: of trained parameters."""
    model.requires_grad_(False).eval()
    return Trained(model, count, steps, dict(costs.seconds), costs.peak_bytes)


def trainable_count(model: PreTrainedModel) -> int:
    """Count the numbers that are trained."""
    return sum(parameter.numel() for parameter in trainable(model))
