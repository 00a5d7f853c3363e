"""The small LLaMA against Hugging Face's, and its written-out gradients against finite differences and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests.llama_pair import HF_NAMES, float64_llama, random_llama, to_hugging_face
from oracle_tests.strategies import examples
from reference import adapter, layers, llama
from reference.loss import IGNORED, cross_entropy, kl_divergence, label_count

MHA = llama.Sizes(vocabulary=11, hidden=8, intermediate=12, heads=2, kv_heads=2)
GQA = llama.Sizes(vocabulary=11, hidden=16, intermediate=20, heads=4, kv_heads=2, norm_eps=1e-5, rope_theta=500.0)
MQA = llama.Sizes(vocabulary=11, hidden=8, intermediate=12, heads=4, kv_heads=1)
SIZES = [pytest.param(MHA, id="mha"), pytest.param(GQA, id="gqa"), pytest.param(MQA, id="mqa")]
KINDS = [
    pytest.param({"tied": True}, id="tied"),
    pytest.param({"tied": False}, id="untied"),
    pytest.param({"tied": False, "biased": True, "widths": [12, 20, 8]}, id="biased, uneven"),
]

# Float64 sums of at most 20 terms through 3 blocks: about 1e-16 · 20 · 3 · (condition of the norms, some tens).
ROUNDING = 1e-12
# Hugging Face's norms and angles in float32: 6e-8 per norm, 7 norms, gains up to 1.5.
FLOAT32_NORMS = 3e-6


def random_ids(sizes: llama.Sizes, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(sizes.vocabulary, size=shape)


def random_labels(ids: np.ndarray, seed: int = 1) -> np.ndarray:
    """Some tokens do not count."""
    return np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, IGNORED, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("shape", "seed"), [((2, 7), 0), ((1, 1), 1), ((3, 2), 2)])
def test_forward_is_hugging_face_s(sizes: llama.Sizes, kind: dict[str, Any], shape: tuple[int, int], seed: int) -> None:
    model = random_llama(sizes, 3, seed=seed, **kind)
    ids = random_ids(sizes, shape)
    trace = llama.forward(model, ids)
    twin = to_hugging_face(model)
    with torch.no_grad():
        as_shipped = twin(input_ids=torch.tensor(ids), output_hidden_states=True)
        with float64_llama():
            theirs = twin(input_ids=torch.tensor(ids), output_hidden_states=True)
    np.testing.assert_allclose(theirs.logits.numpy(), trace.logits, rtol=ROUNDING, atol=ROUNDING)
    for index, block in enumerate(trace.blocks):
        np.testing.assert_allclose(theirs.hidden_states[index].numpy(), block.hidden, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(as_shipped.logits.numpy(), trace.logits, rtol=FLOAT32_NORMS, atol=FLOAT32_NORMS)


@pytest.mark.parametrize("sizes", SIZES)
def test_block_exposes_what_its_projections_see(sizes: llama.Sizes) -> None:
    model = random_llama(sizes, 1, False, 3)
    ids = random_ids(sizes, (2, 5))
    [trace] = llama.forward(model, ids).blocks
    twin = to_hugging_face(model)
    seen: dict[str, np.ndarray] = {}
    for name, hf_name in HF_NAMES.items():
        twin.model.layers[0].get_submodule(hf_name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0].detach().numpy()})
        )
    with torch.no_grad(), float64_llama():
        twin(input_ids=torch.tensor(ids))
    assert set(seen) == set(llama.PROJECTIONS)
    for name, group in llama.INPUT_OF.items():
        np.testing.assert_allclose(seen[name], trace.inputs[group], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_losses_and_gradients_are_hugging_face_s(sizes: llama.Sizes, kind: dict[str, Any], loss: str) -> None:
    model = random_llama(sizes, 3, seed=4, **kind)
    ids = random_ids(sizes, (3, 6))
    labels = random_labels(ids)
    trace = llama.forward(model, ids)
    twin = to_hugging_face(model)
    teacher = np.random.default_rng(5).normal(size=trace.logits.shape)
    with float64_llama():
        out = twin(input_ids=torch.tensor(ids), labels=torch.tensor(labels))
    counted = torch.tensor(labels[:, 1:] != IGNORED)
    if loss == "ce":
        total, grad_logits = cross_entropy(trace.logits, labels)
        # Hugging Face's own loss is a float32 mean; the sum in float64 is what the trainer uses.
        assert total / label_count(labels) == pytest.approx(out.loss.item(), rel=1e-6)
        theirs = torch.nn.functional.cross_entropy(
            out.logits[:, :-1][counted], torch.tensor(labels)[:, 1:][counted], reduction="sum"
        )
    else:
        total, grad_logits = kl_divergence(trace.logits, teacher, labels)
        theirs = torch.nn.functional.kl_div(
            out.logits[:, :-1][counted].log_softmax(-1),
            torch.tensor(teacher)[:, :-1][counted].log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
    assert total == pytest.approx(theirs.item(), rel=ROUNDING)
    theirs.backward()
    grads = llama.backward(model, trace, grad_logits)
    for index, block in enumerate(trace.blocks):
        for name, group in llama.INPUT_OF.items():
            ours = np.einsum("nto,nti->oi", grads[index][name], block.inputs[group])
            weight = twin.model.layers[index].get_submodule(HF_NAMES[name]).weight
            np.testing.assert_allclose(weight.grad.numpy(), ours, rtol=1e-10, atol=1e-12, err_msg=f"{index}.{name}")


def directional(function: Callable[[float], float]) -> float:
    """df/dh at 0 by central differences, two step sizes and Richardson's combination of them."""
    step = 2e-3
    coarse = (function(step) - function(-step)) / (2 * step)
    fine = (function(step / 2) - function(-step / 2)) / step
    return (4 * fine - coarse) / 3


