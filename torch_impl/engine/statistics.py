"""Statistics of a calibration sweep, accumulated batch by batch; equal to the mirrored one-shot functions.

Each process feeds its own sequences; results cover the sequences of all processes.
"""

from __future__ import annotations

import torch

from torch_impl import hsic, rank
from torch_impl.engine import distributed
from torch_impl.masks.method import InputStatistic

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
