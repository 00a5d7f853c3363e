"""Structured pruning in production: runs, smaller models that compute the same, and what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_impl
from oracle_tests.coupled_lines import scores_by_autograd
from oracle_tests.small_runs import arguments, fails, make_place
from tiny_models.random_models import FAMILIES, random_model
from torch_impl import losa
from torch_impl.bench import measure
from torch_impl.engine import adapted_linear
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig
from torch_impl.engine.smaller import find_structures, make_smaller
from torch_impl.engine.structure import check_structure
from torch_impl.engine.structures import remove_structures
from torch_impl.experiment import footprint
from torch_impl.experiment.baselines.decoding import DecodingCost
from torch_impl.experiment.comparison import cells, recipes
from torch_impl.experiment.config import parse
from torch_impl.masks.prune import METHODS
from torch_impl.run import main

IDS = torch.arange(60).view(4, 15) % 250
GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
written = model.generate(input_ids=torch.arange(5)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(not any(name.startswith("torch_impl") for name in sys.modules), written.shape[1], model.config.intermediate_size)
"""


def structured(ratio: float = 0.4, **changes: Any) -> Settings:
    options = {
        "sparsity_type": "structured",
        "sparsity_ratio": ratio,
        "steps": 2,
        "layer_sparsity": "uniform",
        **changes,
    }
    return Settings(PruneConfig(**options), training=TrainingConfig(learning_rate=1e-2, loss="kl"))


def remove(model: Any, heads: int, channels: int, unequal: bool = False) -> None:
    """Zero the columns that read some structures of every block: other ones in each, and, if unequal, one channel more."""
    decoder = Decoder(model)
    for index, block in enumerate(decoder.blocks):
        weights, count = decoder.family.weights_of(block), decoder.family.key_value_heads(block)
        reads = weights[decoder.family.reads_heads].data.unflatten(1, (count, -1))
        for head in range(min(heads, count - 1)):
            reads[:, (head + index) % count] = 0
        gone = torch.randperm(48, generator=torch.Generator().manual_seed(index))[: channels + unequal * index]
        weights[decoder.family.reads_channels].data[:, gone] = 0


def shapes_of(model: PreTrainedModel) -> set[tuple[int, int]]:
    """(key-value heads, channels) of the blocks."""
    decoder = Decoder(model)
    channels = decoder.family.reads_channels
    return {
        (decoder.family.key_value_heads(b), decoder.family.weights_of(b)[channels].shape[1]) for b in decoder.blocks
    }


# --- the smaller model ---


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smaller_model_computes_the_same(family: str, unequal: bool, tmp_path: Path) -> None:
    """Loaded by transformers alone. If blocks differ, it has the size of the largest; OPT keeps its heads."""
    model = random_model(family, dtype=torch.float64)
    model.get_output_embeddings().weight.requires_grad_(False)
    model.generation_config.eos_token_id, model.config.name_or_path = 77, "org/name"
    remove(model, 1, 8, unequal)
    found = make_smaller(model)
    heads = {"llama": 3, "llama-gqa": 1, "mistral": 1, "qwen2": 1, "qwen3": 1, "opt": 4}[family]
    assert shapes_of(found.model) == {(heads, 40)}
    note = "OPTConfig has no place for fewer heads" if family == "opt" else "blocks keep different numbers" * unequal
    assert note in found.note
    assert bool(note) == bool(found.note)
    assert (found.model.generation_config.eos_token_id, found.model.config.name_or_path) == (77, "org/name")
    assert not found.model.training
    assert not found.model.get_output_embeddings().weight.requires_grad
    assert Decoder(found.model).weights[0].requires_grad
    found.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float64
    assert type(again).__name__ == ("MistralForCausalLM" if family == "llama" else type(model).__name__)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_heads_that_one_block_keeps_stay_in_all() -> None:
    model = random_model("qwen2")
    whole = model.model.layers[1].self_attn.o_proj.weight.detach().clone()
    remove(model, 1, 8)
    model.model.layers[1].self_attn.o_proj.weight.data.copy_(whole)
    found = make_smaller(model)
    assert shapes_of(found.model) == {(2, 40)}
    assert "blocks keep different numbers" in found.note


