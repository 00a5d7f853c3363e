"""A comparison: which runs a TOML file asks for. See docs/compare.md for the file.

A *group* is one recipe at one choice of all varied options; it becomes a row of a table. A *cell* is one run: a group with a
learning rate and a seed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_impl.experiment import identity
from torch_impl.experiment.baselines import BASELINES
from torch_impl.experiment.comparison.recipes import DENSE, LOSA, Recipe
from torch_impl.experiment.config import Config, parse, shares_again
from torch_impl.experiment.material import OtherText

# Options that change neither a result nor what it is of.
NO_MATTER = ("device", "eval_batch_size", "hold_merged", "compile_blocks", "cuda_graphs", "learning_rate", "offload")
# Options that name a file or folder: a result is of the file with this name, wherever it is.
PLACES = ("model", "calibration_data", "finetune_data", "eval_data")
# Options that the dense model's figures depend on; the other texts of a run may take documents from the measured one.
OF_DENSE = (*PLACES, "dtype", "trust_remote_code", "eval_seqlen", "eval_windows", "eval_protocol")
STEPS_OF_PAPER = 5


@dataclass(frozen=True)
class Measures:
    """What is measured of each model.

    texts: by name, for perplexity; learning rates are chosen on the first. tasks: zero-shot tasks, their data folder and
    the number of documents of each. speed: whether to measure decoding.
    """

    texts: Mapping[str, OtherText]
    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    speed: bool = False


@dataclass(frozen=True)
class Cell:
    """One run. rate: None if nothing is trained. final: a run that is reported, not one to choose a learning rate by."""

    recipe: Recipe
    varied: tuple[tuple[str, str], ...]
    seed: int
    rate: float | None
    config: Config
    measures: Measures
    finetunes: bool
    """Whether the comparison trains at all: then all cells leave the fine-tuning text aside in the same way."""
    final: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the zero-shot tasks to measure: none to choose a learning rate by."""
        return self.measures.tasks if self.final else ()

    @property
    def smaller(self) -> bool:
        """Return whether the model becomes smaller instead of sparse."""
        treatment = self.recipe.treatment
        return treatment != DENSE and (BASELINES[treatment].structured or self.config.prune.pattern.structured)

    @property
    def unmerged(self) -> bool:
        """Return whether the model runs with separate adapters."""
        treatment = self.recipe.treatment
        return treatment != DENSE and BASELINES[treatment].unmerged and self.config.training.finetune

    @functools.cached_property
    def key(self) -> str:
        """Return a name that changes with everything that the result depends on."""
        defaults = _defaults()
        options = {
            name: Path(value).name if name in PLACES and isinstance(value, str) else value
            for name, value in identity.options(self.config).items()
            if name not in NO_MATTER and (value != defaults[name] or name in PLACES)
        }
        if self.recipe.treatment == DENSE:
            options = {name: value for name, value in options.items() if name in OF_DENSE}
        what: dict[str, Any] = {
            "treatment": self.recipe.treatment,
            "options": options,
            "learning_rate": self.rate,
            "texts": {name: [Path(text.source).name, text.protocol] for name, text in self.measures.texts.items()},
        }
        sources = {text.source for text in self.measures.texts.values()}
        if not self.finetunes and self.config.text.finetune_data in sources:
            # Where nothing is trained, no part of this text is left for training: other windows are measured.
            what["untrained"] = True
        if self.tasks:
            what |= {"tasks": self.tasks, "limit": self.measures.limit}
            if self.measures.data is None:
                what["documents"] = "hub"
        if self.measures.speed and self.final:
            what["speed"] = True
        return hashlib.sha256(json.dumps(what, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]

    @functools.cached_property
    def material(self) -> str:
        """Return a name for the model and text that this cell needs: equal ones are loaded once if they follow each other."""
        config = self.config
        text = dataclasses.replace(config.text, step_shares=None)
        calibration = (config.calibration.nsamples, config.calibration.seqlen, config.calibration.written)
        return repr((config.model, text, calibration, self.finetunes, config.output.seed, self.measures.texts))

    @property
    def labels(self) -> dict[str, str]:
        """Return what tells this cell from the others of the comparison."""
        found = {**dict(self.varied), "recipe": self.recipe.name, "seed": str(self.seed)}
        return found if self.rate is None else {**found, "learning_rate": f"{self.rate:g}"}

    def __str__(self) -> str:
        varied = [value for _, value in self.varied]
        rate = [] if self.rate is None else [f"learning rate {self.rate:g}"]
        return ", ".join([*varied, self.recipe.name, f"seed {self.seed}", *rate])


@dataclass(frozen=True)
class Group:
    """One recipe at one choice of the varied options: a row of a table.

    rates: none if nothing is trained. tuning_seed: that learning rates are chosen with, whatever part of the seeds is run.
    """

    recipe: Recipe
    varied: tuple[tuple[str, str], ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    base: Cell
    _cells: dict[tuple[int, float | None, bool], Cell] = field(default_factory=dict, compare=False, repr=False)

    def tuning(self) -> list[Cell]:
        """Return the runs to choose a learning rate by; none if there is no choice."""
        return [self._cell(self.tuning_seed, rate, final=False) for rate in self.rates] if len(self.rates) > 1 else []

    def final(self, seed: int, rate: float | None) -> Cell:
        """Return the run that is reported with a seed. Without tasks and speed, one of them is a run of `tuning`."""
        return self._cell(seed, rate, final=True)

    def _cell(self, seed: int, rate: float | None, final: bool) -> Cell:
        if (seed, rate, final) not in self._cells:
            self._cells[seed, rate, final] = self._new_cell(seed, rate, final)
        return self._cells[seed, rate, final]

    def _new_cell(self, seed: int, rate: float | None, final: bool) -> Cell:
        config = self.base.config
        config = dataclasses.replace(config, output=dataclasses.replace(config.output, seed=seed))
        if rate is not None:
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, learning_rate=rate))
        return dataclasses.replace(self.base, seed=seed, rate=rate, config=config, final=final)


