"""Load, save and verify models in Hugging Face folders, as safetensors only."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import string_to_bool

from torch_impl import _checks
from torch_impl.engine import distributed
from torch_impl.engine.checkpoints import fsdp
from torch_impl.engine.checkpoints.contents import check_finite, find_files, local_folder, read_config
from torch_impl.engine.checkpoints.offload import open_offloaded
from torch_impl.engine.checkpoints.safetensors_files import follow_umask
from torch_impl.engine.checkpoints.skeleton import as_one_line, describe, note_ties, skeleton

# Largest allowed difference of logits between the unmerged model and the reloaded merged one, relative to the largest
# logit. Both use the same rounded weights, so they differ only in the order of summation.
LOGIT_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Packages that are needed to read a SentencePiece file, and their modules.
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What other tools call them.
SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
}


def check_dtype(name: str, more: tuple[str, ...] = ("auto",)) -> str:
    """Return the name of a dtype, or one of the words in `more`. Errors: ValueError with the names; bf16 means bfloat16?"""
    if name not in (allowed := (*more, *DTYPES)):
        meant = f"; did you mean {SHORT[name]}?" if name in SHORT else ""
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(allowed)}{meant}")
    return name


def choose_device(name: str) -> torch.device:
    """Resolve auto, cpu, cuda or cuda:N to a device of this machine. Errors: ValueError listing the devices."""
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
            f"device is {name!r}, but this machine has {count} CUDA devices; allowed: auto, cpu"
            + (f", cuda:0 to cuda:{count - 1}" if count else "")
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    return device


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Add the option --trust_remote_code to a command."""
    text = "Run Python code that comes with the model. Only for sources you trust."
    parser.add_argument(
        "--trust_remote_code", type=string_to_bool, nargs="?", const=True, default=False, metavar="BOOL", help=text
    )


