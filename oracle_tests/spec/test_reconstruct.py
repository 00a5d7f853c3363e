"""The spec of reconstruction: finite differences, Eq. 6 itself, what must not move, and what enough epochs must reach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests.llama_pair import random_llama
from reference import llama, rank
from reference.llama import Block, Sizes
from reference.reconstruct import _gradients, channel_weights, reconstruct_block, reconstruct_blocks

SIZES = Sizes(vocabulary=11, hidden=8, intermediate=12, heads=2, kv_heads=1)


def problem(seed: int, kept: float = 0.5, n: int = 6) -> tuple[Block, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(pruned block, masks, inputs, targets): the dense block's output on slightly other inputs."""
    generator = np.random.default_rng(seed)
    dense = random_llama(SIZES, 1, True, seed, biased=True).blocks[0]
    masks = {name: generator.random(weight.shape) < kept for name, weight in dense.weights.items()}
    inputs = generator.normal(size=(n, 5, SIZES.hidden))
    targets = llama.block_forward(dense, inputs + 0.1 * generator.normal(size=inputs.shape), SIZES).output
    return replace(dense, weights={k: w * masks[k] for k, w in dense.weights.items()}), masks, inputs, targets


def error(block: Block, inputs: np.ndarray, targets: np.ndarray) -> float:
    """e of Eq. 6, by rank.py."""
    output = llama.block_forward(block, inputs, SIZES).output
    return rank.reconstruction_error(targets.reshape(-1, SIZES.hidden), output.reshape(-1, SIZES.hidden))


@given(st.integers(0, 2**32 - 1))
def test_the_objective_is_the_reconstruction_error(seed: int) -> None:
    block, _, inputs, targets = problem(seed)
    output = llama.block_forward(block, inputs, SIZES).output
    ours = float((channel_weights(targets) * (output - targets) ** 2).sum())
    assert ours == pytest.approx(error(block, inputs, targets), rel=1e-12)


def through(blocks: list[Block], inputs: np.ndarray) -> np.ndarray:
    """The output of the last of several blocks."""
    for block in blocks:
        inputs = llama.block_forward(block, inputs, SIZES).output
    return inputs


@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_gradients_are_finite_differences_of_the_error(seed: int, count: int) -> None:
    """Of one block, and of several trained for the output of the last."""
    _, _, inputs, targets = problem(seed, n=2)
    blocks = list(random_llama(SIZES, count, True, seed, biased=True).blocks)
    found = iter(_gradients(blocks, inputs, targets, channel_weights(targets), SIZES))
    generator = np.random.default_rng(seed)
    for number, block in enumerate(blocks):
        for name, weight in block.weights.items():
            direction = generator.normal(size=weight.shape)
            step = 1e-5
            sides = []
            for side in (step, -step):
                moved = replace(block, weights={**block.weights, name: weight + side * direction})
                output = through([*blocks[:number], moved, *blocks[number + 1 :]], inputs)
                sides.append(float((channel_weights(targets) * (output - targets) ** 2).sum()))
            assert float((next(found) * direction).sum()) == pytest.approx(
                (sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7
            )


def test_blocks_trained_together_come_closer_than_one_after_the_other() -> None:
    """To the output of the last, in as many epochs; zeros stay, and the error of both is Eq. 6's."""
    dense = list(random_llama(SIZES, 2, True, 0, biased=True).blocks)
    generator = np.random.default_rng(0)
    masks = [{name: generator.random(w.shape) < 0.5 for name, w in block.weights.items()} for block in dense]
    pruned = [
        replace(block, weights={name: w * mask[name] for name, w in block.weights.items()})
        for block, mask in zip(dense, masks, strict=True)
    ]
    inputs = generator.normal(size=(6, 5, SIZES.hidden))
    middle, targets = through(dense[:1], inputs), through(dense, inputs)
    training = (10, 1e-2, 3, SIZES)
    first = reconstruct_block(pruned[0], masks[0], inputs, middle, *training)
    second = reconstruct_block(pruned[1], masks[1], through([first], inputs), targets, *training)
    together = reconstruct_blocks([first, pruned[1]], masks, inputs, targets, *training)
    apart = [error_of(blocks, inputs, targets) for blocks in (pruned, [first, second], together)]
    assert apart[2] < 0.95 * apart[1] < 0.95 * apart[0]
    for block, mask in zip(together, masks, strict=True):
        assert not any(weight[~mask[name]].any() for name, weight in block.weights.items())


def error_of(blocks: list[Block], inputs: np.ndarray, targets: np.ndarray) -> float:
    output = through(blocks, inputs)
    return rank.reconstruction_error(targets.reshape(-1, SIZES.hidden), output.reshape(-1, SIZES.hidden))


def test_gradients_of_a_batch_are_the_sum_of_those_of_its_sequences() -> None:
    block, _, inputs, targets = problem(3)
    omega = channel_weights(targets)
    whole = _gradients([block], inputs, targets, omega, SIZES)
    parts = [_gradients([block], inputs[[i]], targets[[i]], omega, SIZES) for i in (4, 0, 5, 2, 1, 3)]
    for number, gradient in enumerate(whole):
        np.testing.assert_allclose(sum(part[number] for part in parts), gradient, rtol=1e-10, atol=1e-14)


@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_only_kept_weights_move_and_the_error_falls(seed: int, batch_size: int) -> None:
    block, masks, inputs, targets = problem(seed)
    after = reconstruct_block(block, masks, inputs, targets, 6, 1e-2, batch_size, SIZES)
    for name, weight in after.weights.items():
        assert not weight[~masks[name]].any()
        assert (weight != block.weights[name])[masks[name]].mean() > 0.9
    assert after.attention_norm is block.attention_norm
    assert after.biases is block.biases
    assert error(after, inputs, targets) < error(block, inputs, targets)


def test_with_all_weights_kept_and_enough_epochs_the_error_goes_to_0() -> None:
    dense = random_llama(SIZES, 1, True, 0).blocks[0]
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4, 5, SIZES.hidden))
    targets = llama.block_forward(dense, inputs, SIZES).output
    masks = {name: np.ones(weight.shape, bool) for name, weight in dense.weights.items()}
    moved = replace(dense, weights={k: w + 0.1 * generator.normal(size=w.shape) for k, w in dense.weights.items()})
    errors = [
        error(reconstruct_block(moved, masks, inputs, targets, epochs, 2e-2, 4, SIZES), inputs, targets)
        for epochs in (0, 30, 300)
    ]
    assert errors[0] > 1e-2
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 1e-4 * errors[0]


