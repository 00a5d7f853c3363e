"""Structured pruning by brute force: the smaller block computes what the block with zeros does, and counts are the nearest."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from oracle_tests.llama_pair import random_llama
from reference import llama
from reference.llama import Block, Sizes
from reference.masks.structured import (
    AXES,
    BY_HEAD,
    coupled_mask,
    cut,
    kept_structures,
    removed_structures,
    structure_mask,
    structure_score,
)
from reference.masks.wanda import input_norm, wanda_score

SIZES = {
    "every head its own": Sizes(vocabulary=3, hidden=12, intermediate=5, heads=3, kv_heads=3),
    "shared keys": Sizes(vocabulary=3, hidden=24, intermediate=6, heads=6, kv_heads=3),
}


def smaller(block: Block, sizes: Sizes, heads: np.ndarray, channels: np.ndarray) -> tuple[Block, Sizes]:
    """Cut the block to the structures that are kept. Outputs of o and down are nobody's, so their biases stay."""
    kept = {name: heads if name in BY_HEAD else channels for name in AXES}
    weights = {name: cut(weight, kept[name], AXES[name]) for name, weight in block.weights.items()}
    biases = {name: cut(bias, kept[name], 0) if AXES[name] == 0 else bias for name, bias in block.biases.items()}
    shared = sizes.heads // sizes.kv_heads
    counts = {"kv_heads": int(heads.sum()), "heads": shared * int(heads.sum()), "intermediate": int(channels.sum())}
    return replace(block, weights=weights, biases=biases), replace(sizes, **counts)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", SIZES)
def test_the_smaller_block_computes_what_the_block_with_zeros_does(kind: str, biased: bool) -> None:
    """Every set of heads, with channels drawn; with zeros in all coupled weights, and in those that are read alone."""
    sizes, generator = SIZES[kind], np.random.default_rng(0)
    block = random_llama(sizes, 1, False, 0, biased).blocks[0]
    hidden = generator.standard_normal((2, 5, sizes.hidden))
    for heads in itertools.product([True, False], repeat=3):
        if not any(heads):
            continue
        channels = generator.random(sizes.intermediate) < 0.5
        channels[generator.integers(sizes.intermediate)] = True
        kept = {name: np.array(heads) if name in BY_HEAD else channels for name in AXES}
        small, fewer = smaller(block, sizes, np.array(heads), channels)
        found = llama.block_forward(small, hidden, fewer).output
        for names in (AXES, ("o", "down")):
            zeros = {n: block.weights[n] * coupled_mask(kept[n], block.weights[n].shape, AXES[n]) for n in names}
            masked = replace(block, weights=block.weights | zeros)
            expected = llama.block_forward(masked, hidden, sizes).output
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)
    assert fewer.head_dim == sizes.head_dim


def test_a_head_takes_with_it_what_is_computed_for_it_alone() -> None:
    """Nothing that a removed structure computes reaches the output: its rows have no gradient once its columns are zero."""
    sizes = SIZES["shared keys"]
    block = random_llama(sizes, 1, False, 1).blocks[0]
    heads, channels = np.array([True, False, True]), np.arange(sizes.intermediate) != 2
    kept = {name: heads if name in BY_HEAD else channels for name in AXES}
    masks = {name: coupled_mask(kept[name], weight.shape, AXES[name]) for name, weight in block.weights.items()}
    masked = replace(block, weights=block.weights | {n: block.weights[n] * masks[n] for n in ("o", "down")})
    trace = llama.block_forward(masked, np.random.default_rng(0).standard_normal((1, 4, sizes.hidden)), sizes)
    _, grads = llama.block_backward(masked, trace, sizes, np.ones((1, 4, sizes.hidden)))
    for name in ("q", "k", "v", "gate", "up"):
        rows = masks[name].all(axis=1)
        assert not grads[name][..., ~rows].any(), name
        assert grads[name][..., rows].any(axis=(0, 1)).all(), name


def test_scores_are_sums_over_columns_of_means_over_outputs() -> None:
    generator = np.random.default_rng(2)
    W, X = generator.standard_normal((4, 6)), generator.standard_normal((9, 6))
    found = structure_score(wanda_score(W, input_norm(X)), 3)
    for head in range(3):
        expected = 0.0
        for j in (2 * head, 2 * head + 1):
            expected += sum(abs(W[i, j]) * sum(X[:, j] ** 2) ** 0.5 for i in range(4)) / 4
        assert found[head] == pytest.approx(expected, rel=1e-14)


