"""What a run will do and take, from the model's configuration alone: no weights are loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel

from torch_impl import schedule
from torch_impl.engine import distributed, structure
from torch_impl.engine.checkpoints.pretrained import choose_device, outline
from torch_impl.engine.families import find_family
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import checks, scaling
from torch_impl.experiment.planning.footprint import footprint
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.text.sources import check_source

GIB = 2**30


def _described(config: Config) -> tuple[PreTrainedModel, torch.device, Sizes]:
    """The model without weights in the dtype of the run, where it will be, and its sizes.

    Errors: ValueError or FileNotFoundError for what can be seen without its weights: model, options, names of texts.
    """
    device, options, text = choose_device(config.model.device), config.model, config.text
    model = outline(options.model, device, options.dtype, options.trust_remote_code)
    decoder = structure.check_structure(model, config.settings)
    checks.check_lengths(model, config)
    check_source(text.calibration_data, "calibration_data")
    check_source(text.eval_data, "eval_data")
    if config.training.finetune:
        check_source(text.finetune_data, "finetune_data")
    return model, device, Sizes.of(model, decoder.family, model.dtype)


def check(config: Config) -> None:
    """Errors: what `streams` would raise, before any weight is loaded."""
    _described(config)


def streams(config: Config) -> bool:
    """Whether the run leaves the model on disk and prunes it block by block."""
    if distributed.launched() > 1 and config.model.offload == "on":
        raise ValueError(
            "offload is 'on'; allowed with several processes: auto or off, each holds its rows of the weights"
        )
    _, device, sizes = _described(config)
    if distributed.launched() > 1 or not config.plain or config.model.offload != "auto":
        return config.model.offload == "on"
    return footprint(config, sizes, device).streamed


def make_plan(config: Config) -> dict[str, Any]:
    """Blocks, targets, tokens, memory in bytes and floating-point operations of a run."""
    model, device, sizes = _described(config)
    checks.warn_of_lengths(model, config)
    family = find_family(model)
    prunable = sum(sizes.prunable_of_blocks)
    dtype = model.dtype
    taken = footprint(config, sizes, device)
    steps = range(1, config.prune.steps + 1)
    targets = [schedule.cubic_sparsity(t, config.prune.steps, config.prune.final_sparsity) for t in steps]
    mean_ranks = [schedule.mean_rank(t, config.adapter.initial_rank) for t in steps]
    training, text, calibration = config.training, config.text, config.calibration
    calibration_tokens = calibration.nsamples * calibration.seqlen
    rmi_tokens = calibration.rmi_rows * calibration.seqlen
    sweeps = 2 * prunable * (rmi_tokens + 3 * calibration_tokens) * config.prune.steps
    train = (8 if training.loss == "kl" else 6) * prunable * text.train_examples * text.train_seqlen
    plan = {
        "model": config.model.model,
        "family": family.name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": len(sizes.prunable_of_blocks),
        "parameters": sizes.parameters,
        "prunable weights": prunable,
        "sparsity after each step": [round(target, 4) for target in targets],
        "mean rank of each step": mean_ranks if training.finetune else [],
        "calibration": f"{calibration.nsamples} × {calibration.seqlen} tokens of {text.calibration_data}",
        "fine-tuning": (
            f"{text.train_examples} × {text.train_seqlen} tokens of {text.finetune_data}, shares "
            f"{[round(share, 3) for share in text.shares(config.prune.steps)]}, "
            f"{training.optimizer_steps(text.train_examples)} optimizer steps"
            if training.finetune
            else "none"
        ),
        **_reconstruction(config),
        "evaluation": f"windows of {text.eval_seqlen} tokens of {text.eval_data}",
        "weights": "one block at a time from the model's files" if taken.streamed else "in memory",
        "most memory is taken in": taken.phase,
        "device memory": taken.device,
        "host memory": taken.host,
        "disk, bytes": checks.disk(model, family, config, dtype.itemsize),
        "floating-point operations": {
            "sweeps": sweeps,
            "reconstruction": 6
            * prunable
            * calibration_tokens
            * config.reconstruction.reconstruct_epochs
            * config.prune.steps,
            "training": train if training.finetune else 0,
        },
        "output": str(config.output_dir),
    }
    cards = config.output.devices or distributed.launched()
    if cards > 1:
        for single in ("weights", "most memory is taken in", "device memory", "host memory"):
            del plan[single]
        plan |= scaling.scale(scaling.layout_of(model, family, dtype.itemsize), config, cards)
    return plan


def _reconstruction(config: Config) -> dict[str, str]:
    """A line on it, if blocks are reconstructed."""
    options = config.reconstruction
    if not options.reconstruct_epochs:
        return {}
    batches = math.ceil(config.calibration.nsamples / options.reconstruct_batch_size)
    return {
        "reconstruction": f"{options.reconstruct_epochs} epochs of each block at each step, "
        f"{options.reconstruct_epochs * batches} optimizer steps, learning rate {options.reconstruct_learning_rate:g}"
    }


def show_plan(plan: dict[str, Any]) -> str:
    """The plan as text."""
    lines = []
    for name, value in plan.items():
        if name in ("device memory", "host memory"):
            lines.append(f"{name:<30}  {sum(value.values()) / GIB:.2f} GiB at once (estimated), of it")
            lines += [f"  {part:<28}{amount / GIB:>10.2f} GiB" for part, amount in value.items()]
        elif name == "disk, bytes":
            lines.append(f"disk, most at once              {sum(value.values()) / GIB:.2f} GiB (estimated), of it")
            lines += [f"  {part:<28}{amount / GIB:>10.2f} GiB" for part, amount in value.items()]
        elif name == "floating-point operations":
            lines += [f"work, {part:<24}{amount / 1e12:>12.2f} TFLOP" for part, amount in value.items()]
        elif isinstance(value, dict):
            lines.append(name)
            lines += [f"  {part:<28}{amount / GIB:>10.2f} GiB" for part, amount in value.items()]
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            lines.append(f"{name:<30}  {shown}")
    return "\n".join(lines)
