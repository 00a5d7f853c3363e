"""A run that an older version left unfinished is resumed by this one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from oracle_tests.programs.interrupted_run import OPTIONS
from torch_impl.run import main

STORED = sorted((Path(__file__).parent / "data").glob("interrupted-*"))


@pytest.fixture(params=STORED, ids=lambda folder: folder.name)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a stored run's folder, as the working directory."""
    shutil.copytree(request.param, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def forget(place: Path, *names: str) -> None:
    """Make the record of the run that of a version which did not know these options."""
    [manifest] = place.glob(".out.partial/.points/*.json")
    body = json.loads(json.loads(manifest.read_text())["body"])
    for name in names:
        del body["state"]["notes"]["options"][name]
    text = json.dumps(body)
    manifest.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}))


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_older_version_s_run_is_resumed_though_it_did_not_know_every_option(place: Path) -> None:
    assert STORED
    forget(place, "reconstruct_epochs", "compile_blocks", "loss", "step_shares")
    before = events(place / ".out.partial" / "metrics.jsonl")
    assert main([*OPTIONS.split(), "--resume", "--save_every", "50"]) == 0
    after = events(place / "out" / "metrics.jsonl")
    assert after[: len(before)] == before, "nothing is done again"
    trained = [(event["step"], event["optimizer_step"]) for event in after if event["event"] == "train"]
    assert len(trained) == len(set(trained)) == 48
    assert max(trained)[0] == 2
    assert json.loads((place / "out" / "losa_result.json").read_text())["losa"]["sparsity"] > 0.6
    assert not (place / ".out.partial").exists()


def test_an_option_that_the_older_version_did_not_know_may_not_be_changed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget(place, "loss")
    assert main([*OPTIONS.split(), "--resume", "--loss", "kl"]) == 2
    assert "error: loss is 'kl', the run began with 'ce'; " in capsys.readouterr().err
    assert (place / ".out.partial").exists()
