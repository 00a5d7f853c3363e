"""The decoder blocks of a run, wherever they are kept: all that Algorithm 1 asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from torch_impl.engine import calibration, distributed
from torch_impl.engine.adapted_linear import attach_adapters, block_adapters, holding
from torch_impl.engine.checkpoints import fsdp
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.rates import Measure


class Blocks(Protocol):
    """Where the dense and the pruned decoder blocks of a run come from: `ModelBlocks`, or blocks that stay in their files."""

    @property
    def decoder(self) -> Decoder:
        """The model that gets pruned."""

    @property
    def dense(self) -> Decoder:
        """The model as it was; the same object where its blocks come from files."""

    @property
    def weights(self) -> torch.Tensor:
        """Number of prunable weights of each block, float64 (L,)."""

    @property
    def restartable(self) -> bool:
        """Whether blocks that are pruned can be gone through once more, in smaller batches when memory is full."""

    def zero_shares(self) -> torch.Tensor:
        """Share of zeros of each block's projections as they are now, float64 (L,)."""

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        """What `measure` finds each block of the current model to be worth (L,), in batches of so many sequences."""

    def start(self, batch_size: int) -> calibration.Stream:
        """The calibration sequences' hidden states before the first block."""

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(dense block, adapted block) in order. Both may be one module: use the dense block before pruning the other."""

    def arguments(self) -> list[dict[str, Any]]:
        """What the model calls each block with for one sequence."""

    def restore(self, index: int, block: nn.Module) -> bool:
        """Give a block from files the weights it was pruned to, if it was; whether that is so."""

    def pruned(self, index: int, block: nn.Module) -> None:
        """Take note that block `index` is pruned for this step."""


class ModelBlocks:
    """Blocks of a model in memory, over one process or several. The dense model may still be one whose blocks are in files."""

    restartable = True

    def __init__(self, decoder: Decoder, dense: Decoder | None, ids: torch.Tensor, rmi_rows: int, scale: float) -> None:
        """Attach adapters and shard. ids: calibration token ids (n, t), the first rmi_rows of which measure importance.

        dense: default, a copy of the model made here.
        """
        self.decoder = decoder
        self.dense = dense or Decoder(fsdp.twin(decoder.model).requires_grad_(False))
        attach_adapters(decoder, scale)
        for part in (decoder, self.dense):
            distributed.shard(part, next(decoder.model.parameters()).device)
        self.weights = torch.tensor(decoder.prunable_weights, dtype=torch.float64)
        self._ids, self._rmi_rows = ids, rmi_rows

    def zero_shares(self) -> torch.Tensor:
        shares = [zero_share(block, self.decoder.family) for block in self.decoder.blocks]
        return torch.tensor(shares, dtype=torch.float64)

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        return measure_importance(self.decoder, measure, self._ids[: self._rmi_rows], batch_size)

    def start(self, batch_size: int) -> calibration.Stream:
        ids = distributed.share(self._ids, "nsamples")
        return calibration.start_stream(self.dense, ids, batch_size)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield from zip(sweep(self.dense), self.decoder.blocks, strict=True)

    def arguments(self) -> list[dict[str, Any]]:
        return calibration.block_arguments(self.dense, self._ids[:1])

    def restore(self, index: int, block: nn.Module) -> bool:
        return False

    def pruned(self, index: int, block: nn.Module) -> None:
        pass


def shown(blocks: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """A progress bar, in the process that prints."""
    return tqdm(blocks, desc=description, total=total, leave=False, disable=not distributed.leads())


@torch.no_grad()
def measure_importance(decoder: Decoder, measure: Measure, ids: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Measure the importance (L,) of every block of the current model from token ids (n, tokens); keep no features."""
    stream = calibration.start_stream(decoder, distributed.share(ids, "rmi_samples"), batch_size)
    for index, block in enumerate(shown(decoder.blocks, "importance", len(decoder.blocks))):
        with distributed.whole(block), holding(list(block_adapters(block, decoder.family).values())):
            measure.advance(stream, block, index)
    return distributed.agreed(measure.importance())


def advance(stream: calibration.Stream, block: nn.Module, index: int, family: Family) -> None:
    """Take a stream through a block that may be sharded or adapted."""
    with distributed.whole(block), holding(list(block_adapters(block, family).values())):
        stream.advance(block, index)


def zero_share(block: nn.Module, family: Family) -> float:
    """Share of zeros of a block's projections."""
    weights = family.weights_of(block).values()
    zeros = distributed.total_of(sum(int((distributed.local(weight) == 0).sum()) for weight in weights))
    return zeros / sum(weight.numel() for weight in weights)
