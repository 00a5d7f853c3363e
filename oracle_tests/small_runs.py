"""Small, quick runs of the command line, shared by tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_models.random_models import save_random_model
from torch_impl.experiment.comparison import cells
from torch_impl.run import main

ROOT = Path(__file__).parents[1]
WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while it rained all day long "


def make_place(folder: Path) -> Path:
    """Write a model and some text into a folder."""
    save_random_model(folder / "model", "llama-gqa")
    lines = [f"{WORDS}{number} {WORDS[number % 50 :]}" for number in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(lines), encoding="utf-8")
    return folder


def arguments(place: Path, **changes: object) -> list[str]:
    """Options of a small, quick run; `changes` override them, None removes one."""
    options: dict[str, object] = {
        "model": place / "model",
        "calibration_data": place / "text.txt",
        "finetune_data": place / "text.txt",
        "eval_data": place / "text.txt",
        "nsamples": 6,
        "seqlen": 32,
        "rmi_samples": 4,
        "train_examples": 24,
        "train_seqlen": 32,
        "eval_seqlen": 32,
        "steps": 2,
        "device": "cpu",
        "learning_rate": 1e-2,
        "output_dir": place / "out",
        **changes,
    }
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", *str(value).split())]


def fails(capsys: pytest.CaptureFixture, place: Path, argv: list[str], words: list[str]) -> None:
    """Check that a command exits with 2, prints one error line with `words` and writes nothing."""
    before = sorted(path.name for path in place.iterdir())
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    for word in words:
        assert word in errors[0], errors[0]
    assert sorted(path.name for path in place.iterdir()) == before


def events(place: Path, name: str = "out") -> list[dict]:
    found = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in event.items() if key != "seconds"} for event in found]


def watched_windows(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list to which a comparison adds the windows that it measures, as it does."""
    seen: list[torch.Tensor] = []
    plain = cells.window_losses

    def window_losses(model: torch.nn.Module, windows: torch.Tensor, *rest: object) -> list[float]:
        seen.append(windows)
        return plain(model, windows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cells, "window_losses", window_losses)
    return seen
