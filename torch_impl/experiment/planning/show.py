"""Format a plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from torch_impl.experiment.planning.cards import CARDS
from torch_impl.experiment.planning.dry_run import Plan
from torch_impl.experiment.planning.outlook import REACHED, Outlook
from torch_impl.experiment.planning.parts import Parts
from torch_impl.experiment.text.windows import split_parts

GIB = 2**30

PARTS = {
    "weights": "weights",
    "dense_copy": "dense copy",
    "reloaded": "reloaded weights",
    "blocks": "whole blocks",
    "outside": "embeddings and head, whole",
    "merged": "merged weights",
    "adapters": "adapters",
    "gradients": "gradients of the adapters",
    "moments": "moments of the optimizer",
    "streams": "hidden states",
    "activations": "activations",
    "work": "work on a block",
    "logits": "logits",
    "reconstruction": "training of a block",
    "statistics": "statistics of gradients",
    "masks": "masks",
    "process": "Python, torch and CUDA",
}
PHASES = {
    "importance": "measuring importances",
    "gradients": "the gradients of the calibration loss",
    "calibration": "calibration",
    "reconstruction": "reconstruction",
    "training": "training",
    "evaluation": "evaluation",
    "verification": "verification",
    "dense": "the sweep over the dense model",
    "pruning": "the pruning sweep",
    "verifying": "the verifying sweep",
}
DISK = {"model": "merged model", "checkpoints": "checkpoints to resume from", "report": "report"}
STEP = {"weights": "weights", "gradients": "gradients"}
CALIBRATION = {
    "weights": "weights",
    "pruned": "pruned weights",
    "statistics": "statistics",
    "reconstruction": "gradients of reconstruction",
    "features": "features",
}
WORK = {
    "sweeps": "sweeps",
    "reconstruction": "reconstruction",
    "training": "training",
    "writing": "text the model writes",
}


def plan_text(plan: Plan) -> str:
    """Format one line per fact and per part of memory, disk and traffic."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    for name, value in _facts(plan).items():
        yield f"{name:<30}  {value}"
    several = plan.cards > 1
    yield from _parts(
        f"memory of each of {plan.cards} cards" if several else "device memory", _named(plan.memory.device)
    )
    yield from _parts("host memory of each process" if several else "host memory", _named(plan.memory.host))
    if several:
        if plan.config.training.finetune:
            yield from _amounts("received by each in an optimizer step", asdict(plan.step_traffic), STEP)
        yield from _amounts(
            "received by each in the calibration of a step", asdict(plan.calibration_traffic), CALIBRATION
        )
    yield from _parts("disk", {DISK[name]: size for name, size in asdict(plan.disk).items()})
    for name, operations in asdict(plan.work).items():
        if operations:
            yield f"work, {WORK[name]:<24}{operations / 1e12:>10,.2f} TFLOP"
    if plan.outlook is not None:
        yield from _outlook(plan.outlook, plan.cards, plan.dtype)
    yield f"{'output':<30}  {plan.config.output_dir}"


def _outlook(found: Outlook, cards: int, dtype: str) -> Iterator[str]:
    named = f"{cards} × {found.card.name}" if cards > 1 else found.card.name
    yield f"{f'fits {named}':<30}  {'yes' if found.fits else 'NO'}: {found.free / GIB:.1f} GiB of a card may be used"
    yield from (f"  would fit at {needed / GIB:.1f} GiB with {options}" for options, needed in found.remedies)
    if not found.fits and not found.remedies:
        yield "  does not fit with smaller batches, more cards or offloading either"
    if found.hours is not None:
        speed = f"{REACHED:.0%} of {found.card.tflops} TFLOP/s a card"
        hours = f"{_hours(found.hours)}, at {speed}, sequences of full length; small models take longer"
    elif found.card.tflops is None:
        hours = f"unknown for {found.card.name} of any card; name one of {', '.join(card.name for card in CARDS)}"
    else:
        hours = f"unknown in {dtype}; --dtype bfloat16 shows them"
    yield f"{'hours (estimated)':<30}  {hours}"


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours >= 0.01 else "less than 0.01"


