"""The job of a run in memory: prune, adapt, merge, save, verify, report."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from torch_impl import losa
from torch_impl.engine import distributed, finite
from torch_impl.engine.batches import Example
from torch_impl.engine.blocks import Blocks, zero_share
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.progress import note
from torch_impl.engine.rates import PLAIN
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints, has_checkpoints
from torch_impl.engine.resume.run_folder import CHECKPOINTS, check_folder, run_folder
from torch_impl.engine.settings import DENSE, Settings
from torch_impl.engine.smaller import make_smaller
from torch_impl.experiment import identity, one_shot, provenance
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.footprint import Footprints, footprint, packing_saves
from torch_impl.experiment.material import Material, environment_of, load_material
from torch_impl.experiment.metrics import METRICS, Metrics
from torch_impl.experiment.planning import checks
from torch_impl.experiment.progress import step_line
from torch_impl.experiment.result import Measured, MeasuredModels, Result, SavedBytes, summarise
from torch_impl.experiment.run_files import write_results
from torch_impl.experiment.samples import sample
from torch_impl.experiment.text import windows
from torch_impl.experiment.text.written import WRITTEN

logger = logging.getLogger(__name__)

LOWER = "to resume with another rate or max_grad_norm, add --accept_changes and its name, such as learning_rate"


def at_once(settings: Settings) -> Settings:
    """Return settings for one-shot pruning at the same sparsity: uniform, without reconstruction and fine-tuning."""
    return dataclasses.replace(
        settings.without_reconstruction(),
        prune=dataclasses.replace(settings.prune, steps=1, layer_sparsity=PLAIN, dense_blocks=[0, 0]),
        training=dataclasses.replace(settings.training, finetune=False, train_base=DENSE),
    )


def is_at_once(config: Config) -> bool:
    """Return whether the run itself is one-shot pruning."""
    plain = not (config.training.finetune or config.reconstruction.reconstruct_epochs)
    return plain and at_once(config.settings).prune == config.prune


def prune_at_once(config: Config, material: Material) -> PreTrainedModel:
    """Copy the model and prune it in one shot."""
    model: PreTrainedModel = fsdp.copy_model(material.model)
    losa.run(model, material.calibration, [], at_once(config.settings), dense=material.model)
    fsdp.merge(Decoder(model))
    return model


def run_job(config: Config, work: Callable[[Config, Path], Result]) -> tuple[Result, Path]:
    """Run `work`, in memory or offloaded, or resume an interrupted run.

    Return the result and the folder of the run.
    """
    target = config.output_dir
    provenance.software()  # The commit, before somebody changes the checkout.
    with distributed.process_group(pretrained.choose_device(config.model.device)), _folder(config) as folder:
        result = work(config, folder)
    return result, target


def check_output(config: Config) -> None:
    """Check output_dir without writing. Errors: as `run_job`."""
    _check_model_stays(config)
    check_folder(config.output_dir, config.output.overwrite, config.output.resume)


def _check_model_stays(config: Config) -> None:
    model = Path(config.model.model).resolve()
    if config.output.overwrite and model.exists() and config.output_dir.resolve() in (model, *model.parents):
        raise ValueError(
            f"output_dir {config.output_dir} contains model {config.model.model}, which --overwrite would delete; "
            "use another folder"
        )


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """Create the folder to write into, in process 0, and yield it in all processes.

    Errors: ValueError as `run_folder`, or if --overwrite would delete the model to prune.
    """
    if not distributed.is_main_process():
        yield Path(distributed.broadcast_text(""))
        return
    _check_model_stays(config)
    with run_folder(config.output_dir, config.output.overwrite, config.output.resume) as folder:
        distributed.broadcast_text(str(folder))
        yield folder


def open_checkpointer(config: Config, folder: Path, in_memory: bool) -> Checkpointer:
    """Open the checkpoints of this run, at the last valid one. in_memory: the pruned blocks stay there, until the run saves them.

    Errors: ValueError if the run began with other options.
    """
    unfinished = has_checkpoints(folder / CHECKPOINTS)
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, config.output.keep_points)
    # A GPU need not wait for the disk: a block of 7B has 0.4 GB, which take seconds to hash and write.
    in_background = in_memory and pretrained.choose_device(config.model.device).type == "cuda"
    checkpointer = Checkpointer(checkpoints, config.output.save_every, (folder / METRICS,), in_background)
    if unfinished and not checkpointer.notes:
        logger.warning("output_dir %s has no valid checkpoint: starting over", config.output_dir)
    if checkpointer.notes:
        identity.check_options(
            checkpointer.notes["options"], identity.options(config), config.output.accept_changes or ()
        )
    checkpointer.restore_attached()
    return checkpointer


class Evaluation:
    """Measure models on the run's evaluation text and log their perplexity."""

    def __init__(self, config: Config, material: Material, metrics: Metrics) -> None:
        self._windows, self._size = material.evaluation, config.text.eval_batch_size
        self.metrics = metrics

    def perplexity(self, of: torch.nn.Module, **labels: Any) -> float:
        """Measure the perplexity, in smaller batches if memory is full. labels: model, and step if several have its name."""
        name = f"{labels['model']} after step {labels['step']}" if "step" in labels else labels["model"]
        value, _ = find_executable_batch_size(
            lambda size: perplexity(of, self._windows, size, name), self._size, "eval_batch_size"
        )
        self.metrics.log("perplexity", value=value, **labels)
        return value

    def measure(self, of: PreTrainedModel, name: str, seconds: float) -> Measured:
        """Measure perplexity and sparsity. seconds: that it took to make the model."""
        return Measured(self.perplexity(of, model=name), zero_share(Decoder(of).weights), seconds)


