"""The arguments of `torch_impl.prune`: the configuration and the material that they mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine.batches import Example
from torch_impl.engine.families import position_limit
from torch_impl.experiment import config as options_of
from torch_impl.experiment.command import closest
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import checks
from torch_impl.experiment.text import given
from torch_impl.experiment.text.windows import split_parts

# Sections of options that a program may set; the others are about files and the command line.
SECTIONS = ("prune", "adapter", "calibration", "training", "reconstruction")
MORE = ("train_examples", "train_seqlen", "step_shares", "seed")
# Given by arguments of their own.
OWN = {"prune_method": "method", "sparsity_ratio": "sparsity", "finetune": "train"}


def check_model(model: Any) -> None:
    """Check that this is a transformers model. Errors: TypeError."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, as from_pretrained returns it")


def is_ids(value: Any) -> bool:
    """Return whether text is given as token ids."""
    return isinstance(value, torch.Tensor | np.ndarray)


def _check_names(options: Iterable[str]) -> None:
    allowed = {field.name for name in SECTIONS for field in dataclasses.fields(options_of.SECTIONS[name])} | set(MORE)
    for name in options:
        if name in OWN:
            raise TypeError(f"{name} is given by the argument {OWN[name]}")
        if name not in allowed:
            raise TypeError(f"{name} is not an option of prune{closest(name, allowed | {*OWN.values(), 'preset'})}")


def configuration(
    model: PreTrainedModel,
    calibration: Any,
    train: Any,
    sparsity: float | None,
    method: str,
    preset: str,
    options: dict[str, Any],
) -> Config:
    """Build and check the options of a call, like those of the command line."""
    check_model(model)
    _check_names(options)
    options = {**options, "prune_method": method, "preset": preset}
    if options.get("sparsity_type", "unstructured") in ("unstructured", "structured"):
        options["sparsity_ratio"] = sparsity
    if train is None:
        options["finetune"] = False
    if is_ids(calibration):
        for name in ("seqlen", "nsamples"):
            if name in options:
                raise TypeError(f"{name} is given, and calibration is token ids, which decide it; leave it out")
    words = ["--model", model.config.name_or_path or type(model).__name__]
    for name, value in options.items():
        if value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    try:
        return options_of.parse(words)
    except ValueError as error:
        # The caller knows these options as arguments of this function.
        text = re.sub(r"^argument --([a-z_]+): (.*); see --help$", r"\1: \2", str(error), flags=re.DOTALL)
        named = next((option for option in OWN if text.startswith(f"{option} is ")), "")
        raise ValueError(OWN.get(named, named) + text.removeprefix(named)) from error


def material_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, calibration: Any, train: Any, config: Config
) -> tuple[torch.Tensor, list[list[Example]]]:
    """Return the calibration windows and the parts of the training examples, checked against the model."""
    seed, found = config.output.seed, config.calibration
    if not is_ids(calibration):
        checks.check_token_ids(config)
    windows = given.windows_of(calibration, tokenizer, found.nsamples, found.seqlen, seed)
    examples: list[Example] = []
    if config.training.finetune:
        examples = given.examples_of(train, tokenizer, config.text.train_seqlen, config.text.train_examples, seed)
    learned = [example["input_ids"] for example in examples]
    given.check_ids(model, {"calibration": [windows], "train": learned})
    lengths = {"calibration": windows.shape[1], "train": max(map(len, learned), default=0)}
    limit = position_limit(model)
    if limit is not None and (beyond := [name for name, length in lengths.items() if length > limit]):
        raise ValueError(f"{beyond[0]} has sequences of {lengths[beyond[0]]} tokens; this model has {limit} positions")
    return windows, split_parts(examples, config.text.shares(config.prune.steps)) if examples else []


def with_shape(config: Config, windows: torch.Tensor) -> Config:
    """Return the configuration with the number and length of the calibration windows that there are."""
    found = config.calibration
    rows = None if found.rmi_samples is None else min(found.rmi_samples, len(windows))
    found = dataclasses.replace(found, nsamples=len(windows), seqlen=windows.shape[1], rmi_samples=rows)
    return dataclasses.replace(config, calibration=found)
