"""The identity of a run: options, model and tokens. A run is resumed only if they are unchanged."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch_impl.experiment.config import Config

logger = logging.getLogger(__name__)

# Options about where and how often files are written; they do not affect the result.
ELSEWHERE = (
    "output_dir",
    "overwrite",
    "dry_run",
    "plan_for",
    "config",
    "preset",
    "resume",
    "accept_changes",
    "save_every",
    "keep_points",
    "report_to",
)
VERSIONS = ("torch", "transformers", "device", "threads")
CONTENTS = {
    "model_sha256": "the model (its weights)",
    "calibration_tokens_sha256": "the calibration text (calibration_data)",
    "finetune_tokens_sha256": "the fine-tuning text (finetune_data)",
    "evaluation_tokens_sha256": "the evaluation text (eval_data)",
}


def options(config: Config) -> dict[str, Any]:
    """Return all options that may affect a run's result, by name."""
    values = {name: value for section in config.as_dict().values() for name, value in section.items()}
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def check_options(before: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Compare with the original options of a run. An option that an older version did not have counts as its default.

    Errors: ValueError listing the options that differ and are not accepted, or that this version does not know.
    """
    unknown = sorted(set(before) - set(now))
    if unknown:
        shown = ", ".join(f"{name} = {before[name]!r}" for name in unknown)
        raise ValueError(
            f"the run began with {shown}, which this version does not know; resume with the version that began it, "
            "or start over with --overwrite"
        )
    began = {**options(Config()), **before}
    changed = [name for name in sorted(now) if began[name] != now[name] and name not in accepted]
    if changed:
        shown = "; ".join(f"{name} is {now[name]!r}, the run began with {began[name]!r}" for name in changed)
        raise ValueError(
            f"{shown}; resume with the original options (--accept_changes lets some of them change; see --help)"
        )


def check_material(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare with the original environment of a run: log other versions, refuse another model or text.

    Errors: ValueError naming the model or text that has changed.
    """
    for name in VERSIONS:
        if before.get(name) != now.get(name):
            logger.warning("%s is %s, the run began with %s: results may differ", name, now.get(name), before.get(name))
    changed = [(name, what) for name, what in CONTENTS.items() if before.get(name) != now.get(name)]
    if changed:
        shown = "; ".join(
            f"{what} has changed since the run began: {name} is {str(now.get(name))[:12]}, not {str(before.get(name))[:12]}"
            for name, what in changed
        )
        raise ValueError(f"{shown}; restore the original, or start over with --overwrite")
