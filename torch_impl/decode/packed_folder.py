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
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import packed
from torch_impl.decode.packed_linear import PARTS, PackedLinear, group_projections
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import CODES, INDEX, PACKED, Entry, check_finite, few, find, read_config
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.checkpoints.skeleton import Checkpoint, lay_out
from torch_impl.engine.families import decoder_blocks, find_family

FORMAT, VERSION = "losa-packed", 1


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
    return (folder / PACKED).is_file()


def pack_folder(source: Path, target: Path, device: torch.device, trust_remote_code: bool = False) -> list[Saving]:
    """Write the packed form of the model in `source` into the folder `target`, file by file. Returns what it saves.

    Packed is every projection of a decoder block that becomes smaller by it; `device` does the packing.

    Errors: ValueError or FileNotFoundError naming the folder and what is wrong with it, as `skeleton.describe` and
    `check_finite` do.
    """
    if is_packed(source):
        raise ValueError(f"model {source} is packed already; name a plain Hugging Face folder, or use --unpack")
    if not source.is_dir():
        raise FileNotFoundError(f"model {source}: no such folder; name a Hugging Face model folder")
    files = find(source)
    found = lay_out(source, files.entries, trust_remote_code)
    kinds = _projections(found)
    savings: dict[str, Saving] = {}
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "index": files.index, "files": {}, "tensors": {}}
    for number, (shard, metadata) in enumerate(files.metadata.items(), 1):
        name = f"packed-{number:05d}-of-{len(files.metadata):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with _opened(source / shard) as file:
            for key in tqdm(file.keys(), desc=f"packing {shard}", unit=" tensors", leave=False, disable=None):
                tensor = file.get_tensor(key)
                if key not in found.left_over:
                    check_finite([(key, tensor)], source)
                kind = kinds.get(key, "other")
                stored = _smallest(key, tensor, kind != "other", device)
                manifest["tensors"][key] = {
                    "file": name,
                    "shape": list(tensor.shape),
                    "dtype": _dtype_name(tensor),
                    "packed": key not in stored,
                }
                savings.setdefault(kind, Saving(kind)).add(tensor, stored, key not in stored)
                tensors |= stored
        manifest["files"][name] = {"source": shard, "metadata": metadata}
        save_tensors(tensors, target / name)
    (target / PACKED).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _copy_others(source, target)
    return sorted(savings.values(), key=lambda saving: saving.kind == "other")


