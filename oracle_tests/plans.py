"""Configurations small enough to work out by hand what their runs take."""

from __future__ import annotations

from torch_impl.experiment.config import Config, parse

SMALL = {
    "nsamples": 4, "seqlen": 2, "calibration_batch_size": 2, "eval_seqlen": 2, "eval_batch_size": 1, "steps": 2,
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "train_examples": 8, "train_seqlen": 2,
}  # fmt: skip
PLAIN = {"steps": 1, "finetune": "false"}


def config(**changes: object) -> Config:
    options = {"model": "a/b", **SMALL, **changes}
    return parse([word for name, value in options.items() for word in (f"--{name}", str(value))])
