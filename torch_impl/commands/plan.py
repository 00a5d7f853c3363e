"""Show what a run would do and need, without loading weights: losa plan [options of losa run]."""

from __future__ import annotations

from collections.abc import Sequence

from torch_impl.commands.run import show_plan
from torch_impl.experiment.command import command
from torch_impl.experiment.config import parse, warn_of_idle


@command
def main(arguments: Sequence[str]) -> None:
    """Show the plan of the command line."""
    config = parse(["--dry_run", *arguments], data_required=True, prog="losa plan")
    warn_of_idle(config, arguments)
    show_plan(config)