def load(
    name: str, device: torch.device, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer; several processes shard the model.

    name: a local folder or hub id. dtype: a key of DTYPES; auto: as stored, but float32 on the CPU; stored: as stored.

    Errors: ValueError or FileNotFoundError naming the folder or id and the problem.
    """
    wanted, folder = _wanted(device, dtype), local_folder(name)
    found = describe(folder, trust_remote_code, wanted)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if distributed.processes() > 1:
        return fsdp.load(folder, device, wanted, trust_remote_code), tokenizer
    model = _from_pretrained(folder, found.model.dtype, trust_remote_code).to(device)  # type: ignore[arg-type]
    check_finite(model.state_dict().items(), folder)
    note_ties(model)
    return model, tokenizer


def _from_pretrained(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """Load a model with transformers alone, in eval mode, on the CPU."""
    with as_one_line(folder, "a causal language model"):
        pair: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model: PreTrainedModel = pair[0]
    missing = {name for names in (pair[1]["missing_keys"], pair[1]["mismatched_keys"]) for name in map(str, names)}
    if missing:
        # transformers only warns and fills them with random numbers.
        raise ValueError(f"model {folder} lacks {_checks.few(sorted(missing))}, by transformers; download it again")
    return model.eval()


def load_offloaded(
    name: str, device: torch.device, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and leave the weights of its decoder blocks on disk; `offload.sweep` loads them one block at a time.

    Errors: as `load`.
    """
    wanted, folder = _wanted(device, dtype), local_folder(name)
    model = open_offloaded(folder, device, wanted, trust_remote_code)
    return model, load_tokenizer(folder, trust_remote_code)


def outline(name: str, device: torch.device, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights. For a hub id, the weights are neither downloaded nor checked.

    Errors: as `load`, as far as configuration and headers show them.
    """
    wanted, folder = _wanted(device, dtype), local_folder(name, weights=False)
    if Path(name).is_dir():
        found = describe(folder, trust_remote_code, wanted)
        found.tie(found.model)
        return found.model
    read_config(folder)
    model = skeleton(folder, trust_remote_code, wanted)
    model.tie_weights()
    return model


def _wanted(device: torch.device, dtype: str) -> torch.dtype | None:
    """Return the requested dtype, None for the checkpoint's own."""
    if dtype != "stored":
        check_dtype(dtype)
    return torch.float32 if dtype == "auto" and device.type == "cpu" else DTYPES.get(dtype)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder. Errors: ValueError or FileNotFoundError naming the folder and the problem."""
    if not folder.is_dir():
        # transformers would look for the path on the hub.
        raise FileNotFoundError(f"model {folder}: no such folder; give a Hugging Face model folder")
    try:
        with as_one_line(folder, "a tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code
            )
            tokenizer("Some files load but fail on the first word.")
            return tokenizer
    except ValueError as error:
        if not any(path.name.startswith(("token", "vocab")) or path.suffix == ".model" for path in folder.iterdir()):
            raise ValueError(
                f"model {folder} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the model that it was made of "
                "into it"
            ) from error
        pieces = [path.name for path in sorted(folder.glob("*.model"))]
        if not pieces or (folder / "tokenizer.json").exists():
            raise
        # transformers' own message asks for tiktoken, which does not read this file.
        lacking = [package for package, module in SENTENCEPIECE.items() if not _importable(module)]
        advice = f"install {' and '.join(lacking)} to read it" if lacking else "it is corrupt; download it again"
        raise ValueError(f"model {folder}: its tokenizer is a SentencePiece file, {pieces[0]}; {advice}") from error


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def folder_of(model: PreTrainedModel) -> Path:
    """Return the folder that a model was loaded from."""
    assert model.name_or_path is not None
    return Path(model.name_or_path)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with `save_pretrained`, with file modes that follow the umask."""
    model.save_pretrained(folder)
    follow_umask(folder.glob("*.safetensors"))


def keep_beside(source: Path, folder: Path) -> None:
    """Copy the files that `save_pretrained` may omit, code and SentencePiece files, into a saved model's folder."""
    for path in sorted([*source.glob("*.py"), *source.glob("*.model")]):
        shutil.copyfile(path, folder / path.name)


def weights_hash(folder: Path) -> str:
    """Compute the SHA-256 of the weight files in a model's folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in find_files(folder).metadata:
        with (folder / file).open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits (n, t, vocabulary), on the CPU."""
    logits: torch.Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    return logits.float().cpu()


@dataclass(frozen=True)
class Verification:
    """The result of reloading a saved model. zeros: sparsity of each projection, as pruned and as saved."""

    logit_difference: float
    zeros: dict[str, tuple[float, float]]


def verify(
    folder: Path,
    masks: dict[str, torch.Tensor],
    ids: torch.Tensor,
    unmerged: torch.Tensor,
    device: torch.device,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Verification]:
    """Reload a saved model and compare it with the unmerged one; return it with the figures.

    One process reloads it with transformers alone, several in shards. masks: bool by the full name of each projection, of
    this process's rows; ids (n, t); unmerged (n, t, vocabulary): logits before merging.

    Errors: RuntimeError naming a projection in which a pruned weight is not zero, or the difference of the logits.
    """
    model: PreTrainedModel
    if distributed.processes() > 1:
        model = fsdp.load(folder, device, None, trust_remote_code)
    else:
        model = _from_pretrained(folder, "auto", trust_remote_code).to(device)  # type: ignore[arg-type]
    zeros = check_zeros(folder, model, masks)
    return model, Verification(logit_difference(folder, logits_of(model, ids), unmerged, model.dtype), zeros)


def check_zeros(folder: Path, model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Return the sparsity of every projection of a model from `folder`, as pruned and as saved; masks as for `verify`.

    Errors: RuntimeError naming a projection in which a pruned weight is not zero.
    """
    shares = {}
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        saved = (distributed.local(weight) == 0).cpu()
        wrong, pruned, zeros = (
            int(distributed.all_reduce_number(int(x.sum()))) for x in (~saved & ~mask, ~mask, saved)
        )
        if wrong:
            raise RuntimeError(f"{folder}, {name}: {wrong} pruned weights are not zero")
        shares[name] = (pruned / weight.numel(), zeros / weight.numel())
    return shares


def logit_difference(folder: Path, reloaded: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference between the logits before and after saving, relative to the largest logit.

    Errors: RuntimeError if it is larger than rounding explains.
    """
    difference = float((reloaded - before).abs().max() / before.abs().max())
    if not difference <= LOGIT_BOUND[dtype]:
        raise RuntimeError(
            f"{folder}: logits of the reloaded model differ from the unmerged model's by {difference:.2e} of the largest; "
            f"allowed: {LOGIT_BOUND[dtype]:.0e}"
        )
    return difference
