"""Results of runs and comparisons: each figure where it belongs, under the key that losa_result.json has always had."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import torch_impl
from oracle_tests.plans import config
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import provenance
from torch_impl.experiment.result import Measured, MeasuredModels, SavedBytes, summarise


def test_the_result_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """losa_result.json by hand: the rows differ in every figure but the dense bytes."""
    some = config(model="some/model", loss="kl", lr_schedule="whole_run", prune_method="sparsegpt", sparsity_ratio=0.6)
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, name_or_path="nowhere")
    material = SimpleNamespace(evaluation_facts={"windows": 3}, examples=[1, 2, 3, 4, 5], model=model)
    record = StepRecord(5, 0.6, [], [0.6], [0.6], [0.1], [7], [1.0], {})
    samples = {"dense": {"prompt": "a", "text": "b"}}
    monkeypatch.setattr(provenance, "commit", lambda: "abc")
    monkeypatch.setattr(provenance, "software", provenance.software.__wrapped__)
    monkeypatch.setattr(provenance, "peak_memory", lambda device: {"host": 5})
    zeros = {"model.layers.0.mlp.up_proj": (0.25, 0.5)}
    found = summarise(
        some,
        material,  # type: ignore[arg-type]
        "gated",
        MeasuredModels(
            Measured(1.5, 0.125, 2.5), Measured(3.5, 0.25, 4.5), Measured(5.5, 0.5, 6.5), Measured(7.5, 0.75, 8.5)
        ),
        SavedBytes(dense=1000, packed=700),
        [8.5, 9.5],
        pretrained.Verification(logit_difference=0.75, zeros=zeros),
        "over 2 processes",
        99.5,
        [record],
        samples,
    )
    assert json.loads(json.dumps(found.as_dict())) == {
        "model": "some/model",
        "family": "gated",
        "dtype": "bfloat16",
        "method": "sparsegpt",
        "sparsity_type": "unstructured",
        "target_sparsity": 0.6,
        "dense": {"perplexity": 1.5, "sparsity": 0.125, "seconds": 2.5, "bytes": 1000, "packed_bytes": 1000},
        "pruned_at_once": {"perplexity": 3.5, "sparsity": 0.25, "seconds": 4.5, "bytes": 1000, "packed_bytes": 700},
        "license": None,
        "one_shot": {"perplexity": 7.5, "sparsity": 0.75, "seconds": 8.5, "bytes": 1000, "packed_bytes": 700},
        "losa": {"perplexity": 5.5, "sparsity": 0.5, "seconds": 6.5, "bytes": 1000, "packed_bytes": 700},
        "perplexity_after_step": [8.5, 9.5],
        "footprints": None,
        "evaluation": {"windows": 3},
        "train_examples": 5,
        "lr_schedule": "whole_run",
        "loss": "kl",
        "step_shares": [0.1, 0.9],
        "verification": {
            "reloaded": "over 2 processes",
            "largest_logit_difference": 0.75,
            "projections": 1,
            "sparsity_pruned_and_saved": {"model.layers.0.mlp.up_proj": [0.25, 0.5]},
        },
        "seconds_in_all": 99.5,
        "seed": 0,
        "learning_rate": some.training.learning_rate,
        "ranks": [7],
        "reconstruct_epochs": 0,
        "rates": "rmi",
        "dense_blocks": [0, 0],
        "finetuned": True,
        "steps": some.prune.steps,
        "peak_memory": {"host": 5},
        "samples": samples,
        "software": {"name": "losa-oracle", "version": torch_impl.__version__, "commit": "abc"},
        "texts": {
            "calibration": some.text.calibration_data,
            "evaluation": some.text.eval_data,
            "fine-tuning": some.text.finetune_data,
        },
    }
