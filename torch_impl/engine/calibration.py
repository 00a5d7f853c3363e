"""Calibration: run hidden states through the model block by block, one batch of sequences at a time.

A stream is one tensor with the hidden states of all sequences at the current block; each block overwrites it. Earlier
hidden states are not kept. The statistics computed from them (Gram matrices, input norms, Hessians, errors) are accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torch_impl import _checks
from torch_impl.engine import distributed, finite
from torch_impl.engine.adapted_linear import AdaptedLinear
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family

WORTH_COMPILING = 10**9
RMI_SAMPLES = 64


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration data of a run."""

    nsamples: int = 128
    """Number of calibration sequences (paper: 128)."""
    seqlen: int = 2048
    """Tokens per calibration sequence (paper: 2048)."""
    written_per_sample: int = 0
    """Further calibration sequences for each of nsamples, which the dense model writes itself: it continues pieces of the
    calibration text. Helps reconstruction where there is no more text."""
    rmi_samples: int | None = None
    """Calibration sequences that measure the importance of blocks for layer_sparsity (paper: 64, 32 for 13B); default: 64, or
    all if fewer."""
    calibration_batch_size: int = 16
    """Sequences that go through a block at once: more is faster and needs more memory. It does not change the result."""

    def __post_init__(self) -> None:
        _checks.count("nsamples", self.nsamples, 2)
        _checks.count("written_per_sample", self.written_per_sample, 0)
        _checks.count("seqlen", self.seqlen, 2 if self.written_per_sample else 1)
        _checks.count("calibration_batch_size", self.calibration_batch_size)
        if self.rmi_samples is not None:
            _checks.integer("rmi_samples", self.rmi_samples, 2)
            if self.rmi_samples > self.nsamples:
                raise ValueError(f"rmi_samples is {self.rmi_samples}; allowed: up to nsamples {self.nsamples}")

    @property
    def sequences(self) -> int:
        """Return the number of calibration sequences, of the text and written."""
        return self.nsamples + self.written

    @property
    def written(self) -> int:
        """Return the number of calibration sequences that the dense model writes."""
        return self.nsamples * self.written_per_sample

    @property
    def rmi_rows(self) -> int:
        """Return the number of calibration sequences that measure the importance of blocks."""
        return min(RMI_SAMPLES, self.nsamples) if self.rmi_samples is None else self.rmi_samples


@dataclass
class Stream:
    """Hidden states (sequences, tokens, hidden) at the current block, and the arguments of each block.

    arguments[batch][block] are the keyword arguments that the model passes to that block (rotary embeddings, attention
    masks, ...). They are recorded once, so no family needs its own forward. The states are on `device`, where the blocks
    are, or in pinned host memory; then one batch at a time is copied to the device and back.
    """

    hidden: torch.Tensor
    arguments: list[list[dict[str, Any]]]
    batch_size: int
    device: torch.device
    family: Family
    """Names the blocks in messages."""
    ids: torch.Tensor
    """The token ids (sequences, tokens) that the stream began with."""

    def clone(self) -> Stream:
        """Copy the stream with its hidden states."""
        hidden = torch.empty_like(self.hidden, pin_memory=self.hidden.is_pinned()).copy_(self.hidden)
        return replace(self, hidden=hidden)

    def batches(self) -> Iterator[tuple[int, slice]]:
        """Yield (index, sequences) of each batch."""
        for index, start in enumerate(range(0, len(self.hidden), self.batch_size)):
            yield index, slice(start, start + self.batch_size)

    def states(self, rows: slice) -> torch.Tensor:
        """Return the hidden states of some sequences, on the device."""
        return self.hidden[rows].to(self.device, non_blocking=True)

    def forward(self, block: nn.Module, index: int, batch: int, rows: slice) -> torch.Tensor:
        """Compute the output of decoder block `index` for one batch; the stream does not change."""
        output = block(self.states(rows), **self.arguments[batch][index])
        # Blocks of transformers 5 return a tensor, older ones a tuple that starts with it.
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def run_for_inputs(self, block: nn.Module, index: int, batch: int, rows: slice) -> None:
        """Run one batch through the block only to observe its projections' inputs; stop after the last input."""
        with suppress(_SeenAll):
            self.forward(block, index, batch, rows)

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states with the block's output. Errors: finite.NotFiniteError if it is not finite."""
        found = torch.zeros((), device=self.device)
        for batch, rows in self.batches():
            output = self.forward(block, index, batch, rows)
            found = found + finite.total(output)
            # Copies to the host and back use one CUDA stream, so they keep their order.
            self.hidden[rows].copy_(output, non_blocking=True)
        finite.check(found, f"output of {self.family.full_name(index)}", self.hidden.dtype)
        if self.hidden.is_pinned():
            # Wait for the last copies, so that the host memory can be read directly.
            torch.cuda.current_stream(self.device).synchronize()


