"""The benchmark on a CPU: every part runs, both sides agree, and a ratio is refused where they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torch_impl.bench import __main__ as bench
from torch_impl.bench import parts
from torch_impl.bench.measure import Row


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    status = bench.main(["--device", "cpu", "--repeats", "1", "--json", str(tmp_path / "bench.json"), *arguments])
    return status, json.loads((tmp_path / "bench.json").read_text())


def test_every_part_runs_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, figures = run(tmp_path, "--geometry", "small", "--dtype", "float32", "--sequences", "8", "--length", "64")
    assert status == 0
    assert len(figures["rows"]) == 8
    for row in figures["rows"]:
        assert row["ours_ms"] > 0
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert 0 <= row["disagreement"] <= row["bound"]
    shown = capsys.readouterr().out
    assert "ceilings measured now" in shown
    assert "training step, 4 of 8 to 32, merged weight held" in shown
    assert "refused" not in shown
    assert [row["geometry"] for row in figures["stream"] + figures["scale"]] == ["small", "small", "medium"]
    smaller, larger = figures["scale"]
    for row in figures["stream"] + figures["scale"]:
        assert row["pruning sweep, s a block"] > 0
        assert row["bytes of a block"] == 4 * row["parameters of a block"]
    assert larger["device peak, GB"] > smaller["device peak, GB"]
    for row in figures["plan"]:
        # On the CPU the blocks that another thread reads are not measured.
        assert 0.8 < row["foretold / measured"] < (2.0 if "block by block" in row["case"] else 1.25), row


def test_a_side_that_gives_other_numbers_gets_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "FLOAT32_BOUND", 0.0)
    status, figures = run(tmp_path, "--parts", "train", "--train_lengths", "8", "--blocks", "1")
    assert status == 1
    assert all(row["ratio"] is None for row in figures["rows"])
    assert "refused" in capsys.readouterr().out


def test_ours_alone_claims_nothing(tmp_path: Path) -> None:
    status, figures = run(tmp_path, "--parts", "rmi", "--ours_only")
    assert status == 0
    assert figures["rows"][0]["plain_ms"] is None


def test_a_ratio_needs_agreement() -> None:
    assert Row("", 1.0, 2.0, disagreement=1e-3, bound=1e-2).ratio == 2.0
    assert Row("", 1.0, 2.0, disagreement=1e-1, bound=1e-2).ratio is None
    assert Row("", 1.0, 2.0, disagreement=float("nan"), bound=1e-2).ratio is None
    assert Row("", 1.0, 2.0).ratio is None
