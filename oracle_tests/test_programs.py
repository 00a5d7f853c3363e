"""The programs of oracle_tests/programs/, as far as they need no GPU."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import torch_impl
from oracle_tests.programs import (
    configuration_hashes,
    gpu_llm,
    importance_orders,
    lowest_versions,
)
from oracle_tests.small_runs import ROOT, arguments, make_place
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.engine.decoder import Decoder


def test_hashes_are_compared_with_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "magnitude-offloaded"
    monkeypatch.setattr(configuration_hashes, "CONFIGURATIONS", {name: configuration_hashes.CONFIGURATIONS[name]})
    assert configuration_hashes.main([]) == 0
    printed = capsys.readouterr().out
    hashes = dict(line.split() for line in printed.splitlines())
    assert list(hashes) == [name, "all"]
    before = tmp_path / "before.txt"
    before.write_text(printed)
    assert configuration_hashes.main(["--expect", str(before)]) == 0
    monkeypatch.setattr(configuration_hashes, "hash_of_run", lambda *_: hashes[name][::-1])
    assert configuration_hashes.main(["--expect", str(before)]) == 1
    assert capsys.readouterr().err.endswith(f"different: {name}, all\n")


def test_a_hash_is_of_the_tensors_and_not_of_their_files(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(4)}

    def hashed(*files: dict[str, torch.Tensor]) -> str:
        for old in tmp_path.glob("*"):
            old.unlink()
        for number, file in enumerate(files):
            save_file(file, tmp_path / f"{number}.safetensors", metadata={"number": str(number)})
        return configuration_hashes.hash_of_weights(tmp_path)

    plain = hashed(tensors)
    assert hashed({"b": tensors["b"]}, {"a": tensors["a"]}) == plain
    minus_zero = torch.tensor([0.0, 0.0, 0.0, -0.0])
    changes = {"a": tensors["a"].reshape(3, 2)}, {"b": minus_zero}, {"b": tensors["b"].int()}, {"c": torch.zeros(4)}
    assert len({plain, *(hashed({**tensors, **change}) for change in changes)}) == 1 + len(changes)
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        hashed()


PROJECT = """
[project]
dependencies = ["numpy>=2.0", "torch>=2.11"]
[project.optional-dependencies]
report = ["matplotlib >= 3.9"]
spec = []
test = ["pytest-xdist>=3.6", "triton>=3.4; platform_system == 'Linux'"]
lint = ["ruff"]
"""


def test_every_declared_floor_is_installed_or_replaced() -> None:
    found = ["numpy==2.0", "torch==2.11", "matplotlib==3.9", "pytest-xdist==3.6"]
    assert lowest_versions.requirements(PROJECT, []) == found
    assert lowest_versions.requirements(PROJECT, ["torch==2.13.0"]) == [found[0], "torch==2.13.0", *found[2:]]
    for word in ("torch", "scipy==1.13"):
        with pytest.raises(ValueError, match=re.escape(f"--instead {word}: name a declared package")):
            lowest_versions.requirements(PROJECT, [word])
    with pytest.raises(ValueError, match="'numpy'; give it a lowest version"):
        lowest_versions.floors(PROJECT.replace("numpy>=2.0", "numpy"))


def test_the_project_s_own_floors_can_be_read_and_their_tests_exist() -> None:
    assert {"torch", "transformers", "pytest"} <= set(lowest_versions.floors((ROOT / "pyproject.toml").read_text()))
    assert all((ROOT / test).is_file() for test in lowest_versions.TESTS)


def test_orders_of_importance_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a small model; and correlations by hand: swapping the lowest two of four costs 6 · 2 / (4 · 15) = 0.2."""
    options = arguments(make_place(tmp_path), steps=1, finetune="false", eval_windows=2)
    assert importance_orders.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    blocks = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert sorted(int(line.split("(")[1].split(")")[0]) for line in blocks) == [1, 2, 3]
    [row] = [line for line in lines if line.startswith("| gradient | ")]
    assert row.split(" | ")[2] == "+1.00"
    values = {"rmi": [1, 2, 3, 4], "gradient": [20, 10, 30, 40], "owl": [4, 3, 2, 1], "e": [5, 5, 5, 5]}
    found = importance_orders.correlations({name: np.array(value) for name, value in values.items()})
    np.testing.assert_allclose(found[0], [1, 0.8, -1, np.nan])


def test_a_packed_llm_is_held_against_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes; with one wrong projection it does not."""
    model = random_model("llama", dtype=torch.bfloat16, max_position_embeddings=512)
    for weight in Decoder(model).weights:
        weight.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "\n".join("A line of some words, long enough to begin a prompt with: " * 2 for _ in range(9))
    )
    options = [
        str(tmp_path / "model"),
        "--text",
        str(tmp_path / "text.txt"),
        "--tokens",
        "6",
        "--seqlen",
        "16",
        "--windows",
        "4",
    ]
    options += ["--device", "cpu", "--values"]
    monkeypatch.setattr(gpu_llm, "PROMPTS", (1, 17))
    assert gpu_llm.main([*options, "same", "int8"]) == 0
    assert capsys.readouterr().out.count(": right; ") == 4
    load = torch_impl.load_packed

    def wrong(*arguments: Any, **options: Any) -> Any:
        found: Any = load(*arguments, **options)
        found.model.layers[1].mlp.down_proj.values.mul_(-1)
        return found

    monkeypatch.setattr(torch_impl, "load_packed", wrong)
    assert gpu_llm.main([*options, "same"]) == 1
    assert capsys.readouterr().out.count(": WRONG; ") == 2


PROGRAMS = sorted(path.stem for path in (ROOT / "oracle_tests/programs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_how_to_call_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    program = importlib.import_module(f"oracle_tests.programs.{name}")
    if hasattr(program, "main"):
        assert f"-m oracle_tests.programs.{name}" in program.__doc__
        with pytest.raises(SystemExit, match=r"^0$"):
            program.main(*[["--help"]] * bool(inspect.signature(program.main).parameters))
        assert capsys.readouterr().out.startswith("usage: ")