@contextmanager
def override_forwards(
    blocks: nn.ModuleList, answer: Callable[[int, torch.Tensor, dict[str, Any]], torch.Tensor]
) -> Iterator[None]:
    """Replace every block's forward with `answer(index, hidden states, other arguments)` within this context."""

    def stand_in(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            return answer(index, hidden_states, arguments)

        return forward

    compiled_calls = [block._compiled_call_impl for block in blocks]
    try:
        for index, block in enumerate(blocks):
            # Replace the whole call including hooks, so that a sharded block is not gathered.
            block._compiled_call_impl = stand_in(index)
        yield
    finally:
        for block, call in zip(blocks, compiled_calls, strict=True):
            block._compiled_call_impl = call


@torch.no_grad()
def start_stream(decoder: Decoder, ids: torch.Tensor, batch_size: int, on_host: bool = False) -> Stream:
    """Embed token ids (sequences, tokens) and record the arguments of every block. The blocks need no weights.

    on_host: keep the hidden states in host memory. The blocks still compute on the model's device.
    """
    model = decoder.model
    device = next(model.parameters()).device
    hidden: list[torch.Tensor] = []
    arguments: list[list[dict[str, Any]]] = []

    def record(index: int, states: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        if index == 0:
            if not hidden:
                shape = (len(ids), *states.shape[1:])
                place = {"device": "cpu", "pin_memory": states.is_cuda} if on_host else {"device": states.device}
                hidden.append(torch.empty(shape, dtype=states.dtype, **place))  # type: ignore[arg-type]
            hidden[0][len(arguments) * batch_size :][: len(states)].copy_(states)
            arguments.append([])
        arguments[-1].append(given)
        return states

    with distributed.unsharded(model), override_forwards(decoder.blocks, record):
        for rows in ids.split(batch_size):
            decoder.body(input_ids=rows.to(device), use_cache=False)
    return Stream(hidden[0], arguments, batch_size, device, decoder.family, ids)


@torch.no_grad()
def block_arguments(decoder: Decoder, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Record the arguments of every block for token ids (n, t), besides the hidden states.

    Arguments for one sequence are valid for any number of sequences, because no row is padded.
    """
    found: list[dict[str, Any]] = []

    def record(index: int, states: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        found.append(given)
        return states

    model = decoder.model
    with distributed.unsharded(model), override_forwards(decoder.blocks, record):
        decoder.body(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    return found


def finish(decoder: Decoder, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Compute logits (n, t, vocabulary) of token ids (n, t) from the last block's output, by the model's norm and head.

    Differentiable by `hidden`. The weights outside the blocks must be gathered.
    """
    blocks = decoder.blocks
    last = len(blocks) - 1
    with override_forwards(blocks, lambda index, states, _: hidden if index == last else states):
        # Without the hooks of a sharded model, whose gathered weights no backward pass then frees.
        logits: torch.Tensor = decoder.model.forward(input_ids=ids.to(hidden.device), use_cache=False).logits
    return logits


class _SeenAll(Exception):  # noqa: N818 - it ends a forward pass and is not an error
    """All inputs have been observed; the rest of the block is not needed."""


@contextmanager
def input_hooks(
    layers: Mapping[str, AdaptedLinear], groups: Sequence[tuple[str, ...]], watch: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Report the input (tokens, in) of the first projection of each group; the others in the group have the same input.

    Groups are in order of use, so a forward pass ends with `_SeenAll` at the last group.
    """

    def watcher(name: str) -> Callable[[torch.Tensor], None]:
        def report(x: torch.Tensor) -> None:
            watch(name, x.detach().reshape(-1, x.shape[-1]))
            if name == groups[-1][0]:
                raise _SeenAll

        return report

    first = [group[0] for group in groups]
    try:
        for name in first:
            layers[name].input_hook = watcher(name)
        yield
    finally:
        for name in first:
            layers[name].input_hook = None


def compiles(wanted: str, prunable: int, device: torch.device) -> bool:
    """Return whether to compile the blocks. wanted: on, off or auto (on CUDA, from a billion prunable weights).

    Compiling takes about ten seconds.
    """
    return wanted == "on" or (wanted == "auto" and prunable >= WORTH_COMPILING and device.type == "cuda")


@contextmanager
def compiled(decoders: Sequence[Decoder], wanted: str) -> Iterator[None]:
    """Compile the blocks with torch.compile within this context, if `compiles` says so."""
    if not compiles(wanted, sum(decoders[0].prunable_weights), next(decoders[0].model.parameters()).device):
        yield
        return
    blocks = [block for decoder in decoders for block in decoder.blocks]
    # One graph serves blocks of all ranks. The first block (its input has no gradient), rank 1 and each size that changes
    # need one more. The number of graphs does not grow with the number of blocks and stays below this limit.
    graphs = torch._dynamo.config.patch(force_parameter_static_shapes=False, recompile_limit=64)
    # Recompute the inputs of products (outputs of norms and gates) in the backward pass instead of keeping them.
    memory = torch._functorch.config.patch(ban_recompute_materialized_backward=False)
    for block in blocks:
        block.compile()
    try:
        with graphs, memory:
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
