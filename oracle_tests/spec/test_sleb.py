"""SLEB's choice against exhaustive search, on sums and on a tiny LLaMA."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from oracle_tests.llama_pair import random_llama
from reference import llama, sleb
from reference.loss import cross_entropy, label_count

SIZES = llama.Sizes(vocabulary=17, hidden=8, intermediate=16, heads=2, kv_heads=2)
IDS = np.random.default_rng(1).integers(17, size=(6, 9))
MODEL = random_llama(SIZES, 6, tied=False, seed=2)


def loss(left: tuple[int, ...]) -> float:
    """Mean cross-entropy of the model with these blocks alone."""
    smaller = replace(MODEL, blocks=tuple(MODEL.blocks[index] for index in left))
    return cross_entropy(llama.forward(smaller, IDS).logits, IDS)[0] / label_count(IDS)


def best(count: int, of: object = loss) -> tuple[int, ...]:
    """Exhaustive search: the blocks between the first and the last without which the loss is lowest."""
    every = itertools.combinations(range(1, 5), count)
    return min(every, key=lambda gone: of(tuple(i for i in range(6) if i not in gone)))  # type: ignore[operator]


def test_the_first_block_removed_is_the_best_one_of_a_llama() -> None:
    assert tuple(sleb.remove_blocks(loss, 6, 1)) == best(1)


@pytest.mark.parametrize("count", [2, 3])
def test_each_further_block_is_the_best_one_after_those_before(count: int) -> None:
    """Not always the best set: the exhaustive search may find a lower loss, never a higher one."""
    removed = sleb.remove_blocks(loss, 6, count).tolist()
    for k in range(count):
        left = [i for i in range(6) if i not in removed[:k]]
        losses = [loss(tuple(i for i in left if i != j)) for j in left[1:-1]]
        assert removed[k] == left[1:-1][int(np.argmin(losses))]
    greedy = loss(tuple(i for i in range(6) if i not in removed))
    assert loss(tuple(i for i in range(6) if i not in best(count))) <= greedy


def test_if_blocks_do_not_interact_the_set_is_the_best_one() -> None:
    worth = np.random.default_rng(0).normal(size=6)

    def additive(left: tuple[int, ...]) -> float:
        return float(-worth[list(left)].sum())

    for count in range(5):
        assert tuple(sorted(sleb.remove_blocks(additive, 6, count))) == best(count, additive)


def test_the_lower_index_goes_first_and_the_ends_stay() -> None:
    assert sleb.remove_blocks(len, 5, 3).tolist() == [1, 2, 3]
    assert sleb.remove_blocks(lambda left: 0.0 if 0 not in left else 1.0, 3, 1).tolist() == [1]


def test_a_loss_that_is_nan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss is NaN; allowed: numbers$"):
        sleb.remove_blocks(lambda left: np.nan, 4, 1)


@pytest.mark.parametrize(("sparsity", "blocks", "count"), [(0.2, 30, 6), (0.3, 30, 9), (0.25, 2, 0), (0.5, 5, 3)])
def test_the_nearest_count(sparsity: float, blocks: int, count: int) -> None:
    assert sleb.removed_blocks(sparsity, blocks) == count
