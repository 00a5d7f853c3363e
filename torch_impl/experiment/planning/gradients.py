"""The memory for a pruning method's statistic of gradients: one sweep back and forth before the blocks of a step are pruned."""

from __future__ import annotations

import math

from torch_impl.experiment.config import Config
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.masks.method import GradientStatistic


def needed(config: Config) -> bool:
    """Return whether the pruning method has a statistic of gradients."""
    return isinstance(config.prune.method.statistic, GradientStatistic)


def stream(config: Config, sizes: Sizes, cards: int = 1) -> int:
    """Return the bytes of the hidden states of the sequences on each card."""
    calibration = config.calibration
    return sizes.stream(math.ceil(calibration.sequences / cards) * calibration.seqlen) if needed(config) else 0


def states(config: Config, sizes: Sizes, cards: int = 1) -> int:
    """Return the bytes of the hidden states before every block, in host memory."""
    return stream(config, sizes, cards) * len(sizes.blocks)


def sums(config: Config, sizes: Sizes, cards: int = 1) -> int:
    """Return the bytes of the statistics of all blocks, in float32 at least, in host memory; each process keeps its share."""
    return math.ceil(sizes.prunable / cards) * max(4, sizes.itemsize) if needed(config) else 0


def work(config: Config, sizes: Sizes, cards: int = 1) -> dict[str, int]:
    """Return the bytes for the gradients of a block, and a part of their sum, or for the loss of a sequence if larger."""
    calibration = config.calibration
    tokens = min(calibration.calibration_batch_size, math.ceil(calibration.sequences / cards)) * calibration.seqlen
    of_block = sizes.gradients(tokens) + sizes.largest_projection * max(4, sizes.itemsize)
    logits = sizes.loss(calibration.seqlen, distilled=False)
    return {"work": of_block} if of_block > logits else {"logits": logits}
