"""The blocks of a run that trains over a compressed base: dense blocks come from files, compressed ones stay in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine import calibration, training
from torch_impl.engine.adapted_linear import adapt_block
from torch_impl.engine.blocks import HeldBlocks, sweep_gradients
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradient_sweep import Collector
from torch_impl.engine.measures import Measure
from torch_impl.experiment.sweeps import Dense, Sweeps


class CompressedBlocks(HeldBlocks):
    """Dense blocks, read one at a time, beside the adapted ones, see `Blocks`. A run compresses each block once it is pruned.

    The first time, an adapted block is a copy of the dense one. found: the result of the sweep over the dense model, which stands
    for the adapted one until it has all its blocks.
    """

    def __init__(self, sweeps: Sweeps, found: Dense) -> None:
        dense, config = sweeps.decoder, sweeps.config
        if config.training.gradient_checkpointing:
            # Copies of the blocks inherit it. Without gradients it has no effect.
            training.checkpoint_activations(dense.model)
        adapted = Decoder(_without_weights(dense))
        super().__init__(adapted, dense, sweeps.material.calibration, config.calibration.rmi_rows)
        self._sweeps, self._found = sweeps, found
        # Numbers of the blocks that have weights.
        self._filled: set[int] = set()

    @property
    def _complete(self) -> bool:
        return len(self._filled) == len(self.weights)

    def zero_shares(self) -> torch.Tensor:
        return super().zero_shares() if self._complete else torch.tensor(self._found.shares, dtype=torch.float64)

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        """Return the importance of the dense model's blocks from its sweep, later that of the current ones."""
        if self._complete:
            return super().importance(measure, batch_size)
        return torch.tensor(self._found.importance, dtype=torch.float64)

    def gradients(self, collector: Collector, batch_size: int) -> None:
        sweep_gradients(self.decoder if self._complete else self.dense, self._ids, batch_size, collector)

    def start(self, batch_size: int) -> calibration.Stream:
        self._sweeps.budget.release_all()
        return self._sweeps.stream(self._ids, batch_size, 2 + self._sweeps.config.reconstruction.more_streams)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for index, dense in enumerate(sweep(self.dense)):
            if index not in self._filled:
                block = copy.deepcopy(dense)
                adapt_block(block, self.decoder.family, self._sweeps.config.adapter.scale)
                self.decoder.blocks[index] = block
                self._filled.add(index)
            yield dense, self.decoder.blocks[index]


def _without_weights(decoder: Decoder) -> PreTrainedModel:
    """Copy an offloaded model: the copy's blocks have no weights either, and share those outside the blocks."""
    blocks, model = decoder.blocks, decoder.model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(blocks)] = nn.ModuleList(copy.deepcopy(block) for block in blocks)
    return copy.deepcopy(model, shared)
