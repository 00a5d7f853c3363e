"""The spec of continuing text: every token as often as the model says, each with all tokens before it known."""

from __future__ import annotations

import numpy as np
import pytest

from oracle_tests.llama_pair import random_llama
from reference import llama
from reference.continuation import continue_text, next_token
from reference.llama import Sizes

SIZES = Sizes(vocabulary=11, hidden=8, intermediate=12, heads=2, kv_heads=1)


@pytest.mark.parametrize("excluded", [[], [0], [3, 6]])
def test_each_token_is_drawn_as_often_as_it_is_likely(excluded: list[int]) -> None:
    z = np.random.default_rng(0).normal(size=7)
    p = np.exp(z)
    p[excluded] = 0
    p /= p.sum()
    count = 10_000
    drawn = next_token(np.tile(z, (count, 1)), (np.arange(count) + 0.5) / count, excluded)
    np.testing.assert_allclose(np.bincount(drawn, minlength=7), count * p, atol=1)


def test_a_number_on_the_border_gives_the_next_token() -> None:
    """u = p₀ is no longer token 0's, and u = 0 is not an excluded token's."""
    assert next_token(np.zeros((2, 2)), [0.5, np.nextafter(0.5, 0)]).tolist() == [1, 0]
    assert next_token(np.zeros((1, 3)), [0.0], excluded=[0]).tolist() == [1]


def test_a_sum_that_rounding_leaves_below_1_gives_a_token_that_can_be_drawn() -> None:
    almost = np.nextafter(1.0, 0.0)
    logits = np.random.default_rng(1).normal(size=(200, 9))
    assert set(next_token(logits, np.full(200, almost), excluded=[8])) <= set(range(8))


def test_a_text_is_what_the_model_predicts_token_by_token() -> None:
    """With u = 0.5 in every row, against a loop that draws one token of one sequence at a time."""
    model = random_llama(SIZES, 2, True, 0)

    def predict(ids: np.ndarray) -> np.ndarray:
        return 4 * llama.forward(model, ids).logits[:, -1]

    prompts = np.array([[1, 2, 3], [4, 5, 6]])
    found = continue_text(predict, prompts, np.full((2, 5), 0.5))
    for row, prompt in zip(found, prompts, strict=True):
        ids = list(prompt)
        for _ in range(5):
            z = predict(np.array([ids]))[0]
            p, total, token = np.exp(z) / np.exp(z).sum(), 0.0, -1
            while total <= 0.5:
                token += 1
                total += p[token]
            ids.append(token)
        assert list(row) == ids
