"""Read a comparison from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_impl import _checks
from torch_impl.experiment import config
from torch_impl.experiment.command import closest
from torch_impl.experiment.comparison import recipes
from torch_impl.experiment.comparison.matrix import PLACES, Comparison, Group, Matrix, Measures, is_number, label
from torch_impl.experiment.comparison.recipes import NOT_HERE, Recipe, check_keys, check_options, rates_of, words
from torch_impl.experiment.material import OtherText
from torch_impl.experiment.sections import MOST_SEED
from torch_impl.experiment.text.protocols import PROTOCOLS

KEYS = ("title", "options", "texts", "tasks", "speed", "recipes", "matrix")
TASK_KEYS = ("names", "data", "limit")
MATRIX_KEYS = ("title", "recipes", "seeds", "learning_rates", "reference", "options", "optional")
PREFIX = "compare_"


def find(name: str) -> Path:
    """Find a TOML file by its path, or one that ships by its name. Errors: FileNotFoundError if there is none."""
    shipped = {path.stem.removeprefix(PREFIX): path for path in sorted(config.CONFIGS.glob(f"{PREFIX}*.toml"))}
    path = Path(name)
    if path.is_file():
        return path
    if name not in shipped:
        raise FileNotFoundError(
            f"comparison {name} does not exist; give a TOML file or {', '.join(shipped)}{closest(name, shipped)}"
        )
    return shipped[name]


def read(
    path: Path,
    options: Mapping[str, list[str]],
    data: Path | None = None,
    seeds: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
) -> Comparison:
    """Read a file. options, seeds, rates: of the command line, instead of the file's. data: folder with models and texts.

    Errors: ValueError naming the file, the key and what to do.
    """
    where = f"comparison {path.name}"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not TOML: {error}") from error
    check_keys(where, table, KEYS)
    check_options(f"{where}, [options]", table.get("options", {}))
    known = recipes.read(_table(where, table, "recipes"), where)
    given = table.get("matrix", [])
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} has no [[matrix]]; give one with recipes = [...]")
    all_matrices = [_matrix(f"{where}, matrix {n}", m, known) for n, m in enumerate(given, 1)]
    matrices = tuple(
        dataclasses.replace(m, options={name: value for name, value in m.options.items() if name not in options})
        for m, of_file in zip(all_matrices, given, strict=True)
        if not of_file.get("optional") or _is_there(m, options, data)
    )
    if not matrices:
        raise ValueError(
            f"{where} needs models and texts; give --data FOLDER with {', '.join(_named(all_matrices[0]))}"
        )
    if seeds is not None:
        matrices = tuple(dataclasses.replace(matrix, seeds=_seeds(where, list(seeds))) for matrix in matrices)
    if rates is not None:
        matrices = tuple(
            dataclasses.replace(m, rates=rates_of(where, list(rates)), recipes=_tuned(m)) for m in matrices
        )
    base = words(table.get("options", {})) | dict(options)
    all_options = [base, *(m.options for m in matrices), *(m.varied for m in matrices)]
    all_options += [recipe.options for m in matrices for recipe in m.recipes]
    for name in ("eval_data", "eval_protocol"):
        if "texts" in table and any(name in given for given in all_options):
            raise ValueError(
                f"--{name} has no effect in this command with [texts] in {path.name}; change the texts there"
            )
    # A recipe may override an option, which would hide that it is wrong.
    config.parse([word for name, values in base.items() for word in (f"--{name}", *values)])
    found = Comparison(
        path.stem.removeprefix(PREFIX),
        str(table.get("title", path.stem)),
        base,
        matrices,
        _measures(where, table, data),
    )
    for name in found.unused():
        given = f"--{name}" if name in options else f"{where}, [options]: {name}"
        raise ValueError(
            f"{given} has no effect: every matrix or recipe sets its own; change it there, or leave it out"
        )
    return dataclasses.replace(found, places=dict(_places(found, data)))


def _tuned(matrix: Matrix) -> tuple[Recipe, ...]:
    """Return the recipes without learning rates of their own."""
    return tuple(dataclasses.replace(recipe, learning_rates=None) for recipe in matrix.recipes)


def _named(matrix: Matrix) -> list[str]:
    """Return the models and texts that a matrix's own options name."""
    return list(dict.fromkeys(word for name in PLACES for word in matrix.options.get(name, ())))


def _is_there(matrix: Matrix, options: Mapping[str, list[str]], data: Path | None) -> bool:
    """Return whether the models and texts of a matrix are in the data folder, and the command line names no others."""
    return not any(name in options for name in PLACES) and all(_inside(name, data) for name in _named(matrix))


