"""Carry out one cell: prune, train, measure."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import re
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import losa
from torch_impl.engine.adapted_linear import merge_adapters
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.smaller import find_structures, make_smaller
from torch_impl.experiment import provenance, zero_shot
from torch_impl.experiment.baselines import BASELINES, Trained
from torch_impl.experiment.baselines.baseline import Costs, finish
from torch_impl.experiment.baselines.by_structure import cut_block
from torch_impl.experiment.baselines.decoding import decoding_cost
from torch_impl.experiment.baselines.structured import gone_share, kept_parameters
from torch_impl.experiment.command import TRACEBACK
from torch_impl.experiment.comparison.matrix import Cell
from torch_impl.experiment.comparison.recipes import DENSE, LOSA
from torch_impl.experiment.comparison.results import DIVERGED, DONE, FAILED, Outcome
from torch_impl.experiment.comparison.statistics import perplexity
from torch_impl.experiment.evaluate import window_losses
from torch_impl.experiment.material import Material, load_material
from torch_impl.experiment.text.windows import describe_windows

Questions = tuple[dict[str, Any], zero_shot.Tokens]
"""Zero-shot tasks by name, and the token ids of their texts."""


class Workshop:
    """Carries out cells, one after the other. The model that two cells in a row share is loaded once, and so is their text.

    written: folder to keep the text that models write, for other processes and later cells. models: folder to save the
    models of LoSA's recipes in. Default: neither.
    """

    def __init__(self, written: Path | None = None, models: Path | None = None) -> None:
        self._written, self._models = written, models
        self._loaded: tuple[Cell, Material] | None = None
        self._tasks: tuple[Any, dict[str, Any]] | None = None
        self._tokens: dict[str, zero_shot.Tokens] = {}

    def run(self, cell: Cell) -> Outcome:
        """Carry out a cell. Whatever fails is part of the outcome, so that other cells go on."""
        facts: dict[str, Any] = {"software": provenance.software()}
        try:
            material = self.material(cell)
            facts |= _facts(material)
            questions = self.questions(cell, material) if cell.tasks else None
            made = make(cell, material)
            if self._models is not None and cell.recipe.treatment == LOSA:
                _save(cell, made.model, material, self._models / re.sub(r"[^\w.]+", "-", f"{cell}-{cell.key}"))
            return _measured(cell, material, questions, made, facts)
        except FloatingPointError as error:
            return Outcome(cell.labels, DIVERGED, _line(error), facts=facts)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            self._loaded = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return Outcome(cell.labels, FAILED, f"{type(error).__name__}: {_line(error)}", facts=facts)

    def material(self, cell: Cell) -> Material:
        """Load model and text of a cell. Errors: ValueError or FileNotFoundError, as a run's; too few windows to halve."""
        config = cell.config
        text = dataclasses.replace(config.text, step_shares=None)
        training = dataclasses.replace(config.training, finetune=cell.finetunes)
        texts = list(cell.measures.texts.items())
        if self._loaded is None or self._loaded[0].material != cell.material:
            loaded = self._model_for(cell)
            self._loaded = None
            whole = dataclasses.replace(config, text=text, training=training)
            material = load_material(whole, others=dict(texts[1:]), kept=self._kept(cell), loaded=loaded)
            for name, found in zip(cell.measures.texts, [material.evaluation, *material.others.values()], strict=True):
                if len(found) < 2:
                    raise ValueError(
                        f"the text {name} has only {len(found)} window; give 2 or more, to tune on the first half and "
                        "measure on the second"
                    )
            self._loaded = cell, material
        return self._loaded[1]

    def _model_for(self, cell: Cell) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        if self._loaded is None or self._loaded[0].config.model != cell.config.model:
            return None
        return self._loaded[1].model, self._loaded[1].tokenizer

    def _kept(self, cell: Cell) -> Path | None:
        if self._written is None or not cell.config.calibration.written:
            return None
        self._written.mkdir(parents=True, exist_ok=True)
        return self._written / f"{hashlib.sha256(cell.material.encode()).hexdigest()[:16]}.safetensors"

    def questions(self, cell: Cell, material: Material) -> Questions:
        """Load the zero-shot tasks. Errors: as `zero_shot.load_tasks`."""
        key = (cell.tasks, cell.measures.data)
        if self._tasks is None or self._tasks[0] != key:
            self._tasks = key, zero_shot.load_tasks(*key)
        model = cell.config.model.model
        if model not in self._tokens:
            self._tokens[model] = zero_shot.Tokens(material.tokenizer)
        return self._tasks[1], self._tokens[model]


