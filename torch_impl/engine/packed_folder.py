"""Folders of packed models: a Hugging Face folder whose sparse projections are stored as bitmap, values and offsets.

    packed-00001-of-00002.safetensors   as the file it was made of, a packed NAME as NAME.bitmap, NAME.values, NAME.offsets
    packed.json                         which file was which, and dtype and shape of every tensor as it was
    config.json, tokenizer, ...         unchanged

No file bears a name that transformers would load weights from: it would fill in what it misses at random.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from torch_impl import packed
from torch_impl.engine.families import decoder_blocks, find_family
from torch_impl.engine.packed_linear import PARTS, PackedLinear, group_projections

MANIFEST = "packed.json"
FORMAT, VERSION = "losa-packed", 1
INDEX = "model.safetensors.index.json"


@dataclass
class Saving:
    """What one kind of tensor takes, plain and packed. kind: a projection's name, or `other`."""

    kind: str
    tensors: int = 0
    packed: int = 0
    positions: int = 0
    kept: int = 0
    negative_zeros: int = 0
    before: int = 0
    after: int = 0
    """Bytes."""

    def add(self, tensor: torch.Tensor, stored: dict[str, torch.Tensor], is_packed: bool) -> None:
        """Count one tensor and what is stored of it."""
        self.tensors += 1
        self.packed += is_packed
        self.positions += tensor.numel()
        self.kept += int((tensor != 0).sum())
        if is_packed:
            self.negative_zeros += int(((tensor == 0) & tensor.signbit()).sum())
        self.before += _bytes(tensor)
        self.after += _bytes(*stored.values())


def is_packed(folder: Path) -> bool:
    """Whether this is the folder of a packed model."""
    return (folder / MANIFEST).is_file()


def pack_folder(source: Path, target: Path, device: torch.device) -> list[Saving]:
    """Write the packed form of the model in `source` into the folder `target`, file by file. Returns what it saves.

    Packed is every projection of a decoder block that becomes smaller by it; `device` does the packing.

    Errors: ValueError or FileNotFoundError naming what is not a Hugging Face folder, or the file that cannot be read.
    """
    if is_packed(source):
        raise ValueError(f"model {source} is packed already; allowed: a plain Hugging Face folder, or --unpack")
    shards = sorted(source.glob("*.safetensors"))
    if not (source / "config.json").is_file() or not shards:
        raise FileNotFoundError(
            f"model {source}: no config.json with *.safetensors; allowed: a Hugging Face model folder with safetensors"
        )
    model = _empty_model(source, None)
    kinds = _projections(model)
    savings: dict[str, Saving] = {}
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "files": {}, "tensors": {}}
    for number, shard in enumerate(shards, 1):
        name = f"packed-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with _opened(shard) as file:
            metadata = file.metadata()
            for key in tqdm(file.keys(), desc=f"packing {shard.name}", unit=" tensors", leave=False, disable=None):
                tensor = file.get_tensor(key)
                kind = kinds.get(_module_name(model, key), "other")
                stored = _smallest(key, tensor, kind != "other", device)
                manifest["tensors"][key] = {
                    "file": name,
                    "shape": list(tensor.shape),
                    "dtype": _dtype_name(tensor),
                    "packed": key not in stored,
                }
                savings.setdefault(kind, Saving(kind)).add(tensor, stored, key not in stored)
                tensors |= stored
        manifest["files"][name] = {"source": shard.name, "metadata": metadata}
        save_file(tensors, target / name, metadata={"format": "pt"})
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _copy_others(source, target)
    return sorted(savings.values(), key=lambda saving: saving.kind == "other")


def unpack_folder(source: Path, target: Path) -> None:
    """Write the plain Hugging Face folder that was packed: the same tensors, bit for bit, in files of the same names.

    Errors: as `load`; ValueError if `source` is not packed.
    """
    manifest = _manifest(source)
    weight_map, total = {}, 0
    for name, facts in tqdm(manifest["files"].items(), desc="unpacking", unit=" files", leave=False, disable=None):
        tensors = {}
        for key, parts in _tensors(source, manifest, name):
            with _naming(source / name, key):
                tensors[key] = parts[0]
                if len(parts) == len(PARTS):
                    bitmap, values, offsets = parts
                    tensors[key] = packed.unpack(bitmap, values, offsets, manifest["tensors"][key]["shape"][-1])
                _fits(tensors[key], manifest["tensors"][key])
            weight_map[key] = facts["source"]
            total += tensors[key].numel() * tensors[key].element_size()
        save_file(tensors, target / facts["source"], metadata=facts["metadata"])
    if len(manifest["files"]) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_others(source, target)


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Packed model, in eval mode, and its tokenizer; nothing is unpacked. dtype: default the configuration's.

    Errors: ValueError naming file and tensor where anything is missing, cut short or contradicts itself.
    """
    manifest = _manifest(folder)
    model = _empty_model(folder, dtype)
    for file in manifest["files"]:
        for key, parts in _tensors(folder, manifest, file):
            name = _module_name(model, key)
            if name is not None:
                with _naming(folder / file, key):
                    _place(model, name, [part.to(device) for part in parts])
    model.tie_weights()
    # All that is left without contents is what no file had.
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is in no file; allowed: every tensor of the model")
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    group_projections(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def _empty_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a folder's config.json, its parameters without contents."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32
            )
    except Exception as error:  # transformers raises a dozen kinds; each ends here as one line
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"model {folder} is no causal language model that transformers knows: {reason}") from error
    return model


def _projections(model: PreTrainedModel) -> dict[str | None, str]:
    """Kind of each projection of a decoder block by the full name of its weight."""
    family = find_family(model)
    return {
        f"{family.blocks}.{index}.{projection}.weight": projection.rpartition(".")[2]
        for index in range(len(decoder_blocks(model, family)))
        for projection in family.projections
    }


def _module_name(model: PreTrainedModel, key: str) -> str | None:
    """What the model calls a stored tensor: checkpoints of a bare decoder lack the model's prefix. None: it has no such."""
    prefix = model.base_model_prefix
    for name in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")):
        path, _, leaf = name.rpartition(".")
        try:
            if isinstance(getattr(model.get_submodule(path), leaf), torch.Tensor):
                return name
        except AttributeError:
            continue
    return None


