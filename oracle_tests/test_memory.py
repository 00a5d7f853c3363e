"""The shapes of a model and the bytes that work on it takes: every figure against one worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from oracle_tests.tiny_material import SIZES
from tiny_models.random_models import random_model
from torch_impl.engine.adapted_linear import attach_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning.sizes import BlockShapes, Sizes
from torch_impl.masks.prune import METHODS

OPT = replace(SIZES, gated=False)
WIDE = replace(SIZES, itemsize=8, width=20)
MAGNITUDE, WANDA, SPARSEGPT, ALPS = (METHODS[name] for name in ("magnitude", "wanda", "sparsegpt", "alps"))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: SIZES.parameters, 300 + 260 + 200),
        (lambda: SIZES.prunable, 280 + 240),
        (lambda: SIZES.largest_prunable, 280),
        (lambda: SIZES.largest_projection, 96),
        # Rows and columns: 20 + 20 + 19 and 20 + 20 + 14.
        (lambda: SIZES.entries_per_rank, 113),
        (lambda: SIZES.weights(), 760 * 2),
        (lambda: SIZES.block(), 300 * 2),
        (lambda: SIZES.outside_blocks(), 200 * 2),
        # The fullest of three cards: 4, 4 and 4 rows of 8 and 7 numbers; 3, 4 and 2 rows of 12, 8 and 8 and 7 numbers.
        (lambda: SIZES.block(cards=3), 3 * (12 * 8 + 7) * 2),
        (lambda: SIZES.outside_blocks(cards=3), 3 * (6 * 8 + 22) * 2),
        (lambda: SIZES.weights(cards=3), (12 * 8 + 7 + 3 * 12 + 6 * 8 + 7 + 6 * 8 + 22) * 2),
        # float32 at least.
        (lambda: SIZES.adapters(7), 7 * 113 * 4),
        (lambda: WIDE.adapters(7), 7 * 113 * 8),
        (lambda: SIZES.stream(10), 10 * 8 * 2),
        # The attention's nine hidden states, or two and the MLP's three or two products.
        (lambda: SIZES.forward(10), 10 * 72 * 2),
        (lambda: WIDE.forward(10), 10 * 76 * 8),
        (lambda: replace(OPT, width=30).forward(10), 10 * 76 * 2),
        # Three windows of five tokens in two bytes, one in float32 twice.
        (lambda: SIZES.logits(3, 5), 17 * 5 * (3 * 2 + 4 + 4)),
        (lambda: WIDE.logits(3, 5), 17 * 5 * (3 * 8 + 8 + 8)),
        # Norms in float32, and Hessians.
        (lambda: SIZES.statistics(MAGNITUDE), 0),
        (lambda: SIZES.statistics(WANDA), (3 * 8 + 12) * 4),
        (lambda: WIDE.statistics(SPARSEGPT), (3 * 64 + 144) * 8),
        # Gradients by the weights of the larger block.
        (lambda: SIZES.statistics(METHODS["pruner_zero"]), 280 * 4),
        # What the method says of the largest projection, or a batch in the block.
        (lambda: SIZES.calibration(MAGNITUDE, 10), MAGNITUDE.workspace(12, 8, 2)),
        (lambda: SIZES.calibration(WANDA, 10), (3 * 8 + 12) * 4 + WANDA.workspace(12, 8, 2)),
        (lambda: SIZES.calibration(WANDA, 1000), (3 * 8 + 12) * 4 + 1000 * 72 * 2),
        (lambda: SIZES.calibration(SPARSEGPT, 1000), (3 * 64 + 144) * 4 + 1000 * 72 * 2),
        # The widest input, not the largest projection.
        (lambda: SIZES.calibration(SPARSEGPT, 1), (3 * 64 + 144) * 4 + SPARSEGPT.workspace(8, 12, 2)),
        # Two wide copies, three bytes of masks, the lowest scores and their indices.
        (lambda: MAGNITUDE.workspace(12, 8, 2), 96 * (2 * 4 + 3 + 12)),
        (lambda: WANDA.workspace(12, 8, 2), 96 * (2 * 4 + 3 + 12)),
        (lambda: MAGNITUDE.workspace(2**13, 2**13, 2), 2**26 * (2 * 4 + 3 + 12)),
        (lambda: WANDA.workspace(2**13, 2**13, 2), 2**26 * (2 * 4 + 3 + 12)),
        # Five matrices of the Hessian's size, or the projection's copies.
        (lambda: SPARSEGPT.workspace(8, 12, 2), 5 * 144 * 4),
        (lambda: SPARSEGPT.workspace(2**20, 64, 2), 2**26 * (4 * 4 + 3)),
        # Four matrices of the Hessian's size in float64; or two in float32 and eight copies of the projection, masks, choosing.
        (lambda: ALPS.workspace(2, 12, 2), 33 * 144),
        (lambda: ALPS.workspace(2**20, 64, 2), 2 * 4 * 2**12 + 2**26 * (8 * 4 + 6 + 12)),
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
    ],
)
def test_figures_by_hand(found: Callable[[], int], expected: int) -> None:
    assert found() == expected


def test_sizes_of_a_model() -> None:
    """LLaMA, three blocks of 32 channels, two key heads of 8, an MLP of 48, a tied vocabulary of 257; OPT has biases."""
    model = random_model("llama-gqa")
    projections = ((32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48))
    expected = Sizes(
        itemsize=2,
        blocks=(BlockShapes((*projections, (32,), (32,)), projections),) * 3,
        outside=((257, 32), (32,)),
        inputs=(32, 32, 32, 48),
        hidden=32,
        width=48,
        gated=True,
        keys=16,
        vocabulary=257,
    )
    assert Sizes.of(Decoder(model), torch.bfloat16) == expected
    attach_adapters(Decoder(model), 1.0)
    assert Sizes.of(Decoder(model), torch.bfloat16) == expected, "adapters are no weights of the model"
    found = Sizes.of(Decoder(random_model("opt")), torch.float32)
    assert (found.itemsize, found.gated, found.width, found.inputs) == (4, False, 48, (32, 32, 32, 48))
    assert found.block() == 4 * (4 * (32 * 32 + 32) + (48 * 32 + 48) + (32 * 48 + 32) + 2 * 2 * 32)


def test_blocks_may_differ() -> None:
    """The widest MLP counts wherever it is."""
    model = random_model("llama-gqa")
    for projection, (rows, columns) in (("gate_proj", (64, 32)), ("up_proj", (64, 32)), ("down_proj", (32, 64))):
        setattr(model.model.layers[1].mlp, projection, torch.nn.Linear(columns, rows, bias=False))
    found = Sizes.of(Decoder(model), torch.float32)
    assert (found.width, found.inputs, found.largest_projection) == (64, (32, 32, 32, 64), 64 * 32)
    attention = 2 * 64 + 2 * 48
    assert found.entries_per_rank == 3 * attention + 2 * 3 * 80 + 3 * 96