def _baselines(config: Config, material: Material, evaluation: Evaluation) -> dict[str, Any]:
    """Measure the dense model and, unless the run is just that, the model pruned in one shot.

    Return plain values, as checkpoints hold them.
    """
    found: dict[str, Any] = {"dense": dataclasses.asdict(evaluation.measure(material.model, "dense", 0.0))}
    found["sample"] = _sample(material.model, material)
    if not is_at_once(config):
        start = time.perf_counter()
        pruned = prune_at_once(config, material)
        shot = evaluation.measure(pruned, "pruned at once", time.perf_counter() - start)
        found["pruned_at_once"] = dataclasses.asdict(shot)
    return found


def _sample(model: PreTrainedModel, material: Material) -> dict[str, str]:
    return {} if distributed.processes() > 1 else sample(model, material.tokenizer, material.evaluation)


def open_metrics(config: Config, folder: Path) -> Metrics:
    """Open the metrics of a run, after `open_checkpointer`, which restores those of a resumed run."""
    if config.output.report_to == "none":
        return Metrics(folder / METRICS)
    note(f"TensorBoard: tensorboard --logdir {folder.parent}")
    return Metrics(folder / METRICS, folder / "tensorboard")


def run_in_memory(config: Config, folder: Path) -> Result:
    """Run the job in memory."""
    checkpointer = open_checkpointer(config, folder, in_memory=True)
    with open_metrics(config, folder) as metrics:
        return _run(config, folder, checkpointer, metrics)


def _run(config: Config, folder: Path, checkpointer: Checkpointer, metrics: Metrics) -> Result:
    start, notes = time.perf_counter(), checkpointer.notes
    material = load_material(config, kept=folder / WRITTEN)
    parts = windows.split_parts(material.examples, config.text.shares(config.prune.steps)) if material.examples else []
    environment = environment_of(config, material)
    if notes:
        identity.check_material(notes["environment"], environment)
    checks.check(material.model, config, folder)
    evaluation = Evaluation(config, material, metrics)
    fresh = not notes
    if fresh:
        notes.update(_baselines(config, material, evaluation), after_step=[], seconds=0.0, environment=environment)
    earlier = notes["seconds"]
    notes["options"] = identity.options(config)

    def seconds() -> float:
        return earlier + time.perf_counter() - start

    with checkpointer.stopping_at_checkpoints():
        if fresh:
            checkpointer.noted()
        records = prune_and_train(config, material, parts, evaluation, checkpointer, seconds)
    healed, saved, verification, text, footprints = _finish(config, material, folder, evaluation, records)
    samples = {"dense": notes.get("sample", {}), "losa": text}
    trained = _one_shot(config, material, evaluation) if config.output.baselines else None
    shot = Measured(**notes["pruned_at_once"]) if "pruned_at_once" in notes else healed
    several = distributed.processes()
    result = summarise(
        config,
        material,
        Decoder(material.model).family.name,
        MeasuredModels(Measured(**notes["dense"]), shot, healed, trained),
        saved,
        notes["after_step"],
        verification,
        f"over {several} processes" if several > 1 else "with transformers alone",
        seconds(),
        records,
        {name: found for name, found in samples.items() if found},
        footprints,
    )
    write_results(folder, config, environment, result, records)
    return result


