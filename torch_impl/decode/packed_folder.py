"""Folders of packed models: Hugging Face folders whose sparse projections are stored as bitmap, values and offsets.

    packed-00001-of-00002.safetensors   one per original file; a packed NAME is NAME.bitmap, NAME.values, NAME.offsets, or
                                        rounded: NAME.bitmap, NAME.codes, NAME.scales, NAME.offsets (then version 2)
    packed.json                         the original name of each file, and the original dtype and shape of each tensor
    config.json                         with two more entries, and an index of the files: packed_config.py
    tokenizer, ...                      unchanged

The file names are not those of transformers' weights: it would load them and fill missing tensors with random numbers.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import packed
from torch_impl.decode import packed_card, packed_config
from torch_impl.decode.captured_call import capture_in_generate
from torch_impl.decode.coded_linear import layer_of
from torch_impl.decode.packed_linear import group_projections
from torch_impl.decode.packed_reader import fits, is_packed, naming, opened, read_manifest, tensors_of
from torch_impl.decode.packed_rounding import Rounded, Rounding, rounded
from torch_impl.decode.packed_writer import Writer, bytes_of, keep_packed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import (
    CODES,
    INDEX,
    PACKED,
    CheckpointFiles,
    Entry,
    check_finite,
    find,
    read_config,
)
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.checkpoints.skeleton import Checkpoint, lay_out
from torch_impl.engine.decoder import Decoder
from torch_impl.packed import CODED, PARTS

logger = logging.getLogger(__name__)


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

    def add(self, key: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor]) -> None:
        """Count one tensor and its stored form. A kept weight that is rounded to 0 is not kept."""
        is_packed, coded = key not in stored, f"{key}.codes" in stored
        self.tensors += 1
        self.packed += is_packed
        self.positions += tensor.numel()
        self.kept += int(stored[f"{key}.offsets"][-1]) if coded else int((tensor != 0).sum())
        if is_packed and not coded:
            self.negative_zeros += int(((tensor == 0) & tensor.signbit()).sum())
        self.before += bytes_of(tensor)
        self.after += bytes_of(*stored.values())


def pack_folder(
    source: Path,
    target: Path,
    device: torch.device,
    trust_remote_code: bool = False,
    rounding: Rounding | None = None,
) -> list[Saving]:
    """Pack the model in `source` into the folder `target`, file by file, on `device`.

    Each projection of a decoder block is packed if that makes it smaller; with `rounding`, all of them, as codes. Return the
    sizes per kind of tensor.

    Errors: ValueError or FileNotFoundError naming the folder and the problem, as `skeleton.describe`, `check_finite` and
    `packed_rounding.rounded`.
    """
    if is_packed(source):
        raise ValueError(
            f"model {source} is already packed; give a plain Hugging Face folder, or unpack it: losa pack --unpack"
        )
    if not source.is_dir():
        raise FileNotFoundError(f"model {source}: no such folder; give a Hugging Face model folder")
    files = find(source)
    found = lay_out(source, files.entries, trust_remote_code)
    places = _projections(found)
    with rounded(rounding, places, source, target, device, trust_remote_code) as codes:
        return _write(source, target, found, files, places, device, codes)


def _write(
    source: Path,
    target: Path,
    found: Checkpoint,
    files: CheckpointFiles,
    places: dict[str, tuple[int, str]],
    device: torch.device,
    codes: Rounded | None,
) -> list[Saving]:
    """Write all files of a packed folder; return the sizes per kind of tensor."""
    savings: dict[str, Saving] = {}
    writer = Writer(target, files.index, None if codes is None else codes.facts())
    for number, (shard, metadata) in enumerate(files.metadata.items(), 1):
        with opened(source / shard) as file:
            for key in tqdm(file.keys(), desc=f"packing {shard}", unit=" tensors", leave=False, disable=None):
                tensor = file.get_tensor(key)
                if key not in found.left_over:
                    check_finite([(key, tensor)], source)
                kind = places[key][1].rpartition(".")[2] if key in places else "other"
                if kind != "other" and codes is not None:
                    with naming(source / shard, key):
                        stored = codes.parts(key, tensor.to(device))
                else:
                    stored = _smallest(key, tensor, kind != "other", device)
                savings.setdefault(kind, Saving(kind)).add(key, tensor, stored)
                writer.add(key, tensor, stored)
        writer.end_file(f"packed-{number:05d}-of-{len(files.metadata):05d}.safetensors", shard, metadata)
    _copy_others(source, target)
    writer.end()
    inside = [saving for kind, saving in savings.items() if kind != "other"]
    positions = max(1, sum(saving.positions for saving in inside))
    zeros = 1 - sum(saving.kept for saving in inside) / positions
    bits = 8 * sum(saving.after for saving in inside) / positions
    if not any(saving.packed for saving in inside):
        logger.warning(
            "no projection gets smaller packed (%.1f%% of the weights are zeros), so the packed model is as large and as fast as "
            "before; packing leaves out zeros, which losa run makes, or rounds values (values int8)",
            100 * zeros,
        )
    packed_card.write(target, zeros, bits, None if codes is None else codes.bits)
    return sorted(savings.values(), key=lambda saving: saving.kind == "other")


def unpack_folder(source: Path, target: Path) -> None:
    """Restore the plain Hugging Face folder: the same tensors, bit for bit, in files of the same names.

    Errors: as `load`; ValueError if `source` is not packed.
    """
    manifest = read_manifest(source)
    for name, file in tqdm(manifest["files"].items(), desc="unpacking", unit=" files", leave=False, disable=None):
        tensors = {}
        for key, parts in tensors_of(source, manifest, name):
            with naming(source / name, key):
                tensors[key] = _unpacked(parts, manifest["tensors"][key])
                fits(tensors[key], manifest["tensors"][key])
        save_tensors(tensors, target / file["source"], file["metadata"])
    if manifest["index"] is not None:
        (target / INDEX).write_text(json.dumps(manifest["index"], indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _copy_others(source, target)
    packed_card.restore(target)
    packed_config.unmark(target)


def _unpacked(parts: list[torch.Tensor], facts: dict[str, Any]) -> torch.Tensor:
    """Restore a tensor of its stored form; a rounded one as its codes and scales say."""
    columns = facts["shape"][-1] if facts["packed"] else 0
    if len(parts) == len(CODED):
        bitmap, codes, scales, offsets = parts
        packed.check_codes(bitmap, codes, scales, offsets, columns)
        return packed.expand_coded(bitmap, codes, scales, columns, getattr(torch, facts["dtype"]))
    if len(parts) == len(PARTS):
        bitmap, values, offsets = parts
        return packed.unpack(bitmap, values, offsets, columns)
    return parts[0]


def load(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` and the tokenizer beside it."""
    tokenizer = pretrained.load_tokenizer(folder, trust_remote_code)
    return load_model(folder, device, dtype, trust_remote_code), tokenizer


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    sequences: int = 1,
) -> PreTrainedModel:
    """Load a packed model, in eval mode, without unpacking. dtype: default as stored. sequences: as `cuda_layouts.lay_out`.

    Errors: ValueError or FileNotFoundError naming file and tensor if anything is missing, truncated or inconsistent.
    """
    manifest = read_manifest(folder)
    read_config(folder)
    found = lay_out(folder, _entries(manifest), trust_remote_code, dtype)
    model = found.model
    places = {key: name for name, key in found.names.items() if name not in found.tied}
    for file in manifest["files"]:
        for key, parts in tensors_of(folder, manifest, file):
            if key in places:
                check_finite(((key, part.to(model.dtype)) for part in parts if part.is_floating_point()), folder)
                with naming(folder / file, key):
                    _place(model, places[key], parts, device, sequences)
    found.tie(model)
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    group_projections(model)
    keep_packed(model)
    capture_in_generate(model)
    return model


def _projections(found: Checkpoint) -> dict[str, tuple[int, str]]:
    """Map the stored name of each decoder projection's weight to its block and its name there."""
    decoder = Decoder(found.model)
    return {
        found.names[decoder.full_name(index, f"{projection}.weight")]: (index, projection)
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


def _place(model: PreTrainedModel, name: str, parts: list[torch.Tensor], device: torch.device, sequences: int) -> None:
    """Put a tensor, or the parts of a packed one, into the empty model, on a device and in the model's dtype."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    room = getattr(module, leaf)
    if len(parts) >= len(PARTS):
        layer = layer_of(parts, room.shape[1], model.dtype, sequences=sequences)
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


def _copy_others(source: Path, target: Path) -> None:
    """Copy every file without weights: configuration, tokenizer, model card."""
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != PACKED:
            shutil.copyfile(path, target / path.name)
