"""Every family: recognised by structure, calibrated exactly, pruned, trained, merged."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from oracle_tests.tiny_material import parts_for, settings, token_ids
from reference.masks.select import matrix_mask, row_mask
from tiny_models.random_models import FAMILIES, random_model
from torch_impl import losa
from torch_impl.engine import adapted_linear, calibration
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import Settings


@pytest.mark.parametrize("name", FAMILIES)
def test_stream_equals_the_model_s_own_hidden_states(name: str) -> None:
    """Block by block, in uneven batches, gives bit for bit what the whole model gives a batch at a time."""
    model = random_model(name).eval()
    ids = token_ids(model, 5, 9)
    decoder = Decoder(model)
    seen: list[torch.Tensor] = []
    blocks = decoder.blocks
    handles = [b.register_forward_hook(lambda _m, _i, out: seen.append(out)) for b in blocks]
    with torch.no_grad():
        for rows in ids.split(2):
            model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = calibration.start_stream(decoder, ids, 2)
    for index, block in enumerate(blocks):
        with torch.no_grad():
            stream.advance(block, index)
        expected = torch.cat(seen[index :: len(blocks)])
        torch.testing.assert_close(stream.hidden, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_losa_runs_and_merges_on_every_family(name: str, method: str) -> None:
    model = random_model(name)
    head = model.get_output_embeddings().weight.detach().clone()
    setup = settings(prune_method=method, sparsity_ratio=0.6)
    records = losa.run(model, token_ids(model, 6, 12), parts_for(model, 2), setup)
    decoder = Decoder(model)
    assert len(decoder.blocks) == len(records[0].ranks)
    assert [sum(r.ranks) for r in records] == [3 * len(r.ranks) for r in records[:1]] + [4 * len(records[0].ranks)]
    ids = token_ids(model, 2, 12, seed=9)
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        masks = adapted_linear.merge_adapters(decoder)
        merged = model(input_ids=ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    assert len(masks) == len(decoder.family.projections) * len(records[0].ranks)
    choose = row_mask if method == "wanda" else matrix_mask
    for name, mask in masks.items():
        assert torch.equal(model.get_submodule(name).weight == 0, ~mask), name
        block = int(name.removeprefix(f"{decoder.family.blocks}.").split(".")[0])
        expected = choose(np.zeros(mask.shape), records[-1].sparsity[block])
        assert int(mask.sum()) == expected.sum(), f"{name}: as many as the block's rate says"
    torch.testing.assert_close(model.get_output_embeddings().weight, head, rtol=0, atol=0)


def test_masks_nest_and_rates_follow_the_schedule() -> None:
    model = random_model("llama-gqa")
    setup = settings(steps=4, sparsity_ratio=0.7)
    kept: list[list[torch.Tensor]] = []
    records = losa.run(
        model,
        token_ids(model, 6, 12),
        parts_for(model, 4),
        setup,
        on_step=lambda _: kept.append([layer.mask.clone() for layer in adapted_linear.adapters(model)]),
    )
    for earlier, later in itertools.pairwise(kept):
        assert all(not (new & ~old).any() for old, new in zip(earlier, later, strict=True))
    for before, after in itertools.pairwise(records):
        assert all(a >= b - 1e-12 for b, a in zip(before.sparsity, after.sparsity, strict=True))
    weights = Decoder(model).prunable_weights
    for record in records:
        mean = sum(w * s for w, s in zip(weights, record.sparsity, strict=True)) / sum(weights)
        assert mean == pytest.approx(record.target, abs=1e-9)
    assert len(set(records[-1].sparsity)) > 1, "RMI gave every block the same rate"


@pytest.mark.parametrize("kind", ["2:4", "mixed-2:4", "2:8", "mixed-2:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold_in_every_group(kind: str, method: str) -> None:
    model = random_model("llama")
    setup = settings(sparsity_type=kind, prune_method=method, steps=3)
    records = losa.run(model, token_ids(model, 6, 12), parts_for(model, 3), setup)
    n, m = setup.prune.group or (0, 0)
    decoder = Decoder(model)
    total = 0
    for index, block in enumerate(decoder.blocks):
        expected = round((1 - records[-1].sparsity[index]) * m)
        total += expected
        for layer in adapted_linear.block_adapters(block, decoder.family).values():
            groups = layer.mask.unflatten(1, (-1, m)).sum(-1)
            assert (groups == expected).all()
        assert abs(expected - n) <= (1 if kind.startswith("mixed") else 0)
    assert total == n * len(records[-1].ranks)


def test_ablations_are_what_they_say() -> None:
    model = random_model("llama")
    ids, parts = token_ids(model, 6, 12), parts_for(model, 2)
    uniform = losa.run(
        copy.deepcopy(model), ids, parts, settings(layer_sparsity="uniform", adapter={"rank_allocation": "uniform"})
    )
    assert all(len(set(record.sparsity)) == 1 and len(set(record.ranks)) == 1 for record in uniform)
    assert uniform[0].importance == []
    plain_model = copy.deepcopy(model)
    plain = losa.run(plain_model, ids, [], settings(training={"finetune": False}))
    assert all(record.losses == [] and record.ranks == [] for record in plain)
    assert all(layer.rank == 0 for layer in adapted_linear.adapters(plain_model))
    one = losa.run(copy.deepcopy(model), ids, parts[:1], settings(steps=1))
    assert len(one) == 1
    assert one[0].target == pytest.approx(0.7)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        model = random_model("llama-gqa")
        base = settings()
        setup = Settings(base.prune, base.adapter, base.calibration, base.training, seed=seed)
        losa.run(model, token_ids(model, 6, 12), parts_for(model, 2), setup)
        return [layer.merged() for layer in adapted_linear.adapters(model)]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_pruned_checkpoint_is_taken_up_where_it_is() -> None:
    model = random_model("llama")
    ids = token_ids(model, 6, 12)
    losa.run(model, ids, [], settings(steps=1, sparsity_ratio=0.5, training={"finetune": False}))
    masks = adapted_linear.merge_adapters(Decoder(model))
    records = losa.run(model, ids, parts_for(model, 2), settings(sparsity_ratio=0.7))
    assert records[0].target > 0.5
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, adapted_linear.AdaptedLinear)
        assert not (layer.mask & ~mask).any()


def test_a_model_sparser_than_asked_is_refused() -> None:
    model = random_model("llama")
    ids = token_ids(model, 6, 12)
    losa.run(model, ids, [], settings(steps=1, sparsity_ratio=0.6, training={"finetune": False}))
    adapted_linear.merge_adapters(Decoder(model))
    with pytest.raises(ValueError, match=r"sparsity_ratio is 0\.4; allowed: .* own sparsity"):
        losa.run(model, ids, [], settings(sparsity_ratio=0.4, training={"finetune": False}))


def test_unknown_structures_are_named() -> None:
    with pytest.raises(ValueError, match="match no known family"):
        Decoder(nn.Sequential(nn.Linear(2, 2)))


class Wrapped(nn.Module):
    """A linear inside another module, as peft makes one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = linear, nn.Linear(linear.in_features, 2)
        self.in_features, self.weight = linear.in_features, linear.weight


