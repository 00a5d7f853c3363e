"""A small comparison of a tiny model."""

from __future__ import annotations

from pathlib import Path

from oracle_tests.small_runs import arguments

FILE = """
[[matrix]]
sparsity = [0.5]
recipes = ["none", "sparse_lora", "losa"]
learning_rates = [1e30, 1e-2]
[recipes.broken]
options = { steps = 3, finetune = false, step_shares = [0.5, 0.25, 0.25] }
"""


def words(place: Path, text: str = FILE, **changes: object) -> list[str]:
    """Words of a small comparison."""
    (place / "some.toml").write_text(text)
    given = {"output_dir": None, "learning_rate": None, "output": place / "out", "steps": None, **changes}
    given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    return [str(place / "some.toml"), *arguments(place, **given)]
