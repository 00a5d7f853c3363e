"""What makes two runs the same: options, model, tokens. An unfinished run goes on only as what it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch_impl.experiment.config import Config

logger = logging.getLogger(__name__)

# Options that say where and how often things are written, not what the run is.
ELSEWHERE = (
    "output_dir",
    "overwrite",
    "dry_run",
    "config",
    "preset",
    "resume",
    "accept_changes",
    "save_every",
    "keep_points",
)
VERSIONS = ("torch", "transformers", "device", "threads")
CONTENTS = {
    "model_sha256": "the model (its weights)",
    "calibration_tokens_sha256": "the calibration text (calibration_data)",
    "finetune_tokens_sha256": "the fine-tuning text (finetune_data)",
    "evaluation_tokens_sha256": "the evaluation text (eval_data)",
}


def options(config: Config) -> dict[str, Any]:
    """Every option that a run's bits may depend on, by name."""
    values = {name: value for section in config.as_dict().values() for name, value in section.items()}
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def check_options(before: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Compare with the options that the run began with; an option that an older version did not know has its default.

    Errors: ValueError with every option that differs and is not accepted, or that this version does not know.
    """
    unknown = sorted(set(before) - set(now))
    if unknown:
        shown = ", ".join(f"{name} = {before[name]!r}" for name in unknown)
        raise ValueError(
            f"the run began with {shown}, which this version does not know; resume with the version that began the run, "
            "or start over with --overwrite"
        )
    began = {**options(Config()), **before}
    changed = [name for name in sorted(now) if began[name] != now[name] and name not in accepted]
    if changed:
        shown = "; ".join(f"{name} is {now[name]!r}, the run began with {began[name]!r}" for name in changed)
        raise ValueError(f"{shown}; allowed with --resume: the same options, but for those named by --accept_changes")


def check_material(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Hold an environment against the one a run began in: other versions are logged, other contents refused.

    Errors: ValueError naming the model or text that is not what it was.
    """
    for name in VERSIONS:
        if before.get(name) != now.get(name):
            logger.warning(
                "%s is %s, the run began with %s: its bits may differ", name, now.get(name), before.get(name)
            )
    changed = [(name, what) for name, what in CONTENTS.items() if before.get(name) != now.get(name)]
    if changed:
        shown = "; ".join(
            f"{what} has changed since the run began: {name} is {str(now.get(name))[:12]}, not {str(before.get(name))[:12]}"
            for name, what in changed
        )
        raise ValueError(f"{shown}; resume with what the run began with, or start over with --overwrite")
