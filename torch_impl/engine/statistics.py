"""Statistics of a calibration sweep, accumulated batch by batch; equal to the mirrored one-shot functions.

Each process feeds its own sequences; results cover the sequences of all processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from torch_impl import hsic, rank
from torch_impl.engine import calibration, distributed, finite
from torch_impl.engine.adapted_linear import block_adapters
from torch_impl.engine.families import Family
from torch_impl.engine.gradient_sweep import weight_gradient
from torch_impl.masks.first_token import weigh_first
from torch_impl.masks.method import GradientStatistic, InputStatistic

# Tokens of every sequence copied to the device at once, if the hidden states are elsewhere.
PART = 128


class InputSum:
    """A pruning method's statistic of one calibration input over all batches; samples: sequences in all of them."""

    def __init__(self, statistic: InputStatistic, samples: int) -> None:
        self._statistic, self._samples = statistic, samples
        self._sum: torch.Tensor | None = None

    def update(self, inputs: torch.Tensor) -> None:
        """Add inputs (tokens, in)."""
        part = self._statistic.part(inputs, self._samples)
        self._sum = part if self._sum is None else self._sum.add_(part)

    def result(self) -> torch.Tensor:
        """Return the statistic, as the method needs it."""
        assert self._sum is not None
        return self._statistic.finish(distributed.all_reduce(self._sum))


def of_inputs(
    statistic: InputStatistic,
    block: nn.Module,
    index: int,
    family: Family,
    stream: calibration.Stream,
    first_token_weight: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Compute the statistic of each projection's input, once per shared input.

    first_token_weight: how many times the first token of each sequence counts in the input of attention.
    """
    samples = int(distributed.all_reduce_number(len(stream.hidden)))
    gathered = {group[0]: InputSum(statistic, samples) for group in family.inputs}

    def watch(name: str, x: torch.Tensor) -> None:
        if first_token_weight != 1 and name == family.inputs[0][0]:
            x = weigh_first(x.unflatten(0, (-1, stream.hidden.shape[1])), first_token_weight)
        gathered[name].update(x)

    with calibration.input_hooks(block_adapters(block, family), family.inputs, watch):
        for batch, rows in stream.batches():
            stream.run_for_inputs(block, index, batch, rows)
    results = {name: accumulator.result() for name, accumulator in gathered.items()}
    for name, result in results.items():
        # A Hessian has its sums of squares on the diagonal. All processes have the same numbers.
        squares = result if result.dim() == 1 else result.diagonal()
        if not bool(torch.isfinite(squares).all()):
            raise finite.NotFiniteError(f"input of {family.full_name(index, name)}", stream.hidden.dtype)
    return {name: results[group[0]] for group in family.inputs for name in group}


class GradientSums:
    """A pruning method's statistic of the gradients by each projection, in host memory; see `gradient_sweep.Collector`.

    A process keeps the statistics of the projections that it prunes.
    """

    def __init__(self, statistic: GradientStatistic, family: Family) -> None:
        self._statistic, self._family = statistic, family
        self._sums: dict[str, torch.Tensor] = {}
        self._found: dict[int, dict[str, torch.Tensor]] = {}

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Add the gradients of some sequences, each on its own."""
        for inputs, gradient in zip(x, grad_y, strict=True):
            part = self._statistic.part(weight_gradient(inputs, gradient))
            self._sums[name] = part if name not in self._sums else self._sums[name].add_(part)

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Finish the statistics of a block."""
        found = self._found[index] = {}
        for number, name in enumerate(self._family.projections):
            total = distributed.all_reduce(self._sums.pop(name))
            if distributed.owns(number):
                found[name] = self._statistic.finish(total).cpu()

    def take(self, index: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the statistics of a block by projection, on a device."""
        return {name: statistic.to(device) for name, statistic in self._found[index].items()}


class ReconstructionError:
    """e of LoSA, Eq. 6, over all batches (accumulated `rank.reconstruction_error`)."""

    def __init__(self) -> None:
        self._difference: torch.Tensor | float = 0.0
        self._energy: torch.Tensor | float = 0.0

    def update(self, dense: torch.Tensor, sparse: torch.Tensor) -> None:
        """Add outputs of the same block; dense, sparse: (..., tokens, hidden)."""
        wide = torch.promote_types(dense.dtype, torch.float32)
        # Widen one side, because bf16 would round the difference. The norm widens its input itself.
        self._difference = self._difference + _energy(dense.to(wide) - sparse)
        self._energy = self._energy + _energy(dense)

    def result(self) -> float:
        """Return the mean over channels of Σ(D−S)² / ΣD²; a channel with ΣD² = 0 counts 0 if ΣS² = 0 too, otherwise 1."""
        difference = distributed.all_reduce(torch.as_tensor(self._difference))
        energy = distributed.all_reduce(torch.as_tensor(self._energy))
        return float(distributed.broadcast(rank.error_of_sums(difference, energy)))


def _energy(states: torch.Tensor) -> torch.Tensor:
    """Sum x² (hidden,) over states (..., tokens, hidden): each sequence in float32 at least, then in float64."""
    wide = torch.promote_types(states.dtype, torch.float32)
    norms = torch.linalg.vector_norm(states, dim=-2, dtype=wide)
    return norms.double().square().view(-1, states.shape[-1]).sum(0)


def gram_of(hidden: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """Compute the Gram matrix (n, n) in float64, on the CPU, of the hidden states (n, tokens, hidden) of all processes.

    K = Σ_c x_c x_cᵀ over feature columns c: each process sums over its share of the columns, for all n sequences. device:
    where to compute, if the states are elsewhere.
    """
    if device is None or hidden.device == device:
        columns = distributed.exchange_columns(hidden.flatten(1))
        return distributed.all_reduce(hsic.linear_gram(columns).double().cpu())
    parts = (part.to(device).flatten(1) for part in hidden.split(PART, dim=1))
    return sum((hsic.linear_gram(part).double() for part in parts), start=torch.zeros(())).cpu()
