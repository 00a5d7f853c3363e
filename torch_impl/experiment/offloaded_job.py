"""Plain pruning of a model larger than the memory: its blocks come from its files and go to the output's as they are done.

The checkpoint is read once for the dense perplexity, the mutual information and a look at its zeros, once to be pruned,
and the result once more to be verified and evaluated. Files, table and report are those of every other run. Every pruned
block is a point to go on from: it is in its place in the output, and hidden states are computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from torch_impl import losa
from torch_impl.engine import calibration, memory
from torch_impl.engine.adapted_linear import adapt_block, block_adapters
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import find_files
from torch_impl.engine.checkpoints.offload import open_streamed, reader_of, sweep
from torch_impl.engine.checkpoints.safetensors_files import Shards, ShardWriter
from torch_impl.engine.families import Family, prunable_weights, weight_of
from torch_impl.experiment import identity
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import streamed_perplexity
from torch_impl.experiment.job import Material, environment_of, open_journal, summarise, with_text, write_results
from torch_impl.experiment.metrics import Metrics
from torch_impl.experiment.planning import checks
from torch_impl.experiment.planning.sizes import Sizes

logger = logging.getLogger(__name__)

Groups = Sequence[tuple[int, int] | None]


@dataclass
class Dense:
    """What the first sweep has found out: shares of zeros and importances have one entry per block."""

    perplexity: float
    shares: list[float]
    importance: list[float] | None
    seconds: float


@dataclass
class Pruned:
    """What a sweep that prunes has done. masks: fingerprint by projection; logits: of the probe, None without one."""

    realised: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    masks: dict[str, tuple[str, float]] = field(default_factory=dict)
    perplexity: float = 0.0
    logits: torch.Tensor | None = None


class Sweeps:
    """The sweeps over one streamed model. Which hidden states are kept on the device is decided by what is free there.

    budget: bytes of the device to get by with, if not all that is free.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, config: Config, material: Material, budget: int | None = None
    ) -> None:
        self.model, self.family, self.config, self.material = model, family, config, material
        self.device = reader_of(model, family).device
        self._batch = config.calibration.calibration_batch_size
        self._sizes = Sizes.of(model, family, reader_of(model, family).dtype)
        text, tokens = config.text, self._batch * config.calibration.seqlen
        working = self._sizes.working(config.prune.prune_method, tokens, (text.eval_batch_size, text.eval_seqlen))
        if config.reconstruction.reconstruct_epochs:
            sequences = min(config.reconstruction.reconstruct_batch_size, config.calibration.nsamples)
            training = self._sizes.reconstruction(sequences * config.calibration.seqlen)
            working = max(working, 2 * self._sizes.largest_block * self._sizes.itemsize + training)
        self._room = memory.Room(self.device, working, budget)

    def _stream(self, ids: torch.Tensor, batch: int, copies: int = 1) -> calibration.Stream:
        wanted = copies * self._sizes.stream(ids.numel())
        return calibration.start_stream(self.model, self.family, ids, batch, on_host=not self._room.take(wanted))

    def _blocks(self, description: str) -> Iterator[nn.Module]:
        blocks = tqdm(
            sweep(self.model, self.family), desc=description, total=len(self._sizes.prunable_of_blocks), leave=False
        )
        with calibration.compiled([self.model], self.family, self.config.training.compile_blocks):
            yield from blocks
        self._room.give_back()

    def dense(self) -> Dense:
        """Look at every block, measure perplexity and, if rates depend on it, mutual information."""
        start = time.perf_counter()
        start_measure, rows = self.config.prune.rule.measure, self.config.calibration.rmi_rows
        measure = None if start_measure is None else start_measure(self.family)
        measured = None if measure is None else self._stream(self.material.calibration[:rows], self._batch)
        windows = self._stream(self.material.evaluation, self.config.text.eval_batch_size)
        shares = []
        for index, block in enumerate(self._blocks("dense")):
            losa.check_weights(block, index, self.family)
            shares.append(losa.zero_share(block, self.family))
            windows.advance(block, index)
            if measure is not None and measured is not None:
                measure.advance(measured, block, index)
        return Dense(
            perplexity=streamed_perplexity(self.model, self.family, self.material.evaluation, windows, "dense"),
            shares=shares,
            importance=None if measure is None else measure.importance().tolist(),
            seconds=time.perf_counter() - start,
        )

    def prune(
        self, rates: torch.Tensor, groups: Groups, output: Output | None = None, start: torch.Tensor | None = None
    ) -> Pruned:
        """Prune and reconstruct every block and write it to the output; without one, only prune and measure the perplexity.

        start: share of zeros of each block (L,) as it is stored.
        """
        found = Pruned()
        stream = self._stream(self.material.calibration, self._batch, copies=2)
        ids, batch = self.material.evaluation, self.config.text.eval_batch_size
        followed = self._stream(ids, batch) if output is None else self._stream(ids[:2], 2)
        pairs = self._adapted_pairs()
        earlier = (lambda index, block: False) if output is None else output.earlier
        arguments = calibration.block_arguments(self.model, self.family, self.material.calibration[:1])
        settings = self.config.settings if output is not None else self.config.settings.without_reconstruction()
        pruned = losa.prune_blocks(pairs, stream, self.family, settings, rates, groups, arguments, earlier, start)
        for index, (block, error) in enumerate(pruned):
            followed.advance(block, index)
            found.errors.append(error)
            found.realised.append(losa.zero_share(block, self.family))
            if output is not None:
                output.write(index, block)
        if output is None:
            found.perplexity = streamed_perplexity(self.model, self.family, ids, followed, "pruned at once")
        else:
            found.masks = output.finish()
            # On the host: they wait there until the checkpoint is read again.
            found.logits = calibration.finish(self.model, self.family, ids[:2], followed.states(slice(None))).cpu()
        return found

    def _adapted_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for block in self._blocks("prune"):
            adapt_block(block, self.family, self.config.adapter.scale)
            yield block, block

    def verify(self, folder: Path, pruned: Pruned) -> tuple[float, pretrained.Verification]:
        """Perplexity of the checkpoint in this folder, after holding it against what was pruned.

        Errors: RuntimeError naming the projection whose zeros are not where its mask says, or what the logits differ by.
        """
        ids = self.material.evaluation
        windows, probe = self._stream(ids, self.config.text.eval_batch_size), self._stream(ids[:2], 2)
        zeros = {}
        for index, block in enumerate(self._blocks("verify")):
            for name in self.family.projections:
                full = f"{self.family.blocks}.{index}.{name}"
                saved, share = fingerprint(weight_of(block, name) != 0)
                if saved != pruned.masks[full][0]:
                    raise RuntimeError(f"{folder}, {full}: the zeros are not where the mask says")
                zeros[full] = (pruned.masks[full][1], share)
            windows.advance(block, index)
            probe.advance(block, index)
        logits = calibration.finish(self.model, self.family, ids[:2], probe.states(slice(None)))
        assert pruned.logits is not None
        before = pruned.logits.to(logits.device)
        difference = pretrained.logit_difference(folder, logits.float(), before.float(), logits.dtype)
        perplexity = streamed_perplexity(self.model, self.family, ids, windows, "pruned, written and read again")
        return perplexity, pretrained.Verification(difference, zeros)


