"""Pruning block by block: what each line of `lockstep.prune_model` is handed, by definitions written differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oracle_tests.llama_pair import random_llama
from reference import llama, lockstep, losa
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


@pytest.mark.parametrize(("window", "sizes"), [(1, [1, 1, 1, 1]), (2, [1, 2, 2, 2]), (3, [1, 2, 3, 3])])
def test_a_window_ends_with_the_pruned_block(window: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So many blocks or all there are, on the stream before the first of them, for the dense output of the last."""
    dense, calls = model(4), []

    def scaled(blocks: Sequence[llama.Block], _: Any, inputs: np.ndarray, targets: np.ndarray, *__: Any) -> list[Any]:
        """Change the last block alone, so that the blocks before it stay what the stream has passed."""
        calls.append((len(blocks), inputs, targets))
        weights = {name: 0.9 * W for name, W in blocks[-1].weights.items()}
        return [*blocks[:-1], replace(blocks[-1], weights=weights)]

    monkeypatch.setattr(lockstep.reconstruct, "reconstruct_blocks", scaled)
    settings = Settings(sparsity_ratio=0.5, steps=1, reconstruct_epochs=1, reconstruct_window=window, **PRUNE)
    merged, [record] = losa.run(dense, IDS, [], settings)
    assert [size for size, _, _ in calls] == sizes
    streams = [dense.embedding[IDS], *(block.output for block in llama.forward(merged, IDS).blocks)]
    wanted = [block.output for block in llama.forward(dense, IDS).blocks]
    for index, (size, inputs, targets) in enumerate(calls):
        np.testing.assert_allclose(inputs, streams[index + 1 - size], rtol=1e-12)
        np.testing.assert_array_equal(targets, wanted[index])
        D, S = wanted[index].reshape(-1, 8), streams[index + 1].reshape(-1, 8)
        expected = (((D - S) ** 2).sum(axis=0) / (D**2).sum(axis=0)).mean()
        assert record.errors[index] == pytest.approx(expected, rel=1e-10), "of the reconstructed block"


def test_channels_make_up_for_heads_at_the_last_step_alone() -> None:
    """A head has 96 of 480 weights, a channel 24. At 26.25 % no head goes, and 3.15 of 12 channels; at the end, 30 % are 6 channels."""
    settings = Settings(
        sparsity_ratio=0.3, steps=2, sparsity_type="structured", channel_multiple=1, prune_method="magnitude", **PRUNE
    )
    _, records = losa.run(model(3), IDS, [], settings)
    assert [record.target for record in records] == pytest.approx([0.2625, 0.3])
    for record, channels in zip(records, (3, 6), strict=True):
        assert record.realised == pytest.approx([24 * channels / 480] * 3)
        assert all(int((~layers["down"].mask.any(axis=0)).sum()) == channels for layers in record.layers)
        assert all(layers["o"].mask.all() for layers in record.layers)
