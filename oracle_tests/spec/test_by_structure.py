"""The scores of LLM-Pruner, LoRAPrune and FLAP, against loops, finite differences and what they stand for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from oracle_tests import strategies
from oracle_tests.llama_pair import random_llama
from reference import flap, llama, llm_pruner, loraprune
from reference.loss import cross_entropy, label_count

RNG = np.random.default_rng(7)


def test_first_order_scores_are_the_change_of_a_llama_s_loss_for_small_weights() -> None:
    """Without one weight that is small, the loss differs by |w · g|."""
    sizes = llama.Sizes(vocabulary=17, hidden=8, intermediate=12, heads=2, kv_heads=2)
    model, ids = random_llama(sizes, 2, tied=False, seed=3), RNG.integers(17, size=(3, 7))

    def loss(weight: np.ndarray) -> float:
        weights = [dict(block.weights) for block in model.blocks]
        weights[1]["up"] = weight
        logits = llama.forward(model.with_weights(weights), ids).logits
        return cross_entropy(logits, ids)[0] / label_count(ids)

    weight = model.blocks[1].weights["up"]
    weight[3, 5] = 1e-6
    score = llm_pruner.taylor_score(weight, llama.weight_gradients(model, ids)[1]["up"])
    without = weight.copy()
    without[3, 5] = 0
    assert abs(loss(without) - loss(weight)) == pytest.approx(score[3, 5], rel=1e-3)


@given(strategies.structures_of(2, axis=True))
def test_a_structure_s_sum_is_that_of_its_lines(case: dict[str, Any]) -> None:
    score, u, axis = case["score"], case["structures"], case["axis"]
    width = score.shape[axis] // u
    expected = np.zeros(u)
    for i, j in itertools.product(*map(range, score.shape)):
        expected[(i, j)[axis] // width] += score[i, j]
    np.testing.assert_allclose(llm_pruner.structure_sum(**case), expected, atol=1e-9 * np.abs(score).sum())


@given(strategies.protected_blocks())
def test_the_model_reaches_the_sparsity_with_its_ends_whole(case: dict[str, Any]) -> None:
    rates, w = llm_pruner.rates_between(**case), case["weights"]
    assert rates @ w / w.sum() == pytest.approx(case["target"])
    assert not rates[: case["first"]].any()
    assert not rates[len(w) - case["last"] :].any()
    assert len(set(rates[case["first"] : len(w) - case["last"]])) == 1


def test_scores_that_are_the_same_stay_0_although_their_mean_is_rounded() -> None:
    score = np.full(6, 0.1)
    assert score.mean() != 0.1
    assert not flap.standardised(score, 3).any()


def test_what_the_middle_does_not_have_cannot_go() -> None:
    with pytest.raises(ValueError, match=r"^target is 0\.9; allowed: 0 to 0\.5 with these ends$"):
        llm_pruner.rates_between(0.9, np.ones(4), 1, 1)


def test_the_estimated_gradient_is_what_one_step_takes_off_the_product() -> None:
    A, g_A = RNG.standard_normal((2, 3, 5))
    B, g_B = RNG.standard_normal((2, 4, 3))
    weight = RNG.standard_normal((4, 5)) * (RNG.random((4, 5)) > 0.3)
    gradient = B @ A - (B - g_B) @ (A - g_A)
    expected = np.abs(gradient * np.where(weight != 0, weight + 0.5 * B @ A, 0))
    np.testing.assert_allclose(loraprune.lora_score(weight, A, B, 0.5, g_A, g_B), expected)


def test_scores_of_any_unit_are_averaged_alike() -> None:
    """Every projection has its own unit, and counts as much as the others."""
    found = other = np.zeros(4)
    expected = np.zeros(4)
    for _ in range(5):
        scores, units = RNG.random((3, 4)), np.array([[1e6], [1.0], [1e-6]])
        found, other = loraprune.smoothed(found, scores), loraprune.smoothed(other, units * scores)
        expected = 0.9 * expected
        for score in scores:
            expected = expected + 0.1 * score / np.sqrt(np.sum(score**2))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(other, expected)
    assert not loraprune.smoothed(np.zeros(2), np.zeros((3, 2))).any()


def test_fluctuation_is_the_mean_error_of_an_input_replaced_by_its_mean() -> None:
    X, W = RNG.standard_normal((40, 5)) + 2, RNG.standard_normal((3, 5))
    for j in range(5):
        other = X.copy()
        other[:, j] = X[:, j].mean()
        error = np.mean(np.sum(((X - other) @ W.T) ** 2, axis=1))
        assert flap.fluctuation(W, X.var(axis=0))[j] == pytest.approx(error)


def test_the_bias_keeps_the_mean_output() -> None:
    X, W, kept = RNG.standard_normal((40, 5)) + 2, RNG.standard_normal((3, 5)), np.array([1, 0, 1, 1, 0], dtype=bool)
    found = X[:, kept] @ W[:, kept].T + flap.compensation(W, X.mean(axis=0), kept)
    np.testing.assert_allclose(found.mean(axis=0), (X @ W.T).mean(axis=0))


def test_scores_are_standardised_before_heads_are_averaged() -> None:
    score = RNG.random(12) * 100 + 7
    z = (score - score.mean()) / score.std()
    np.testing.assert_allclose(flap.standardised(score, 12), z)
    np.testing.assert_allclose(flap.standardised(score, 3), [z[:4].mean(), z[4:8].mean(), z[8:].mean()])
    assert not flap.standardised(np.full(4, 3.3), 2).any()


@given(strategies.scored_structures())
def test_no_other_threshold_is_nearer(case: dict[str, Any]) -> None:
    score, w, goal = case["score"], case["weights"], case["sparsity"] * case["weights"].sum()
    gone = ~flap.remove_lowest(**case)
    assert not np.isinf(score[gone]).any()
    order = [i for i in np.argsort(score, kind="stable") if score[i] < np.inf]
    best = min(abs(w[order[:count]].sum() - goal) for count in range(len(order) + 1))
    assert abs(w[gone].sum() - goal) == pytest.approx(best)
    assert set(np.flatnonzero(gone)) == set(order[: gone.sum()])
