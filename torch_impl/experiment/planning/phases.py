"""The memory model: how much memory a run needs in each phase, on each card and on the host.

It covers one card, several cards and offloading. Its inputs are the configuration, the shapes of the model and the devices.
Host memory does not include the libraries themselves.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from torch_impl.engine.memory import SHARE, MemoryBudget
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning import compressed, gradients, training
from torch_impl.experiment.planning.parts import Parts, Peak, Place
from torch_impl.experiment.planning.sizes import Sizes

# Assumed length of an evaluation text that is not loaded yet: WikiText-2's test set, in tokens.
EVALUATION_TOKENS = 340_000

# What a process on a GPU holds in host memory beside its tensors: in docs/results/whole_run, 21.7 GiB less 12.6 of weights and
# 6.0 of masks.
PROCESS = 3 << 30


def peak(config: Config, sizes: Sizes, place: Place) -> Peak:
    """Find the phase with the largest memory, in memory or offloaded, by the option `offload` or by what fits."""
    in_memory = _in_memory(config, sizes, place)
    if place.cards > 1 or not config.plain or config.model.offload == "off":
        return in_memory
    fits = in_memory.device.total <= SHARE * place.free and in_memory.host.total <= SHARE * place.free_host
    return in_memory if fits and config.model.offload == "auto" else _offloaded(config, sizes, place)


def _in_memory(config: Config, sizes: Sizes, place: Place) -> Peak:
    found = phases(config, sizes, place)
    phase = max(found, key=lambda name: found[name].total)
    return Peak(False, phase, found[phase], _host(config, sizes, place) if place.kind == "cuda" else found[phase])


def _host(config: Config, sizes: Sizes, place: Place) -> Parts:
    """Return the host memory of a GPU run: the model is read and saved through it, block by block with several processes.

    Hidden states before every block are kept there for gradients; the masks only come after that.
    """
    sums = gradients.sums(config, sizes, place.cards)
    kept = max(_kept_states(config, sizes, place.cards), gradients.states(config, sizes, place.cards))
    masks = max(0, math.ceil(sizes.prunable / place.cards) - kept - sums)
    if place.cards == 1:
        return Parts(weights=sizes.weights(), masks=masks, streams=kept, statistics=sums, process=PROCESS)
    largest = max(sizes.block(), sizes.outside_blocks())
    return Parts(blocks=largest, masks=masks, streams=kept, statistics=sums, process=PROCESS)


def _importance_tokens(config: Config, cards: int = 1) -> int:
    """Return the tokens that measure the importance on each card."""
    return math.ceil(config.calibration.rmi_rows / cards) * config.calibration.seqlen


def _kept_states(config: Config, sizes: Sizes, cards: int = 1) -> int:
    """Return the bytes of the hidden states that a measure with gradients keeps in host memory."""
    kept = sizes.stream(_importance_tokens(config, cards)) * len(sizes.blocks)
    return kept if config.prune.rule.planned.backward else 0


def _measuring(config: Config, sizes: Sizes, cards: int = 1) -> dict[str, int]:
    """Return the memory for measuring the importance of a block, besides hidden states: computing it, or its gradients."""
    calibration, measure = config.calibration, config.prune.rule.planned
    tokens = min(calibration.calibration_batch_size, math.ceil(calibration.rmi_rows / cards)) * calibration.seqlen
    work = measure.work(sizes.largest_prunable, sizes.largest_projection)
    work = max(work, sizes.gradients(tokens) if measure.backward else sizes.forward(tokens))
    logits = sizes.loss(calibration.seqlen, distilled=False) if measure.loss else 0
    return {"work": work} if work > logits else {"logits": logits}


def phases(config: Config, sizes: Sizes, place: Place) -> dict[str, Parts]:
    """Return each card's memory in each phase of a run in memory."""
    cards = place.cards
    held = sizes.weights(cards)
    base = Parts(weights=held, dense_copy=held, **training.adapters(config, sizes, cards))
    copies = 2 + config.reconstruction.more_streams
    streams = copies * sizes.stream(math.ceil(config.calibration.sequences / cards) * config.calibration.seqlen)
    passing = _gathered_by_a_pass(sizes, cards)
    evaluation = {**passing, **_evaluation(config, sizes)}
    # The merged and the reloaded model coexist at the end. On a GPU the masks are in host memory.
    masks = 0 if place.kind == "cuda" else math.ceil(sizes.prunable / cards)
    found = {
        "calibration": _calibration(replace(base, streams=streams), config, sizes, cards),
        "evaluation": replace(base, **evaluation),
        "verification": Parts(weights=held, reloaded=held, masks=masks, **evaluation),
    }
    if config.prune.rule.measure is not None:
        found["importance"] = _importance(base, config, sizes, place)
    if gradients.needed(config):
        found["gradients"] = _gradients(base, config, sizes, place)
        if place.kind != "cuda":
            found["calibration"] = replace(found["calibration"], statistics=found["gradients"].statistics)
    if config.reconstruction.reconstruct_epochs:
        # The pruned blocks of a window and the last gathered one.
        blocks = (1 + config.reconstruction.window) * sizes.block(cards) if cards > 1 else 0
        work = _reconstruction(config, sizes, cards)
        found["reconstruction"] = replace(base, streams=streams, blocks=blocks, reconstruction=work)
    if config.training.finetune:
        found["training"] = replace(base, **passing, **training.micro_batches(config, sizes, place))
        if config.training.compressed:
            small = sizes.outside_blocks() + compressed.weights(config, sizes)
            found["training"] = replace(found["training"], weights=small)
    return found