def _table(where: str, table: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {key} is {found!r}; give a table [{key}]")
    return found


def _measures(where: str, table: Mapping[str, Any], data: Path | None) -> Measures:
    texts, tasks = _table(where, table, "texts"), _table(where, table, "tasks")
    check_keys(f"{where}, [tasks]", tasks, TASK_KEYS)
    limit = tasks.get("limit")
    if limit is not None:
        _checks.count(f"{where}, [tasks]: limit", limit)
    names = tasks.get("names", [])
    if not isinstance(names, list) or (tasks and not names):
        raise ValueError(f"{where}, [tasks]: names is {names!r}; give a list of tasks")
    speed = table.get("speed", False)
    if not isinstance(speed, bool):
        raise ValueError(f"{where}: speed is {speed!r}; allowed: true or false")
    folder = tasks.get("data")
    return Measures(
        {name: _text(f"{where}, [texts]: {name}", text, data) for name, text in texts.items()},
        tuple(map(str, names)),
        None if folder is None else _inside(str(folder), data) or str(folder),
        limit,
        speed,
    )


def _text(where: str, text: Any, data: Path | None) -> OtherText:
    """Read a text: a source, or a table of source and protocol."""
    table = {"source": text} if isinstance(text, str) else text
    if not isinstance(table, dict) or not isinstance(table.get("source"), str):
        raise ValueError(f"{where} is {text!r}; give a source of text as eval_data takes it")
    check_keys(where, table, ("source", "protocol"))
    if "protocol" in table:
        _checks.choice(f"{where}, protocol", table["protocol"], PROTOCOLS)
    source = table["source"]
    return OtherText(_inside(source, data) or source, table.get("protocol"))


def _inside(name: str, data: Path | None) -> str | None:
    """Return the path of a model or text in the data folder, if it is there: by its whole name or its last part."""
    places = () if data is None else (data / name, data / Path(name).name)
    return next((str(place) for place in places if place.exists()), None)


def _places(comparison: Comparison, data: Path | None) -> Iterator[tuple[str, str]]:
    named = [word for name in PLACES for word in comparison.options.get(name, ())]
    for matrix in comparison.matrices:
        named += [value for name in PLACES for value in matrix.varied.get(name, ())]
        named += [word for recipe in matrix.recipes for name in PLACES for word in recipe.options.get(name, ())]
        named += _named(matrix)
    for name in named:
        if (found := _inside(name, data)) is not None:
            yield name, found


def _matrix(where: str, table: Any, known: Mapping[str, Recipe]) -> Matrix:
    if not isinstance(table, dict) or not table.get("recipes"):
        raise ValueError(f"{where} has no recipes; give recipes = [...], of {', '.join(known)}")
    axes = {name: value for name, value in table.items() if name not in MATRIX_KEYS}
    check_options(where, axes, ("sparsity", *MATRIX_KEYS))
    varied = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in axes.items()}
    for name, values in varied.items():
        if not values or len({label(value) for value in values}) < len(values):
            raise ValueError(f"{where}: {name} is {list(values)}; give one or more values, each once")
    for value in varied.get("sparsity", ()):
        if not is_number(value) and ":" not in str(value):
            raise ValueError(
                f"{where}: sparsity has {value!r}; allowed: shares of zeros such as 0.7, and N:M or mixed-N:M"
            )
    chosen, own = _recipes(where, table["recipes"], known), _table(where, table, "options")
    check_options(f"{where}, options", own, ("eval_data",))
    reference = _reference(where, table.get("reference"), chosen, varied)
    found = Matrix(
        title=str(table.get("title", "")),
        recipes=chosen,
        varied=varied,
        seeds=_seeds(where, table.get("seeds", [0])),
        rates=rates_of(where, table["learning_rates"]) if "learning_rates" in table else (),
        reference={"recipe": recipes.LOSA, **reference},
        options=words(own),
    )
    if unused := [name for name in own if found.replaces(name)]:
        raise ValueError(
            f"{where}, options: {unused[0]} has no effect: the matrix varies it, or each of its recipes sets its own; leave it out"
        )
    return found


