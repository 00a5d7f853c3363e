"""What a run will do and take, from the model's configuration alone: no weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from torch_impl import schedule
from torch_impl.engine.checkpoint import DTYPES, check_sizes, choose_device
from torch_impl.engine.families import decoder_blocks, find_family, prunable_weights, weight_of
from torch_impl.experiment import needs
from torch_impl.experiment.config import Config

GIB = 2**30


def _skeleton(name: str) -> PreTrainedModel:
    """The model without weights."""
    if (Path(name) / "config.json").is_file():
        check_sizes(Path(name))
    try:
        configuration = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(configuration)
    except Exception as error:  # as in checkpoint.load: any of transformers' kinds, one line
        raise ValueError(
            f"model {name}: no causal language model here: {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def make_plan(config: Config) -> dict[str, Any]:
    """Blocks, targets, tokens, memory in bytes and floating-point operations of a run."""
    if not Path(config.model.model).is_dir() and config.model.model.count("/") != 1:
        raise FileNotFoundError(f"model {config.model.model}: no such folder; allowed: a model folder or a hub id")
    device = choose_device(config.model.device)
    model = _skeleton(config.model.model)
    family = find_family(model)
    blocks = decoder_blocks(model, family)
    prunable = sum(prunable_weights(model, family))
    parameters = model.num_parameters()
    dtype = DTYPES.get(config.model.dtype, torch.float32 if device.type == "cpu" else model.dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    steps = range(1, config.prune.steps + 1)
    targets = [schedule.cubic_sparsity(t, config.prune.steps, config.prune.final_sparsity) for t in steps]
    mean_ranks = [schedule.mean_rank(t, config.adapter.initial_rank) for t in steps]
    weights = [weight_of(blocks[0], name) for name in family.projections]
    training, text, calibration = config.training, config.text, config.calibration
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    micro = training.per_device_train_batch_size * text.train_seqlen
    widest = max(weight.shape[0] for weight in weights)
    kept_per_token = len(blocks) * (1 if training.gradient_checkpointing else 8 + 4 * widest // hidden) * hidden
    memory = {
        "weights": parameters * size,
        "dense copy": parameters * size,
        "streams of hidden states": 2 * calibration.nsamples * calibration.seqlen * hidden * size,
    }
    if config.prune.prune_method == "sparsegpt":
        memory["Hessians of a block"] = sum(weight_of(blocks[0], g[0]).shape[1] ** 2 * 4 for g in family.inputs)
    if training.finetune:
        # float32 value, gradient and two moments; logits in the model's dtype and twice in float32.
        memory["adapters and optimizer"] = 16 * needs.adapter_numbers(model, family, config)
        memory["merged weights"] = prunable * size if training.hold_merged != "off" else 0
        memory["activations"] = micro * (kept_per_token * size + vocabulary * (size + 8))
    calibration_tokens = calibration.nsamples * calibration.seqlen
    rmi_tokens = min(calibration.rmi_samples, calibration.nsamples) * calibration.seqlen
    sweeps = 2 * prunable * (rmi_tokens + 3 * calibration_tokens) * config.prune.steps
    train = (8 if training.loss == "kl" else 6) * prunable * text.train_examples * text.train_seqlen
    return {
        "model": config.model.model,
        "family": family.name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "blocks": len(blocks),
        "parameters": parameters,
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
        "evaluation": f"windows of {text.eval_seqlen} tokens of {text.eval_data}",
        "memory, bytes": {name: int(value) for name, value in memory.items()},
        "disk, bytes": needs.disk(model, family, config, size),
        "floating-point operations": {"sweeps": sweeps, "training": train if training.finetune else 0},
        "output": str(config.output_dir),
    }


def show_plan(plan: dict[str, Any]) -> str:
    """The plan as text."""
    lines = []
    for name, value in plan.items():
        if name == "memory, bytes":
            lines.append(f"memory, largest at once         {sum(value.values()) / GIB:.2f} GiB (estimated), of it")
            lines += [f"  {part:<28}{amount / GIB:>10.2f} GiB" for part, amount in value.items()]
        elif name == "disk, bytes":
            lines.append(f"disk, most at once              {sum(value.values()) / GIB:.2f} GiB (estimated), of it")
            lines += [f"  {part:<28}{amount / GIB:>10.2f} GiB" for part, amount in value.items()]
        elif name == "floating-point operations":
            lines += [f"work, {part:<24}{amount / 1e12:>12.2f} TFLOP" for part, amount in value.items()]
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
            lines.append(f"{name:<30}  {shown}")
    return "\n".join(lines)
