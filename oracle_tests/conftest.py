"""Settings for all tests: Hypothesis profiles, threads, uninitialised memory poisoned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores, so that each of them, and what it starts, computes in one thread; before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

# Errors are one line here, whatever whoever runs the tests is after.
os.environ.pop("LOSA_TRACEBACK", None)

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels: without a GPU they run under Triton's interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, Phase, settings

from oracle_tests.poison import poisoned
from torch_impl.decode import cuda, packed_linear

_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# The same examples every time: a change fails for what it changes.
settings.register_profile("default", max_examples=40, derandomize=True, **_QUIET)
# Others every time, or those of `--hypothesis-seed`: `make deep`.
settings.register_profile("deep", max_examples=400, database=None, print_blob=True, **_QUIET)
# For mutation testing: whether anything fails is all that matters, not how small the failure can be made.
settings.register_profile(
    "mutants", max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate], **_QUIET
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--profile",
        default="default",
        choices=["default", "deep", "mutants"],
        help="how many examples Hypothesis draws",
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile(config.getoption("--profile", "default"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What is read before it was written is NaN, so that it shows."""
    with poisoned():
        yield


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layer as it is on a GPU with kernels, which torch stands in for here; what it calls, in order."""
    calls = []

    def noted(name: str) -> None:
        function = getattr(cuda, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(cuda, name, call)

    for name in ("pack_rows", "matvec", "unpack"):
        noted(name)
    if not torch.cuda.is_available():
        monkeypatch.setattr(packed_linear, "_has_kernels", lambda values: values.dtype in cuda.DTYPES)
    return calls
