"""What Algorithm 1 refuses before it starts, in both packages, and production's clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oracle_tests.test_families import parts_for, settings, token_ids
from reference import losa as spec
from tiny_models.random_models import random_model
from torch_impl import losa


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (losa.PruneConfig, "prune_method", "best"),
        (losa.PruneConfig, "layer_sparsity", "best"),
        (losa.PruneConfig, "steps", 0),
        (losa.PruneConfig, "sparsity_ratio", 1.0),
        (losa.PruneConfig, "sparsity_ratio", -0.1),
        (losa.PruneConfig, "sparsity_type", "2of4"),
        (losa.PruneConfig, "sparsity_type", "mixed-unstructured"),
        (losa.PruneConfig, "sparsity_type", "5:4"),
        (losa.PruneConfig, "sparsity_type", "0:4"),
        (losa.AdapterConfig, "rank_allocation", "best"),
        (losa.AdapterConfig, "rank_shrink", "best"),
        (losa.AdapterConfig, "lora_r", 0),
        (losa.AdapterConfig, "initial_rank", 0),
        (losa.AdapterConfig, "initial_rank", 17),
    ],
)
def test_settings_that_cannot_be_are_refused(part: Any, name: str, value: Any) -> None:
    for build in (spec.Settings, part):
        with pytest.raises(ValueError, match=f"^{name} is '?{value}'?; allowed: "):
            build(**{name: value})


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity_ratio is 0\.7; allowed with sparsity_type 2:4: 0\.5"):
        losa.PruneConfig(sparsity_ratio=0.7, sparsity_type="2:4")
    assert losa.PruneConfig(sparsity_ratio=0.5, sparsity_type="2:4").final_sparsity == 0.5
    with pytest.raises(ValueError, match="steps is 12"):
        spec.Settings(steps=12)
    with pytest.raises(ValueError, match="steps is 12: the mean rank would end at 17; allowed: up to max_rank 16"):
        losa.Settings(losa.PruneConfig(steps=12))


@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [8, 0]])
def test_parts_that_do_not_fit_the_steps_are_refused(sizes: list[int]) -> None:
    """Before anything is changed."""
    model = random_model("llama")
    parts = [part[:size] for part, size in zip(parts_for(model, len(sizes)), sizes, strict=True)]
    message = rf"parts has {len(sizes)} parts of \{sizes} examples; allowed: 2, none empty".replace("]", r"\]")
    with pytest.raises(ValueError, match=message):
        losa.run(model, token_ids(model, 6, 12), parts, settings())
    assert not any("A" in name.split(".") for name, _ in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = losa._Clock(torch.device(device))
    clock.lap("first")
    clock.lap("second")
    assert waited == [torch.device(device)] * (2 if device == "cuda" else 0)
    assert list(clock.laps) == ["first", "second"]
    assert all(seconds >= 0 for seconds in clock.laps.values())
