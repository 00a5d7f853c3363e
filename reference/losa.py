"""The whole of LoSA, Algorithm 1: from dense weights and token ids to sparse merged weights.

    for t = 1 .. T:
        importance of each block: the less its output shares with other blocks', the higher   rates.py, hsic.py, rmi.py
        sparsity of each block, from its importance and this step's target                    schedule.py, rates.py, sparsity.py
        block by block, after the pruned ones: prune, reconstruct; error of its output        lockstep.py, masks/, reconstruct.py
        rank of each block, from its error; resize its adapters                               rank.py, adapted_linear.py
        train the adapters on the t-th part of the examples, once anything is pruned          training.py, llama.py, adamw.py
    merge                                                                                     adapted_linear.py, adapter.py

`run` is this box, and the functions above it are some of its lines, with the names of torch_impl/losa.py, so that the two files
can be read side by side. For the other lines, torch_impl/engine/ has files of the same names as here. Nothing is changed in place:
each line takes a state and returns the next one.

Legend: L blocks; n calibration sequences of t tokens; a projection has weight (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reference import _checks, llama, rank, schedule, sparsity
from reference._checks import Array, Ids
from reference.adapted_linear import Layers, attach_adapters, merge_adapters, resize, zero_shares
from reference.lockstep import gather_gradients, prune_model
from reference.masks.nm import kept_per_group
from reference.settings import Settings
from reference.training import Example, lr_positions, nothing_to_train, train


@dataclass(frozen=True)
class StepRecord:
    """The decisions, measurements and result of one step. Lists have one entry per block; losses has one per optimizer step.

    losses: empty if nothing is trained at this step (see `nothing_to_train`).
    """

    step: int
    target: float
    importance: list[float]
    sparsity: list[float]
    realised: list[float]
    errors: list[float]
    ranks: list[int]
    losses: list[float]
    layers: list[Layers]


def block_targets(
    settings: Settings, target: float, importance: Array | None, weights: Array, previous: Array
) -> tuple[Array, list[tuple[int, int] | None]]:
    """Choose the sparsity of each block (L,) at this step (LoSA, Eq. 5), and its N:M if the pattern has one."""
    blocks = len(weights)
    if settings.group is None:
        first, last = settings.dense_blocks
        inner, middle = sparsity.middle_sparsity(target, weights, previous, first, last), slice(first, blocks - last)
        rates, of_middle = previous.copy(), None if importance is None else importance[middle]
        rates[middle] = settings.rule.allocate(of_middle, inner, weights[middle], previous[middle])
        return rates, [None] * blocks
    m = settings.group[1]
    kept = np.full(blocks, kept_per_group(target, m))
    if settings.pattern.mixed and importance is not None:
        ceiling = np.rint((1 - previous) * m).astype(np.int64)
        moves = sparsity.even_moves(schedule.sparsity_spread(target), blocks, m)
        kept = sparsity.allocate_kept(importance, int(kept.sum()), m, ceiling=ceiling, moves=moves)
    return 1 - kept / m, [(int(n), m) for n in kept]


def _allocate_ranks(settings: Settings, step: int, errors: Sequence[float]) -> list[int]:
    """Allocate r of LoSA, Eq. 7, to every block."""
    mean = schedule.mean_rank(step, settings.initial_rank)
    if settings.rank_allocation == "uniform":
        return [mean] * len(errors)
    allocated = rank.allocate_ranks(np.array(errors), mean, min_rank=settings.min_rank, max_rank=settings.max_rank)
    return [int(r) for r in allocated]


def check_model(model: llama.Llama, settings: Settings) -> None:
    """Check that the settings work with this model.

    Errors: ValueError for values that are not finite, for fewer blocks than layer_sparsity needs, for a projection whose
    number of inputs is not a multiple of M, for an MLP with fewer channels than channel_multiple, or if dense_blocks leaves
    no block to prune.
    """
    _checks.array("embedding", model.embedding, "v", "d")
    _checks.array("norm", model.norm, "d")
    _checks.array("head", model.head, "v", "d")
    if len(model.blocks) < (least := settings.rule.least_blocks):
        raise ValueError(
            f"layer_sparsity {settings.layer_sparsity!r} needs {least} or more blocks, and the model has "
            f"{len(model.blocks)}; use another layer_sparsity"
        )
    if sum(settings.dense_blocks) >= len(model.blocks):
        raise ValueError(
            f"dense_blocks is {settings.dense_blocks}; allowed: together fewer than {len(model.blocks)}, the model's blocks"
        )
    for index, block in enumerate(model.blocks):
        norms = {"attention_norm": block.attention_norm, "mlp_norm": block.mlp_norm}
        for name, gains in (norms | {f"bias of {name}": bias for name, bias in block.biases.items()}).items():
            _checks.array(f"block {index}, {name}", gains, "out")
        for name, weight in block.weights.items():
            _checks.array(f"block {index}, {name}", weight, "out", "in")
            if settings.pattern.structured and name == "down" and weight.shape[1] < settings.channel_multiple:
                raise ValueError(
                    f"channel_multiple is {settings.channel_multiple}; allowed: 1 to {weight.shape[1]}, the channels of the MLP of "
                    f"block {index}"
                )
            if settings.group is not None and weight.shape[1] % settings.group[1]:
                raise ValueError(
                    f"sparsity_type is {settings.sparsity_type!r} and block {index}, {name} has {weight.shape[1]} "
                    f"inputs; allowed: a multiple of {settings.group[1]}"
                )


def initial_rates(layers: Sequence[Layers], weights: Array, settings: Settings) -> tuple[float, Array]:
    """Measure the initial sparsity: s₀ of Eq. 8, and that of each block (L,)."""
    rates = zero_shares(layers)
    initial = float((weights * rates).sum() / weights.sum())
    if initial > settings.final_sparsity + 1e-3:
        raise ValueError(
            f"sparsity_ratio is {settings.final_sparsity}; allowed: {initial:.4f} or more, the model's own sparsity"
        )
    if initial < 1e-3:  # a few exact zeros in a dense checkpoint do not come from pruning
        return 0.0, np.zeros_like(rates)
    return initial, rates


def run(
    model: llama.Llama, calibration_ids: Ids, parts: Sequence[Sequence[Example]], settings: Settings
) -> tuple[llama.Llama, list[StepRecord]]:
    """Prune and adapt a model.

    Source: LoSA, Algorithm 1. calibration_ids: token ids (n, t). parts: T lists of training examples, one per step; not
    empty if fine-tuning is on.
    Returns: the merged model, zero where pruned, and a record of every step. Ties and rounding: as its parts.
    Errors: see `check_model`; ValueError if parts do not match the steps, or if the model is already sparser than the
    target; FloatingPointError if training diverges.
    *Deviation*: as its parts. The published code trains the last step on six times as many examples, some of them of step 4.

    Example: three blocks with weights (1, 2; 3, 4) lose the smaller half, 1 and 2; nothing is trained:

    >>> block = llama.Block(np.ones(2), np.ones(2), {name: np.array([[1.0, 2], [3, 4]]) for name in llama.PROJECTIONS})
    >>> sizes = llama.Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1)
    >>> dense = llama.Llama(sizes, np.eye(2), (block,) * 3, np.ones(2), np.eye(2))
    >>> settings = Settings("magnitude", 0.5, steps=1, layer_sparsity="uniform", finetune=False)
    >>> merged, [record] = run(dense, np.array([[0, 1]]), [], settings)
    >>> merged.blocks[2].weights["down"], record.realised
    (array([[0., 0.],
           [3., 4.]]), [0.5, 0.5, 0.5])
    """
    check_model(model, settings)
    if settings.finetune and (len(parts) != settings.steps or not all(parts)):
        sizes = [len(part) for part in parts]
        raise ValueError(f"parts has {len(parts)} parts of {sizes} examples; give {settings.steps} parts, none empty")
    layers = attach_adapters(model)
    weights = np.array([sum(layer.weight.size for layer in of_block.values()) for of_block in layers], dtype=np.float64)
    initial, rates = initial_rates(layers, weights, settings)
    positions = lr_positions(parts, settings)
    records = []
    for step in range(1, settings.steps + 1):
        # A model may have a few zeros more than are asked for; they stay.
        final = max(settings.final_sparsity, initial)
        target = schedule.cubic_sparsity(step, settings.steps, final, initial)
        importance = None
        if (measure := settings.rule.measure) is not None:
            current = merge_adapters(model, layers, settings.scale)
            importance = measure(current, calibration_ids[: settings.rmi_samples], target)
        rates, groups = block_targets(settings, target, importance, weights, rates)
        gradients = gather_gradients(merge_adapters(model, layers, settings.scale), calibration_ids, settings.method)
        last = step == settings.steps
        layers, errors = prune_model(model, layers, calibration_ids, settings, rates, groups, gradients, last)
        ranks: list[int] = []
        losses: list[float] = []
        if settings.finetune:
            ranks = _allocate_ranks(settings, step, errors)
            layers = resize(layers, ranks, step, settings)
            if not nothing_to_train(model, layers, settings):
                layers, losses = train(model, layers, parts[step - 1], settings, positions[step - 1])
        records.append(
            StepRecord(
                step=step,
                target=target,
                importance=[] if importance is None else importance.tolist(),
                sparsity=rates.tolist(),
                realised=zero_shares(layers).tolist(),
                errors=errors,
                ranks=ranks,
                losses=losses,
                layers=layers,
            )
        )
    return merge_adapters(model, layers, settings.scale), records
