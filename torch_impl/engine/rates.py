"""The registry of rate rules, which choose each block's sparsity (its rate). A new rule is one record in `RULES`.

Spec: reference/rates.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from torch_impl import lamp, owl, schedule, sparsity
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.measures import (
    BestProgression,
    FirstOrder,
    KeptByLamp,
    Measure,
    MutualInformation,
    Outliers,
)
from torch_impl.masks.method import LowestScores
from torch_impl.masks.wanda import wanda_score


@dataclass(frozen=True)
class Cost:
    """What a measure needs, for plans.

    passes: forward passes of the importance sequences; a backward pass counts as two. streams: copies of their hidden states
    on the device. work: (prunable weights of a block, those of a projection) → bytes besides computing the block. loss: the
    loss of a sequence is computed. backward: the blocks are gone through backward, too, with all hidden states in host memory.
    weights, outside: how often the weights of the blocks, and those outside, are gathered from several cards. features: the
    outputs of the blocks are exchanged between cards. summed: (widths of the inputs of a block, its prunable weights,
    importance sequences) → bytes that a block sums over cards.
    """

    passes: float = 1.0
    streams: float = 1.0
    work: Callable[[int, int], int] = lambda prunable, largest: 0
    loss: bool = False
    backward: bool = False
    weights: int = 1
    outside: int = 1
    features: bool = False
    summed: Callable[[int, int, int], int] = lambda inputs, prunable, samples: 0


NOTHING = Cost(passes=0.0, streams=0.0, weights=0, outside=0)


@dataclass(frozen=True)
class RateRule:
    """One rate rule.

    name: its value of `layer_sparsity`. allocate: (importance (L,), None without a measure; target; prunable weights (L,);
    current sparsity (L,)) → sparsity of each block (L,). measure: (model, target) → a started measurement; None if nothing is
    measured. least_blocks: the minimum number of blocks. works_offloaded: whether it works with one block in memory at a time.
    cost: what the measure needs.
    """

    name: str
    allocate: Callable[[torch.Tensor | None, float, torch.Tensor, torch.Tensor], torch.Tensor]
    measure: Callable[[Decoder, float], Measure] | None = None
    least_blocks: int = 1
    works_offloaded: bool = True
    cost: Cost = field(default_factory=Cost)

    @property
    def planned(self) -> Cost:
        """Return the cost of the measure; nothing without one."""
        return NOTHING if self.measure is None else self.cost


def by_importance(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Make the less important blocks sparser: LoSA, Eq. 5."""
    assert importance is not None
    return sparsity.allocate_sparsity(importance, target, schedule.sparsity_spread(target), weights, floor)


def by_total(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Make the less important blocks sparser: LoSA, Eq. 5, with importances that are sums over a block's weights."""
    assert importance is not None
    return by_importance(importance / weights, target, weights, floor)


def by_outliers(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Make the blocks with fewer outliers sparser: OWL."""
    assert importance is not None
    return owl.owl_rates(importance, target, weights, floor)


def by_kept_share(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Let each block keep the given share of its weights, or as close to it as target and floors allow."""
    assert importance is not None
    return sparsity.nearest_rates(1 - importance, target, weights, floor)


def the_same(
    importance: torch.Tensor | None, target: float, weights: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Give all blocks the same sparsity."""
    return sparsity.uniform_sparsity(target, weights, floor)


PLAIN = "uniform"
"""The rule of plain one-shot pruning."""
RULES = {
    rule.name: rule
    for rule in (
        RateRule(
            "rmi",
            by_importance,
            lambda decoder, target: MutualInformation(),
            # With two blocks, importances are always equal.
            least_blocks=3,
            cost=Cost(features=True, summed=lambda inputs, prunable, samples: 8 * samples**2),
        ),
        RateRule(PLAIN, the_same),
        RateRule(
            "owl",
            by_outliers,
            lambda decoder, target: Outliers(decoder.family),
            # The scores of a block in float32, and which of a projection are above the mean.
            cost=Cost(
                passes=2,
                work=lambda prunable, largest: 4 * prunable + 5 * largest,
                summed=lambda inputs, prunable, samples: 4 * inputs,
            ),
        ),
        RateRule(
            "atp",
            by_kept_share,
            BestProgression,
            # Nine candidates, each on every fourth sequence. Weights outside: embedding, the blocks' arguments, and the losses.
            cost=Cost(
                passes=4.25,
                streams=3.25,
                work=lambda prunable, largest: LowestScores(wanda_score).workspace(1, largest, 4),
                loss=True,
                outside=3,
                summed=lambda inputs, prunable, samples: 4 * inputs,
            ),
        ),
        RateRule(
            "lamp",
            by_kept_share,
            lambda decoder, target: KeptByLamp(decoder.family, target),
            # Sorting a projection's squares, with float64 sums and whole numbers.
            cost=Cost(
                passes=0,
                work=lambda prunable, largest: 64 * largest,
                summed=lambda inputs, prunable, samples: 8 * lamp.LEVELS,
            ),
        ),
        RateRule(
            "gradient",
            by_total,
            lambda decoder, target: FirstOrder(decoder),
            cost=Cost(
                passes=4,
                loss=True,
                backward=True,
                weights=2,
                outside=2,
                summed=lambda inputs, prunable, samples: 4 * prunable,
            ),
        ),
    )
}
