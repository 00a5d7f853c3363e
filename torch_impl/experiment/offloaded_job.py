"""The job of an offloaded run: a model larger than memory is pruned block by block, from disk to disk.

The first sweep measures the dense perplexity, the mutual information and the zeros. The second prunes. The third verifies
and evaluates the written model. Files, table and report are the same as for other runs. An interrupted run resumes after the
last pruned block, which is already in the output; hidden states are recomputed.

With training, the pruned blocks stay in memory, compressed (`TrainingConfig.train_base`), and are written at the end. Such a run
resumes as one in memory does.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_impl import losa
from torch_impl.engine import finite
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.offload import open_offloaded
from torch_impl.engine.checkpoints.rewriting import Output, UnfinishedWindow
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.experiment import identity
from torch_impl.experiment.compressed_blocks import CompressedBlocks
from torch_impl.experiment.config import Config
from torch_impl.experiment.footprint import packing_saves
from torch_impl.experiment.job import (
    LOWER,
    Evaluation,
    at_once,
    is_at_once,
    open_checkpointer,
    open_metrics,
    prune_and_train,
)
from torch_impl.experiment.material import Material, environment_of, load_material
from torch_impl.experiment.metrics import Metrics
from torch_impl.experiment.planning import checks
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.result import Measured, MeasuredModels, Result, SavedBytes, summarise
from torch_impl.experiment.run_files import write_results
from torch_impl.experiment.sweeps import Dense, Pruned, Sweeps
from torch_impl.experiment.text import windows


@torch.no_grad()
def run_offloaded(config: Config, folder: Path) -> Result:
    """Run the job block by block."""
    # Without training, blocks go to the output one by one, and a checkpoint may name only those that are there.
    checkpointer = open_checkpointer(config, folder, in_memory=config.training.finetune)
    with open_metrics(config, folder) as metrics:
        return _run(config, folder, checkpointer, metrics)


def _run(config: Config, folder: Path, checkpointer: Checkpointer, metrics: Metrics) -> Result:
    start = time.perf_counter()
    material = load_material(config, offloaded=True)
    environment = environment_of(config, material)
    if checkpointer.notes:
        identity.check_material(checkpointer.notes["environment"], environment)
    decoder = Decoder(material.model)
    disk = checks.disk(config, Sizes.of(decoder, material.model.dtype), offloaded=True)
    checks.check_disk(disk.total, "pruned model", config, folder)
    sweeps = Sweeps(decoder, config, material)
    earlier = checkpointer.notes.get("seconds", 0.0)
    with checkpointer.stopping_at_checkpoints():
        dense = _dense(sweeps, checkpointer, environment, metrics)
        if config.training.finetune:
            pruned, records = _trained(sweeps, checkpointer, dense, folder, start, metrics)
        else:
            pruned = _pruned(sweeps, checkpointer, dense, folder, start)
            records = [pruned.record]
            metrics.log("step", **pruned.record.as_dict())
    _save_rest(folder / "model", material)
    perplexity, verification = _read_again(folder / "model", sweeps, pruned)
    metrics.log("perplexity", value=perplexity, model="pruned, written and read again")

    weights = torch.tensor(decoder.prunable_weights, dtype=torch.float64)
    realised = pruned.record.realised
    seconds = sum(sum(record.seconds.values()) for record in records)
    healed = Measured(
        perplexity, _mean(realised, weights), seconds if config.training.finetune else pruned.record.seconds["prune"]
    )
    shot = healed
    if not is_at_once(config):
        shot = _at_once(sweeps, dense, weights)
        metrics.log("perplexity", value=shot.perplexity, model="pruned at once")
    result = summarise(
        config,
        material,
        decoder.family.name,
        MeasuredModels(Measured(dense.perplexity, _mean(dense.shares, weights), 0.0), shot, healed),
        _saved_bytes(decoder, verification),
        checkpointer.notes.get("after_step", [perplexity]),
        verification,
        "block by block",
        earlier + time.perf_counter() - start,
        records,
        {},
    )
    write_results(folder, config, environment, result, records)
    return result


def _dense(sweeps: Sweeps, checkpointer: Checkpointer, environment: dict[str, Any], metrics: Metrics) -> Dense:
    """Run the sweep over the dense model, or return its result from a checkpoint.

    Errors: ValueError, before anything is written, if the model is already sparser than the target.
    """
    notes, config = checkpointer.notes, sweeps.config
    if notes:
        return Dense(**notes["dense"])
    dense = sweeps.dense()
    weights = torch.tensor(sweeps.decoder.prunable_weights, dtype=torch.float64)
    losa.initial_rates(torch.tensor(dense.shares, dtype=torch.float64), weights, config.prune)
    metrics.log("perplexity", value=dense.perplexity, model="dense")
    notes.update(dense=dataclasses.asdict(dense), environment=environment, blocks=[])
    notes.update(seconds=0.0, prune_seconds=0.0, options=identity.options(config))
    checkpointer.noted()
    return dense


def _pruned(sweeps: Sweeps, checkpointer: Checkpointer, dense: Dense, folder: Path, start: float) -> Pruned:
    """Prune into the folder's model and save a checkpoint after every written block. start: time when this attempt began."""
    notes, begin = checkpointer.notes, time.perf_counter()
    notes["options"] = identity.options(sweeps.config)
    earlier = notes["seconds"], notes["prune_seconds"]

    def noted() -> None:
        now = time.perf_counter()
        notes["seconds"], notes["prune_seconds"] = earlier[0] + now - start, earlier[1] + now - begin
        checkpointer.noted()

    (folder / "model").mkdir(exist_ok=True)
    unfinished = None
    if checkpointer.checkpoints is not None and sweeps.config.reconstruction.window > 1:
        unfinished = UnfinishedWindow(checkpointer.checkpoints, notes.setdefault("errors", []))
    output = Output(folder / "model", sweeps.decoder, notes["blocks"], noted, unfinished)
    try:
        pruned = sweeps.prune(sweeps.config.settings, dense, output)
    except FloatingPointError as error:
        if not isinstance(error, finite.NotFiniteError):
            error.add_note(LOWER)
        raise
    seconds = earlier[1] + time.perf_counter() - begin
    pruned.record.seconds = {"importance": dense.seconds, "prune": seconds, "train": 0.0}
    return pruned


