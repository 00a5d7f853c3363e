"""Time two implementations in one process: alternating, by median, with peak memory, and no ratio unless they agree."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

GIB = 2**30


@dataclass
class Row:
    """One part: the cost of both sides, and whether they agree."""

    part: str
    """Description of the work."""
    ours_ms: float
    plain_ms: float | None = None
    ours_gib: float = 0.0
    """Peak device memory: the weights of this side and all it allocates."""
    plain_gib: float | None = None
    tflops: float | None = None
    disagreement: float | None = None
    bound: float | None = None
    notes: list[str] = field(default_factory=list)
    kernels: str = ""
    """The device's time by kernel, if asked for."""

    @property
    def agrees(self) -> bool:
        """Return whether both sides computed the same numbers, within the bound."""
        return self.disagreement is not None and self.bound is not None and self.disagreement <= self.bound

    @property
    def ratio(self) -> float | None:
        """Return how many times faster ours is; None if there is no other side or it disagrees."""
        return self.plain_ms / self.ours_ms if self.plain_ms is not None and self.agrees else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(action: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Time one call: (milliseconds, peak additional device memory in GiB, result)."""
    synchronize(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    result = action()
    synchronize(device)
    elapsed = (time.perf_counter() - start) * 1e3
    peak = (torch.cuda.max_memory_allocated(device) - before) / GIB if device.type == "cuda" else 0.0
    return elapsed, peak, result


def alternate(
    sides: Sequence[Callable[[], Any]], device: torch.device, repeats: int, warm_up: int = 1
) -> list[tuple[float, float, list[float]]]:
    """Time the sides in turns after warming up: (median milliseconds, peak GiB, all times) of each."""

    # Each side allocates the memory that it keeps during the warm-up.
    def warm(side: Callable[[], Any]) -> None:
        for _ in range(warm_up):
            side()

    peaks = [once(partial(warm, side), device)[1] for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, found in zip(sides, times, strict=True):
            found.append(once(side, device)[0])
    return [(statistics.median(found), peak, found) for found, peak in zip(times, peaks, strict=True)]


def graphed(actions: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """Return the microseconds of one of `actions`, run in turns: the median replay of one CUDA graph, timed by events.

    On a CPU they run one after the other. Give actions that use different memory, so that no cache holds what they read.
    """
    for action in actions:
        action()
    if device.type != "cuda":
        return (
            min(once(lambda: [action() for action in actions], device)[0] for _ in range(repeats)) * 1e3 / len(actions)
        )
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:]) * 1e3 / 4 / len(actions)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure this device: (TFLOP/s of a large matrix product, TB/s of a copy, read and written)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    [(product, _, _)] = alternate([lambda: a @ b], device, 10)
    source = torch.empty(size * size * (8 if device.type == "cuda" else 4), device=device, dtype=dtype)
    target = torch.empty_like(source)
    [(copy, _, _)] = alternate([lambda: target.copy_(source)], device, 10)
    moved = 2 * source.numel() * source.element_size()
    return 2 * size**3 / product / 1e9, moved / copy / 1e9


def resident(*models: nn.Module) -> float:
    """Return the device memory of the parameters and buffers of models, GiB."""
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB


def peak_of(model: nn.Module, action: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """Return the result of `action` and the model's peak bytes in it: its tensors and all that is allocated; None on a CPU."""
    _, more, result = once(action, device)
    return result, round((resident(model) + more) * GIB) if device.type == "cuda" else None


def host_peak() -> float:
    """Return the peak host memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    """Compute ‖ours − other‖ / ‖other‖ in float64."""
    ours, other = ours.detach().double().cpu(), other.detach().double().cpu()
    return float((ours - other).norm() / other.norm())
