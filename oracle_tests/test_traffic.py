"""Bytes that travel between cards, worked out by hand; and the table of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oracle_tests.plans import PLAIN, config
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.config import CONFIGS, parse
from torch_impl.experiment.planning import table
from torch_impl.experiment.planning.geometry import GEOMETRIES, build
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import BlockShapes, Sizes
from torch_impl.experiment.planning.traffic import CalibrationTraffic, StepTraffic, calibration_traffic, step_traffic

# Two blocks of a (5, 4), a (4, 6), a (6, 4) and a norm; outside an embedding of 9 rows and a norm. Two bytes a number.
SIZES = Sizes(
    itemsize=2,
    blocks=(BlockShapes(((5, 4), (4, 6), (6, 4), (4,)), ((5, 4), (4, 6), (6, 4))),) * 2,
    outside=((9, 4), (4,)),
    inputs=(4, 6),
    hidden=4,
    width=6,
    gated=False,
    keys=4,
    vocabulary=9,
)
# On three cards the fullest holds 2, 2, 2 and 2 rows of a block, 3 and 2 of what lies outside.
BLOCK = 2 * (2 * 4 + 2 * 6 + 2 * 4 + 2)
OUTSIDE = 2 * (3 * 4 + 2)
HELD = 2 * BLOCK + OUTSIDE
ENTRIES = 2 * (9 + 10 + 10)
FEW = {"nsamples": 10, "seqlen": 5, "rmi_samples": 7}


def test_an_optimizer_step_of_three_cards() -> None:
    """Six sequences: two each, one micro-batch; the model twice. Gradients and a loss in float64."""
    some = config(**FEW)
    gradients = 2 * (4 * 7 * ENTRIES + 8) * 2 // 3
    assert step_traffic(some, SIZES, 3) == StepTraffic(weights=2 * HELD * 2, gradients=gradients)
    assert step_traffic(some, SIZES, 3).total == 2 * HELD * 2 + gradients
    assert step_traffic(config(steps=1, initial_rank=1), SIZES, 3).gradients == 2 * (4 * ENTRIES + 8) * 2 // 3
    assert step_traffic(config(loss="kl"), SIZES, 3).weights == 3 * HELD * 2
    many = config(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert step_traffic(many, SIZES, 3).weights == 3 * 2 * HELD * 2
    assert step_traffic(config(**PLAIN), SIZES, 3) == StepTraffic(0, 0), "nothing is trained"


def test_a_calibration_of_three_cards() -> None:
    # Sums of inputs' squares in float32, of two errors' sums and of Gram matrices in float64.
    sums = 4 * (4 + 6) + 2 * 8 * 4 + 8 * 49
    found = calibration_traffic(config(**FEW), SIZES, 3)
    assert found == CalibrationTraffic(
        weights=(3 * 2 * BLOCK + 2 * OUTSIDE) * 2,
        pruned=2 * 68 * 2,
        statistics=2 * 2 * sums * 2 // 3,
        reconstruction=0,
        # Of seven samples three are here; of 20 columns seven.
        features=2 * 4 * 7 * 2,
    )
    assert found.total == found.weights + found.pruned + found.statistics + found.features
    # Ten sequences in batches of three are four steps an epoch; each sums all gradients of a block, and once its channels' energy.
    trains = calibration_traffic(config(**FEW, reconstruct_epochs=2, reconstruct_batch_size=3), SIZES, 3)
    assert trains.reconstruction == 2 * 2 * (8 * 4 * 68 + 8 * 4) * 2 // 3
    assert trains.weights == (3 * 2 * BLOCK + 3 * OUTSIDE) * 2, "what calls a block is recorded once more"


@pytest.mark.parametrize(("method", "statistics"), [("sparsegpt", 4 * (16 + 36)), ("magnitude", 0)])
def test_without_mutual_information(method: str, statistics: int) -> None:
    found = calibration_traffic(config(layer_sparsity="uniform", prune_method=method), SIZES, 3)
    assert found.weights == (2 * 2 * BLOCK + OUTSIDE) * 2
    assert found.statistics == 2 * 2 * (statistics + 2 * 8 * 4) * 2 // 3
    assert found.features == 0


def test_a_single_card_receives_nothing() -> None:
    assert step_traffic(config(), SIZES, 1) == StepTraffic(0, 0)
    assert calibration_traffic(config(), SIZES, 1) == CalibrationTraffic(0, 0, 0, 0, 0)


# --- the table ---


def test_the_documented_table_is_what_the_formulas_say() -> None:
    assert table.table() in (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_a_row_of_the_table() -> None:
    """LLaMA-2-70B on eight cards, from the parameters' shapes."""
    h, m, v, kv = 8192, 28672, 32000, 1024
    projections = 2 * h * h + 2 * kv * h + 3 * m * h
    weights = 2 * (80 * (projections + 2 * h) + 2 * v * h + h) // 8
    row = next(line for line in table.table().splitlines() if line.startswith("| 70B | 8 |")).split(" | ")
    some = parse(["--config", str(CONFIGS / "llama_70b.toml"), "--model", "a/b"])
    found = peak(some, table.sizes_of("llama-2-70b"), Place("cuda", 8, 80 * 10**9))
    assert row[2:5] == [f"{found.device.total / 2**30:.1f}", f"{2 * weights / 2**30:.1f}", found.phase]
    # One micro-batch, the model twice, and what one of eight gets of it; sums twice.
    gradients = 2 * (4 * 10 * 80 * (2 * 2 * h + 2 * (h + kv) + 3 * (h + m)) + 8) * 7 / 8
    assert row[5] == f"{(2 * weights * 7 + gradients) / 2**30:.1f}"
    assert row[6] == f"{gradients / 2**20:.0f}"


def test_seventy_billion_parameters_fit_eight_cards() -> None:
    some = parse(["--config", str(CONFIGS / "llama_70b.toml"), "--model", "a/b"])
    sizes = table.sizes_of("llama-2-70b")
    fits = {cards: peak(some, sizes, Place("cuda", cards, 80 * 10**9)).device.total < 0.9 * 80e9 for cards in (2, 8)}
    assert fits == {2: False, 8: True}


def test_sizes_of_a_geometry_are_those_of_the_model() -> None:
    model = build("small", None, torch.device("cpu"), torch.float32)
    assert Sizes.of(Decoder(model), torch.bfloat16) == table.sizes_of("small")
    assert set(table.CARDS) == {1, 2, 4, 8, 16, 32, 64}
    assert GEOMETRIES.keys() >= {"llama-2-7b", "llama-2-13b", "llama-2-70b"}
