"""One run in several processes, one per GPU: `torchrun --nproc_per_node N -m torch_impl.run ...`.

All base weights are sharded by rows with PyTorch's FSDP2. The adapters are replicated: they are small and change their rank.
Sequences are split over the processes, statistics and gradients are summed, and process 0 decides where all must agree. With
one process, every function here does nothing or returns its argument, so callers need no special case.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from torch_impl import adapter
from torch_impl.engine.adapted_linear import AdaptedLinear, adapters, block_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family

# How long a process waits for another one. If a process dies, the launcher ends all; this limit is for one that hangs. The
# longest wait in a healthy run is for process 0 to write a block, or for a process to prune its share.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")
Fetch = Callable[[str], torch.Tensor]


def processes() -> int:
    """Return the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_index() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this process writes files and prints."""
    return process_index() == 0


def launched() -> int:
    """Return the number of processes started by torchrun or accelerate; 1 without them.

    Errors: ValueError if WORLD_SIZE in the environment is not a positive number.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(
            f"WORLD_SIZE in the environment is {size!r}; torchrun sets it, so unset it for a single process"
        )
    return int(size)


def own_device(name: str) -> str:
    """Return the device of this process. With several processes, auto and cuda mean the GPU of its local number.

    Errors: ValueError if there are fewer GPUs than processes.
    """
    if launched() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    here, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if name not in ("auto", "cuda"):
        raise ValueError(f"device is {name!r}; allowed with several processes: auto, cuda (one GPU each), cpu")
    if here >= cards:
        raise ValueError(
            f"process {here} has no GPU: this machine has {cards}; start one process per GPU, or use --device cpu"
        )
    return f"cuda:{here}"


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of torchrun or accelerate within this context, unless already joined.

    NCCL communicates GPU tensors, gloo CPU tensors.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_sequences(ids: torch.Tensor, name: str) -> torch.Tensor:
    """Return this process's share of the sequences (n, tokens): about n / processes consecutive ones.

    Errors: ValueError with the option's `name` if there are fewer sequences than processes.
    """
    if len(ids) < processes():
        raise ValueError(f"{name} is {len(ids)}; allowed: {processes()} or more with {processes()} processes")
    return ids.tensor_split(processes())[process_index()]


def first_own_index(count: int) -> int:
    """Return the number of this process's first sequence, given that its share has `count` sequences."""
    counts = torch.zeros(processes(), dtype=torch.float64)
    counts[process_index()] = count
    return int(all_reduce(counts)[: process_index()].sum())


def split_evenly(items: Sequence[T], filler: Callable[[T], T]) -> list[T]:
    """Return every N-th item, starting at this process's number; pad with filler(first item) to equal lengths.

    Every micro-batch gathers the weights of all blocks, so all processes need the same number of micro-batches.
    """
    if processes() == 1:
        return list(items)
    own = list(items[process_index() :: processes()])
    return own + [filler(items[0])] * (math.ceil(len(items) / processes()) - len(own))


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place if possible; all get the same bits."""
    if processes() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def all_reduce_number(value: float) -> float:
    """Sum a number over the processes, in float64."""
    return float(all_reduce(torch.tensor(value, dtype=torch.float64)))


def broadcast(values: torch.Tensor) -> torch.Tensor:
    """Broadcast the values of process 0. Use it for decisions, because another GPU may round differently."""
    if processes() > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def broadcast_text(text: str) -> str:
    """Broadcast the text of process 0."""
    texts = [text]
    if processes() > 1:
        dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
    return texts[0]


def owns(item: int) -> bool:
    """Return whether this process is the owner of `item` and computes it; the others `broadcast_from_owner` its result."""
    return item % processes() == process_index()


def broadcast_from_owner(values: torch.Tensor, item: int) -> None:
    """Broadcast `values` (contiguous, in place) from the owner of `item`."""
    if processes() > 1:
        dist.broadcast(values, src=item % processes())


@torch.no_grad()
def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over the processes in one all-reduce."""
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def exchange_columns(features: torch.Tensor) -> torch.Tensor:
    """Exchange rows for columns: from (n / N, d), a share of the rows, to (n, d / N), a share of the columns.

    Rows stay in the order of the processes. Each number is sent once, N times less than gathering everything everywhere.
    """
    if processes() == 1:
        return features
    counts = torch.zeros(processes(), dtype=torch.int64)
    counts[process_index()] = len(features)
    rows = all_reduce(counts).tolist()
    columns = [part.shape[1] for part in features[:1].tensor_split(processes(), dim=1)]
    outgoing = torch.cat([part.flatten() for part in features.tensor_split(processes(), dim=1)])
    own = columns[process_index()]
    incoming = outgoing.new_empty(sum(rows) * own)
    # Send bytes, because gloo does not support every dtype.
    width = features.element_size()
    dist.all_to_all_single(
        incoming.view(torch.uint8),
        outgoing.view(torch.uint8),
        [count * own * width for count in rows],
        [len(features) * count * width for count in columns],
    )
    return incoming.view(sum(rows), own)


