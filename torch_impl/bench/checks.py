"""Checks of the benchmarks' options, before any work."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from torch_impl import _checks
from torch_impl.bench.whole import GIVEN, LONGEST
from torch_impl.engine.checkpoints.pretrained import choose_device

# RMI compares halves of the sequences, which are two or more.
FEWEST_SEQUENCES = 4


def check(options: argparse.Namespace) -> None:
    """Check the options of `losa bench`; device auto becomes this machine's. Errors: ValueError naming the option."""
    _check_shared(options)
    _checks.count("sequences", options.sequences, FEWEST_SEQUENCES)
    _checks.count("length", options.length, 2)
    for length in options.train_lengths:
        # Mixed lengths begin at a quarter.
        _checks.count("train_lengths", length, 8)
    _checks.count("accumulation", options.accumulation)
    _checks.count("reconstruct_epochs", options.reconstruct_epochs, 0)


def check_decode(options: argparse.Namespace) -> None:
    """Check the options of `losa bench decode`; device auto becomes this machine's. Errors: ValueError naming the option."""
    _check_shared(options)
    for sparsity in options.sparsities:
        _check_sparsity(sparsity)
    if options.adapters is not None:
        _checks.count("adapters", options.adapters)
    for name, value in (("adapters", options.adapters), ("blocks", options.blocks)):
        if value is not None and options.whole_model is None:
            raise ValueError(
                f"{name} is {value} and has no effect without --whole_model; give that, too, or leave it out"
            )
    _checks.count("tokens", options.tokens, 2, LONGEST - GIVEN - 1)
    _checks.count("prompt", options.prompt)


def _check_shared(options: argparse.Namespace) -> None:
    options.device = str(choose_device(options.device))
    if options.blocks is not None:
        _checks.count("blocks", options.blocks)
    _checks.count("repeats", options.repeats)
    if options.json is not None:
        _check_file(options.json)


def _check_sparsity(text: str) -> None:
    pattern = re.fullmatch(r"(\d+):(\d+)", text)
    if pattern and 1 <= int(pattern[1]) <= int(pattern[2]):
        return
    if re.fullmatch(r"\d+(\.\d*)?", text) and float(text) < 100:
        return
    raise ValueError(f"sparsities has {text!r}; allowed: percentages from 0 to below 100, and N:M with N from 1 to M")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"json is {path}, which is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"json is {path}, and there is no folder {path.parent}; make it first")
