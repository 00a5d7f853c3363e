"""Build the model that config.json describes, without weights, and match the stored tensors to its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from torch_impl import _checks
from torch_impl.engine.checkpoints.contents import Entries, dtype_of, find

# Tensors that old checkpoints store and models now compute.
LEFT_OVER = (
    r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(attn|attention)\.masked_bias$", r"(^|\.)decoder\.version$",
)  # fmt: skip
# Tensors beside quantised weights: scales, zero points, orders of FP8, GPTQ, AWQ, bitsandbytes and compressed-tensors.
_OF_QUANTISED = re.compile(
    r"(_scale|_scale_inv|_zero_point|_packed|\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|"
    r"nested_quant_map|quant_state\.\w+|weight_format))$"
)
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "base_model.model.": "peft"}


@dataclass(frozen=True)
class Checkpoint:
    """A model without weights (parameters on the meta device, buffers computed) and the stored names of its weights.

    names: maps each parameter and persistent buffer to its stored name. tied: parameters that no file stores; `names` gives
    the stored name of the parameter that they are tied to. left_over: stored names that the model does not use.
    """

    folder: Path
    model: PreTrainedModel
    entries: Entries
    names: dict[str, str]
    tied: frozenset[str]
    left_over: frozenset[str]

    def tie(self, model: PreTrainedModel) -> None:
        """Tie the parameters of `model` that no file stores, and update its configuration. The others must be loaded."""
        model.tie_weights(missing_keys=set(self.tied), recompute_mapping=False)
        note_ties(model)


def describe(folder: Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Checkpoint:
    """Describe the checkpoint in a folder. dtype: of the model's parameters; None: as stored.

    Errors: FileNotFoundError or ValueError naming the folder, and some of the tensors concerned.
    """
    return lay_out(folder, find(folder).entries, trust_remote_code, dtype)


def lay_out(
    folder: Path, entries: Entries, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> Checkpoint:
    """Describe the checkpoint in a folder, given the tensors that its files hold."""
    stored = dtype_of(folder, entries)
    return match(folder, skeleton(folder, trust_remote_code, dtype, stored), entries)


def match(folder: Path, model: PreTrainedModel, entries: Entries) -> Checkpoint:
    """Match the tensors that a checkpoint's files hold to the parameters of a model without weights."""
    names, unplaced = _names(folder, model, entries)
    stored_apart, merged = _merged_on_loading(model)
    unplaced = {key for key in unplaced if not stored_apart.search(key)}
    left_over = frozenset(key for key in unplaced if _known_left_over(model, key))
    _refuse_quantised(folder, model, entries, names, unplaced - left_over)
    _refuse_unplaced(folder, unplaced - left_over)
    _refuse_other_shapes(folder, model, entries, names)
    tied = _stand_ins(model, names)
    module: nn.Module = model
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    missing = [
        name
        for name in model.state_dict()
        if name not in names and (name in parameters or not _may_be_missing(model, name)) and not merged.search(name)
    ]
    if missing:
        raise ValueError(
            f"model {folder} lacks {_checks.few(missing)}: {len(missing):,} of the tensors that its config.json implies; "
            "download it again, with its own config.json"
        )
    return Checkpoint(folder, model, entries, names, tied, left_over)


