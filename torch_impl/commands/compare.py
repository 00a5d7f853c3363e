"""Compare ways to prune and train, over methods, sparsities and seeds:  losa compare FILE [--output FOLDER] [options]

FILE is a TOML file that says what to compare, or `quick`, which takes under 20 minutes on the embedded model and two cores:
docs/compare.md explains it. Every run writes its result at once, so the same command continues a comparison that was stopped,
and runs what is new; started several times, say on several GPUs, it shares the runs. Options of losa run after FILE override
the file's [options], for example --model DIR.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_impl.engine import distributed
from torch_impl.engine.progress import note
from torch_impl.experiment import zero_shot
from torch_impl.experiment.baselines import BASELINES
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.comparison import curves, document, page, reading, running
from torch_impl.experiment.comparison.cells import Workshop
from torch_impl.experiment.comparison.matrix import Comparison, Group
from torch_impl.experiment.comparison.recipes import DENSE, Recipe
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.comparison.rows import row_of
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import dry_run
from torch_impl.experiment.text.sources import check_source

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "losa compare FILE [options] [options of losa run]"
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="Folder of results, tables and curves (default losa-compare-NAME).",
    )
    add(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="Only these: recipe=losa,best sparsity=0.7 seed=0.",
    )
    add("--data", type=Path, metavar="FOLDER", help="Folder with the models, texts and tasks that FILE names.")
    add("--seeds", type=int, nargs="+", metavar="N", help="Seeds, instead of the file's.")
    add(
        "--learning_rates",
        type=float,
        nargs="+",
        metavar="X",
        help="Learning rates to choose from, instead of the file's.",
    )
    add("--keep_models", action="store_true", help="Save each run's model in FOLDER/models; not baselines.")
    add("--dry_run", action="store_true", help="Check everything, list the runs, count those that are done, and stop.")
    add(
        "--tables",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="Write the tables of the results in FOLDER again, with what further FOLDERs add; run nothing.",
    )
    return parser


@command
def main(arguments: Sequence[str]) -> None:
    """Run what is missing, then write tables and curves."""
    words = list(arguments)
    file = words.pop(0) if words and not words[0].startswith("-") else None
    own, rest = _parser().parse_known_args(words)
    if file is None:
        raise ValueError("FILE is missing; give a TOML file, or quick, as the first word: losa compare quick")
    options = reading.command_options(rest)
    if own.data is not None and not own.data.is_dir():
        raise ValueError(f"data {own.data} is not a folder; give the one with models and texts")
    comparison = reading.read(reading.find(file), options, own.data, own.seeds, own.learning_rates)
    everything = [comparison.groups(matrix) for matrix in comparison.matrices]
    groups = reading.select(everything, own.only)
    flat = [group for of_matrix in groups for group in of_matrix]
    # The tables are of all runs, also of those of other processes that do another part.
    part = own.only if own.tables else [word for word in own.only if word.startswith("learning_rate=")]
    shown = shlex.join(["losa", "compare", Path(file).name, *_shown(words), *(["--only", *part] if part else [])])
    if own.tables is not None:
        _tables(comparison, groups, own, shown)
        return
    work = running.slots(flat)
    check(flat)
    results = Results(own.output or Path(f"losa-compare-{comparison.name}"))
    if own.dry_run:
        done = sum(slot.done(results) for slot in work)
        say("\n".join([*map(str, work), f"{len(work)} runs" + (f", {done} of them done" if done else "")]))
        return
    check_folder(results.folder)
    workshop = Workshop(results.folder / "written", results.folder / "models" if own.keep_models else None)
    elsewhere = running.run(work, results, workshop, note)
    if elsewhere:
        # The last to end writes the tables: several processes would write the same files.
        say(f"{elsewhere} runs are under way in other processes, which will write the tables into {results.folder}")
        return
    _report(comparison, reading.select(everything, part), results, shown)
    if failed := sum(len(row_of(group, results).failed) for group in flat):
        raise RuntimeError(f"{failed} runs failed; see the last table, and run the command again to try them again")


def _tables(comparison: Comparison, groups: Sequence[Sequence[Group]], own: argparse.Namespace, shown: str) -> None:
    """Write the tables of results that there are. Errors: ValueError if there are none, so that no good ones are replaced."""
    for folder in own.tables:
        if not folder.is_dir():
            raise ValueError(f"tables {folder} is not a folder; give the one with the results")
    if own.dry_run:
        raise ValueError("tables runs nothing, and writes; leave out --dry_run")
    results = Results(own.tables[0], own.tables[1:])
    if not any(row_of(group, results).outcomes for of_matrix in groups for group in of_matrix):
        raise ValueError(
            f"tables {own.tables[0]} has no result of these runs; give the options that they had, or another folder"
        )
    _report(comparison, groups, results, shown)


def _shown(words: Sequence[str]) -> list[str]:
    """Return the options of the command that say what is compared, without those about where it runs."""
    found: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word.partition("=")[0] in ("--only", "--output", "--tables", "--data", "--device")
        if not skipping:
            found.append(Path(word).name if "/" in word else word)
    return found


def check_folder(folder: Path) -> None:
    """Errors: ValueError if the folder of the results cannot be written."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"output {folder} cannot be written; give another folder")


def check(groups: Sequence[Group]) -> None:
    """Check options, models and names of texts of the work of this process before it begins. Errors: as `losa run`."""
    if distributed.launched() > 1:
        raise ValueError(
            "losa compare runs in one process; start it without torchrun, as often as you like with the same FOLDER"
        )
    for measures in {repr(group.base.measures): group.base.measures for group in groups}.values():
        # The first is the run's eval_data, which is checked with it.
        for name, text in list(measures.texts.items())[1:]:
            check_source(text.source, f"[texts]: {name}")
        if measures.tasks:
            zero_shot.check_tasks(measures.tasks, measures.data)
    different: dict[str, Config] = {}
    # Those that train are checked for everything.
    for group in sorted(groups, key=lambda group: not group.base.config.training.finetune):
        for rate in group.rates or (None,):
            config = group.final(group.seeds[0], rate).config
            what = repr((config.model, config.prune, config.text, config.calibration, config.training.finetune))
            if group.recipe.treatment != DENSE:
                _check_treatment(group.recipe, config)
                different.setdefault(what, config)
    dry_run.check(different.values())


def _check_treatment(recipe: Recipe, config: Config) -> None:
    baseline = BASELINES[recipe.treatment]
    try:
        baseline.check()
        baseline.check_options(config)
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name!r}: {error}") from error


def _report(comparison: Comparison, groups: Sequence[Sequence[Group]], results: Results, shown: str) -> None:
    """Write tables and curves of the results that there are; print the tables."""
    results.folder.mkdir(parents=True, exist_ok=True)
    with results.alone():
        results.collect()
        found = document.sections(comparison, groups, results, shown)
        try:
            pictures = curves.draw(results.folder, found)
        except ImportError:
            logger.warning('curves need matplotlib: pip install "losa-oracle[report]"')
            pictures = [[] for _ in found]
        text = document.markdown(found, pictures)
        (results.folder / "tables.md").write_text(text + "\n", encoding="utf-8")
        page.write(results.folder / "tables.html", comparison.title, found, pictures)
    say(text)


if __name__ == "__main__":
    sys.exit(main())
