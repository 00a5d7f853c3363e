"""The progress of a run, and the events after which it is saved as a checkpoint to resume from."""

from __future__ import annotations

import copy
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from torch_impl.engine import distributed
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.resume import state
from torch_impl.engine.resume.background import Background
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Progress:
    """The state of Algorithm 1 in plain numbers; `engine.resume.state` holds its tensors.

    Lists have one entry per block, except losses (one per optimizer step done in this step, so their number is also the
    position in the data and in the schedule) and records (one per finished step).
    """

    calibration_batch_size: int = 0
    micro_batch_size: int = 0
    """Both sizes after halving when memory ran out; 0 before the first calibration or training."""
    step: int = 1
    """The current step, from 1."""
    block: int = 0
    """Number of blocks pruned in this step. While it is 0, `sparsity` is that of the previous step."""
    importance: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    groups: list[tuple[int, int] | None] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """Empty until the adapters are resized."""
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # JSON turns tuples into lists.
        self.groups = [None if group is None else (group[0], group[1]) for group in self.groups]

    def finish_step(self, record: dict[str, Any]) -> None:
        """Record the step and start the next one."""
        self.records.append(record)
        self.step += 1
        self.block = 0
        self.importance, self.errors, self.ranks, self.losses, self.groups = [], [], [], [], []
        self.seconds = {}

    def __str__(self) -> str:
        if self.losses:
            return f"step {self.step}, {len(self.losses)} optimizer steps done"
        if self.records and not self.block:
            return f"the end of step {self.step - 1}"
        return f"step {self.step}, {self.block} blocks pruned"


