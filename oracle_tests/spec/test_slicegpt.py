"""SliceGPT's formulas: what a rotation leaves unchanged, and what leaving out axes does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oracle_tests.llama_pair import random_llama
from reference import layers, llama, slicegpt

RNG = np.random.default_rng(4)


def axes_of(width: int, kept: int | None = None) -> np.ndarray:
    return np.linalg.qr(RNG.standard_normal((width, width)))[0][:, :kept]


def test_the_first_axes_keep_more_of_the_states_than_any_others() -> None:
    X = RNG.standard_normal((50, 6)) * [1, 2, 3, 4, 5, 6] @ axes_of(6)
    Q = slicegpt.principal_axes(X.T @ X)
    np.testing.assert_allclose(Q.T @ Q, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(np.sum((X @ Q) ** 2, axis=0), np.linalg.svd(X)[1] ** 2)
    for k in range(1, 6):
        left = np.sum((X @ Q[:, :k]) ** 2)
        assert all(np.sum((X @ axes_of(6, k)) ** 2) < left for _ in range(20))


def test_a_model_of_rotated_weights_computes_the_same() -> None:
    """With the same axes everywhere the shortcuts are 1, and the model is a LLaMA with gains of 1."""
    sizes = llama.Sizes(vocabulary=17, hidden=8, intermediate=12, heads=2, kv_heads=1)
    model = random_llama(sizes, 3, tied=False, seed=3, biased=True)
    Q = axes_of(8)
    np.testing.assert_allclose(slicegpt.shortcut(Q, Q), np.eye(8), atol=1e-12)

    def rotated(block: llama.Block) -> llama.Block:
        gains = dict.fromkeys("qkv", block.attention_norm) | dict.fromkeys(("gate", "up"), block.mlp_norm)
        weights = {
            name: slicegpt.slice_inputs(weight, gains[name], Q) if name in gains else slicegpt.slice_outputs(weight, Q)
            for name, weight in block.weights.items()
        }
        biases = {
            name: bias if name in gains else slicegpt.slice_outputs(bias[:, None], Q)[:, 0]
            for name, bias in block.biases.items()
        }
        return llama.Block(np.ones(8), np.ones(8), weights, biases)

    turned = replace(
        model,
        embedding=model.embedding @ Q,
        blocks=tuple(map(rotated, model.blocks)),
        norm=np.ones(8),
        head=slicegpt.slice_inputs(model.head, model.norm, Q),
    )
    ids = RNG.integers(17, size=(3, 7))
    np.testing.assert_allclose(llama.forward(turned, ids).logits, llama.forward(model, ids).logits, rtol=1e-9)


@pytest.mark.parametrize("k", [3, 8])
def test_two_sliced_layers_are_the_whole_ones_with_projected_states(k: int) -> None:
    """y = x Wᵀ behind a norm, then X' = X + y Vᵀ read by other axes: with states that have only the first axes."""
    X, W, V = RNG.standard_normal((5, 8)), RNG.standard_normal((4, 8)), RNG.standard_normal((8, 4))
    gain, eps, Q, new = RNG.uniform(0.5, 1.5, 8), 1e-3, axes_of(8, k), axes_of(8, k)
    states = X @ Q @ Q.T
    y = layers.rms_norm(states, gain, eps) @ W.T
    expected = (states + y @ V.T) @ new
    sliced = slicegpt.sliced_norm(X @ Q, 8, eps) @ slicegpt.slice_inputs(W, gain, Q).T
    np.testing.assert_allclose(sliced, y)
    found = X @ Q @ slicegpt.shortcut(Q, new) + sliced @ slicegpt.slice_outputs(V, new).T
    np.testing.assert_allclose(found, expected)


def test_centred_axes_make_a_layer_norm_of_the_norm() -> None:
    X, Q = RNG.standard_normal((5, 8)) + 3, axes_of(8)
    away = X - X.mean(axis=1, keepdims=True)
    expected = away / np.sqrt((away**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(slicegpt.sliced_norm(X @ slicegpt.centred(Q), 8, 1e-5) @ Q.T, expected)


@pytest.mark.parametrize(("sparsity", "multiple"), [(0.2, 8), (0.3, 8), (0.3, 1), (0.0, 8), (0.9, 1)])
def test_no_other_number_of_axes_is_nearer_to_the_sparsity(sparsity: float, multiple: int) -> None:
    """SmolLM2's block: the weights that are left, counted matrix by matrix."""
    d, wide, kv = 576, 1536, 192

    def left(k: int) -> int:
        return (
            sum(rows * k for rows in (d, kv, kv)) + k * d + 2 * wide * k + k * wide + 2 * k * k
        )  # q, k, v, o; gate, up; down

    whole = left(d) - 2 * d * d
    found = slicegpt.kept_axes(sparsity, d, whole, multiple)
    errors = {k: abs(1 - left(k) / whole - sparsity) for k in range(multiple, d + 1, multiple)}
    assert errors[found] == min(errors.values())
    assert slicegpt.kept_axes(0.5, 5, 99) == 5
