"""Folders of packed models: Hugging Face folders whose sparse projections are stored as bitmap, values and offsets.

    packed-00001-of-00002.safetensors   one per original file; a packed NAME is NAME.bitmap, NAME.values, NAME.offsets
    packed.json                         the original name of each file, and the original dtype and shape of each tensor
    config.json                         with two more entries, and an index of the files: packed_config.py
    tokenizer, ...                      unchanged

The file names are not those of transformers' weights: it would load them and fill missing tensors with random numbers.
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

from torch_impl import _checks, packed
from torch_impl.decode import packed_card, packed_config
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.decode.packed_writer import FORMAT, VERSION, Writer, bytes_of, dtype_name, keep_packed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import CODES, INDEX, PACKED, Entry, check_finite, find, read_config
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.checkpoints.skeleton import Checkpoint, lay_out
from torch_impl.engine.decoder import Decoder
from torch_impl.packed import PARTS


@dataclass
class Saving:
    """The size of one kind of tensor, plain and packed. kind: a projection's name, or `other`."""

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
        """Count one tensor and its stored form."""
        self.tensors += 1
        self.packed += is_packed
        self.positions += tensor.numel()
        self.kept += int((tensor != 0).sum())
        if is_packed:
            self.negative_zeros += int(((tensor == 0) & tensor.signbit()).sum())
        self.before += bytes_of(tensor)
        self.after += bytes_of(*stored.values())


def is_packed(folder: Path) -> bool:
    """Return whether this is the folder of a packed model."""
    return (folder / PACKED).is_file()


def pack_folder(source: Path, target: Path, device: torch.device, trust_remote_code: bool = False) -> list[Saving]:
    """Pack the model in `source` into the folder `target`, file by file, on `device`. Return the sizes per kind of tensor.

    Each projection of a decoder block is packed if that makes it smaller.

    Errors: ValueError or FileNotFoundError naming the folder and the problem, as `skeleton.describe` and `check_finite`.
    """
    if is_packed(source):
        raise ValueError(f"model {source} is already packed; give a plain Hugging Face folder, or use --unpack")
    if not source.is_dir():
        raise FileNotFoundError(f"model {source}: no such folder; give a Hugging Face model folder")
    files = find(source)
    found = lay_out(source, files.entries, trust_remote_code)
    kinds = _projections(found)
    savings: dict[str, Saving] = {}
    writer = Writer(target, files.index)
    for number, (shard, metadata) in enumerate(files.metadata.items(), 1):
        with _opened(source / shard) as file:
            for key in tqdm(file.keys(), desc=f"packing {shard}", unit=" tensors", leave=False, disable=None):
                tensor = file.get_tensor(key)
                if key not in found.left_over:
                    check_finite([(key, tensor)], source)
                kind = kinds.get(key, "other")
                stored = _smallest(key, tensor, kind != "other", device)
                savings.setdefault(kind, Saving(kind)).add(tensor, stored, key not in stored)
                writer.add(key, tensor, stored)
        writer.end_file(f"packed-{number:05d}-of-{len(files.metadata):05d}.safetensors", shard, metadata)
    _copy_others(source, target)
    writer.end()
    inside = [saving for kind, saving in savings.items() if kind != "other"]
    places = max(1, sum(saving.positions for saving in inside))
    zeros = 1 - sum(saving.kept for saving in inside) / places
    packed_card.write(target, zeros, 8 * sum(saving.after for saving in inside) / places)
    return sorted(savings.values(), key=lambda saving: saving.kind == "other")


def unpack_folder(source: Path, target: Path) -> None:
    """Restore the plain Hugging Face folder: the same tensors, bit for bit, in files of the same names.

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
    packed_card.restore(target)
    packed_config.unmark(target)


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` and the tokenizer beside it."""
    tokenizer = pretrained.load_tokenizer(folder, trust_remote_code)
    return load_model(folder, device, dtype, trust_remote_code), tokenizer


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a packed model, in eval mode, without unpacking. dtype: default as stored.

    Errors: ValueError or FileNotFoundError naming file and tensor if anything is missing, truncated or inconsistent.
    """
    manifest = _manifest(folder)
    read_config(folder)
    found = lay_out(folder, _entries(manifest), trust_remote_code, dtype)
    model = found.model
    places = {key: name for name, key in found.names.items() if name not in found.tied}
    for file in manifest["files"]:
        for key, parts in _tensors(folder, manifest, file):
            if key in places:
                check_finite(((key, part.to(model.dtype)) for part in parts if part.is_floating_point()), folder)
                with _naming(folder / file, key):
                    _place(model, places[key], parts, device)
    found.tie(model)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    group_projections(model)
    keep_packed(model)
    return model


def _projections(found: Checkpoint) -> dict[str, str]:
    """Map the stored name of each decoder projection's weight to the projection's kind."""
    decoder = Decoder(found.model)
    return {
        found.names[decoder.full_name(index, f"{projection}.weight")]: projection.rpartition(".")[2]
        for index in range(len(decoder.blocks))
        for projection in decoder.family.projections
    }


def _entries(manifest: dict[str, Any]) -> dict[str, Entry]:
    """Return the entries of the original tensors of a packed model."""
    codes = {str(dtype).removeprefix("torch."): code for code, dtype in CODES.items()}
    return {
        key: Entry(facts["file"], tuple(facts["shape"]), codes.get(facts["dtype"], facts["dtype"]))
        for key, facts in manifest["tensors"].items()
    }


def _smallest(key: str, tensor: torch.Tensor, projection: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Return a projection's packed parts by name if they are smaller, otherwise the tensor."""
    if not projection or tensor.dim() != 2 or tensor.element_size() < 2:
        return {key: tensor}
    parts = dict(zip(PARTS, (part.cpu() for part in packed.pack(tensor.to(device))), strict=True))
    stored = {f"{key}.{part}": value for part, value in parts.items()}
    return stored if bytes_of(*stored.values()) < bytes_of(tensor) else {key: tensor}


