"""What a model's folder means: which of its files count and which tensors they hold, from names and headers alone.

One rule for every reader, transformers' own: `model.safetensors`, else the files that `model.safetensors.index.json` names.
What another reader could take otherwise (an adapter beside the model, a tensor held twice, quantised weights) is refused in
one sentence before any work. `skeleton.place` says where the tensors belong.
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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKED = "packed.json"
# What of a hub's repository is downloaded beside the weights that count.
BESIDE = ["*.json", "*.model", "*.txt", "*.py", "*.jinja"]
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Sizes in a configuration that a model needs a weight, and so a byte, each for.
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "ffn_dim", "word_embed_proj_dim",
)  # fmt: skip
CODES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint. code: its dtype as safetensors calls it; dtype: None if it is none that a run computes in."""

    file: str
    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point dtype, if it is a usual one."""
        return CODES.get(self.code)


Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that count and every tensor that they hold, in their order.

    metadata: what each file says of itself; index: the content of the index, None if there is one file alone.
    """

    folder: Path
    metadata: dict[str, dict[str, str] | None]
    entries: dict[str, Entry]
    index: dict[str, Any] | None

    @property
    def bytes(self) -> int:
        """Of all files that count."""
        return sum((self.folder / file).stat().st_size for file in self.metadata)


def few(names: Iterable[str], most: int = 3) -> str:
    """Some of these names, and how many more there are."""
    every = [name if len(name) <= 100 else f"{name[:100]}…" for name in names]
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def local_folder(name: str, weights: bool = True) -> Path:
    """The folder of a model: this one, or where huggingface_hub keeps that of a hub id, downloaded if it is not there.

    weights: with the weights that count; others are never downloaded. Errors: FileNotFoundError or ValueError naming it.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(f"model {name}: no such folder; name a Hugging Face model folder or a hub id")
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*BESIDE, *([SINGLE] if weights else [])]))
        if weights and not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            files = sorted(set(_weight_map(folder, _read_json(folder / INDEX)).values()))
            folder = Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the network, of the hub, of the disk: one line each
        raise ValueError(f"model {name} cannot be downloaded: {' '.join(str(error).split())[:300]}") from error
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model, if the folder is that of a whole, plain model as far as names can say.

    Errors: FileNotFoundError or ValueError naming the folder and what is wrong.
    """
    beside = [name for name in ADAPTERS if (folder / name).exists()]
    if beside:
        raise ValueError(
            f"model {folder}: {beside[0]} is an adapter that is not merged; merge it into the model first "
            "(peft: merge_and_unload), or move it elsewhere to use the model without it"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model {folder}: no config.json in this folder; name a Hugging Face model folder")
    config = _read_json(folder / "config.json")
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
                f"model {folder}: config.json has {name} {dtype!r}; name one of torch's, such as bfloat16, or remove that line"
            )
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"model {folder}: config.json names its weights by transformers_weights; "
            f"call the file {SINGLE} and remove that line"
        )
    return config


def find(folder: Path) -> CheckpointFiles:
    """Configuration, files and tensors of a plain model's folder, checked against each other as far as headers can say.

    Errors: FileNotFoundError or ValueError naming the folder and what is wrong.
    """
    if (folder / PACKED).is_file():
        raise ValueError(
            f"model {folder} is packed; unpack it first: python -m torch_impl.pack {folder} FOLDER --unpack"
        )
    config = read_config(folder)
    files = find_files(folder)
    for name in SIZES:
        value = config.get(name)
        if isinstance(value, int | float) and value > files.bytes:
            raise ValueError(
                f"model {folder}: config.json does not match these weights: {name} is {value}, more than they have bytes"
            )
    return files


def find_files(folder: Path) -> CheckpointFiles:
    """`find` for a folder whose configuration does not matter."""
    pieces = sorted(path.name for path in folder.glob("shard-*-model-*.safetensors"))
    if pieces:
        # transformers would take these, whatever else there is.
        raise ValueError(
            f"model {folder}: {few(pieces)} is a piece of a distributed checkpoint; save the whole model with "
            "save_pretrained, or move the pieces elsewhere"
        )
    index = None
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        files = sorted(set(_weight_map(folder, index).values()))
    else:
        raise ValueError(
            f"model {folder} has no weights in safetensors files: no {SINGLE} and no {INDEX}; "
            "save them so, pickles are not read"
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"model {folder}: {len(missing)} of the {len(files)} files that {INDEX} names "
            f"{'is' if len(missing) == 1 else 'are'} missing ({few(missing)}); download the model again"
        )
    metadata, entries = _headers(folder, files)
    unheld = [] if index is None else [name for name in _weight_map(folder, index) if name not in entries]
    if unheld:
        raise ValueError(
            f"model {folder}: {INDEX} names {len(unheld):,} tensors that its files do not hold ({few(unheld)}); "
            "download the model again"
        )
    return CheckpointFiles(folder, metadata, entries, index)


def _headers(folder: Path, files: Iterable[str]) -> tuple[dict[str, dict[str, str] | None], dict[str, Entry]]:
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
                f"model {folder}: {file} cannot be read ({' '.join(str(error).split())}): "
                "it is truncated or corrupt; download it again"
            ) from None
    if twice:
        raise ValueError(
            f"model {folder}: its files hold the same tensor twice, {len(twice):,} times ({few(twice)}); save the model again"
        )
    return metadata, entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model {path.parent}: {path.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"model {path.parent}: {path.name} is no JSON object but a {type(content).__name__}")
    return content


def _weight_map(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """File of every tensor by an index."""
    found = index.get("weight_map")
    names = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name for name in names):
        raise ValueError(f"model {folder}: weight_map in {INDEX} does not map tensors to safetensors files beside it")
    return dict(found or {})


def dtype_of(folder: Path, entries: Entries) -> torch.dtype:
    """The dtype that most of the weights are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        if entry.dtype is not None:
            counts[entry.dtype] += prod(entry.shape)
    if not counts:
        raise ValueError(f"model {folder} has no weights in float64, float32, float16 or bfloat16")
    return counts.most_common(1)[0][0]


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path | None = None) -> None:
    """Errors: ValueError naming the first of these tensors that holds NaN or infinity, and the folder that it came from."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass that keeps nothing: NaN is the least and the largest of all.
        if not bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all()):
            wrong = int((~tensor.isfinite()).sum())
            where = name if folder is None else f"model {folder}: {name}"
            advice = "try --dtype bfloat16, or another" if tensor.dtype == torch.float16 else "use another"
            raise ValueError(
                f"{where} holds NaN or infinity ({wrong:,} of {tensor.numel():,} values); {advice} checkpoint"
            )