def test_nothing_to_leave_out() -> None:
    model = random_model("llama")
    found = make_smaller(model)
    assert found.note == ""
    assert shapes_of(found.model) == {(4, 48)}


def test_masks_are_cut_as_weights_are() -> None:
    model = random_model("qwen2")
    remove(model, 1, 8)
    decoder, found = Decoder(model), make_smaller(model)
    names = [decoder.full_name(i, name) for i in range(3) for name in decoder.family.projections]
    masks = found.cut({name: torch.rand(model.get_submodule(name).weight.shape) < 0.5 for name in names})
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: found.model.get_submodule(name).weight.shape for name in names
    }
    assert all(mask.dtype == torch.bool for mask in masks.values())


# --- runs ---


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_whole_structures_go_step_by_step_and_adapters_merge_into_what_is_left(family: str) -> None:
    model = random_model(family)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    kept: list[list[torch.Tensor]] = []
    records = losa.run(
        model, IDS, [rows[:2], rows[2:]], structured(),
        on_step=lambda _: kept.append([layer.mask.clone() for layer in adapted_linear.adapters(model)]),
    )  # fmt: skip
    assert all(not (after & ~before).any() for before, after in zip(*kept, strict=True))
    assert all(layer.rank and layer.B.any() for layer in adapted_linear.adapters(model)), "trained"
    before = model(IDS).logits
    masks = adapted_linear.merge_adapters(decoder := Decoder(model))
    found = find_structures(decoder)
    for index, block in enumerate(decoder.blocks):
        for name in decoder.family.projections:
            reader, axis = decoder.family.coupled(name)
            mask = masks[decoder.full_name(index, name)]
            lines = mask.all(1 - axis)
            assert torch.equal(mask, lines[:, None].expand_as(mask) if axis == 0 else lines.expand_as(mask)), name
            assert torch.equal(lines.view(len(found[index][reader]), -1).all(1), found[index][reader]), name
            assert torch.equal(block.get_submodule(name).weight == 0, ~mask), name
    # Half a multiple of eight channels of the weights of a block.
    assert all(abs(share - 0.4) < 4 / 48 for share in records[-1].realised)
    smaller = make_smaller(model)
    torch.testing.assert_close(smaller.model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert len(shapes_of(smaller.model)) == 1
    assert bool(smaller.note) == (family == "opt")


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_removes_what_the_loss_depends_on_least(family: str) -> None:
    """Against gradients by transformers and autograd alone, summed over all weights that go with a head or channel."""
    model = random_model(family, dtype=torch.float64)
    decoder = Decoder(model)
    expected = scores_by_autograd(decoder, IDS)
    options = {"sparsity_type": "structured", "steps": 1, "layer_sparsity": "uniform", "method": "taylor"}
    torch_impl.prune(model, calibration=IDS, sparsity=0.5, **options)
    for found, scores in zip(find_structures(decoder), expected, strict=True):
        for name, score in scores.items():
            gone = int((~found[name]).sum())
            assert gone or len(score) == 1, "of one head, none can go"
            assert set((~found[name]).nonzero().flatten().tolist()) == set(score.argsort()[:gone].tolist())


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_dense_blocks_stay_and_the_others_make_up_for_them(pattern: str, family: str) -> None:
    model = random_model(family, num_hidden_layers=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"sparsity_type": pattern, "layer_sparsity": "uniform", "dense_blocks": (1, 2), "channel_multiple": 1}
    result = torch_impl.prune(model, calibration=IDS, sparsity=0.3, steps=2, **options)
    decoder = Decoder(model)
    shares = [
        float(torch.cat([w.flatten() for w in decoder.family.weights_of(b).values()]).eq(0).float().mean())
        for b in decoder.blocks
    ]
    assert shares[1:3] == pytest.approx([0.75, 0.75], abs=0.01)
    assert result.sparsity == pytest.approx(0.3, abs=0.005)
    for index in (0, 3, 4):
        for name, weight in decoder.family.weights_of(decoder.blocks[index]).items():
            assert torch.equal(weight, before[f"{decoder.full_name(index, name)}.weight"]), name


def test_what_is_left_of_the_weights_under_adapters_stays_as_it_is() -> None:
    """The adapters count in the scores, and are not added to the weights."""
    model = random_model("llama-gqa")
    decoder = Decoder(model)
    adapted_linear.attach_adapters(decoder, 1.0)
    layers = adapted_linear.adapters(decoder.blocks[0])
    for number, layer in enumerate(layers):
        layer.resize(2, (number,))
        torch.nn.init.ones_(layer.B)
    before = [layer.weight.clone() for layer in layers]
    remove_structures(decoder.blocks[0], decoder.family, METHODS["magnitude"], {}, 0.5, 1, last=True)
    for layer, old in zip(layers, before, strict=True):
        assert layer.weight.count_nonzero() < old.count_nonzero()
        assert torch.equal(layer.weight, old * (layer.weight != 0))


def test_what_is_gone_counts_before_what_is_never_used() -> None:
    """Both have score 0, and the one that is used never has the lower index."""
    model = random_model("llama")
    decoder = Decoder(model)
    model.model.layers[0].mlp.down_proj.weight.data[:, 5] = 0
    adapted_linear.attach_adapters(decoder, 1.0)
    norms = {"self_attn.o_proj": torch.ones(32), "mlp.down_proj": torch.arange(48.0)}
    # One channel of 96 of the block's 4 · 1024 + 48 · 96 weights.
    remove_structures(decoder.blocks[0], decoder.family, METHODS["wanda"], norms, 96 / 8704, 1, last=True)
    kept = find_structures(decoder)[0]
    assert kept["self_attn.o_proj"].all()
    assert (~kept["mlp.down_proj"]).nonzero().flatten().tolist() == [5]
    assert not decoder.projections(0)["mlp.up_proj"].weight[5].any()


def test_a_run_saves_a_smaller_model_that_transformers_generates_with(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = make_place(tmp_path)
    options = {"sparsity_type": "structured", "sparsity_ratio": 0.5, "preset": "paper"}
    assert main(arguments(place, **options)) == 0
    printed = capsys.readouterr().out
    assert "The saved model is a plain, smaller one: " in printed
    assert "losa pack" not in printed
    result = json.loads((place / "out/losa_result.json").read_text())
    assert result["rates"] == "uniform", "nobody asked for others"
    dense, saved = result["footprints"]["dense"], result["footprints"]["saved"]
    again = AutoModelForCausalLM.from_pretrained(place / "out/model")
    assert shapes_of(again) == {(1, 24)}
    # A head of (2·2·8 + 2·8)·32 = 1536 weights, 24 channels of 96; embedding and norms stay.
    assert dense["parameters"] - saved["parameters"] == 3 * (1536 + 24 * 96)
    assert saved["parameters"] == sum(p.numel() for p in again.parameters())
    assert (dense["operations"], saved["operations"]) == (2 * (3 * 7680 + 257 * 32), 2 * (3 * 3840 + 257 * 32))
    assert (dense["bytes"], saved["bytes"]) == (4 * dense["parameters"], 4 * saved["parameters"])
    assert (dense["cache_bytes"], saved["cache_bytes"]) == (4 * 3 * 2 * 16, 4 * 3 * 2 * 8)
    assert dense["peak_bytes"] is saved["peak_bytes"] is None, "a CPU does not count it"
    assert all(side[f"{what}tokens_per_second"] > 0 for side in (dense, saved) for what in ("", "prompt_"))
    assert result["losa"]["sparsity"] == pytest.approx(0.5)
    assert (result["dense"]["bytes"], result["losa"]["bytes"]) == (dense["bytes"], saved["bytes"])
    assert result["losa"]["packed_bytes"] <= saved["bytes"]
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(place / "out/model")], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.split() == ["True", "9", "24"]


def test_a_run_with_dense_blocks_saves_zeros_and_says_how_to_pack_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = make_place(tmp_path)
    assert main(arguments(place, sparsity_type="structured", dense_blocks="1 0", sparsity_ratio=0.3)) == 0
    printed = capsys.readouterr().out
    assert "as large and as fast as the dense one. Blocks keep different numbers" in printed
    assert "losa pack" in printed
    assert shapes_of(AutoModelForCausalLM.from_pretrained(place / "out/model")) == {(2, 48)}


@pytest.mark.parametrize("peaks", [(5_064, 5_032), (5_032, 5_064)])
def test_the_memory_of_a_model_is_its_own_and_what_it_allocates(
    peaks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, whose counters are pretended here: 5,000 bytes there before, 64 more at the peak, per part; the larger counts."""
    counted = iter(peaks)
    monkeypatch.setattr(measure, "once", lambda action, _: (0.0, (next(counted) - 5_000) / measure.GIB, action()))
    monkeypatch.setattr(
        footprint, "peak_of", lambda model, action, _: measure.peak_of(model, action, torch.device("cuda"))
    )
    model = random_model("llama-gqa")
    found = footprint.footprint(model, IDS)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert found.peak_bytes == found.bytes + buffers + 64


def test_a_prompt_s_tokens_are_counted_in_its_fastest_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve tokens in 1 s to warm up, which does not count, then in 4, 2 and 3 s."""
    looks = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0, 30.0, 33.0])
    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    assert footprint._reading(random_model("llama-gqa"), IDS[:1, :12]) == 6


