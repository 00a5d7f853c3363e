"""The blocks of a run that trains over a compressed base: dense blocks come from files, compressed ones stay in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine import calibration, training
from torch_impl.engine.adapted_linear import adapt_block
from torch_impl.engine.blocks import measure_importance, sweep_gradients, zero_share
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradient_sweep import Collector
from torch_impl.engine.measures import Measure
from torch_impl.experiment.sweeps import Dense, Sweeps


class CompressedBlocks:
    """Dense blocks, read one at a time, beside the adapted ones, see `Blocks`. A run compresses each block once it is pruned.

    The first time, an adapted block is a copy of the dense one. found: the result of the sweep over the dense model, which stands
    for the adapted one until it has all its blocks.
    """

    restartable = True

    def __init__(self, sweeps: Sweeps, found: Dense) -> None:
        self.dense = sweeps.decoder
        if sweeps.config.training.gradient_checkpointing:
            # Copies of the blocks inherit it. Without gradients it has no effect.
            training.checkpoint_activations(self.dense.model)
        self.decoder = Decoder(_without_weights(self.dense))
        self.weights = torch.tensor(self.dense.prunable_weights, dtype=torch.float64)
        self._sweeps, self._found = sweeps, found
        self._ids = sweeps.material.calibration
        # Numbers of the blocks that have weights.
        self._filled: set[int] = set()

    @property
    def _current(self) -> Decoder:
        return self.decoder if len(self._filled) == len(self.weights) else self.dense

    def zero_shares(self) -> torch.Tensor:
        if self._current is self.dense:
            return torch.tensor(self._found.shares, dtype=torch.float64)
        shares = [zero_share(self.decoder.family.weights_of(block).values()) for block in self.decoder.blocks]
        return torch.tensor(shares, dtype=torch.float64)

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        """Return the importance of the dense model's blocks from its sweep, later that of the current ones."""
        if self._current is self.dense:
            return torch.tensor(self._found.importance, dtype=torch.float64)
        rows = self._sweeps.config.calibration.rmi_rows
        return measure_importance(self.decoder, measure, self._ids[:rows], batch_size)

    def gradients(self, collector: Collector, batch_size: int) -> None:
        sweep_gradients(self._current, self._ids, batch_size, collector)

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

    def arguments(self) -> list[dict[str, Any]]:
        return calibration.block_arguments(self.dense, self._ids[:1])

    def restore(self, index: int, block: nn.Module) -> bool:
        return False

    def pruned(self, recent: Mapping[int, nn.Module], error: float) -> float:
        return error

    def discard(self, block: nn.Module) -> None:
        pass


def _without_weights(decoder: Decoder) -> PreTrainedModel:
    """Copy an offloaded model: the copy's blocks have no weights either, and share those outside the blocks."""
    blocks, model = decoder.blocks, decoder.model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(blocks)] = nn.ModuleList(copy.deepcopy(block) for block in blocks)
    return copy.deepcopy(model, shared)
