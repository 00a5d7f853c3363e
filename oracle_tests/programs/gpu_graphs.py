"""Compare work in captured CUDA graphs with the same work without graphs, with freed memory poisoned between replays.

    python -m oracle_tests.programs.gpu_graphs [--model FOLDER --records FILE] [--device cuda] [--examples 320]

A LLaMA of SmolLM2-135M's shapes with random weights, or the model in FOLDER, trains under LoSA on records of various lengths: with
cross-entropy and with KL, merged weights held or rebuilt, blocks compiled or not, with graphs, without, and with graphs but
stopped midway and resumed. After every optimizer step all free memory is filled with 0xFF, which is NaN in every float. Losses
are compared step by step. Then: a model with dynamic rotary angles, which cannot be captured; a device too small for the
micro-batch; decoding token by token; Gram matrices of hidden states on the host; two blocks reconstructed together. Exits with 1
if anything differs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from oracle_tests.programs.gpu_resume import Stop, Stopping
from torch_impl import losa, reconstruct
from torch_impl.decode.next_token import NextToken
from torch_impl.engine import batches, calibration, statistics
from torch_impl.engine.batches import Example
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.determinism import make_deterministic
from torch_impl.engine.graphs import Repeater
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig
from torch_impl.experiment.text.sources import load_documents
from torch_impl.experiment.text.windows import training_examples

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL = {
    **SMOLLM2,
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
}
STEPS = 2


def poison(device: torch.device) -> int:
    """Fill all free memory of the allocator with 0xFF. Returns its bytes."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    filled = 0
    for segment in torch.cuda.memory_snapshot():
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                memory = torch._C._construct_storage_from_data_pointer(address, device, block["size"])
                torch.empty(0, dtype=torch.uint8, device=device).set_(memory).fill_(255)
                filled += block["size"]
            address += block["size"]
    torch.cuda.synchronize()
    return filled


def random_llama(device: torch.device, shape: dict[str, Any], **more: Any) -> LlamaForCausalLM:
    """Make a model with random weights in bf16 (float32 on a CPU)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlamaForCausalLM(LlamaConfig(**{**shape, **more})).to(device, dtype)  # type: ignore[arg-type]


def records(options: argparse.Namespace, vocabulary: int) -> tuple[torch.Tensor, list[Example]]:
    """Make calibration sequences, and examples of as many lengths as real records have."""
    generator = torch.Generator().manual_seed(1)
    length = 32 if options.small else 256
    ids = torch.randint(vocabulary, (16, length), generator=generator)
    if options.records is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        documents = load_documents(str(options.records)).documents
        return ids, training_examples(documents, tokenizer, 1024, 0, limit=options.examples)
    lengths = (torch.empty(options.examples).log_normal_(4.2, 0.6, generator=generator) * length / 256).long()
    rows = [torch.randint(vocabulary, (int(n),), generator=generator) for n in lengths.clamp(4, 4 * length)]
    examples = [{"input_ids": row, "labels": row.clone()} for row in rows]
    for example in examples[::3]:
        example["labels"][: len(example["labels"]) // 2] = batches.IGNORED
    return ids, examples


class Job:
    """One model and its tokens; `losses` trains it with other options."""

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, examples: list[Example], device: torch.device
    ) -> None:
        self._model, self._ids, self._device = model, ids, device
        half = len(examples) // STEPS
        self._parts = [examples[:half], examples[half:]]
        self.poisoned = 0

    def losses(
        self, config: TrainingConfig, checkpointer: Checkpointer | None = None, found: list[float] | None = None
    ) -> list[float]:
        """Losses of every optimizer step, appended to `found`; freed memory is poisoned after each."""
        heard = [] if found is None else found

        def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
            heard.append(loss)
            self.poisoned = max(self.poisoned, poison(self._device))

        settings = Settings(
            prune=PruneConfig(steps=STEPS),
            calibration=CalibrationConfig(nsamples=16, seqlen=self._ids.shape[1], rmi_samples=16),
            training=config,
        )
        losa.run(
            copy.deepcopy(self._model), self._ids, self._parts, settings, on_loss=on_loss, checkpointer=checkpointer
        )
        return heard

    def resumed(self, config: TrainingConfig) -> list[float]:
        """Stop the same run twice during training, and resume it in a fresh model each time."""
        found: list[float] = []
        blocks = len(Decoder(self._model).blocks)
        with tempfile.TemporaryDirectory() as folder:
            for stop in (blocks + 3, 4):
                with suppress(Stop):
                    self.losses(config, Stopping(RunCheckpoints(Path(folder)), stop), found)
            return self.losses(config, Checkpointer(RunCheckpoints(Path(folder)), save_every=2), found)


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference; infinite if a loss is missing or not finite."""
    if len(found) != len(expected):
        return float("inf")
    values = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return max(value if value == value else float("inf") for value in values)


