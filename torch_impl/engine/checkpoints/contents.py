"""The contents of a model's folder: which files hold its weights, and which tensors they contain. Reads headers only.

All readers follow the rule of transformers: `model.safetensors`, otherwise the files that `model.safetensors.index.json`
names. Folders that another reader could understand differently (an adapter beside the model, a tensor stored twice,
quantised weights) are refused in one sentence before any work. `skeleton.lay_out` finds the tensors' places in the model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from torch_impl import _checks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a packed model: the list of its tensors, and the index and the quantization method that transformers sees.
PACKED, PACKED_INDEX, METHOD = "packed.json", "packed.safetensors.index.json", "losa-packed"
# Files that are downloaded from a hub repository besides the weights.
BESIDE = ["README.md", "*.json", "*.model", "*.txt", "*.py", "*.jinja"]
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Configuration entries that cannot exceed the size of the weights in bytes.
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "ffn_dim", "word_embed_proj_dim",
)  # fmt: skip
CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint. code: its dtype in safetensors' notation; dtype: None if a run cannot compute in it."""

    file: str
    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the torch dtype if it is a supported floating-point dtype, otherwise None."""
        return CODES.get(self.code)


Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class CheckpointFiles:
    """The weight files of a checkpoint and all their tensors, in order.

    metadata: the header metadata of each file; index: the content of the index, None for a single file.
    """

    folder: Path
    metadata: dict[str, dict[str, str] | None]
    entries: dict[str, Entry]
    index: dict[str, Any] | None

    @property
    def bytes(self) -> int:
        """Return the size of all weight files."""
        return sum((self.folder / file).stat().st_size for file in self.metadata)


def local_folder(name: str, weights: bool = True) -> Path:
    """Return the local folder of a model; download a hub id that is not cached yet.

    weights: download the weights too. Errors: FileNotFoundError or ValueError naming the model.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"model {name} is a file; give the folder of the model, {folder.parent}")
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(
            f"model {name}: no such folder; give a Hugging Face model folder or a hub id, which is OWNER/NAME"
        )
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*BESIDE, *([SINGLE] if weights else [])]))
        if weights and not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            files = sorted(set(_weight_map(folder, _read_json(folder / INDEX)).values()))
            folder = Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # network, hub or disk: report each in one line
        raise ValueError(f"model {name} cannot be downloaded: {' '.join(str(error).split())[:300]}") from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json after checking, by file names, that the folder holds a complete, plain model.

    Errors: FileNotFoundError or ValueError naming the folder and the problem.
    """
    beside = [name for name in ADAPTERS if (folder / name).exists()]
    if beside:
        raise ValueError(
            f"model {folder}: {beside[0]} is an unmerged adapter; merge it into the model first "
            "(peft: merge_and_unload), or move it elsewhere to use the model without it"
        )
    if not (folder / "config.json").is_file():
        # The output folder of a run holds its model in a folder of its own.
        meant = [str(place.parent) for place in sorted(folder.glob("*/config.json"))]
        advice = f"did you mean {' or '.join(meant[:3])}?" if meant else "give a Hugging Face model folder"
        raise FileNotFoundError(f"model {folder}: no config.json in this folder; {advice}")
    config = _read_json(folder / "config.json")
    if (folder / PACKED).is_file():
        config = without_packed(config)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(
            f"model {folder}: its weights are quantised (quantization_config in config.json: {str(method)[:40]}); "
            "use a checkpoint in float32, float16 or bfloat16"
        )
    for name in ("dtype", "torch_dtype"):
        dtype = config.get(name)
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
            raise ValueError(
                f"model {folder}: config.json has {name} {dtype!r}, not a torch dtype; use bfloat16, say, or remove that line"
            )
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"model {folder}: config.json names its weight file in transformers_weights; "
            f"rename the file to {SINGLE} and remove that line"
        )
    return config


def without_packed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what packing adds to it."""
    method = config.get("quantization_config")
    if not isinstance(method, dict) or method.get("quant_method") != METHOD:
        return config
    return {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}