@dataclass(frozen=True)
class Matrix:
    """Recipes × the values of varied options × seeds: a table. reference: labels of the rows to compare the others with."""

    title: str
    recipes: tuple[Recipe, ...]
    varied: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    reference: Mapping[str, str] = field(default_factory=lambda: {"recipe": LOSA})
    options: Mapping[str, list[str]] = field(default_factory=dict)
    """Of its runs, as words, instead of the comparison's."""

    def replaces(self, name: str) -> bool:
        """Return whether no row takes an option as it is: the matrix varies it, or each of its recipes has its own."""
        return name in self.varied or all(name in recipe.options for recipe in self.recipes)


@dataclass(frozen=True)
class Comparison:
    """All of a TOML file. options: of every run, as words."""

    name: str
    title: str
    options: Mapping[str, list[str]]
    matrices: tuple[Matrix, ...]
    measures: Measures
    places: Mapping[str, str] = field(default_factory=dict)
    """Path of each model and text that was found in the data folder."""

    def groups(self, matrix: Matrix) -> list[Group]:
        """Return the rows of a matrix: for every choice of varied options each recipe, after the dense model of each choice of
        model. Errors: as `losa run` for its options."""
        found = [self._group(matrix, *row) for row in self._rows(matrix)]
        return [*_dense(found), *found]

    def _rows(self, matrix: Matrix) -> Iterator[tuple[Recipe, tuple[tuple[str, str], ...], Config]]:
        """Yield recipe, varied options and configuration of each row."""
        for values in itertools.product(*matrix.varied.values()):
            varied = tuple(zip(matrix.varied, map(label, values), strict=True))
            given = _varied_options(dict(zip(matrix.varied, values, strict=True)))
            for recipe in matrix.recipes:
                yield recipe, varied, self._config(recipe, given, matrix)

    def _config(self, recipe: Recipe, given: Mapping[str, list[str]], matrix: Matrix) -> Config:
        if "sparsity_type" in recipe.options and "sparsity_type" in given:
            raise ValueError(
                f"recipe {recipe.name!r} removes whole structures, and sparsity is {given['sparsity_type'][0]}; give it shares"
            )
        own, wanted = recipe.options.get("prune_method"), given.get("prune_method")
        if own and wanted and own != wanted:
            raise ValueError(
                f"recipe {recipe.name!r} has prune_method {own[0]}, and its matrix {wanted[0]}; leave one out"
            )
        options = {**recipe.preset, **self.options, **matrix.options, **recipe.options, **given}
        options.update(
            {name: [self.places.get(word, word) for word in options[name]] for name in PLACES if name in options}
        )
        if first := next(iter(self.measures.texts.values()), None):
            options["eval_data"] = [first.source]
            if first.protocol is not None:
                options["eval_protocol"] = [first.protocol]
        chosen = {*self.options, *matrix.options, *recipe.options, *given}
        options |= _of_steps(options, "initial_rank" in chosen)
        return parse([word for name, words in options.items() for word in (f"--{name}", *words)], data_required=True)

    def _group(self, matrix: Matrix, recipe: Recipe, varied: tuple[tuple[str, str], ...], config: Config) -> Group:
        measures = self.measures
        if not measures.texts:
            source = config.text.eval_data
            measures = dataclasses.replace(measures, texts={Path(source).name: OtherText(source)})
        rates = (recipe.learning_rates or matrix.rates) if config.training.finetune else ()
        rates = rates or ((config.training.learning_rate,) if config.training.finetune else ())
        base = Cell(recipe, varied, 0, None, config, measures, self._finetunes, final=True)
        return Group(recipe, varied, rates, matrix.seeds, matrix.seeds[0], base)

    @functools.cached_property
    def _finetunes(self) -> bool:
        return any(config.training.finetune for matrix in self.matrices for *_, config in self._rows(matrix))

    def unused(self) -> list[str]:
        """Return the options of the comparison that no row takes: every matrix or recipe sets its own."""
        return [name for name in self.options if all(name in m.options or m.replaces(name) for m in self.matrices)]


