"""The worked example of reference/README.md is what the code prints."""

from __future__ import annotations

import doctest
from pathlib import Path

README = Path(__file__).parents[2] / "reference" / "README.md"


def test_the_worked_example_is_run() -> None:
    result = doctest.testfile(str(README), module_relative=False, encoding="utf-8")
    assert result.attempted >= 12
    assert result.failed == 0