def _trained(
    sweeps: Sweeps, checkpointer: Checkpointer, dense: Dense, folder: Path, start: float, metrics: Metrics
) -> tuple[Pruned, list[StepRecord]]:
    """Prune and train in memory over compressed blocks; write the merged blocks into the folder's model."""
    config, material, notes = sweeps.config, sweeps.material, checkpointer.notes
    parts = windows.split_parts(material.examples, config.text.shares(config.prune.steps))
    earlier = notes["seconds"]
    notes["options"] = identity.options(config)
    notes.setdefault("after_step", [])
    blocks = CompressedBlocks(sweeps, dense)
    model, probe = blocks.decoder.model, material.evaluation[:2]
    with torch.enable_grad():
        records = prune_and_train(
            config,
            material,
            parts,
            Evaluation(config, material, metrics),
            checkpointer,
            lambda: earlier + time.perf_counter() - start,
            blocks,
        )
    # Delete leftovers of an interrupted attempt.
    shutil.rmtree(folder / "model", ignore_errors=True)
    (folder / "model").mkdir()
    logits = pretrained.logits_of(model, probe).cpu()
    output = Output(folder / "model", sweeps.decoder)
    for index, block in enumerate(blocks.decoder.blocks):
        output.write(index, block)
    return Pruned(records[-1], output.finish(), logits=logits), records


def _read_again(folder: Path, sweeps: Sweeps, pruned: Pruned) -> tuple[float, pretrained.Verification]:
    """Open the written model, verify it with `Sweeps.verify`, and free its device memory."""
    model = open_offloaded(folder, sweeps.device, None, sweeps.config.model.trust_remote_code)
    material = dataclasses.replace(sweeps.material, model=model)
    return Sweeps(Decoder(model), sweeps.config, material).verify(folder, pruned)


def _at_once(sweeps: Sweeps, dense: Dense, weights: torch.Tensor) -> Measured:
    """Measure one-shot pruning at uniform sparsity, for comparison with a run that uses importances or reconstruction."""
    start = time.perf_counter()
    found = sweeps.prune(at_once(sweeps.config.settings), dense)
    return Measured(found.perplexity, _mean(found.record.realised, weights), time.perf_counter() - start)


def _save_rest(folder: Path, material: Material) -> None:
    """Save everything except the weights: configuration, generation settings, tokenizer."""
    model = material.model
    model.config.save_pretrained(folder)
    source = pretrained.folder_of(model)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    material.tokenizer.save_pretrained(folder)
    pretrained.keep_beside(source, folder)


def _mean(shares: Sequence[float], weights: torch.Tensor) -> float:
    return float((torch.tensor(shares, dtype=torch.float64) * weights).sum() / weights.sum())


def _saved_bytes(decoder: Decoder, verification: pretrained.Verification) -> SavedBytes:
    """Return the bytes of all weights as saved, and with the pruned projections packed."""
    size = decoder.model.dtype.itemsize
    dense = size * sum(parameter.numel() for parameter in decoder.model.parameters())
    saved = 0
    for index, block in enumerate(decoder.blocks):
        for name, weight in decoder.family.weights_of(block).items():
            saved += packing_saves(weight.shape, verification.zeros[decoder.full_name(index, name)][1], size)
    return SavedBytes(dense, dense - saved)
