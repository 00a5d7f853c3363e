"""Hash the merged weights of ten runs, to show that a code change keeps every bit.

    python -m oracle_tests.programs.configuration_hashes > before.txt
    python -m oracle_tests.programs.configuration_hashes --expect before.txt      after the change, on the same machine

The runs are small but complete and go through the command line. They cover every pruning method, pattern and loss, float32 and
bfloat16, with and without reconstruction, training and offloading, on seeded models of every family. Prints a SHA-256 of names,
dtypes, shapes and bytes of each run's weights, and one over all. With `--expect` the exit status is 1 if any differs. Takes less
than a minute on one core. Uses only `torch_impl.run.main` of production.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import logging

from tiny_models.random_models import save_random_model
from torch_impl.run import main as run

COMMON = (
    "--seed 1 --device cpu --nsamples 6 --seqlen 32 --rmi_samples 4 --train_examples 24 --train_seqlen 32 --eval_seqlen 32"
    " --eval_windows 2 --learning_rate 1e-2 --per_device_train_batch_size 3"
)
ONE_SHOT = "--steps 1 --finetune false"
EMBEDDED = "embedded"
MAGNITUDE, SPARSEGPT = "--prune_method magnitude", "--prune_method sparsegpt"
# Name: model, options.
CONFIGURATIONS = {
    "wanda-paper": ("llama-gqa", "--preset paper --steps 3"),
    "wanda-best": ("llama", "--preset best --steps 2 --reconstruct_epochs 2 --weight_decay 0.1"),
    "wanda-embedded-kl": (EMBEDDED, "--steps 2 --loss kl --sparsity_ratio 0.5 --step_shares 0.4 0.6 --gradient_checkpointing"),
    "wanda-mixed-fold": ("qwen3", "--steps 3 --sparsity_type mixed-2:4 --rank_shrink fold --dtype bfloat16"),
    "wanda-quick-offloaded": ("qwen2", "--preset quick --reconstruct_epochs 2 --offload on --dtype bfloat16"),
    "magnitude-offloaded": ("opt", f"{MAGNITUDE} --sparsity_ratio 0.5 --offload on {ONE_SHOT}"),
    "magnitude-2:8": ("mistral", f"{MAGNITUDE} --sparsity_type 2:8 --steps 2 --hold_merged off --layer_sparsity uniform"),
    "sparsegpt-2:4": ("mistral", f"{SPARSEGPT} --sparsity_type 2:4 --steps 2 --dtype bfloat16"),
    "sparsegpt-mixed-kl": ("qwen2", f"{SPARSEGPT} --sparsity_type mixed-2:4 --steps 2 --loss kl --lr_schedule whole_run"),
    "sparsegpt-offloaded": ("llama-gqa", f"{SPARSEGPT} --calibration_batch_size 4 --offload on {ONE_SHOT}"),
}  # fmt: skip
WORDS = "the quick brown fox jumps over the lazy dog and the cat sat on the mat while it rained all day long "


def write_text(file: Path) -> None:
    """Write forty short documents."""
    file.write_text("\n<|endoftext|>\n".join(f"{WORDS}{n} {WORDS[n % 50 :]}" for n in range(40)), encoding="utf-8")


def hash_of_weights(folder: Path) -> str:
    """Hash all tensors of a folder by name, however they are divided among files."""
    found = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if not tensors:
        raise FileNotFoundError(f"{folder} holds no weights")
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hash_of_run(place: Path, name: str) -> str:
    """Run one configuration in `place` and hash what it saves. Raises RuntimeError, with the output, if it fails."""
    family, options = CONFIGURATIONS[name]
    arguments = [*COMMON.split(), *options.split(), "--output_dir", str(place / name)]
    for kind in ("calibration", "finetune", "eval"):
        arguments += [f"--{kind}_data", str(place / "text.txt")]
    if family != EMBEDDED:
        model = place / family
        if not model.exists():
            save_random_model(model, family, seed=7)
        arguments += ["--model", str(model)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = run(arguments)
    if status:
        raise RuntimeError(f"{name} ended with status {status}:\n{printed.getvalue()}")
    return hash_of_weights(place / name / "model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a hash is not the expected one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expect", type=Path, help="earlier output to compare with")
    options = parser.parse_args(arguments)
    expected = dict(line.split() for line in options.expect.read_text().splitlines()) if options.expect else None
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found, every = {}, hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_text(place / "text.txt")
        for name in CONFIGURATIONS:
            found[name] = hash_of_run(place, name)
            every.update(found[name].encode())
            print(f"{name:<24}{found[name]}", flush=True)
    found["all"] = every.hexdigest()
    print(f"{'all':<24}{found['all']}")
    if expected is None:
        return 0
    different = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    print(f"different: {', '.join(different)}" if different else "all as expected", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
