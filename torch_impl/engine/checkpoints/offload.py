"""Load decoder blocks from disk one at a time, for models larger than memory.

Only the weights outside the blocks (embeddings, norm, head) are in memory; the blocks are empty. A sweep yields each block
with its weights. Meanwhile a thread reads the next block. On CUDA it copies through pinned memory on its own CUDA stream,
so that reading and copying overlap with the computation.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine.checkpoints.contents import check_finite, find
from torch_impl.engine.checkpoints.safetensors_files import Shards
from torch_impl.engine.checkpoints.skeleton import Checkpoint, lay_out
from torch_impl.engine.decoder import Decoder

Names = dict[str, str]


@dataclass
class _Loaded:
    """The tensors of a block on the device; ready: the CUDA event that marks the end of the copy."""

    tensors: dict[str, torch.Tensor]
    ready: torch.cuda.Event | None = None


@dataclass
class BlockReader:
    """Reads the tensors of one block. names[index]: name inside the block → name in the checkpoint."""

    shards: Shards
    names: Sequence[Names]
    device: torch.device
    dtype: torch.dtype
    _staging: torch.Tensor | None = field(default=None, init=False)
    _side: torch.cuda.Stream | None = field(default=None, init=False)

    def bytes_of(self, index: int) -> int:
        """Return the size of a block in bytes, in the dtype of the run."""
        shapes = [self.shards.entries[name].shape for name in self.names[index].values()]
        return sum(torch.Size(shape).numel() for shape in shapes) * self.dtype.itemsize

    def load(self, index: int) -> _Loaded:
        """Load the tensors of block `index`; on CUDA the copy may still be running."""
        names = self.names[index]
        shapes = {name: self.shards.entries[full].shape for name, full in names.items()}
        if self.device.type != "cuda":
            tensors = {name: torch.empty(shape, dtype=self.dtype) for name, shape in shapes.items()}
            self.shards.read_into({names[name]: tensor for name, tensor in tensors.items()})
            return _Loaded(tensors)
        return self._load_to_cuda(names, shapes)

    def _load_to_cuda(self, names: Names, shapes: dict[str, tuple[int, ...]]) -> _Loaded:
        if self._staging is None:
            largest = max(self.bytes_of(index) for index in range(len(self.names)))
            self._staging = torch.empty(largest // self.dtype.itemsize, dtype=self.dtype, pin_memory=True)
            self._side = torch.cuda.Stream(self.device)
        assert self._side is not None
        # Wait until the previous block is copied out of the staging memory before filling it again.
        self._side.synchronize()
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        pieces = self._staging[: sum(sizes)].split(sizes)
        staged = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        self.shards.read_into({names[name]: tensor for name, tensor in staged.items()})
        with torch.cuda.stream(self._side):
            tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in staged.items()}
            ready = torch.cuda.Event()
            ready.record(self._side)
        return _Loaded(tensors, ready)


class OffloadedModules(nn.ModuleList):
    """Decoder blocks without weights, and the reader of their weights."""

    def __init__(self, blocks: Sequence[nn.Module], reader: BlockReader | None = None) -> None:
        super().__init__(blocks)
        self.reader = reader

    def sweep(self, backward: bool = False, keep: int = 1) -> Iterator[nn.Module]:
        """Yield each block with its weights on the device, and read the next one meanwhile; see the function `sweep`."""
        assert self.reader is not None
        order = range(len(self))[::-1] if backward else range(len(self))
        kept: deque[nn.Module] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="read ahead") as ahead:
            coming: Future[_Loaded] | None = ahead.submit(self.reader.load, order[0])
            for place, index in enumerate(order):
                assert coming is not None
                loaded = coming.result()
                following = order[place + 1 : place + 2]
                coming = ahead.submit(self.reader.load, following[0]) if following else None
                block = _filled(self[index], loaded, self.reader.device)
                del loaded
                yield block
                kept.append(block)
                if len(kept) == keep:
                    free(kept.popleft())


def free(block: nn.Module) -> None:
    """Free the weights of a block even if somebody still holds it."""
    for parameter in block.parameters():
        parameter.data = parameter.data.new_empty(0)


def _filled(skeleton: nn.Module, loaded: _Loaded, device: torch.device) -> nn.Module:
    """Copy an empty block and fill it with weights."""
    block = copy.deepcopy(skeleton)
    if loaded.ready is not None:
        current = torch.cuda.current_stream(device)
        current.wait_event(loaded.ready)
        for tensor in loaded.tensors.values():
            tensor.record_stream(current)
    # strict=False: computed buffers are in the empty block, not in the files.
    block.load_state_dict(loaded.tensors, assign=True, strict=False)
    if skeleton._compiled_call_impl is not None:
        block.compile()
    return block.to(device).requires_grad_(False).eval()


def sweep(decoder: Decoder, backward: bool = False, keep: int = 1) -> Iterator[nn.Module]:
    """Yield the decoder blocks in order, from memory or disk. A block has its weights until `keep` more are requested.

    backward: the last block first.
    """
    blocks = decoder.blocks
    if not isinstance(blocks, OffloadedModules):
        yield from reversed(blocks) if backward else blocks
        return
    # Close the sweep here, so that stopping early also stops the reader thread.
    with closing(blocks.sweep(backward, keep)) as found:  # type: ignore[type-var]
        yield from found


def reader_of(decoder: Decoder) -> BlockReader:
    """Return the reader of an offloaded model's blocks."""
    blocks = decoder.blocks
    assert isinstance(blocks, OffloadedModules)
    assert blocks.reader is not None
    return blocks.reader


def open_offloaded(
    folder: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Open the model of a folder and leave its blocks on disk. dtype: None for the checkpoint's own.

    Errors: as `skeleton.describe`; ValueError if a weight outside the blocks is NaN or infinite.
    """
    files = find(folder)
    found = lay_out(folder, files.entries, trust_remote_code, dtype)
    model = found.model.requires_grad_(False)
    decoder = Decoder(model)
    names: list[Names] = []
    for index, block in enumerate(decoder.blocks):
        inside = ((name, decoder.full_name(index, name)) for name in block.state_dict())
        names.append({name: found.names[full] for name, full in inside if full in found.names})
    reader = BlockReader(Shards(files), names, device, model.dtype)
    model.set_submodule(decoder.family.blocks, OffloadedModules(list(decoder.blocks), reader))
    _fill_outside(found, decoder, reader)
    return model


def _fill_outside(found: Checkpoint, decoder: Decoder, reader: BlockReader) -> None:
    """Load the weights outside the blocks and tie weights that the checkpoint stores once."""
    model = found.model
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name.startswith(f"{decoder.family.blocks}.") or name in found.tied:
            continue
        value = tensor
        if name in found.names:
            value = reader.shards.read(found.names[name], reader.dtype)
            check_finite([(name, value)], found.folder)
        set_module_tensor_to_device(model, name, reader.device, value=value, dtype=value.dtype)
    found.tie(model)
    model.requires_grad_(False)
