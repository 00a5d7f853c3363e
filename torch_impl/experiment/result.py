"""The result of a run: the figures in losa_result.json, and all files of its folder except the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch_impl.engine import distributed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import report
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.experiment.metrics import write_json


def summarise(
    config: Config,
    family: str,
    rows: dict[str, dict[str, float]],
    sizes: dict[str, int],
    after_step: list[float],
    material: Material,
    verification: pretrained.Verification,
    reloaded: str,
) -> dict[str, Any]:
    """Build the content of losa_result.json.

    rows: perplexity, sparsity and seconds of dense, pruned_at_once and losa. reloaded: how the saved model was reloaded.
    """
    packed = {"dense": sizes["dense"], "pruned_at_once": sizes["packed"], "losa": sizes["packed"]}
    return {
        "model": config.model.model,
        "family": family,
        "method": config.prune.prune_method,
        "sparsity_type": config.prune.sparsity_type,
        "target_sparsity": config.prune.final_sparsity,
        **{name: {**row, "bytes": sizes["dense"], "packed_bytes": packed[name]} for name, row in rows.items()},
        "perplexity_after_step": after_step,
        "evaluation": material.evaluation_facts,
        "train_examples": len(material.examples),
        "lr_schedule": config.training.lr_schedule,
        "loss": config.training.loss,
        "step_shares": config.text.shares(config.prune.steps),
        "verification": {
            "reloaded": reloaded,
            "largest_logit_difference": verification.logit_difference,
            "projections": len(verification.zeros),
            "sparsity_pruned_and_saved": verification.zeros,
        },
    }


def write_results(
    folder: Path,
    config: Config,
    environment: dict[str, Any],
    result: dict[str, Any],
    records: list[StepRecord],
) -> None:
    """Write all files of a run's folder except the weights, in process 0."""
    if not distributed.is_main_process():
        return
    write_json(folder / "losa_result.json", result)
    write_json(folder / "steps.json", [record.as_dict() for record in records])
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / "environment.json", environment)
    report.write(folder, result, records)
    (folder / "model" / "README.md").write_text(report.model_card(result), encoding="utf-8", errors="backslashreplace")
