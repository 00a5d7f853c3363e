"""Write the pruned checkpoint of an offloaded model: each block when it is pruned, all other tensors as copies."""

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
    """The output checkpoint. A thread writes the projections of pruned blocks; all other tensors are copied.

    written: SHA-256 of each written block's projections by name, also by an interrupted run. After each block is on disk,
    `written` gets its entry and `noted` is called.
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
        # Numbers of blocks restored from disk, and handed to the writer by this run.

    def restore(self, index: int, block: nn.Module) -> bool:
        """Restore a block's weights from disk; return False if they are missing or corrupt.

        Errors: RuntimeError if weights written by this run are corrupt.
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
                    f"block {index} is corrupt on disk although this run wrote it; check the disk and run again"
                )
            logger.warning("block %d is corrupt on disk; pruning again from this block on", index)
            del self.written[index:]
            return False
        for name, weight in weights.items():
            layers[name].set_base(weight.to(layers[name].weight.device))
            self._masks[self._family.full_name(index, name)] = fingerprint(weight != 0)
        self._given_back = max(self._given_back, index + 1)
        return True

    def write(self, index: int, block: nn.Module) -> None:
        """Write block `index` in the background. Waits for the previous block, so at most one is in memory."""
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
        """Complete the files. Return (fingerprint of the mask, sparsity) by projection's full name."""
        self._settle()
        self._thread.shutdown()
        self._writer.finish({self._stored(i, name) for i, block in enumerate(self.written) for name in block})
        return self._masks


def _sha256(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def fingerprint(mask: torch.Tensor) -> tuple[str, float]:
    """Return (SHA-256 of a mask, sparsity). Keeping the masks of a whole model would take one bit per weight."""
    bits = mask.cpu().numpy()
    return hashlib.sha256(np.packbits(bits).tobytes()).hexdigest(), 1 - float(np.count_nonzero(bits)) / bits.size