class Interrupted(KeyboardInterrupt):
    """The run has saved a checkpoint and stopped because of this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Checkpointer:
    """Tracks the progress of a run and saves checkpoints after the events named by its methods.

    Without `checkpoints`, nothing is saved. save_every: optimizer steps between checkpoints. attached: files that grow during a
    run; each checkpoint holds a copy. in_background: write in a thread while the run goes on; an error of the disk is then raised
    by a later event, at the latest by `end`. `notes`: data of the caller to save, as JSON. `progress`: always up to date.
    """

    def __init__(
        self,
        checkpoints: RunCheckpoints | None = None,
        save_every: int = 100,
        attached: tuple[Path, ...] = (),
        in_background: bool = False,
    ) -> None:
        self.checkpoints, self._save_every, self._attached = checkpoints, save_every, attached
        self._background = Background(in_background)
        self._changed: set[str] = set()
        self._stop: int | None = None
        self.progress = Progress()
        self.notes: dict[str, Any] = {}
        self._begun = False
        self._optimizer: torch.optim.Optimizer | None = None
        # Process 0 deletes corrupt checkpoints before the others read.
        last = None if checkpoints is None or not distributed.is_main_process() else checkpoints.open_last()
        distributed.all_reduce_number(0.0)
        if checkpoints is not None and not distributed.is_main_process():
            last = checkpoints.open_last()
        if last is not None:
            self.notes = last["notes"]
            self._begun = last["progress"] is not None
            self.progress = Progress(**last["progress"] or {})

    def restore_attached(self) -> None:
        """Restore the attached files from the current checkpoint."""
        for path in self._attached if distributed.is_main_process() else ():
            path.unlink(missing_ok=True)
            if self.checkpoints is not None and path.name in self.checkpoints.parts:
                path.write_bytes(self.checkpoints.get_bytes(path.name))

    def begin(
        self,
        decoder: Decoder,
        dense: Decoder,
        fresh: Progress,
        pairs: Callable[[], Iterable[tuple[nn.Module, nn.Module]]] | None = None,
    ) -> Progress:
        """Start a run at `fresh`, or restore model and random generators from the current checkpoint.

        pairs: returns (dense block, block) in order; default those of the two models.
        """
        self._decoder, self._dense = decoder, dense
        if not self._begun or self.checkpoints is None:
            self._begun = True
            self.progress = fresh
            return fresh
        stored = [index for index in range(len(decoder.blocks)) if block_part(index) in self.checkpoints]
        found = zip(dense.blocks, decoder.blocks, strict=True) if pairs is None else pairs()
        for index, (dense_block, block) in zip(range(max(stored, default=-1) + 1), found, strict=False):
            if index in stored:
                with distributed.unsharded(dense_block), distributed.unsharded_with_writeback(block, decoder.family):
                    state.restore_block(block, dense_block, decoder.family, self.checkpoints.get(block_part(index)))
        if "adapters" in self.checkpoints:
            state.restore_adapters(decoder.model, self.checkpoints.get("adapters"))
        state.restore_random(self.checkpoints.get("random"))
        logger.warning("resuming at %s", self.progress)
        return self.progress

    def begin_training(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Restore the optimizer. Return the losses of the optimizer steps already done in this step."""
        if self.checkpoints is not None and "optimizer" in self.checkpoints:
            state.restore_optimizer(optimizer, self.checkpoints.get("optimizer"))
        self._optimizer = optimizer
        return self.progress.losses

    def noted(self) -> None:
        """Save after a change of the notes."""
        self._save()

    def pruned(self, index: int, first: int, save: bool = True) -> None:
        """Note that block `index` is pruned, and the blocks from `first` on have changed with it; save unless told otherwise."""
        self.progress.block = index + 1
        self._changed |= {block_part(number) for number in range(first, index + 1)}
        if save:
            self._save()

    def resized(self, base_moved: bool) -> None:
        """Note that the adapters have new ranks. base_moved: dropped ranks were folded into the base weights."""
        self._changed.add("adapters")
        if base_moved:
            self._changed |= {block_part(index) for index in range(len(self._decoder.blocks))}

    def trained(self, last: bool) -> None:
        """Save after an optimizer step if a checkpoint is due. last: the last optimizer step of this step."""
        self._changed |= {"adapters", "optimizer"}
        # Several processes stop at a regular checkpoint, which all of them reach.
        asked = self._stop is not None and distributed.processes() == 1
        if last or asked or len(self.progress.losses) % self._save_every == 0:
            self._save()

    def step_done(self, record: dict[str, Any]) -> None:
        """Save after a step."""
        self.progress.finish_step(record)
        self._changed.discard("optimizer")
        if self.checkpoints is not None:
            self._background.do(self.checkpoints.drop, "optimizer")
        self._save()

    def _save(self) -> None:
        if self.checkpoints is not None:
            for part in sorted(self._changed):
                # All processes take part in gathering a sharded block; process 0 writes it.
                tensors = self._tensors(part)
                if distributed.is_main_process():
                    self._background.do(self.checkpoints.put, part, tensors)
            self._changed.clear()
            if distributed.is_main_process():
                self._commit(self.checkpoints)
        if distributed.all_reduce_number(0.0 if self._stop is None else 1.0):
            self._background.wait()
            raise Interrupted(self._stop or signal.SIGINT)

    def _commit(self, checkpoints: RunCheckpoints) -> None:
        do = self._background.do
        do(checkpoints.put, "random", state.random_tensors())
        for path in self._attached:
            if path.exists():
                do(checkpoints.put_bytes, path.name, path.read_bytes())
        body = {"progress": asdict(self.progress) if self._begun else None, "notes": copy.deepcopy(self.notes)}
        do(checkpoints.commit, body)

    def _tensors(self, part: str) -> state.Tensors:
        if part == "adapters":
            return state.adapter_tensors(self._decoder.model)
        if part == "optimizer" and self._optimizer is not None:
            return state.optimizer_tensors(self._optimizer)
        index = int(part.rpartition("-")[2])
        block, dense = (decoder.blocks[index] for decoder in (self._decoder, self._dense))
        with distributed.unsharded(block, dense):
            return state.block_tensors(block, dense, self._decoder.family)

    def end(self) -> None:
        """Finish writing, and release the models. Errors: OSError if a checkpoint could not be written."""
        self._background.wait()
        del self._decoder, self._dense
        self._optimizer = None

    @contextmanager
    def stopping_at_checkpoints(self) -> Iterator[None]:
        """Within this context, Ctrl-C and SIGTERM stop the run at its next checkpoint; a second signal stops it at once.

        Only the main thread can listen to signals. After an error, the context ends when no file is being written any more.
        Errors: Interrupted after that checkpoint.
        """
        listens = self.checkpoints is not None and threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (SIGNALS if listens else ())}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def ask(number: int, frame: FrameType | None) -> None:
            restore()
            self._stop = number
            logger.warning("stopping at the next checkpoint; a second signal stops the run at once")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        except BaseException:
            with suppress(Exception):
                self._background.wait()
            raise
        finally:
            restore()


def block_part(index: int) -> str:
    """Return the name of a block's part of a checkpoint."""
    return f"block-{index:03}"
