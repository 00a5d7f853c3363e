"""Recipes: what a comparison does to a model. Those that ship are in configs/recipes.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch_impl import _checks
from torch_impl.experiment import config
from torch_impl.experiment.baselines import BASELINES
from torch_impl.experiment.command import closest

LOSA, DENSE = "losa", "dense"
"""The treatments of a recipe that names none, Algorithm 1 with its options, and of the dense model, which is no baseline."""
STRUCTURED = "structured"
"""The one pattern that a recipe may have: it is of a share of weights, as others are without a pattern."""
KEYS = ("title", "treatment", "preset", "options", "learning_rates")
# Options of a run that a comparison sets itself or that have no effect on its results, with what to use instead.
NOT_HERE = {
    "learning_rate": "learning_rates",
    "seed": "seeds",
    "eval_data": "[texts]",
    "sparsity_ratio": "sparsity",
    "sparsity_type": "sparsity",
    **dict.fromkeys(
        ("output_dir", "overwrite", "resume", "accept_changes", "save_every", "keep_points", "dry_run", "devices",
         "plan_for", "config", "preset", "offload", "report_to", "baselines"),
        None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is done to a model: a treatment with options of a run, as words. learning_rates: None means the comparison's.

    preset: options of the recipe's preset. The comparison's [options] win over them, and the recipe's own win over both.
    """

    name: str
    title: str
    treatment: str
    options: Mapping[str, list[str]]
    learning_rates: tuple[float, ...] | None = None
    preset: Mapping[str, list[str]] = field(default_factory=dict)


def check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Errors: ValueError naming a key that is not known, and a similar one."""
    for key in given:
        if key not in known:
            hint = closest(key, known) or f"; use {', '.join(known)}"
            raise ValueError(f"{where}: {key!r} is not known{hint}")


def check_options(where: str, options: Any, more: Sequence[str] = ()) -> None:
    """Errors: ValueError naming an option that `losa run` does not have, or that has no place in a comparison."""
    if not isinstance(options, dict):
        raise ValueError(f"{where} is {options!r}; give a table of options of losa run")
    known = [name for name in config.option_names() if name not in NOT_HERE]
    for name in options:
        if name in NOT_HERE and name not in more:
            instead = NOT_HERE[name]
            hint = f"; use {instead}" if instead else ""
            raise ValueError(f"{where}: {name} has no effect in a comparison{hint}")
        if name not in known and name not in more:
            raise ValueError(
                f"{where}: {name!r} is not an option of losa run{closest(name, [*known, *more])}; see losa run --help"
            )


def words(options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the words of the command line for each option."""
    return {
        name: [str(item) for item in value] if isinstance(value, list) else [str(value)]
        for name, value in options.items()
    }


def check_treatment(recipe: Recipe) -> None:
    """Errors: ValueError if the treatment is not known."""
    if recipe.treatment not in BASELINES:
        hint = closest(str(recipe.treatment), BASELINES)
        raise ValueError(
            f"recipe {recipe.name!r}: treatment is {recipe.treatment!r}; allowed: {', '.join(BASELINES)}{hint}"
        )


def rates_of(where: str, values: Any) -> tuple[float, ...]:
    """Read learning rates. Errors: ValueError naming a value that is none."""
    found = values if isinstance(values, list | tuple) else [values]
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: learning_rates has {value!r}; allowed: finite numbers above 0")
    if not found:
        raise ValueError(f"{where}: learning_rates is empty; give one or more")
    return tuple(dict.fromkeys(map(float, found)))


def read(own: Mapping[str, Any], where: str) -> dict[str, Recipe]:
    """Return the recipes that ship and a comparison's own, by name. An own one of the same name changes only what it says.

    Errors: ValueError naming what is wrong in its own.
    """
    path = config.CONFIGS / "recipes.toml"
    tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, table in own.items():
        tables[name] = {**tables.get(name, {}), **table} if isinstance(table, dict) else table
    return {name: _read_one(name, table, f"{where}, recipe {name!r}") for name, table in tables.items()}


def _read_one(name: str, table: Any, where: str) -> Recipe:
    if not isinstance(table, dict):
        raise ValueError(f"{where} is {table!r}; give a table with {', '.join(KEYS)}")
    check_keys(where, table, KEYS)
    treatment, title = table.get("treatment", LOSA), table.get("title", name)
    own = table.get("options", {})
    check_options(f"{where}, options", own, ("sparsity_type",))
    if own.get("sparsity_type", STRUCTURED) != STRUCTURED:
        raise ValueError(
            f"{where}: sparsity_type is {own['sparsity_type']!r}; allowed: {STRUCTURED}; else use sparsity"
        )
    preset: dict[str, list[str]] = {}
    if "preset" in table:
        _checks.choice(f"{where}, preset", table["preset"], config.PRESETS)
        preset = config.preset_options(table["preset"])
    rates = rates_of(where, table["learning_rates"]) if "learning_rates" in table else None
    return Recipe(name, str(title), treatment, words(own), rates, preset)
