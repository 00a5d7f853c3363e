"""Write the pruned checkpoint of an offloaded model: each block once it is final, all other tensors as copies."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
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
from torch_impl.engine.resume.checkpointer import block_part
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints

logger = logging.getLogger(__name__)


class UnfinishedWindow:
    """The blocks that are pruned but may still change, in the checkpoints of a run: of windows of several blocks.

    errors: e of LoSA, Eq. 6, of every block pruned so far, also by an interrupted run.
    """

    def __init__(self, checkpoints: RunCheckpoints, errors: list[float]) -> None:
        self._checkpoints, self.errors = checkpoints, errors

    def get(self, index: int) -> dict[str, torch.Tensor] | None:
        """Return the projections of a block as the current checkpoint has them, None if it lacks the block."""
        return self._checkpoints.get(block_part(index)) if block_part(index) in self._checkpoints else None

    def put(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Put a block into the next checkpoint."""
        self._checkpoints.put(block_part(index), weights)

    def drop(self, index: int) -> None:
        """Leave a block out of the next checkpoint: the output has it."""
        self._checkpoints.drop(block_part(index))


class Output:
    """The output checkpoint. A thread writes the projections of pruned blocks; all other tensors are copied.

    written: SHA-256 of each written block's projections by name, also by an interrupted run. After each block is on disk,
    `written` gets its entry and `noted` is called, to save it. unfinished: for windows of several blocks, to resume from.
    """

    def __init__(
        self,
        folder: Path,
        decoder: Decoder,
        written: list[dict[str, str]] | None = None,
        noted: Callable[[], None] = lambda: None,
        unfinished: UnfinishedWindow | None = None,
    ) -> None:
        self._family, self._reader, self._noted = decoder.family, reader_of(decoder), noted
        self._writer = ShardWriter(folder, self._reader.shards, self._reader.dtype)
        self._files = Shards(find_files(folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write behind")
        self._pending: Future[dict[str, str]] | None = None
        self._masks: dict[str, tuple[str, float]] = {}
        self.written = [] if written is None else written
        self._unfinished = unfinished
        # Number of blocks handed to the writer by this run.
        self._handed = 0

    def restore(self, index: int, block: nn.Module) -> bool:
        """Restore a block's weights from disk; return False if they are missing or corrupt.

        Errors: RuntimeError if the weights are corrupt, and written by this run or needed for the blocks of a window.
        """
        if index < self._handed:
            self._settle()
        layers = block_adapters(block, self._family)
        if index >= len(self.written):
            found = None if self._unfinished is None else self._unfinished.get(index)
            for name, weight in (found or {}).items():
                layers[name].set_base(weight)
            return found is not None
        weights = {name: self._files.read(self._stored(index, name)) for name in layers}
        if {name: _sha256(weight) for name, weight in weights.items()} != self.written[index]:
            if index < self._handed:
                raise RuntimeError(
                    f"block {index} is corrupt on disk although this run wrote it; check the disk and run again"
                )
            if self._unfinished is not None:
                raise RuntimeError(
                    f"block {index} is corrupt on disk, and later blocks were trained with it; check the disk and start over "
                    "with --overwrite"
                )
            logger.warning("block %d is corrupt on disk; pruning again from this block on", index)
            del self.written[index:]
            return False
        for name, weight in weights.items():
            layers[name].set_base(weight.to(layers[name].weight.device))
            self._masks[self._family.full_name(index, name)] = fingerprint(weight != 0)
        return True

    def pruned(self, recent: Mapping[int, nn.Module], error: float) -> float:
        """Save a checkpoint of the blocks that may still change, of which the last one by number has just been pruned.

        Return its error: of a restored block, that of the checkpoint.
        """
        if self._unfinished is None:
            return error
        errors, index = self._unfinished.errors, max(recent)
        if index == len(errors):
            errors.append(error)
            for number, block in recent.items():
                self._unfinished.put(number, self._weights(block))
            self._collect()
            self._noted()
        return errors[index]

    def write(self, index: int, block: nn.Module) -> None:
        """Write block `index` in the background. Waits for the previous block, so at most one is in memory."""
        if index < len(self.written):
            return
        self._handed = index + 1
        weights = self._weights(block)
        self._settle()
        self._pending = self._thread.submit(self._write, index, weights)

    def _weights(self, block: nn.Module) -> dict[str, torch.Tensor]:
        return {name: layer.merged().cpu() for name, layer in block_adapters(block, self._family).items()}

    def _stored(self, index: int, name: str) -> str:
        return self._reader.names[index][f"{name}.weight"]

    def _write(self, index: int, weights: dict[str, torch.Tensor]) -> dict[str, str]:
        for name, weight in weights.items():
            self._masks[self._family.full_name(index, name)] = fingerprint(weight != 0)
            self._writer.write(self._stored(index, name), weight)
        self._writer.flush(self._stored(index, name) for name in weights)
        return {name: _sha256(weight) for name, weight in weights.items()}

    def _settle(self) -> None:
        if self._collect():
            self._noted()

    def _collect(self) -> bool:
        """Wait until the block in the background is written; return whether there was one."""
        if self._pending is None:
            return False
        self.written.append(self._pending.result())
        self._pending = None
        if self._unfinished is not None:
            self._unfinished.drop(len(self.written) - 1)
        return True

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