def test_epochs_batches_and_rates_are_as_defined() -> None:
    """By hand: batches of every K-th sequence, their share of the whole, Adam, a rate that falls to 0."""
    block, masks, inputs, targets = problem(5, n=5)
    epochs, rate = 2, 0.03
    omega = channel_weights(targets)
    Z = {name: weight.copy() for name, weight in block.weights.items()}
    m, v = ({name: np.zeros_like(weight) for name, weight in Z.items()} for _ in range(2))
    done = 0
    for _ in range(epochs):
        for rows in ([0, 3], [1, 4], [2]):
            current = replace(block, weights=dict(Z))
            g = dict(
                zip(Z, _gradients([current], inputs[rows], targets[rows], omega * 5 / len(rows), SIZES), strict=True)
            )
            for name in Z:
                grad = g[name] * masks[name]
                m[name] = 0.9 * m[name] + 0.1 * grad
                v[name] = 0.999 * v[name] + 0.001 * grad**2
                first, second = m[name] / (1 - 0.9 ** (done + 1)), v[name] / (1 - 0.999 ** (done + 1))
                Z[name] = Z[name] - rate * (6 - done) / 6 * first / (np.sqrt(second) + 1e-8)
            done += 1
    found = reconstruct_block(block, masks, inputs, targets, epochs, rate, 2, SIZES)
    for name in Z:
        np.testing.assert_allclose(found.weights[name], Z[name], rtol=1e-9, atol=1e-12)


def test_no_epoch_leaves_the_pruned_weights() -> None:
    block, masks, inputs, targets = problem(1)
    dense = replace(block, weights={k: np.where(masks[k], w, 7.0) for k, w in block.weights.items()})
    found = reconstruct_block(dense, masks, inputs, targets, 0, 1.0, 2, SIZES)
    for name, weight in block.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)


def test_a_silent_channel_has_no_part_in_it() -> None:
    block, masks, inputs, targets = problem(2)
    targets[..., 3] = 0
    omega = channel_weights(targets)
    assert omega[3] == 0
    assert (np.delete(omega, 3) > 0).all()
    assert all(
        np.isfinite(w).all()
        for w in reconstruct_block(block, masks, inputs, targets, 1, 1e-2, 2, SIZES).weights.values()
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": -1}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"inputs": np.zeros((2, 3))}, "inputs"),
        ({"targets": np.zeros((6, 5, 7))}, "targets"),
        ({"masks": {name: np.ones((1, 1), bool) for name in llama.PROJECTIONS}}, "masks"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], named: str) -> None:
    block, masks, inputs, targets = problem(0)
    arguments = {
        "masks": masks,
        "inputs": inputs,
        "targets": targets,
        "epochs": 1,
        "learning_rate": 0.1,
        "batch_size": 2,
    }
    with pytest.raises(ValueError, match=named):
        reconstruct_block(block, **{**arguments, **change}, sizes=SIZES)  # type: ignore[arg-type]


def test_every_block_needs_its_masks() -> None:
    block, masks, inputs, targets = problem(0)
    for blocks, masks_of in (([block], []), ([], []), ([block, block], [masks])):
        with pytest.raises(ValueError, match="masks has"):
            reconstruct_blocks(blocks, masks_of, inputs, targets, 1, 0.1, 2, SIZES)
    with pytest.raises(TypeError, match=r"^masks\['q'\] has dtype float64; allowed: bool, True = kept$"):
        reconstruct_block(block, {**masks, "q": masks["q"] * 0.5}, inputs, targets, 1, 0.1, 2, SIZES)
