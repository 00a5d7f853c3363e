"""The main job: load, evaluate, prune and heal, merge, save, reload, verify, report."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import losa
from torch_impl.engine import checkpoint, distributed, sharded
from torch_impl.engine.families import decoder_blocks, find_family, weight_of
from torch_impl.engine.training import Example
from torch_impl.experiment import report, text
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import perplexity
from torch_impl.experiment.folder import Metrics, run_folder, write_json


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
    device = checkpoint.choose_device(config.model.device)
    model, tokenizer = checkpoint.load(config.model.model, device, config.model.dtype, config.model.trust_remote_code)
    losa.check_model(model, config.settings)
    return with_text(config, model, tokenizer)


def with_text(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Material:
    """All that a run of this model reads. Errors: as for `load_material`."""
    options, calibration, seed = config.text, config.calibration, config.output.seed
    calibration_ids = text.calibration_windows(
        text.load_documents(options.calibration_data, "train"),
        tokenizer,
        calibration.nsamples,
        calibration.seqlen,
        seed,
    )
    examples: list[Example] = []
    if config.training.finetune:
        documents = text.load_documents(options.finetune_data, "train")
        examples = text.training_examples(
            documents, tokenizer, options.train_seqlen, seed, limit=options.train_examples
        )
    split = _evaluation_split(config)
    held_out = text.load_documents(options.eval_data, split)
    windows = text.evaluation_windows(held_out, tokenizer, options.eval_seqlen, limit=options.eval_windows)
    facts = {
        "split": "held out" if split == "heldout" else "all of it",
        **text.describe_windows(options.eval_data, held_out, windows),
    }
    return Material(model, tokenizer, calibration_ids, examples, windows, facts)


def _evaluation_split(config: Config) -> Literal["heldout", "all"]:
    """All of a source that nothing else reads; else only what is held out of it."""
    options = config.text
    if options.eval_data == "stdlib" or not Path(options.eval_data).exists():
        return "heldout"
    place = Path(options.eval_data).resolve()
    others = [Path(source).resolve() for source in (options.calibration_data, options.finetune_data)]
    shared = any(place == other or place in other.parents or other in place.parents for other in others)
    return "heldout" if shared else "all"


def prune_at_once(config: Config, material: Material) -> PreTrainedModel:
    """The same method at the same sparsity in one shot: uniform, without fine-tuning."""
    plain = dataclasses.replace(
        config.settings,
        prune=dataclasses.replace(config.prune, steps=1, layer_sparsity="uniform"),
        training=dataclasses.replace(config.training, finetune=False),
    )
    model: PreTrainedModel = sharded.twin(material.model, find_family(material.model))
    losa.run(model, material.calibration, [], plain, dense=material.model)
    sharded.merge(model, find_family(model))
    return model


def run_job(config: Config, work: Callable[[Config, Path], dict[str, Any]]) -> tuple[dict[str, Any], Path]:
    """Do all of it, in memory or block by block. Returns the result, as losa_result.json holds it, and its folder."""
    target = config.output_dir
    with distributed.joined(checkpoint.choose_device(config.model.device)), _folder(config) as folder:
        result = work(config, folder)
    return result, target


@contextmanager
def _folder(config: Config) -> Iterator[Path]:
    """The folder to write into, made by process 0 and known to all."""
    if not distributed.leads():
        yield Path(distributed.agreed_text(""))
        return
    with run_folder(config.output_dir, config.output.overwrite) as folder:
        distributed.agreed_text(str(folder))
        yield folder


def run_in_memory(config: Config, folder: Path) -> dict[str, Any]:
    """The main job with the whole model in memory. Returns the result, as losa_result.json holds it."""
    start = time.perf_counter()
    material = load_material(config)
    model, device = material.model, material.model.device
    metrics = Metrics(folder / "metrics.jsonl")

    def measure(what: torch.nn.Module, **labels: Any) -> float:
        value = perplexity(what, material.evaluation, config.text.eval_batch_size)
        metrics.log("perplexity", value=value, **labels)
        return value

    parts = text.split_parts(material.examples, config.text.shares(config.prune.steps)) if material.examples else []
    family = find_family(model)
    dense = {"perplexity": measure(model, model="dense"), "sparsity": _sparsity(model), "seconds": 0.0}
    pruned_start = time.perf_counter()
    pruned_model = prune_at_once(config, material)
    seconds = time.perf_counter() - pruned_start
    pruned = {"perplexity": measure(pruned_model, model="pruned at once"), "sparsity": _sparsity(pruned_model)}
    pruned["seconds"] = seconds
    del pruned_model

    after_step: list[float] = []
    losa_seconds = time.perf_counter()
    measuring = 0.0

    def on_step(record: losa.StepRecord) -> None:
        nonlocal measuring
        begin = time.perf_counter()
        metrics.log("step", **record.as_dict())
        after_step.append(measure(model, model="losa", step=record.step))
        measuring += time.perf_counter() - begin

    def on_loss(step: int, optimizer_step: int, loss: float, rate: float) -> None:
        metrics.log("train", step=step, optimizer_step=optimizer_step, loss=loss, learning_rate=rate)

    records = losa.run(model, material.calibration, parts, config.settings, on_step, on_loss)
    losa_seconds = time.perf_counter() - losa_seconds - measuring

    probe = material.evaluation[:2]
    unmerged = checkpoint.logits_of(model, probe)
    masks = sharded.merge(model, family)
    if distributed.leads():
        (folder / "model").mkdir()
        material.tokenizer.save_pretrained(folder / "model")
    if distributed.is_sharded(model):
        sharded.save(model, family, folder / "model")
        merged, verification = checkpoint.verify_sharded(folder / "model", masks, probe, unmerged, device)
    else:
        model.save_pretrained(folder / "model")
        merged, verification = checkpoint.verify(folder / "model", masks, probe, unmerged, device)
    healed = {"perplexity": measure(merged, model="losa, merged and reloaded"), "sparsity": _sparsity(merged)}
    healed["seconds"] = losa_seconds

    sizes = _sizes(merged, masks)
    rows = {"dense": dense, "pruned_at_once": pruned, "losa": healed}
    several = distributed.processes()
    how = f"over {several} processes" if several > 1 else "with transformers alone"
    result = summarise(config, family.name, rows, sizes, after_step, material, verification, how)
    result["seconds_in_all"] = time.perf_counter() - start
    write_results(folder, config, material, result, records)
    return result


def summarise(
    config: Config,
    family: str,
    rows: dict[str, dict[str, float]],
    sizes: dict[str, int],
    after_step: list[float],
    material: Material,
    verification: checkpoint.Verification,
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
    folder: Path, config: Config, material: Material, result: dict[str, Any], records: list[losa.StepRecord]
) -> None:
    """All files of a run's folder but the weights, by process 0."""
    if not distributed.leads():
        return
    write_json(folder / "losa_result.json", result)
    write_json(folder / "steps.json", [record.as_dict() for record in records])
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / "environment.json", _environment(config, material))
    report.write(folder, result, records)
    (folder / "model" / "README.md").write_text(report.model_card(result), encoding="utf-8")


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


def _environment(config: Config, material: Material) -> dict[str, Any]:
    device = material.model.device
    examples = torch.cat([e["input_ids"] for e in material.examples]) if material.examples else torch.empty(0)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "processes": distributed.processes(),
        "dtype": str(material.model.dtype),
        "model_sha256": checkpoint.weights_hash(config.model.model),
        "calibration_tokens_sha256": _hash(material.calibration),
        "finetune_tokens_sha256": _hash(examples),
        "evaluation_tokens_sha256": _hash(material.evaluation),
    }


def _hash(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.long().contiguous().numpy().tobytes()).hexdigest()
