"""A model whose blocks come from its files is pruned to the same bits as one in memory, and leaves the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle_tests.test_run import arguments, fails, place  # noqa: F401 - a fixture
from tiny_models.random_models import FAMILIES, save_random_model
from torch_impl.engine import shards
from torch_impl.run import main

PLAIN = {"steps": 1, "finetune": "false", "eval_windows": 4}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def split_into_shards(folder: Path, parts: int) -> None:
    """The same checkpoint in several files, tensors dealt out in turn, as no block would have it."""
    tensors = load_file(folder / shards.SINGLE)
    (folder / shards.SINGLE).unlink()
    place_of = {name: f"model-{k % parts + 1:05}-of-{parts:05}.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(place_of.values()):
        chosen = {name: tensor for name, tensor in tensors.items() if place_of[name] == file}
        save_file(chosen, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": place_of}
    (folder / shards.INDEX).write_text(json.dumps(index))


def both(place: Path, **changes: object) -> tuple[Path, Path]:  # noqa: F811
    """Folders of the same run, in memory and block by block."""
    for offload in ("off", "on"):
        options = arguments(place, **PLAIN, **changes, offload=offload, output_dir=place / offload)
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
            if "seconds" not in name:
                _same_figures(one[name], other[name])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            _same_figures(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-6, abs=1e-12) if isinstance(other, float) else other)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_same_bits(place: Path, family: str) -> None:  # noqa: F811
    save_random_model(place / "model", family)
    same(*both(place))


@pytest.mark.parametrize(
    "changes",
    [
        {"prune_method": "magnitude", "sparsity_ratio": 0.5, "layer_sparsity": "uniform"},
        {"prune_method": "sparsegpt", "dtype": "bfloat16"},
        {"prune_method": "sparsegpt", "sparsity_type": "mixed-2:4", "calibration_batch_size": 4},
        {"sparsity_type": "2:4", "dtype": "float64"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_every_method_and_pattern_gets_the_same_bits(place: Path, changes: dict) -> None:  # noqa: F811
    split_into_shards(place / "model", 3)
    one, other = both(place, **changes)
    same(one, other)
    mirrored = {path.name for path in (place / "model").glob("model*")}
    assert {path.name for path in (other / "model").glob("model*")} == mirrored
