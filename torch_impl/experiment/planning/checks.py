"""What a run needs of disk and memory, held against what is there before any work is done."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import schedule
from torch_impl.engine import distributed
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.memory import free_bytes
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import phases
from torch_impl.experiment.planning.sizes import Sizes

logger = logging.getLogger(__name__)

GIB = 2**30
REPORT_BYTES = 2**20


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk at the end of a run, by what they are for."""

    model: int
    """The merged model."""
    checkpoints: int = 0
    """What an interrupted run resumes from."""
    report: int = REPORT_BYTES

    @property
    def total(self) -> int:
        """All of them."""
        return self.model + self.checkpoints + self.report


def disk(config: Config, sizes: Sizes, offloaded: bool) -> Disk:
    """The most that a run has on the disk at once. An offloaded one resumes from the model that it writes."""
    if offloaded:
        return Disk(sizes.weights())
    moved = (
        config.prune.method.moves_weights
        or config.adapter.rank_shrink == "fold"
        or config.reconstruction.reconstruct_epochs > 0
    )
    # A base weight is one bit where it is the dense one under a mask. A checkpoint being written adds to those kept; they
    # take turns with two files of each block, and change one of them, or all by folding, in between.
    most = sizes.largest_prunable
    block = most * sizes.itemsize if moved else most // 8
    copies = config.output.keep_points + 1
    sets = copies if config.adapter.rank_shrink == "fold" else min(2, config.output.keep_points)
    rank = schedule.mean_rank(config.prune.steps, config.adapter.initial_rank) if config.training.finetune else 0
    # Values and two moments of the adapters.
    return Disk(sizes.weights(), block * (len(sizes.blocks) * sets + copies) + copies * 3 * sizes.adapters(rank))


def least_memory(config: Config, sizes: Sizes) -> int:
    """Bytes on the device, beyond the loaded model, that no smaller batch can do without."""
    found = phases.phases(config, sizes, phases.Place("cuda"))
    calibration, training = found["calibration"], found.get("training", phases.Parts())
    # The streams are there before the adapters are, and gone when these train.
    return calibration.dense_copy + max(calibration.streams, training.adapters + training.gradients + training.moments)


def check_lengths(model: PreTrainedModel, config: Config) -> None:
    """Errors: ValueError naming the options that ask for longer sequences than the model has positions for, or for more
    of them than the memory holds token ids of."""
    nsamples, seqlen = config.calibration.nsamples, config.calibration.seqlen
    if (taken := 8 * nsamples * seqlen) > (there := free_bytes(torch.device("cpu"))):
        raise ValueError(
            f"nsamples is {nsamples} and seqlen is {seqlen}: their token ids alone take {taken / GIB:,.0f} GiB of memory, and "
            f"{there / GIB:,.0f} GiB are free; take fewer"
        )
    limit = position_limit(model)
    if limit is not None and (beyond := _beyond(config, limit)):
        raise ValueError(f"{beyond}; this model has {limit} learned positions, so take {limit} tokens or fewer")


def warn_of_lengths(model: PreTrainedModel, config: Config) -> None:
    """Log, once, which options ask for longer sequences than a model of computed positions was trained on."""
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained and distributed.is_main_process() and (beyond := _beyond(config, trained)):
        logger.warning("%s; this model was trained on sequences of up to %d tokens and may do worse", beyond, trained)


def _beyond(config: Config, limit: int) -> str:
    """The options of lengths above `limit`, and their values."""
    lengths = {"seqlen": config.calibration.seqlen, "eval_seqlen": config.text.eval_seqlen}
    if config.training.finetune:
        lengths["train_seqlen"] = config.text.train_seqlen
    return ", ".join(f"{name} is {length}" for name, length in lengths.items() if length > limit)


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *ids: torch.Tensor) -> None:
    """Errors: ValueError if the tokenizer has made a token that the model does not know."""
    rows, largest = len(model.get_input_embeddings().weight), max(int(part.max()) for part in ids)  # type: ignore[arg-type]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the tokenizer makes token {largest}, {token!r}, of the text, and the model knows {rows}; "
            "use the tokenizer that belongs to this model"
        )


def check(model: PreTrainedModel, config: Config, folder: Path) -> None:
    """Errors: ValueError naming need and supply if the disk or the device has too little for the run in `folder`."""
    sizes = Sizes.of(Decoder(model), model.dtype)
    if distributed.is_main_process():
        needed = disk(config, sizes, offloaded=False).total
        check_disk(needed, "merged model and points, fewer with keep_points", config, folder)
    if distributed.processes() == 1:
        # Several hold a share each; the dry run says how much that is.
        _check_memory(least_memory(config, sizes), next(model.parameters()).device)


def check_disk(needed: int, purpose: str, config: Config, folder: Path) -> None:
    """Errors: ValueError naming need and supply if the disk of `folder` has less than `needed` bytes for it."""
    # What an interrupted run has written already will be written over or used again.
    free = shutil.disk_usage(folder).free + sum(512 * f.stat().st_blocks for f in folder.rglob("*") if f.is_file())
    if needed > free:
        raise ValueError(
            f"output_dir {config.output_dir}: {free / GIB:.3f} GiB of disk are free; allowed: about "
            f"{needed / GIB:.3f} GiB ({purpose}), so make room or take another disk"
        )


def _check_memory(needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"device {device}: {free / GIB:.2f} GiB of memory are free; allowed: {needed / GIB:.2f} GiB beside the "
            "model at the least, so take a smaller nsamples, seqlen or initial_rank, or a device with more memory"
        )
