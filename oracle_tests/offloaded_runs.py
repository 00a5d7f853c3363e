"""Runs of one shot in memory and offloaded, and runs that stop at a checkpoint; shared by tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oracle_tests.small_runs import arguments
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.run import main

PLAIN: dict[str, object] = {"steps": 1, "finetune": "false", "layer_sparsity": "rmi", "eval_windows": 4}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def both(place: Path, **changes: object) -> tuple[Path, Path]:
    """Folders of the same run, in memory and block by block."""
    for choice in ("off", "on"):
        options = arguments(place, **{**PLAIN, **changes}, offload=choice, output_dir=place / choice)
        assert main(options) == 0
    return place / "off", place / "on"


def same(one: Path, other: Path) -> None:
    """The same weights to the last bit; the same figures but for seconds."""
    ours, theirs = weights_in(one / "model"), weights_in(other / "model")
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    for file in ("losa_result.json", "steps.json"):
        _same_figures(json.loads((one / file).read_text()), json.loads((other / file).read_text()))


def _same_figures(one: object, other: object) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        assert set(one) == set(other)
        for name in one:
            if "seconds" not in name and name not in ("reloaded", "samples", "peak_memory"):
                _same_figures(one[name], other[name])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _same_figures(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-6, abs=1e-12) if isinstance(other, float) else other)


class Killed(BaseException):
    """Raised to simulate a killed process."""


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the run right after checkpoint N."""
    noted, seen = Checkpointer.noted, []

    def counted(self: Checkpointer) -> None:
        noted(self)
        seen.append(1)
        if len(seen) == count:
            monkeypatch.setattr(Checkpointer, "noted", noted)
            raise Killed

    monkeypatch.setattr(Checkpointer, "noted", counted)
