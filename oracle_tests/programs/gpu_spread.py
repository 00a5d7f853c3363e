"""Compare LoSA with LLaMA-2-7B's shapes in bf16 on several GPUs with one of them: results, time, bytes.

    torchrun --nproc_per_node 2 -m oracle_tests.programs.gpu_spread
    torchrun --nproc_per_node 2 -m oracle_tests.programs.gpu_spread --small --device cpu     float32 and gloo: runs anywhere

Process 0 first runs alone; then all processes run together from the same model, each with its own rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oracle_tests.tolerances import GPU_STEP
from torch_impl import losa
from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import block_adapters
from torch_impl.engine.batches import Example
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning.geometry import build
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import phases
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.traffic import step_traffic
from torch_impl.experiment.sections import TextConfig


def options(small: bool, method: str) -> Config:
    """Options of two LoSA steps with two optimizer steps each."""
    samples, tokens, train_tokens = (8, 16, 16) if small else (32, 1024, 512)
    return Config(
        prune=losa.PruneConfig(prune_method=method, sparsity_ratio=0.5, steps=2),
        calibration=CalibrationConfig(samples, tokens, rmi_samples=samples, calibration_batch_size=4),
        training=TrainingConfig(loss="kl", warmup_ratio=0.0, compile_blocks="off", hold_merged="auto"),
        text=TextConfig(train_seqlen=train_tokens, train_examples=32),
    )


def work(model: Any, config: Config, device: torch.device) -> dict[str, Any]:
    """Run LoSA; records, merged weights (on the CPU), seconds and bytes."""
    ids = torch.randint(500, (config.calibration.nsamples, config.calibration.seqlen), generator=_seeded(1))
    rows = torch.randint(500, (32, config.text.train_seqlen), generator=_seeded(2))
    examples: list[Example] = [{"input_ids": row, "labels": row} for row in rows]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    records = losa.run(model, ids, [examples[:16], examples[16:]], config.settings)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    merged, decoder = {}, Decoder(model)
    for index, block in enumerate(decoder.blocks):
        with distributed.unsharded(block):
            for name, layer in block_adapters(block, decoder.family).items():
                merged[decoder.full_name(index, name)] = layer.merged().cpu()
    held = sum(distributed.local(p).nbytes for n, p in model.named_parameters() if not n.endswith((".A", ".B")))
    return {"records": records, "merged": merged, "seconds": seconds, "peak": peak, "held": held}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare(several: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
    """Figures that `GPU_STEP` bounds, several processes against one."""
    pairs = list(zip(several["records"], one["records"], strict=True))
    masks = [(several["merged"][name] != 0, weight != 0) for name, weight in one["merged"].items()]
    common = [(several["merged"][n], w, (several["merged"][n] != 0) & (w != 0)) for n, w in one["merged"].items()]
    differing = sum(int((a != b).sum()) for a, b in masks) / sum(a.numel() for a, _ in masks)
    worst = max(float(((a - b) * both).double().norm() / (b * both).double().norm()) for a, b, both in common)
    return {
        "mask entries that differ (share)": differing,
        "reconstruction error": max(abs(a - b) / b for x, y in pairs for a, b in zip(x.errors, y.errors, strict=True)),
        "loss": max(abs(a - b) / abs(b) for x, y in pairs for a, b in zip(x.losses, y.losses, strict=True)),
        "merged weights": worst,
    }


def main(given: Sequence[str] | None = None) -> int:
    """Run both, compare and print. Returns 1 if a figure is outside its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="small shapes: runs anywhere in seconds")
    parser.add_argument("--blocks", type=int, default=4, help="decoder blocks")
    parser.add_argument("--method", default="wanda", help="magnitude, wanda or sparsegpt")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(given)
    device = pretrained.choose_device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = options(arguments.small, arguments.method)
    one: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as own:
        # Before the processes form a group, so that this one runs alone.
        if os.environ.get("RANK", "0") == "0":
            start = build("small" if arguments.small else "llama-2-7b", arguments.blocks, device, dtype)
            start.save_pretrained(own)
            one = work(start, config, device)
            del start
        with distributed.process_group(device):
            model = fsdp.load(Path(distributed.broadcast_text(own)), device, dtype)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            several = work(model, config, device)
            cards = distributed.processes()
            peak = max(_gathered(several["peak"]))
            sizes = Sizes.of(Decoder(model), dtype)
            leads = distributed.is_main_process()
    return _report(arguments, config, sizes, Place(device.type, cards), one, {**several, "peak": peak}) if leads else 0


def _gathered(value: int) -> list[int]:
    values = torch.zeros(distributed.processes(), dtype=torch.int64)
    values[distributed.process_index()] = value
    return [int(v) for v in distributed.all_reduce(values)]


def _report(
    arguments: Any, config: Config, sizes: Sizes, place: Place, one: dict[str, Any], several: dict[str, Any]
) -> int:
    figures, cards = compare(several, one), place.cards
    print(f"{cards} processes, {arguments.blocks} blocks, torch {torch.__version__}\n")
    print(f"{'figure':<44}{'measured':>12}{'bound':>12}")
    for what, value in figures.items():
        print(f"{what:<44}{value:>12.2e}{GPU_STEP[what]:>12.2e}{'' if value <= GPU_STEP[what] else '  OUTSIDE'}")
    same = [record.ranks for record in several["records"]] == [record.ranks for record in one["records"]]
    rates = max(
        abs(a - b)
        for x, y in zip(several["records"], one["records"], strict=True)
        for a, b in zip(x.sparsity, y.sparsity, strict=True)
    )
    print(f"{'ranks are the same':<44}{same!s:>12}\n{'rates, largest difference':<44}{rates:>12.2e}")
    print(f"\n{'seconds':<44}{'one':>12}{cards:>12}")
    for part in ("importance", "prune", "train"):
        times = [sum(record.seconds[part] for record in side["records"]) for side in (one, several)]
        print(f"{part:<44}{times[0]:>12.3f}{times[1]:>12.3f}")
    steps = sum(len(record.losses) for record in one["records"])
    times = [sum(record.seconds["train"] for record in side["records"]) / steps for side in (one, several)]
    print(f"{'an optimizer step':<44}{times[0]:>12.3f}{times[1]:>12.3f}")
    found = phases(config, sizes, place)
    taken = max((found[phase] for phase in ("calibration", "training")), key=lambda parts: parts.total)
    print(f"\n{'bytes on the fullest card':<44}{'measured':>16}{'formula':>16}")
    print(f"{'rows of the weights':<44}{several['held']:>16,}{taken.weights:>16,}")
    print(f"{'largest at once':<44}{several['peak']:>16,}{taken.total:>16,}")
    first_step = dataclasses.replace(config, prune=dataclasses.replace(config.prune, steps=1))
    step = step_traffic(first_step, sizes, cards)
    print(f"{'received in an optimizer step':<44}{'':>16}{step.total:>16,}")
    if arguments.json:
        facts = {
            "figures": figures,
            "seconds": times,
            "peak": several["peak"],
            "formula": taken.by_name(),
            "one_peak": one["peak"],
        }
        arguments.json.write_text(json.dumps(facts, indent=1))
    outside = any(not value <= GPU_STEP[what] for what, value in figures.items())
    return int(outside or not same or several["held"] != taken.weights)


if __name__ == "__main__":
    sys.exit(main())
