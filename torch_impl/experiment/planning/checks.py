"""What a run needs of disk and memory, held against what is there before any work is done."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine import distributed
from torch_impl.engine.families import Family, decoder_blocks, position_limit, prunable_weights, weight_of
from torch_impl.experiment.config import Config

logger = logging.getLogger(__name__)

GIB = 2**30
REPORT_BYTES = 2**20


def ranks_at_most(config: Config) -> int:
    """The largest mean rank of any step."""
    return config.adapter.initial_rank + config.prune.steps - 1


def adapter_numbers(model: nn.Module, family: Family, config: Config) -> int:
    """Entries of all A and B at the largest mean rank; 0 without fine-tuning."""
    if not config.training.finetune:
        return 0
    blocks = decoder_blocks(model, family)
    return ranks_at_most(config) * len(blocks) * sum(sum(weight_of(blocks[0], n).shape) for n in family.projections)


def disk(model: nn.Module, family: Family, config: Config, size: int) -> dict[str, int]:
    """Bytes on the disk at the end, by what they are for; size: bytes of a weight."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prunable = prunable_weights(model, family)
    moved = (
        config.prune.method.moves_weights
        or config.adapter.rank_shrink == "fold"
        or config.reconstruction.reconstruct_epochs > 0
    )
    # A base weight is one bit where it is the dense one under a mask. A point being written adds to those kept; points
    # take turns with two files of each block, and change one of them, or all by folding, in between.
    block_bytes = max(prunable) * size if moved else max(prunable) // 8
    copies = config.output.keep_points + 1
    sets = copies if config.adapter.rank_shrink == "fold" else min(2, config.output.keep_points)
    of_blocks = block_bytes * (len(prunable) * sets + copies)
    return {
        "merged model": parameters * size,
        "points": of_blocks + copies * 12 * adapter_numbers(model, family, config),
        "report": REPORT_BYTES,
    }


def memory(model: nn.Module, family: Family, config: Config, size: int) -> dict[str, int]:
    """Bytes on the device, beyond the loaded model, that no smaller batch can do without; size: bytes of a weight."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    hidden: Any = model.config.hidden_size  # type: ignore[union-attr]
    tokens = config.calibration.nsamples * config.calibration.seqlen
    # float32 value, gradient and two moments.
    adapters = 16 * adapter_numbers(model, family, config)
    return {
        "dense copy": parameters * size,
        "streams of hidden states and copies": 2 * tokens * int(hidden) * size,
        "adapters and optimizer": adapters,
    }


def check_lengths(model: PreTrainedModel, config: Config) -> None:
    """Errors: ValueError naming the options that ask for longer sequences than the model has positions for, or for more
    of them than the memory holds token ids of."""
    nsamples, seqlen = config.calibration.nsamples, config.calibration.seqlen
    if (taken := 8 * nsamples * seqlen) > (there := psutil.virtual_memory().available):
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


def check(model: nn.Module, family: Family, config: Config, folder: Path) -> None:
    """Errors: ValueError naming need and supply if the disk or the device has too little for the run in `folder`."""
    if distributed.is_main_process():
        size = next(model.parameters()).element_size()
        check_disk(
            sum(disk(model, family, config, size).values()),
            "merged model and points, fewer with keep_points",
            config,
            folder,
        )
    if distributed.processes() == 1:
        # Several hold a share each; the dry run says how much that is.
        _check_memory(model, family, config)


def check_disk(needed: int, purpose: str, config: Config, folder: Path) -> None:
    """Errors: ValueError naming need and supply if the disk of `folder` has less than `needed` bytes for it."""
    # What an interrupted run has written already will be written over or used again.
    free = shutil.disk_usage(folder).free + sum(512 * f.stat().st_blocks for f in folder.rglob("*") if f.is_file())
    if needed > free:
        raise ValueError(
            f"output_dir {config.output_dir}: {free / GIB:.3f} GiB of disk are free; allowed: about "
            f"{needed / GIB:.3f} GiB ({purpose}), so make room or take another disk"
        )


def _check_memory(model: nn.Module, family: Family, config: Config) -> None:
    weight = next(model.parameters())
    parts = memory(model, family, config, weight.element_size())
    streams, needed = parts["streams of hidden states and copies"], sum(parts.values())
    there = _free_memory(weight.device)
    # The streams are there before the adapters are, and gone when these train.
    needed -= min(streams, parts["adapters and optimizer"])
    if needed > there:
        raise ValueError(
            f"device {weight.device}: {there / GIB:.2f} GiB of memory are free; allowed: {needed / GIB:.2f} GiB beside the "
            "model at the least, so take a smaller nsamples, seqlen or initial_rank, or a device with more memory"
        )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
