"""Prune a model block by block, with the dense and the pruned stream in lockstep, and reconstruct each block.

A stream is the hidden states of all calibration sequences between two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from reference import adapter, llama, rank, reconstruct
from reference._checks import Array, Ids
from reference.adapted_linear import Layers, merged_block
from reference.llama import Block, Llama
from reference.llm_pruner import structure_sum
from reference.masks import structured
from reference.masks.first_token import weigh_first
from reference.masks.method import Method
from reference.masks.prune import prune
from reference.masks.select import rest_sparsity
from reference.settings import Settings


def prune_model(
    dense: Llama,
    layers: Sequence[Layers],
    ids: Ids,
    settings: Settings,
    rates: Array,
    groups: Sequence[tuple[int, int] | None],
    gradients: list[dict[str, Array]] | None = None,
    last: bool = True,
) -> tuple[list[Layers], list[float]]:
    """Prune block by block, with dense and pruned streams in lockstep. Also return e of LoSA, Eq. 6, of every block.

    rates (L,) and groups (L,): the sparsity of each block, and its N:M if the pattern has one. gradients: by block and
    projection, see `gather_gradients`. last: whether this is the last step.
    """
    dense_stream = dense.embedding[ids]
    hidden = dense.sizes.hidden
    pruned: list[Layers] = []
    # The pruned stream before each block of `pruned`, and before the next.
    streams, errors = [dense_stream], []
    damaged: int | None = None
    for index, dense_block in enumerate(dense.blocks):
        block = merged_block(dense_block, layers[index], settings)
        of_block = None if gradients is None else gradients[index]
        done = layers[index]
        if settings.prunes(index, len(layers)):
            done = _prune_block(
                block, layers[index], streams[-1], dense, settings, rates[index], groups[index], of_block, last
            )
        dense_stream = llama.block_forward(dense_block, dense_stream, dense.sizes).output
        pruned.append(done)
        # Until a block has lost a weight, there is nothing to reconstruct.
        if damaged is None and any(
            (layer.mask != (dense_block.weights[name] != 0)).any() for name, layer in done.items()
        ):
            damaged = index
        first = index
        if settings.reconstruct_epochs and damaged is not None:
            first = max(damaged, index + 1 - settings.reconstruct_window)
            window = slice(first, index + 1)
            pruned[window] = _reconstruct_blocks(
                dense.blocks[window], pruned[window], streams[first], dense_stream, dense, settings
            )
        del streams[first + 1 :]
        for number in range(first, index + 1):
            merged = merged_block(dense.blocks[number], pruned[number], settings)
            streams.append(llama.block_forward(merged, streams[-1], dense.sizes).output)
        errors.append(rank.reconstruction_error(dense_stream.reshape(-1, hidden), streams[-1].reshape(-1, hidden)))
    return pruned, errors


def _prune_block(
    block: Block,
    layers: Layers,
    stream: Array,
    model: Llama,
    settings: Settings,
    rate: float,
    nm: tuple[int, int] | None,
    gradients: dict[str, Array] | None,
    last: bool,
) -> Layers:
    """Prune the projections of one block further. All statistics come from the block before this pruning.

    gradients: the statistic of each projection's gradients, for a method that needs it. last: whether this is the last step.
    """
    trace = llama.block_forward(block, stream, model.sizes)
    if settings.pattern.structured:
        return _prune_structures(block, layers, trace, model.sizes.kv_heads, settings, rate, gradients, last)
    # A projection that is already sparser reduces the share of the others.
    masks = [layer.mask for layer in layers.values()]
    rate = rest_sparsity(np.array([(~mask).sum() for mask in masks]), np.array([mask.size for mask in masks]), rate)
    pruned = {}
    for name, layer in layers.items():
        merged = block.weights[name]
        statistic = _gather(settings, trace.inputs, name) if gradients is None else gradients[name]
        share = rate if nm is None else None
        updated, mask = prune(settings.prune_method, merged, statistic, layer.mask, sparsity=share, nm=nm)
        pruned[name] = replace(layer, weight=adapter.rebase(layer.weight, merged, updated, mask))
    return pruned


def _prune_structures(
    block: Block,
    layers: Layers,
    trace: llama.BlockTrace,
    heads: int,
    settings: Settings,
    rate: float,
    gradients: dict[str, Array] | None,
    last: bool,
) -> Layers:
    """Remove key-value heads and channels of one block further, and with them all that belongs to them."""
    channels = block.weights[structured.READS_CHANNELS].shape[1]
    of_head = sum(block.weights[name].size for name in structured.BY_HEAD) // heads
    of_channel = sum(block.weights[name].size for name in structured.BY_CHANNEL) // channels
    gone = structured.removed_structures(rate, heads, channels, of_head, of_channel, settings.channel_multiple, last)
    kept = {}
    for name, count, many in zip(
        (structured.READS_HEADS, structured.READS_CHANNELS), (heads, channels), gone, strict=True
    ):
        score = _structure_score(block, trace, settings, gradients, name, count)
        kept[name] = structured.structure_mask(score, many, structured.kept_structures(layers[name].mask, count))
    pruned = {}
    for name, layer in layers.items():
        reader = structured.READS_HEADS if name in structured.BY_HEAD else structured.READS_CHANNELS
        mask = structured.coupled_mask(kept[reader], layer.weight.shape, structured.AXES[name])
        pruned[name] = replace(layer, weight=np.where(mask, layer.weight, 0.0))
    return pruned


def _structure_score(
    block: Block, trace: llama.BlockTrace, settings: Settings, gradients: dict[str, Array] | None, name: str, count: int
) -> Array:
    """Score the `count` structures that projection `name` reads, as the method does: by it alone or by all that go with it."""
    score = settings.method.structural_score
    assert score is not None
    if not settings.method.sums_structures:
        return structured.structure_score(score(block.weights[name], _gather(settings, trace.inputs, name)), count)
    assert gradients is not None
    coupled = structured.BY_HEAD if name in structured.BY_HEAD else structured.BY_CHANNEL
    parts = [structure_sum(score(block.weights[n], gradients[n]), count, axis) for n, axis in coupled.items()]
    return np.asarray(np.sum(parts, axis=0))


def _gather(settings: Settings, inputs: dict[str, Array], name: str) -> Array | None:
    """Compute the statistic that the method needs of a projection's calibration input (n, t, in)."""
    if settings.method.statistic is None:
        return None
    source = llama.INPUT_OF[name]
    X = weigh_first(inputs[source], settings.first_token_weight if source == "qkv" else 1.0)
    return settings.method.statistic(X, len(inputs[source]))


