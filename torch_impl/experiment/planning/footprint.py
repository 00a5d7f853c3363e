"""How much memory a run takes at once, of the device and of the host, from its configuration and the model's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_impl import schedule
from torch_impl.engine.calibration import compiles
from torch_impl.engine.memory import SHARE, Room, free_bytes
from torch_impl.experiment.config import Config
from torch_impl.experiment.planning.sizes import Sizes

Parts = dict[str, int]
# Tokens of an evaluation text whose windows nobody has counted yet: WikiText-2's test set.
EVALUATION_TOKENS = 340_000


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for: of the device when it holds most, and of the host beside the libraries themselves."""

    streamed: bool
    phase: str
    device: Parts
    host: Parts

    @property
    def device_bytes(self) -> int:
        """Of the device, in all."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Of the host, in all."""
        return sum(self.host.values())


def footprint(config: Config, sizes: Sizes, device: torch.device) -> Footprint:
    """What the run takes, in memory or block by block: `offload` decides, or else whether it fits."""
    inside = _in_memory(config, sizes, device)
    if not config.plain or config.model.offload == "off":
        return inside
    host = free_bytes(torch.device("cpu"))
    fits = inside.device_bytes <= SHARE * free_bytes(device) and inside.host_bytes <= SHARE * host
    return inside if fits and config.model.offload == "auto" else _streamed(config, sizes, device)


def _largest(phases: dict[str, Parts]) -> tuple[str, Parts]:
    return max(phases.items(), key=lambda phase: sum(phase[1].values()))


def _in_memory(config: Config, sizes: Sizes, device: torch.device) -> Footprint:
    text, found = config.text, config.calibration
    weights = sizes.parameters * sizes.itemsize
    at_once = min(found.calibration_batch_size, found.nsamples) * found.seqlen
    streams = 2 * sizes.stream(found.nsamples * found.seqlen)
    evaluation = max(
        sizes.forward(text.eval_batch_size * text.eval_seqlen), sizes.logits(text.eval_batch_size, text.eval_seqlen)
    )
    both = {"weights": weights, "dense copy": weights}
    adapters = _adapters(config, sizes)
    held = {"merged weights of a block": sizes.largest_block * sizes.itemsize} if config.prune.steps > 1 else {}
    work = sizes.calibration(config.prune.prune_method, at_once)
    # A run ends with the merged model beside the one that was written and loaded again; masks are kept by the host.
    masks = sum(sizes.prunable_of_blocks)
    ending = {"weights": weights, "reloaded weights": weights, "logits or work on a block": evaluation}
    phases: dict[str, Parts] = {
        "calibration": {**both, **adapters, **held, "streams of hidden states": streams, "work on a block": work},
        "evaluation": {**both, **adapters, "logits or work on a block": evaluation},
        "verification": {**ending, **({} if device.type == "cuda" else {"masks": masks})},
    }
    if config.reconstruction.reconstruct_epochs:
        training = {"training of a block": _reconstruction(config, sizes)}
        phases["reconstruction"] = {**both, **adapters, "streams of hidden states": streams, **training}
    if config.training.finetune:
        phases["training"] = {**both, **adapters, **_training(config, sizes, device)}
    phase, parts = _largest(phases)
    # A model is read and saved through the host's memory.
    return Footprint(False, phase, parts, {"weights": weights, "masks": masks} if device.type == "cuda" else parts)


def _reconstruction(config: Config, sizes: Sizes) -> int:
    sequences = min(config.reconstruction.reconstruct_batch_size, config.calibration.nsamples)
    return sizes.reconstruction(sequences * config.calibration.seqlen)


def _adapters(config: Config, sizes: Sizes) -> Parts:
    """float32 value, gradient and two moments of every adapter entry at the last step."""
    if not config.training.finetune:
        return {}
    rank = schedule.mean_rank(config.prune.steps, config.adapter.initial_rank)
    return {"adapters and optimizer": rank * sizes.entries_per_rank * 16}


def _training(config: Config, sizes: Sizes, device: torch.device) -> Parts:
    training, text = config.training, config.text
    tokens = training.per_device_train_batch_size * text.train_seqlen
    prunable = sum(sizes.prunable_of_blocks) * sizes.itemsize
    before = 2 * sizes.parameters * sizes.itemsize
    holds = training.hold_merged == "on" or (
        training.hold_merged == "auto" and (device.type != "cuda" or before + 2 * prunable <= free_bytes(device))
    )
    blocks = len(sizes.prunable_of_blocks)
    compiled = compiles(training.compile_blocks, sum(sizes.prunable_of_blocks), device)
    of_block = tokens * sizes.kept_for_backward(compiled, not holds and not training.gradient_checkpointing)
    # A weight's gradient is a whole matrix until it is contracted; so is a merged weight that is not held.
    backward = sizes.largest_projection * sizes.itemsize * (1 if holds else 2)
    loss = sizes.loss(tokens, training.loss == "kl")
    if training.gradient_checkpointing:
        kept, work = sizes.stream(tokens) * blocks, max(loss, of_block + backward)
    else:
        kept, work = of_block * blocks, max(loss, backward)
    return {**({"merged weights": prunable} if holds else {}), "activations": kept, "loss or a block's backward": work}


def _streamed(config: Config, sizes: Sizes, device: torch.device) -> Footprint:
    text, found = config.text, config.calibration
    at_once = min(found.calibration_batch_size, found.nsamples) * found.seqlen
    windows = text.eval_windows * text.eval_seqlen if text.eval_windows else EVALUATION_TOKENS
    outside = sizes.outside * sizes.itemsize
    blocks = 2 * sizes.largest_block * sizes.itemsize
    working = sizes.working(config.prune.prune_method, at_once, (text.eval_batch_size, text.eval_seqlen))
    if config.reconstruction.reconstruct_epochs:
        working = max(working, blocks + _reconstruction(config, sizes))
    room = Room(device, working + outside)
    measured = 0 if config.prune.rule.measure is None else found.rmi_rows * found.seqlen
    sweeps = {
        "dense sweep": [sizes.stream(measured), sizes.stream(windows)],
        "pruning sweep": [2 * sizes.stream(found.nsamples * found.seqlen), sizes.stream(2 * text.eval_seqlen)],
        "verifying sweep": [sizes.stream(windows), sizes.stream(2 * text.eval_seqlen)],
    }
    phases: dict[str, Parts] = {}
    hosted = 0
    for name, streams in sweeps.items():
        kept = sum(size for size in streams if room.take(size))
        room.give_back()
        hosted = max(hosted, sum(streams) - kept)
        phases[name] = {
            # What was pruned is still there when what was written is read again.
            "outside the blocks": outside * (2 if name == "verifying sweep" else 1),
            "a block and the next": blocks,
            "streams of hidden states": kept,
            "work on a block": working - blocks,
        }
    phase, parts = _largest(phases)
    host = {"a block read and one written": blocks, "streams of hidden states": hosted}
    return Footprint(True, phase, parts, host if device.type == "cuda" else {**parts, "a block written": blocks // 2})