def test_a_wrapped_projection_belongs_to_the_family_and_is_not_pruned() -> None:
    model = random_model("llama")
    mlp = model.model.layers[2].mlp
    mlp.up_proj = Wrapped(mlp.up_proj)
    assert Decoder(model).projections(2)["mlp.up_proj"] is mlp.up_proj
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.mlp\.up_proj is a oracle_tests.Wrapped; give a plain model: merge"
    ):
        losa.run(model, token_ids(model, 6, 12), [], settings(steps=1, training={"finetune": False}))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_block_is_looked_at(index: int) -> None:
    """A mixture of experts whose first blocks are dense; experts are linears or one parameter of three dimensions."""
    model = random_model("llama")
    model.model.layers[index].mlp.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=rf"match no known family: model\.layers\.{index} holds mlp\.extra;"):
        Decoder(model)
    model = random_model("opt")
    model.model.decoder.layers[index].experts = nn.ParameterList([nn.Parameter(torch.ones(2, 2, 2))])
    with pytest.raises(ValueError, match=rf"model\.decoder\.layers\.{index} holds experts;"):
        Decoder(model)
    model = random_model("llama")
    model.model.layers[index].mlp = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"})
    lacking = r"lacks mlp\.down_proj, mlp\.gate_proj, mlp\.up_proj"
    with pytest.raises(ValueError, match=rf"{index} holds mlp\.a, mlp\.b, mlp\.c and 1 more, and {lacking};"):
        Decoder(model)


def test_two_blocks_are_too_few_for_rmi() -> None:
    model = random_model("llama", num_hidden_layers=2)
    ids = token_ids(model, 6, 12)
    with pytest.raises(ValueError, match="3 or more"):
        losa.run(model, ids, parts_for(model, 2), settings())
    losa.run(model, ids, parts_for(model, 2), settings(layer_sparsity="uniform"))


def test_weights_that_are_not_finite_are_named() -> None:
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        losa.run(model, token_ids(model, 6, 12), parts_for(model, 2), settings())
