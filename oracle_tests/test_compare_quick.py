"""losa compare quick, made very short: what it runs, and that its figures are those of the models and windows it names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oracle_tests.small_runs import make_place, watched_windows
from torch_impl.commands import compare
from torch_impl.experiment.comparison.results import Results
from torch_impl.experiment.sections import EMBEDDED_MODEL

SHORT = {"nsamples": 4, "seqlen": 64, "train_examples": 16, "train_seqlen": 64, "eval_seqlen": 64, "eval_windows": 6}
RECIPES = ["none", "sparse_lora", "losa", "best"]


def perplexity_of(folder: Path, windows: torch.Tensor) -> float:
    """exp of the mean over all predicted tokens of −log p, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        losses += [float(logits[t].logsumexp(0) - logits[t, window[t + 1]]) for t in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


def test_quick_on_both_models(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    (place / "model").rename(place / "stories260K")
    (place / "text.txt").rename(place / "tinystories.txt")
    seen = watched_windows(monkeypatch)
    words = [word for name, value in SHORT.items() for word in (f"--{name}", str(value))]
    words += ["--only", "recipe=none,best", "sparsity=0.7", "--data", str(place), "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert compare.main(["quick", "--device", "cpu", *words]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0].startswith(f"[1/8] {EMBEDDED_MODEL.name}, dense, seed 0: perplexity ")
    assert said.err.splitlines()[0].endswith(" left")
    assert any("] stories260K, 0.7, best, seed 0" in line for line in said.err.splitlines())
    folders = {"stdlib": EMBEDDED_MODEL, "tinystories.txt": place / "stories260K"}
    outcomes = list(Results(tmp_path / "out").together().values())
    for text, folder in folders.items():
        of_text = [outcome for outcome in outcomes if text in outcome.losses]
        assert sorted(outcome.labels["recipe"] for outcome in of_text) == (
            ["best", "dense", *["none"] * 3] if text == "stdlib" else ["best", "dense", "none"]
        )
        [dense] = [outcome for outcome in of_text if outcome.labels["recipe"] == "dense"]
        windows = seen[0] if text == "stdlib" else next(w for w in seen if w.max() < 257 and len(w) == 3)
        assert dense.perplexity(text) == pytest.approx(perplexity_of(folder, windows), rel=1e-5)
        for outcome in of_text:
            assert outcome.sparsity == pytest.approx(0.0 if outcome is dense else 0.7, abs=0.02)
        shown = f"| dense | {dense.perplexity(text):,.2f} |"
        assert shown in said.out
        assert f"<td>{dense.perplexity(text):,.2f}</td>" in (tmp_path / "out" / "tables.html").read_text()


def test_quick_compares_recipes_and_methods(capsys: pytest.CaptureFixture) -> None:
    assert compare.main(["quick", "--dry_run"]) == 0
    *runs, count = capsys.readouterr().out.splitlines()
    assert (len(runs), count) == (21, "21 runs")
    for sparsity in ("0.5", "0.7", "2:4"):
        for recipe in RECIPES:
            assert sum(run.startswith(f"{sparsity}, {recipe}, seed 0") for run in runs) == 1
    assert sum(run.startswith(("magnitude, ", "sparsegpt, ")) for run in runs) == 8
    assert "dense, seed 0" in runs
    assert json.dumps(runs).count("0.008") == 3 * 3 + 4
