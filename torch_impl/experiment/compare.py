"""Compare LoSA with one-shot pruning: same adapters, data and number of training tokens, learning rates tuned for both.

    losa compare [options of losa run] --learning_rates 1e-3 2e-3 --seeds 0 1 2

One shot prunes to full sparsity at once, with uniform sparsities and ranks, then trains the same masked adapters on all parts
together. Learning rates are tuned with the first seed, by the perplexity on the first half of the evaluation windows. All
figures are for the second half.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_impl import losa
from torch_impl.engine import structure
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment import report
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.config import MOST_SEED, Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, load_material
from torch_impl.experiment.metrics import write_json
from torch_impl.experiment.planning import dry_run
from torch_impl.experiment.result import Comparison
from torch_impl.experiment.text.windows import split_parts

logger = logging.getLogger(__name__)

# Changes of each variant, by section of the configuration.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "one shot": {
        "prune": {"steps": 1, "layer_sparsity": "uniform"},
        "adapter": {"rank_allocation": "uniform"},
        "training": {"loss": "ce"},
    },
    "LoSA, paper's schedule and loss": {"training": {"lr_schedule": "per_step", "loss": "ce"}},
    "one shot, KL": {
        "prune": {"steps": 1, "layer_sparsity": "uniform"},
        "adapter": {"rank_allocation": "uniform"},
        "training": {"loss": "kl"},
    },
    "LoSA, one schedule, KL": {"training": {"lr_schedule": "whole_run", "loss": "kl"}},
    "LoSA, one schedule, KL, uniform rates": {
        "prune": {"layer_sparsity": "uniform"},
        "training": {"lr_schedule": "whole_run", "loss": "kl"},
    },
    "LoSA, one schedule, KL, uniform ranks": {
        "adapter": {"rank_allocation": "uniform"},
        "training": {"lr_schedule": "whole_run", "loss": "kl"},
    },
}

# Options of a run that this command sets or ignores, with the advice to give.
NOT_HERE = {
    "learning_rate": "; use --learning_rates",
    "seed": "; use --seeds",
    **dict.fromkeys(
        (
            "output_dir",
            "overwrite",
            "resume",
            "accept_changes",
            "save_every",
            "keep_points",
            "dry_run",
            "devices",
            "report_to",
            "baselines",
        ),
        ", which writes only the file of --json",
    ),
}


def variant_config(config: Config, name: str, rate: float, seed: int) -> Config:
    """Return the configuration of a variant at a learning rate and seed; the mean rank over all steps stays the same."""
    changes = VARIANTS[name]
    prune = dataclasses.replace(config.prune, **changes.get("prune", {}))
    rank = config.adapter.initial_rank + (config.prune.steps - prune.steps) // 2
    return dataclasses.replace(
        config,
        prune=prune,
        adapter=dataclasses.replace(config.adapter, **{"initial_rank": rank, **changes.get("adapter", {})}),
        training=dataclasses.replace(config.training, learning_rate=rate, **changes["training"]),
        text=dataclasses.replace(config.text, step_shares=None if prune.steps == 1 else config.text.step_shares),
        output=dataclasses.replace(config.output, seed=seed),
    )


def measure(config: Config, material: Material) -> tuple[float, float]:
    """Measure the merged model's perplexity on the first and second half of the evaluation windows; infinite if it diverged.

    Options, model and text are already checked, so an error means that the run diverged; it is logged.
    """
    model = copy.deepcopy(material.model)
    parts = split_parts(material.examples, config.text.shares(config.prune.steps))
    try:
        losa.run(model, material.calibration, parts, config.settings)
    except (FloatingPointError, ValueError) as error:
        logger.warning("learning rate %g: %s", config.training.learning_rate, error)
        return math.inf, math.inf
    merge_adapters(Decoder(model))
    half = len(material.evaluation) // 2
    first, second = material.evaluation[:half], material.evaluation[half:]
    return _measured(model, first, config), _measured(model, second, config)


def _measured(model: torch.nn.Module, windows: torch.Tensor, config: Config) -> float:
    try:
        return perplexity(model, windows, config.text.eval_batch_size)
    except FloatingPointError as error:
        logger.warning("learning rate %g: %s", config.training.learning_rate, error)
        return math.inf


def best_rate(tuning: Mapping[float, float]) -> float:
    """Return the learning rate with the lowest perplexity; NaN counts as infinite."""
    return min(tuning, key=lambda rate: tuning[rate] if math.isfinite(tuning[rate]) else math.inf)


def compare(
    config: Config,
    rates: Sequence[float],
    seeds: Sequence[int],
    names: Sequence[str],
    materials: Mapping[int, Material],
) -> Iterator[Comparison]:
    """Measure the variants, one after the other."""
    for name in names:
        tuning = {rate: measure(variant_config(config, name, rate, seeds[0]), materials[seeds[0]]) for rate in rates}
        best = best_rate({rate: first for rate, (first, _) in tuning.items()})
        values = [tuning[best][1]]
        values += [measure(variant_config(config, name, best, seed), materials[seed])[1] for seed in seeds[1:]]
        yield compared(name, best, values, {rate: first for rate, (first, _) in tuning.items()})


def compared(name: str, best: float, values: Sequence[float], tuning: Mapping[float, float]) -> Comparison:
    """Summarise a variant: values with its best learning rate, one per seed, and those that it was tuned by."""
    finite = all(map(math.isfinite, values))
    return Comparison(
        variant=name,
        learning_rate=best,
        perplexity=[_or_none(value) for value in values],
        mean=statistics.fmean(values) if finite else None,
        stdev=None if not finite else statistics.stdev(values) if len(values) > 1 else 0.0,
        tuning={str(rate): _or_none(value) for rate, value in tuning.items()},
    )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_options(own: argparse.Namespace, rest: Sequence[str]) -> None:
    """Check this command's options. Errors: ValueError naming a bad option, or an option of a run that has no effect here."""
    for rate in own.learning_rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"learning_rates has {rate}; allowed: finite numbers above 0")
    for seed in own.seeds:
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"seeds has {seed}; allowed: 0 to {MOST_SEED}")
    if own.json is not None and (own.json.is_dir() or not os.access(own.json.absolute().parent, os.W_OK)):
        raise ValueError(f"json {own.json} cannot be written; give a file in an existing folder")
    for word in rest:
        option = word.partition("=")[0].replace("-", "_").removeprefix("__")
        if word.startswith("--") and option in NOT_HERE:
            raise ValueError(f"--{option} has no effect in this command{NOT_HERE[option]}; see --help")


