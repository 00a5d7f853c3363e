"""Test the lowest versions that pyproject.toml declares.

    python -m oracle_tests.programs.lowest_versions [--instead torch==2.13.0] [--tests oracle_tests/test_run.py ...]

Makes build/lowest, a virtual environment with every dependency at its floor, and runs the tests that depend on them most.
`--instead` replaces a floor if that release is not available or a large download. Warnings are not errors: old releases warn
about newer ones. triton is omitted: each release of torch has its own.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "lowest"
EXTRAS = ("report", "spec", "test")
LEFT_OUT = ("triton",)
TESTS = [
    f"oracle_tests/{name}.py"
    for name in (
        "test_run", "test_streaming", "test_families", "test_checkpoint_files", "test_packed_folder", "test_hf_quantizer",
        "test_generate", "test_text", "test_windows", "test_report", "test_parity", "test_edge", "test_adapter_machine",
        "test_baselines", "spec/test_spec_page",
    )
]  # fmt: skip


def floors(project: str) -> dict[str, str]:
    """Read the lowest version of every package from a pyproject.toml. Raises ValueError for a dependency without a floor."""
    declared = tomllib.loads(project)["project"]
    lines = declared["dependencies"] + [line for extra in EXTRAS for line in declared["optional-dependencies"][extra]]
    found = {}
    for line in lines:
        match = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line)
        if match is None:
            raise ValueError(f"pyproject.toml declares {line!r}; give it a lowest version, as in numpy>=2.0")
        if match[1] not in LEFT_OUT:
            found[match[1]] = match[2]
    return found


def requirements(project: str, instead: Sequence[str]) -> list[str]:
    """Requirements for pip, with some floors replaced. Raises ValueError for a package that is not declared."""
    chosen = floors(project)
    for word in instead:
        name, _, version = word.partition("==")
        if name not in chosen or not version:
            raise ValueError(f"--instead {word}: name a declared package and its version, as in torch==2.13.0")
        chosen[name] = version
    return [f"{name}=={version}" for name, version in chosen.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instead", nargs="+", default=[], metavar="PACKAGE==VERSION", help="replace floors")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest is given")
    options = parser.parse_args(arguments)
    wanted = requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"), options.instead)
    print("\n".join(wanted), flush=True)
    venv.create(PLACE, clear=True, with_pip=True)
    python = str(PLACE / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    command = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "-W", "ignore", *options.tests]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


if __name__ == "__main__":
    sys.exit(main())
