"""Gradients of the calibration loss by the merged weights of every block, one block at a time.

The loss is the cross-entropy of predicting each next token of the calibration sequences. A sweep takes the blocks forward, and
keeps the hidden states before each of them in host memory; then backward, and computes each block once more, with gradients. So
the weights of one block are needed at a time: blocks may be sharded or offloaded. No gradient of a weight outlives its block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional

from torch_impl import _kernels
from torch_impl.engine import calibration, distributed, finite
from torch_impl.engine.adapted_linear import block_adapters, plain_linears
from torch_impl.engine.batches import IGNORED
from torch_impl.engine.calibration import Stream
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.loss import summed_cross_entropy


class Forward(Protocol):
    """Takes a stream through the blocks in order."""

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Advance the stream through block `index`."""


@runtime_checkable
class Backward(Protocol):
    """Goes back through the blocks, the last one first, after a forward sweep."""

    def retreat(self, block: nn.Module, index: int) -> None:
        """Go back through block `index`, which is gathered."""


class Collector(Protocol):
    """Takes what a gradient consists of, projection by projection, the last block first."""

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Take a projection's input (n, t, in) and the gradient of the loss by its output (n, t, out) for one batch.

        The loss is summed over the predicted tokens. ∂loss/∂W = Σ grad_yᵀ x, as `weight_gradient` computes it.
        """

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Block `index` has seen all batches of this process. weights: its merged weights (out, in) by projection."""


def weight_gradient(x: torch.Tensor, grad_y: torch.Tensor) -> torch.Tensor:
    """Compute ∂loss/∂W (out, in) = Σ grad_yᵀ x over all tokens, in float32 at least. x (..., in), grad_y (..., out)."""
    return _kernels.wide_product(grad_y.reshape(-1, grad_y.shape[-1]).T, x.reshape(-1, x.shape[-1]))


def next_token_loss(decoder: Decoder, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Sum the cross-entropy of predicting each next token of ids (n, t), from the last block's output; differentiable by it.

    The weights outside the blocks must be gathered.
    """
    targets = functional.pad(ids[:, 1:], (0, 1), value=IGNORED).to(hidden.device)
    logits = calibration.finish(decoder, ids, hidden)
    return summed_cross_entropy(logits.flatten(0, 1), targets.flatten(), IGNORED)


def predicted_tokens(stream: Stream) -> int:
    """Count the tokens that a stream predicts, in all processes; 1 if there are none."""
    return max(1, int(distributed.all_reduce_number(stream.ids[:, 1:].numel())))


class GradientSweep:
    """One sweep: `advance` through all blocks in order, then `retreat` through them in reverse."""

    def __init__(self, decoder: Decoder, collector: Collector) -> None:
        self._decoder, self._collector = decoder, collector
        self._before: list[torch.Tensor] = []
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        """Return the stream that has been advanced; after the first `retreat` it holds gradients instead of states."""
        assert self._stream is not None
        return self._stream

    def advance(self, stream: Stream, block: nn.Module, index: int) -> None:
        """Advance the stream through a block; keep the hidden states before it in host memory."""
        self._before.append(stream.hidden.to("cpu", copy=True))
        stream.advance(block, index)
        self._stream = stream

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def retreat(self, block: nn.Module, index: int) -> None:
        """Compute the gradients of a block, which must be gathered. Errors: finite.NotFiniteError if one is not finite."""
        stream, family = self.stream, self._decoder.family
        if index + 1 == len(self._decoder.blocks):
            self._turn()
        before, found = self._before.pop(), torch.zeros((), device=stream.device)
        with plain_linears(block, block_adapters(block, family)):
            for batch, rows in stream.batches():
                states = before[rows].to(stream.device).requires_grad_()
                with _watched(block, family, partial(self._collector.add, index)):
                    output = _output(block, states, stream, batch, index)
                    [gradient] = torch.autograd.grad(output, states, stream.states(rows))
                found = found + finite.total(gradient)
                stream.hidden[rows].copy_(gradient)
            finite.check(found, f"gradient of {family.full_name(index)}", stream.hidden.dtype)
            with torch.no_grad():
                weights = {name: weight.detach() for name, weight in family.weights_of(block).items()}
                self._collector.done(index, weights)

    def _turn(self) -> None:
        """Replace the last block's output in the stream with the gradient of the loss by it, one sequence at a time."""
        stream = self.stream
        with distributed.unsharded(self._decoder.model):
            for row in range(len(stream.hidden)):
                rows = slice(row, row + 1)
                hidden = stream.states(rows).detach().clone().requires_grad_()
                loss = next_token_loss(self._decoder, stream.ids[rows], hidden)
                stream.hidden[rows].copy_(torch.autograd.grad(loss, hidden)[0])


def _output(block: nn.Module, states: torch.Tensor, stream: Stream, batch: int, index: int) -> torch.Tensor:
    output = block(states, **stream.arguments[batch][index])
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _watched(
    block: nn.Module, family: Family, add: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Within this context, report input and gradient of the output of every projection when its gradient is computed."""

    def watch(name: str, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda gradient: add(name, x, gradient))

    handles = [
        projection.register_forward_hook(partial(watch, name))
        for name, projection in family.projections_of(block).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