def _facts(plan: Plan) -> dict[str, str]:
    config = plan.config
    text = config.text
    return {
        "model": config.model.model,
        "family": plan.family,
        "device": plan.device,
        "dtype": plan.dtype,
        "blocks": f"{plan.blocks:,}",
        "parameters": f"{plan.parameters:,}",
        "prunable weights": f"{plan.prunable:,}",
        "pruning": _pruning(plan),
        "sparsity after each step": str([round(target, 4) for target in plan.sparsity]),
        "mean rank of each step": str(list(plan.ranks)),
        "calibration": _calibration(plan),
        "fine-tuning": _fine_tuning(plan),
        **_reconstruction(plan),
        "evaluation": f"{_first(text.eval_windows)}windows of {text.eval_seqlen} tokens of {text.eval_data}",
        "weights": _where(plan),
        "peak memory in": PHASES[plan.memory.phase],
    }


def _first(windows: int | None) -> str:
    return "" if windows is None else f"the first {windows:,} "


def _pruning(plan: Plan) -> str:
    prune = plan.config.prune
    first, last = prune.dense_blocks
    ends = f", not the first {first} and last {last} blocks" if first + last else ""
    return f"{prune.prune_method}, {prune.sparsity_type}, {prune.layer_sparsity} rates{ends}"


def _calibration(plan: Plan) -> str:
    calibration = plan.config.calibration
    of_text = f"{calibration.nsamples} × {calibration.seqlen} tokens of {plan.config.text.calibration_data}"
    written = calibration.written
    return f"{of_text}, and {written} × {calibration.seqlen} that the model writes" if written else of_text


def _where(plan: Plan) -> str:
    if plan.memory.offloaded:
        if plan.config.training.compressed:
            return (
                f"in memory, {plan.config.training.train_base} while training; dense ones one block at a time from disk"
            )
        return "offloaded: one block at a time from disk"
    return "in memory" if plan.cards == 1 else f"in memory, 1/{plan.cards} of the rows on each card"


def _fine_tuning(plan: Plan) -> str:
    text, training = plan.config.text, plan.config.training
    if not training.finetune:
        return "none"
    shares = text.shares(plan.config.prune.steps)
    # Each part ends with an optimizer step of its own.
    updates = sum(training.optimizer_steps(len(part)) for part in split_parts(range(text.train_examples), shares))
    return (
        f"{text.train_examples} × {text.train_seqlen} tokens of {text.finetune_data}, "
        f"shares {[round(share, 3) for share in shares]}, "
        f"{updates} optimizer steps, loss {training.loss}, learning rate {training.learning_rate:g}"
    )


def _reconstruction(plan: Plan) -> dict[str, str]:
    options = plan.config.reconstruction
    if not options.reconstruct_epochs:
        return {}
    batches = math.ceil(plan.config.calibration.sequences / options.reconstruct_batch_size)
    what = "each block" if options.window == 1 else f"each window of {options.window} blocks"
    return {
        "reconstruction": f"{options.reconstruct_epochs} epochs of {what} at each step, "
        f"{options.reconstruct_epochs * batches} optimizer steps, learning rate {options.reconstruct_learning_rate:g}"
    }


def _named(parts: Parts) -> dict[str, int]:
    return {PARTS[name]: size for name, size in parts.by_name().items()}


def _parts(title: str, sizes: Mapping[str, int]) -> Iterator[str]:
    yield f"{title:<30}  {_size(sum(sizes.values()))} at the peak (estimated):"
    yield from (f"  {name:<28}{_size(size):>14}" for name, size in sizes.items())


def _amounts(title: str, sizes: Mapping[str, int], names: Mapping[str, str]) -> Iterator[str]:
    yield title
    yield from (f"  {names[name]:<28}{_size(size):>14}" for name, size in sizes.items())


def _size(count: float) -> str:
    """Format bytes: in MiB if they are less than a hundredth of a GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
