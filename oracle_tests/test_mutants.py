"""The mutation program: what it changes, what it does not change, which tests it picks, how it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from oracle_tests.programs import mutants
from oracle_tests.programs.mutations import Mutant, mutants_of

SOURCE = '''"""Words."""
from __future__ import annotations


@decorated(1)
def scale(x: int | None, by: float = 0.5, *, strict: bool = True) -> int | None:
    """More words."""
    if x is not None and x % 2 == 0 and (by):  # and a comment
        raise ValueError(f"x is {x + 1}")
    x = min(x, by, key=len)
    x += 1
    logger.info("words", x)
    say(x, "two words", encoding="utf-8")
    return -x if ready(x) else data["naïve"].copy()
'''


def changed(mutant: Mutant) -> tuple[str, str]:
    before, after = mutant.diff.splitlines()
    return before[1:].strip(), after[1:].strip()


def test_every_kind_of_change_once_and_nothing_else() -> None:
    found = mutants_of("some.py", SOURCE)
    condition = "if x is not None and x % 2 == 0 and (by):  # and a comment"
    minimum, closing = "x = min(x, by, key=len)", 'return -x if ready(x) else data["naïve"].copy()'
    definition = "def scale(x: int | None, by: float = 0.5, *, strict: bool = True) -> int | None:"
    say = 'say(x, "two words", encoding="utf-8")'
    expected = [
        (definition, definition.replace("0.5", "1.0")),
        (definition, definition.replace("True", "False")),
        (condition, "if not (x is not None and x % 2 == 0 and (by)):  # and a comment"),
        (condition, condition.replace("is not", "is")),
        (condition, condition.replace("None and", "None or")),
        (condition, condition.replace("%", "//")),
        (condition, condition.replace("% 2", "% 3")),
        (condition, condition.replace("==", "!=")),
        (condition, condition.replace("0 and", "0 or")),
        (condition, condition.replace("== 0", "== 1")),
        ('raise ValueError(f"x is {x + 1}")', "pass"),
        (minimum, "pass"),
        (minimum, minimum.replace("min", "max")),
        (minimum, minimum.replace(", key=len", "")),
        ("x += 1", "pass"),
        ("x += 1", "x -= 1"),
        ("x += 1", "x += 2"),
        (say, "pass"),
        (say, say.replace('x, "two words"', '"two words", x')),
        (closing, closing.replace("-x", "(x)")),
        (closing, closing.replace("ready(x)", "not (ready(x))")),
        (closing, closing.replace(".copy()", "")),
        (closing, closing.replace("naïve", "XXnaïve")),
    ]
    assert sorted(changed(mutant) for mutant in found) == sorted(expected)
    assert {mutant.function for mutant in found} == {"scale"}
    assert len({mutant.name for mutant in found}) == len(found)
    for mutant in found:
        compile(mutant.source, "some.py", "exec")


def test_a_mutant_gets_the_tests_of_its_function_the_quickest_first() -> None:
    reach = mutants.Reach(
        seconds={"a": 2.0, "b": 1.0, "c": 0.1}, tests={"m.py::f": ["a", "b"], "m.py::g": ["c"], "other.py::f": ["c"]}
    )

    def of(function: str, file: str = "m.py") -> list[str]:
        return reach.of(Mutant(file, function, 1, "", "", ""))

    assert of("f") == ["b", "a"]
    assert of("") == of("nobody's") == ["c", "b", "a"], (
        "a constant of the file, a function that only compiled code holds"
    )
    assert of("f", "third.py") == []


def test_all_of_production_is_in_some_part_but_what_runs_elsewhere() -> None:
    parts = [file for part in mutants.PARTS for file in mutants.files_of(part)]
    assert len(parts) == len(set(parts))
    every = {file for file in Path(mutants.ROOT, "torch_impl").rglob("*.py") if "bench" not in file.parts}
    assert {file.relative_to(mutants.ROOT).as_posix() for file in every - set(parts)} == set(mutants.ELSEWHERE)


def test_the_interval_is_wilson_s() -> None:
    low, high = mutants.interval(90, 100)
    assert (low, high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert mutants.interval(5, 5)[1] == 1
