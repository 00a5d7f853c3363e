"""The programs that are run by hand and need no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oracle_tests.programs import configuration_hashes


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
