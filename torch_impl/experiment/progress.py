"""A line for each step of a run: perplexity and the time that is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch_impl.engine.record import StepRecord


def step_line(record: StepRecord, perplexity: float, shares: Sequence[float]) -> str:
    """Describe a step that is done. shares: of the fine-tuning sequences that each step trains on."""
    sparsity = sum(record.realised) / len(record.realised)
    steps, trained = len(shares), record.seconds.get("train", 0.0)
    fixed = sum(record.seconds.values()) - trained
    left = sum(fixed + trained * share / shares[record.step - 1] for share in shares[record.step :])
    ahead = f"about {clock(left)} left" if record.step < steps else "saving and verifying"
    return f"step {record.step} of {steps}: sparsity {sparsity:.3f}, perplexity {perplexity:.2f}, {ahead}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
