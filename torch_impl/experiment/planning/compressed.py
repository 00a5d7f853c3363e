"""The memory of base weights that are compressed while adapters are trained; see `TrainingConfig.train_base`."""

from __future__ import annotations

import math

from torch_impl import packed, quantise, schedule
from torch_impl.engine.settings import INT8
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning.sizes import BlockShapes, Sizes


def weights(config: Config, sizes: Sizes) -> int:
    """Return the bytes of the weights of all blocks: the projections compressed, the others as they are."""
    others = sum(sizes.rows(block.parameters, 1) for block in sizes.blocks) - sizes.prunable * sizes.itemsize
    return others + sum(_projections(block, config, sizes) for block in sizes.blocks)


def block(config: Config, sizes: Sizes) -> int:
    """Return the bytes of the projections of the largest block, compressed."""
    return max(_projections(block, config, sizes) for block in sizes.blocks)


def _projections(shapes: BlockShapes, config: Config, sizes: Sizes) -> int:
    # Of all steps, the first one has the fewest zeros.
    sparsity = schedule.cubic_sparsity(1, config.prune.steps, config.prune.final_sparsity)

    def bits(columns: int) -> float:
        if config.training.train_base == INT8:
            return quantise.bits_per_weight(sparsity, quantise.MOST_BITS, columns)
        return packed.bits_per_weight(sparsity, 8 * sizes.itemsize, columns)

    return sum(math.ceil(rows * columns * bits(columns) / 8) for rows, columns in shapes.projections)
