"""Run `losa run` whole on a model of a real one's shapes, with random weights, and show where time and memory went.

    python -m oracle_tests.programs.gpu_whole_run FOLDER --geometry llama-2-7b --tokenizer MODEL --minutes 20 --gib 48
        --config llama_7b --preset best --calibration_data FILE --finetune_data FILE --eval_data FILE …

All further options are those of `losa run`. FOLDER is new; the model and the run are written into it: three to four times the
model's bytes. The tokenizer of MODEL, a folder, is cut to the geometry's vocabulary, so that texts are real ones. The run itself
times the parts of its steps. Exits with 1 if the saved model lacks the sparsity asked for, a perplexity is not finite, or time or
memory exceeds --minutes or --gib.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_impl.experiment.planning import geometry

PARTS = ("importance", "prune", "reconstruct", "train")
CLOSE = 5e-3
"""How far the sparsity may be from the one asked for: numbers of weights are rounded down in each row."""


def cut_tokenizer(source: Path, target: Path, size: int) -> None:
    """Copy the files of a byte-level BPE tokenizer, without the tokens and merges from `size` on."""
    for file in source.glob("*token*"):
        shutil.copy(file, target)
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    kept = model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in kept and all(part in kept for part in pair)]
    if any(token["id"] >= size for token in content["added_tokens"]):
        raise ValueError(f"{source} has special tokens from {size} on; use another tokenizer")
    (target / "tokenizer.json").write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def write_model(folder: Path, name: str, tokenizer: Path, device: torch.device) -> None:
    """Write a model of this geometry in bf16 with random weights, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    cut_tokenizer(tokenizer, folder, geometry.GEOMETRIES[name]["vocab_size"])
    model = geometry.build(name, None, device, torch.bfloat16)
    # Ids of the geometry's own tokenizer.
    model.config.bos_token_id = model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.save_pretrained(folder)


def report(result: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a report: seconds of each part of each step, and what the whole run took."""
    lines = [f"{'step':>6}{'target':>9}{'found':>9}" + "".join(f"{part:>13}" for part in (*PARTS, "perplexity"))]
    for step, perplexity in zip(steps, result["perplexity_after_step"], strict=True):
        found = sum(step["realised"]) / len(step["realised"])
        seconds = "".join(f"{step['seconds'].get(part, 0.0):>11.1f} s" for part in PARTS)
        lines.append(f"{step['step']:>6}{step['target']:>9.2%}{found:>9.2%}{seconds}{perplexity:>13,.1f}")
    sums = [sum(step["seconds"].get(part, 0.0) for step in steps) for part in PARTS]
    lines.append(f"{'all':>24}" + "".join(f"{total:>11.1f} s" for total in sums))
    algorithm, whole = sum(sums) / 60, result["seconds_in_all"] / 60
    lines.append(
        f"{whole:.1f} minutes in all, {algorithm:.1f} of them Algorithm 1; the rest: loading, pruning at once for comparison, "
        "evaluating, saving, verifying"
    )
    memory = {name: size / 2**30 for name, size in result["peak_memory"].items()}
    lines.append("peak memory: " + ", ".join(f"{name} {size:.1f} GiB" for name, size in memory.items()))
    return lines


def failures(result: dict[str, Any], minutes: float, gib: float) -> list[str]:
    """Return what is wrong with a run, in words; empty if nothing is."""
    found = []
    if not all(map(math.isfinite, [*result["perplexity_after_step"], result["losa"]["perplexity"]])):
        found.append("a perplexity is not finite")
    if abs(result["losa"]["sparsity"] - result["target_sparsity"]) > CLOSE:
        found.append(f"sparsity {result['losa']['sparsity']:.4f} instead of {result['target_sparsity']:.4f}")
    for name, (pruned, saved) in result["verification"]["sparsity_pruned_and_saved"].items():
        if saved < pruned:
            found.append(f"{name} is saved with {saved:.4f} zeros instead of {pruned:.4f}")
    if result["seconds_in_all"] > 60 * minutes:
        found.append(f"more than {minutes:g} minutes")
    device = result["peak_memory"].get("device", 0) / 2**30
    if device > gib:
        found.append(f"{device:.1f} GiB on the device, more than {gib:g}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 1 if the run is not as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=list(geometry.GEOMETRIES), default="llama-2-7b")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a model with a byte-level BPE tokenizer"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="longest time allowed")
    parser.add_argument("--gib", type=float, default=math.inf, help="most memory of the device allowed")
    options, asked = parser.parse_known_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, run = options.folder / "model", options.folder / "run"
    write_model(model, options.geometry, options.tokenizer, device)
    torch.cuda.empty_cache()
    command = [sys.executable, "-m", "torch_impl.cli", "run", "--model", str(model), "--output_dir", str(run), *asked]
    # In a process of its own, whose memory is the run's.
    if code := subprocess.run(command, check=False).returncode:
        return code
    result, steps = (
        json.loads((run / name).read_text(encoding="utf-8")) for name in ("losa_result.json", "steps.json")
    )
    print("\n".join(report(result, steps)))
    wrong = failures(result, options.minutes, options.gib)
    print("\n".join([f"FAILED: {line}" for line in wrong] or ["as asked"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