def _importance(base: Parts, config: Config, sizes: Sizes, place: Place) -> Parts:
    """Return the memory for measuring importances; on the CPU, the hidden states kept for gradients are part of it."""
    cards, streams = place.cards, config.prune.rule.planned.streams
    hidden = math.ceil(streams * sizes.stream(_importance_tokens(config, cards)))
    kept = 0 if place.kind == "cuda" else _kept_states(config, sizes, cards)
    # A gathered block, and the message with it.
    blocks = 2 * sizes.block(cards) if cards > 1 else 0
    work = _measuring(config, sizes, cards)
    return replace(base, streams=hidden + kept, blocks=blocks, merged=sizes.block(), **work)


def _gradients(base: Parts, config: Config, sizes: Sizes, place: Place) -> Parts:
    """Return the memory for a method's statistic of gradients; on the CPU, with what a GPU run keeps in host memory."""
    cards, here = place.cards, place.kind != "cuda"
    return replace(
        base,
        streams=gradients.stream(config, sizes, cards) + here * gradients.states(config, sizes, cards),
        statistics=here * gradients.sums(config, sizes, cards),
        # A gathered block, and the message with it.
        blocks=2 * sizes.block(cards) if cards > 1 else 0,
        merged=sizes.block(),
        **gradients.work(config, sizes, cards),
    )


def _gathered_by_a_pass(sizes: Sizes, cards: int) -> dict[str, int]:
    """Return the gathered weights on each of several cards during a forward or backward pass.

    A unit needs its size twice while it is gathered: for the message and for the unit itself. The weights outside the blocks
    are gathered first. Then a block computes while the next one is being gathered.
    """
    if cards == 1:
        return {}
    block, outside = sizes.block(cards), sizes.outside_blocks(cards)
    if outside > 2 * block:
        return {"blocks": block, "outside": 2 * outside}
    return {"blocks": 3 * block, "outside": outside}


def _calibration(base: Parts, config: Config, sizes: Sizes, cards: int) -> Parts:
    """Return the memory for pruning a block; with several cards, or for embedding, which gathers weights outside the blocks."""
    sequences = min(config.calibration.calibration_batch_size, math.ceil(config.calibration.sequences / cards))
    merges = config.training.finetune and config.prune.steps > 1
    pruning = replace(
        base,
        merged=sizes.block() if merges else 0,
        work=sizes.calibration(config.prune.method, sequences * config.calibration.seqlen),
    )
    if cards == 1:
        return pruning
    # The pruned block, the dense block, and the message with one of them.
    pruning = replace(pruning, blocks=3 * sizes.block(cards))
    embedding = replace(base, outside=2 * sizes.outside_blocks(cards))
    return max(pruning, embedding, key=lambda parts: parts.total)


def _evaluation(config: Config, sizes: Sizes) -> dict[str, int]:
    """Return the memory for a batch of windows in a block, or for its logits if larger."""
    windows, seqlen = config.text.eval_batch_size, config.text.eval_seqlen
    work, logits = sizes.forward(windows * seqlen), sizes.logits(windows, seqlen)
    return {"work": work} if work > logits else {"logits": logits}