def find(folder: Path) -> CheckpointFiles:
    """Find the files and tensors of a plain model's folder; check configuration and headers against each other.

    Errors: FileNotFoundError or ValueError naming the folder and the problem.
    """
    if (folder / PACKED).is_file():
        raise ValueError(f"model {folder} is packed; unpack it first: losa pack {folder} FOLDER --unpack")
    config = read_config(folder)
    files = find_files(folder)
    for name in SIZES:
        value = config.get(name)
        if isinstance(value, int | float) and value > files.bytes:
            raise ValueError(
                f"model {folder}: config.json does not match these weights: {name} is implausibly large, {value}"
            )
    return files


def find_files(folder: Path) -> CheckpointFiles:
    """Find the files and tensors of a folder without checking its configuration."""
    pieces = sorted(path.name for path in folder.glob("shard-*-model-*.safetensors"))
    if pieces:
        # transformers would load these files and ignore the others.
        raise ValueError(
            f"model {folder}: {_checks.few(pieces)} is part of a distributed checkpoint; save the whole model with "
            "save_pretrained, or move the parts elsewhere"
        )
    index = None
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        files = sorted(set(_weight_map(folder, index).values()))
    else:
        raise ValueError(
            f"model {folder} has neither {SINGLE} nor {INDEX}; save the weights as safetensors, pickles are not read"
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"model {folder}: {len(missing)} of the {len(files)} files that {INDEX} names "
            f"{'is' if len(missing) == 1 else 'are'} missing ({_checks.few(missing)}); download the model again"
        )
    metadata, entries = headers(folder, files)
    unheld = [] if index is None else [name for name in _weight_map(folder, index) if name not in entries]
    if unheld:
        raise ValueError(
            f"model {folder}: {INDEX} names {len(unheld):,} tensors that its files lack ({_checks.few(unheld)}); "
            "download the model again"
        )
    return CheckpointFiles(folder, metadata, entries, index)


def headers(folder: Path, files: Iterable[str]) -> tuple[dict[str, dict[str, str] | None], dict[str, Entry]]:
    """Read the headers of safetensors files: the metadata of each, and all tensors.

    Errors: ValueError naming a corrupt file, or tensors that are stored twice.
    """
    metadata: dict[str, dict[str, str] | None] = {}
    entries: dict[str, Entry] = {}
    twice = []
    for file in files:
        try:
            with safe_open(folder / file, "pt") as opened:
                metadata[file] = opened.metadata()
                for name in opened.offset_keys():
                    piece = opened.get_slice(name)
                    twice += [f"{name} in {entries[name].file} and {file}"] if name in entries else []
                    entries[name] = Entry(file, tuple(piece.get_shape()), piece.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"model {folder}: {file} is truncated or corrupt; download it again ({' '.join(str(error).split())})"
            ) from None
    if twice:
        raise ValueError(
            f"model {folder}: its files store {len(twice):,} tensors twice ({_checks.few(twice)}); save the model again"
        )
    return metadata, entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path.parent}: {path.name} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"model {path.parent}: {path.name} is not a JSON object but a {type(content).__name__}; download it again"
        )
    return content


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the file of every tensor that an index names."""
    found = index.get("weight_map")
    names = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in names):
        raise ValueError(
            f"model {folder}: weight_map in {INDEX} does not map tensors to safetensors files in this folder; "
            "download the model again"
        )
    return dict(found or {})


def dtype_of(folder: Path, entries: Entries) -> torch.dtype:
    """Return the dtype of most of the stored weights."""
    counts: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        if entry.dtype is not None:
            counts[entry.dtype] += prod(entry.shape)
    if not counts:
        raise ValueError(
            f"model {folder} has no floating-point weights; use a checkpoint in float32, float16 or bfloat16"
        )
    return counts.most_common(1)[0][0]


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path | None = None) -> None:
    """Check that no tensor holds NaN or infinity. Errors: ValueError naming the first that does, and its folder."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass without temporary memory: minimum and maximum are NaN if any value is.
        if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
            wrong = int((~tensor.isfinite()).sum())
            where = name if folder is None else f"model {folder}: {name}"
            advice = "try dtype bfloat16, or another" if tensor.dtype == torch.float16 else "use another"
            raise ValueError(
                f"{where} holds NaN or infinity ({wrong:,} of {tensor.numel():,} values); {advice} checkpoint"
            )
