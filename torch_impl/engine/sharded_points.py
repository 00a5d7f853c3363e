"""The state of training, sharded or not, on disk by PyTorch's distributed checkpoint: written by N processes, read by M.

What is written changes during a run: the masked base weights of the projections, the adapters, the optimizer's moments.
All else comes from the model folder. The files are safetensors; state.json names them with their hashes and is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torch_impl.engine import distributed
from torch_impl.engine.layers import AdaptedLinear

STATE = "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """The state by name: NAME.weight (sharded if the model is), NAME.A, NAME.B, and NAME.A.exp_avg and so on of AdamW."""
    state = {}
    for name, layer in _layers(model).items():
        state[f"{name}.weight"] = layer.weight.detach()
        for which, parameter in (("A", layer.A), ("B", layer.B)):
            if not parameter.numel():
                continue
            state[f"{name}.{which}"] = parameter.detach()
            moments = optimizer.state.get(parameter, {}) if optimizer is not None else {}
            state |= {f"{name}.{which}.{moment}": moments[moment] for moment in MOMENTS if moment in moments}
    return state


@contextmanager
def _alone() -> Iterator[None]:
    """PyTorch warns that there is one process, also if told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, facts: dict[str, Any]) -> None:
    """Write a point to go on from; `facts` are plain values for JSON. The folder appears when it is complete."""
    partial = folder.parent / f".{folder.name}.partial"
    if distributed.leads():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.agreed_text("the folder is there")
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _alone():
        dcp.save(tensors_of(model, optimizer), storage_writer=writer, no_dist=distributed.processes() == 1)
    distributed.total_of(0.0)  # all have written
    if distributed.leads():
        hashes = {file.name: _hash(file) for file in sorted(partial.glob("*.safetensors"))}
        for file in partial.glob("*.safetensors"):
            _to_disk(file)
        state = {"facts": facts, "processes": distributed.processes(), "sha256": hashes}
        (partial / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _to_disk(partial / STATE)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _to_disk(folder.parent)
    distributed.agreed_text("the point is there")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a point's state into a model with adapters attached, of any ranks, on any number of processes. Returns the facts.

    An optimizer gets the moments of the point; it must be made after a first call without it, since adapters change.
    Errors: ValueError naming the file that is missing or is not what was written.
    """
    facts = _checked_facts(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    sizes = {name: entry.size for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    for name, layer in _layers(model).items():
        rank = sizes[f"{name}.A"][0] if f"{name}.A" in sizes else 0
        if layer.rank != rank:
            layer.resize(0, ())
            layer.resize(rank, (0,))
    if optimizer is not None:
        _make_moments(model, optimizer, sizes)
    state = tensors_of(model, optimizer)
    lacking = state.keys() ^ sizes.keys() if optimizer is not None else state.keys() - sizes.keys()
    if lacking:
        raise ValueError(f"point {folder} and model part at {sorted(lacking)[0]}; allowed: a point of this model")
    with _alone():
        dcp.load(state, storage_reader=reader, no_dist=distributed.processes() == 1)
    return facts


def _make_moments(model: nn.Module, optimizer: torch.optim.Optimizer, sizes: dict[str, Any]) -> None:
    for name, layer in _layers(model).items():
        for which, parameter in (("A", layer.A), ("B", layer.B)):
            if f"{name}.{which}.step" in sizes:
                moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS[1:]}
                # AdamW counts on the CPU, or beside the parameter if it is fused.
                place = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
                optimizer.state[parameter] = {"step": torch.zeros((), device=place), **moments}


def _checked_facts(folder: Path) -> dict[str, Any]:
    """The facts of a point whose files are those that were written; process 0 looks, all hear."""
    found = ""
    if distributed.leads():
        found = _look(folder)
    verdict: dict[str, Any] = json.loads(distributed.agreed_text(found))
    if "wrong" in verdict:
        raise ValueError(verdict["wrong"])
    facts: dict[str, Any] = verdict["facts"]
    return facts


def _look(folder: Path) -> str:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _hash(folder / name) != expected:
                return json.dumps({"wrong": f"point {folder}: {name} is not what was written; its hash differs"})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return json.dumps({"wrong": f"point {folder} is not complete: {error}"})
    return json.dumps({"facts": state["facts"]})


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
