"""The programs of oracle_tests/programs/ that need no GPU."""

from __future__ import annotations

import copy
import json
import re
import statistics
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oracle_tests.programs import configuration_hashes, lowest_versions, recovery_table
from oracle_tests.small_runs import ROOT
from tiny_models.random_models import random_model
from torch_impl.engine import batches, gradients
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment.config import parse


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


def test_recipes_are_compared_on_both_halves_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each over its seeds, one of them without adapters; the table that ships names options that exist."""
    recipes = tmp_path / "recipes.toml"
    recipes.write_text(
        """adapters = "--learning_rate 1e-2"
        bad = "--sparsity_type 2:5 --steps 1"
        kept = {options = "--steps 1", kept_rate = 1e-3}
        """
    )
    common = (
        "--device cpu --nsamples 4 --seqlen 16 --train_examples 8 --train_seqlen 16 --eval_seqlen 16 --eval_windows 4"
    )
    file = tmp_path / "runs.jsonl"
    own = [str(recipes), "--gpus", "0", "--seeds", "0", "1", "--json", str(file)]
    assert recovery_table.main([*own, "--", *common.split(), "--steps", "2"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("2:5") == 2, "what failed is said, and the rest goes on"
    runs = {(run["recipe"], run["seed"]): run for run in map(json.loads, file.read_text().splitlines())}
    assert len(runs) == 6
    values = [runs["adapters", seed]["second"] for seed in (0, 1)]
    row = next(line for line in printed.splitlines() if line.startswith("adapters ") and "±" in line)
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}" in row
    shipped = tomllib.loads((ROOT / "oracle_tests" / "programs" / "recovery.toml").read_text())
    for _, _, words, _ in recovery_table.jobs_of(shipped, [], [0]):
        parse(words)


def test_every_kept_weight_is_trained_and_no_zero(tmp_path: Path) -> None:
    dense = random_model("llama-gqa").eval()
    model = copy.deepcopy(dense)
    weights = [p for name, p in model.named_parameters() if "proj" in name]
    before = []
    with torch.no_grad():
        for weight in weights:
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
            before.append(weight.clone())
    ids = torch.randint(257, (8, 12), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in ids] * 4
    config = TrainingConfig(per_device_train_batch_size=8, gradient_accumulation_steps=1)

    def loss() -> float:
        with torch.no_grad():
            return float(gradients.sum_loss(model, batches.collate(examples[:8], ids.device), dense))

    start = loss()
    recovery_table.train_kept(model, dense, examples, config, 3e-3)
    assert loss() < 0.9 * start
    for weight, old in zip(weights, before, strict=True):
        assert not weight[old == 0].any()
        assert (weight != old)[old != 0].float().mean() > 0.9
