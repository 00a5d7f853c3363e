"""The arguments of `torch_impl.prune`: the configuration and the material that they mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import losa
from torch_impl._checks import few
from torch_impl.engine import structure
from torch_impl.engine.batches import Example
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.settings import Settings
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


def check_weights(model: PreTrainedModel, settings: Settings) -> Decoder:
    """Check the model before anything changes; return its decoder.

    Errors: ValueError as `structure.check_model`, or if weights are not in memory, or are sparser than the target already.
    """
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ValueError(
            f"model has weights that are not in memory ({few(absent)}), as device_map leaves them; load it without, or use "
            "losa run --offload on"
        )
    decoder = structure.check_model(model, settings)
    weights = [list(decoder.family.weights_of(block).values()) for block in decoder.blocks]
    shares = torch.tensor([zero_share(of_block) for of_block in weights], dtype=torch.float64)
    sizes = torch.tensor([sum(weight.numel() for weight in of_block) for of_block in weights], dtype=torch.float64)
    try:
        losa.initial_rates(shares, sizes, settings.prune)
    except ValueError as error:
        raise ValueError(_as_arguments(str(error))) from None
    return decoder


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


def _check_decided(options: dict[str, Any], calibration: Any, train: Any) -> None:
    """Errors: TypeError naming an option that tokens decide."""
    decided: dict[str, str] = {}
    if is_ids(calibration):
        decided |= dict.fromkeys(("seqlen", "nsamples"), "calibration is token ids, which decide")
    if given.is_tokenized(train):
        decided |= dict.fromkeys(("train_examples", "train_seqlen"), "train is tokenized, which decides")
    for name, why in decided.items():
        if name in options:
            raise TypeError(f"{name} is given, and {why} it; leave it out")


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
    options = {**options, "prune_method": method, "preset": preset, "sparsity_ratio": sparsity}
    if train is None:
        options["finetune"] = False
    _check_decided(options, calibration, train)
    if is_ids(calibration) and calibration.ndim == 2 and isinstance(asked := options.get("rmi_samples"), int):
        # Of fewer sequences all measure the importance; see `with_shape`.
        options["nsamples"] = max(asked, len(calibration), 2)
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
        raise ValueError(_as_arguments(text)) from error


def _as_arguments(text: str) -> str:
    """Name the argument of `prune` where a message begins with the option of the command line."""
    named = next((option for option in OWN if text.startswith((f"{option} is ", f"{option}: "))), "")
    return OWN.get(named, named) + text.removeprefix(named)


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


def with_shape(config: Config, windows: torch.Tensor, tokenized: Sequence[Example] = ()) -> Config:
    """Return the configuration with the number and length of the calibration windows, and of tokenized examples, that there are."""
    found = config.calibration
    rows = None if found.rmi_samples is None else min(found.rmi_samples, len(windows))
    found = dataclasses.replace(found, nsamples=len(windows), seqlen=windows.shape[1], rmi_samples=rows)
    text = config.text
    if tokenized:
        longest = max(len(example["input_ids"]) for example in tokenized)
        text = dataclasses.replace(text, train_examples=len(tokenized), train_seqlen=longest)
    return dataclasses.replace(config, calibration=found, text=text)