def make(cell: Cell, material: Material) -> Trained:
    """Make the model of a cell."""
    treatment, config = cell.recipe.treatment, cell.config
    if treatment == DENSE:
        return Trained(material.model, 0, 0, {}, {})
    model = copy.deepcopy(material.model)
    if config.training.finetune or BASELINES[treatment].structured:
        return BASELINES[treatment].run(model, material.model, material, config)
    costs = Costs(model.device)
    records = losa.run(model, material.calibration, [], config.settings, dense=material.model, on_part=costs.on_part)
    merge_adapters(Decoder(model))
    costs.add_records(records)
    return finish(model, count=0, steps=0, costs=costs)


def _measured(
    cell: Cell, material: Material, questions: Questions | None, made: Trained, facts: dict[str, Any]
) -> Outcome:
    """Measure a model: learning rates are chosen by the first half of the first text's windows, the second half is reported."""
    start = time.perf_counter()
    size, model = cell.config.text.eval_batch_size, made.model
    windows = dict(zip(cell.measures.texts, [material.evaluation, *material.others.values()], strict=True))
    losses = {}
    for name, found in windows.items():
        losses[name] = window_losses(model, found[len(found) // 2 :], size, name)
    first = next(iter(windows.values()))
    tuning = perplexity(window_losses(model, first[: len(first) // 2], size))
    accuracy = None
    if questions is not None:
        tasks, tokens = questions
        accuracy = zero_shot.measure(model, tokens, tasks, cell.measures.limit, size)
    # A part that does nothing takes microseconds.
    seconds = {part: round(value, 3) for part, value in made.seconds.items() if value >= 1e-3}
    decoder, dense = Decoder(model), Decoder(material.model)
    speed, memory = _decoding(cell, model, material.model)
    return Outcome(
        labels=cell.labels,
        status=DONE,
        tuning=tuning,
        losses={name: [float(f"{loss:.7g}") for loss in found] for name, found in losses.items()},
        hashes={name: str(describe_windows(found)["sha256"])[:16] for name, found in windows.items()},
        zero_shot={} if accuracy is None else dataclasses.asdict(accuracy),
        sparsity=None if cell.unmerged else gone_share(decoder, dense),
        parameters=kept_parameters(decoder),
        unmerged=cell.unmerged,
        trained=made.trainable or None,
        seconds={**seconds, "evaluate": round(time.perf_counter() - start, 3)},
        gib={part: round(count / 2**30, 3) for part, count in {**made.peak_bytes, **memory}.items()},
        tokens_per_second=speed,
        facts=facts,
    )


def _save(cell: Cell, model: PreTrainedModel, material: Material, folder: Path) -> None:
    """Save a model and its tokenizer as `losa run` does."""
    pretrained.save(_smaller(cell, model), folder)
    if material.tokenizer is not None:
        material.tokenizer.save_pretrained(folder)
    pretrained.keep_beside(pretrained.folder_of(material.model), folder)


def _smaller(cell: Cell, model: PreTrainedModel) -> PreTrainedModel:
    return make_smaller(model).model if cell.config.prune.pattern.structured else model


def _decoding(cell: Cell, model: PreTrainedModel, dense: PreTrainedModel) -> tuple[dict[str, float], dict[str, int]]:
    """Measure decoding and its memory, with packed weights if they have zeros, and of the dense model beside it: on a shared
    machine, their ratio counts. Whole heads and channels that are zeros are cut in every block, as other methods do."""
    if model is dense or not cell.measures.speed or not cell.final:
        return {}, {}
    if cell.config.prune.pattern.structured:
        model = copy.deepcopy(model)
        decoder = Decoder(model)
        for block, kept in zip(decoder.blocks, find_structures(decoder), strict=True):
            cut_block(block, decoder.family, kept)
    found = decoding_cost(model, dense, packs=not cell.smaller)
    peaks = {"decode": found.packed_bytes, "decode dense": found.dense_bytes}
    speeds = {"packed": round(found.packed, 2), "dense": round(found.dense, 2)}
    return speeds, {part: count for part, count in peaks.items() if count is not None}


def _facts(material: Material) -> dict[str, Any]:
    device = material.model.device
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(material.model.dtype).removeprefix("torch."),
        "model": str(material.model.config.name_or_path).rstrip("/").rpartition("/")[2],
        "torch": torch.__version__,
        "windows": {"seqlen": material.evaluation.shape[1]},
    }


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
