"""All files of a run's folder except the weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl.engine import distributed
from torch_impl.engine.files import write_atomically
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import model_card, report_page
from torch_impl.experiment.config import Config
from torch_impl.experiment.identity import ELSEWHERE
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
    write_atomically(folder / "losa_config.toml", as_toml(config).encode(errors="backslashreplace"))
    write_json(folder / "environment.json", environment)
    report_page.write(folder, result, records, config.as_dict(), environment)
    card = model_card.of_saved(result)
    (folder / "model" / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def as_toml(config: Config) -> str:
    """Write the options that determine a run as a TOML file for --config; its output folder is left to the next run."""
    lines = ["# The options of this run: losa run --config losa_config.toml --output_dir NEW repeats it."]
    for section, values in config.as_dict().items():
        shown = {
            name: value for name, value in values.items() if value is not None and name not in (*ELSEWHERE, "devices")
        }
        if shown:
            lines += ["", f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in shown.items())]
    return "\n".join([*lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    # What JSON and TOML write alike: whole numbers, true and false, and strings; but TOML has no surrogates for an emoji.
    return json.dumps(value, allow_nan=False, ensure_ascii=False).replace("\x7f", "\\u007f")
