"""Check on a GPU with deterministic settings that a resumed run ends with the same bits, and measure their cost.

    python -m oracle_tests.programs.gpu_resume [--device cuda] [--hidden 1024] [--blocks 6]

Prunes and heals a random LLaMA in bf16 in two steps by Wanda and by SparseGPT, once without a stop and once stopped during pruning
and during training and resumed in a fresh copy of the model; checkpoints are written in the background. Times the run with and
without deterministic settings, in separate processes, after a first run that compiles kernels. Exits with 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_impl import losa
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.batches import Example
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.determinism import make_deterministic
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig

EXAMPLES = 48
STEPS = 2


class Stop(Exception):  # noqa: N818 - asked for
    """The checkpointer has reached the checkpoint at which the run stops."""


class Stopping(Checkpointer):
    """Stop after a number of checkpoints."""

    def __init__(self, checkpoints: RunCheckpoints, after: int) -> None:
        super().__init__(checkpoints, save_every=2, in_background=True)
        self._left = after

    def _save(self) -> None:
        super()._save()
        self._left -= 1
        if self._left == 0:
            self._background.wait()
            raise Stop


def build(hidden: int, blocks: int, device: torch.device) -> LlamaForCausalLM:
    """Make a model with random weights in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16)  # type: ignore[arg-type]


def settings(method: str) -> Settings:
    """Settings of two steps; distillation, so that both models run during training."""
    return Settings(
        prune=PruneConfig(prune_method=method, steps=STEPS),
        adapter=AdapterConfig(),
        calibration=CalibrationConfig(nsamples=16, seqlen=256, rmi_samples=16),
        training=TrainingConfig(learning_rate=1e-3, loss="kl"),
    )


def tokens() -> tuple[torch.Tensor, list[list[Example]]]:
    """Make calibration sequences, and training examples of two lengths in two parts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, (16, 256), generator=generator)
    rows = [torch.randint(1000, (256 if i % 4 else 192,), generator=generator) for i in range(EXAMPLES)]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    return ids, [examples[: EXAMPLES // 2], examples[EXAMPLES // 2 :]]


def run(model: LlamaForCausalLM, method: str, checkpointer: Checkpointer | None = None) -> str:
    """Hash the merged weights."""
    losa.run(model, *tokens(), settings(method), checkpointer=checkpointer)
    merge_adapters(Decoder(model))
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resumed(model: LlamaForCausalLM, method: str, stops: Sequence[int]) -> str:
    """Stop the same run after the given numbers of checkpoints, and resume it in a fresh model each time."""
    with tempfile.TemporaryDirectory() as folder:
        for stop in stops:
            try:
                run(copy.deepcopy(model), method, Stopping(RunCheckpoints(Path(folder)), stop))
            except Stop:
                continue
        return run(
            copy.deepcopy(model), method, Checkpointer(RunCheckpoints(Path(folder)), save_every=2, in_background=True)
        )


def measure(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Seconds of a run by method; with deterministic settings also the hashes of a run, its repetition, and a resumed run."""
    if options.deterministic:
        make_deterministic()
    device = torch.device(options.device)
    model = build(options.hidden, options.blocks, device)
    found: dict[str, dict[str, object]] = {}
    for method in ("wanda", "sparsegpt"):
        hashes = [run(copy.deepcopy(model), method)]
        begin = time.perf_counter()
        hashes.append(run(copy.deepcopy(model), method))
        found[method] = {"seconds": time.perf_counter() - begin}
        if options.deterministic:
            # During pruning, during training, and during the second step.
            hashes.append(resumed(model, method, [2, options.blocks, 4]))
        found[method]["hashes"] = hashes
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per method. Returns 1 if any bits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    sizes = ["--device", options.device, "--hidden", str(options.hidden), "--blocks", str(options.blocks)]
    command = [sys.executable, "-m", "oracle_tests.programs.gpu_resume", "--measure", *sizes]
    results = []
    for extra in ([], ["--deterministic"]):
        done = subprocess.run([*command, *extra], stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    plain, fixed = results
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.blocks} blocks of width {options.hidden}")
    same = True
    for method, row in fixed.items():
        whole, again, parts = row["hashes"]
        same &= whole == again == parts
        print(
            f"{method:<10} stopped three times and resumed: {'same bits' if whole == parts else 'OTHER BITS'}; "
            f"run again: {'same bits' if whole == again else 'OTHER BITS'}, without the settings: "
            f"{'same bits' if len(set(plain[method]['hashes'])) == 1 else 'other bits'}; "
            f"{row['seconds']:.2f} s with them, {plain[method]['seconds']:.2f} s without: "
            f"× {row['seconds'] / plain[method]['seconds']:.2f}"
        )
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
