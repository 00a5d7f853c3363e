"""The registry of rate rules, which choose each block's sparsity (its rate). A new rule is one record in `RULES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reference import atp, first_order, hsic, lamp, llama, owl, rmi, schedule, sparsity
from reference._checks import Array, Ids
from reference.llama import Llama
from reference.loss import cross_entropy
from reference.masks import wanda

# Of the calibration sequences that measure importance, ATP compares its candidates on every fourth.
COMPARED = 4


@dataclass(frozen=True)
class RateRule:
    """One rate rule.

    name: its value of `layer_sparsity`. allocate: (importance (L,), None without a measure; target; prunable weights (L,);
    current sparsity (L,)) → sparsity of each block (L,). measure: (current model, merged; token ids (n, t); target) →
    importance (L,), higher for a block that should keep more; None if nothing is measured. least_blocks: the minimum number
    of blocks.
    """

    name: str
    allocate: Callable[[Array | None, float, Array, Array], Array]
    measure: Callable[[Llama, Ids, float], Array] | None = None
    least_blocks: int = 1


def mutual_information(model: Llama, ids: Ids, target: float = 0.0) -> Array:
    """Measure the importance of every block: the less its output shares with other blocks' outputs, the higher.

    Source: LoSA, Eqs. 2-4. model: the current one, merged. ids: token ids (n, t). target: of no effect.

    Returns: (L,).

    *Deviation*: the published code uses the blocks' inputs; a block's output says more about the block.
    """
    outputs = [trace.output.reshape(len(ids), -1) for trace in llama.forward(model, ids).blocks]
    grams = np.stack([hsic.linear_gram(output) for output in outputs])
    return rmi.importance(rmi.redundancy(rmi.nhsic_matrix(grams)))


def outliers(model: Llama, ids: Ids, target: float = 0.0) -> Array:
    """Measure the share of outliers among the Wanda scores of every block, in percent.

    Source: OWL, see owl.py. model: the current one, merged; inputs come from it before this step prunes it. target: of no
    effect. Returns: (L,). *Deviation*: OWL measures the dense model once; here each step measures the current one.
    """
    norms = _input_norms(model, ids)
    return np.array(
        [
            owl.outlier_share([wanda.wanda_score(W, norm[llama.INPUT_OF[name]]) for name, W in block.weights.items()])
            for block, norm in zip(model.blocks, norms, strict=True)
        ]
    )


def best_progression(model: Llama, ids: Ids, target: float) -> Array:
    """Try several arithmetic progressions of rates; return the one that loses least, as the share that each block keeps.

    Source: ATP, see atp.py. model: the current one, merged. ids: token ids (n, t); their inputs choose what each candidate
    prunes, by Wanda, and every fourth of them measures its loss. target: mean sparsity.

    Returns: 1 − ρ (L,). Equal losses: the smaller step.

    *Deviation*: ATP measures perplexity on WikiText-2. Text that may be reported takes no part here (decision 45).
    """
    blocks = len(model.blocks)
    norms = _input_norms(model, ids)
    losses = []
    candidates = [atp.progression(target, blocks, step) for step in atp.candidate_steps(target, blocks)]
    for rates in candidates:
        pruned = model.with_weights(
            [
                {
                    name: W * wanda.wanda_mask(W, norm[llama.INPUT_OF[name]], float(rate))
                    for name, W in block.weights.items()
                }
                for block, norm, rate in zip(model.blocks, norms, rates, strict=True)
            ]
        )
        compared = ids[::COMPARED]
        losses.append(cross_entropy(llama.forward(pruned, compared).logits, compared)[0])
    return 1 - candidates[int(np.argmin(losses))]


def _input_norms(model: Llama, ids: Ids) -> list[dict[str, Array]]:
    """Compute for each block the norm of every input of its projections, by the input's name."""
    return [
        {name: wanda.input_norm(x.reshape(-1, x.shape[-1])) for name, x in trace.inputs.items()}
        for trace in llama.forward(model, ids).blocks
    ]


def kept_by_lamp(model: Llama, ids: Ids, target: float) -> Array:
    """Compute the share of its weights that each block keeps if LAMP prunes the model to its target.

    Source: LAMP, see lamp.py. model: the current one, merged. ids: of no effect. target: sparsity. Returns: (L,).
    *Deviation*: see `lamp.lamp_kept`.
    """
    levels = [np.sum([lamp.lamp_levels(W) for W in block.weights.values()], axis=0) for block in model.blocks]
    return lamp.lamp_kept(levels, target)


def loss_by_first_order(model: Llama, ids: Ids, target: float = 0.0) -> Array:
    """Estimate by gradients how much the calibration loss depends on every block.

    Source: see first_order.py; the sum over the block's projections. model: the current one, merged. ids: token ids (n, t).
    target: of no effect. Returns: (L,). *Deviation*: none.
    """
    gradients = llama.weight_gradients(model, ids)
    return np.array(
        [
            sum(first_order.first_order_importance(W, of_block[name]) for name, W in block.weights.items())
            for block, of_block in zip(model.blocks, gradients, strict=True)
        ]
    )


def by_importance(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Make the less important blocks sparser: LoSA, Eq. 5."""
    assert importance is not None
    return sparsity.allocate_sparsity(importance, target, schedule.sparsity_spread(target), weights, floor)


def by_total(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Make the less important blocks sparser: LoSA, Eq. 5, with importances that are sums over a block's weights."""
    assert importance is not None
    return by_importance(importance / weights, target, weights, floor)


def by_outliers(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Make the blocks with fewer outliers sparser: OWL."""
    assert importance is not None
    return owl.owl_rates(importance, target, weights, floor)


def by_kept_share(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Let each block keep the given share of its weights, or as close to it as target and floors allow."""
    assert importance is not None
    return sparsity.nearest_rates(1 - importance, target, weights, floor)


def the_same(importance: Array | None, target: float, weights: Array, floor: Array) -> Array:
    """Give all blocks the same sparsity."""
    return sparsity.uniform_sparsity(target, weights, floor)


RULES = {
    rule.name: rule
    for rule in (
        # With two blocks, importances are always equal.
        RateRule("rmi", by_importance, mutual_information, least_blocks=3),
        RateRule("uniform", the_same),
        RateRule("owl", by_outliers, outliers),
        RateRule("atp", by_kept_share, best_progression),
        RateRule("lamp", by_kept_share, kept_by_lamp),
        RateRule("gradient", by_total, loss_by_first_order),
    )
}