def check(name: str, difference: float, allowed: float, started: float, more: str = "") -> bool:
    """Print a line. Returns whether the check passed."""
    right = difference <= allowed
    seconds = time.perf_counter() - started
    print(
        f"{name:<52} {difference:.1e} of {allowed:.0e}  {seconds:5.1f} s  {more}{'' if right else '  WRONG'}",
        flush=True,
    )
    return right


def check_training(job: Job, compiles: bool) -> bool:
    """Compare all kinds of training, with graphs and resumed, with training without graphs."""
    right = True
    for loss, hold, compiled in itertools.product(("ce", "kl"), ("on", "off"), ("off", "on") if compiles else ("off",)):
        config = TrainingConfig(learning_rate=1e-3, loss=loss, hold_merged=hold, compile_blocks=compiled)
        name = (
            f"{loss}, merged weights {'held' if hold == 'on' else 'rebuilt'}{', compiled' if compiled == 'on' else ''}"
        )
        started = time.perf_counter()
        plain = job.losses(replace(config, cuda_graphs=False))
        middle = time.perf_counter()
        graphs = job.losses(config)
        right &= check(
            name, apart(graphs, plain), 1e-4, middle, f"launch by launch {middle - started:.1f} s, {plain[-1]:.3f}"
        )
        if compiled == "off" and hold == "on":
            started = time.perf_counter()
            right &= check(f"{name}, resumed", apart(job.resumed(config), graphs), 1e-4, started)
    print(f"poisoned {job.poisoned / 2**20:,.0f} MiB at most")
    return right


def check_dynamic(device: torch.device, options: argparse.Namespace) -> bool:
    """Length-dependent rotary angles synchronise with the device, which a capture does not allow."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = random_llama(
        device, {**SMOLLM2, "num_hidden_layers": 4} if not options.small else SMALL, rope_parameters=rope
    )
    job = Job(
        model, *records(argparse.Namespace(**{**vars(options), "records": None}), model.config.vocab_size), device
    )
    started = time.perf_counter()
    config = TrainingConfig(learning_rate=1e-3)
    losses = [job.losses(replace(config, cuda_graphs=graphs)) for graphs in (True, False)]
    right = check("rotary angles by length", apart(*losses), 1e-4, started)
    if device.type == "cuda":
        # After a failed capture the allocator must still release memory.
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.empty(2**30, dtype=torch.uint8, device=device)
        torch.cuda.empty_cache()
        right &= check("memory given back after it, bytes left", torch.cuda.memory_reserved() - before, 0, started)
    return right


def check_out_of_memory(device: torch.device, job: Job) -> bool:
    """On a device too small for the micro-batch use smaller ones, also if memory runs out during a capture."""
    started = time.perf_counter()
    config = TrainingConfig(learning_rate=1e-3, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    expected = job.losses(config)
    if device.type != "cuda":
        return True
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(device).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
        found = job.losses(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return check("out of memory: halved micro-batches", apart(found, expected), 0.05, started)


@torch.no_grad()
def check_decoding(model: PreTrainedModel, device: torch.device, compiles: bool) -> bool:
    """Compare logits of single tokens, in a graph and by compiled blocks, with the model called token by token."""
    ids = torch.randint(model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2)).to(device)
    results: list[torch.Tensor] = []
    started = time.perf_counter()
    right = True
    for graph, fuse in ((False, False), (True, False), (True, True))[: 2 + compiles]:
        cache = StaticCache(config=model.config, max_cache_len=64)
        following = NextToken(model, cache, graph=graph, fuse=fuse)
        rows = []
        for token in ids.split(1, 1):
            rows.append(following(token).float().cpu())
            poison(device)
        results.append(torch.cat(rows))
        if graph:
            difference = float((results[-1] - results[0]).abs().max() / results[0].abs().max())
            name = f"decoding{', compiled' if fuse else ''}"
            right &= check(name, difference if difference == difference else float("inf"), 3e-2, started)
    return right


@torch.no_grad()
def check_host_streams(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Compare Gram matrices of hidden states on the host, read as soon as a block is done, with those on the device."""
    decoder = Decoder(model)
    started = time.perf_counter()
    worst = 0.0
    streams = [calibration.start_stream(decoder, ids.repeat(4, 1), 4, on_host=on_host) for on_host in (False, True)]
    for index, block in enumerate(decoder.blocks):
        grams = []
        for stream in streams:
            stream.advance(block, index)
            grams.append(statistics.gram_of(stream.hidden, stream.device))
        worst = max(worst, float((grams[0] - grams[1]).abs().max() / grams[0].abs().max()))
    return check("hidden states on the host", worst, 1e-4, started)