def _place(model: PreTrainedModel, name: str, parts: list[torch.Tensor], device: torch.device) -> None:
    """Put a tensor, or the parts of a packed one, into the empty model, on a device and in the model's dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    room = getattr(module, leaf)
    if len(parts) == len(PARTS):
        bitmap, values, offsets = parts
        layer = PackedLinear(bitmap, values, offsets, room.shape[1])
        if layer.out_features != len(room):
            raise ValueError(f"bitmap has {layer.out_features} rows, but {PACKED} lists {len(room)}")
        layer.to(device=device, dtype=model.dtype)
        # The bias may not be loaded yet.
        bias = getattr(module, "bias", None)
        layer.register_buffer("bias", None if bias is None else bias.detach())
        model.set_submodule(path, layer)
        return
    value = parts[0].to(device=device, dtype=room.dtype)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(room, nn.Parameter) else value)


def _manifest(folder: Path) -> dict[str, Any]:
    """Read packed.json and check the fields that loading needs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model {folder}: no such folder; give the folder of a packed model")
    if not is_packed(folder):
        raise ValueError(f"model {folder}: no {PACKED} in this folder; give the folder of a packed model")
    path = folder / PACKED
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"], manifest["version"]
        files = {name: Path(facts["source"]).name == facts["source"] for name, facts in manifest["files"].items()}
        metadata = [pair for facts in manifest["files"].values() for pair in dict(facts["metadata"] or {}).items()]
        if not all(isinstance(word, str) for pair in metadata for word in pair):
            raise TypeError("metadata is not text")
        entries = [
            (facts["file"], facts["shape"], facts["dtype"], facts["packed"]) for facts in manifest["tensors"].values()
        ]
        named = {entry[0] for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is corrupt ({error!r}); pack the model again") from error
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path} has format {found[0]}, version {found[1]}, but this version reads only {FORMAT}, version {VERSION}"
        )
    if not all(files.values()) or any(Path(name).name != name for name in files) or named - set(files):
        raise ValueError(f"{path} names files that are not in its list or not in this folder; pack the model again")
    # Earlier versions did not store the index.
    sources = {key: manifest["files"][facts["file"]]["source"] for key, facts in manifest["tensors"].items()}
    manifest.setdefault("index", {"metadata": {}, "weight_map": sources} if len(files) > 1 else None)
    return manifest


def _tensors(folder: Path, manifest: dict[str, Any], name: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield each tensor of one file by its original name: itself, or its bitmap, values and offsets.

    Errors: ValueError if its names, shapes or dtypes differ from packed.json.
    """
    listed = {key: facts for key, facts in manifest["tensors"].items() if facts["file"] == name}
    names = {key: [f"{key}.{part}" for part in PARTS] if facts["packed"] else [key] for key, facts in listed.items()}
    with _opened(folder / name) as file:
        every, stored = {part for parts in names.values() for part in parts}, set(file.keys())
        for wrong, what in (
            (every - stored, f"lacks, but {PACKED} lists"),
            (stored - every, f"has, but {PACKED} lacks"),
        ):
            if wrong:
                raise ValueError(f"{folder / name} {what}, {_checks.few(sorted(wrong))}; pack the model again")
        for key, facts in listed.items():
            parts = [file.get_tensor(part) for part in names[key]]
            with _naming(folder / name, key):
                _fits(parts[1] if facts["packed"] else parts[0], facts)
            yield key, parts


def _fits(value: torch.Tensor, facts: dict[str, Any]) -> None:
    """Check the dtype against packed.json; also the shape, unless the tensor is the kept values."""
    if dtype_name(value) != facts["dtype"]:
        raise ValueError(f"dtype is {dtype_name(value)}, but {PACKED} lists {facts['dtype']}")
    if list(value.shape) != facts["shape"] and not (facts["packed"] and value.dim() == 1):
        raise ValueError(f"shape is {tuple(value.shape)}, but {PACKED} lists {tuple(facts['shape'])}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} is missing, truncated or corrupt ({' '.join(str(error).split())}); pack the model again"
        ) from error


@contextmanager
def _naming(path: Path, key: str) -> Iterator[None]:
    """Prefix errors with the file and the name of the tensor."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, {key}: {error}") from error


def _copy_others(source: Path, target: Path) -> None:
    """Copy every file without weights: configuration, tokenizer, model card."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != PACKED:
            shutil.copyfile(path, target / path.name)
