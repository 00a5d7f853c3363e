"""The job of a run in memory: prune, adapt, merge, save, verify, report."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from torch_impl import losa
from torch_impl.engine import distributed, finite
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.resume.run_folder import CHECKPOINTS, run_folder
from torch_impl.engine.settings import Settings
from torch_impl.experiment import identity
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.material import Material, environment_of, load_material
from torch_impl.experiment.metrics import Metrics
from torch_impl.experiment.planning import checks
from torch_impl.experiment.result import summarise, write_results
from torch_impl.experiment.text import windows

logger = logging.getLogger(__name__)


def at_once(settings: Settings) -> Settings:
    """Return settings for one-shot pruning at the same sparsity: uniform, without reconstruction and fine-tuning."""
    return dataclasses.replace(
        settings.without_reconstruction(),
        prune=dataclasses.replace(settings.prune, steps=1, layer_sparsity="uniform"),
        training=dataclasses.replace(settings.training, finetune=False),
    )


def prune_at_once(config: Config, material: Material) -> PreTrainedModel:
    """Copy the model and prune it in one shot."""
    model: PreTrainedModel = fsdp.copy_model(material.model)
    losa.run(model, material.calibration, [], at_once(config.settings), dense=material.model)
    fsdp.merge(Decoder(model))
    return model


def run_job(config: Config, work: Callable[[Config, Path], dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """Run `work`, in memory or offloaded, or resume an interrupted run.

    Returns the content of losa_result.json and the folder of the run.
    """
    target = config.output_dir
    with distributed.process_group(pretrained.choose_device(config.model.device)), _folder(config) as folder:
        result = work(config, folder)
    return result, target


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """Create the folder to write into, in process 0, and yield it in all processes.

    Errors: ValueError as `run_folder`, or if --overwrite would delete the model to prune.
    """
    if not distributed.is_main_process():
        yield Path(distributed.broadcast_text(""))
        return
    model = Path(config.model.model).resolve()
    if config.output.overwrite and model.exists() and config.output_dir.resolve() in (model, *model.parents):
        raise ValueError(
            f"output_dir {config.output_dir} contains model {config.model.model}, which --overwrite would delete; "
            "use another folder"
        )
    with run_folder(config.output_dir, config.output.overwrite, config.output.resume) as folder:
        distributed.broadcast_text(str(folder))
        yield folder


def open_checkpointer(config: Config, folder: Path) -> Checkpointer:
    """Open the checkpoints of this run, at the last valid one. Errors: ValueError if the run began with other options."""
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, config.output.keep_points)
    checkpointer = Checkpointer(checkpoints, config.output.save_every, attached=(folder / "metrics.jsonl",))
    if config.output.resume and not checkpointer.notes:
        logger.warning("no checkpoint found for %s; starting over", config.output_dir)
    if checkpointer.notes:
        identity.check_options(
            checkpointer.notes["options"], identity.options(config), config.output.accept_changes or ()
        )
    checkpointer.restore_attached()
    return checkpointer


def _baselines(config: Config, material: Material, measure: Callable[..., float]) -> dict[str, Any]:
    """Measure perplexity, sparsity and seconds of the dense model and of the model pruned in one shot."""
    dense = {
        "perplexity": measure(material.model, model="dense"),
        "sparsity": zero_share(Decoder(material.model).weights),
    }
    start = time.perf_counter()
    pruned_model = prune_at_once(config, material)
    seconds = time.perf_counter() - start
    pruned = {
        "perplexity": measure(pruned_model, model="pruned at once"),
        "sparsity": zero_share(Decoder(pruned_model).weights),
    }
    return {"dense": {**dense, "seconds": 0.0}, "pruned_at_once": {**pruned, "seconds": seconds}}


def run_in_memory(config: Config, folder: Path) -> dict[str, Any]:
    """Run the job in memory. Return the content of losa_result.json."""
    start = time.perf_counter()
    checkpointer = open_checkpointer(config, folder)
    notes = checkpointer.notes
    material = load_material(config)
    model = material.model
    environment = environment_of(config, material)
    if notes:
        identity.check_material(notes["environment"], environment)
    checks.check(model, config, folder)
    metrics = Metrics(folder / "metrics.jsonl")

    def measure(what: torch.nn.Module, **labels: Any) -> float:
        name = f"{labels['model']} after step {labels['step']}" if "step" in labels else labels["model"]
        value, _ = find_executable_batch_size(
            lambda size: perplexity(what, material.evaluation, size, name),
            config.text.eval_batch_size,
            "eval_batch_size",
        )
        metrics.log("perplexity", value=value, **labels)
        return value

    parts = windows.split_parts(material.examples, config.text.shares(config.prune.steps)) if material.examples else []
    fresh = not notes
    if fresh:
        notes.update(_baselines(config, material, measure), after_step=[], seconds=0.0, environment=environment)
    earlier = notes["seconds"]
    notes["options"] = identity.options(config)

    def on_step(record: StepRecord) -> None:
        metrics.log("step", **record.as_dict())
        notes["after_step"].append(measure(model, model="losa", step=record.step))
        notes["seconds"] = earlier + time.perf_counter() - start

    def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
        metrics.log("train", step=step, optimizer_step=optimizer_step, loss=loss, learning_rate=rate)

    with checkpointer.stopping_at_checkpoints():
        if fresh:
            checkpointer.noted()
        try:
            records = losa.run(
                model, material.calibration, parts, config.settings, on_step, on_loss, checkpointer=checkpointer
            )
        except FloatingPointError as error:
            trained = checkpointer.progress.losses or checkpointer.progress.records
            if trained or not isinstance(error, finite.NotFiniteError):
                error.add_note(
                    "to change learning_rate or max_grad_norm, add --accept_changes learning_rate max_grad_norm"
                )
            raise
    result = _finish(config, material, folder, measure, notes)
    result["losa"]["seconds"] = sum(sum(record.seconds.values()) for record in records)
    result["seconds_in_all"] = earlier + time.perf_counter() - start
    write_results(folder, config, environment, result, records)
    return result


def _finish(
    config: Config, material: Material, folder: Path, measure: Callable[..., float], notes: dict[str, Any]
) -> dict[str, Any]:
    """Merge, save, reload and verify. Return the result without the total time."""
    model, decoder = material.model, Decoder(material.model)
    probe = material.evaluation[:2]
    unmerged = pretrained.logits_of(model, probe)
    masks = fsdp.merge(decoder)
    if distributed.is_main_process():
        # Delete leftovers of an interrupted attempt.
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "model").mkdir()
        material.tokenizer.save_pretrained(folder / "model")
        pretrained.keep_beside(pretrained.folder_of(model), folder / "model")
    if distributed.is_sharded(model):
        fsdp.save(decoder, folder / "model")
    else:
        pretrained.save(model, folder / "model")
    merged, verification = pretrained.verify(
        folder / "model", masks, probe, unmerged, model.device, config.model.trust_remote_code
    )
    healed = {
        "perplexity": measure(merged, model="losa, merged and reloaded"),
        "sparsity": zero_share(Decoder(merged).weights),
    }
    sizes = _sizes(merged, masks)
    rows = {"dense": notes["dense"], "pruned_at_once": notes["pruned_at_once"], "losa": healed}
    several = distributed.processes()
    how = f"over {several} processes" if several > 1 else "with transformers alone"
    return summarise(config, decoder.family.name, rows, sizes, notes["after_step"], material, verification, how)


def _sizes(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the bytes of all weights as saved, and with the pruned projections packed."""
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = torch.empty(0, dtype=model.dtype).element_size()
    saved = sum(int((~mask).sum()) * size - mask.numel() // 8 for mask in masks.values())
    return {"dense": dense, "packed": dense - int(distributed.all_reduce_number(saved))}
