"""Settings for all tests: Hypothesis profiles, threads, uninitialised memory poisoned."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: each worker and its child processes use one thread. Set before torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"

# Tests expect one-line errors, whatever the caller's environment says.
os.environ.pop("LOSA_TRACEBACK", None)

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels: without a GPU they run under Triton's interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, Phase, settings
from torch import nn

from oracle_tests.emulated import cases
from oracle_tests.emulated.kernels import Kernels
from oracle_tests.poison import poisoned
from oracle_tests.small_runs import make_place
from torch_impl.decode import cpu, cuda, cuda_gaps, cuda_layouts, packed_linear
from torch_impl.engine import training

_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# The same examples every time, so that a failure is caused by a change.
settings.register_profile("default", max_examples=40, derandomize=True, **_QUIET)
# New examples every time, or those of `--hypothesis-seed`: `make deep`.
settings.register_profile("deep", max_examples=400, database=None, print_blob=True, **_QUIET)
# For mutation testing, which asks only whether anything fails: no shrinking.
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
    """Fill uninitialised memory with NaN, so that reading it shows."""
    with poisoned():
        yield


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernels]:
    """The GPU's kernels on an emulated GPU, as compiled for each architecture."""
    return cases.compiled(tmp_path_factory)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Compile the CPU kernels before a test that reads standard error, where that is announced."""
    cpu.paths()


@pytest.fixture
def as_on_a_gpu(compiled: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the layer act as on a GPU with kernels, replaced by torch here. Returns the names of its calls, in order."""
    calls = []

    def noted(name: str, known_as: str, module: Any = cuda) -> None:
        function = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls.append(known_as)
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    for name in ("pack_rows", "stack", "matvec", "unpack"):
        noted(name, name)
    noted("pack_gaps_rows", "pack_gaps_rows", cuda_gaps)
    if torch.cuda.is_available():
        # Elsewhere this calls `matvec`.
        noted("matvec_parts", "matvec")
    else:
        monkeypatch.setattr(packed_linear, "_has_kernels", lambda device, dtype: dtype in cuda.DTYPES)
    return calls


@pytest.fixture(params=["panels", "gaps"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[cuda.Layout]:
    """Give every weight of values on a GPU panels, or gaps. Returns the class of such a layout."""
    monkeypatch.setattr(cuda_layouts, "FEW", 0 if request.param == "panels" else float("inf"))
    for name in ("MOST_KEPT", "MOST_SIZE"):
        monkeypatch.setattr(cuda_layouts, name, float("inf"))
    return cuda.Layout if request.param == "panels" else cuda_gaps.GapLayout


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and some text."""
    return make_place(tmp_path)


@pytest.fixture
def at_clip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[..., None]], None]]:
    """Call a function just before optimizer step N, counted from 1."""
    plain = training._clip

    def plan(number: int, act: Callable[..., None]) -> None:
        done = 0

        def clip(parameters: list[nn.Parameter], *rest: Any) -> None:
            nonlocal done
            done += 1
            if done == number:
                act(parameters)
            plain(parameters, *rest)

        monkeypatch.setattr(training, "_clip", clip)

    return plan


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Make Ctrl-C act as at a terminal; background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
