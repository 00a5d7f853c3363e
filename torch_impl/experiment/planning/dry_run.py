"""The plan of a run: what it will do and need, from the model's configuration, without loading weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from torch_impl import schedule
from torch_impl.engine import distributed, structure
from torch_impl.engine.checkpoints.pretrained import choose_device, outline
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import checks, gradients
from torch_impl.experiment.planning.cards import Card, card_of_device, find_card
from torch_impl.experiment.planning.outlook import Outlook, outlook
from torch_impl.experiment.planning.parts import Peak, Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.traffic import CalibrationTraffic, StepTraffic, calibration_traffic, step_traffic
from torch_impl.experiment.sections import ModelConfig
from torch_impl.experiment.text.sources import check_source
from torch_impl.experiment.text.written import check_can_write


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a run."""

    sweeps: int
    reconstruction: int
    training: int
    writing: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.sweeps + self.reconstruction + self.training + self.writing


@dataclass(frozen=True)
class Plan:
    """The plan of a run. sparsity, ranks: target sparsity and mean rank of each step; no ranks without fine-tuning."""

    config: Config
    family: str
    device: str
    dtype: str
    cards: int
    blocks: int
    parameters: int
    prunable: int
    sparsity: tuple[float, ...]
    ranks: tuple[int, ...]
    memory: Peak
    """Of each card, and of the host memory of one process."""
    step_traffic: StepTraffic
    calibration_traffic: CalibrationTraffic
    disk: checks.Disk
    work: Work
    outlook: Outlook | None = None
    """On the card of --plan_for, or the one that is here, if its speed is known."""


def _described(
    config: Config, known: dict[ModelConfig, PreTrainedModel] | None = None
) -> tuple[PreTrainedModel, torch.device, Sizes]:
    """Build the model without weights, unless it is known; return it with the device of the run and its sizes.

    Errors: ValueError or FileNotFoundError for anything that shows without weights: model, options, names of texts.
    """
    options, text = config.model, config.text
    # --devices and --plan_for plan for GPUs that this machine may lack.
    elsewhere = config.output.plan_for is not None
    if elsewhere and options.device not in ("auto", "cuda"):
        raise ValueError(f"device is {options.device!r} and plan_for is given, which is a GPU; leave out --device")
    gpus = elsewhere or (config.output.devices is not None and options.device == "auto")
    device = torch.device("cuda") if gpus else choose_device(options.device)
    known = {} if known is None else known
    if options not in known:
        known[options] = outline(options.model, device, options.dtype, options.trust_remote_code)
    model = known[options]
    decoder = structure.check_structure(model, config.settings)
    checks.check_lengths(model, config)
    check_source(text.calibration_data, "calibration_data")
    check_source(text.eval_data, "eval_data")
    if config.training.finetune:
        check_source(text.finetune_data, "finetune_data")
    return model, device, Sizes.of(decoder, model.dtype)


def check(configs: Iterable[Config]) -> None:
    """Check models, options and names of texts of runs without loading weights. Errors: as `offloads`."""
    known: dict[ModelConfig, PreTrainedModel] = {}
    for config in configs:
        _described(config, known)


def _place(config: Config, device: torch.device, cards: int) -> Place:
    """Describe the devices of the run. Errors: ValueError naming an option that several cards do not support."""
    if cards > 1 and config.model.offload == "on":
        raise ValueError(
            "offload is 'on', which several processes do not support (each holds its rows of the weights); use auto or off"
        )
    if cards > 1 and config.training.finetune and config.training.hold_merged == "on":
        raise ValueError("hold_merged is 'on', which several processes do not support; use auto or off")
    structure.check_base(config.training, cards)
    if config.output.plan_for is not None:
        return Place("cuda", cards, find_card(config.output.plan_for).free)
    return Place.here(device, cards) if _seen(device) else Place(device.type, cards)


def _seen(device: torch.device) -> bool:
    """Whether the device is on this machine."""
    return device.type == "cpu" or torch.cuda.is_available()


def offloads(config: Config) -> bool:
    """Return whether the run is offloaded: the model stays on disk and is pruned block by block."""
    cards = distributed.launched()
    _, device, sizes = _described(config)
    return peak(config, sizes, _place(config, device, cards)).offloaded


def make_plan(config: Config) -> Plan:
    """Plan a run. Errors: ValueError or FileNotFoundError naming a problem with model, options or texts."""
    model, device, sizes = _described(config)
    checks.warn_of_lengths(model, config)
    cards = config.output.devices or distributed.launched()
    check_can_write(config.calibration.written_per_sample, cards)
    steps = range(1, config.prune.steps + 1)
    place, work = _place(config, device, cards), work_of(config, sizes)
    memory, card = peak(config, sizes, place), _card(config, device)
    return Plan(
        config=config,
        family=Decoder(model).family.name,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        cards=cards,
        blocks=len(sizes.blocks),
        parameters=sizes.parameters,
        prunable=sizes.prunable,
        sparsity=tuple(schedule.cubic_sparsity(t, config.prune.steps, config.prune.final_sparsity) for t in steps),
        ranks=tuple(schedule.mean_rank(t, config.adapter.initial_rank) for t in steps if config.training.finetune),
        memory=memory,
        step_traffic=step_traffic(config, sizes, cards),
        calibration_traffic=calibration_traffic(config, sizes, cards),
        disk=checks.disk(config, sizes, memory.offloaded),
        work=work,
        outlook=None if card is None else outlook(config, sizes, place, card, work.total),
    )


def _card(config: Config, device: torch.device) -> Card | None:
    if config.output.plan_for is not None:
        return find_card(config.output.plan_for)
    return card_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" and _seen(device) else None


def work_of(config: Config, sizes: Sizes) -> Work:
    """Count operations: 2 per weight and token forward, 4 backward; with loss kl one forward pass of the dense model more."""
    calibration, text, training, steps = config.calibration, config.text, config.training, config.prune.steps
    tokens = calibration.sequences * calibration.seqlen
    measuring = round(config.prune.rule.planned.passes * calibration.rmi_rows * calibration.seqlen)
    options, blocks = config.reconstruction, len(sizes.blocks)
    # In windows, each block also computes the waiting stream, and the pruned one again after each later training.
    # Gradients take a forward pass, and a backward one that computes each block again.
    passes = 3 + options.more_streams * options.window + 4 * gradients.needed(config)
    trained = text.train_examples * text.train_seqlen if training.finetune else 0
    # A trained baseline prunes once and trains on everything again.
    others = len(config.output.baselines or ())
    pruned = steps + others
    reconstructed = tokens * options.reconstruct_epochs * pruned * options.trainings(blocks)
    return Work(
        sweeps=2 * sizes.prunable * (measuring * steps + passes * tokens * pruned),
        reconstruction=6 * sizes.prunable * reconstructed // blocks,
        training=(8 if training.loss == "kl" else 6) * sizes.prunable * trained * (1 + others),
        writing=2 * sizes.prunable * calibration.written * calibration.seqlen,
    )