def _smallest(key: str, tensor: torch.Tensor, projection: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """A projection's packed parts by name if they are smaller, else the tensor as it is."""
    if not projection or tensor.dim() != 2 or tensor.element_size() < 2:
        return {key: tensor}
    parts = dict(zip(PARTS, (part.cpu() for part in packed.pack(tensor.to(device))), strict=True))
    stored = {f"{key}.{part}": value for part, value in parts.items()}
    return stored if _bytes(*stored.values()) < _bytes(tensor) else {key: tensor}


def _place(model: PreTrainedModel, name: str, parts: list[torch.Tensor]) -> None:
    """Put a tensor, or a packed one's parts, where the empty model has room for it, in the model's dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    room = getattr(module, leaf)
    if len(parts) == len(PARTS):
        bitmap, values, offsets = parts
        layer = PackedLinear(bitmap, values, offsets, room.shape[1], getattr(module, "bias", None))
        if layer.out_features != len(room):
            raise ValueError(f"bitmap has {layer.out_features} rows; allowed: {len(room)}")
        model.set_submodule(path, layer.to(model.dtype))
        return
    if parts[0].shape != room.shape:
        raise ValueError(f"shape is {tuple(parts[0].shape)}; allowed: {tuple(room.shape)}")
    value = parts[0].to(room.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(room, nn.Parameter) else value)


def _manifest(folder: Path) -> dict[str, Any]:
    """packed.json, as far as the files rely on it."""
    if not is_packed(folder):
        raise ValueError(f"model {folder}: no {MANIFEST} in this folder; allowed: the folder of a packed model")
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        files = {name: Path(facts["source"]).name == facts["source"] for name, facts in manifest["files"].items()}
        entries = [
            (facts["file"], facts["shape"], facts["dtype"], facts["packed"]) for facts in manifest["tensors"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the list of a packed model ({error!r}); allowed: as it was written") from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is of format {found[0]}, version {found[1]}; allowed: {FORMAT}, version {VERSION}")
    if (
        not all(files.values())
        or any(Path(name).name != name for name in files)
        or {e[0] for e in entries} - set(files)
    ):
        raise ValueError(f"{path} names files that are not in its list or this folder; allowed: as it was written")
    return manifest


def _tensors(folder: Path, manifest: dict[str, Any], name: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every tensor of one file by its plain name: itself, or its bitmap, values and offsets, of the shape and dtype listed."""
    with _opened(folder / name) as file:
        stored = set(file.keys())
        for key, facts in manifest["tensors"].items():
            if facts["file"] != name:
                continue
            names = [f"{key}.{part}" for part in PARTS] if facts["packed"] else [key]
            for part in names:
                if part not in stored:
                    raise ValueError(f"{folder / name}: {part} is missing; allowed: all that {MANIFEST} lists")
            parts = [file.get_tensor(part) for part in names]
            with _naming(folder / name, key):
                _fits(parts[1] if facts["packed"] else parts[0], facts)
            yield key, parts


def _fits(value: torch.Tensor, facts: dict[str, Any]) -> None:
    """The dtype listed, and unless it is a list of kept values, the shape."""
    if _dtype_name(value) != facts["dtype"]:
        raise ValueError(f"dtype is {_dtype_name(value)}; allowed: {facts['dtype']}, as in {MANIFEST}")
    if list(value.shape) != facts["shape"] and not (facts["packed"] and value.dim() == 1):
        raise ValueError(f"shape is {tuple(value.shape)}; allowed: {tuple(facts['shape'])}, as in {MANIFEST}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; cut short, damaged or missing, it is named."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())}); allowed: a whole safetensors file"
        ) from error


@contextmanager
def _naming(path: Path, key: str) -> Iterator[None]:
    """What is wrong with a tensor, with its file and name in front."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, {key}: {error}") from error


def _dtype_name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _bytes(*values: torch.Tensor) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _copy_others(source: Path, target: Path) -> None:
    """Configuration, tokenizer, model card: every file that holds no weights."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != MANIFEST:
            shutil.copyfile(path, target / path.name)
