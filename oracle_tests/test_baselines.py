"""Baselines: what each trains, on which tokens, and that each formula is the one of its paper."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from oracle_tests import emulated_graphs
from oracle_tests.small_runs import arguments, make_place
from torch_impl import losa
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients, trainable
from torch_impl.engine.record import StepRecord
from torch_impl.experiment.baselines import BASELINES, Trained, decoding, sora
from torch_impl.experiment.baselines.baseline import Costs
from torch_impl.experiment.baselines.decoding import decoding_cost, packed_weights
from torch_impl.experiment.baselines.masked import whole_batches
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, load_material

SPARSE = [name for name, baseline in BASELINES.items() if not baseline.structured]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A configuration of two steps, its material, and the dense model's weights, which no baseline may change."""

    config: Config
    material: Material
    weights: dict[str, torch.Tensor]

    def run(self, name: str, config: Config | None = None, examples: int = 24) -> Trained:
        dense, material = self.material.model, self.material
        material = dataclasses.replace(material, examples=material.examples[:examples])
        return BASELINES[name].run(copy.deepcopy(dense), dense, material, config or self.config)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    place = make_place(tmp_path_factory.mktemp("baselines"))
    changes = {"output_dir": None, "reconstruct_epochs": 1, "dtype": "float64", "weight_decay": 0.1}
    config = parse(arguments(place, **changes), data_required=True)
    material = load_material(config)
    material.model.requires_grad_(False)
    return Setting(config, material, {name: t.clone() for name, t in material.model.state_dict().items()})


@pytest.fixture(autouse=True)
def _dense_stays(setting: Setting) -> Iterator[None]:
    yield
    for name, tensor in setting.material.model.state_dict().items():
        assert torch.equal(tensor, setting.weights[name]), f"the dense model's {name} has changed"


@pytest.mark.parametrize("name", SPARSE)
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
    decoder = Decoder(trained.model)
    linears = [linear for index in range(len(decoder.blocks)) for linear in decoder.projections(index).values()]
    assert BASELINES[name].unmerged == any(type(linear) is not nn.Linear for linear in linears)
    assert set(trained.seconds) == {"importance", "prune", "reconstruct", "train"}
    assert trained.seconds["reconstruct"] > 0


def changed(config: Config, **training: object) -> Config:
    """The same configuration with five steps, so that the mean rank is 8, and other options of training."""
    return dataclasses.replace(
        config,
        prune=dataclasses.replace(config.prune, steps=5),
        training=dataclasses.replace(config.training, **training),
    )


def sizes(model: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of every projection."""
    return [(weight.shape[1], weight.shape[0]) for weight in Decoder(model).weights]


def test_what_is_trained_is_counted_by_formula(setting: Setting) -> None:
    config = changed(setting.config, per_device_train_batch_size=1)
    shapes = sizes(setting.material.model)
    pruned = setting.run("none", config)
    kept = sum(int((weight != 0).sum()) for weight in Decoder(pruned.model).weights)
    assert setting.run("full", config, 8).trainable == kept
    assert setting.run("lora", config, 8).trainable == sum(8 * (i + o) for i, o in shapes)
    assert setting.run("sparse_lora", config, 8).trainable == sum(8 * (i + o) for i, o in shapes)
    assert setting.run("adalora", config, 8).trainable == sum(12 * (i + o + 1) for i, o in shapes)
    assert setting.run("sora", config, 8).trainable == sum(8 * (i + o + 1) for i, o in shapes)


def test_a_run_gives_each_method_its_scale_and_what_it_adds_to_a_step(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of 20 / 8; AdaLoRA's budget is reached; with a threshold above all gates, SoRA's adapters do nothing."""
    config = changed(setting.config, per_device_train_batch_size=1)
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, lora_alpha=20.0))

    def scales(model: nn.Module) -> list[float]:
        return [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]

    assert set(scales(setting.run("lora", config, 8).model)) == {2.5}
    adalora = setting.run("adalora", config, 8).model
    # peft divides AdaLoRA's by the rank when it is used.
    assert set(scaled := scales(adalora)) == {8 * 2.5}
    ranks = [int((e != 0).sum()) for name, e in adalora.named_parameters() if ".lora_E." in name]
    assert (len(ranks), sum(ranks)) == (len(scaled), 8 * len(scaled))
    gates = [
        module for module in setting.run("sora", config, 8).model.modules() if isinstance(module, sora.GatedLinear)
    ]
    assert {layer.scale for layer in gates} == {2.5}
    assert all(layer.B.any() and layer.gate.any() for layer in gates)
    monkeypatch.setattr(sora, "THRESHOLD", 10.0)
    idle, pruned = setting.run("sora", config, 8).model, setting.run("none", config).model
    ids = setting.material.evaluation[:1]
    assert torch.equal(idle(ids).logits, pruned(ids).logits)


