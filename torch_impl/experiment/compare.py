"""LoSA against one shot with the same adapter, data and number of training tokens; learning rates tuned for both.

    python -m torch_impl.experiment.compare [options of torch_impl.run] --learning_rates 1e-3 2e-3 --seeds 0 1 2

Variants: one shot is Wanda at full sparsity at once, uniform rates and ranks, then the same masked adapter on all parts
together. Learning rates are tuned on the first seed, by the perplexity of the first half of the evaluation windows; all
figures are of the second half.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_impl import losa
from torch_impl.engine.families import find_family
from torch_impl.engine.layers import merge_adapters
from torch_impl.experiment.command import Parser, command
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.job import Material, load_material
from torch_impl.experiment.text.windows import split_parts

# Name of a variant: what it changes, by section of the configuration.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "one shot": {
        "prune": {"steps": 1, "layer_sparsity": "uniform"},
        "adapter": {"rank_allocation": "uniform"},
        "training": {},
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


def variant_config(config: Config, name: str, rate: float, seed: int) -> Config:
    """The configuration of a variant at a learning rate and seed, with the mean rank over all steps kept the same."""
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
    """Perplexity of the merged model on the first and on the second half of the evaluation windows."""
    model = copy.deepcopy(material.model)
    parts = split_parts(material.examples, config.text.shares(config.prune.steps))
    try:
        losa.run(model, material.calibration, parts, config.settings)
    except FloatingPointError:
        return float("inf"), float("inf")
    merge_adapters(model, find_family(model))
    half = len(material.evaluation) // 2
    batch = config.text.eval_batch_size
    return perplexity(model, material.evaluation[:half], batch), perplexity(model, material.evaluation[half:], batch)


def compare(config: Config, rates: Sequence[float], seeds: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """One record per variant: tuned learning rate, perplexity per seed, mean and spread."""
    materials = {
        seed: load_material(dataclasses.replace(config, output=dataclasses.replace(config.output, seed=seed)))
        for seed in seeds
    }
    records = []
    for name in names:
        tuning = {}
        for rate in rates:
            tuning[rate] = measure(variant_config(config, name, rate, seeds[0]), materials[seeds[0]])
        best = min(rates, key=lambda rate: tuning[rate][0])
        values = [tuning[best][1]]
        values += [measure(variant_config(config, name, best, seed), materials[seed])[1] for seed in seeds[1:]]
        record = {
            "variant": name,
            "learning_rate": best,
            "perplexity": values,
            "mean": statistics.fmean(values),
            "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
            "tuning": {str(rate): pair[0] for rate, pair in tuning.items()},
        }
        records.append(record)
        shown = " ".join(f"{value:.2f}" for value in values)
        tried = ", ".join(f"{rate:g}: {pair[0]:.2f}" for rate, pair in tuning.items())
        print(f"{name:<40}{record['mean']:>8.2f} ±{record['stdev']:.2f}  [{shown}]  at {best:g}  ({tried})", flush=True)
    return records


@command
def main(arguments: Sequence[str]) -> None:
    """Print a line per variant; --json keeps the figures."""
    parser = Parser(
        prog="python -m torch_impl.experiment.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args(arguments)
    start = time.perf_counter()
    config = parse(rest)
    material = load_material(config)
    dense = perplexity(
        material.model, material.evaluation[len(material.evaluation) // 2 :], config.text.eval_batch_size
    )
    print(f"dense {dense:.2f}; {len(material.examples)} training sequences; torch {torch.__version__}", flush=True)
    records = compare(config, own.learning_rates, own.seeds, own.variants)
    print(f"{time.perf_counter() - start:.0f} s")
    if own.json:
        own.json.write_text(json.dumps({"dense": dense, "variants": records}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
