"""Bytes that a run holds: every figure against one worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from oracle_tests.tiny_material import SIZES
from tiny_models.random_models import random_model
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning.sizes import Sizes

OPT = replace(SIZES, gated=False)
WIDE = replace(SIZES, itemsize=8, width=20)
# Larger than what Wanda sorts at once, 2²⁵ entries.
LARGE = replace(SIZES, largest_projection=2**26)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: SIZES.stream(10), 10 * 8 * 2),
        # The attention's nine hidden states, or two and the MLP's three or two products.
        (lambda: SIZES.forward(10), 10 * 72 * 2),
        (lambda: WIDE.forward(10), 10 * 76 * 8),
        (lambda: replace(OPT, width=30).forward(10), 10 * 76 * 2),
        # Three windows of five tokens in two bytes, one in float32 twice.
        (lambda: SIZES.logits(3, 5), 17 * 5 * (3 * 2 + 4 + 4)),
        (lambda: WIDE.logits(3, 5), 17 * 5 * (3 * 8 + 8 + 8)),
        # Two wide copies, three bytes of masks, and 36 bytes of sorting.
        (lambda: SIZES.pruning("magnitude"), 96 * (2 * 4 + 3) + 96 * 36),
        (lambda: SIZES.pruning("wanda"), 96 * (2 * 4 + 3) + 96 * 36),
        (lambda: LARGE.pruning("magnitude"), 2**26 * (2 * 4 + 3 + 36)),
        (lambda: LARGE.pruning("wanda"), 2**26 * (2 * 4 + 3) + 2**25 * 36),
        # Four Hessians in float32 and five more of the largest, or the projection's copies.
        (lambda: SIZES.pruning("sparsegpt"), (3 * 64 + 144) * 4 + 5 * 144 * 4),
        (lambda: LARGE.pruning("sparsegpt"), (3 * 64 + 144) * 4 + 2**26 * (4 * 4 + 3)),
        (lambda: SIZES.calibration("wanda", 10), 96 * 47),
        (lambda: SIZES.calibration("wanda", 1000), 1000 * 72 * 2),
        (lambda: SIZES.calibration("sparsegpt", 1000), 1000 * 72 * 2 + (3 * 64 + 144) * 4),
        # Norms' inputs in float32; projections' inputs, attention and MLP in two bytes.
        (lambda: SIZES.kept_for_backward(compiled=False), 2 * 8 * 4 + (2 * 8 + 2 * 8 + 2 * 4 + 4 * 12) * 2),
        (lambda: OPT.kept_for_backward(compiled=False), 2 * 8 * 4 + (2 * 8 + 2 * 8 + 2 * 4 + 2 * 12) * 2),
        (lambda: SIZES.kept_for_backward(compiled=True), (2 * 8 + 2 * 8 + 2 * 4 + 2 * 12) * 2),
        (lambda: SIZES.kept_for_backward(compiled=True, recomputed=True), (2 * 8 + 2 * 8 + 2 * 4 + 12) * 2),
        (lambda: OPT.kept_for_backward(compiled=True), (2 * 8 + 2 * 8 + 2 * 4 + 12) * 2),
        # Value, gradient and moments in float32; merged weights twice, rounded ones and their gradients; a mask. The output's
        # error in float32 twice.
        (lambda: SIZES.reconstruction(10), 280 * (16 + 4 + 4 + 1) + 10 * (240 + 2 * 4 * 8)),
        (lambda: WIDE.reconstruction(10), 280 * (32 + 16 + 1) + 10 * (1088 + 2 * 8 * 8)),
        (lambda: SIZES.loss(10, distilled=True), 10 * 17 * (3 * 2 + 4 * 4)),
        (lambda: SIZES.loss(10, distilled=False), 10 * 17 * (2 * 2 + 2 * 4)),
        (lambda: replace(SIZES, vocabulary=2**20).loss(1024, distilled=False), 2**30 * 2 * 2 + 2**22 * 2 * 4),
        # Two blocks, and the largest piece of work: pruning, a window's forward pass, or its logits.
        (lambda: SIZES.working("wanda", 10, (3, 5)), 2 * 300 * 2 + 96 * 47),
        (lambda: SIZES.working("wanda", 10, (3, 50)), 2 * 300 * 2 + 150 * 72 * 2),
        (lambda: replace(SIZES, vocabulary=500).working("wanda", 10, (3, 5)), 2 * 300 * 2 + 500 * 5 * 14),
    ],
)
def test_figures_by_hand(found: Callable[[], int], expected: int) -> None:
    assert found() == expected


def test_sizes_of_a_model() -> None:
    """LLaMA, three blocks of 32 channels, two key heads of 8, an MLP of 48, a tied vocabulary of 257; OPT has biases."""
    model = random_model("llama-gqa")
    projections = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert Sizes.of(model, Decoder(model).family, torch.bfloat16) == Sizes(
        itemsize=2,
        parameters=257 * 32 + 32 + 3 * (projections + 2 * 32),
        outside=257 * 32 + 32,
        largest_block=projections + 2 * 32,
        prunable_of_blocks=[projections] * 3,
        entries_per_rank=3 * (2 * 64 + 2 * 48 + 3 * 80),
        largest_projection=48 * 32,
        inputs=[32, 32, 32, 48],
        hidden=32,
        width=48,
        gated=True,
        keys=16,
        vocabulary=257,
    )
    model = random_model("opt")
    found = Sizes.of(model, Decoder(model).family, torch.float32)
    assert (found.itemsize, found.gated, found.width, found.inputs) == (4, False, 48, [32, 32, 32, 48])
    assert found.largest_block == 4 * (32 * 32 + 32) + (48 * 32 + 48) + (32 * 48 + 32) + 2 * 2 * 32