def skeleton(
    folder: Path,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    stored: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Build the model that a folder's config.json describes, with its generation settings and without weights.

    The dtype is `dtype`, otherwise that of the configuration, otherwise `stored`. Parameters are on the meta device; buffers,
    such as rotary frequencies, are computed. Errors: ValueError of one line.
    """
    with as_one_line(folder, "the causal language model that its config.json describes"), init_empty_weights(False):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=dtype or config.dtype or stored
        )
    if (folder / "generation_config.json").is_file():
        with as_one_line(folder, "a model with its generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def as_one_line(folder: Path, what: str) -> Iterator[None]:
    """Turn any error of the body into a ValueError of one line: the folder does not load as `what`, and why."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # transformers raises many kinds; tokenizers panics, which is no Exception
        said = " ".join(str(error).split())
        if isinstance(error, KeyError):
            said = f"unknown key {said}"
        if "trust_remote_code" in said:
            advice = "if you trust its source, set trust_remote_code to true"
            raise ValueError(f"model {folder} needs the code that comes with it; {advice}") from error
        raise ValueError(f"model {folder} does not load as {what}: {said[:300] or type(error).__name__}") from error


def note_ties(model: PreTrainedModel) -> None:
    """Update the configuration if head and embedding are separate tensors: loading the saved model depends on it."""
    head: nn.Module | None = model.get_output_embeddings()
    embedding: nn.Module | None = model.get_input_embeddings()
    if head is None or embedding is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    model.config.tie_word_embeddings = head.weight is embedding.weight


def _names(folder: Path, model: PreTrainedModel, entries: Entries) -> tuple[dict[str, str], set[str]]:
    """Match stored names to the model's names; a bare decoder's names lack the model's prefix.

    Returns (stored name by the model's name, stored names without a match).
    """
    prefix = f"{model.base_model_prefix}."
    places = set(model.state_dict())
    names: dict[str, str] = {}
    unplaced, twice = set(), []
    for key in entries:
        name = next((n for n in (key, f"{prefix}{key}", key.removeprefix(prefix)) if n in places), None)
        if name is None:
            unplaced.add(key)
        elif name in names:
            twice.append(f"{names[name]} and {key}")
        else:
            names[name] = key
    if twice:
        raise ValueError(
            f"model {folder}: its files store {len(twice):,} tensors under two names ({_checks.few(twice)}); save the model again"
        )
    return names, unplaced


def _known_left_over(model: PreTrainedModel, key: str) -> bool:
    return any(re.search(pattern, key) for pattern in (*LEFT_OVER, *(model._keys_to_ignore_on_load_unexpected or ())))


def _merged_on_loading(model: PreTrainedModel) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of the stored names that transformers merges on loading (experts, say), and of the merged names."""
    found = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]

    def ends(patterns: Iterable[str]) -> re.Pattern[str]:
        return re.compile(
            "|".join(rf"(^|\.){re.escape(p).replace(re.escape('*'), '[0-9]+')}$" for p in patterns) or "(?!)"
        )

    return ends(p for e in found for p in e.source_patterns), ends(p for e in found for p in e.target_patterns)


def _may_be_missing(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _refuse_quantised(
    folder: Path, model: PreTrainedModel, entries: Entries, names: dict[str, str], unplaced: Iterable[str]
) -> None:
    places = model.state_dict()
    found = [key for name, key in names.items() if places[name].is_floating_point() and entries[key].dtype is None]
    found += sorted(key for key in unplaced if _OF_QUANTISED.search(key))
    if found:
        raise ValueError(
            f"model {folder}: its weights are quantised ({len(found):,} tensors: {_checks.few(found)}); "
            "use a checkpoint in float32, float16 or bfloat16"
        )


def _refuse_unplaced(folder: Path, unplaced: Iterable[str]) -> None:
    keys = sorted(unplaced)
    if not keys:
        return
    advice = "use the config.json of this model, or remove the files that do not belong to it"
    adapters = [key for key in keys if ".lora_" in key]
    wrappers = [(prefix, by) for prefix, by in _WRAPPERS.items() if keys[0].startswith(prefix)]
    if adapters:
        advice = f"{len(adapters):,} belong to an unmerged adapter; merge it first"
        keys = adapters + [key for key in keys if key not in adapters]
    elif wrappers:
        advice = f"{wrappers[0][1]} added the prefix {wrappers[0][0]}; save the model that it wraps"
    raise ValueError(
        f"model {folder}: config.json describes a model without {len(keys):,} of the stored tensors ({_checks.few(keys)}); {advice}"
    )


def _refuse_other_shapes(folder: Path, model: PreTrainedModel, entries: Entries, names: dict[str, str]) -> None:
    places = model.state_dict()
    wrong = [
        f"{key} has {entries[key].shape} for {tuple(places[name].shape)}"
        for name, key in names.items()
        if entries[key].shape != tuple(places[name].shape)
    ]
    if wrong:
        raise ValueError(
            f"model {folder}: config.json implies other shapes for {len(wrong):,} of its tensors ({_checks.few(wrong)}); "
            "use the config.json of this model"
        )


def _stand_ins(model: PreTrainedModel, names: dict[str, str]) -> frozenset[str]:
    """Add to `names` the parameters that no file stores but that are tied to a stored one; return them."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    stood_for: dict[str, str] = {}
    for group in groups.values():
        held = sorted(name for name in group if name in names)
        stood_for |= {name: names[held[0]] for name in group if held and name not in names}
    names |= stood_for
    return frozenset(stood_for)