def gather_gradients(model: Llama, ids: Ids, method: Method) -> list[dict[str, Array]] | None:
    """Compute the statistic that `method` needs of the gradients by each projection of the current, merged model."""
    if method.gradient_statistic is None:
        return None
    apart = [llama.weight_gradients(model, row[None]) for row in ids]
    return [
        {name: method.gradient_statistic(np.stack([of_row[index][name] for of_row in apart])) for name in block.weights}
        for index, block in enumerate(model.blocks)
    ]


def _reconstruct_blocks(
    blocks: Sequence[Block],
    layers: Sequence[Layers],
    stream: Array,
    targets: Array,
    model: Llama,
    settings: Settings,
) -> list[Layers]:
    """Train the kept merged weights of pruned blocks together; add the changes to their base weights."""
    merged = [merged_block(block, of_block, settings) for block, of_block in zip(blocks, layers, strict=True)]
    better = reconstruct.reconstruct_blocks(
        merged,
        [{name: layer.mask for name, layer in of_block.items()} for of_block in layers],
        stream,
        targets,
        settings.reconstruct_epochs,
        settings.reconstruct_learning_rate,
        settings.reconstruct_batch_size,
        model.sizes,
    )
    return [
        {
            name: replace(layer, weight=adapter.rebase(layer.weight, old.weights[name], new.weights[name], layer.mask))
            for name, layer in of_block.items()
        }
        for of_block, old, new in zip(layers, merged, better, strict=True)
    ]