def test_comparisons_time_blocks_without_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks differ, which a configuration cannot say; the model itself keeps its zeros."""
    model, dense = random_model("llama-gqa"), random_model("llama-gqa")
    remove(model, 1, 8, unequal=True)
    timed = []
    monkeypatch.setattr(cells, "decoding_cost", lambda m, d, packs: timed.append(m) or DecodingCost(1.0, 2.0, 30, 20))
    words = ["--sparsity_type", "structured"]
    cell: Any = SimpleNamespace(measures=SimpleNamespace(speed=True), final=True, smaller=True, config=parse(words))
    found = cells._decoding(cell, model, dense)
    assert found == ({"packed": 2.0, "dense": 1.0}, {"decode": 20, "decode dense": 30})
    assert shapes_of(timed[0]) == {(1, 40), (1, 39), (1, 38)}
    assert shapes_of(model) == {(2, 48)}
    torch.testing.assert_close(timed[0](IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_bytes_are_those_of_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two each in bfloat16; a token's keys and values are 2 · 16 in each of three blocks."""
    monkeypatch.setattr(footprint, "_decoding", lambda _: None)
    monkeypatch.setattr(footprint, "_reading", lambda *_: None)
    model = random_model("llama-gqa", dtype=torch.bfloat16)
    found = footprint.footprint(model, torch.zeros(1, 4, dtype=torch.long))
    assert found.bytes == 2 * found.parameters
    assert found.cache_bytes == 2 * 3 * 2 * 16


