"""Models in and out: Hugging Face folders, safetensors only, checked after writing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine import distributed, sharded
from torch_impl.engine.streaming import open_streamed

# What of a hub's repository a streamed or sharded model needs.
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py"]
# Largest difference of logits allowed between the unmerged model and the reloaded merged one, relative to the largest
# logit. Both multiply by the same rounded weights, so only the order of summation may differ.
LOGIT_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Sizes in a configuration that a model needs a weight, and so a byte, each for.
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "ffn_dim", "word_embed_proj_dim",
)  # fmt: skip

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device that is there. Errors: ValueError naming what is."""
    name = distributed.own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device is {name!r} and this machine has {count} CUDA devices; allowed: auto, cpu"
            + (f", cuda:0 to cuda:{count - 1}" if count else "")
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    return device


def check_sizes(folder: Path) -> None:
    """Errors: ValueError if config.json is no JSON object or speaks of sizes that its weights cannot have.

    transformers would build such a model, if only as a skeleton, before it looks.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"model {folder}: config.json is not JSON ({error}); allowed: a model's configuration"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"model {folder}: config.json is a {type(content).__name__}; allowed: a JSON object")
    most = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name in SIZES if most else ():
        value = content.get(name)
        if isinstance(value, int | float) and value > most:
            raise ValueError(f"model {folder}: {name} is {value} and its weights have {most} bytes; allowed: fewer")


def load(
    name: str, device: torch.device, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Causal-LM model, in eval mode, and tokenizer of a local folder or hub id; sharded if there are several processes.

    Errors: ValueError or FileNotFoundError naming the folder or id and what is wrong with it.
    """
    wanted = _wanted(name, device, dtype)
    if distributed.processes() > 1:
        return _load_sharded(name, device, wanted, trust_remote_code)
    with _as_one_line(name):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=wanted or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    model, found = pair
    if found["missing_keys"]:
        # transformers fills them with random numbers and a warning.
        raise ValueError(f"model {name} lacks {', '.join(sorted(found['missing_keys']))}; allowed: a whole model")
    module: torch.nn.Module = model
    module.to(device).eval()
    return model, tokenizer


def _load_sharded(
    name: str, device: torch.device, wanted: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _as_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=DOWNLOADED))
        return sharded.load(folder, device, wanted, trust_remote_code), tokenizer


def load_streamed(
    name: str, device: torch.device, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The same without the weights of the decoder blocks: `streaming.sweep` brings them one block at a time.

    Errors: as for `load`.
    """
    wanted = _wanted(name, device, dtype)
    with _as_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    return open_streamed(folder, device, wanted, trust_remote_code), tokenizer


def _wanted(name: str, device: torch.device, dtype: str) -> torch.dtype | None:
    """The dtype asked for, None for the checkpoint's own, after checking that there may be such a model."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model {name}: no config.json in this folder; allowed: a Hugging Face model folder")
    if not folder.is_dir() and (folder.is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise FileNotFoundError(f"model {name}: no such folder; allowed: a Hugging Face model folder or a hub id")
    if folder.is_dir():
        check_sizes(folder)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"model {folder} has no weights in safetensors files; allowed: these alone, no pickles")
    return DTYPES[dtype] if dtype != "auto" else (torch.float32 if device.type == "cpu" else None)


@contextmanager
def _as_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # transformers raises a dozen kinds, tokenizers panics; each ends here as one line
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"model {name} does not load as a causal language model with its tokenizer: {reason}"
        ) from error


def weights_hash(name: str) -> str | None:
    """SHA-256 over the safetensors files of a local folder, in the order of their names; None for a hub id."""
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits (n, t, vocabulary) on the CPU."""
    logits: torch.Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits.float().cpu()


@dataclass(frozen=True)
class Verification:
    """What reloading the saved model has shown. zeros: share per projection, as pruned and as saved."""

    logit_difference: float
    zeros: dict[str, tuple[float, float]]


def verify(
    folder: Path, masks: dict[str, torch.Tensor], ids: torch.Tensor, unmerged: torch.Tensor, device: torch.device
) -> tuple[PreTrainedModel, Verification]:
    """Reload a saved model with transformers alone and hold it against the unmerged one. Returns it with the figures.

    masks: bool by the full name of each projection; ids (n, t) and unmerged (n, t, vocabulary): logits before merging.

    Errors: RuntimeError naming the projection whose zeros are not where its mask says, or the difference of the logits.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    module: torch.nn.Module = model
    module.to(device).eval()
    zeros = {}
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        saved = (weight == 0).cpu()
        if bool((~saved & ~mask).any()):
            raise RuntimeError(f"{folder}, {name}: {int((~saved & ~mask).sum())} pruned weights are not zero")
        zeros[name] = (float((~mask).float().mean()), float(saved.float().mean()))
    difference = logit_difference(folder, logits_of(model, ids), unmerged, model.dtype)
    return model, Verification(difference, zeros)


def verify_sharded(
    folder: Path, masks: dict[str, torch.Tensor], ids: torch.Tensor, unmerged: torch.Tensor, device: torch.device
) -> tuple[PreTrainedModel, Verification]:
    """`verify` where no process can hold the model: it is loaded in shards, and masks are those of the rows here."""
    model = sharded.load(folder, device, None)
    zeros = sharded.check_zeros(model, masks)
    return model, Verification(logit_difference(folder, logits_of(model, ids), unmerged, model.dtype), zeros)


def logit_difference(folder: Path, reloaded: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest difference of the logits of a model and of what was saved of it, relative to the largest logit.

    Errors: RuntimeError if it is more than rounding explains.
    """
    difference = float((reloaded - before).abs().max() / before.abs().max())
    if not difference <= LOGIT_BOUND[dtype]:
        raise RuntimeError(
            f"{folder}: logits of the reloaded model differ from the unmerged one's by {difference:.2e} of the largest; "
            f"allowed: {LOGIT_BOUND[dtype]:.0e}"
        )
    return difference
