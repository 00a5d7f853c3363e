"""Calibration: hidden states go through the model block by block, a batch of sequences at a time.

One tensor holds the hidden states of all sequences at the current block; each block overwrites it. Features of earlier
blocks are never kept: what a sweep needs of them (Gram matrices, input norms, Hessians, errors) is accumulated.
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
from torch_impl.engine.families import Family, decoder_blocks, prunable_weights

WORTH_COMPILING = 10**9
RMI_SAMPLES = 64


@dataclass(frozen=True)
class CalibrationConfig:
    """What the model is calibrated on."""

    nsamples: int = 128
    """Number of calibration sequences (paper: 128)."""
    seqlen: int = 2048
    """Tokens per calibration sequence (paper: 2048)."""
    rmi_samples: int | None = None
    """How many of them the mutual information between blocks uses (paper: 64, 32 for 13B); default: 64, or all if fewer."""
    calibration_batch_size: int = 16
    """Sequences that go through a block at once: memory against speed, the result is the same."""

    def __post_init__(self) -> None:
        _checks.count("nsamples", self.nsamples, 2)
        _checks.count("seqlen", self.seqlen)
        _checks.count("calibration_batch_size", self.calibration_batch_size)
        if self.rmi_samples is not None:
            _checks.integer("rmi_samples", self.rmi_samples, 2)
            if self.rmi_samples > self.nsamples:
                raise ValueError(f"rmi_samples is {self.rmi_samples}; allowed: up to nsamples {self.nsamples}")

    @property
    def rmi_rows(self) -> int:
        """Calibration sequences that the mutual information uses."""
        return min(RMI_SAMPLES, self.nsamples) if self.rmi_samples is None else self.rmi_samples


@dataclass
class Stream:
    """Hidden states (sequences, tokens, hidden) at the current block, and what each block is called with.

    arguments[batch][block] are the keyword arguments that the model itself gives that block (rotary embeddings,
    attention masks, ...), recorded once, so that no family needs its own forward. The states are kept on `device`,
    where the blocks are, or in page-locked memory of the host, from where a batch at a time goes there and back.
    """

    hidden: torch.Tensor
    arguments: list[list[dict[str, Any]]]
    batch_size: int
    device: torch.device
    blocks: str
    """Path of the list of blocks, for messages."""

    def clone(self) -> Stream:
        """A second stream that starts from the same hidden states."""
        hidden = torch.empty_like(self.hidden, pin_memory=self.hidden.is_pinned()).copy_(self.hidden)
        return replace(self, hidden=hidden)

    def batches(self) -> Iterator[tuple[int, slice]]:
        """(index of the batch, its sequences)."""
        for index, start in enumerate(range(0, len(self.hidden), self.batch_size)):
            yield index, slice(start, start + self.batch_size)

    def states(self, rows: slice) -> torch.Tensor:
        """Hidden states of some sequences, on the device."""
        return self.hidden[rows].to(self.device, non_blocking=True)

    def forward(self, block: nn.Module, index: int, batch: int, rows: slice) -> torch.Tensor:
        """Output of decoder block number `index` for one batch; the stream itself is left as it is."""
        output = block(self.states(rows), **self.arguments[batch][index])
        # transformers 5 gives a tensor; older blocks gave a tuple whose first entry it was.
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def show(self, block: nn.Module, index: int, batch: int, rows: slice) -> None:
        """Let the block see one batch for the sake of whoever watches its inputs; ends as soon as all are seen."""
        with suppress(_SeenAll):
            self.forward(block, index, batch, rows)

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace the hidden states by what the block makes of them. Errors: finite.NotFiniteError if that is not finite."""
        found = torch.zeros((), device=self.device)
        for batch, rows in self.batches():
            output = self.forward(block, index, batch, rows)
            found = found + finite.total(output)
            # Copies to the host and back are queued on one stream of the device, so they keep their order.
            self.hidden[rows].copy_(output, non_blocking=True)
        finite.check(found, f"output of {self.blocks}.{index}", self.hidden.dtype)
        if self.hidden.is_pinned():
            # Whoever reads the host's memory itself must not come before the last copies.
            torch.cuda.current_stream(self.device).synchronize()