@functools.cache
def _defaults() -> dict[str, Any]:
    return identity.options(Config())


def label(value: Any) -> str:
    """Name a value of a varied option."""
    return (
        Path(value).name
        if isinstance(value, str) and "/" in value
        else f"{value:g}"
        if is_number(value)
        else str(value)
    )


def is_number(value: Any) -> bool:
    """Return whether a value of a TOML file is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _varied_options(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the options of one choice, as words: `sparsity` is a share of zeros or a pattern."""
    found = {}
    for name, value in values.items():
        if name == "sparsity":
            name = "sparsity_ratio" if is_number(value) else "sparsity_type"
        found[name] = [str(value)]
    return found


def _of_steps(options: Mapping[str, list[str]], ranked: bool) -> dict[str, list[str]]:
    """Return the options that follow from the number of steps: the first rank, unless it is chosen (`ranked`), so that the mean
    rank over all steps is that of the paper's five steps, and equal shares of the training text.

    Errors: ValueError if `steps` is no number.
    """
    found = {}
    try:
        steps = int(options.get("steps", ["5"])[0])
    except ValueError:
        raise ValueError(f"steps is {options['steps'][0]!r}; allowed: whole numbers of 1 or more") from None
    if not ranked and options.get("initial_rank", ["6"]) == ["6"]:
        found["initial_rank"] = [str(max(1, 6 + (STEPS_OF_PAPER - steps) // 2))]
    if "step_shares" in options:
        found["step_shares"] = shares_again(options["step_shares"], steps)
    return found


def _dense(groups: Sequence[Group]) -> list[Group]:
    """Return a row for the dense model of each choice of model and text: the reference of all. What the choice leaves open is
    as in the first recipe."""
    found: dict[tuple[tuple[str, str], ...], Group] = {}
    for group in groups:
        varied = tuple((name, value) for name, value in group.varied if name in OF_DENSE)
        recipe = Recipe(DENSE, "dense", DENSE, {})
        cell = dataclasses.replace(group.base, recipe=recipe, varied=varied)
        found.setdefault(varied, Group(recipe, varied, (), group.seeds[:1], group.tuning_seed, cell))
    return list(found.values())
