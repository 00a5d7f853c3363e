"""One run in several processes, one per GPU or CPU share: `torchrun --nproc_per_node N -m torch_impl.run ...`.

The base weights of every decoder block, and what lies outside the blocks, are sharded by rows (PyTorch's FSDP2); the
adapters, small and of changing rank, are the same in every process. Sequences are dealt out, statistics and gradients
are summed, and one process decides where all must agree. Every function here does nothing, or hands its argument back,
where there is only one process: the code that calls them reads the same either way.
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
from torch_impl.engine.families import Family, decoder_blocks

# How long a process waits for another that does not answer. The launcher ends all when one dies; this is for one that
# hangs. The longest silence of a healthy run is process 0 writing the tensors of a block, or one that prunes its share.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")
Fetch = Callable[[str], torch.Tensor]


def processes() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Whether this process is the one that writes and prints."""
    return number() == 0


def launched() -> int:
    """Number of processes that torchrun or accelerate has started for this run; 1 if neither has.

    Errors: ValueError if the environment's WORLD_SIZE is no such number.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(
            f"WORLD_SIZE is {size!r} in the environment; torchrun sets it, so unset it for a single process"
        )
    return int(size)


def own_device(name: str) -> str:
    """The device that an option asks for, of this process: with several, auto and cuda are the GPU of its number.

    Errors: ValueError if a process has no GPU of its own.
    """
    if launched() == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    here, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if name not in ("auto", "cuda"):
        raise ValueError(f"device is {name!r}; allowed with several processes: auto, cuda (one GPU each), cpu")
    if here >= cards:
        raise ValueError(f"device is {name!r} and process {here} of this machine finds {cards} GPUs; allowed: one each")
    return f"cuda:{here}"


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Find the other processes that torchrun or accelerate has started; leave them when done.

    NCCL carries what lies on a GPU, gloo what lies on the CPU. Who has joined already stays.
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


def share(ids: torch.Tensor, name: str) -> torch.Tensor:
    """The sequences (n, tokens) that are this process's: runs of n / processes, or one more.

    Errors: ValueError with the option's `name` if there are fewer sequences than processes.
    """
    if len(ids) < processes():
        raise ValueError(f"{name} is {len(ids)}; allowed with {processes()} processes: {processes()} or more")
    return ids.tensor_split(processes())[number()]


def first_here(count: int) -> int:
    """Number of this process's first sequence, where it has `count` of those that `share` has spread."""
    counts = torch.zeros(processes(), dtype=torch.float64)
    counts[number()] = count
    return int(total(counts)[: number()].sum())


def deal(items: Sequence[T], filler: Callable[[T], T]) -> list[T]:
    """Every N-th item, from this process's number on; all processes get equally many, made up with filler(first item).

    Every micro-batch gathers the weights of all blocks, so no process may have fewer of them than another.
    """
    if processes() == 1:
        return list(items)
    own = list(items[number() :: processes()])
    return own + [filler(items[0])] * (math.ceil(len(items) / processes()) - len(own))


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place where it can be; the same bits everywhere."""
    if processes() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def total_of(value: float) -> float:
    """Sum of a number over the processes, in float64."""
    return float(total(torch.tensor(value, dtype=torch.float64)))


def agreed(values: torch.Tensor) -> torch.Tensor:
    """What process 0 has: a decision hangs on it, and the same formula may round differently on another card."""
    if processes() > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def agreed_text(text: str) -> str:
    """What process 0 says."""
    texts = [text]
    if processes() > 1:
        dist.broadcast_object_list(texts, src=0, device=torch.device("cpu"))
    return texts[0]


def decides(item: int) -> bool:
    """Whether it is this process's turn to decide on item number `item`; the others `take` what it found."""
    return item % processes() == number()


def take(values: torch.Tensor, item: int) -> None:
    """Put into `values`, contiguous, what the process that decides on `item` has there."""
    if processes() > 1:
        dist.broadcast(values, src=item % processes())