@pytest.mark.parametrize(("positions", "tokens"), [(30, 30 - footprint.WARM_UP - 1), (2048, footprint.DECODED)])
def test_decoding_is_timed_within_learned_positions(
    positions: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    class Timed:
        def __init__(self, model: Any, batch: int, graph: bool, longest: int) -> None:
            self.longest = longest

        def tokens_per_second(self, length: int, *_: Any) -> float:
            asked.append((length, self.longest))
            return 1.0

    monkeypatch.setattr(footprint, "Decoding", Timed)
    assert footprint._decoding(random_model("opt", max_position_embeddings=positions)) == 1.0
    assert asked == [(tokens, tokens + footprint.WARM_UP + 1)]


def test_a_slow_model_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is six seconds later: a first prompt of 6 s, a second, and ten seconds are over."""
    asked: list[float] = []
    decoding = SimpleNamespace(tokens_per_second=lambda tokens, runs, seconds: asked.append(seconds))
    monkeypatch.setattr(footprint, "Decoding", lambda *_, **__: decoding)
    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=itertools.count(0, 6).__next__))
    model = random_model("llama-gqa")
    found = footprint.footprint(model, IDS[:1, :12])
    assert asked == [footprint.SECONDS]
    assert found.prompt_tokens_per_second == 2.0
    assert footprint.time.perf_counter() == 4 * 6, "twice at the start and the end of a prompt"
    monkeypatch.setattr(footprint, "SECONDS", 1.0)
    assert footprint.footprint(model, IDS[:1, :12]).prompt_tokens_per_second == 2.0, "the only prompt counts"


def test_the_library_returns_the_smaller_model() -> None:
    model = random_model("llama-gqa").train()
    result = torch_impl.prune(model, calibration=IDS, sparsity=0.5, sparsity_type="structured", steps=1)
    assert shapes_of(result.model) == {(1, 24)}
    assert shapes_of(model) == {(2, 48)}, "the given model has the same zeros"
    assert result.sparsity == pytest.approx(0.5)
    assert result.model.training
    torch.testing.assert_close(result.model.eval()(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_rates_of_their_own_are_for_those_who_ask() -> None:
    words = ["--sparsity_type", "structured"]
    assert parse(words).prune.layer_sparsity == "uniform"
    assert parse([*words, "--preset", "best"]).prune.layer_sparsity == "uniform"
    assert parse([*words, "--layer_sparsity", "rmi"]).prune.layer_sparsity == "rmi"
    assert not parse([*words, "--finetune", "false", "--steps", "1"]).plain, "never offloaded"


def test_recipes_compare_what_can_be_saved_smaller() -> None:
    """A preset names rates, and as a recipe's options they would count as asked for."""
    shipped = recipes.read({}, "nowhere")
    structured = [recipe for recipe in shipped.values() if recipe.options.get("sparsity_type") == ["structured"]]
    assert len(structured) == 4
    assert all(recipe.options["layer_sparsity"] == ["uniform"] for recipe in structured)


def test_without_a_ratio_a_fifth_goes(capsys: pytest.CaptureFixture) -> None:
    """0.7 is the paper's, of single weights; its authors' figures for whole structures are of 20 %."""
    for words, expected in (
        ([], 0.7), (["--sparsity_type", "structured"], 0.2), (["--sparsity_type", "2:4"], 0.5),
        (["--sparsity_type", "structured", "--sparsity_ratio", "0.3"], 0.3),
    ):  # fmt: skip
        assert parse(words).prune.final_sparsity == expected
    assert main(["--sparsity_type", "structured", "--dry_run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sparsity after each step"))
    assert line.endswith(", 0.2]")
    result = torch_impl.prune(random_model("llama-gqa"), calibration=IDS, sparsity_type="structured", steps=1)
    assert result.sparsity == pytest.approx(0.2, abs=0.01)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune_method": "sparsegpt"}, ["prune_method is 'sparsegpt'", "use magnitude or wanda or taylor"]),
        ({"prune_method": "pruner_zero"}, ["prune_method is 'pruner_zero'"]),
        ({"channel_multiple": "64"}, ["channel_multiple is 64, and the MLP of model.layers.0 has 48 channels; use 48 or less"]),
        ({"channel_multiple": "0"}, ["channel_multiple is 0"]),
        (
            {"sparsity_ratio": "0.95"},
            ["model.layers.0 can lose only 1 of 2 key-value heads and 40 of 48 channels: use at most 0.7"],
        ),
        ({"dense_blocks": "2 1"}, ["dense_blocks is 2 1, and the model has 3 decoder blocks; leave one or more to prune"]),
        (
            {"dense_blocks": "1 1", "sparsity_ratio": "0.4"},
            ["sparsity_ratio is 0.4, and dense_blocks 1 1 leaves 33.3% of the weights to prune", "fewer dense blocks"],
        ),
        (
            {"dense_blocks": "1 0", "sparsity_ratio": "0.6"},
            ["model.layers.1 can lose only 1 of 2 key-value heads and 40 of 48 channels: use at most 0.4"],
        ),
        (
            {"offload": "on", "steps": "1", "finetune": "false", "finetune_data": None, "train_examples": None},
            ["offload is 'on' with sparsity_type structured", "--offload off"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("plan", [False, True])
def test_what_cannot_be(
    changes: dict[str, Any], words: list[str], plan: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = make_place(tmp_path)
    argv = arguments(place, sparsity_type="structured", **changes)
    fails(capsys, place, [*argv, *["--dry_run"] * plan], words)


def test_a_module_over_all_heads_is_refused() -> None:
    """OLMo 2 normalises all queries together, so one head less changes the others."""
    model = random_model("llama")
    model.model.layers[1].self_attn.register_module("q_norm", nn.LayerNorm(32))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_norm is a LayerNorm over all heads"):
        check_structure(model, structured())
    model = random_model("qwen3")
    assert check_structure(model, structured(0.2)), "norms of one head are no obstacle"
    model.model.layers[0].mlp.register_parameter("scale", nn.Parameter(torch.ones(48)))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp is a Qwen3MLP over all heads or channels"):
        check_structure(model, structured(0.2))