def _reference(where: str, given: Any, chosen: Sequence[Recipe], varied: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Read the row to compare with. Errors: ValueError naming what the matrix does not have."""
    if given is None:
        return {}
    if not isinstance(given, str | dict):
        raise ValueError(f"{where}: reference is {given!r}; give a recipe, or a table such as {{ sparsity = 0.5 }}")
    reference = {"recipe": given} if isinstance(given, str) else {name: label(value) for name, value in given.items()}
    check_keys(f"{where}, reference", reference, ("recipe", *varied))
    there = {"recipe": [recipe.name for recipe in chosen], **{name: [*map(label, v)] for name, v in varied.items()}}
    for name, value in reference.items():
        if value not in there[name]:
            raise ValueError(f"{where}, reference: {name} is {value}; this matrix has {', '.join(there[name])}")
    return reference


def _recipes(where: str, names: Any, known: Mapping[str, Recipe]) -> tuple[Recipe, ...]:
    if not isinstance(names, list):
        raise ValueError(f"{where}: recipes is {names!r}; give a list of names")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"{where}: recipe {name!r} does not exist{closest(str(name), known)}; known: {', '.join(known)}"
            )
        recipes.check_treatment(known[name])
    chosen = [known[name] for name in dict.fromkeys(names)]
    for one, other in itertools.combinations(chosen, 2):
        if one.title == other.title:
            raise ValueError(
                f"{where}: recipes {one.name!r} and {other.name!r} have the same title, {one.title!r}; give one another"
            )
    return tuple(chosen)


def _seeds(where: str, seeds: Any) -> tuple[int, ...]:
    found = seeds if isinstance(seeds, list) else [seeds]
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
            raise ValueError(f"{where}: seeds has {seed!r}; allowed: 0 to {MOST_SEED}")
    if not found:
        raise ValueError(f"{where}: seeds is empty; give one or more")
    return tuple(dict.fromkeys(found))


def command_options(rest: Sequence[str]) -> dict[str, list[str]]:
    """Read options of a run from the rest of a command line. Errors: ValueError naming one that has no place here."""
    found: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif not found:
            raise ValueError(f"{word} is not an option; see losa compare --help")
        else:
            found[list(found)[-1]].append(word)
    for name in found:
        if name in NOT_HERE and name != "eval_data":
            instead = {"learning_rate": "; use --learning_rates", "seed": "; use --seeds"}.get(name, "")
            if name.startswith("sparsity_"):
                instead = "; the comparison's file names sparsities"
            raise ValueError(f"--{name} has no effect in this command{instead}; see losa compare --help")
        if name not in config.option_names():
            raise ValueError(
                f"--{name} is not an option{closest(f'--{name}', [f'--{n}' for n in config.option_names()])}; see --help"
            )
    return {name: values or ["True"] for name, values in found.items()}


def select(groups: Sequence[Sequence[Group]], only: Sequence[str]) -> list[list[Group]]:
    """Keep of each matrix the groups that `only` asks for: NAME=VALUE[,VALUE...], where a name is a varied option, recipe, seed or
    learning_rate. Several values of a name add up, several names narrow down; the dense model always stays.

    Errors: ValueError naming an unknown name or value.
    """
    wanted: dict[str, set[str]] = {}
    for word in only:
        name, _, listed = word.partition("=")
        if not listed:
            raise ValueError(f"only has {word!r}; give NAME=VALUE, for example recipe=losa or sparsity=0.7")
        wanted.setdefault(name, set()).update(listed.split(","))
    flat = [group for of_matrix in groups for group in of_matrix if group.recipe.treatment != recipes.DENSE]
    for name, values in wanted.items():
        there = {value for group in flat for value in _values(group, name)}
        if not there:
            names = dict.fromkeys(["recipe", "seed", "learning_rate", *(n for g in flat for n, _ in g.varied)])
            raise ValueError(f"only has {name!r}, which this comparison does not vary; give one of {', '.join(names)}")
        if unknown := sorted(values - there):
            raise ValueError(f"only has {name}={unknown[0]}; this comparison has {', '.join(sorted(there))}")
    found = [[kept for group in of_matrix if (kept := _narrow(group, wanted)) is not None] for of_matrix in groups]
    if not any(group.recipe.treatment != recipes.DENSE for of_matrix in found for group in of_matrix):
        raise ValueError(f"only has {' '.join(only)}, which no run has together; leave one out")
    return found


def _values(group: Group, name: str) -> list[str]:
    if name == "seed":
        return [str(seed) for seed in group.seeds]
    if name == "learning_rate":
        return [f"{rate:g}" for rate in group.rates]
    return [group.recipe.name] if name == "recipe" else [value for key, value in group.varied if key == name]


def _narrow(group: Group, wanted: Mapping[str, set[str]]) -> Group | None:
    if group.recipe.treatment == recipes.DENSE:
        differs = any(key in wanted and value not in wanted[key] for key, value in group.varied)
        return None if differs else group
    for name, values in wanted.items():
        has = _values(group, name)
        if name == "learning_rate" and not has:
            continue
        if not values & set(has):
            return None
    seeds = tuple(seed for seed in group.seeds if str(seed) in wanted.get("seed", {str(seed)}))
    rates = tuple(rate for rate in group.rates if f"{rate:g}" in wanted.get("learning_rate", {f"{rate:g}"}))
    return dataclasses.replace(group, seeds=seeds, rates=rates)
