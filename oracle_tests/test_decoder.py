"""The handle on a model's decoder: blocks, projections and names are those of the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tiny_models.random_models import FAMILIES, random_model
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.decoder import Decoder


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_are_the_linears_of_a_block_by_their_names_in_the_model(name: str) -> None:
    model = random_model(name)
    decoder = Decoder(model)
    linears = {place: module for place, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = next(place for place, module in linears.items() if module is model.get_output_embeddings())
    found = {
        decoder.full_name(index, projection): module
        for index in range(len(decoder.blocks))
        for projection, module in decoder.projections(index).items()
    }
    assert found.keys() == linears.keys() - {head}
    assert all(found[place] is linears[place] for place in found)
    assert [id(weight) for weight in decoder.weights] == [id(module.weight) for module in found.values()]
    assert decoder.prunable_weights == [
        sum(
            linear.weight.numel()
            for place, linear in linears.items()
            if place.startswith(f"{decoder.full_name(index)}.")
        )
        for index in range(model.config.num_hidden_layers)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_come_in_order_of_use(name: str) -> None:
    decoder = Decoder(random_model(name))
    seen: list[nn.Module] = []
    modules = decoder.projections(1)
    assert list(decoder.family.weights_of(decoder.blocks[1])) == list(modules)
    for module in modules.values():
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
    decoder.model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    assert [id(module) for module in seen] == [id(module) for module in modules.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_body_is_the_model_without_its_head(name: str) -> None:
    model = random_model(name)
    decoder = Decoder(model)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        hidden = decoder.body(input_ids=ids, use_cache=False)[0]
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(input_ids=ids).logits, rtol=0, atol=0)
    assert decoder.full_name(2) == f"{decoder.family.blocks}.2"
    assert model.get_submodule(decoder.full_name(2)) is decoder.blocks[2]


def test_blocks_are_those_that_the_model_has_now() -> None:
    """Of a model whose blocks come from files, the list is replaced after it is opened."""
    model = random_model("llama")
    decoder = Decoder(model)
    other = copy.deepcopy(decoder.blocks)
    model.set_submodule(decoder.family.blocks, other)
    assert decoder.blocks is other


def test_a_model_of_no_known_family_has_no_decoder() -> None:
    with pytest.raises(ValueError, match="match no known family"):
        Decoder(nn.Sequential(nn.Linear(2, 2)))


def test_the_share_of_zeros_is_that_of_all_weights_together() -> None:
    weights = [torch.zeros(2, 3), torch.ones(4, 5), torch.tensor([[0.0, -0.0, 1.0, 2.0]])]
    assert zero_share(iter(weights)) == (6 + 0 + 2) / (6 + 20 + 4)
