"""The traffic between cards: bytes that each card receives from the others. See docs/scaling.md.

Per card, an all-gather of P bytes receives P · (N − 1)/N, an all-reduce 2 P · (N − 1)/N (its part of the sum, then the other
parts), and a broadcast from another card P.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from torch_impl import schedule
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import gradients
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.training import micro_batch

FLOAT64 = 8


@dataclass(frozen=True)
class StepTraffic:
    """Bytes received by a card in one optimizer step."""

    weights: int
    gradients: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(astuple(self))


@dataclass(frozen=True)
class CalibrationTraffic:
    """Bytes received by a card while one LoSA step measures importance, prunes and measures errors."""

    weights: int
    pruned: int
    """Projections pruned by another card."""
    statistics: int
    reconstruction: int
    """Gradients of the reconstruction, and the energy of its targets."""
    features: int
    """Hidden states exchanged for the Gram matrices of the mutual information."""

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(astuple(self))


def _micro_batches(config: Config, cards: int) -> int:
    """Return the number of micro-batches per card in an optimizer step."""
    return math.ceil(math.ceil(config.training.batch_size / cards) / micro_batch(config, cards))


def step_traffic(config: Config, sizes: Sizes, cards: int) -> StepTraffic:
    """Compute the traffic of one optimizer step of the last LoSA step, whose mean rank is the largest."""
    if cards == 1 or not config.training.finetune:
        return StepTraffic(0, 0)
    rank = schedule.mean_rank(config.prune.steps, config.adapter.initial_rank)
    # Forward and backward of the model; with kl, forward of the dense model.
    passes = 2 + (config.training.loss == "kl")
    # The loss is summed too, in float64.
    summed = sizes.adapters(rank) + FLOAT64
    return StepTraffic(
        weights=_micro_batches(config, cards) * passes * sizes.weights(cards) * (cards - 1),
        gradients=2 * summed * (cards - 1) // cards,
    )


def calibration_traffic(config: Config, sizes: Sizes, cards: int) -> CalibrationTraffic:
    """Compute the traffic of the calibration of one LoSA step."""
    if cards == 1:
        return CalibrationTraffic(0, 0, 0, 0, 0)
    others = cards - 1
    outside = sizes.rows(sizes.outside, cards)
    blocks = sizes.weights(cards) - outside
    measure = config.prune.rule.planned
    calibration, options = config.calibration, config.reconstruction
    samples = calibration.rmi_rows
    columns = math.ceil(calibration.seqlen * sizes.hidden / cards)
    here = math.ceil(samples / cards)
    # Per block: the method's statistics, and both sums of the error.
    backward = gradients.needed(config)
    sums = sizes.statistics(config.prune.method) * (not backward) + FLOAT64 * 2 * sizes.hidden
    measured = sum(measure.summed(sum(sizes.inputs), block.prunable, samples) for block in sizes.blocks)
    # A method's gradients are summed once, in a sweep forward and one backward of their own.
    measured += max(4, sizes.itemsize) * sizes.prunable * backward
    reconstructs = options.reconstruct_epochs > 0
    steps = options.reconstruct_epochs * math.ceil(calibration.sequences / options.reconstruct_batch_size)
    # Per training of a block: the gradients of every optimizer step. Per window: the energy of its channels.
    wide, count = max(4, sizes.itemsize), len(sizes.blocks)
    trainings = options.trainings(count)
    trained = steps * wide * sizes.prunable * trainings // count + count * FLOAT64 * sizes.hidden * reconstructs
    # In windows, a block is gathered again for each later block of its windows.
    again = (trainings - count) * blocks // count if options.window > 1 else 0
    return CalibrationTraffic(
        # Importance, dense stream and pruned stream; the last two share one embedding.
        weights=(
            (2 + measure.weights + 2 * backward) * blocks
            + again
            + (1 + measure.outside + 2 * backward + reconstructs) * outside
        )
        * others,
        pruned=sizes.prunable * sizes.itemsize,
        statistics=2 * (len(sizes.blocks) * sums + measured) * others // cards,
        reconstruction=2 * trained * others // cards,
        features=len(sizes.blocks) * (samples - here) * columns * sizes.itemsize * measure.features,
    )
