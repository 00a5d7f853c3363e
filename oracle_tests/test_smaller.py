"""Baselines that make a model smaller: what goes, what is left of the model, and that the share that is gone is the one said."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.small_runs import arguments, make_place
from oracle_tests.tiny_material import token_ids
from tiny_models.random_models import random_model
from torch_impl.commands import compare
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines import BASELINES, Trained, decoding, sleb
from torch_impl.experiment.baselines.decoding import decoding_cost
from torch_impl.experiment.baselines.structured import gone_share, kept_parameters
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, load_material

SMALLER = [name for name, baseline in BASELINES.items() if baseline.structured]
FAMILIES = ["llama-gqa", "mistral", "qwen2", "qwen3", "opt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("smaller"))


@pytest.fixture(scope="module")
def material(place: Path) -> Iterator[Material]:
    """Text for a random model of six blocks, which nothing may change."""
    found = load_material(settings(place))
    model = random_model("llama-gqa", num_hidden_layers=6).double().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    yield dataclasses.replace(found, model=model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"the dense model's {name} has changed"


def settings(place: Path, **changes: Any) -> Config:
    given: dict[str, Any] = {"output_dir": None, "steps": 1, "initial_rank": 8, "sparsity_ratio": 0.3, **changes}
    return parse(arguments(place, **given), data_required=True)


def run(name: str, material: Material, config: Config) -> Trained:
    return BASELINES[name].run(copy.deepcopy(material.model), material.model, material, config)


def of_family(material: Material, family: str) -> Material:
    return dataclasses.replace(material, model=random_model(family, num_hidden_layers=6).double().requires_grad_(False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SMALLER)
def test_every_family_becomes_smaller_by_the_share_asked_for(
    name: str, family: str, place: Path, material: Material
) -> None:
    """Of 6 blocks at 30 %, two are nearest; a channel of the tiny MLP is 1 %."""
    material = of_family(material, family)
    made = run(name, material, settings(place, finetune="false"))
    dense, decoder = Decoder(material.model), Decoder(made.model)
    gone = gone_share(decoder, dense)
    assert gone == pytest.approx(1 / 3 if name == "sleb" else 0.3, abs=0.02)
    left = sum(p.numel() for p in made.model.parameters())
    assert sum(p.numel() for p in material.model.parameters()) - left > 0.25 * sum(dense.prunable_weights)
    assert (made.trainable, made.optimizer_steps, made.unmerged) == (0, 0, False)
    assert perplexity(made.model, material.evaluation, 8) < 1e5
    ids = material.evaluation[:1, :5]
    cached = made.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    again = made.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("name", SMALLER)
def test_healing_trains_merged_lora_on_all_examples(name: str, place: Path, material: Material) -> None:
    heard: list[tuple[int, int, float]] = []
    config, model = settings(place), copy.deepcopy(material.model)
    made = BASELINES[name].run(model, material.model, material, config, lambda *progress: heard.append(progress))
    assert [(done, total) for done, total, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    alone = run(name, material, settings(place, finetune="false"))
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert set(made.seconds) == {"prune", "train"}
    weights = Decoder(made.model).weights
    assert made.trainable == sum(8 * sum(weight.shape) for weight in weights)
    if name != "loraprune":
        for before, after in zip(Decoder(alone.model).weights, weights, strict=True):
            assert before.shape == after.shape
            assert torch.linalg.matrix_rank(after - before) <= 8
    assert gone_share(Decoder(made.model), Decoder(material.model)) == pytest.approx(
        gone_share(Decoder(alone.model), Decoder(material.model))
    )
    again = run(name, material, config)
    for key, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[key]), "the same seed gives the same model"


@pytest.mark.parametrize("name", SMALLER)
def test_what_they_cannot_do_is_refused_before_any_work(
    name: str, place: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("it works"))
    with pytest.raises(ValueError, match=r"^there are no training examples; use --finetune false$"):
        run(name, dataclasses.replace(material, examples=[]), settings(place))
    with pytest.raises(ValueError, match=r"^sparsity_type is 2:4, and this baseline removes whole structures"):
        run(name, material, parse(arguments(place, output_dir=None, sparsity_type="2:4"), data_required=True))


def test_the_share_that_is_gone_counts_zeros_missing_blocks_and_what_was_added() -> None:
    """By hand: three blocks of 32 × 32 and 48 × 32 projections."""
    dense = random_model("llama").requires_grad_(False)
    block = 4 * 32 * 32 + 3 * 32 * 48
    assert Decoder(dense).prunable_weights == [block] * 3
    model = copy.deepcopy(dense)
    outside = sum(int(p.count_nonzero()) for name, p in model.named_parameters() if ".layers." not in name)
    assert gone_share(Decoder(model), Decoder(dense)) == 0
    assert kept_parameters(Decoder(model)) == outside + 3 * (block + 2 * 32)
    sleb.keep(Decoder(model), [0, 2])
    assert gone_share(Decoder(model), Decoder(dense)) == pytest.approx(1 / 3)
    Decoder(model).weights[0][:4] = 0
    assert gone_share(Decoder(model), Decoder(dense)) == pytest.approx(1 - (2 * block - 4 * 32) / (3 * block))
    Decoder(model).blocks[1].register_buffer("added", torch.ones(5, 6))
    assert gone_share(Decoder(model), Decoder(dense)) == pytest.approx(1 - (2 * block - 4 * 32 + 30) / (3 * block))
    assert kept_parameters(Decoder(model)) == outside + 2 * (block + 2 * 32) - 4 * 32 + 30


def test_tied_embeddings_are_counted_once() -> None:
    model = random_model("llama-gqa")
    assert kept_parameters(Decoder(model)) == sum(int(p.count_nonzero()) for p in model.parameters())


def test_smaller_models_are_decoded_as_they_are(
    place: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, packed = run("sleb", material, settings(place, finetune="false")), []
    plain = decoding.Decoding

    class Seen(plain):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, *rest: Any, **options: Any) -> None:
            packed.append(any(isinstance(module, PackedLinear) for module in model.modules()))
            super().__init__(model, *rest, **options)

    monkeypatch.setattr(decoding, "Decoding", Seen)
    for packs in (True, False):
        assert decoding_cost(made.model, material.model, tokens=2, runs=1, packs=packs).ratio > 0
    assert packed == [False, True, False, False]


# --- SLEB ---


@pytest.mark.parametrize("family", FAMILIES)
def test_sleb_s_loss_is_that_of_the_smaller_model(family: str) -> None:
    """In whatever order candidates are tried; the smaller model is one of transformers' own with fewer blocks."""
    model = random_model(family, num_hidden_layers=5).double().requires_grad_(False)
    ids = token_ids(model, 5, 11)
    loss = sleb.LossWithout(Decoder(model), ids, 2)
    orders = [(0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 3, 4), (0, 2, 4), (0, 4), (0, 1, 2, 3, 4)]
    for left in orders:
        smaller = random_model(family, num_hidden_layers=len(left)).double()
        prefix = f"{Decoder(model).family.blocks}."
        for place, index in enumerate(left):
            Decoder(smaller).blocks[place].load_state_dict(Decoder(model).blocks[index].state_dict())
        outside = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)}
        smaller.load_state_dict(outside, strict=False)
        expected = smaller(input_ids=ids, labels=ids).loss
        assert loss(left) == pytest.approx(float(expected.detach()), rel=1e-6)
        kept = copy.deepcopy(model)
        sleb.keep(Decoder(kept), left)
        torch.testing.assert_close(kept(ids).logits, smaller(ids).logits)


