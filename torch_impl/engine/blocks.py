"""The source of a run's decoder blocks, in memory or offloaded: everything Algorithm 1 needs of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from torch_impl.engine import calibration, distributed
from torch_impl.engine.adapted_linear import attach_adapters, block_adapters, hold_merged_weights
from torch_impl.engine.checkpoints import fsdp
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.gradient_sweep import Backward, Collector, Forward, GradientSweep
from torch_impl.engine.measures import Measure
from torch_impl.engine.progress import bar


class Blocks(Protocol):
    """The source of the dense and the pruned decoder blocks of a run: `ModelBlocks`, or offloaded blocks."""

    @property
    def decoder(self) -> Decoder:
        """Return the model to prune."""

    @property
    def dense(self) -> Decoder:
        """Return the original model; the same object if blocks are offloaded."""

    @property
    def weights(self) -> torch.Tensor:
        """Return the number of prunable weights of each block, float64 (L,)."""

    @property
    def restartable(self) -> bool:
        """Return whether streams can pass pruned blocks again, in smaller batches when memory is full."""

    def zero_shares(self) -> torch.Tensor:
        """Return the current share of zeros in each block's projections, float64 (L,)."""

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        """Measure the importance (L,) of each block of the current model with `measure`, in batches of `batch_size`."""

    def gradients(self, collector: Collector, batch_size: int) -> None:
        """Give `collector` the gradients of the calibration loss by the weights of the current model."""

    def start(self, batch_size: int) -> calibration.Stream:
        """Return the calibration sequences' hidden states before the first block."""

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (dense block, adapted block) in order. They may be one module, so use the dense block before pruning."""

    def arguments(self) -> list[dict[str, Any]]:
        """Return the arguments of each block for one sequence."""

    def restore(self, index: int, block: nn.Module) -> bool:
        """Restore the pruned weights of an offloaded block, if it was pruned; return whether it was."""

    def pruned(self, recent: Mapping[int, nn.Module], error: float) -> float:
        """Record that the last of these blocks by number is pruned at this step; the others may have changed with it.

        Return its error: of a restored block, what it was before later windows changed the block.
        """

    def discard(self, block: nn.Module) -> None:
        """Free a block that only the dense stream needed: the pruned one is there already."""


class HeldBlocks:
    """What the sources have in common whose adapted blocks stay in memory, see `Blocks`."""

    restartable = True

    def __init__(self, decoder: Decoder, dense: Decoder, ids: torch.Tensor, rmi_rows: int) -> None:
        """Remember the calibration token ids (n, t); the first rmi_rows measure importance."""
        self.decoder, self.dense = decoder, dense
        self.weights = torch.tensor(dense.prunable_weights, dtype=torch.float64)
        self._ids, self._rmi_rows = ids, rmi_rows

    def zero_shares(self) -> torch.Tensor:
        shares = [zero_share(self.decoder.family.weights_of(block).values()) for block in self.decoder.blocks]
        return torch.tensor(shares, dtype=torch.float64)

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        return measure_importance(self.decoder, measure, self._ids[: self._rmi_rows], batch_size)

    def gradients(self, collector: Collector, batch_size: int) -> None:
        sweep_gradients(self.decoder, self._ids, batch_size, collector)

    def arguments(self) -> list[dict[str, Any]]:
        return calibration.block_arguments(self.dense, self._ids[:1])

    def restore(self, index: int, block: nn.Module) -> bool:
        return False

    def pruned(self, recent: Mapping[int, nn.Module], error: float) -> float:
        return error

    def discard(self, block: nn.Module) -> None:
        pass


class ModelBlocks(HeldBlocks):
    """Blocks of a model in memory, in one or several processes. The dense model may be offloaded."""

    def __init__(self, decoder: Decoder, dense: Decoder | None, ids: torch.Tensor, rmi_rows: int, scale: float) -> None:
        """Attach adapters and shard the models. dense: default a copy of the model."""
        dense = dense or Decoder(fsdp.copy_model(decoder.model).requires_grad_(False))
        super().__init__(decoder, dense, ids, rmi_rows)
        attach_adapters(decoder, scale)
        for part in (decoder, dense):
            distributed.shard(part, next(decoder.model.parameters()).device)

    def start(self, batch_size: int) -> calibration.Stream:
        ids = distributed.own_sequences(self._ids, "nsamples")
        return calibration.start_stream(self.dense, ids, batch_size)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield from zip(sweep(self.dense), self.decoder.blocks, strict=True)


@torch.no_grad()
def measure_importance(decoder: Decoder, measure: Measure, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Measure the importance (L,) of every block of the current model from token ids (n, tokens); keep no features."""
    stream = calibration.start_stream(decoder, distributed.own_sequences(ids, "rmi_samples"), batch_size)
    sweep_forward(decoder, stream, measure)
    sweep_backward(decoder, measure)
    return distributed.broadcast(measure.importance())


def sweep_forward(decoder: Decoder, stream: calibration.Stream, sweeper: Forward) -> None:
    """Advance a stream through all blocks by `sweeper`."""
    for index, block in enumerate(bar(sweep(decoder), "importance", len(decoder.blocks))):
        with distributed.unsharded(block), hold_merged_weights(list(block_adapters(block, decoder.family).values())):
            sweeper.advance(stream, block, index)


def sweep_backward(decoder: Decoder, sweeper: object) -> None:
    """Take `sweeper` back through all blocks, the last one first, if it is one that goes back."""
    if isinstance(sweeper, Backward):
        last = len(decoder.blocks) - 1
        for place, block in enumerate(bar(sweep(decoder, backward=True), "gradients", last + 1)):
            with distributed.unsharded(block):
                sweeper.retreat(block, last - place)


@torch.no_grad()
def sweep_gradients(decoder: Decoder, ids: torch.Tensor, batch_size: int, collector: Collector) -> None:
    """Give `collector` the gradients of the loss on token ids (n, tokens) by the current, merged weights of all blocks.

    A process takes its share of the sequences; `distributed.all_reduce` sums what the collectors of all processes found.
    """
    stream = calibration.start_stream(decoder, distributed.own_sequences(ids, "nsamples"), batch_size)
    gradients = GradientSweep(decoder, collector)
    sweep_forward(decoder, stream, gradients)
    sweep_backward(decoder, gradients)


def advance(stream: calibration.Stream, block: nn.Module, index: int, family: Family) -> None:
    """Advance a stream through a block, which may be sharded or adapted."""
    with distributed.unsharded(block), hold_merged_weights(list(block_adapters(block, family).values())):
        stream.advance(block, index)


def zero_share(weights: Iterable[torch.Tensor]) -> float:
    """Compute the share of zeros in these weights together."""
    weights = list(weights)
    zeros = distributed.all_reduce_number(sum(int((distributed.local(weight) == 0).sum()) for weight in weights))
    return zeros / sum(weight.numel() for weight in weights)
