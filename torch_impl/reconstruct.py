"""Train the kept weights of pruned blocks to reproduce the dense block's output. Spec: reference/reconstruct.py."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_impl import _checks


@dataclass(frozen=True)
class Share:
    """The share of the sequences that this process has. By default there is one process with all sequences.

    first: number of its first sequence. total: sums a tensor over all processes, in place if possible.
    """

    first: int = 0
    total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values


Repeat = Callable[[Callable[[], None], Any], Callable[[], None]]
"""(work, all tensors that it uses) → the same work on the same tensors, to be called many times: as a CUDA graph, for example."""


def _as_it_is(work: Callable[[], None], _: Any) -> Callable[[], None]:
    return work


def channel_weights(targets: torch.Tensor) -> torch.Tensor:
    """Compute ω (d,) in float64 from targets D (n, t, d), with e = Σ_tok Σ_c ω_c (S − D)² (LoSA, Eq. 6)."""
    _checks.tensor("targets", targets, "n", "t", "d")
    return _weights_of(_energy(targets, targets.device))


def _energy(targets: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Compute Σ_tok D² (d,) in float64 on a device, one sequence at a time: they may be in host memory."""
    wide = torch.promote_types(targets.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(D.to(device, non_blocking=True), dim=0, dtype=wide) for D in targets]
    return torch.stack(norms).double().square().sum(0) if norms else targets.new_zeros(targets.shape[2], device=device)


def _weights_of(energy: torch.Tensor) -> torch.Tensor:
    return torch.where(energy > 0, 1 / (len(energy) * energy), 0.0)