class Output:
    """The checkpoint that is written: the projections of pruned blocks by a thread of its own, all else taken over.

    written: SHA-256 of each block's projections by their names, as an interrupted run has left them here; it grows, and
    `noted` is called, whenever one more block is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        family: Family,
        written: list[dict[str, str]] | None = None,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        self._family, self._reader, self._noted = family, reader_of(model, family), noted
        self._writer = ShardWriter(folder, self._reader.shards, self._reader.dtype)
        self._files = Shards(find_files(folder))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write behind")
        self._pending: Future[dict[str, str]] | None = None
        self._masks: dict[str, tuple[str, float]] = {}
        self.written = [] if written is None else written
        self._given_back = 0

    def earlier(self, index: int, block: nn.Module) -> bool:
        """Give a block the weights that are here already; False if there are none, or not those that were written."""
        if index >= len(self.written):
            return False
        layers = block_adapters(block, self._family)
        weights = {name: self._files.read(self._stored(index, name)) for name in layers}
        if {name: _sha256(weight) for name, weight in weights.items()} != self.written[index]:
            logger.warning("block %d is not on the disk as it was written: pruned again from there", index)
            del self.written[index:]
            return False
        for name, weight in weights.items():
            layers[name].set_base(weight.to(layers[name].weight.device))
            self._masks[f"{self._family.blocks}.{index}.{name}"] = fingerprint(weight != 0)
        self._given_back = index + 1
        return True

    def write(self, index: int, block: nn.Module) -> None:
        """Hand over block number `index`; waits until the one before it is written, so that one is held at most."""
        if index < self._given_back:
            return
        weights = {name: layer.merged().cpu() for name, layer in block_adapters(block, self._family).items()}
        self._settle()
        self._pending = self._thread.submit(self._write, index, weights)

    def _stored(self, index: int, name: str) -> str:
        return self._reader.names[index][f"{name}.weight"]

    def _write(self, index: int, weights: dict[str, torch.Tensor]) -> dict[str, str]:
        for name, weight in weights.items():
            self._masks[f"{self._family.blocks}.{index}.{name}"] = fingerprint(weight != 0)
            self._writer.write(self._stored(index, name), weight)
        self._writer.flush(self._stored(index, name) for name in weights)
        return {name: _sha256(weight) for name, weight in weights.items()}

    def _settle(self) -> None:
        if self._pending is not None:
            self.written.append(self._pending.result())
            self._pending = None
            self._noted()

    def finish(self) -> dict[str, tuple[str, float]]:
        """Complete the files. Returns (fingerprint of the mask, share of zeros) by projection's full name."""
        self._settle()
        self._thread.shutdown()
        self._writer.finish({self._stored(i, name) for i, block in enumerate(self.written) for name in block})
        return self._masks