class Poisoning(Repeater):
    """Captures passes, and fills all freed memory before every replay."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(True)
        self._device = device

    def __call__(self, work: Callable[[], None], owned: Any) -> Callable[[], None]:
        replay = super().__call__(work, owned)

        def poisoned() -> None:
            poison(self._device)
            replay()

        return poisoned


def check_reconstruction(model: PreTrainedModel, ids: torch.Tensor, device: torch.device) -> bool:
    """Compare two blocks reconstructed together, with graphs and launch by launch, in batches of two sizes."""
    decoder = Decoder(model)
    stream = calibration.start_stream(decoder, ids.repeat(3, 1)[:46], 8)
    inputs = stream.hidden.clone()
    for index in range(2):
        stream.advance(decoder.blocks[index], index)
    found, seconds = [], []
    for repeat in (Poisoning(device), Repeater(False), Repeater(True)):
        blocks = list(copy.deepcopy(decoder.blocks[:2]))
        arguments = calibration.block_arguments(decoder, ids[:1])[:2]
        masks = [
            {name: block.get_parameter(f"{name}.weight") > 0 for name in decoder.family.projections} for block in blocks
        ]
        started = time.perf_counter()
        reconstruct.reconstruct_blocks(blocks, masks, inputs, stream.hidden, 4, 1e-3, 8, arguments, repeat=repeat)
        weights = torch.cat([weight.detach().flatten().float() for block in blocks for weight in block.parameters()])
        found.append(weights.cpu())
        seconds.append(time.perf_counter() - started)
    sizes = f"{seconds[2]:.2f} s, launch by launch {seconds[1]:.2f} s"
    apart = [float((weights - found[1]).norm() / found[1].norm()) for weights in (found[0], found[2])]
    return check("reconstruction", max(apart), 1e-4, time.perf_counter() - sum(seconds), sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per check. Returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="a trained model; default: SmolLM2's shapes, random weights")
    parser.add_argument("--records", type=Path, help="records to train that model on")
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--small", action="store_true", help="a tiny model: a quick run of the script")
    parser.add_argument(
        "--checks", nargs="+", help="only these: training, dynamic, memory, decoding, host, reconstruction"
    )
    parser.add_argument("--no_compile", action="store_true", help="without compiled blocks")
    options = parser.parse_args(arguments)
    device = torch.empty(0, device=options.device).device
    if device.type == "cuda":
        make_deterministic()
    if options.model is not None:
        model = AutoModelForCausalLM.from_pretrained(options.model).to(device).eval()  # type: ignore[arg-type]
    else:
        model = random_llama(device, SMALL if options.small else SMOLLM2).eval()
    ids, examples = records(options, model.config.vocab_size)
    lengths = [len(example["input_ids"]) for example in examples]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}; {len(examples)} records of {min(lengths)} to {max(lengths)} tokens")
    job = Job(model, ids, examples, device)
    compiles = not options.no_compile
    checks: dict[str, Callable[[], bool]] = {
        "training": functools.partial(check_training, job, compiles),
        "dynamic": functools.partial(check_dynamic, device, options),
        "memory": functools.partial(check_out_of_memory, device, job),
        "decoding": functools.partial(check_decoding, model, device, compiles),
        "host": functools.partial(check_host_streams, model, ids),
        "reconstruction": functools.partial(check_reconstruction, model, ids, device),
    }
    return int(not all([check() for name, check in checks.items() if name in (options.checks or checks)]))


if __name__ == "__main__":
    sys.exit(main())
