"""Sharded models: load and save block by block, copy and merge.

No process holds more than one whole block of a model, on its device or in host memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import AdaptedLinear, attach_adapters, block_adapters, merge_adapters
from torch_impl.engine.checkpoints.contents import INDEX, check_finite, find
from torch_impl.engine.checkpoints.safetensors_files import Shards, save_tensors
from torch_impl.engine.checkpoints.skeleton import lay_out
from torch_impl.engine.decoder import Decoder


def load(folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """Load a causal language model from a local folder, sharded over the processes, with adapters of rank 0.

    dtype: of the parameters; None for the checkpoint's own. Errors: as `skeleton.describe`; ValueError naming a tensor
    that holds NaN or infinity.
    """
    files = find(folder)
    shards = Shards(files)
    found = lay_out(folder, files.entries, trust_remote_code, dtype)
    model: Any = found.model
    found.tie(model)
    for name, buffer in model.named_buffers():
        if name in found.names:
            buffer.copy_(shards.read(found.names[name]))

    def fetch(name: str) -> torch.Tensor:
        value = shards.read(found.names[name])
        check_finite([(name, value)], folder)
        return value

    decoder = Decoder(model)
    attach_adapters(decoder, 1.0)
    distributed.shard(decoder, device, fetch)
    return model


def copy_model(model: Any) -> Any:
    """Copy a model. A sharded model is copied block by block and sharded in the same way."""
    if not distributed.is_sharded(model):
        return copy.deepcopy(model)
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with init_empty_weights(include_buffers=False):
        other: Any = plain._from_config(model.config, dtype=model.dtype)
    other.eval().tie_weights()
    decoder = Decoder(other)
    attach_adapters(decoder, 1.0)

    def fetch(name: str) -> torch.Tensor:
        return distributed.full_tensor(model.get_parameter(name).detach())

    distributed.shard(decoder, model.device, fetch)
    return other


@torch.no_grad()
def merge(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Merge all adapters of a model in place. Return the masks (bool, on the CPU); if sharded, of this process's rows."""
    if not distributed.is_sharded(decoder.model):
        return merge_adapters(decoder)
    return {
        decoder.full_name(index, name): distributed.merge_rows(layer).cpu()
        for index, block in enumerate(decoder.blocks)
        for name, layer in block_adapters(block, decoder.family).items()
    }


@torch.no_grad()
def save(decoder: Decoder, folder: Path) -> None:
    """Write a merged, sharded model as a plain Hugging Face folder with one file per block; process 0 writes.

    Errors: ValueError if an adapter is not merged.
    """
    model = decoder.model
    blocks: list[tuple[str, nn.Module]] = [(decoder.full_name(i), block) for i, block in enumerate(decoder.blocks)]
    place: dict[str, str] = {}
    size = 0
    for count, (name, unit) in enumerate([*blocks, ("", model)], 1):
        file = f"model-{count:05d}-of-{len(blocks) + 1:05d}.safetensors"
        with distributed.unsharded(unit):
            tensors = dict(_plain_tensors(unit, name, inside=f"{decoder.family.blocks}." if not name else None))
            size += sum(tensor.nbytes for tensor in tensors.values())
            place |= dict.fromkeys(tensors, file)
            if distributed.is_main_process():
                on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
                save_tensors(on_host, folder / file)
    if distributed.is_main_process():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = model.dtype
        config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    distributed.all_reduce_number(0.0)  # a barrier: no process reads before everything is written


def _plain_tensors(unit: nn.Module, unit_name: str, inside: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a unit by full name, except those `inside` other units.

    A tied head is left out: it is the same tensor as the embedding.
    """
    for name, parameter in unit.named_parameters(prefix=unit_name):
        if inside is not None and name.startswith(inside):
            continue
        if name.endswith((".A", ".B")) and isinstance(
            unit.get_submodule(name.removeprefix(f"{unit_name}.")[:-2]), AdaptedLinear
        ):
            if parameter.numel():
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}; merge the adapters before saving")
            continue
        yield name, parameter.detach()