def test_sleb_saves_a_plain_model(place: Path, material: Material, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = run("sleb", material, settings(place, finetune="false"))
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = material.evaluation[:1]
    torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)


def test_sleb_removes_what_the_calibration_text_misses_least(place: Path, material: Material) -> None:
    made = run("sleb", material, settings(place, finetune="false"))
    loss = sleb.LossWithout(Decoder(material.model), material.calibration, 4)
    left = list(range(6))
    for _ in range(2):
        left.remove(min(left[1:-1], key=lambda j: loss(tuple(i for i in left if i != j))))
    for block, index in zip(Decoder(made.model).blocks, left, strict=True):
        assert torch.equal(block.self_attn.q_proj.weight, Decoder(material.model).blocks[index].self_attn.q_proj.weight)


def test_sleb_cannot_remove_all_blocks_but_one(place: Path, material: Material) -> None:
    said = r"^sparsity_ratio is 0.9; SLEB keeps the first and the last of 6 blocks, so use 0.67 or less$"
    with pytest.raises(ValueError, match=said):
        run("sleb", material, settings(place, finetune="false", sparsity_ratio=0.9))


# --- in a comparison ---


def test_a_comparison_shows_what_is_left_and_what_was_published(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of three blocks at 20 %, SLEB removes one."""
    text = """speed = true
    [[matrix]]
    sparsity = [0.2]
    recipes = ["none", "sleb_alone"]
    """
    (tmp_path / "some.toml").write_text(text)
    changes = {"output_dir": None, "learning_rate": None, "steps": None, "output": tmp_path / "out"}
    assert compare.main([str(tmp_path / "some.toml"), *arguments(place, **changes, eval_windows=4)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {line[0].strip("| "): dict(zip(lines[0], line, strict=True)) for line in lines[1:5]}
    assert table["no training"]["sparsity"] == "18.8 %", "a whole number of each row"
    assert table["SLEB, no training"]["sparsity"] == "33.3 %"
    assert table["SLEB, no training"]["tokens/s"].split(" (")[1].startswith(("0.", "1.", "2."))
    assert any("LoRAShear" in line for line in lines)
    outcomes = {o.labels["recipe"]: o for o in Results(tmp_path / "out").together().values()}
    model = random_model("llama-gqa")
    every = sum(int(p.count_nonzero()) for p in model.parameters())
    block = Decoder(model).prunable_weights[0]
    assert outcomes["dense"].parameters == every
    assert outcomes["sleb_alone"].parameters == every - block - 2 * 32
    assert outcomes["none"].parameters == every - round(outcomes["none"].sparsity * 3 * block)
