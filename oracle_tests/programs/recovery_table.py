"""Perplexities of recipes on one model, each over several seeds, many runs at once on several GPUs.

    python -m oracle_tests.programs.recovery_table oracle_tests/programs/recovery.toml --gpus 4 --each 7 --json FILE \\
        -- --model DIR --calibration_data FILE --finetune_data FILE --eval_data FILE [options of torch_impl.run]

The TOML file has one table per recipe, `name = "options of torch_impl.run"`, or `name = {options = "...", kept_rate = 3e-4}`:
after the run, which must not fine-tune, every kept weight of the merged model is trained with KL at that peak rate, on the same
records as adapters would be: the comparison that has no adapters. Prints a line per run as it ends, with the perplexity of the
first and of the second half of the evaluation windows, then mean and standard deviation of each recipe. Choose recipes by the
first half, report the second. Without GPUs (`--gpus 0`) the runs are done one after the other on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import queue
import shlex
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl import losa
from torch_impl.engine import batches, gradients, training
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment.config import parse
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import load_material
from torch_impl.experiment.text.windows import split_parts

Job = tuple[str, int, list[str], float | None]


def run_recipe(words: Sequence[str], kept_rate: float | None = None) -> dict[str, Any]:
    """Carry out one run without writing anything. Returns perplexities of both halves, seconds, and Σ e of the last step."""
    config = parse(words)
    material = load_material(config)
    model = material.model
    dense = copy.deepcopy(model).requires_grad_(False)
    parts = split_parts(material.examples, config.text.shares(config.prune.steps))
    settings = config.settings
    if kept_rate is not None:
        settings = dataclasses.replace(settings, training=dataclasses.replace(config.training, finetune=False))
    start = time.perf_counter()
    records = losa.run(model, material.calibration, parts, settings, dense=dense)
    merge_adapters(Decoder(model))
    if kept_rate is not None:
        train_kept(model, dense, material.examples, config.training, kept_rate)
    seconds = time.perf_counter() - start
    half = len(material.evaluation) // 2
    first, second = (
        perplexity(model, part, config.text.eval_batch_size) for part in material.evaluation.split(half)[:2]
    )
    return {"first": first, "second": second, "seconds": seconds, "error": sum(records[-1].errors)}


def train_kept(
    model: nn.Module, dense: nn.Module, examples: Sequence[batches.Example], config: TrainingConfig, peak: float
) -> None:
    """Train every kept weight of a merged model for one epoch to predict what the dense one does; zeros stay."""
    device = next(model.parameters()).device
    weights = [weight.requires_grad_(True) for weight in Decoder(model).weights]
    masks = [weight != 0 for weight in weights]
    wide = [nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(wide, lr=peak, weight_decay=config.weight_decay)
    size = config.batch_size
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    for step, group in enumerate(groups):
        batch = batches.collate(group, device, batches.row_multiple(model, device))
        loss = gradients.sum_loss(model, batch, dense) / max(1, batches.label_count(group))
        found = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for value, gradient, mask in zip(wide, found, masks, strict=True):
                value.grad = gradient.float() * mask
            nn.utils.clip_grad_norm_(wide, config.max_grad_norm or math.inf)
            optimizer.param_groups[0]["lr"] = peak * training.lr_factor(step, len(groups), config.warmup_ratio)
            optimizer.step()
            for weight, value, mask in zip(weights, wide, masks, strict=True):
                weight.copy_(value * mask)
    model.requires_grad_(False)


def carry_out(job: Job) -> dict[str, Any]:
    """Do one run. What fails is named, and the table goes on with the other runs."""
    name, seed, words, kept_rate = job
    # Progress bars of many runs at once say nothing.
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            found = run_recipe([*words, "--seed", str(seed)], kept_rate)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
    return {"recipe": name, "seed": seed, **found}


def _work(gpu: int, jobs: Any, results: Any) -> None:
    """Do jobs on one GPU until none is left, in a process of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with contextlib.suppress(queue.Empty):
        while True:
            results.put(carry_out(jobs.get(timeout=1)))


def carry_out_all(jobs: Sequence[Job], gpus: int, each: int) -> Iterator[dict[str, Any]]:
    """Do all runs, `each` at once on every GPU; yield them as they end."""
    if not gpus:
        yield from map(carry_out, jobs)
        return
    context = multiprocessing.get_context("spawn")
    waiting, results = context.Queue(), context.Queue()
    for job in jobs:
        waiting.put(job)
    for number in range(min(len(jobs), gpus * each)):
        context.Process(target=_work, args=(number % gpus, waiting, results), daemon=True).start()
    for _ in jobs:
        yield results.get()


def jobs_of(recipes: dict[str, Any], common: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All runs of a table. A recipe's options win over the common ones."""
    found: list[Job] = []
    for name, recipe in recipes.items():
        recipe = {"options": recipe} if isinstance(recipe, str) else recipe
        words = [*common, *shlex.split(recipe["options"])]
        found += [(name, seed, words, recipe.get("kept_rate")) for seed in seeds]
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation by recipe."""
    lines = [f"{'recipe':<44}{'seeds':>6}{'first half':>18}{'second half':>18}{'seconds':>9}"]
    for name in dict.fromkeys(run["recipe"] for run in runs):
        done = [run for run in runs if run["recipe"] == name and "failed" not in run]
        if done:
            halves = ([run[half] for run in done] for half in ("first", "second"))
            shown = [f"{statistics.fmean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in halves]
            seconds = statistics.fmean(run["seconds"] for run in done)
            lines.append(f"{name:<44}{len(done):>6}{shown[0]:>18}{shown[1]:>18}{seconds:>9.0f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a run failed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, common = arguments, []
    if "--" in arguments:
        own, common = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--each", type=int, default=4, help="runs at once on each GPU")
    parser.add_argument("--json", type=Path, help="file for a JSON line per run")
    options = parser.parse_args(own)
    recipes = tomllib.loads(options.recipes.read_text(encoding="utf-8"))
    jobs = jobs_of({name: recipes[name] for name in options.only or recipes}, common, options.seeds)
    for _, _, words, _ in jobs:
        parse(words)
    runs = []
    for run in carry_out_all(jobs, options.gpus, options.each):
        runs.append(run)
        print(run["recipe"], run["seed"], run.get("failed") or f"{run['first']:.2f} {run['second']:.2f}", flush=True)
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
    print("\n" + table(runs))
    return int(any("failed" in run for run in runs))


if __name__ == "__main__":
    sys.exit(main())