@given(strategies.structured_blocks())
def test_counts_are_the_nearest_that_the_multiple_has(case: dict) -> None:
    H, C = removed_structures(**case)
    g, m, multiple = case["heads"], case["channels"], case["multiple"]
    assert 0 <= H <= case["sparsity"] * g + 1e-9
    assert case["sparsity"] * g - 1 - 1e-9 < H or g - 1 == H
    counts = {m, *range(multiple, m + 1, multiple)}
    assert m - C in counts
    wanted = case["sparsity"] * m
    if case["last"]:
        total = g * case["head_weights"] + m * case["channel_weights"]
        wanted = (case["sparsity"] * total - H * case["head_weights"]) / case["channel_weights"]
    assert abs(wanted - C) <= min(abs(wanted - (m - count)) for count in counts) + 1e-8


@given(strategies.structured_blocks(), st.floats(0, 1))
def test_counts_never_fall_along_the_steps(case: dict, other: float) -> None:
    low, high = sorted([case["sparsity"], other])
    before = removed_structures(**{**case, "sparsity": low, "last": False})
    for last in (False, True):
        after = removed_structures(**{**case, "sparsity": high, "last": last})
        assert before <= after
        assert before[1] <= after[1]


@pytest.mark.parametrize(
    ("sparsity", "removed"),
    [(0.2, (0, 408)), (0.3, (0, 616)), (0.4, (1, 648)), (0.99, (2, 1528))],
)
def test_counts_of_a_real_block(sparsity: float, removed: tuple[int, int]) -> None:
    """SmolLM2-135M: 3 key-value heads for 9 heads of 64, hidden 576, 1,536 channels."""
    head, channel = (2 * 3 * 64 + 2 * 64) * 576, 3 * 576
    assert removed_structures(sparsity, 3, 1536, head, channel, multiple=8) == removed
    if sparsity < 0.5:
        share = (removed[0] * head + removed[1] * channel) / (3 * head + 1536 * channel)
        assert abs(share - sparsity) <= 4 * channel / (3 * head + 1536 * channel) + 1e-12


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("heads", "channels", "head", "channel", "multiple", "removed"),
    [
        (2, 9, 6, 3, 1, (1, 4)),  # 4.5 of 9 channels
        (2, 12, 6, 3, 4, (1, 4)),  # 6 of 12, and 4 or 8 are kept
        (2, 18, 6, 3, 8, (1, 10)),  # 9 of 18: 8 are kept, not 16 or all
    ],
)
def test_counts_between_two_multiples(
    heads: int, channels: int, head: int, channel: int, multiple: int, removed: tuple[int, int], last: bool
) -> None:
    """Half of the weights: half of the heads, and of the two nearest numbers of kept channels the larger."""
    assert removed_structures(0.5, heads, channels, head, channel, multiple, last) == removed


@given(strategies.structures_to_remove())
def test_the_lowest_go_and_those_that_are_gone_count(case: dict) -> None:
    score, removed, kept = case["score"].tolist(), case["removed"], case["kept"]
    order = sorted(range(len(score)), key=lambda u: (bool(kept[u]), score[u], u))
    gone = set(order[:removed]) | set(np.flatnonzero(~kept).tolist())
    assert structure_mask(**case).tolist() == [u not in gone for u in range(len(score))]


@given(strategies.structured_lines())
def test_lines_are_equal_runs_in_order(case: dict) -> None:
    values, kept, axis = case["values"], case["kept"], case["axis"]
    width = values.shape[axis] // len(kept)
    lines = [line for line in range(values.shape[axis]) if kept[line // width]]
    np.testing.assert_array_equal(cut(**case), np.take(values, lines, axis=axis))
    mask = coupled_mask(kept, values.shape, axis)
    np.testing.assert_array_equal(np.take(mask, lines, axis=axis), True)
    assert mask.sum() == len(lines) * values.shape[1 - axis]
    if axis == 1:
        np.testing.assert_array_equal(kept_structures(mask, len(kept)), kept)
