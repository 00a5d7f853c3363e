"""The main job: load, evaluate, prune and heal, merge, save, reload, verify, report."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import losa
from torch_impl.engine import distributed, finite
from torch_impl.engine.batches import Example
from torch_impl.engine.checkpoints import fsdp, pretrained
from torch_impl.engine.families import decoder_blocks, find_family, weight_of
from torch_impl.engine.memory import halving
from torch_impl.engine.resume.journal import Journal
from torch_impl.engine.resume.points import Points
from torch_impl.engine.resume.run_folder import POINTS, run_folder
from torch_impl.experiment import identity, report
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.metrics import Metrics, write_json
from torch_impl.experiment.planning import checks
from torch_impl.experiment.text import splitting, windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """All that a run reads."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: torch.Tensor
    examples: list[Example]
    evaluation: torch.Tensor
    evaluation_facts: dict[str, Any]


def load_material(config: Config) -> Material:
    """Model, tokenizer and all text. Errors: ValueError or FileNotFoundError naming what is wrong."""
    device = pretrained.choose_device(config.model.device)
    model, tokenizer = pretrained.load(config.model.model, device, config.model.dtype, config.model.trust_remote_code)
    losa.check_structure(model, config.settings)
    return with_text(config, model, tokenizer)


def with_text(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Material:
    """All that a run of this model reads. Errors: as for `load_material`."""
    checks.check_lengths(model, config)
    checks.warn_of_lengths(model, config)
    options, calibration, seed = config.text, config.calibration, config.output.seed
    finetune = options.finetune_data if config.training.finetune else None
    texts = splitting.load_texts(options.calibration_data, finetune, options.eval_data)
    calibration_ids = windows.calibration_windows(
        texts.calibration, tokenizer, calibration.nsamples, calibration.seqlen, seed
    )
    examples: list[Example] = []
    if finetune is not None:
        examples = windows.training_examples(
            texts.finetune, tokenizer, options.train_seqlen, seed, limit=options.train_examples
        )
    limit = options.eval_windows
    # One more than asked for shows whether the text goes on.
    measured = windows.evaluation_windows(
        texts.evaluation, tokenizer, options.eval_seqlen, limit=None if limit is None else limit + 1
    )
    checks.check_tokens(model, tokenizer, calibration_ids, measured, *(example["input_ids"] for example in examples))
    facts = {
        **texts.facts,
        "first_windows_only": limit is not None and len(measured) > limit,
        **windows.describe_windows(measured[:limit]),
    }
    return Material(model, tokenizer, calibration_ids, examples, measured[:limit], facts)


def prune_at_once(config: Config, material: Material) -> PreTrainedModel:
    """The same method at the same sparsity in one shot: uniform, without fine-tuning."""
    plain = dataclasses.replace(
        config.settings.without_reconstruction(),
        prune=dataclasses.replace(config.prune, steps=1, layer_sparsity="uniform"),
        training=dataclasses.replace(config.training, finetune=False),
    )
    model: PreTrainedModel = fsdp.twin(material.model, find_family(material.model))
    losa.run(model, material.calibration, [], plain, dense=material.model)
    fsdp.merge(model, find_family(model))
    return model


def run_job(config: Config, work: Callable[[Config, Path], dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """Do all of it, in memory or block by block, or what an interrupted run has left to do.

    Returns the result, as losa_result.json holds it, and the folder of the run.
    """
    target = config.output_dir
    with distributed.joined(pretrained.choose_device(config.model.device)), _folder(config) as folder:
        result = work(config, folder)
    return result, target


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """The folder to write into, made by process 0 and known to all.

    Errors: ValueError as for `run_folder`, or if overwriting it would remove the model that is read.
    """
    if not distributed.leads():
        yield Path(distributed.agreed_text(""))
        return
    model = Path(config.model.model).resolve()
    if config.output.overwrite and model.exists() and config.output_dir.resolve() in (model, *model.parents):
        raise ValueError(f"output_dir {config.output_dir} holds model {config.model.model}; name another folder")
    with run_folder(config.output_dir, config.output.overwrite, config.output.resume) as folder:
        distributed.agreed_text(str(folder))
        yield folder


def open_journal(config: Config, folder: Path) -> Journal:
    """The journal of this run, at its last good point if it goes on. Errors: ValueError if it began with other options."""
    points = Points(folder / POINTS, config.output.keep_points)
    journal = Journal(points, config.output.save_every, attached=(folder / "metrics.jsonl",))
    if config.output.resume and not journal.notes:
        logger.warning("%s has no point to go on from: from the beginning", config.output_dir)
    if journal.notes:
        identity.check_options(journal.notes["options"], identity.options(config), config.output.accept_changes or ())
    journal.restore_attached()
    return journal


def _baselines(config: Config, material: Material, measure: Callable[..., float]) -> dict[str, Any]:
    """The dense model and the one pruned at once: perplexity, sparsity and seconds of each."""
    dense = {"perplexity": measure(material.model, model="dense"), "sparsity": _sparsity(material.model)}
    start = time.perf_counter()
    pruned_model = prune_at_once(config, material)
    seconds = time.perf_counter() - start
    pruned = {"perplexity": measure(pruned_model, model="pruned at once"), "sparsity": _sparsity(pruned_model)}
    return {"dense": {**dense, "seconds": 0.0}, "pruned_at_once": {**pruned, "seconds": seconds}}


def run_in_memory(config: Config, folder: Path) -> dict[str, Any]:
    """The main job with the whole model in memory. Returns the result, as losa_result.json holds it."""
    start = time.perf_counter()
    journal = open_journal(config, folder)
    notes = journal.notes
    material = load_material(config)
    model, family = material.model, find_family(material.model)
    environment = environment_of(config, material)
    if notes:
        identity.check_material(notes["environment"], environment)
    checks.check(model, family, config, folder)
    metrics = Metrics(folder / "metrics.jsonl")

    def measure(what: torch.nn.Module, **labels: Any) -> float:
        name = f"{labels['model']} after step {labels['step']}" if "step" in labels else labels["model"]
        value, _ = halving(
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

    def on_step(record: losa.StepRecord) -> None:
        metrics.log("step", **record.as_dict())
        notes["after_step"].append(measure(model, model="losa", step=record.step))
        notes["seconds"] = earlier + time.perf_counter() - start

    def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
        metrics.log("train", step=step, optimizer_step=optimizer_step, loss=loss, learning_rate=rate)

    with journal.stopping_at_points():
        if fresh:
            journal.noted()
        try:
            records = losa.run(model, material.calibration, parts, config.settings, on_step, on_loss, journal=journal)
        except FloatingPointError as error:
            trained = journal.progress.losses or journal.progress.records
            if trained or not isinstance(error, finite.NotFiniteError):
                error.add_note(
                    "a lower rate or norm goes on from there with --accept_changes learning_rate max_grad_norm"
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
    """Merge, save, reload and verify. Returns the result but for the time it took in all."""
    model, family = material.model, find_family(material.model)
    probe = material.evaluation[:2]
    unmerged = pretrained.logits_of(model, probe)
    masks = fsdp.merge(model, family)
    if distributed.leads():
        # An interrupted attempt may have left parts of it.
        shutil.rmtree(folder / "model", ignore_errors=True)
        (folder / "model").mkdir()
        material.tokenizer.save_pretrained(folder / "model")
        pretrained.keep_beside(pretrained.folder_of(model), folder / "model")
    if distributed.is_sharded(model):
        fsdp.save(model, family, folder / "model")
        verify = pretrained.verify_sharded
    else:
        pretrained.save(model, folder / "model")
        verify = pretrained.verify
    merged, verification = verify(
        folder / "model", masks, probe, unmerged, model.device, config.model.trust_remote_code
    )
    healed = {"perplexity": measure(merged, model="losa, merged and reloaded"), "sparsity": _sparsity(merged)}
    sizes = _sizes(merged, masks)
    rows = {"dense": notes["dense"], "pruned_at_once": notes["pruned_at_once"], "losa": healed}
    several = distributed.processes()
    how = f"over {several} processes" if several > 1 else "with transformers alone"
    return summarise(config, family.name, rows, sizes, notes["after_step"], material, verification, how)


def summarise(
    config: Config,
    family: str,
    rows: dict[str, dict[str, float]],
    sizes: dict[str, int],
    after_step: list[float],
    material: Material,
    verification: pretrained.Verification,
    reloaded: str,
) -> dict[str, Any]:
    """losa_result.json. rows: perplexity, sparsity and seconds of dense, pruned_at_once and losa; reloaded: how."""
    packed = {"dense": sizes["dense"], "pruned_at_once": sizes["packed"], "losa": sizes["packed"]}
    return {
        "model": config.model.model,
        "family": family,
        "method": config.prune.prune_method,
        "sparsity_type": config.prune.sparsity_type,
        "target_sparsity": config.prune.final_sparsity,
        **{name: {**row, "bytes": sizes["dense"], "packed_bytes": packed[name]} for name, row in rows.items()},
        "perplexity_after_step": after_step,
        "evaluation": material.evaluation_facts,
        "train_examples": len(material.examples),
        "lr_schedule": config.training.lr_schedule,
        "loss": config.training.loss,
        "step_shares": config.text.shares(config.prune.steps),
        "verification": {
            "reloaded": reloaded,
            "largest_logit_difference": verification.logit_difference,
            "projections": len(verification.zeros),
            "sparsity_pruned_and_saved": verification.zeros,
        },
    }


def write_results(
    folder: Path,
    config: Config,
    environment: dict[str, Any],
    result: dict[str, Any],
    records: list[losa.StepRecord],
) -> None:
    """All files of a run's folder but the weights, by process 0."""
    if not distributed.leads():
        return
    write_json(folder / "losa_result.json", result)
    write_json(folder / "steps.json", [record.as_dict() for record in records])
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / "environment.json", environment)
    report.write(folder, result, records)
    (folder / "model" / "README.md").write_text(report.model_card(result), encoding="utf-8", errors="backslashreplace")


@torch.no_grad()
def _sparsity(model: torch.nn.Module) -> float:
    """Share of zeros of all prunable weights."""
    family = find_family(model)
    blocks = decoder_blocks(model, family)
    weights = [weight_of(block, name) for block in blocks for name in family.projections]
    zeros = sum(int((distributed.local(weight) == 0).sum()) for weight in weights)
    return distributed.total_of(zeros) / sum(weight.numel() for weight in weights)


def _sizes(model: PreTrainedModel, masks: dict[str, torch.Tensor]) -> dict[str, int]:
    """Bytes of all weights as saved, and with the pruned projections as a bitmap and their kept values."""
    dense = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    size = torch.empty(0, dtype=model.dtype).element_size()
    saved = sum(int((~mask).sum()) * size - mask.numel() // 8 for mask in masks.values())
    return {"dense": dense, "packed": dense - int(distributed.total_of(saved))}


def environment_of(config: Config, material: Material) -> dict[str, Any]:
    device = material.model.device
    # Where each sequence ends, and which of its tokens are learned, make a difference too.
    examples = [
        part for e in material.examples for part in (torch.tensor([len(e["labels"])]), e["input_ids"], e["labels"])
    ]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "dtype": str(material.model.dtype),
        "model_sha256": pretrained.weights_hash(pretrained.folder_of(material.model)),
        "calibration_tokens_sha256": _hash(material.calibration),
        "finetune_tokens_sha256": _hash(torch.cat(examples) if examples else torch.empty(0)),
        "evaluation_tokens_sha256": _hash(material.evaluation),
    }


def _hash(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.long().contiguous().numpy().tobytes()).hexdigest()
