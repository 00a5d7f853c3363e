"""The checkpoint that a model larger than the memory is pruned into: pruned projections as they are done, all else taken over."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from torch_impl.engine.adapted_linear import block_adapters
from torch_impl.engine.checkpoints.contents import find_files
from torch_impl.engine.checkpoints.offload import reader_of
from torch_impl.engine.checkpoints.safetensors_files import Shards, ShardWriter
from torch_impl.engine.decoder import Decoder

logger = logging.getLogger(__name__)


class Output:
    """The checkpoint that is written: the projections of pruned blocks by a thread of its own, all else taken over.

    written: SHA-256 of each block's projections by their names, as an interrupted run has left them here; it grows, and
    `noted` is called, whenever one more block is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        decoder: Decoder,
        written: list[dict[str, str]] | None = None,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        self._family, self._reader, self._noted = decoder.family, reader_of(decoder), noted
        self._writer = ShardWriter(folder, self._reader.shards, self._reader.dtype)
        self._files = Shards(find_files(folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write behind")
        self._pending: Future[dict[str, str]] | None = None
        self._masks: dict[str, tuple[str, float]] = {}
        self.written = [] if written is None else written
        self._given_back = self._handed = 0
        # Blocks that were found here, and that this run has written.

    def restore(self, index: int, block: nn.Module) -> bool:
        """Give a block the weights that are here already; False if there are none, or not those that were written.

        Errors: RuntimeError if those written by this run have changed since.
        """
        if index < self._handed:
            self._settle()
        if index >= len(self.written):
            return False
        layers = block_adapters(block, self._family)
        weights = {name: self._files.read(self._stored(index, name)) for name in layers}
        if {name: _sha256(weight) for name, weight in weights.items()} != self.written[index]:
            if index < self._handed:
                raise RuntimeError(
                    f"block {index} is not on the disk as this run wrote it; check the disk and run again"
                )
            logger.warning("block %d is corrupt on the disk; pruning again from there", index)
            del self.written[index:]
            return False
        for name, weight in weights.items():
            layers[name].set_base(weight.to(layers[name].weight.device))
            self._masks[self._family.full_name(index, name)] = fingerprint(weight != 0)
        self._given_back = max(self._given_back, index + 1)
        return True

    def write(self, index: int, block: nn.Module) -> None:
        """Hand over block number `index`; waits until the one before it is written, so that one is held at most."""
        if index < self._given_back:
            return
        self._handed = index + 1
        weights = {name: layer.merged().cpu() for name, layer in block_adapters(block, self._family).items()}
        self._settle()
        self._pending = self._thread.submit(self._write, index, weights)

    def _stored(self, index: int, name: str) -> str:
        return self._reader.names[index][f"{name}.weight"]

    def _write(self, index: int, weights: dict[str, torch.Tensor]) -> dict[str, str]:
        for name, weight in weights.items():
            self._masks[self._family.full_name(index, name)] = fingerprint(weight != 0)
            self._writer.write(self._stored(index, name), weight)
        self._writer.flush(self._stored(index, name) for name in weights)
        return {name: _sha256(weight) for name, weight in weights.items()}

    def _settle(self) -> None:
        if self._pending is not None:
            self.written.append(self._pending.result())
            self._pending = None
            self._noted()

    def finish(self) -> dict[str, tuple[str, float]]:
        """Complete the files. Returns (fingerprint of the mask, share of zeros) by projection's full name."""
        self._settle()
        self._thread.shutdown()
        self._writer.finish({self._stored(i, name) for i, block in enumerate(self.written) for name in block})
        return self._masks


def _sha256(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def fingerprint(mask: torch.Tensor) -> tuple[str, float]:
    """(SHA-256 of a mask, share of zeros): masks of a whole model would take an eighth of its weights' number in bytes."""
    bits = mask.cpu().numpy()
    return hashlib.sha256(np.packbits(bits).tobytes()).hexdigest(), 1 - float(np.count_nonzero(bits)) / bits.size
