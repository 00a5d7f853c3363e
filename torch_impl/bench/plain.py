"""The other side of the benchmark: the plain formulation of each part, as in research code for pruning LLMs.

It is correct but slow: one sequence at a time, all features kept, a Gram matrix for every pair, a statistic for every
projection, SparseGPT column by column, and a materialised B·A beside the base product that is recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family

# Columns whose errors SparseGPT gathers before it updates those to their right.
BLOCK_SIZE = 128


class PlainLoRALinear(nn.Module):
    """y = x Wᵀ + x (M⊙(s·BA))ᵀ with the adapter branch recomputed in backward: six large products."""

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("mask", weight != 0)
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.scale = scale

    def _adapter(self, x: torch.Tensor) -> torch.Tensor:
        delta = (self.B.to(x.dtype) @ self.A.to(x.dtype)) * self.mask * self.scale
        return functional.linear(x, delta)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = checkpoint(self._adapter, x, use_reentrant=False)
        return functional.linear(x, self.weight) + branch


def _centred(gram: torch.Tensor) -> torch.Tensor:
    gram = gram - gram.mean(0, keepdim=True)
    return gram - gram.mean(1, keepdim=True)


def _nhsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    gram_x, gram_y = _centred(x @ x.T), _centred(y @ y.T)
    return (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())


@torch.no_grad()
def block_outputs(decoder: Decoder, ids: torch.Tensor) -> list[list[torch.Tensor]]:
    """Return the output of every block for every sequence: one forward pass per sequence, all kept in host memory."""
    outputs: list[list[torch.Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs[-1].append(output.cpu())

    handles = [block.register_forward_hook(keep) for block in decoder.blocks]
    for row in ids:
        outputs.append([])
        decoder.body(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@torch.no_grad()
def redundancy(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Compute R of every block from kept features, with two Gram matrices for every pair of blocks."""
    outputs = block_outputs(decoder, ids)
    blocks = len(outputs[0])
    result = torch.zeros(blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1, blocks):
            x, y = (torch.stack([o[k].flatten() for o in outputs]).to(ids.device).float() for k in (i, j))
            value = float(_nhsic(x, y))
            result[i] += value
            result[j] += value
    return result


@torch.no_grad()
def prune(decoder: Decoder, ids: torch.Tensor, method: str, rate: float) -> list[float]:
    """Prune every block in place, one sequence at a time, with dense features kept; return the reconstruction errors."""
    dense = block_outputs(decoder, ids)
    hidden, arguments = _first_inputs(decoder, ids)
    errors = []
    for index, block in enumerate(decoder.blocks):
        statistics = _statistics(block, decoder.family, hidden, arguments, method)
        for name, weight in decoder.family.weights_of(block).items():
            weight.data.copy_(METHODS[method].prune(weight.float(), statistics[name], len(ids), rate))
        difference = energy = torch.zeros((), device=ids.device, dtype=torch.float64)
        for row, states in enumerate(hidden):
            hidden[row] = block(states, **arguments)
            D, S = dense[row][index].to(ids.device).float(), hidden[row].float()
            difference = difference + (D - S).square().sum((0, 1), dtype=torch.float64)
            energy = energy + D.square().sum((0, 1), dtype=torch.float64)
        errors.append(float((difference / energy).mean()))
    return errors


def _first_inputs(decoder: Decoder, ids: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Record the input of the first block for every sequence, and its other arguments."""
    hidden: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], given: dict[str, Any]) -> None:
        hidden.append(inputs[0])
        arguments.update(given)

    handle = decoder.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    for row in ids:
        decoder.body(input_ids=row[None], use_cache=False)
    handle.remove()
    return hidden, arguments


def _statistics(
    block: nn.Module, family: Family, hidden: list[torch.Tensor], arguments: dict[str, Any], method: str
) -> dict[str, torch.Tensor]:
    """Compute squared input norms or Σ x xᵀ for each projection separately, in float32."""
    sums: dict[str, Any] = dict.fromkeys(family.projections, 0.0)

    def watch(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums[name] + METHODS[method].part(x)

        return add

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in family.projections_of(block).items()]
    for states in hidden:
        block(states, **arguments)
    for handle in handles:
        handle.remove()
    return sums


def _wanda(W: torch.Tensor, squares: torch.Tensor, samples: int, rate: float) -> torch.Tensor:
    """Prune the lowest scores of every row, found by a full sort."""
    score = W.abs() * squares.sqrt()
    lowest = torch.sort(score, dim=1, stable=True).indices[:, : int(rate * score.shape[1] + 1e-9)]
    return W.scatter(1, lowest, 0.0)


def _sparsegpt(W: torch.Tensor, products: torch.Tensor, samples: int, rate: float) -> torch.Tensor:
    """Run SparseGPT with a few kernel launches per column."""
    W, H = W.clone(), products * (2 / samples)
    H = H + torch.eye(len(H), device=H.device) * (0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, W.shape[1], BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, W.shape[1])
        block, errors = W[:, start:stop], torch.zeros_like(W[:, start:stop])
        score = (block / U.diagonal()[start:stop]).square()
        threshold = score.flatten().sort().values[int(rate * score.numel() + 1e-9) - 1]
        pruned = score <= threshold
        for j in range(stop - start):
            column = block[:, j]
            new = column.masked_fill(pruned[:, j], 0.0)
            errors[:, j] = (column - new) / U[start + j, start + j]
            block[:, j:] -= errors[:, j : j + 1] @ U[start + j, start + j : stop][None]
            block[:, j] = new
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


class Method(NamedTuple):
    """What a plain method sums over the inputs (tokens, in), and the new weight it makes of the sum of all sequences."""

    part: Callable[[torch.Tensor], torch.Tensor]
    prune: Callable[[torch.Tensor, torch.Tensor, int, float], torch.Tensor]


METHODS = {
    "wanda": Method(lambda inputs: inputs.square().sum(0), _wanda),
    "sparsegpt": Method(lambda inputs: inputs.T @ inputs, _sparsegpt),
}