def reconstruct_block(
    block: nn.Module,
    masks: Mapping[str, torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    arguments: Mapping[str, Any] | None = None,
    rows_at_once: int | None = None,
    share: Share = Share(),
) -> nn.Module:
    """Train the kept weights of a block in place so that its output on `inputs` comes closer to `targets`; return the block.

    block: its projections are modules with a `weight` (out, in) and no adapter. masks: bool (out, in) by the projection's
    name in the block, True = kept. inputs, targets (n, t, d): the pruned stream and the dense block's output, on any device;
    each batch is moved to the block's device. arguments: the other arguments of the block, valid for any number of sequences.
    rows_at_once: sequences of a batch in one forward pass; default all. share: with several processes, the n sequences are
    those of this process, and batch_size counts the sequences of all processes.

    Half-precision weights are trained in float32 and rounded after each step for the forward pass. Training takes 16 bytes
    per weight of this block. Errors: FloatingPointError if a trained weight is not finite; then no weight has changed.
    """
    given = None if arguments is None else [arguments]
    reconstruct_blocks([block], [masks], inputs, targets, epochs, learning_rate, batch_size, given, rows_at_once, share)
    return block


@torch.no_grad()
def reconstruct_blocks(
    blocks: Sequence[nn.Module],
    masks: Sequence[Mapping[str, torch.Tensor]],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    arguments: Sequence[Mapping[str, Any]] | None = None,
    rows_at_once: int | None = None,
    share: Share = Share(),
    repeat: Repeat = _as_it_is,
) -> list[nn.Module]:
    """Train the kept weights of blocks that follow each other, in place and together, for the output of the last.

    masks, arguments: one for each block. inputs: the pruned stream before the first; targets: the dense stream after the last.
    repeat: makes the forward and backward pass of a shape that recurs faster to repeat. All else is as for
    `reconstruct_block`; training takes 16 bytes per weight of all these blocks.
    """
    _checks.tensor("inputs", inputs, "n", "t", "d")
    _checks.same_shape("targets", _checks.tensor("targets", targets, "n", "t", "d"), inputs, "inputs")
    _checks.integer("epochs", epochs, 0)
    _checks.number("learning_rate", learning_rate, 0)
    _checks.integer("batch_size", batch_size, 1)
    if not blocks or len(masks) != len(blocks):
        raise ValueError(
            f"masks has {len(masks)} entries for {len(blocks)} blocks; give one for each of one or more blocks"
        )
    chain = _Chain(blocks, arguments or [{}] * len(blocks))
    device = next(chain.parameters()).device
    omega = _weights_of(share.total(_energy(targets, device)))
    sequences = int(share.total(torch.tensor(len(inputs), dtype=torch.float64, device=device)))
    named = {f"blocks.{i}.{name}": mask for i, of_block in enumerate(masks) for name, mask in of_block.items()}
    weights = _Weights(chain, named)
    passes = _Passes(chain, weights, repeat)
    batches = math.ceil(sequences / batch_size)
    steps = epochs * batches
    try:
        _ignore_first_product()
        for step in range(steps):
            batch = step % batches
            # The batch's sequences that this process has, by their local number.
            rows = range((batch - share.first) % batches, len(inputs), batches)
            scale = (2 * sequences / len(range(batch, sequences, batches)) * omega).to(weights.dtype)
            at_once = rows_at_once or max(1, len(rows))
            for start in range(0, len(rows), at_once):
                passes.run(inputs, targets, rows[start : start + at_once], scale)
            weights.step(learning_rate * (steps - step) / steps, share)
        weights.keep()
    finally:
        weights.put_back()
    return list(blocks)


def _ignore_first_product() -> None:
    """A product that is the first work of the thread for backward passes makes torch warn, and then do what is needed."""
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context", UserWarning)


class _Chain(nn.Module):
    """Blocks called one after the other, each with its own arguments."""

    def __init__(self, blocks: Sequence[nn.Module], arguments: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.blocks, self.arguments = nn.ModuleList(blocks), arguments

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block, given in zip(self.blocks, self.arguments, strict=True):
            output = block(hidden, **given)
            # Blocks of transformers 5 return a tensor, older ones a tuple that starts with it.
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


class _Passes:
    """Forward and backward passes of parts of batches, each adding to the gradients.

    Parts of one size share their tensors for inputs, targets and scale. From the second one on, the pass is repeated on them.
    """

    def __init__(self, chain: _Chain, weights: _Weights, repeat: Repeat) -> None:
        self._chain, self._weights, self._repeat = chain, weights, repeat
        self._device = next(chain.parameters()).device
        self._own: dict[int, list[torch.Tensor]] = {}
        self._repeated: dict[int, Callable[[], None]] = {}

    def run(self, inputs: torch.Tensor, targets: torch.Tensor, rows: range, scale: torch.Tensor) -> None:
        """Add the gradients of a part of a batch: these rows of inputs and targets (n, t, d). scale: ω times a factor (d,)."""
        size, known = len(rows), len(rows) in self._own
        if not known:
            pair = (inputs.new_empty((size, *inputs.shape[1:]), device=self._device) for _ in range(2))
            self._own[size] = [*pair, torch.empty_like(scale)]
        own = self._own[size]
        for mine, all_rows in zip(own, (inputs, targets), strict=False):
            for place, row in zip(mine, rows, strict=True):
                place.copy_(all_rows[row], non_blocking=True)
        own[2].copy_(scale)
        if not known:
            self._pass(*own)
            return
        if size not in self._repeated:
            used = own, self._chain.arguments, list(self._chain.parameters()), self._weights.tensors()
            self._repeated[size] = self._repeat(functools.partial(self._pass, *own), used)
        self._repeated[size]()

    def _pass(self, hidden: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> None:
        with torch.enable_grad():
            output = self._chain(hidden)
        self._weights.add_gradients(output, wanted, scale)


class _Weights:
    """The weights in training, Z = M⊙Z, and one Adam over all projections, in float32 at least."""

    def __init__(self, chain: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        self._modules = {name: chain.get_submodule(name) for name in masks}
        self._before: dict[str, nn.Parameter] = {
            name: module.get_parameter("weight") for name, module in self._modules.items()
        }
        self._masks = list(masks.values())
        for name, weight in self._before.items():
            _checks.mask(f"masks[{name!r}]", masks[name], weight, f"weights[{name!r}]")
        first = next(iter(self._before.values()))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        with torch.no_grad():
            self._wide: list[torch.Tensor] = [
                nn.Parameter(weight.detach().to(self.dtype, copy=True).masked_fill_(~mask, 0.0))
                for weight, mask in zip(self._before.values(), self._masks, strict=True)
            ]
        # The weights the block multiplies with: the same tensors, or rounded copies.
        self._used: list[torch.Tensor] = [
            wide if first.dtype == self.dtype else nn.Parameter(wide.detach().to(first.dtype)) for wide in self._wide
        ]
        for module, used in zip(self._modules.values(), self._used, strict=True):
            module.weight = used
        for wide in self._wide:
            wide.grad = torch.zeros_like(wide)
        self._adam = torch.optim.Adam(self._wide, lr=0.0, fused=first.is_cuda)

    def add_gradients(self, output: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> None:
        """Add ∂/∂Z of Σ scale/2 · (S − D)² over the tokens of a part of a batch."""
        # float16 would lose small numbers in the backward pass: divide them by the largest, and multiply the gradients by it.
        narrow = output.dtype == torch.float16
        with torch.no_grad():
            change, size = output.to(self.dtype).sub_(wanted), torch.ones((), dtype=self.dtype, device=output.device)
            if narrow:
                size = torch.linalg.vector_norm(change * scale, math.inf).clamp_min_(torch.finfo(self.dtype).tiny)
            change = torch.mul(change, scale / size, out=torch.empty_like(output))
        found = torch.autograd.grad(output, self._used, change)
        for wide, gradient, mask in zip(self._wide, found, self._masks, strict=True):
            assert wide.grad is not None
            wide.grad.addcmul_(gradient.to(self.dtype).mul_(size) if narrow else gradient, mask)

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the tensors that `add_gradients` uses."""
        return [*self._wide, *self._used, *self._masks, *(wide.grad for wide in self._wide)]

    @torch.no_grad()
    def step(self, learning_rate: float, share: Share) -> None:
        """Take one step of Adam with the gradients of all processes, then clear them."""
        for wide in self._wide:
            assert wide.grad is not None
            # In place: a repeated pass adds to this tensor.
            if (total := share.total(wide.grad)) is not wide.grad:
                wide.grad.copy_(total)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)
        if self._used[0] is not self._wide[0]:
            torch._foreach_copy_(self._used, self._wide)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the trained weights, rounded, into the block's own. Errors: FloatingPointError if one is not finite."""
        finite = torch.stack([torch.isfinite(wide).all() for wide in self._wide])
        if not bool(finite.all()):
            raise FloatingPointError("reconstruction diverged: a weight is not finite; lower reconstruct_learning_rate")
        for weight, wide in zip(self._before.values(), self._wide, strict=True):
            weight.copy_(wide)

    def put_back(self) -> None:
        """Restore the projections' own parameters."""
        for module, weight in zip(self._modules.values(), self._before.values(), strict=True):
            module.weight = weight