def _sha256(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def fingerprint(mask: torch.Tensor) -> tuple[str, float]:
    """(SHA-256 of a mask, share of zeros): masks of a whole model would take an eighth of its weights' number in bytes."""
    bits = mask.cpu().numpy()
    return hashlib.sha256(np.packbits(bits).tobytes()).hexdigest(), 1 - float(np.count_nonzero(bits)) / bits.size


def load_streamed_material(config: Config) -> Material:
    """As `job.load_material`, the weights of the blocks left on disk."""
    options = config.model
    device = pretrained.choose_device(options.device)
    model, tokenizer = pretrained.load_streamed(options.model, device, options.dtype, options.trust_remote_code)
    losa.check_structure(model, config.settings)
    return with_text(config, model, tokenizer)


@torch.no_grad()
def run_streamed(config: Config, folder: Path) -> dict[str, Any]:
    """The main job, block by block. Returns the result, as losa_result.json holds it."""
    start = time.perf_counter()
    journal = open_journal(config, folder)
    notes = journal.notes
    material = load_streamed_material(config)
    model = material.model
    family = losa.check_structure(model, config.settings)
    environment = environment_of(config, material)
    if notes:
        identity.check_material(notes["environment"], environment)
    of_weights = model.dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    checks.check_disk(of_weights + checks.REPORT_BYTES, "pruned model", config, folder)
    metrics = Metrics(folder / "metrics.jsonl")
    sweeps = Sweeps(model, family, config, material)
    weights = torch.tensor(prunable_weights(model, family), dtype=torch.float64)
    target = config.prune.final_sparsity

    with journal.stopping_at_points():
        dense = Dense(**notes["dense"]) if notes else sweeps.dense()
        # Refused here, if at all, before anything is written down.
        _, shares = losa.initial_rates(torch.tensor(dense.shares, dtype=torch.float64), weights, config.prune)
        importance = None if dense.importance is None else torch.tensor(dense.importance, dtype=torch.float64)
        rates, groups = losa.block_targets(config.prune, target, importance, weights, shares)
        if not notes:
            metrics.log("perplexity", value=dense.perplexity, model="dense")
            notes.update(dense=dataclasses.asdict(dense), environment=environment, blocks=[])
            notes.update(options=identity.options(config), seconds=0.0, prune_seconds=0.0)
            journal.noted()

        begin = time.perf_counter()
        earlier = notes["seconds"], notes["prune_seconds"]

        def noted() -> None:
            now = time.perf_counter()
            notes["seconds"], notes["prune_seconds"] = earlier[0] + now - start, earlier[1] + now - begin
            journal.noted()

        (folder / "model").mkdir(exist_ok=True)
        pruned = sweeps.prune(rates, groups, Output(folder / "model", model, family, notes["blocks"], noted), shares)
    seconds = earlier[1] + time.perf_counter() - begin
    record = losa.StepRecord(
        step=1,
        target=target,
        importance=dense.importance or [],
        sparsity=rates.tolist(),
        realised=pruned.realised,
        errors=pruned.errors,
        ranks=[],
        losses=[],
        seconds={"importance": dense.seconds, "prune": seconds, "train": 0.0},
    )
    metrics.log("step", **record.as_dict())
    _save_rest(folder / "model", material)
    perplexity, verification = _read_again(folder / "model", sweeps, pruned)
    metrics.log("perplexity", value=perplexity, model="pruned, written and read again")

    healed = {"perplexity": perplexity, "sparsity": _mean(pruned.realised, weights), "seconds": seconds}
    at_once = healed
    if dense.importance is not None or config.reconstruction.reconstruct_epochs:
        at_once = _uniform(sweeps, weights, shares)
        metrics.log("perplexity", value=at_once["perplexity"], model="pruned at once")
    rows = {
        "dense": {"perplexity": dense.perplexity, "sparsity": _mean(dense.shares, weights), "seconds": 0.0},
        "pruned_at_once": at_once,
        "losa": healed,
    }
    sizes = _sizes(model, pruned, weights)
    result = summarise(config, family.name, rows, sizes, [perplexity], material, verification, "block by block")
    result["seconds_in_all"] = earlier[0] + time.perf_counter() - start
    write_results(folder, config, environment, result, [record])
    return result


def _read_again(folder: Path, sweeps: Sweeps, pruned: Pruned) -> tuple[float, pretrained.Verification]:
    """`Sweeps.verify` of a model opened from this folder, of which nothing is left on the device afterwards."""
    model = open_streamed(folder, sweeps.device, None, sweeps.config.model.trust_remote_code)
    material = dataclasses.replace(sweeps.material, model=model)
    return Sweeps(model, sweeps.family, sweeps.config, material).verify(folder, pruned)


def _uniform(sweeps: Sweeps, weights: torch.Tensor, shares: torch.Tensor) -> dict[str, float]:
    """The row of a run whose rates come from mutual information, or which reconstructs: only pruned, at one rate for all."""
    start = time.perf_counter()
    config = dataclasses.replace(sweeps.config.prune, layer_sparsity="uniform")
    rates, groups = losa.block_targets(config, config.final_sparsity, None, weights, shares)
    found = sweeps.prune(rates, groups)
    return {
        "perplexity": found.perplexity,
        "sparsity": _mean(found.realised, weights),
        "seconds": time.perf_counter() - start,
    }


def _save_rest(folder: Path, material: Material) -> None:
    """What is no weight: configuration, generation settings, tokenizer."""
    model = material.model
    model.config.save_pretrained(folder)
    source = pretrained.folder_of(model)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    material.tokenizer.save_pretrained(folder)
    pretrained.keep_beside(source, folder)


def _mean(shares: Sequence[float], weights: torch.Tensor) -> float:
    return float((torch.tensor(shares, dtype=torch.float64) * weights).sum() / weights.sum())


def _sizes(model: PreTrainedModel, pruned: Pruned, weights: torch.Tensor) -> dict[str, int]:
    """Bytes of all weights as saved, and with the pruned projections as a bitmap and their kept values."""
    size = model.dtype.itemsize
    dense = sum(parameter.numel() for parameter in model.parameters()) * size
    zeros = int((torch.tensor(pruned.realised, dtype=torch.float64) * weights).sum().round())
    return {"dense": dense, "packed": dense - zeros * size + int(weights.sum()) // 8}
