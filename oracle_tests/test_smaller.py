"""Baselines that make a model smaller: what goes, what is left of the model, and that the share that is gone is the one said."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from oracle_tests.small_runs import arguments, make_place
from oracle_tests.tiny_material import token_ids
from tiny_models.random_models import random_model
from torch_impl.commands import compare
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.adapted_linear import adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines import BASELINES, Trained, decoding, loraprune, sleb, sliced_block, structured
from torch_impl.experiment.baselines.decoding import decoding_cost
from torch_impl.experiment.baselines.structured import gone_share, kept_parameters
from torch_impl.experiment.comparison import cells
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, load_material

SMALLER = [name for name, baseline in BASELINES.items() if baseline.structured]
"""LoRAPrune prunes while it trains."""
ALONE = [name for name in SMALLER if name != "loraprune"]
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
    """Of 6 blocks at 30 %, two are nearest, and of 32 axes 16; a channel of the tiny MLP is 1 %."""
    material = of_family(material, family)
    trains = name == "loraprune"
    made = run(name, material, settings(place, finetune=trains))
    dense, decoder = Decoder(material.model), Decoder(made.model)
    gone = gone_share(decoder, dense)
    nearest = {"sleb": 1 / 3, "slicegpt": 1 - (16 / 32 + 2 * 16 * 16 / dense.prunable_weights[0])}
    assert gone == pytest.approx(nearest.get(name, 0.3), abs=0.02 if name not in nearest else 1e-9)
    left = sum(p.numel() for p in made.model.parameters())
    assert sum(p.numel() for p in material.model.parameters()) - left > 0.25 * sum(dense.prunable_weights)
    assert (made.trainable > 0, made.optimizer_steps) == (trains, 3 if trains else 0)
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
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert set(made.seconds) == {"prune", "train"}
    again = run(name, material, config)
    for key, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[key]), "the same seed gives the same model"
    weights = Decoder(made.model).weights
    trained = Decoder(material.model).weights if name == "loraprune" else weights
    assert made.trainable == sum(8 * sum(weight.shape) for weight in trained)
    if name == "loraprune":
        return
    alone = run(name, material, settings(place, finetune="false"))
    for before, after in zip(Decoder(alone.model).weights, weights, strict=True):
        assert before.shape == after.shape
        assert 0 < torch.linalg.matrix_rank(after - before) <= 8
    gone = [gone_share(Decoder(found.model), Decoder(material.model)) for found in (made, alone)]
    assert gone[0] == pytest.approx(gone[1])


def test_the_adapters_that_heal_start_by_the_seed(place: Path, material: Material) -> None:
    """Their rank is the mean over the run's steps: 6, 7 and 8."""
    starts = []
    for seed in (0, 0, 1):
        decoder = Decoder(copy.deepcopy(material.model))
        structured.attach_lora(decoder, settings(place, seed=seed, steps=3, initial_rank=6, step_shares=None))
        starts.append([layer.A.detach().clone() for layer in adapters(decoder.model)])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    assert len({float(A[0, 0]) for A in starts[0]}) == len(starts[0])
    assert {len(A) for A in starts[0]} == {7}


@pytest.mark.parametrize("name", SMALLER)
def test_what_they_cannot_do_is_refused_before_any_work(
    name: str, place: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("it works"))
    with pytest.raises(ValueError, match=r"^there are no training examples; use --finetune false$"):
        run(name, dataclasses.replace(material, examples=[]), settings(place))
    with pytest.raises(ValueError, match=r"^sparsity_type is 2:4, and this baseline removes whole structures"):
        run(name, material, parse(arguments(place, output_dir=None, sparsity_type="2:4"), data_required=True))
    with pytest.raises(
        ValueError, match=r"^dense_blocks is \[1, 0\], and this baseline chooses by itself what stays; leave it out$"
    ):
        run(name, material, settings(place, dense_blocks="1 0"))
    with pytest.raises(ValueError, match=r"^reconstruct_epochs is 2, and this baseline reconstructs nothing; use"):
        run(name, material, settings(place, reconstruct_epochs=2))


