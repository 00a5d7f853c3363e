"""Whether a run fits on a card, what would make it fit, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch_impl.engine.memory import SHARE
from torch_impl.engine.rates import PLAIN
from torch_impl.engine.settings import DENSE, INT8
from torch_impl.experiment.config import OFFLOADED, Config, in_memory_options
from torch_impl.experiment.planning.cards import Card
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import Sizes

# Share of a card's bfloat16 speed that a run reaches: 2.58e17 operations of a 7B run in 7.1 minutes on an H200 (README.md).
REACHED = 0.6
CARDS_TRIED = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Outlook:
    """How a run does on cards of one kind.

    free: bytes of each that a run may use. fits: whether they suffice. remedies: options with which they would, and the bytes
    that each card then needs. hours: None if the speed of the card in this dtype is unknown, as it is for an amount of memory.
    """

    card: Card
    free: int
    fits: bool
    remedies: tuple[tuple[str, int], ...]
    hours: float | None


def outlook(config: Config, sizes: Sizes, place: Place, card: Card, operations: int) -> Outlook:
    """Hold a run's largest phase against the memory of the cards, and its operations against their speed."""
    usable = int(SHARE * place.free)
    fits = peak(config, sizes, place).device.total <= usable
    remedies = () if fits else tuple(_remedies(config, sizes, place, usable))
    speed = None if card.tflops is None or sizes.itemsize != 2 else REACHED * card.tflops * 1e12 * place.cards
    return Outlook(card, usable, fits, remedies, None if speed is None else operations / speed / 3600)


def _remedies(config: Config, sizes: Sizes, place: Place, usable: int) -> Iterator[tuple[str, int]]:
    """Changes that make the run fit: the first of each kind, with what a card then needs."""
    smaller = _smaller(config)
    kinds = (
        [(words, changed, place) for words, changed in smaller],
        [(words, changed, place) for words, changed in _given_text(config)],
        [(f"--devices {cards}", config, replace(place, cards=cards)) for cards in CARDS_TRIED if cards > place.cards],
        [(words, changed, replace(place, cards=1)) for words, changed in _compressed(config)],
        [(words, changed, replace(place, cards=1)) for words, changed in _one_shot(config)],
    )
    for kind in kinds:
        for words, changed, where in kind:
            needed = peak(changed, sizes, where).device.total
            if needed <= usable:
                yield words, needed
                break


def _smaller(config: Config) -> list[tuple[str, Config]]:
    """The same run in smaller batches, then also with activations computed again."""
    training, calibration, text = config.training, config.calibration, config.text
    batch = {"calibration_batch_size": 1, "eval_batch_size": 1}
    words = " ".join(f"--{name} {value}" for name, value in batch.items())
    changed = replace(
        config,
        calibration=replace(calibration, calibration_batch_size=1),
        text=replace(text, eval_batch_size=1),
    )
    if not training.finetune:
        return [(words, changed)]
    one = replace(training, per_device_train_batch_size=1, gradient_accumulation_steps=training.batch_size)
    words += f" --per_device_train_batch_size 1 --gradient_accumulation_steps {training.batch_size}"
    again = replace(one, gradient_checkpointing=True)
    return [
        (words, replace(changed, training=one)),
        (f"{words} --gradient_checkpointing true", replace(changed, training=again)),
    ]


def _given_text(config: Config) -> Iterator[tuple[str, Config]]:
    """The run without text that the model writes, whose hidden states take memory; then also in smaller batches."""
    if not config.calibration.written_per_sample:
        return
    words, changed = (
        "--written_per_sample 0",
        replace(config, calibration=replace(config.calibration, written_per_sample=0)),
    )
    yield words, changed
    for smaller, still in _smaller(changed):
        yield f"{words} {smaller}", still


def _compressed(config: Config) -> Iterator[tuple[str, Config]]:
    """The run over a compressed base, with the dense blocks on disk; then also in the smallest batches."""
    works = config.prune.rule.works_offloaded and not config.prune.pattern.structured
    if not config.training.finetune or not works or config.training.compressed:
        return
    options = {"train_base": INT8, "loss": "ce", "written_per_sample": 0, "offload": "on"}
    given = {"train_base": config.training.train_base, "loss": config.training.loss, "offload": config.model.offload}
    given["written_per_sample"] = str(config.calibration.written_per_sample)
    words = " ".join(f"--{name} {value}" for name, value in options.items() if given[name] != str(value))
    after = ", without --baselines" if config.output.baselines else ""
    changed = replace(
        config,
        training=replace(config.training, train_base=INT8, loss="ce", hold_merged="auto", compile_blocks="auto"),
        calibration=replace(config.calibration, written_per_sample=0),
        model=replace(config.model, offload="on"),
        output=replace(config.output, baselines=None),
    )
    yield f"{words}{after}", changed
    for smaller, still in _smaller(changed):
        yield f"{words} {smaller}{after}", still


def _one_shot(config: Config) -> Iterator[tuple[str, Config]]:
    """The run as it works offloaded: one shot on given text, without training; then also in smaller windows."""
    if config.prune.pattern.structured:
        return
    rule = config.prune if config.prune.rule.works_offloaded else replace(config.prune, layer_sparsity=PLAIN)
    config = replace(config, training=replace(config.training, train_base=DENSE))
    given: dict[str, object] = {name: OFFLOADED[name] for name in in_memory_options(config)}
    if rule is not config.prune:
        given["layer_sparsity"] = PLAIN
    words = " ".join(f"--{name} {value}".lower() for name, value in [*given.items(), ("offload", "on")])
    after = ", without --baselines" if config.output.baselines else ""
    after += " (one block at a time from disk)"
    changed = replace(
        config,
        prune=replace(rule, steps=1),
        training=replace(config.training, finetune=False, train_base=DENSE),
        calibration=replace(config.calibration, written_per_sample=0),
        model=replace(config.model, offload="on"),
        output=replace(config.output, baselines=None),
    )
    yield f"{words}{after}", changed
    for window in range(config.reconstruction.window - 1, 0, -1):
        smaller = replace(changed, reconstruction=replace(config.reconstruction, reconstruct_window=window))
        yield f"{words} --reconstruct_window {window}{after}", smaller
