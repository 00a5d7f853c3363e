"""All files of a run's folder except the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine import distributed
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import report
from torch_impl.experiment.config import Config
from torch_impl.experiment.metrics import write_json
from torch_impl.experiment.result import Result


def write_results(
    folder: Path, config: Config, environment: dict[str, Any], result: Result, records: Sequence[StepRecord]
) -> None:
    """Write them, in process 0."""
    if not distributed.is_main_process():
        return
    write_json(folder / "losa_result.json", result.as_dict())
    write_json(folder / "steps.json", [record.as_dict() for record in records])
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / "environment.json", environment)
    report.write(folder, result, records)
    (folder / "model" / "README.md").write_text(report.model_card(result), encoding="utf-8", errors="backslashreplace")