@pytest.mark.parametrize("name", ["flap", "llm_pruner", "loraprune"])
def test_a_norm_over_all_heads_is_refused_before_any_work(name: str, place: Path, material: Material) -> None:
    """OLMo 2 normalises all queries together, so one head less changes the others."""
    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    model = Olmo2ForCausalLM(config).requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"self_attn\.q_norm is a Olmo2RMSNorm over all heads or channels, so none can be removed alone; use SLEB",
    ):
        run(name, dataclasses.replace(material, model=model), settings(place))


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
    # One more than the sequences whose logits are computed at once.
    ids = token_ids(model, sleb.AT_ONCE + 1, 11)
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
    made = run("sleb", material, settings(place, finetune="false"))
    made.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = material.evaluation[:1]
    torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)


def test_sleb_s_model_is_loaded_as_it_was_saved_where_blocks_differ(tmp_path: Path) -> None:
    """Of SmolLM3, every fourth block has no rotary positions, wherever it is after others have gone."""
    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=None,
    )  # fmt: skip
    model = SmolLM3ForCausalLM(config).double().eval().requires_grad_(False)
    sleb.keep(Decoder(model), [0, 2, 3, 4])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = token_ids(model, 2, 7)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_sleb_removes_what_the_calibration_text_misses_least(place: Path, material: Material) -> None:
    made = run("sleb", material, settings(place, finetune="false"))
    loss = sleb.LossWithout(Decoder(material.model), material.calibration, 4)
    left = list(range(6))
    for _ in range(2):
        left.remove(min(left[1:-1], key=lambda j: loss(tuple(i for i in left if i != j))))
    for block, index in zip(Decoder(made.model).blocks, left, strict=True):
        assert torch.equal(block.self_attn.q_proj.weight, Decoder(material.model).blocks[index].self_attn.q_proj.weight)


def test_the_blocks_that_sleb_leaves_keep_their_kind_of_attention() -> None:
    model = random_model("qwen2", num_hidden_layers=4)
    model.config.layer_types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sleb.keep(Decoder(model), [0, 2, 3])
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_sleb_cannot_remove_all_blocks_but_one(place: Path, material: Material) -> None:
    said = r"^sparsity_ratio is 0.9; SLEB keeps the first and the last of 6 blocks, so use 0.67 or less$"
    with pytest.raises(ValueError, match=said):
        run("sleb", material, settings(place, finetune="false", sparsity_ratio=0.9))


# --- SliceGPT ---


