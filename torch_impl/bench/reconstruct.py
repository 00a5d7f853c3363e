"""The part `reconstruct`: one block's reconstruction without compiling and compiled, and where the device's time goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from transformers import PreTrainedModel

from torch_impl.bench.measure import Row, once, resident, synchronize
from torch_impl.bench.parts import Work, adapted
from torch_impl.engine import calibration
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.graphs import Repeater
from torch_impl.engine.reconstruction import ReconstructionConfig, reconstruct_blocks

EPOCHS, SHOWN = 8, 25
# Optimizer steps of the profiled epoch; also the least that compile and capture all that the timed steps use.
STEPS = 8
# What a kernel's name says about its work; the first match counts.
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm"),
    "compiled elementwise": ("triton",),
    "copies": ("memcpy", "memset"),
}


def rows(model: PreTrainedModel, work: Work, epochs: int, kernels: bool) -> Iterator[Row]:
    """Measure the reconstruction of the first block, once uncompiled and, on a GPU, once compiled; changes the model.

    kernels: also show the device's time by kernel, of one epoch over a few sequences.
    """
    decoder, config = Decoder(model), ReconstructionConfig(reconstruct_epochs=epochs or EPOCHS)
    block, ids = decoder.blocks[0], work.ids(model, work.sequences, work.length)
    inputs = calibration.start_stream(decoder, ids, 16)
    targets = inputs.clone()
    with torch.no_grad():
        targets.advance(block, 0)
    adapted(model)
    # The first block's input needs no gradient, so q, k and v take two products for each weight, the others three.
    sizes = {name: weight.numel() for name, weight in decoder.family.weights_of(block).items()}
    products = 3 * sum(sizes.values()) - sum(sizes[name] for name in decoder.family.inputs[0])

    def train(sequences: int, epochs: int) -> None:
        few = [dataclasses.replace(stream, hidden=stream.hidden[:sequences]) for stream in (inputs, targets)]
        options, given = ReconstructionConfig(reconstruct_epochs=epochs), inputs.arguments[0][:1]
        reconstruct_blocks([block], 0, decoder.family, few[0], few[1], given, options, Repeater(True))

    size = min(work.sequences, STEPS * config.reconstruct_batch_size)
    for wanted in ("off", "on") if work.device.type == "cuda" else ("off",):
        with calibration.compiled([decoder], wanted):
            train(size, 1)
            milliseconds, peak, _ = once(lambda: train(work.sequences, config.reconstruct_epochs), work.device)
            part = f"reconstruction, {config.reconstruct_epochs} × {work.sequences} × {work.length}, compiled: {wanted}"
            row = Row(part, milliseconds, ours_gib=peak + resident(model))
            row.tflops = 2 * products * ids.numel() * config.reconstruct_epochs / milliseconds / 1e9
            if kernels:
                row.kernels = by_kernel(lambda: train(size, 1), size * work.length, work.device)
                wall = milliseconds * size / (work.sequences * config.reconstruct_epochs)
                row.kernels += f"\n{wall * 1e3:>12,.0f} µs{'':>14}  for as many tokens in the timed run"
            yield row


def by_kernel(action: Callable[[], Any], tokens: int, device: torch.device) -> str:
    """Run an action; return a table of the device's time by kernel, the longest first, and by kind. On a CPU, by operation."""
    on_device = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    # torch 2.10 to 2.12 warn of cycles, even where there are none, unless events accumulate.
    with profile(activities=[activity], acc_events=True) as profiled:
        action()
        synchronize(device)
    events = [event for event in profiled.key_averages() if not event.is_user_annotation]
    found = [event for event in events if (event.device_type == DeviceType.CUDA) == on_device]
    times = {event.key: event.self_device_time_total if on_device else event.self_cpu_time_total for event in found}
    counts, total = {event.key: event.count for event in found}, sum(times.values())
    kinds: dict[str, float] = {}
    for name, time in times.items():
        kind = next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "others")
        kinds[kind] = kinds.get(kind, 0) + time
    shown = sorted(times, key=lambda name: -times[name])[:SHOWN]
    lines = [f"{times[name]:>12,.0f} µs{counts[name]:>7}{times[name] / total:>7.1%}  {name[:110]}" for name in shown]
    lines += [f"{time:>12,.0f} µs{time / total:>14.1%}  {kind}" for kind, time in sorted(kinds.items())]
    return "\n".join([*lines, f"{total:>12,.0f} µs{'':>14}  in all, for {tokens:,} tokens"])