@contextmanager
def standing_in(
    blocks: nn.ModuleList, answer: Callable[[int, torch.Tensor, dict[str, Any]], torch.Tensor]
) -> Iterator[None]:
    """Let `answer` give the output of every block, from its number, its input and what else it is called with."""

    def stand_in(index: int) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
            return answer(index, hidden_states, arguments)

        return forward

    compiled_calls = [block._compiled_call_impl for block in blocks]
    try:
        for index, block in enumerate(blocks):
            # In the place of the whole call, hooks included: a sharded block is not gathered for nothing.
            block._compiled_call_impl = stand_in(index)
        yield
    finally:
        for block, call in zip(blocks, compiled_calls, strict=True):
            block._compiled_call_impl = call


@torch.no_grad()
def start_stream(model: nn.Module, family: Family, ids: torch.Tensor, batch_size: int, on_host: bool = False) -> Stream:
    """Embed token ids (sequences, tokens) and record how the model calls its blocks, which need no weights for it.

    on_host: keep the hidden states in memory of the host; the blocks then still compute on the model's device.
    """
    blocks = decoder_blocks(model, family)
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

    decoder = model.get_submodule(family.blocks.rpartition(".")[0])
    with distributed.whole(model), standing_in(blocks, record):
        for rows in ids.split(batch_size):
            decoder(input_ids=rows.to(device), use_cache=False)
    return Stream(hidden[0], arguments, batch_size, device, family.blocks)


@torch.no_grad()
def block_arguments(model: nn.Module, family: Family, ids: torch.Tensor) -> list[dict[str, Any]]:
    """What the model calls each of its blocks with for token ids (n, t), besides the hidden states. Of one sequence, it serves
    any number: no row is padded."""
    found: list[dict[str, Any]] = []

    def record(index: int, states: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        found.append(given)
        return states

    decoder = model.get_submodule(family.blocks.rpartition(".")[0])
    with distributed.whole(model), standing_in(decoder_blocks(model, family), record):
        decoder(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    return found


@torch.no_grad()
def finish(model: nn.Module, family: Family, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, t, vocabulary) of token ids (n, t) from what the last block puts out: the model's norm and head alone."""
    blocks = decoder_blocks(model, family)
    last = len(blocks) - 1
    with standing_in(blocks, lambda index, states, _: hidden if index == last else states):
        logits: torch.Tensor = model(input_ids=ids.to(hidden.device), use_cache=False).logits
    return logits


class _SeenAll(Exception):  # noqa: N818 - it ends a pass, nothing went wrong
    """Every input has been seen; what the block would do after it is not needed."""


@contextmanager
def watching_inputs(
    layers: Mapping[str, AdaptedLinear], groups: Sequence[tuple[str, ...]], watch: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Report the input (tokens, in) of the first projection of each group: the group's others see the same input.

    Groups are in order of use, so a forward pass ends with `_SeenAll` where the last group would be computed.
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
            layers[name].watch = watcher(name)
        yield
    finally:
        for name in first:
            layers[name].watch = None


def compiles(wanted: str, prunable: int, device: torch.device) -> bool:
    """Whether blocks are compiled. wanted: on, off, or auto (on CUDA, from a billion prunable weights: it takes some ten
    seconds)."""
    return wanted == "on" or (wanted == "auto" and prunable >= WORTH_COMPILING and device.type == "cuda")


@contextmanager
def compiled(models: Sequence[nn.Module], family: Family, wanted: str) -> Iterator[None]:
    """Let torch.compile fuse what lies between the projections of every block, for the duration, where `compiles` says so."""
    if not compiles(wanted, sum(prunable_weights(models[0], family)), next(models[0].parameters()).device):
        yield
        return
    blocks = [block for model in models for block in decoder_blocks(model, family)]
    # One graph serves blocks of all ranks. The first block, whose input has no gradient, rank 1, and every size that
    # turns out to change take one more: no more than this, and all the same for any number of blocks.
    graphs = torch._dynamo.config.patch(force_parameter_static_shapes=False, recompile_limit=64)
    # What a product takes in, a norm's output or a gated unit's, is made again in backward from what is kept anyway.
    memory = torch._functorch.config.patch(ban_recompute_materialized_backward=False)
    for block in blocks:
        block.compile()
    try:
        with graphs, memory:
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