@pytest.mark.parametrize("family", FAMILIES)
def test_slicegpt_s_rotation_alone_leaves_the_model_unchanged(
    family: str, place: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All axes kept, in other directions before each norm; also of a head with a bias."""
    monkeypatch.setattr("torch_impl.slicegpt.kept_axes", lambda sparsity, width, weights: width)
    material = of_family(material, family)
    head = material.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features).double(), requires_grad=False)
    made, ids = run("slicegpt", material, settings(place, finetune="false")), material.evaluation[:2]
    turned = [block.attention_shortcut for block in Decoder(made.model).blocks]
    assert all(float((turn - torch.eye(32)).abs().max()) > 0.1 for turn in turned)
    expected = material.model(ids).logits
    torch.testing.assert_close(made.model(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_slicegpt_unties_embeddings_and_head(place: Path, material: Material) -> None:
    """They are along different axes: to tie them again, as transformers may, must change nothing."""
    model = random_model("llama-gqa", num_hidden_layers=3, tie_word_embeddings=True).double().requires_grad_(False)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    made = run("slicegpt", dataclasses.replace(material, model=model), settings(place, finetune="false")).model
    ids = token_ids(model, 2, 6)
    before = made(ids).logits
    made.tie_weights()
    assert torch.equal(made(ids).logits, before)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_slicegpt_s_model_is_the_dense_one_on_states_along_the_axes(
    family: str, place: Path, material: Material
) -> None:
    """The dense model, its residual stream projected before every norm onto the sliced one's axes, found again from its weights."""
    material = of_family(material, family)
    made, ids = run("slicegpt", material, settings(place, finetune="false")), material.evaluation[:2]
    dense, mean = Decoder(copy.deepcopy(material.model)), torch.eye(32, dtype=torch.float64)
    if family == "opt":
        mean -= 1 / 32
    kept = Decoder(made.model).blocks[0].attention_shortcut.shape[0]
    assert kept == 16
    axes = principal(dense, material, kept, mean)
    expected = projected(dense, ids, axes, mean)
    torch.testing.assert_close(made.model(ids).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def norms_of(decoder: Decoder) -> list[torch.nn.Module]:
    """The norms that read the residual stream, in order."""
    names = sliced_block.NORMS[decoder.family.name]
    inside = [block.get_submodule(name) for block in decoder.blocks for name in names[:2]]
    return [*inside, decoder.model.get_submodule(names[2])]


def projected(decoder: Decoder, ids: torch.Tensor, axes: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor:
    """Logits with P_j = M Q_j Q_jᵀ on all that is in the residual stream when norm j reads it.

    What norm j reads is x_j = (… ((x_0 P_0 + a_1) P_1 + a_2) …) P_j, a_i what attention and MLP add. The hooks keep that stream.
    """
    stream: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    turns = iter(axes)

    def before(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        Q, shape = next(turns), inputs[0].shape
        x = stream.pop() + added.pop() if stream else inputs[0].reshape(-1, 32)
        stream.append(x @ mean @ Q @ Q.T)
        return (stream[0].reshape(shape),)

    def after(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        added.append(output.reshape(-1, 32))

    handles = [norm.register_forward_pre_hook(before) for norm in norms_of(decoder)]
    for index in range(len(decoder.blocks)):
        projections = decoder.projections(index)
        for name in (decoder.family.inputs[1][0], decoder.family.inputs[3][0]):
            handles.append(projections[name].register_forward_hook(after))
    found = decoder.model(ids).logits
    for handle in handles:
        handle.remove()
    return found


def principal(decoder: Decoder, material: Material, kept: int, mean: torch.Tensor) -> list[torch.Tensor]:
    """The principal axes of the stream before each norm, one norm after the other, those before it projected already."""
    axes: list[torch.Tensor] = []
    norms = norms_of(decoder)
    for place, norm in enumerate(norms):
        seen: list[torch.Tensor] = []
        plain = norm.forward
        norm.forward = lambda x, seen=seen, plain=plain: (seen.append(x.reshape(-1, 32)), plain(x))[1]
        whole = [torch.eye(32, dtype=torch.float64)] * (len(norms) - place)
        projected(decoder, material.calibration, [*axes, *whole], mean)
        norm.forward = plain
        axes.append(torch.linalg.svd(seen[0], full_matrices=False)[2].T[:, :kept])
    return axes


# --- in a comparison ---


def test_a_comparison_shows_what_is_left_and_what_was_published(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of three blocks at 20 %, SLEB removes one."""
    text = """speed = true
    [[matrix]]
    sparsity = [0.2]
    recipes = ["none", "sleb_alone", "structured_alone"]
    """
    (tmp_path / "some.toml").write_text(text)
    changes = {"output_dir": None, "learning_rate": None, "steps": None, "output": tmp_path / "out"}
    assert compare.main([str(tmp_path / "some.toml"), *arguments(place, **changes, eval_windows=4)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {line[0].strip("| "): dict(zip(lines[0], line, strict=True)) for line in lines[1:6]}
    assert table["no training"]["sparsity"] == "18.8 %", "a whole number of each row"
    assert table["SLEB, no training"]["sparsity"] == "33.3 %"
    assert table["SLEB, no training"]["tokens/s"].split(" (")[1].startswith(("0.", "1.", "2."))
    assert table["Wanda-SP, no training"]["sparsity"] == "20.0 %", "16 of 48 channels, as heads are halves"
    assert any("LoRAShear" in line for line in lines)
    outcomes = {o.labels["recipe"]: o for o in Results(tmp_path / "out").together().values()}
    model = random_model("llama-gqa")
    every = sum(int(p.count_nonzero()) for p in model.parameters())
    block = Decoder(model).prunable_weights[0]
    assert outcomes["dense"].parameters == every
    assert outcomes["sleb_alone"].parameters == every - block - 2 * 32
    assert outcomes["none"].parameters == every - round(outcomes["none"].sparsity * 3 * block)


def test_loraprune_needs_training(place: Path, material: Material) -> None:
    with pytest.raises(ValueError, match=r"^LoRAPrune prunes while it trains; leave out --finetune false$"):
        run("loraprune", material, settings(place, finetune="false"))


def test_loraprune_scores_where_the_gradients_were_taken(
    place: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B starts at 0. At the first step it is still there, and its gradient, clipped, too."""
    norms: list[tuple[float, float]] = []
    plain = loraprune.Pruner.before

    @torch.no_grad()
    def before(self: loraprune.Pruner, step: int) -> None:
        layers = adapters(self._decoder.model)
        gradients = torch.cat(
            [layer.A.grad.flatten() for layer in layers] + [layer.B.grad.flatten() for layer in layers]
        )
        norms.append((sum(float(layer.B.norm()) for layer in layers), float(gradients.norm())))
        plain(self, step)

    monkeypatch.setattr(loraprune.Pruner, "before", before)
    run("loraprune", material, settings(place, max_grad_norm=1e-3))
    assert norms[0] == (0, pytest.approx(1e-3, rel=1e-2))
    assert all(moved > 0 for moved, _ in norms[1:])
    assert len(norms) > 1


def test_a_recipe_may_be_structured_at_shares_alone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(matrix: str) -> str:
        (tmp_path / "some.toml").write_text(matrix)
        changes = {"output_dir": None, "learning_rate": None, "steps": None, "output": tmp_path / "out"}
        assert compare.main([str(tmp_path / "some.toml"), *arguments(place, **changes), "--dry_run"]) == 2
        return capsys.readouterr().err

    both = '[[matrix]]\nsparsity = [0.2, "2:4"]\nrecipes = ["structured_alone"]\n'
    assert "recipe 'structured_alone' removes whole structures, and sparsity is 2:4; give it shares" in said(both)
    own = both + '[recipes.mine]\noptions = { sparsity_type = "2:4" }\n'
    assert "recipe 'mine': sparsity_type is '2:4'; allowed: structured; else use sparsity" in said(own)


def test_losa_s_smaller_models_are_decoded_smaller(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zeros of a masked model are no measure of what a smaller one takes."""
    seen: list[tuple[bool, int]] = []

    def cost(model: Any, dense: Any, packs: bool) -> decoding.DecodingCost:
        seen.append((packs, sum(p.numel() for p in model.parameters())))
        return decoding.DecodingCost(1.0, 1.0)

    monkeypatch.setattr(cells, "decoding_cost", cost)
    (tmp_path / "some.toml").write_text(
        'speed = true\n[[matrix]]\nsparsity = [0.2]\nrecipes = ["structured_alone", "none"]\n'
    )
    changes = {"output_dir": None, "learning_rate": None, "steps": None, "output": tmp_path / "out"}
    assert compare.main([str(tmp_path / "some.toml"), *arguments(place, **changes, eval_windows=4)]) == 0
    whole = sum(p.numel() for p in random_model("llama-gqa").parameters())
    assert seen == [(False, whole - 3 * 16 * 96), (True, whole)]
