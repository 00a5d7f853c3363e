"""Store a small unfinished run of this version, which later versions resume in a test.

    python -m oracle_tests.programs.interrupted_run oracle_tests/data/interrupted-VERSION

The folder holds a tiny model, a text and the `.out.partial` of a run stopped by SIGTERM during the training of its second step.
Make one for every release whose runs must stay resumable; `test_upgrade` resumes all of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tiny_models.random_models import save_random_model

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
# Paths are relative, so that the folder can be moved: options must be the same when a run is resumed.
OPTIONS = """
    --model model --calibration_data text.txt --finetune_data text.txt --eval_data text.txt --output_dir out --device cpu
    --nsamples 4 --seqlen 16 --rmi_samples 4 --train_examples 48 --train_seqlen 16 --eval_seqlen 16 --eval_windows 2
    --steps 2 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --initial_rank 2 --lora_r 2
    --save_every 1 --keep_points 1
"""  # fmt: skip
WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while it rained all day long "


def last_state(place: Path) -> dict[str, Any] | None:
    """Read the state of the newest checkpoint; None before the first."""
    try:
        newest = max(place.glob(".out.partial/.points/*.json"))
        state: dict[str, Any] = json.loads(json.loads(newest.read_text())["body"])["state"]
    except (ValueError, FileNotFoundError):
        return None
    return state


def training_in_step_two(place: Path) -> bool:
    """Whether two optimizer steps of the second step are done."""
    progress = (last_state(place) or {}).get("progress") or {}
    return progress.get("step") == 2 and len(progress["losses"]) >= 2


def make(place: Path) -> None:
    """Start a run in a new folder and stop it. Raises RuntimeError if it ends by itself."""
    place.mkdir(parents=True)
    save_random_model(place / "model", "llama-gqa", **SIZES, num_key_value_heads=1, dtype=torch.bfloat16)
    documents = "\n<|endoftext|>\n".join(f"{number} {WORDS}" for number in range(32))
    (place / "text.txt").write_text(documents, encoding="utf-8")
    command = [sys.executable, "-m", "torch_impl.run", *OPTIONS.split()]
    run = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not training_in_step_two(place):
        time.sleep(0.001)
    run.send_signal(signal.SIGTERM)
    said = run.communicate()[1]
    if run.returncode != 128 + signal.SIGTERM:
        raise RuntimeError(f"the run was not stopped, it ended with {run.returncode}:\n{said}")
    (place / ".out.partial" / ".lock").unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="a new folder")
    place = parser.parse_args(arguments).place
    make(place)
    state = last_state(place)
    assert state is not None
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    print(f"{place}: {size} bytes, stopped after {len(state['progress']['losses'])} optimizer steps of step 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
