"""Prune a model from the command line: losa run [options]; see --help."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from torch_impl.engine.determinism import make_deterministic
from torch_impl.experiment import report
from torch_impl.experiment.command import command, process, say
from torch_impl.experiment.config import Config, parse, warn_of_idle
from torch_impl.experiment.job import check_output, run_in_memory, run_job
from torch_impl.experiment.material import check_text
from torch_impl.experiment.offloaded_job import run_offloaded
from torch_impl.experiment.planning import dry_run, show


def show_plan(config: Config) -> None:
    """Print the plan of a run, in process 0. Errors: whatever the run would refuse, as far as it shows without weights."""
    if not process():
        plan = dry_run.make_plan(config)
        check_output(config)
        found = check_text(config)
        if config.training.finetune and found is not None and found < config.text.train_examples:
            # All records are used, which are fewer than the run asks for.
            plan = dry_run.make_plan(replace(config, text=replace(config.text, train_examples=found)))
        say(show.plan_text(plan))


@command
def main(arguments: Sequence[str]) -> None:
    """Run the job of the command line."""
    config = parse(arguments, data_required=True)
    warn_of_idle(config, arguments)
    if config.output.deterministic:
        make_deterministic()
    if config.output.dry_run:
        show_plan(config)
        return
    result, folder = run_job(config, run_offloaded if dry_run.offloads(config) else run_in_memory)
    if process():
        return
    say(report.table(result))
    say(f"\n{folder}: merged model in model/, report in report.html, figures in losa_result.json")
    if report.packing_pays(result):
        say(f"To store and run it without its zeros: losa pack {shlex.join([f'{folder}/model', f'{folder}/packed'])}")
