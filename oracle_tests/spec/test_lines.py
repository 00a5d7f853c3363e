"""Lines of Algorithm 1, one by one: what each is handed, by definitions written differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oracle_tests.llama_pair import random_llama
from reference import llama, lockstep, losa, rates, training
from reference.masks.prune import METHODS
from reference.masks.pruner_zero import pruner_zero_score
from reference.settings import Settings

SIZES = llama.Sizes(vocabulary=13, hidden=8, intermediate=12, heads=4, kv_heads=2)
IDS = np.random.default_rng(0).integers(13, size=(5, 6))
PRUNE = {"layer_sparsity": "uniform", "finetune": False}


def model(blocks: int) -> llama.Llama:
    return random_llama(SIZES, blocks, tied=False, seed=4)


def test_the_first_token_counts_more_where_attention_reads_it() -> None:
    """Fifty times for q, k and v, once for all others: Wanda's masks of the first block, whose inputs are the dense model's."""
    dense = model(1)
    settings = Settings(sparsity_ratio=0.5, steps=1, first_token_weight=50.0, **PRUNE)
    _, [record] = losa.run(dense, IDS, [], settings)
    inputs = llama.forward(dense, IDS).blocks[0].inputs
    changed = []
    for name, W in dense.blocks[0].weights.items():
        squares = (inputs[llama.INPUT_OF[name]] ** 2).sum(axis=0)
        masks = []
        for often in (1, 50):
            score = np.abs(W) * np.sqrt(squares[1:].sum(axis=0) + often * squares[0])
            masks.append(score >= np.sort(score, axis=1)[:, [W.shape[1] // 2]])
        np.testing.assert_array_equal(record.layers[0][name].mask, masks[name in "qkv"], name)
        changed.append((masks[0] != masks[1]).any())
    assert sum(changed) >= 5, "the weight makes a difference almost everywhere"


@pytest.mark.parametrize(
    ("window", "front", "sizes"),
    [(1, 0, [1, 1, 1, 1]), (2, 0, [1, 2, 2, 2]), (3, 0, [1, 2, 3, 3]), (3, 1, [1, 2, 3])],
)
def test_a_window_ends_with_the_pruned_block(
    window: int, front: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many blocks, or all from the first that has lost a weight, on the stream before them, for the dense output of the last."""
    dense, calls = model(4), []

    def scaled(blocks: Sequence[llama.Block], _: Any, inputs: np.ndarray, targets: np.ndarray, *__: Any) -> list[Any]:
        """Change the last block alone, so that the blocks before it stay what the stream has passed."""
        calls.append((len(blocks), inputs, targets))
        weights = {name: 0.9 * W for name, W in blocks[-1].weights.items()}
        return [*blocks[:-1], replace(blocks[-1], weights=weights)]

    monkeypatch.setattr(lockstep.reconstruct, "reconstruct_blocks", scaled)
    settings = Settings(
        sparsity_ratio=0.5, steps=1, reconstruct_epochs=1, reconstruct_window=window, dense_blocks=(front, 0), **PRUNE
    )
    merged, [record] = losa.run(dense, IDS, [], settings)
    assert [size for size, _, _ in calls] == sizes
    streams = [dense.embedding[IDS], *(block.output for block in llama.forward(merged, IDS).blocks)]
    wanted = [block.output for block in llama.forward(dense, IDS).blocks]
    for index, (size, inputs, targets) in enumerate(calls, front):
        np.testing.assert_allclose(inputs, streams[index + 1 - size], rtol=1e-12)
        np.testing.assert_array_equal(targets, wanted[index])
        D, S = wanted[index].reshape(-1, 8), streams[index + 1].reshape(-1, 8)
        expected = (((D - S) ** 2).sum(axis=0) / (D**2).sum(axis=0)).mean()
        assert record.errors[index] == pytest.approx(expected, rel=1e-10), "of the reconstructed block"


def test_channels_make_up_for_heads_at_the_last_step_alone() -> None:
    """A head has 96 of 480 weights, a channel 24. At 26.25 % no head goes and 3.15 of 12 channels; at the end, 30 % are 6."""
    settings = Settings(
        sparsity_ratio=0.3, steps=2, sparsity_type="structured", channel_multiple=1, prune_method="magnitude", **PRUNE
    )
    _, records = losa.run(model(3), IDS, [], settings)
    assert [record.target for record in records] == pytest.approx([0.2625, 0.3])
    for record, channels in zip(records, (3, 6), strict=True):
        assert record.realised == pytest.approx([24 * channels / 480] * 3)
        assert all(int((~layers["down"].mask.any(axis=0)).sum()) == channels for layers in record.layers)
        assert all(layers["o"].mask.all() for layers in record.layers)


def test_importance_is_measured_on_the_first_sequences() -> None:
    dense = model(4)
    _, [record] = losa.run(dense, IDS, [], Settings(steps=1, rmi_samples=3, finetune=False))
    np.testing.assert_array_equal(record.importance, rates.mutual_information(dense, IDS[:3]))


