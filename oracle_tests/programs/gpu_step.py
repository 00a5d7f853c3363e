"""Compare one LoSA step of two blocks with LLaMA-2-7B's shapes in bf16 on the GPU with float32 on the CPU, timed by part.

    python -m oracle_tests.programs.gpu_step [--device cuda] [--small]

Both start from the same bf16 weights and tokens. Compares, within `tolerances.GPU_STEP`: every mask (an entry may differ only
if its score is within the bound of its row's threshold), reconstruction errors, losses, gradients of every adapter. Prints a table
and exits with 1 if anything exceeds its bound. `--small` is a quick test of the script.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oracle_tests.tolerances import GPU_STEP
from torch_impl import losa
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import adapters, merge_adapters
from torch_impl.engine.blocks import measure_importance
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.measures import MutualInformation
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig
from torch_impl.masks import prune as masks


def build(small: bool, blocks: int, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Make random LLaMA-2-7B blocks over a small vocabulary, with realistic activations (a few loud channels)."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    if not small:
        size = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=blocks, tie_word_embeddings=False, **size)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.exp(torch.randn(config.hidden_size)))
    return model.to(dtype)  # type: ignore[arg-type]


def settings(method: str, rows: int, length: int, batch: int) -> Settings:
    """Settings of one step, uniform over two blocks (mutual information needs three)."""
    return Settings(
        prune=PruneConfig(prune_method=method, steps=1, layer_sparsity="uniform", sparsity_ratio=0.7),
        adapter=AdapterConfig(rank_allocation="uniform", initial_rank=8),
        calibration=CalibrationConfig(nsamples=rows, seqlen=length, calibration_batch_size=batch),
        training=TrainingConfig(finetune=False),
    )


class Recorder:
    """Record the weight, Wanda's norms and the mask of every projection that is pruned."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> Recorder:
        self._original = masks.prune_prepared

        def prune_prepared(
            method: masks.Method,
            weight: torch.Tensor,
            prepared: Any,
            kept: torch.Tensor,
            sparsity: float | None = None,
            nm: tuple[int, int] | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            new, mask = self._original(method, weight, prepared, kept, sparsity, nm)
            self.calls.append((weight.cpu().clone(), prepared.cpu().clone(), mask.cpu().clone()))
            return new, mask

        masks.prune_prepared = prune_prepared
        return self

    def __exit__(self, *_: object) -> None:
        masks.prune_prepared = self._original


def compare_masks(gpu: Recorder, cpu: Recorder) -> tuple[float, float]:
    """Share of entries that differ, and the largest relative distance of such an entry's score from its row's threshold."""
    differing, total, worst = 0, 0, 0.0
    for (_, _, ours), (weight, norm, theirs) in zip(gpu.calls, cpu.calls, strict=True):
        score = weight.float().abs() * norm.float()
        threshold = score.masked_fill(theirs, -1).amax(1, keepdim=True)
        wrong = ours != theirs
        differing, total = differing + int(wrong.sum()), total + wrong.numel()
        if wrong.any():
            worst = max(worst, float(((score - threshold).abs() / threshold)[wrong].max()))
    return differing / total, worst


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ in float64."""
    ours, reference = ours.detach().double().cpu(), reference.detach().double().cpu()
    return float((ours - reference).norm() / reference.norm())


def gradients(model: LlamaForCausalLM, ids: torch.Tensor, seed: int) -> tuple[float, list[torch.Tensor]]:
    """Compute loss and adapter gradients of one micro-batch, with B set so that both A and B have a gradient."""
    for number, layer in enumerate(adapters(model)):
        layer.resize(8, (seed, number))
        with torch.no_grad():
            layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(number)) * 0.002)
    examples = [{"input_ids": row, "labels": row} for row in ids]
    config = TrainingConfig(per_device_train_batch_size=len(ids), gradient_accumulation_steps=1)
    with Gradients(model, None, config) as step:
        loss = step.of(examples)
    return loss, [p.grad for layer in adapters(model) for p in (layer.A, layer.B) if p.grad is not None]


def timed(action: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Measure the median in milliseconds."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2] * 1e3


def check(device: torch.device, small: bool) -> dict[str, float]:
    """Run the step on both devices and return the figures that `GPU_STEP` bounds."""
    rows, length = (4, 64) if small else (8, 256)
    start = build(small, 2)
    ids = torch.randint(1000, (rows, length), generator=torch.Generator().manual_seed(1))
    train_ids = torch.randint(1000, (2, length), generator=torch.Generator().manual_seed(2))
    results = []
    # The GPU in bf16 and the CPU in float32, both from the same bf16 weights.
    for place, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        model = copy.deepcopy(start).to(place, dtype)  # type: ignore[arg-type]
        with Recorder() as recorder:
            [record] = losa.run(model, ids.to(place), [], settings("wanda", rows, length, 4))
        results.append((model, recorder, record))
    (gpu, gpu_masks, gpu_record), (cpu, cpu_masks, cpu_record) = results
    share, distance = compare_masks(gpu_masks, cpu_masks)
    # Compare gradients under one mask, or differences of masks would show again.
    for ours, reference in zip(adapters(gpu), adapters(cpu), strict=True):
        ours.set_base(reference.weight.to(ours.weight))
    gpu_loss, gpu_grads = gradients(gpu, train_ids, 3)
    cpu_loss, cpu_grads = gradients(cpu, train_ids, 3)
    merged = [relative(a.merged(), b.merged()) for a, b in zip(adapters(gpu), adapters(cpu), strict=True)]
    return {
        "mask entries that differ (share)": share,
        "their distance from the threshold": distance,
        "reconstruction error": max(abs(a - b) / b for a, b in zip(gpu_record.errors, cpu_record.errors, strict=True)),
        "loss": abs(gpu_loss - cpu_loss) / cpu_loss,
        "adapter gradients": max(relative(a, b) for a, b in zip(gpu_grads, cpu_grads, strict=True)),
        "merged weights": max(merged),
    }


def measure(device: torch.device, small: bool) -> dict[str, float]:
    """Measure milliseconds of every part of a step: two blocks, 16 × 2048 calibration tokens, 4 × 512 training tokens."""
    rows, length, train_length = (4, 64, 32) if small else (16, 2048, 512)
    model = build(small, 2).to(device)  # type: ignore[arg-type]
    decoder = Decoder(model)
    ids = torch.randint(1000, (rows, length)).to(device)
    times = {
        "mutual information sweep": timed(lambda: measure_importance(decoder, MutualInformation(), ids, 16), device)
    }
    for method in ("wanda", "sparsegpt"):
        copies = [copy.deepcopy(model) for _ in range(3)]
        setup = settings(method, rows, length, 16)
        times[f"prune and error, {method}"] = timed(lambda c=copies, s=setup: losa.run(c.pop(), ids, [], s), device, 2)
    losa.run(model, ids, [], settings("wanda", rows, length, 16))
    for number, layer in enumerate(adapters(model)):
        layer.resize(8, (number,))
    examples = [{"input_ids": row, "labels": row} for row in torch.randint(1000, (4, train_length))]
    for held in (True, False):
        config = TrainingConfig(
            per_device_train_batch_size=4, gradient_accumulation_steps=1, hold_merged="on" if held else "off"
        )
        times[f"training step, merged weight {'held' if held else 'rebuilt'}"] = timed(
            lambda c=config: training.train(model, model, examples, c, (0, 1)), device
        )
    start = time.perf_counter()
    merge_adapters(decoder)
    times["merge"] = (time.perf_counter() - start) * 1e3
    return times


def main(given: Sequence[str] | None = None) -> int:
    """Check, measure and print. Returns 1 if a figure is outside its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="small shapes: runs anywhere in seconds")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(given)
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    figures = check(device, arguments.small)
    print(f"{name}, torch {torch.__version__}; bf16 there against float32 on the CPU\n")
    print(f"{'figure':<40}{'measured':>12}{'bound':>12}")
    for what, value in figures.items():
        print(f"{what:<40}{value:>12.2e}{GPU_STEP[what]:>12.2e}{'' if value <= GPU_STEP[what] else '  OUTSIDE'}")
    times = measure(device, arguments.small)
    print(f"\n{'part':<40}{'ms':>12}")
    for what, value in times.items():
        print(f"{what:<40}{value:>12.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": name, "figures": figures, "milliseconds": times}, indent=1))
    return int(any(not value <= GPU_STEP[what] for what, value in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
