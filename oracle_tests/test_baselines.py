"""Baselines: what each trains, on which tokens, and that each formula is the one of its paper."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from oracle_tests.small_runs import arguments, make_place
from torch_impl import losa
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines import BASELINES, Trained
from torch_impl.experiment.baselines.baseline import one_shot
from torch_impl.experiment.baselines.masked import whole_batches
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, load_material


@dataclasses.dataclass(frozen=True)
class Setting:
    """A configuration of two steps, its material, and the dense model's weights, which no baseline may change."""

    config: Config
    material: Material
    weights: dict[str, torch.Tensor]

    def run(self, name: str, config: Config | None = None, model: PreTrainedModel | None = None) -> Trained:
        dense = self.material.model
        return BASELINES[name].run(model or copy.deepcopy(dense), dense, self.material, config or self.config)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    place = make_place(tmp_path_factory.mktemp("baselines"))
    config = parse(arguments(place, output_dir=None, reconstruct_epochs=1), data_required=True)
    material = load_material(config)
    material.model.requires_grad_(False)
    return Setting(config, material, {name: t.clone() for name, t in material.model.state_dict().items()})


@pytest.fixture(autouse=True)
def _dense_stays(setting: Setting) -> Iterator[None]:
    yield
    for name, tensor in setting.material.model.state_dict().items():
        assert torch.equal(tensor, setting.weights[name]), f"the dense model's {name} has changed"


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_sees_the_same_tokens_in_as_many_steps_and_can_be_used(setting: Setting, name: str) -> None:
    model, material = copy.deepcopy(setting.material.model), setting.material
    seen = []

    def watch(module: nn.Module, _: object, given: dict[str, torch.Tensor]) -> None:
        if torch.is_grad_enabled() and module.training:
            seen.extend(row.tolist() for row in given["input_ids"])

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    heard: list[tuple[int, int, float]] = []
    trained = BASELINES[name].run(
        model, material.model, material, setting.config, lambda *progress: heard.append(progress)
    )
    handle.remove()
    steps = 0 if name == "none" else setting.config.training.optimizer_steps(len(material.examples))
    assert steps in (0, 3)
    assert trained.optimizer_steps == steps
    assert [(done, total) for done, total, _ in heard] == [(step + 1, steps) for step in range(steps)]
    assert sorted(seen) == ([] if name == "none" else sorted(e["input_ids"].tolist() for e in material.examples))

    assert isinstance(trained.model, PreTrainedModel)
    assert not trained.model.training
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert 1 < perplexity(trained.model, material.evaluation, 8) < 1000
    ids = material.evaluation[:1, :5]
    assert trained.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 7)
    assert trained.unmerged == (name in ("lora", "adalora", "sora"))
    assert set(trained.seconds) >= {"importance", "prune", "train"}


def test_no_training_is_one_shot_of_algorithm_1(setting: Setting) -> None:
    trained = setting.run("none")
    model = copy.deepcopy(setting.material.model)
    losa.run(model, setting.material.calibration, [], one_shot(setting.config.settings))
    merge_adapters(Decoder(model))
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert zero_share(Decoder(trained.model).weights) == pytest.approx(0.7, abs=0.02)
    assert trained.trainable == 0


@pytest.mark.parametrize(
    ("examples", "shares", "batches"),
    [
        (24, [0.1, 0.9], [1, 2]),
        (30, [0.25] * 4, [1, 1, 1, 1]),
        (80, [0.1] * 4 + [0.6], [1, 1, 1, 1, 6]),
        (8, [1.0], [1]),
    ],
)
def test_losa_s_parts_end_with_whole_batches(
    setting: Setting, examples: int, shares: list[float], batches: list[int]
) -> None:
    made = [{"input_ids": torch.tensor([number])} for number in range(examples)]
    parts = whole_batches(made, shares, setting.config.training)
    assert [setting.config.training.optimizer_steps(len(part)) for part in parts] == batches
    assert [example for part in parts for example in part] == made


def test_fewer_batches_than_steps_are_refused(setting: Setting) -> None:
    with pytest.raises(ValueError, match="9 training examples make 2 batches of 8, fewer than the 3 steps"):
        whole_batches([{}] * 9, [0.2, 0.2, 0.6], setting.config.training)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_impl.experiment.baselines.baseline.find_spec", lambda name: None)
    for name in ("lora", "adalora"):
        with pytest.raises(ValueError, match=rf'{name} needs peft; install it: pip install "losa-oracle\[baselines\]"'):
            BASELINES[name].check()
    for name in ("none", "sora", "sparse_lora", "full", "losa"):
        BASELINES[name].check()
