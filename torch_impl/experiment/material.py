"""The inputs of a run: model, tokenizer, calibration, training and evaluation text; and hashes that identify them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine import distributed
from torch_impl.engine.batches import Example
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.structure import check_structure
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import checks
from torch_impl.experiment.text import splitting, windows
from torch_impl.experiment.text.protocols import protocol_named
from torch_impl.experiment.text.sources import HELD_OUT, is_local
from torch_impl.experiment.text.written import with_written


@dataclass(frozen=True)
class OtherText:
    """One more text to measure, beside the run's own. protocol: None for that of the source."""

    source: str
    protocol: str | None = None


@dataclass(frozen=True)
class Material:
    """The inputs of a run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: torch.Tensor
    examples: list[Example]
    evaluation: torch.Tensor
    evaluation_facts: dict[str, Any]
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    """Windows of other texts to measure, by name."""


def load_material(
    config: Config,
    offloaded: bool = False,
    others: Mapping[str, OtherText] | None = None,
    kept: Path | None = None,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
) -> Material:
    """Load model, tokenizer and all text; let the model write what the options ask for.

    offloaded: leave the weights of the blocks on disk. others: more texts to measure. kept: a file for what the model writes,
    see `with_written`. loaded: the model and its tokenizer, if they are in memory.

    Errors: ValueError or FileNotFoundError naming the problem.
    """
    options = config.model
    if loaded is None:
        load = pretrained.load_offloaded if offloaded else pretrained.load
        device = pretrained.choose_device(options.device)
        loaded = load(options.model, device, options.dtype, options.trust_remote_code)
    model, tokenizer = loaded
    check_structure(model, config.settings)
    checks.check_lengths(model, config)
    checks.warn_of_lengths(model, config)
    material = with_text(config, model, tokenizer, others)
    count, seed = config.calibration.written, config.output.seed
    return replace(material, calibration=with_written(model, tokenizer, material.calibration, count, seed, kept))


def with_text(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    others: Mapping[str, OtherText] | None = None,
) -> Material:
    """Load the text for a model. Errors: as `load_material`."""
    options, calibration, seed = config.text, config.calibration, config.output.seed
    finetune = options.finetune_data if config.training.finetune else None
    texts = splitting.load_texts(options.calibration_data, finetune, options.eval_data)
    more = {}
    for name, source in (others or {}).items():
        texts, documents, own = splitting.leave_out(texts, source.source)
        chosen = protocol_named(source.protocol, own)
        more[name] = windows.evaluation_windows(
            documents, tokenizer, options.eval_seqlen, options.eval_windows, chosen, f"{name} {source.source!r}"
        )
    calibration_ids = windows.calibration_windows(
        texts.calibration,
        tokenizer,
        calibration.nsamples,
        calibration.seqlen,
        seed,
        f"calibration_data {options.calibration_data!r}",
    )
    examples: list[Example] = []
    if finetune is not None:
        examples = windows.training_examples(
            texts.finetune, tokenizer, options.train_seqlen, seed, options.train_examples, f"finetune_data {finetune!r}"
        )
    limit = options.eval_windows
    protocol = protocol_named(options.eval_protocol, texts.protocol, "eval_protocol")
    # Read one window more to know whether the text is longer.
    measured = windows.evaluation_windows(
        texts.evaluation,
        tokenizer,
        options.eval_seqlen,
        None if limit is None else limit + 1,
        protocol,
        f"{'the held-out part of ' * (texts.facts['split'] == HELD_OUT)}eval_data {options.eval_data!r}",
    )
    training_ids = (example["input_ids"] for example in examples)
    checks.check_tokens(model, tokenizer, calibration_ids, measured, *more.values(), *training_ids)
    facts = {
        **texts.facts,
        "documents": len(texts.evaluation[: protocol.documents]),
        **windows.describe_protocol(protocol, measured, tokenizer),
        "first_windows_only": limit is not None and len(measured) > limit,
        **windows.describe_windows(measured[:limit]),
    }
    return Material(model, tokenizer, calibration_ids, examples, measured[:limit], facts, more)


def check_text(config: Config) -> int | None:
    """Load the text for a model on the disk, without its weights, unless some of it is on the hub. Return the number of training
    examples that there are, None if it is not loaded.

    Errors: as a run's, for text that cannot be read or is too short for the windows, the examples and the steps.
    """
    options, text = config.model, config.text
    sources = [text.calibration_data, text.eval_data, *([text.finetune_data] if config.training.finetune else ())]
    if not Path(options.model).is_dir() or not all(map(is_local, sources)):
        return None
    device = torch.device("cpu")
    model = pretrained.outline(options.model, device, options.dtype, options.trust_remote_code)
    tokenizer = pretrained.load_tokenizer(Path(options.model), options.trust_remote_code)
    examples = with_text(config, model, tokenizer).examples
    if examples:
        windows.split_parts(examples, text.shares(config.prune.steps))
    return len(examples)


def environment_of(config: Config, material: Material) -> dict[str, Any]:
    device = material.model.device
    # Hash the lengths and labels of the sequences too.
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