def unpack_folder(source: Path, target: Path) -> None:
    """Write the plain Hugging Face folder that was packed: the same tensors, bit for bit, in files of the same names.

    Errors: as `load`; ValueError if `source` is not packed.
    """
    manifest = _manifest(source)
    for name, facts in tqdm(manifest["files"].items(), desc="unpacking", unit=" files", leave=False, disable=None):
        tensors = {}
        for key, parts in _tensors(source, manifest, name):
            with _naming(source / name, key):
                tensors[key] = parts[0]
                if len(parts) == len(PARTS):
                    bitmap, values, offsets = parts
                    tensors[key] = packed.unpack(bitmap, values, offsets, manifest["tensors"][key]["shape"][-1])
                _fits(tensors[key], manifest["tensors"][key])
        save_tensors(tensors, target / facts["source"], facts["metadata"])
    if manifest["index"] is not None:
        (target / INDEX).write_text(json.dumps(manifest["index"], indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _copy_others(source, target)


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Packed model, in eval mode, and its tokenizer; nothing is unpacked. dtype: default as stored.

    Errors: ValueError naming file and tensor where anything is missing, cut short or contradicts itself.
    """
    manifest = _manifest(folder)
    read_config(folder)
    found = lay_out(folder, _entries(manifest), trust_remote_code, dtype)
    tokenizer = pretrained.load_tokenizer(folder, trust_remote_code)
    model = found.model
    places = {key: name for name, key in found.names.items() if name not in found.tied}
    for file in manifest["files"]:
        for key, parts in _tensors(folder, manifest, file):
            if key in places:
                parts = [part.to(model.dtype) if part.is_floating_point() else part for part in parts]
                check_finite(((key, part) for part in parts), folder)
                with _naming(folder / file, key):
                    _place(model, places[key], [part.to(device) for part in parts])
    found.tie(model)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    group_projections(model)
    return model, tokenizer


def _projections(found: Checkpoint) -> dict[str, str]:
    """Kind of each projection of a decoder block by the name that its weight is stored by."""
    family = find_family(found.model)
    return {
        found.names[f"{family.blocks}.{index}.{projection}.weight"]: projection.rpartition(".")[2]
        for index in range(len(decoder_blocks(found.model, family)))
        for projection in family.projections
    }


def _entries(manifest: dict[str, Any]) -> dict[str, Entry]:
    """The tensors of a packed model as they were."""
    codes = {str(dtype).removeprefix("torch."): code for code, dtype in CODES.items()}
    return {
        key: Entry(facts["file"], tuple(facts["shape"]), codes.get(facts["dtype"], facts["dtype"]))
        for key, facts in manifest["tensors"].items()
    }


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
            raise ValueError(f"bitmap has {layer.out_features} rows and {PACKED} lists {len(room)}")
        model.set_submodule(path, layer)
        return
    value = parts[0].to(room.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(room, nn.Parameter) else value)


def _manifest(folder: Path) -> dict[str, Any]:
    """packed.json, as far as the files rely on it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model {folder}: no such folder; name the folder of a packed model")
    if not is_packed(folder):
        raise ValueError(f"model {folder}: no {PACKED} in this folder; name the folder of a packed model")
    path = folder / PACKED
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        files = {name: Path(facts["source"]).name == facts["source"] for name, facts in manifest["files"].items()}
        metadata = [pair for facts in manifest["files"].values() for pair in dict(facts["metadata"] or {}).items()]
        if not all(isinstance(word, str) for pair in metadata for word in pair):
            raise TypeError("metadata is no text")
        entries = [
            (facts["file"], facts["shape"], facts["dtype"], facts["packed"]) for facts in manifest["tensors"].values()
        ]
        named = {entry[0] for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not the list of a packed model ({error!r}): it is corrupt; pack the model again"
        ) from error
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} is of format {found[0]}, version {found[1]}; allowed: {FORMAT}, version {VERSION}")
    if not all(files.values()) or any(Path(name).name != name for name in files) or named - set(files):
        raise ValueError(f"{path} names files that are not in its list or this folder: pack the model again")
    # Earlier versions did not keep the index.
    sources = {key: manifest["files"][facts["file"]]["source"] for key, facts in manifest["tensors"].items()}
    manifest.setdefault("index", {"metadata": {}, "weight_map": sources} if len(files) > 1 else None)
    return manifest


def _tensors(folder: Path, manifest: dict[str, Any], name: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Every tensor of one file by its plain name: itself, or its bitmap, values and offsets, of the shape and dtype listed."""
    listed = {key: facts for key, facts in manifest["tensors"].items() if facts["file"] == name}
    names = {key: [f"{key}.{part}" for part in PARTS] if facts["packed"] else [key] for key, facts in listed.items()}
    with _opened(folder / name) as file:
        every, stored = {part for parts in names.values() for part in parts}, set(file.keys())
        for wrong, what in ((every - stored, "lacks"), (stored - every, "holds beside what it should")):
            if wrong:
                raise ValueError(f"{folder / name} {what} {few(sorted(wrong))}, by {PACKED}; pack the model again")
        for key, facts in listed.items():
            parts = [file.get_tensor(part) for part in names[key]]
            with _naming(folder / name, key):
                _fits(parts[1] if facts["packed"] else parts[0], facts)
            yield key, parts


def _fits(value: torch.Tensor, facts: dict[str, Any]) -> None:
    """The dtype listed, and unless it is a list of kept values, the shape."""
    if _dtype_name(value) != facts["dtype"]:
        raise ValueError(f"dtype is {_dtype_name(value)} and {PACKED} lists {facts['dtype']}")
    if list(value.shape) != facts["shape"] and not (facts["packed"] and value.dim() == 1):
        raise ValueError(f"shape is {tuple(value.shape)} and {PACKED} lists {tuple(facts['shape'])}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; cut short, damaged or missing, it is named."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())}): it is truncated or corrupt; pack the model again"
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
        if path.is_file() and not weights and path.name != PACKED:
            shutil.copyfile(path, target / path.name)