def own_rows(rows: int) -> slice:
    """Return which of `rows` rows of a sharded tensor this process has; FSDP2 splits like torch.chunk."""
    most = math.ceil(rows / processes())
    return slice(min(process_index() * most, rows), min((process_index() + 1) * most, rows))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a tensor; all rows if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return all rows of a tensor; gather them if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model is sharded."""
    return isinstance(model, FSDPModule)


def shard(decoder: Decoder, device: torch.device, fetch: Fetch | None = None) -> None:
    """Shard all frozen parameters by rows, block by block; adapters stay replicated.

    fetch(name): loads the whole tensor of a parameter on the meta device; then no process holds more than one whole block.
    With one process and no `fetch`, or if the model is already sharded, nothing happens.
    """
    model = decoder.model
    if is_sharded(model) or (processes() == 1 and fetch is None):
        return
    filled: dict[int, nn.Parameter] = {}
    mesh = init_device_mesh(device.type, (processes(),)) if processes() > 1 else None
    units: list[tuple[str, nn.Module]] = [(decoder.full_name(i), block) for i, block in enumerate(decoder.blocks)]
    for name, unit in [*units, ("", model)]:
        if fetch is not None:
            _fill(unit, name, device, fetch, filled)
        if mesh is not None:
            kept = {parameter for layer in adapters(model) for parameter in (layer.A, layer.B)}
            # Reshard the outermost unit too, so that all weights are sharded outside a forward pass.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    if mesh is not None:
        # FSDP2 takes the first module that runs as the root. After this pass, a block may run on its own.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


def _fill(unit: nn.Module, unit_name: str, device: torch.device, fetch: Fetch, filled: dict[int, nn.Parameter]) -> None:
    """Load the parameters of `unit` that are on the meta device, and move the unit to `device`."""
    for place, module in unit.named_modules(prefix=unit_name):
        if isinstance(module, FSDPModule):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) not in filled:
                full_name = f"{place}.{name}" if place else name
                values = fetch(full_name) if parameter.numel() else torch.empty(parameter.shape)
                filled[id(parameter)] = nn.Parameter(
                    values.to(device, parameter.dtype), requires_grad=parameter.requires_grad
                )
                # Keep the meta tensor alive, so that no other tensor gets its id.
                filled[id(parameter)].stood_in_for = parameter  # type: ignore[attr-defined]
            if parameter.is_meta:
                module.register_parameter(name, filled[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)


_UNSHARDED: set[nn.Module] = set()
"""Units that are gathered now."""


@contextmanager
def unsharded(*units: nn.Module) -> Iterator[None]:
    """Gather the parameters of sharded units within this context. A unit is a block, or the model for all other weights.

    They are gathered once for any number of passes; units that are already gathered stay so. In-place changes are lost; use
    `unsharded_with_writeback` to keep them.
    """
    sharded = [unit for unit in units if isinstance(unit, FSDPModule) and unit not in _UNSHARDED]
    try:
        for unit in sharded:
            _UNSHARDED.add(unit)
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for unit in sharded:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
            _UNSHARDED.discard(unit)


@contextmanager
def unsharded_with_writeback(block: nn.Module, family: Family) -> Iterator[None]:
    """Gather one block within this context and keep in-place changes of its projections, equal in all processes."""
    layers = list(block_adapters(block, family).values())
    with unsharded(block):
        yield
        rows = [layer.weight.detach()[own_rows(len(layer.weight))].clone() for layer in layers]
    if isinstance(block, FSDPModule):
        with torch.no_grad():
            for layer, part in zip(layers, rows, strict=True):
                local(layer.weight).copy_(part)


@torch.no_grad()
def merge_rows(layer: AdaptedLinear) -> torch.Tensor:
    """Merge the adapter of a sharded layer in place. Return the mask of this process's rows.

    A row of the result needs only the same row of W, M and B, and all of A. So nothing is communicated.
    """
    weight, here = local(layer.weight), own_rows(layer.out_features)
    mask = weight != 0
    if layer.rank and len(weight):
        weight.copy_(adapter.merge(weight, layer.A, layer.B[here].contiguous(), layer.scale))
    layer.resize(0, ())
    return mask
