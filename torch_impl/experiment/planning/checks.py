"""Check disk, memory, lengths and tokens before a run does any work."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
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
from torch_impl.experiment.planning import compressed, gradients, phases
from torch_impl.experiment.planning.parts import Parts, Place
from torch_impl.experiment.planning.sizes import Sizes

logger = logging.getLogger(__name__)

GIB = 2**30
REPORT_BYTES = 2**20


@dataclass(frozen=True)
class Disk:
    """Disk space that a run needs, in bytes, by purpose."""

    model: int
    """The merged model."""
    checkpoints: int = 0
    """The checkpoints to resume from."""
    report: int = REPORT_BYTES

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.model + self.checkpoints + self.report


def disk(config: Config, sizes: Sizes, offloaded: bool) -> Disk:
    """Estimate the peak disk space of a run.

    An offloaded run without training resumes from the model that it writes; the blocks of an unfinished window are in its
    checkpoints.
    """
    copies, window = config.output.keep_points + 1, config.reconstruction.window
    if offloaded and not config.training.compressed:
        unfinished = copies * window if window > 1 else 0
        return Disk(sizes.weights(), unfinished * sizes.largest_prunable * sizes.itemsize)
    moved = (
        config.prune.method.moves_weights
        or config.adapter.rank_shrink == "fold"
        or config.reconstruction.reconstruct_epochs > 0
    )
    # A checkpoint stores one bit per base weight if the weight is the dense one under a mask. Besides the checkpoints kept,
    # one is being written. They alternate between two files of each block; between two checkpoints the blocks of one window
    # change, or all blocks with folding or gradients.
    most = sizes.largest_prunable
    block = most * sizes.itemsize if moved else most // 8
    if config.training.compressed:
        block = compressed.block(config, sizes)
    together = config.adapter.rank_shrink == "fold" or gradients.needed(config)
    sets = copies if together else min(2, config.output.keep_points)
    rank = schedule.mean_rank(config.prune.steps, config.adapter.initial_rank) if config.training.finetune else 0
    # Values and two moments of the adapters.
    of_blocks = block * (len(sizes.blocks) * sets + copies * window)
    return Disk(sizes.weights(), of_blocks + copies * 3 * sizes.adapters(rank))


def least_memory(config: Config, sizes: Sizes) -> int:
    """Estimate the device memory in bytes, besides the loaded model, that even the smallest batches need."""
    found = phases.phases(config, sizes, Place("cuda"))
    calibration, training = found["calibration"], found.get("training", Parts())
    # The streams exist before the adapters and are freed before training.
    return calibration.dense_copy + max(calibration.streams, training.adapters + training.gradients + training.moments)


def check_lengths(model: PreTrainedModel, config: Config) -> None:
    """Check the options for sequence lengths.

    Errors: ValueError naming lengths beyond the model's learned positions, or token ids that do not fit into memory.
    """
    check_token_ids(config)
    limit = position_limit(model)
    if limit is not None and (beyond := _beyond(_lengths(config), limit)):
        raise ValueError(f"{beyond}; this model has only {limit} learned positions, use {limit} or less")


def check_token_ids(config: Config) -> None:
    """Check that the calibration token ids fit into memory. Errors: ValueError naming nsamples and seqlen."""
    calibration = config.calibration
    nsamples, seqlen = calibration.nsamples, calibration.seqlen
    if (taken := 8 * calibration.sequences * seqlen) > (there := free_bytes(torch.device("cpu"))):
        raise ValueError(
            f"nsamples is {nsamples} and seqlen is {seqlen}: the token ids alone need {taken / GIB:,.0f} GiB of memory, but only "
            f"{there / GIB:,.0f} GiB are free; reduce them"
        )


def warn_of_lengths(model: PreTrainedModel, config: Config) -> None:
    """Warn if options ask for longer sequences than the model was trained on."""
    warn_beyond(model, _lengths(config))


def warn_beyond(model: PreTrainedModel, lengths: Mapping[str, int]) -> None:
    """Warn of sequences longer than the model was trained on. lengths: tokens, by the name of the option."""
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained and distributed.is_main_process() and (beyond := _beyond(lengths, trained)):
        logger.warning("%s; this model was trained on at most %d tokens, expect worse results beyond", beyond, trained)


def _lengths(config: Config) -> dict[str, int]:
    lengths = {"seqlen": config.calibration.seqlen, "eval_seqlen": config.text.eval_seqlen}
    if config.training.finetune:
        lengths["train_seqlen"] = config.text.train_seqlen
    return lengths


def _beyond(lengths: Mapping[str, int], limit: int) -> str:
    """List the lengths above `limit` with their options."""
    return ", ".join(f"{name} is {length}" for name, length in lengths.items() if length > limit)


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *ids: torch.Tensor) -> None:
    """Check that the model knows all tokens of the text. Errors: ValueError naming an unknown one."""
    rows, largest = len(model.get_input_embeddings().weight), max(int(part.max()) for part in ids)  # type: ignore[arg-type]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(
            f"the tokenizer returns token {largest}, {token!r}, but the model knows only {rows} tokens; "
            "use the tokenizer of this model"
        )


def check(model: PreTrainedModel, config: Config, folder: Path) -> None:
    """Check disk and device memory for the run in `folder`. Errors: ValueError naming what is needed and what is free."""
    if distributed.is_main_process():
        needed = disk(config, Sizes.of(Decoder(model), model.dtype), offloaded=False).total
        check_disk(needed, "merged model and checkpoints; fewer with --keep_points 1", config, folder)
    if distributed.processes() == 1:
        # Several processes hold a share each; --dry_run shows its size.
        check_memory(model, config)


def check_disk(needed: int, purpose: str, config: Config, folder: Path) -> None:
    """Check the disk of `folder`. Errors: ValueError naming what is needed and what is free if it has less than `needed` bytes."""
    # Files of an interrupted run count as free: they are overwritten or reused.
    free = shutil.disk_usage(folder).free + sum(512 * f.stat().st_blocks for f in folder.rglob("*") if f.is_file())
    if needed > free:
        raise ValueError(
            f"output_dir {config.output_dir}: only {free / GIB:.3f} GiB of disk are free, but the run needs about "
            f"{needed / GIB:.3f} GiB ({purpose}); free some space or use another disk"
        )


def check_memory(model: PreTrainedModel, config: Config) -> None:
    """Check the memory of the model's device for a run. Errors: ValueError naming what is needed and what is free."""
    device = next(model.parameters()).device
    needed, free = least_memory(config, Sizes.of(Decoder(model), model.dtype)), free_bytes(device)
    if needed > free:
        raise ValueError(
            f"device {device}: only {free / GIB:.2f} GiB of memory are free, but the run needs at least {needed / GIB:.2f} GiB "
            "besides the model; reduce nsamples, seqlen or initial_rank, or use a device with more memory"
        )