# Fourth-order truncation: step⁴/4 · f⁽⁵⁾/120 with step 2e-3 and fifth derivatives up to some thousands.
DIFFERENCES = 1e-7


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", llama.PROJECTIONS)
def test_gradient_of_each_projection_by_finite_differences(sizes: llama.Sizes, name: str) -> None:
    model = random_llama(sizes, 2, False, 6)
    ids = random_ids(sizes, (2, 5))
    labels = random_labels(ids)
    generator = np.random.default_rng(7)
    weights = [dict(block.weights) for block in model.blocks]
    direction = generator.normal(size=weights[0][name].shape)
    direction /= np.linalg.norm(direction)
    trace = llama.forward(model, ids)
    grads = llama.backward(model, trace, cross_entropy(trace.logits, labels)[1])

    for index in range(2):

        def moved(h: float, index: int = index) -> float:
            changed = [dict(of_block) for of_block in weights]
            changed[index][name] = changed[index][name] + h * direction
            return cross_entropy(llama.forward(model.with_weights(changed), ids).logits, labels)[0]

        gradient = np.einsum("nto,nti->oi", grads[index][name], trace.blocks[index].inputs[llama.INPUT_OF[name]])
        assert (gradient * direction).sum() == pytest.approx(directional(moved), rel=DIFFERENCES, abs=DIFFERENCES)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradient_of_an_adapter_by_finite_differences(loss: str) -> None:
    model = random_llama(GQA, 2, True, 8)
    ids = random_ids(GQA, (1, 6))
    generator = np.random.default_rng(9)
    teacher = generator.normal(size=(1, 6, GQA.vocabulary))
    weight = model.blocks[1].weights["down"] * (generator.random((16, 20)) < 0.5)
    A, B = generator.normal(size=(2, 20)), generator.normal(size=(16, 2))
    direction_A, direction_B = generator.normal(size=A.shape), generator.normal(size=B.shape)

    def with_adapter(A: np.ndarray, B: np.ndarray) -> llama.Llama:
        merged = adapter.effective_weight(weight, A, B, 0.5)
        return model.with_weights([model.blocks[0].weights, model.blocks[1].weights | {"down": merged}])

    def loss_of(logits: np.ndarray) -> tuple[float, np.ndarray]:
        return cross_entropy(logits, ids) if loss == "ce" else kl_divergence(logits, teacher, ids)

    adapted = with_adapter(A, B)
    trace = llama.forward(adapted, ids)
    grads = llama.backward(adapted, trace, loss_of(trace.logits)[1])
    _, grad_A, grad_B = adapter.masked_lora_grad(trace.blocks[1].inputs["down"], weight, A, B, 0.5, grads[1]["down"])
    slope = directional(
        lambda h: loss_of(llama.forward(with_adapter(A + h * direction_A, B + h * direction_B), ids).logits)[0]
    )
    # A product of two factors: its fifth derivative is larger than a single weight's.
    assert (grad_A * direction_A).sum() + (grad_B * direction_B).sum() == pytest.approx(slope, rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=examples(20))
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 5))
def test_small_derivatives(seed: int, rows: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    x, out, direction = generator.normal(size=(3, rows, 2 * width))
    gain = generator.uniform(0.5, 2, 2 * width)
    angles = layers.rotary_angles(rows, 2 * width, 100.0)

    def slope(function: Callable[[np.ndarray], np.ndarray]) -> float:
        return directional(lambda h: float((out * function(x + h * direction)).sum()))

    tolerance = {"rel": 1e-5, "abs": 1e-5}  # x may come close to 0, where the norm bends sharply: eps = 0.1 bounds that
    norm = layers.rms_norm_grad(x, gain, 0.1, out)
    assert (norm * direction).sum() == pytest.approx(slope(lambda x: layers.rms_norm(x, gain, 0.1)), **tolerance)
    assert (out * layers.silu_grad(x) * direction).sum() == pytest.approx(slope(layers.silu), **tolerance)
    turned = layers.rotate(out, -angles)
    assert (turned * direction).sum() == pytest.approx(slope(lambda x: layers.rotate(x, angles)), **tolerance)
    np.testing.assert_allclose(layers.rotate(layers.rotate(x, angles), -angles), x, atol=1e-14)


def test_causal() -> None:
    """What comes later changes nothing, so padding on the right does not either."""
    model = random_llama(GQA, 3, False, 10)
    ids = random_ids(GQA, (1, 6))
    longer = np.concatenate([ids, [[0, 3]]], axis=1)
    np.testing.assert_allclose(
        llama.forward(model, longer).logits[:, :6], llama.forward(model, ids).logits, rtol=ROUNDING, atol=ROUNDING
    )


def test_losses_are_sums_over_what_counts() -> None:
    generator = np.random.default_rng(11)
    logits, teacher = generator.normal(size=(2, 2, 4, 5))
    labels = np.array([[0, IGNORED, 3, 4], [IGNORED, 2, 1, IGNORED]])
    assert label_count(labels) == 4
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    q = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    counted = [(0, 1, 3), (0, 2, 4), (1, 0, 2), (1, 1, 1)]
    assert cross_entropy(logits, labels)[0] == pytest.approx(-sum(np.log(p[i]) for i in counted))
    expected = sum((q[r, c] * np.log(q[r, c] / p[r, c])).sum() for r, c, _ in counted)
    assert kl_divergence(logits, teacher, labels)[0] == pytest.approx(expected)
    for grad in (cross_entropy(logits, labels)[1], kl_divergence(logits, teacher, labels)[1]):
        silent = [(0, 0), (0, 3), (1, 2), (1, 3)]
        assert all((grad[position] == 0).all() for position in silent)
        np.testing.assert_allclose(grad.sum(axis=-1), 0, atol=1e-15)
    assert kl_divergence(teacher, teacher, labels)[0] == pytest.approx(0, abs=1e-14)


def test_saturated_logits_stay_finite() -> None:
    logits = np.array([[[1000.0, -1000.0], [0.0, 0.0]]])
    total, grad = cross_entropy(logits, np.array([[0, 1]]))
    assert total == 2000
    np.testing.assert_array_equal(grad[0, 0], [1, -1])
    assert layers.silu(np.array([-1e4, 1e4])).tolist() == [0, 1e4]


def test_bad_arguments() -> None:
    model = random_llama(MHA, 1, False, 0)
    with pytest.raises(ValueError, match=r"hidden is 6; allowed: a multiple of twice heads, 4"):
        replace(MHA, hidden=6, head_dim=0)
    with pytest.raises(ValueError, match=r"kv_heads is 3; allowed: a divisor of heads, 2"):
        replace(MHA, kv_heads=3)
    with pytest.raises(TypeError, match=r"ids has dtype float64; allowed: integers"):
        llama.forward(model, np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"ids has shape \(2,\)"):
        llama.forward(model, np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match=r"ids holds 0 to 11; allowed: 0 to 10"):
        llama.forward(model, np.array([[0, 11]]))
    logits = np.zeros((1, 2, 4))
    with pytest.raises(ValueError, match=r"labels has shape \(1, 3\); allowed: \(1, 2\)"):
        cross_entropy(logits, np.zeros((1, 3), dtype=int))
    with pytest.raises(ValueError, match=r"labels holds -1 to 0; allowed: 0 to 3"):
        cross_entropy(logits, np.array([[IGNORED, -1]]))
    with pytest.raises(ValueError, match=r"teacher has shape"):
        kl_divergence(logits, logits[:, :1], np.zeros((1, 2), dtype=int))
