"""The table is complete, and the two packages have the same functions with the same arguments."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest

import reference.losa
from oracle_tests.ops import OPS, Op, to_torch
from torch_impl.engine import settings

# The spec's small model, optimizer, rate rules and Algorithm 1: production has transformers, torch and engine/ for them,
# and the whole-run oracle holds the two together.
WHOLE_RUN = [
    f"reference.{name}"
    for name in [
        "layers",
        "loss",
        "llama",
        "adamw",
        "rates",
        "settings",
        "adapted_linear",
        "lockstep",
        "training",
        "losa",
    ]
]
# Work on blocks of either model, so what they are called with differs in the end: `test_reconstruct` holds the two together.
OF_BLOCKS = {"reconstruct.reconstruct_block": "block", "reconstruct.reconstruct_blocks": "blocks"}


def public_functions() -> list[str]:
    names = []
    for module in pkgutil.walk_packages(reference.__path__, "reference."):
        if module.name in WHOLE_RUN or module.name.rpartition(".")[2].startswith("_"):
            continue
        found = importlib.import_module(module.name)
        for name, function in inspect.getmembers(found, inspect.isfunction):
            if function.__module__ == module.name and not name.startswith("_"):
                names.append(f"{module.name.removeprefix('reference.')}.{name}")
    return names


def test_every_public_function_of_the_spec_has_a_row() -> None:
    missing = sorted(set(public_functions()) - {op.name for op in OPS} - set(OF_BLOCKS))
    assert not missing, f"no row in oracle_tests/ops.py for {missing}"
    assert len(OPS) == len({op.name for op in OPS})


@pytest.mark.parametrize("op", OPS, ids=str)
def test_arguments_are_the_same(op: Op) -> None:
    def arguments(function: object) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]

    assert arguments(op.production) == arguments(op.reference)


@pytest.mark.parametrize(("name", "first"), OF_BLOCKS.items())
def test_blocks_are_reconstructed_by_the_same_arguments(name: str, first: str) -> None:
    module, _, function = name.partition(".")
    theirs, ours = (
        list(inspect.signature(getattr(importlib.import_module(f"{package}.{module}"), function)).parameters)
        for package in ("reference", "torch_impl")
    )
    shared = [first, "masks", "inputs", "targets", "epochs", "learning_rate", "batch_size"]
    assert theirs == [*shared, "sizes"]
    assert ours[: len(shared)] == shared


def test_settings_of_algorithm_1_have_the_same_names_and_defaults() -> None:
    production = {}
    for section in dataclasses.fields(settings.Settings):
        values = getattr(settings.Settings(), section.name)
        production |= dataclasses.asdict(values) if dataclasses.is_dataclass(values) else {section.name: values}
    # What follows from another option is left open there, and a batch is given by its parts.
    production |= {"sparsity_ratio": 0.7, "rmi_samples": 64, "dense_blocks": tuple(production["dense_blocks"])}
    production["batch_size"] = settings.Settings().training.batch_size
    for field in dataclasses.fields(reference.losa.Settings):
        assert production[field.name] == field.default, field.name


@pytest.mark.parametrize("op", OPS, ids=str)
def test_public_functions_say_what_they_are(op: Op) -> None:
    spec = inspect.getdoc(op.reference) or ""
    assert op.production.__doc__
    for part in ("Source:", "Returns:", "*Deviation*:", ">>>"):
        assert part in spec, f"the spec's docstring of {op} lacks {part}"
    assert not re.search(r"(Errors|Ties[^:]*): (none|ValueError or TypeError naming the argument)\.", spec), (
        "empty section"
    )


@pytest.mark.parametrize("package", ["reference", "torch_impl"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_bad_arguments_are_named(op: Op, package: str) -> None:
    case, argument = op.bad
    if package == "torch_impl":
        case = {name: to_torch(value) for name, value in case.items()}
    function = op.reference if package == "reference" else op.production
    with pytest.raises((ValueError, TypeError), match=rf"\b{argument}\b") as caught:
        function(**case)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["reference", "torch_impl"])
@pytest.mark.parametrize("op", OPS, ids=str)
def test_arrays_of_the_wrong_kind_are_refused(op: Op, package: str) -> None:
    """A string in place of the first array or number."""
    first = next(iter(inspect.signature(op.reference).parameters))
    case = {**op.bad[0], first: "seven"}
    if package == "torch_impl":
        case = {name: to_torch(value) for name, value in case.items()}
    function = op.reference if package == "reference" else op.production
    with pytest.raises((ValueError, TypeError, AttributeError)):
        function(**case)


def test_bad_values_reach_every_check() -> None:
    """The kinds of bad value that no single row has."""
    from reference.masks import prune as spec
    from torch_impl.masks import prune as production

    weight = np.ones((2, 4))
    kept = np.ones((2, 4), dtype=bool)
    for function, convert in ((spec.prune, lambda v: v), (production.prune, to_torch)):
        given = {"weight": convert(weight), "kept": convert(kept)}
        with pytest.raises(ValueError, match="one of the two"):
            function("magnitude", statistic=None, sparsity=0.5, nm=(2, 4), **given)
        with pytest.raises(ValueError, match="one of the two"):
            function("magnitude", statistic=None, **given)
        with pytest.raises(ValueError, match="statistic is missing"):
            function("wanda", statistic=None, sparsity=0.5, **given)
        with pytest.raises(ValueError, match="statistic is given"):
            function("magnitude", statistic=convert(np.ones(4)), sparsity=0.5, **given)