def check_material(config: Config, names: Sequence[str], material: Material) -> None:
    """Check model and text for all variants. Errors: ValueError naming what does not work."""
    if len(material.evaluation) < 2:
        raise ValueError(
            "the evaluation text has only 1 window; give 2 or more, to tune on the first half and measure on the second"
        )
    for name in names:
        variant = variant_config(config, name, config.training.learning_rate, config.output.seed)
        structure.check_structure(material.model, variant.settings)
        split_parts(material.examples, variant.text.shares(variant.prune.steps))


@command
def main(arguments: Sequence[str]) -> None:
    """Print one line per variant; write the figures to --json."""
    parser = Parser(
        prog="losa compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="File for the figures; null means that a run diverged.")
    own, rest = parser.parse_known_args(arguments)
    check_options(own, rest)
    start = time.perf_counter()
    config = parse(rest, data_required=True)
    if not config.training.finetune:
        raise ValueError("finetune is False, but this command tunes learning rates; leave out --finetune false")
    names = list(dict.fromkeys(own.variants))
    seeds = list(dict.fromkeys(own.seeds))
    for name in names:
        dry_run.check(variant_config(config, name, own.learning_rates[0], seeds[0]))
    materials = {
        seed: load_material(dataclasses.replace(config, output=dataclasses.replace(config.output, seed=seed)))
        for seed in seeds
    }
    material = materials[seeds[0]]
    check_material(config, names, material)
    half = len(material.evaluation) // 2
    dense = perplexity(material.model, material.evaluation[half:], config.text.eval_batch_size, "dense")
    say(f"dense {dense:.2f}; {len(material.examples)} training sequences; torch {torch.__version__}")
    found = []
    for comparison in compare(config, list(dict.fromkeys(own.learning_rates)), seeds, names, materials):
        found.append(comparison)
        say(report.compared(comparison))
    if own.json:
        write_json(own.json, {"dense": dense, "variants": [dataclasses.asdict(comparison) for comparison in found]})
    say(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