def test_a_block_of_a_mixed_pattern_keeps_no_more_than_it_has() -> None:
    """The most important block has one weight of four already, so the others keep eleven of the twelve."""
    settings = Settings(sparsity_type="mixed-3:4")
    importance, previous = np.array([9.0, 1, 1, 1]), np.array([0.75, 0, 0, 0])
    _, groups = losa.block_targets(settings, 0.25, importance, np.ones(4), previous)
    assert groups == [(1, 4), (3, 4), (4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("schedule", "asked"),
    [("per_step", [(0, 2), (1, 2), (0, 2), (1, 2)]), ("whole_run", [(0, 4), (1, 4), (2, 4), (3, 4)])],
)
def test_every_optimizer_step_has_its_place_in_the_schedule(
    schedule: str, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two optimizer steps of two sequences at each of two steps."""
    found = []

    def factor(done: int, total: int, _: float) -> float:
        found.append((done, total))
        return 1.0

    monkeypatch.setattr(training.adamw, "lr_factor", factor)
    part = [{"input_ids": row, "labels": row} for row in IDS[:4]]
    losa.run(model(3), IDS, [part] * 2, Settings(steps=2, batch_size=2, lr_schedule=schedule))
    assert found == asked


@pytest.mark.parametrize("rule", list(rates.RULES))
def test_a_model_with_a_zero_more_than_is_asked_for_keeps_it(rule: str) -> None:
    dense = random_llama(replace(SIZES, hidden=32, intermediate=48, head_dim=0), 3, tied=False, seed=0)
    half, _ = losa.run(dense, IDS, [], Settings("magnitude", 0.5, steps=1, **PRUNE))
    half.blocks[0].weights["q"][half.blocks[0].weights["q"] != 0] *= np.arange(512) > 0
    _, records = losa.run(half, IDS, [], Settings("magnitude", 0.5, steps=2, layer_sparsity=rule, finetune=False))
    size = sum(weight.size for weight in half.blocks[0].weights.values())
    for record in records:
        assert record.realised == [0.5 + 1 / size, 0.5, 0.5]
        assert record.target == pytest.approx(0.5 + 1 / (3 * size), rel=1e-12)


def test_the_middle_makes_up_for_dense_blocks() -> None:
    _, [record] = losa.run(model(4), IDS, [], Settings(sparsity_ratio=0.3, steps=1, dense_blocks=(1, 1), **PRUNE))
    assert record.sparsity == pytest.approx([0.0, 0.6, 0.6, 0.0])
    assert [record.realised[0], record.realised[3]] == [0.0, 0.0]


def test_taylor_removes_the_structures_that_the_loss_depends_on_least() -> None:
    """|W · G| summed over all that goes with a channel or a key-value head, weight by weight; a head has two rows of queries."""
    dense = model(2)
    options = {"sparsity_type": "structured", "channel_multiple": 1, "prune_method": "taylor", "sparsity_ratio": 0.6}
    _, [record] = losa.run(dense, IDS, [], Settings(steps=1, **options, **PRUNE))
    for block, gradients, layers in zip(dense.blocks, llama.weight_gradients(dense, IDS), record.layers, strict=True):
        size = {name: np.abs(W * gradients[name]) for name, W in block.weights.items()}
        channels = [size["gate"][c].sum() + size["up"][c].sum() + size["down"][:, c].sum() for c in range(12)]
        heads = [
            size["k"][2 * h : 2 * h + 2].sum()
            + size["v"][2 * h : 2 * h + 2].sum()
            + size["q"][4 * h : 4 * h + 4].sum()
            + size["o"][:, 4 * h : 4 * h + 4].sum()
            for h in range(2)
        ]
        assert layers["k"].mask.any(axis=1).tolist() == [h == np.argmax(heads) for h in (0, 0, 1, 1)]
        kept = layers["down"].mask.any(axis=0)
        assert np.flatnonzero(kept).tolist() == sorted(np.argsort(channels)[-int(kept.sum()) :])
        assert 0 < kept.sum() < 12


def test_a_projection_that_is_zero_already_spares_the_others() -> None:
    """The block reaches its rate: its other projections lose what is left to prune. Magnitudes need no whole rows."""
    dense = model(3)
    dense.blocks[1].weights["q"][:] = 0
    _, [record] = losa.run(dense, IDS, [], Settings("magnitude", 0.6, steps=1, **PRUNE))
    assert record.realised == pytest.approx([0.6] * 3, abs=7 / 480)
    assert max(record.realised) <= 0.6


def test_gradients_are_summed_before_or_after_their_sign_is_lost() -> None:
    """Taylor's is the gradient of the whole text; Pruner-Zero's has no sign, so that sequences cannot cancel."""
    dense = model(2)
    taylor = lockstep.gather_gradients(dense, IDS, METHODS["taylor"])
    sizes = lockstep.gather_gradients(dense, IDS, METHODS["pruner_zero"])
    assert taylor is not None
    assert sizes is not None
    whole = llama.weight_gradients(dense, IDS)
    for index, block in enumerate(dense.blocks):
        for name in block.weights:
            np.testing.assert_allclose(taylor[index][name], len(IDS) * whole[index][name], rtol=1e-9, atol=1e-12)
            squares = sum(llama.weight_gradients(dense, row[None])[index][name] ** 2 for row in IDS)
            np.testing.assert_allclose(sizes[index][name] ** 2, squares, rtol=1e-9, atol=1e-15)
    assert lockstep.gather_gradients(dense, IDS, METHODS["wanda"]) is None


def test_the_least_gradient_counts_as_none() -> None:
    """minmax of 1, 2 and 5 is 0, a quarter and 1; equal gradients count nothing."""
    np.testing.assert_allclose(pruner_zero_score([[1.0, -2.0, 3.0]], [[1.0, 2.0, 5.0]]), [[0.0, 1.0, 9.0]])
    np.testing.assert_array_equal(pruner_zero_score([[1.0, -2.0]], [[2.0, 2.0]]), [[0.0, 0.0]])
