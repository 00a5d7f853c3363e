"""Gradients of the calibration loss, block by block backward, against the spec's, and the spec's against differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from oracle_tests.assertions import assert_close
from oracle_tests.llama_pair import HF_NAMES, float64_llama, random_llama, to_hugging_face
from oracle_tests.whole_runs import SIZES
from reference import llama
from reference.loss import label_count
from torch_impl.engine import blocks, finite, gradient_sweep
from torch_impl.engine.adapted_linear import adapters, attach_adapters, block_adapters
from torch_impl.engine.decoder import Decoder

Gradients = list[dict[str, np.ndarray]]
IDS = np.random.default_rng(4).integers(32, size=(5, 7))


def mean_loss(model: llama.Llama, ids: np.ndarray) -> float:
    """Written out: minus the mean log-probability of each next token."""
    logits = llama.forward(model, ids).logits
    losses = [
        np.log(np.exp(logits[i, p]).sum()) - logits[i, p, ids[i, p + 1]]
        for i in range(len(ids))
        for p in range(ids.shape[1] - 1)
    ]
    return float(np.mean(losses))


def with_entry(model: llama.Llama, index: int, name: str, place: tuple[int, int], change: float) -> llama.Llama:
    weights = [dict(block.weights) for block in model.blocks]
    weights[index][name] = weights[index][name].copy()
    weights[index][name][place] += change
    return model.with_weights(weights)


def test_the_spec_s_gradients_are_differences_of_the_loss() -> None:
    model = random_llama(SIZES["gqa"], 2, tied=True, seed=3, biased=True)
    found = llama.weight_gradients(model, IDS)
    generator = np.random.default_rng(0)
    for index in range(2):
        for name, gradient in found[index].items():
            place = tuple(int(generator.integers(size)) for size in gradient.shape)
            up, down = (mean_loss(with_entry(model, index, name, place, step), IDS) for step in (1e-5, -1e-5))
            assert abs((up - down) / 2e-5 - gradient[place]) < 1e-8, (index, name)


def test_nothing_is_predicted_of_one_token() -> None:
    model = random_llama(SIZES["gqa"], 2, tied=True, seed=3)
    assert all(not gradient.any() for block in llama.weight_gradients(model, IDS[:, :1]) for gradient in block.values())


class Summed:
    """Collects the sum of the gradients, that of squares sequence by sequence, and the weights."""

    def __init__(self) -> None:
        self.total: dict[tuple[int, str], torch.Tensor] = {}
        self.squares: dict[tuple[int, str], torch.Tensor] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        assert index not in self.weights, "a block that was done"
        key = index, name
        self.total[key] = self.total.get(key, 0) + gradient_sweep.weight_gradient(x, grad_y)
        for row in range(len(x)):
            one = gradient_sweep.weight_gradient(x[row], grad_y[row])
            self.squares[key] = self.squares.get(key, 0) + one.square()

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights[index] = dict(weights)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_gradients_of_a_model_in_training(batch: int) -> None:
    """Masks and adapters: the gradient is that by the merged weights."""
    case = random_llama(SIZES["gqa"], 3, tied=False, seed=6, biased=True, widths=(12, 20))
    generator = np.random.default_rng(1)
    model = case.with_weights(
        [{name: w * (generator.random(w.shape) > 0.3) for name, w in block.weights.items()} for block in case.blocks]
    )
    twin = to_hugging_face(model)
    decoder = Decoder(twin)
    attach_adapters(decoder, 0.5)
    for number, layer in enumerate(adapters(twin)):
        layer.resize(2, (number,))
        torch.nn.init.normal_(layer.B, generator=torch.Generator().manual_seed(number))
    merged = model.with_weights(
        [
            {name: block_adapters(block, decoder.family)[hf].merged().numpy() for name, hf in HF_NAMES.items()}
            for block in decoder.blocks
        ]
    )
    found = Summed()
    with float64_llama():
        blocks.sweep_gradients(decoder, torch.tensor(IDS), batch, found)
    predicted = label_count(IDS)
    expected = llama.weight_gradients(merged, IDS)
    apart = [llama.weight_gradients(merged, row[None]) for row in IDS]
    assert list(found.weights) == [2, 1, 0]
    for index in range(3):
        for name, hf in HF_NAMES.items():
            assert_close(name, expected[index][name], found.total[index, hf] / predicted, 1e-10)
            squares = sum((6 * one[index][name]) ** 2 for one in apart)
            assert_close(f"{name}, squares", squares, found.squares[index, hf], 1e-10)
            np.testing.assert_array_equal(found.weights[index][hf].numpy(), merged.blocks[index].weights[name])
    assert all(layer.held is None and layer.A.grad is None for layer in adapters(twin))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = random_llama(SIZES["gqa"], 2, tied=True, seed=3)
    decoder = Decoder(to_hugging_face(replace(model, norm=model.norm * 1e300)))
    with pytest.raises(finite.NotFiniteError, match=r"gradient of model\.layers\.1 holds NaN or infinity"):
        blocks.sweep_gradients(decoder, torch.tensor(IDS), 2, Summed())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_block_is_called_as_it_is(compiled: bool) -> None:
    """Its projections are replaced within the sweep, which the compiled graph would not see."""
    decoder = Decoder(to_hugging_face(random_llama(SIZES["gqa"], 2, tied=True, seed=3)))
    attach_adapters(decoder, 0.5)
    calls = []
    if compiled:
        for block in decoder.blocks:
            block._compiled_call_impl = lambda *given, block=block, **more: (
                calls.append(1),
                block.forward(*given, **more),
            )[1]
    found = Summed()
    blocks.sweep_gradients(decoder, torch.tensor(IDS), 3, found)
    assert len(calls) == (2 * 2 if compiled else 0), "forward, twice each block in two batches, and not backward"
    assert len(found.total) == 14
