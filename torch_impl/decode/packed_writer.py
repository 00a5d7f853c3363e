"""Write packed folders: tensor by tensor, or from a packed model in memory, which `save_pretrained` then does.

The format: packed_folder.py.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel

from torch_impl import _checks
from torch_impl.decode import packed_config
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.checkpoints.contents import INDEX, PACKED
from torch_impl.engine.checkpoints.safetensors_files import FORMAT as METADATA
from torch_impl.engine.checkpoints.safetensors_files import save_tensors

FORMAT = "losa-packed"
PLAIN, ROUNDED = 1, 2
"""Versions of the format: all values in the model's dtype; some are codes, too."""


class Writer:
    """Writes the files of a packed folder, one after the other.

    index: that of the plain folder, if it has several files. rounding: what packed.json says of the rounding, if there is one.
    """

    def __init__(self, folder: Path, index: dict[str, Any] | None, rounding: dict[str, Any] | None = None) -> None:
        self._folder = folder
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": PLAIN,
            "index": index,
            **({} if rounding is None else {"rounding": rounding}),
            "files": {},
            "tensors": {},
        }
        self._tensors: dict[str, torch.Tensor] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._places: dict[str, str] = {}
        self._size = 0

    def add(self, key: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor]) -> None:
        """Add a tensor to the current file. stored: the tensor by its name, or its parts by theirs."""
        facts = {"shape": list(tensor.shape), "dtype": dtype_name(tensor), "packed": key not in stored}
        codes = stored.get(f"{key}.codes")
        if codes is not None:
            facts["bits"] = codes.shape[1]
            self._manifest["version"] = ROUNDED
        self._facts[key] = facts
        self._tensors |= stored

    def end_file(self, name: str, source: str, metadata: dict[str, str] | None) -> None:
        """Write the current file. source: the name of the plain file, whose header holds `metadata`."""
        self._manifest["files"][name] = {"source": source, "metadata": metadata}
        self._manifest["tensors"] |= {key: {"file": name, **facts} for key, facts in self._facts.items()}
        self._places |= dict.fromkeys(self._tensors, name)
        self._size += bytes_of(*self._tensors.values())
        save_tensors(self._tensors, self._folder / name)
        self._tensors, self._facts = {}, {}

    def end(self) -> None:
        """Write the lists of the files' contents; config.json must be there."""
        text = json.dumps(self._manifest, indent=1, allow_nan=False) + "\n"
        (self._folder / PACKED).write_text(text, encoding="utf-8")
        packed_config.mark(self._folder, self._places, self._size)


def keep_packed(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write a packed folder: transformers' own would write files that it cannot load."""
    model.save_pretrained = functools.partial(save, model)  # type: ignore[method-assign]


def save(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> None:
    """Write a packed model in memory as a packed folder, as `PreTrainedModel.save_pretrained` writes a plain one.

    Errors: ValueError naming another option of `save_pretrained` that is set, or a tensor that is offloaded.
    """
    others = sorted(name for name, value in options.items() if value and name not in ("token", "safe_serialization"))
    others = [name for name in others if name not in ("save_peft_format", "save_original_format")]
    if others:
        raise ValueError(f"a packed model is saved without {', '.join(others)}; unpack it to use such options")
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    layers, tensors = _stored(model)
    files = _split(layers, tensors, max_shard_size)
    index = None
    if len(files) > 1:
        total = sum(layer.positions * layer.dtype.itemsize for layer in layers.values()) + bytes_of(*tensors.values())
        places = {key: source for source, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": places}
    # The new files replace those of an earlier save when all are written.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".packed") as place:
        _write(model, Path(place), files, layers, tensors, index)
        for stale in (*folder.glob("packed-*.safetensors"), *folder.glob("model*.safetensors"), folder / INDEX):
            stale.unlink(missing_ok=True)
        for path in Path(place).iterdir():
            path.replace(folder / path.name)


def _write(
    model: PreTrainedModel,
    folder: Path,
    files: dict[str, list[str]],
    layers: dict[str, PackedLinear],
    tensors: dict[str, torch.Tensor],
    index: dict[str, Any] | None,
) -> None:
    """Write all files. files: the names of the plain files, and the tensors in each; layers, tensors: by name."""
    writer = Writer(folder, index)
    for number, (source, keys) in enumerate(files.items(), 1):
        for key in keys:
            if key in layers:
                parts = {f"{key}.{part}": value.cpu() for part, value in layers[key].stored().items()}
                writer.add(key, layers[key].unpacked(), parts)
            else:
                writer.add(key, tensors[key], {key: tensors[key].detach().cpu().contiguous()})
        writer.end_file(f"packed-{number:05d}-of-{len(files):05d}.safetensors", source, METADATA)
    model.config.dtype = dtype_name(torch.empty(0, dtype=model.dtype))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    writer.end()


def _stored(model: PreTrainedModel) -> tuple[dict[str, PackedLinear], dict[str, torch.Tensor]]:
    """Return the packed layers by the names of their weights, and all other tensors to be stored by name."""
    module: nn.Module = model
    layers: dict[str, PackedLinear] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules():
        own = {**part._parameters, **part._buffers}
        if isinstance(part, PackedLinear):
            layers[f"{path}.weight"] = part
            own = {"bias": part.bias}
        for name, value in own.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                tensors[f"{path}.{name}" if path else name] = value
    for target, source in model.all_tied_weights_keys.items():
        if tensors.get(target) is tensors.get(source):
            tensors.pop(target, None)
    held = {key: layer.bitmap for key, layer in layers.items() if layer.bitmap is not None} | tensors
    offloaded = [key for key, value in held.items() if value.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded):,} tensors are offloaded ({_checks.few(offloaded)}), so the model cannot be saved; "
            "load it with a device_map that keeps it in memory"
        )
    return layers, tensors


def _split(
    layers: dict[str, PackedLinear], tensors: dict[str, torch.Tensor], max_shard_size: int | str
) -> dict[str, list[str]]:
    """Distribute the tensors over files: the names of the plain files and of the tensors in each, by packed size."""
    sizes = {key: bytes_of(value) for key, value in tensors.items()}
    for key, layer in layers.items():
        sizes[key] = bytes_of(*layer.stored().values())
    stand_ins = {key: torch.empty(size, dtype=torch.uint8, device="meta") for key, size in sizes.items()}
    split = split_torch_state_dict_into_shards(stand_ins, max_shard_size=max_shard_size)
    return dict(split.filename_to_tensors)


def dtype_name(value: torch.Tensor) -> str:
    """Return the name of a tensor's dtype."""
    return str(value.dtype).removeprefix("torch.")


def bytes_of(*values: torch.Tensor) -> int:
    """Return the size of tensors in bytes."""
    return sum(value.numel() * value.element_size() for value in values)
