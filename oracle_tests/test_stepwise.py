"""Runs in float32 and bf16, step by step: production's result of a step against the spec's from the same state.

A run in half precision diverges from the spec's at the first score that rounding moves across a threshold. So the spec starts every
step from production's exact weights and adapters, and computes it in float64. Production's decisions equal the spec's except near
ties, and its numbers are within `STEPWISE`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests.assertions import assert_close, assert_exact
from oracle_tests.tolerances import STEPWISE, one_rounding
from oracle_tests.whole_runs import SIZES, Case, run_production, special
from reference import adapted_linear, llama, lockstep, losa, rank, schedule
from reference import training as spec_training
from reference.adapted_linear import Layers
from reference.rates import mutual_information

CASES = {
    "wanda": special(steps=4, rank_shrink="truncate", biased=True),
    "sparsegpt": special(prune_method="sparsegpt", rank_shrink="truncate", loss="kl", sparsity_ratio=0.5),
    "magnitude": special(prune_method="magnitude", rank_shrink="truncate", sizes=SIZES["mqa"], widths=(8, 24)),
    "groups": special(sparsity_type="mixed-3:8", rank_shrink="truncate", loss="kl", blocks=5),
}


def rounded(model: llama.Llama, dtype: torch.dtype) -> llama.Llama:
    """The model that production holds, in float64."""

    def one(array: np.ndarray) -> np.ndarray:
        return torch.tensor(array).to(dtype).double().numpy()

    blocks = tuple(
        llama.Block(
            one(block.attention_norm),
            one(block.mlp_norm),
            {name: one(weight) for name, weight in block.weights.items()},
            {name: one(bias) for name, bias in block.biases.items()},
        )
        for block in model.blocks
    )
    return llama.Llama(model.sizes, one(model.embedding), blocks, one(model.norm), one(model.head))


def off(expected: Any, found: Any) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected, found = (
        np.concatenate([np.ravel(part) for part in parts]) if isinstance(parts, list) else np.ravel(parts)
        for parts in (expected, found)
    )
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(float).tiny))


def with_pruned(before: list[Layers], after: list[Layers]) -> list[Layers]:
    """Pruned weights of the step, adapters as they were before it."""
    return [
        {name: replace(layer, weight=later[name].weight) for name, layer in earlier.items()}
        for earlier, later in zip(before, after, strict=True)
    ]


def pruning(
    case: Case, dense: llama.Llama, before: list[Layers], record: losa.StepRecord, nm: list[Any]
) -> dict[str, float]:
    """Each block pruned by the spec, fed by the blocks that production has pruned."""
    stream = dense_stream = dense.embedding[case.calibration()]
    last = record.step == case.settings.steps
    pruned = with_pruned(before, record.layers)
    errors, masks, kept = [], [], []
    for index, block in enumerate(dense.blocks):
        merged = adapted_linear.merged_block(block, before[index], case.settings)
        found = lockstep._prune_block(
            merged, before[index], stream, dense, case.settings, record.sparsity[index], nm[index], None, last
        )
        for name, layer in found.items():
            ours = pruned[index][name]
            masks.append(layer.mask != ours.mask)
            # A weight that goes in one alone moves the rest of its row, by SparseGPT.
            same = ~masks[-1].any(1)
            kept.append((layer.weight[same], ours.weight[same]))
        dense_stream = llama.block_forward(block, dense_stream, dense.sizes).output
        stream = llama.block_forward(
            adapted_linear.merged_block(block, pruned[index], case.settings), stream, dense.sizes
        ).output
        hidden = dense.sizes.hidden
        errors.append(rank.reconstruction_error(dense_stream.reshape(-1, hidden), stream.reshape(-1, hidden)))
    return {
        "mask entries that differ (share)": float(np.concatenate([mask.ravel() for mask in masks]).mean()),
        "pruned weights": off([a for a, _ in kept], [b for _, b in kept]),
        "reconstruction error": float(np.abs(np.array(record.errors) / errors - 1).max()),
    }


def training(
    case: Case, dense: llama.Llama, before: list[Layers], record: losa.StepRecord, position: tuple[int, int]
) -> dict[str, float]:
    start = adapted_linear.resize(with_pruned(before, record.layers), record.ranks, record.step, case.settings)
    trained, losses = spec_training.train(dense, start, case.parts()[record.step - 1], case.settings, position)
    assert len(losses) == len(record.losses)
    moved, found = (
        [later - P for P, later in zip(adapted_linear.parameters(start), adapted_linear.parameters(ours), strict=True)]
        for ours in (trained, record.layers)
    )
    return {
        "loss": float(np.abs(np.array(record.losses) / losses - 1).max()),
        "what training moved": off(moved, found),
    }


def figures(case: Case, dtype: torch.dtype) -> list[dict[str, float]]:
    """Differences between production's numbers and the spec's at every step; also checks production's decisions."""
    settings = case.settings
    production = run_production(case, dtype)
    dense = rounded(case.model(), dtype)
    sizes = np.array([sum(weight.size for weight in block.weights.values()) for block in dense.blocks], dtype=float)
    positions = spec_training.lr_positions(case.parts(), settings)
    before, rates = adapted_linear.attach_adapters(dense), np.zeros(case.blocks)
    result = []
    for record in production.records:
        position = positions[record.step - 1]
        target = schedule.cubic_sparsity(record.step, settings.steps, settings.final_sparsity)
        current = adapted_linear.merge_adapters(dense, before, settings.scale)
        importance = mutual_information(current, case.calibration()[: settings.rmi_samples])
        rates, nm = losa.block_targets(settings, target, np.array(record.importance), sizes, rates)
        assert_close("rates", rates, np.array(record.sparsity), 1e-12)
        assert record.ranks == losa._allocate_ranks(settings, record.step, record.errors)
        result.append({"importance": float(np.abs(np.array(record.importance) / importance - 1).max())})
        result[-1] |= pruning(case, dense, before, record, nm) | training(case, dense, before, record, position)
        before = record.layers
    for ours, block in zip(production.merged, before, strict=True):
        for name, layer in block.items():
            merged = layer.merged(settings.scale)
            assert_exact(f"{name}, zeros", merged == 0, ours[name] == 0)
            terms = np.abs(layer.weight) + settings.scale * np.abs(layer.B) @ np.abs(layer.A)
            assert (np.abs(ours[name] - merged) <= one_rounding(dtype, np.abs(merged), terms)).all(), name
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", STEPWISE, ids=str)
def test_every_step_is_the_spec_s(dtype: torch.dtype, name: str) -> None:
    for step, found in enumerate(figures(CASES[name], dtype), 1):
        for what, value in found.items():
            assert value <= STEPWISE[dtype][what], (
                f"step {step}, {what}: {value:.2e}, allowed {STEPWISE[dtype][what]:.1e}"
            )