def prune_and_train(
    config: Config,
    material: Material,
    parts: list[list[Example]],
    evaluation: Evaluation,
    checkpointer: Checkpointer,
    seconds: Callable[[], float],
    blocks: Blocks | None = None,
) -> list[StepRecord]:
    """Run Algorithm 1 and measure the model after every step.

    seconds: that the run has taken so far. blocks: their source if they are not those of the material's model.
    """
    model = material.model if blocks is None else blocks.decoder.model
    notes = checkpointer.notes

    def on_step(record: StepRecord) -> None:
        evaluation.metrics.log("step", **record.as_dict())
        notes["after_step"].append(evaluation.perplexity(model, model="losa", step=record.step))
        notes["seconds"] = seconds()
        note(step_line(record, notes["after_step"][-1], config.text.shares(config.prune.steps)))

    def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
        evaluation.metrics.log("train", step=step, optimizer_step=optimizer_step, loss=loss, learning_rate=rate)

    try:
        return losa.run(
            model,
            material.calibration,
            parts,
            config.settings,
            on_step,
            on_loss,
            checkpointer=checkpointer,
            blocks=blocks,
        )
    except FloatingPointError as error:
        trained = checkpointer.progress.losses or checkpointer.progress.records
        if trained or not isinstance(error, finite.NotFiniteError):
            error.add_note(LOWER)
        raise


def _finish(
    config: Config, material: Material, folder: Path, evaluation: Evaluation, records: Sequence[StepRecord]
) -> tuple[Measured, SavedBytes, pretrained.Verification, dict[str, str], Footprints | None]:
    """Merge, save, reload and verify. Return the measures of the reloaded model, its bytes, the verification, a sample, and, of a
    smaller model, what both take."""
    model, decoder = material.model, Decoder(material.model)
    probe = material.evaluation[:2]
    unmerged = pretrained.logits_of(model, probe)
    masks = fsdp.merge(decoder)
    sparsity = zero_share(decoder.weights)
    smaller = None
    if config.prune.pattern.structured and not distributed.is_sharded(model):
        smaller = make_smaller(model)
        masks = smaller.cut(masks)
    if distributed.is_main_process():
        # Delete leftovers of an interrupted attempt.
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "model").mkdir()
        material.tokenizer.save_pretrained(folder / "model")
        pretrained.keep_beside(pretrained.folder_of(model), folder / "model")
    if distributed.is_sharded(model):
        fsdp.save(decoder, folder / "model")
    else:
        pretrained.save(smaller.model if smaller else model, folder / "model")
    merged, verification = pretrained.verify(
        folder / "model", masks, probe, unmerged, model.device, config.model.trust_remote_code
    )
    seconds = sum(sum(record.seconds.values()) for record in records)
    # What a smaller model lacks counts as its zeros do.
    healed = dataclasses.replace(evaluation.measure(merged, "losa, merged and reloaded", seconds), sparsity=sparsity)
    saved, footprints = _saved_bytes(merged, masks), None
    if smaller:
        note("measuring the speed of the dense and of the smaller model")
        footprints = Footprints(footprint(model, probe), footprint(merged, probe), smaller.note)
        saved = SavedBytes(footprints.dense.bytes, saved.packed, saved.dense)
    return healed, saved, verification, _sample(merged, material), footprints


def _one_shot(config: Config, material: Material, evaluation: Evaluation) -> Measured:
    """Measure the trained one-shot model, which takes the place of the run's model."""
    note("one shot, trained, for comparison")
    seconds = one_shot.prune_and_train(config, material)
    return evaluation.measure(material.model, "one shot, trained", seconds)


def _saved_bytes(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> SavedBytes:
    """Return the bytes of all weights as saved, and with the pruned projections packed."""
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = model.dtype.itemsize
    shares = ((mask.shape, float((~mask).double().mean())) for mask in masks.values() if mask.numel())
    saved = sum(packing_saves(shape, sparsity, size) for shape, sparsity in shares)
    return SavedBytes(dense, dense - int(distributed.all_reduce_number(saved)))