@torch.no_grad()
def total_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over the processes, all in one message."""
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def exchange_columns(features: torch.Tensor) -> torch.Tensor:
    """From a share of the rows (n / N, d) with all columns to all rows (n, d / N) with a share of the columns.

    Rows stay in the order of the processes. Each number travels once: N times less than if all gathered everything.
    """
    if processes() == 1:
        return features
    counts = torch.zeros(processes(), dtype=torch.int64)
    counts[number()] = len(features)
    rows = total(counts).tolist()
    columns = [part.shape[1] for part in features[:1].tensor_split(processes(), dim=1)]
    outgoing = torch.cat([part.flatten() for part in features.tensor_split(processes(), dim=1)])
    own = columns[number()]
    incoming = outgoing.new_empty(sum(rows) * own)
    # As bytes: gloo does not move every dtype.
    width = features.element_size()
    dist.all_to_all_single(
        incoming.view(torch.uint8),
        outgoing.view(torch.uint8),
        [count * own * width for count in rows],
        [len(features) * count * width for count in columns],
    )
    return incoming.view(sum(rows), own)


def rows_here(rows: int) -> slice:
    """Which of so many rows of a sharded tensor are this process's: FSDP2 cuts as torch.chunk does."""
    most = math.ceil(rows / processes())
    return slice(min(number() * most, rows), min((number() + 1) * most, rows))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a tensor that are here; all of them if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, family: Family, device: torch.device, fetch: Fetch | None = None) -> None:
    """Leave every process only its rows of all frozen parameters, block by block; adapters stay whole.

    fetch(name): the whole tensor of a parameter that is still on the meta device; with it no process ever holds more
    than one block. Nothing happens if there is one process and nothing to fetch, or if the model is sharded already.
    """
    if is_sharded(model) or (processes() == 1 and fetch is None):
        return
    filled: dict[int, nn.Parameter] = {}
    mesh = init_device_mesh(device.type, (processes(),)) if processes() > 1 else None
    units = [(f"{family.blocks}.{index}.", block) for index, block in enumerate(decoder_blocks(model, family))]
    for prefix, unit in [*units, ("", model)]:
        if fetch is not None:
            _fill(unit, prefix, device, fetch, filled)
        if mesh is not None:
            kept = {parameter for layer in adapters(model) for parameter in (layer.A, layer.B)}
            # The outermost unit too: what is outside a pass is sharded, always.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    if mesh is not None:
        # FSDP2 takes the first module that runs for the outermost one; afterwards a block may run on its own.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


def _fill(unit: nn.Module, prefix: str, device: torch.device, fetch: Fetch, filled: dict[int, nn.Parameter]) -> None:
    """Give the parameters of `unit` that are on the meta device their values, and put all of it on `device`."""
    for place, module in unit.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, FSDPModule):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) not in filled:
                full_name = f"{place}.{name}" if place else name
                values = fetch(full_name) if parameter.numel() else torch.empty(parameter.shape)
                filled[id(parameter)] = nn.Parameter(
                    values.to(device, parameter.dtype), requires_grad=parameter.requires_grad
                )
                # Keeps the meta tensor alive, so that no other takes its identity.
                filled[id(parameter)].stood_in_for = parameter  # type: ignore[attr-defined]
            if parameter.is_meta:
                module.register_parameter(name, filled[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)


_WHOLE: set[nn.Module] = set()
"""Units that are whole now."""


@contextmanager
def whole(*units: nn.Module) -> Iterator[None]:
    """Let sharded units (blocks, or the model for what lies outside its blocks) have whole, plain parameters.

    They are gathered once for any number of passes; a unit that is whole already stays so. Changes made to them in place
    are lost; see `keeping`.
    """
    sharded = [unit for unit in units if isinstance(unit, FSDPModule) and unit not in _WHOLE]
    try:
        for unit in sharded:
            _WHOLE.add(unit)
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for unit in sharded:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
            _WHOLE.discard(unit)


@contextmanager
def keeping(block: nn.Module, family: Family) -> Iterator[None]:
    """`whole` for one block whose projections get new weights in place, the same in every process: these are kept."""
    layers = list(block_adapters(block, family).values())
    with whole(block):
        yield
        rows = [layer.weight.detach()[rows_here(len(layer.weight))].clone() for layer in layers]
    if isinstance(block, FSDPModule):
        with torch.no_grad():
            for layer, part in zip(layers, rows, strict=True):
                local(layer.weight).copy_(part)


@torch.no_grad()
def merge_rows(layer: AdaptedLinear) -> torch.Tensor:
    """Put M⊙(W + s·BA) in the place of a sharded layer's base and drop the adapter. Returns the mask of the rows here.

    A row of the result needs the same row of W, M and B, and all of A: nothing travels, no process holds more.
    """
    weight, here = local(layer.weight), rows_here(layer.out_features)
    mask = weight != 0
    if layer.rank and len(weight):
        weight.copy_(adapter.merge(weight, layer.A, layer.B[here].contiguous(), layer.scale))
    layer.resize(0, ())
    return mask
