"""The registry of rate rules, which choose each block's sparsity (its rate). A new rule is one record in `RULES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reference import hsic, llama, rmi, schedule, sparsity
from reference._checks import Array
from reference.llama import Ids, Llama


@dataclass(frozen=True)
class RateRule:
    """One rate rule.

    name: its value of `layer_sparsity`. allocate: (importance (L,), None without a measure; target; prunable weights (L,);
    current sparsity (L,)) → sparsity of each block (L,). measure: (current model, merged; token ids (n, t)) → importance
    (L,), higher for a block that should keep more; None if nothing is measured. least_blocks: the minimum number of blocks.
    """

    name: str
    allocate: Callable[[Array | None, float, Array, Array], Array]
    measure: Callable[[Llama, Ids], Array] | None = None
    least_blocks: int = 1


def mutual_information(model: Llama, ids: Ids) -> Array:
    """Measure the importance of every block: the less its output shares with other blocks' outputs, the higher.

    Source: LoSA, Eqs. 2-4. model: the current one, merged. ids: token ids (n, t).

    Returns: (L,).

    *Deviation*: the published code uses the blocks' inputs; a block's output says more about the block.
    """
    outputs = [trace.output.reshape(len(ids), -1) for trace in llama.forward(model, ids).blocks]
    grams = np.stack([hsic.linear_gram(output) for output in outputs])
    return rmi.importance(rmi.redundancy(rmi.nhsic_matrix(grams)))


def by_importance(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Make the less important blocks sparser: LoSA, Eq. 5."""
    assert importance is not None
    return sparsity.allocate_sparsity(importance, target, schedule.sparsity_spread(target), weights, floor)


def the_same(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Give all blocks the same sparsity."""
    return sparsity.uniform_sparsity(target, weights, floor)


RULES = {
    rule.name: rule
    for rule in (
        # With two blocks, importances are always equal.
        RateRule("rmi", by_importance, mutual_information, least_blocks=3),
        RateRule("uniform", the_same),
    )
}
