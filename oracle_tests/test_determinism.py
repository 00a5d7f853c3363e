"""What --deterministic asks torch for; the bits themselves are compared on a GPU, by gpu_resume."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from oracle_tests.small_runs import arguments, make_place
from torch_impl.run import main

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test is left with these settings."""
    monkeypatch.setenv(WORKSPACE, "")
    del os.environ[WORKSPACE]
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_deterministic_kernels_are_asked_for_and_only_if_wanted(tmp_path: Path) -> None:
    plan = [*arguments(make_place(tmp_path)), "--dry_run"]
    assert main(plan) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
    assert main([*plan, "--deterministic"]) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[WORKSPACE] == ":4096:8"
    os.environ[WORKSPACE] = ":16:8"
    assert main([*plan, "--deterministic"]) == 0
    assert os.environ[WORKSPACE] == ":16:8", "what the user has set stays"