def test_sparse_lora_is_algorithm_1_in_one_step(setting: Setting) -> None:
    config, model = setting.config, copy.deepcopy(setting.material.model)
    settings = dataclasses.replace(
        config.settings,
        prune=dataclasses.replace(config.prune, steps=1, layer_sparsity="uniform"),
        adapter=dataclasses.replace(config.adapter, rank_allocation="uniform"),
    )
    losa.run(model, setting.material.calibration, [setting.material.examples], settings)
    merge_adapters(Decoder(model))
    trained = setting.run("sparse_lora")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_every_kept_weight_moves_and_every_zero_stays(setting: Setting) -> None:
    pruned, trained = setting.run("none").model, setting.run("full").model
    for before, after in zip(Decoder(pruned).weights, Decoder(trained).weights, strict=True):
        assert torch.equal(before == 0, after == 0)
        assert bool((before != after)[before != 0].all())
    projections = {id(weight) for weight in Decoder(trained).weights}
    for name, parameter in trained.named_parameters():
        if id(parameter) not in projections:
            assert torch.equal(parameter, pruned.get_parameter(name)), name


@pytest.mark.parametrize("name", ["lora", "adalora", "sora", "full"])
def test_half_precision_is_trained_in_float32(setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_in = set()

    def watch(model: PreTrainedModel, *arguments: Any, **options: Any) -> list[float]:
        trained_in.update(parameter.dtype for parameter in trainable(model))
        return train(model, *arguments, **options)

    train = training.train
    monkeypatch.setattr(training, "train", watch)
    half = copy.deepcopy(setting.material.model).bfloat16()
    material = dataclasses.replace(setting.material, model=half)
    result = BASELINES[name].run(copy.deepcopy(half), half, material, setting.config)
    assert trained_in == {torch.float32}
    assert {weight.dtype for weight in Decoder(result.model).weights} == {torch.bfloat16}
    assert zero_share(Decoder(result.model).weights) == pytest.approx(0.7, abs=0.02)
    assert perplexity(result.model, material.evaluation, 8) < 1000


@pytest.mark.parametrize("name", ["lora", "adalora", "sora"])
def test_the_same_seed_gives_the_same_bits(setting: Setting, name: str) -> None:
    torch.manual_seed(1)
    first = setting.run(name).model.state_dict()
    torch.manual_seed(2)
    for key, tensor in setting.run(name).model.state_dict().items():
        assert torch.equal(tensor, first[key]), key
    other = dataclasses.replace(setting.config, output=dataclasses.replace(setting.config.output, seed=1))
    again = setting.run(name, other).model.state_dict()
    assert any(not torch.equal(again[key], first[key]) for key in first if ".A" in key or ".lora_A" in key)


@pytest.mark.parametrize("name", ["lora", "sora", "full"])
def test_training_in_cuda_graphs_is_training_launch_by_launch(
    setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With emulated graphs, which also notice what a graph reads after it is freed."""
    plain = setting.run(name, changed(setting.config, per_device_train_batch_size=1), 12).model.state_dict()
    monkeypatch.setattr(Gradients, "_may_capture", lambda self: True)
    graphs = emulated_graphs.emulate(monkeypatch)
    captured = setting.run(name, changed(setting.config, per_device_train_batch_size=1), 12).model.state_dict()
    assert sum(graph.replays for graph in graphs) >= 5
    for key, tensor in captured.items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-4, atol=1e-5)


def test_no_two_adapters_of_sora_start_alike(setting: Setting) -> None:
    layers = sora.attach(Decoder(copy.deepcopy(setting.material.model)), 4, 1.0, seed=0)
    starts = [(layer.A.shape[1], layer.A[0, 0].item(), layer.gate[0].item()) for layer in layers]
    assert len({first for _, first, _ in starts}) == len({gate for _, _, gate in starts}) == len(layers)


@pytest.mark.parametrize("name", ["lora", "adalora", "sora", "full"])
def test_one_schedule_ends_with_the_last_optimizer_step(
    setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All start at the first of three steps and decay until the last: the rates that AdamW sees."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *given: Any, **options: Any) -> Any:
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *given, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = dataclasses.replace(
        setting.config, training=dataclasses.replace(setting.config.training, warmup_ratio=0.0, learning_rate=1e-3)
    )
    setting.run(name, config)
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


def test_no_training_is_one_shot_of_algorithm_1(setting: Setting) -> None:
    """Of the dense weights, whatever a run would train over."""
    config = setting.config
    over_int8 = dataclasses.replace(config, training=dataclasses.replace(config.training, train_base="int8"))
    trained = setting.run("none", over_int8)
    model = copy.deepcopy(setting.material.model)
    settings = dataclasses.replace(
        config.settings,
        prune=dataclasses.replace(config.prune, steps=1),
        training=dataclasses.replace(config.training, finetune=False),
    )
    losa.run(model, setting.material.calibration, [], settings)
    merge_adapters(Decoder(model))
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert zero_share(Decoder(trained.model).weights) == pytest.approx(0.7, abs=0.02)
    assert trained.trainable == 0


def test_the_seconds_of_all_steps_add_up() -> None:
    costs = Costs(torch.device("cpu"))
    steps = [{"importance": 1.0, "prune": 2.0, "train": 4.0}, {"prune": 8.0, "train": 16.0}]
    costs.add_records([StepRecord(n, 0.5, [], [], [], [], [], [], seconds) for n, seconds in enumerate(steps, 1)])
    assert costs.seconds == {"importance": 1.0, "prune": 10.0, "train": 20.0}


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


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "none"])
def test_nothing_to_train_on_is_refused_before_pruning(
    setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losa, "run", lambda *_, **__: pytest.fail("it prunes"))
    with pytest.raises(ValueError, match=r"no training examples|^0 training examples|0 examples make 0"):
        setting.run(name, examples=0)


@pytest.mark.parametrize("name", BASELINES)
def test_a_compressed_base_is_refused_before_any_work_by_those_that_would_ignore_it(
    setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("it works"))
    training = dataclasses.replace(setting.config.training, train_base="int8")
    config = dataclasses.replace(setting.config, training=training)
    if name in ("none", "sparse_lora", "losa"):
        BASELINES[name].check_options(config)
        return
    with pytest.raises(
        ValueError, match=rf"^train_base is int8, and baseline {name} keeps its base weights dense; use"
    ):
        setting.run(name, config)


def test_a_missing_package_is_named_with_its_extra(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_impl.experiment.baselines.baseline.find_spec", lambda name: None)
    for name in ("lora", "adalora"):
        with pytest.raises(ValueError, match=rf'{name} needs peft; install it: pip install "losa-oracle\[baselines\]"'):
            setting.run(name)
    for name in ("none", "sora", "sparse_lora", "full", "losa"):
        BASELINES[name].check()


def test_the_dense_model_s_speed_is_the_dense_model_s(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned, dense = copy.deepcopy(setting.material.model), setting.material.model

    class Stopwatch:
        def __init__(self, model: nn.Module, *_: Any, **__: Any) -> None:
            self.model = model

        def tokens_per_second(self, tokens: int, runs: int) -> float:
            return {id(dense): 20.0, id(pruned): 45.0}[id(self.model)]

    monkeypatch.setattr(decoding, "Decoding", Stopwatch)
    monkeypatch.setattr(decoding, "peak_of", lambda of, action, _: (action(), 400 if of is dense else 300))
    cost = decoding_cost(pruned, dense)
    assert (cost.dense, cost.packed, cost.ratio) == (20.0, 45.0, 2.25)
    assert (cost.dense_bytes, cost.packed_bytes) == (400, 300)


@pytest.mark.parametrize("name", ["none", "lora", "adalora", "sora"])
def test_the_cost_of_decoding_is_measured_with_packed_weights_and_adapters_beside_them(
    setting: Setting, name: str
) -> None:
    trained, dense = setting.run(name).model, setting.material.model
    ids, before = setting.material.evaluation[:1], copy.deepcopy(trained.state_dict())
    plain = trained(ids).logits
    with packed_weights(trained):
        packed = [module for module in trained.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == len(sizes(dense))
        torch.testing.assert_close(trained(ids).logits, plain, rtol=1e-6, atol=1e-6)
    cost = decoding_cost(trained, dense, batch=2, tokens=3, runs=1)
    assert cost.dense > 0
    assert cost.ratio == cost.packed / cost.dense > 0
    after = trained.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