def _reconstruction(config: Config, sizes: Sizes, cards: int = 1) -> int:
    """Return the memory for training a window of blocks, gathered on every card, with a card's share of a batch."""
    sequences = math.ceil(min(config.reconstruction.reconstruct_batch_size, config.calibration.sequences) / cards)
    return sizes.reconstruction(sequences * config.calibration.seqlen, config.reconstruction.window)


def working(config: Config, sizes: Sizes) -> Parts:
    """Return the peak device memory of an offloaded sweep, besides hidden states and weights outside the blocks.

    It consists of a block, those before it in its window, and the next one, and of the largest piece of work on them.
    """
    calibration = config.calibration
    at_once = min(calibration.calibration_batch_size, calibration.sequences) * calibration.seqlen
    pieces = [Parts(work=sizes.calibration(config.prune.method, at_once)), Parts(**_evaluation(config, sizes))]
    if config.prune.rule.measure is not None:
        pieces.append(Parts(**_measuring(config, sizes)))
    if gradients.needed(config):
        pieces.append(Parts(**gradients.work(config, sizes)))
    if config.reconstruction.reconstruct_epochs:
        pieces.append(Parts(reconstruction=_reconstruction(config, sizes)))
    most = replace(
        max(pieces, key=lambda piece: piece.total), blocks=(1 + config.reconstruction.window) * sizes.block()
    )
    if not config.training.compressed:
        return most
    # Compressed blocks and adapters stay. One more block is the copy of the dense one that is pruned, and one has merged weights.
    merged = sizes.block() if config.prune.steps > 1 else 0
    most = replace(most, blocks=most.blocks + sizes.block(), merged=merged)
    return replace(most, weights=compressed.weights(config, sizes), **training.adapters(config, sizes, 1))


def _offloaded(config: Config, sizes: Sizes, place: Place) -> Peak:
    text, calibration = config.text, config.calibration
    windows = text.eval_windows * text.eval_seqlen if text.eval_windows else EVALUATION_TOKENS
    outside = sizes.outside_blocks()
    working_parts = working(config, sizes)
    budget = MemoryBudget(torch.device(place.kind), working_parts.total + outside, place.free)
    measured = math.ceil(config.prune.rule.planned.streams * sizes.stream(_importance_tokens(config)))
    probe = sizes.stream(2 * text.eval_seqlen)
    of_gradients = [gradients.stream(config, sizes)] if gradients.needed(config) else []
    sweeps = {
        "dense": [measured, sizes.stream(windows)],
        "pruning": [
            (2 + config.reconstruction.more_streams) * sizes.stream(calibration.sequences * calibration.seqlen),
            probe,
            *of_gradients,
        ],
        "verifying": [sizes.stream(windows), probe],
    }
    found: dict[str, Parts] = {}
    hosted, sums = 0, gradients.sums(config, sizes)
    for name, streams in sweeps.items():
        kept = sum(size for size in streams if budget.reserve(size))
        budget.release_all()
        before_blocks = {"dense": _kept_states(config, sizes), "pruning": gradients.states(config, sizes)}.get(name, 0)
        hosted = max(hosted, sum(streams) - kept + before_blocks)
        if place.kind != "cuda":
            kept += before_blocks
        # The pruned model's weights outside the blocks are still in memory when the written model is read.
        reloaded = outside if name == "verifying" else 0
        found[name] = replace(working_parts, weights=outside + working_parts.weights, reloaded=reloaded, streams=kept)
        if name == "pruning" and place.kind != "cuda":
            found[name] = replace(found[name], statistics=sums)
    if config.training.compressed:
        beside = Parts(weights=outside + working_parts.weights, **training.adapters(config, sizes, 1))
        found["training"] = replace(beside, **training.micro_batches(config, sizes, place))
        found["evaluation"] = replace(beside, **_evaluation(config, sizes))
        for name in ("dense", "verifying"):
            # Nothing is compressed yet, or no longer.
            found[name] = replace(found[name], weights=outside, adapters=0, gradients=0, moments=0, merged=0)
    phase = max(found, key=lambda name: found[name].total)
    device = found[phase]
    # A block being written, to the result or twice to a checkpoint; on a GPU also one being read.
    written = (1 + config.reconstruction.more_streams) * sizes.block()
    if place.kind == "cuda":
        host = Parts(blocks=sizes.block() + written, streams=hosted, statistics=sums, process=PROCESS)
        return Peak(True, phase, device, host)
    return Peak(True, phase, device, replace(device, blocks=device.blocks + written))
