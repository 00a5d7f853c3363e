"""All recipes that make a model smaller, on records of many lengths: in bfloat16, and in captured graphs."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests import emulated_graphs
from oracle_tests.small_runs import ROOT, WORDS, arguments, make_place
from oracle_tests.tiny_material import examples_for
from torch_impl.commands import compare
from torch_impl.engine import graphs as graphs_module
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.experiment.baselines import BASELINES
from torch_impl.experiment.baselines.decoding import decoding_cost
from torch_impl.experiment.comparison import cells
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.config import parse
from torch_impl.experiment.material import load_material

RESULTS = tomllib.loads((ROOT / "docs" / "results" / "structured.toml").read_text(encoding="utf-8"))
# The shipped ones; those of its own differ in options, and leave more blocks dense than a tiny model has.
RECIPES = list(
    dict.fromkeys(r for matrix in RESULTS["matrix"] for r in matrix["recipes"] if r not in RESULTS["recipes"])
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("smaller"))
    draw, words = random.Random(0), WORDS.split()
    records = [
        {
            "instruction": " ".join(draw.choices(words, k=draw.randint(1, 12))),
            "output": " ".join(draw.choices(words, k=9)),
        }
        for _ in range(40)
    ]
    (place / "records.json").write_text(json.dumps(records))
    return place


def test_every_recipe_runs_in_bfloat16_on_records(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparsity, parameters and speed of each are measured, and no run fails."""
    monkeypatch.setattr(cells, "decoding_cost", partial(decoding_cost, tokens=2, runs=1))
    path = tmp_path / "some.toml"
    path.write_text(
        f"speed = true\n[[matrix]]\nsparsity = [0.3]\nrecipes = {json.dumps(RECIPES)}\nlearning_rates = [1e-3]\n"
    )
    changes = {"output_dir": None, "learning_rate": None, "steps": None, "output": tmp_path / "out", "eval_windows": 4}
    changes |= {"finetune_data": place / "records.json", "train_seqlen": 64, "dtype": "bfloat16"}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_examples": 20}
    status = compare.main([str(path), *arguments(place, **changes)])
    assert (status, [line for line in capsys.readouterr().err.splitlines() if "failed" in line]) == (0, [])
    outcomes = {o.labels["recipe"]: o for o in Results(tmp_path / "out").together().values()}
    assert outcomes.keys() == {"dense", *RECIPES}
    for recipe in RECIPES:
        found = outcomes[recipe]
        assert 0.25 < found.sparsity < 0.5, recipe
        assert found.parameters < outcomes["dense"].parameters
        assert min(found.tokens_per_second.values()) > 0
        assert found.facts["dtype"] == "bfloat16"


@pytest.mark.parametrize(("name", "hold"), [("slicegpt", "off"), ("loraprune", "on"), ("loraprune", "off")])
def test_training_in_graphs_is_training_launch_by_launch(
    name: str, hold: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of another class, and masks that change between the steps without any graph being captured again."""
    monkeypatch.setattr(Gradients, "_may_capture", lambda self: self._config.cuda_graphs)
    monkeypatch.setattr(graphs_module, "_on_gpu", lambda owned: True)
    graphs, results = emulated_graphs.emulate(monkeypatch), []
    changes: dict[str, Any] = {"output_dir": None, "steps": 1, "initial_rank": 8, "sparsity_ratio": 0.3}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "hold_merged": hold}
    config = parse(arguments(place, **changes), data_required=True)
    material = load_material(config)
    model = material.model.double()
    material = dataclasses.replace(material, examples=examples_for(model, [5, 9, 5, 7, 9, 5, 7, 9] * 6))
    for captures in (True, False):
        training = dataclasses.replace(config.training, cuda_graphs=captures)
        made = BASELINES[name].run(
            copy.deepcopy(model), model, material, dataclasses.replace(config, training=training)
        )
        results.append(Decoder(made.model).weights)
        assert made.optimizer_steps == 12
    assert sum(graph.replays for graph in graphs) > 2
    # One for each of three lengths, one for the merged weights if they are held, and one for the scores of LoRAPrune.
    assert len(graphs) == 3 + (hold == "on") + (name == "loraprune")
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
