"""Benchmark models larger than the GPU: offloaded blocks, cost by model size, and planned against measured memory."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import string
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from tiny_models.random_models import byte_tokenizer
from torch_impl.engine import structure
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.checkpoints.offload import open_offloaded, reader_of
from torch_impl.engine.checkpoints.pretrained import load_offloaded
from torch_impl.engine.checkpoints.rewriting import Output
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.progress import note
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.job import run_in_memory
from torch_impl.experiment.material import Material
from torch_impl.experiment.offloaded_job import run_offloaded
from torch_impl.experiment.planning import geometry
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.sweeps import Sweeps

CARD, LARGE_CARD = 24 * 10**9, 80 * 10**9
TEXT = 1 << 17
"""Letters in the jobs' text; each is a token."""
WINDOWS = 8
"""Evaluation windows, all evaluated at once."""
SCALES = {"cuda": ("llama-2-7b", "llama-2-13b", "llama-2-70b"), "cpu": ("small", "medium")}


@contextlib.contextmanager
def checkpoint(name: str, blocks: int, device: torch.device, dtype: torch.dtype) -> Iterator[Path]:
    """Create a temporary folder with a random model of the geometry, in several files, and a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model = geometry.build(name, blocks, device, dtype)
        model.save_pretrained(folder, max_shard_size="5GB")
        byte_tokenizer().save_pretrained(folder)
        letters = random.Random(0).choices(string.ascii_lowercase + " ", k=TEXT)
        for name in ("train.txt", "eval.txt"):
            Path(folder, name).write_text("".join(letters), encoding="utf-8")
        del model
        yield Path(folder)


def forget_pages(folder: Path) -> None:
    """Drop these files from the page cache, so that they are next read from disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class HostPeak:
    """Measures the peak additional private memory of this process within the context, in bytes, without mapped files."""

    def __enter__(self) -> HostPeak:
        self._process, self._ended = psutil.Process(), threading.Event()
        self._before = self._private()
        self.bytes = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _private(self) -> int:
        found = self._process.memory_info()
        return int(found.rss - found.shared)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.bytes = max(self.bytes, self._private() - self._before)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def device_peak(action: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """Run an action; return (peak bytes of tensors on the device, result).

    On the CPU only allocations of the calling thread count, so not the blocks read from disk.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = action()
        return torch.cuda.max_memory_allocated(device), result
    # `torch.profiler.profile` warns of several cycles before torch 2.13 unless it parses all events, which takes long.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = action()
    held = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def _options(folder: Path, device: torch.device, dtype: torch.dtype, rows: int, length: int, *more: str) -> Config:
    plain = ["--steps", "1", "--finetune", "false", "--nsamples", str(rows), "--seqlen", str(length)]
    evaluation = ["--eval_windows", str(WINDOWS), "--eval_seqlen", str(length), "--rmi_samples", str(max(2, rows // 2))]
    read = ["--calibration_data", "train.txt", "--finetune_data", "train.txt", "--eval_data", "eval.txt"]
    texts = [str(folder / word) if word.endswith(".txt") else word for word in read]
    place = ["--model", str(folder), "--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
    return parse([*place, *plain, *evaluation, *texts, *more])


def _random_text(config: Config, folder: Path, device: torch.device) -> Material:
    model, tokenizer = load_offloaded(str(folder), device, config.model.dtype)
    generator = torch.Generator().manual_seed(1)
    found, text = config.calibration, config.text
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (found.nsamples, found.seqlen), generator=generator)
    windows = torch.randint(vocabulary, (text.eval_windows or WINDOWS, text.eval_seqlen), generator=generator)
    return Material(model, tokenizer, ids, [], windows, {})


def stream(
    name: str,
    blocks: int,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    length: int,
    method: str = "wanda",
    epochs: int = 0,
) -> dict[str, Any]:
    """Prune a checkpoint block by block from disk, as on a GPU with 24 GB, and verify the result; figures per block.

    epochs: of reconstruction, as on a GPU with 80 GB.
    """
    with checkpoint(name, blocks, device, dtype) as folder, tempfile.TemporaryDirectory() as out:
        # Do not compile: it takes as long as many blocks, and only few are measured.
        more = [
            "--prune_method",
            method,
            "--offload",
            "on",
            "--compile_blocks",
            "off",
            "--reconstruct_epochs",
            str(epochs),
        ]
        config = _options(folder, device, dtype, rows, length, *more)
        material = _random_text(config, folder, device)
        decoder = structure.check_structure(material.model, config.settings)
        card = LARGE_CARD if epochs else CARD
        budget = card - torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        sweeps = Sweeps(decoder, config, material, budget)
        reader = reader_of(decoder)
        size = sum(reader.bytes_of(index) for index in range(blocks)) / blocks
        forget_pages(folder)
        start = time.perf_counter()
        for index in range(blocks):
            reader.load(index)
        read = time.perf_counter() - start

        def prune() -> Any:
            return sweeps.prune(config.settings, dense, Output(Path(out), decoder))

        forget_pages(folder)
        with HostPeak() as host:
            start = time.perf_counter()
            dense_peak, dense = device_peak(sweeps.dense, device)
            middle = time.perf_counter()
            peak, pruned = device_peak(prune, device)
            end = time.perf_counter()
        material.model.config.save_pretrained(out)
        again = open_offloaded(Path(out), device, dtype)
        Sweeps(Decoder(again), config, material).verify(Path(out), pruned)
        pinned = torch.cuda.host_memory_stats()["allocated_bytes.peak"] if device.type == "cuda" else 0
        return {
            "geometry": name,
            "method": method,
            "epochs of reconstruction": epochs,
            "blocks": blocks,
            "parameters of a block": int(size // dtype.itemsize),
            "bytes of a block": int(size),
            "dense sweep, s a block": (middle - start) / blocks,
            "pruning sweep, s a block": (end - middle) / blocks,
            "reconstruction, s a block": pruned.record.seconds.get("reconstruct", 0.0) / blocks,
            "read alone, GB/s": size * blocks / read / 1e9,
            "device peak, GB": max(peak, dense_peak) / 1e9,
            "host peak, GB": (host.bytes + pinned) / 1e9,
            "dense perplexity": dense.perplexity,
        }


def scale(
    device: torch.device, dtype: torch.dtype, blocks: int, rows: int, length: int, epochs: int = 0
) -> list[dict[str, Any]]:
    """Repeat `stream` for several model sizes: seconds and bytes per block should be linear in its parameters."""
    return [stream(name, blocks, device, dtype, rows, length, epochs=epochs) for name in SCALES[device.type]]


def plan(
    name: str, blocks: int, device: torch.device, dtype: torch.dtype, rows: int, length: int, train_length: int
) -> Iterator[dict[str, Any]]:
    """Run jobs of few blocks and compare their device memory with the dry run's plan; yield a row per job.

    The jobs are as short as possible with the same peak: two batches of sequences, and one checkpoint.
    """
    short = ["--keep_points", "1", "--compile_blocks", "off"]
    # Use batches of one shape for calibration and evaluation.
    compiled = ["--compile_blocks", "on"] if device.type == "cuda" else []
    training = ["--finetune", "true", "--train_examples", "24", "--train_seqlen", str(train_length)]
    training += ["--calibration_batch_size", str(WINDOWS), *compiled]
    cases = {
        "plain, wanda": ["--offload", "off"],
        "plain, sparsegpt": ["--offload", "off", "--prune_method", "sparsegpt"],
        "block by block, wanda": ["--offload", "on"],
        "with training": training,
        "with training, checkpointed": [*training, "--gradient_checkpointing", "true"],
        "block by block, with training over int8": [
            *training,
            *("--compile_blocks", "off", "--gradient_checkpointing", "true", "--train_base", "int8", "--offload", "on"),
        ],
    }
    rows = min(rows, 2 * CalibrationConfig().calibration_batch_size)
    with checkpoint(name, blocks, device, dtype) as folder:
        for case, more in cases.items():
            note(f"{case} …")
            start = time.perf_counter()
            config = _options(folder, device, dtype, rows, length, *short, *more)
            model = open_offloaded(folder, torch.device("cpu"), dtype)
            decoder = structure.check_structure(model, config.settings)
            foretold = peak(config, Sizes.of(decoder, dtype), Place.here(device))
            work = run_offloaded if foretold.offloaded else run_in_memory
            with tempfile.TemporaryDirectory() as out:
                taken, _ = device_peak(lambda c=config, o=out, w=work: w(c, Path(o)), device)  # type: ignore[misc]
            yield {
                "case": case,
                "phase": foretold.phase,
                "foretold, GB": foretold.device.total / 1e9,
                "measured, GB": taken / 1e9,
                "foretold / measured": foretold.device.total / taken,
                "seconds": time.perf_counter() - start,
            }


def _shown(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def line(row: dict[str, Any]) -> str:
    """Format one row as a line."""
    return "; ".join(f"{key} {_shown(value)}" for key, value in row.items())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as columns, one line per figure."""
    return "\n".join(f"{key:<28}" + "".join(f"{_shown(row[key]):>28}" for row in rows) for key in rows[0])
