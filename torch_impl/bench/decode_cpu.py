"""The CPU's side of `bench decode`: packed products against the best dense there, by the clock.

Dense is torch's own linear and, in bf16 where the CPU has VDPBF16PS, a loop as well written as ours; the faster of the two
counts. A pass goes over copies that overflow any cache; sides take turns, and the quickest pass of each counts: other work
on the machine only ever adds time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl import packed
from torch_impl.decode import cpu

# Bytes that one pass reads, at least: several times any last-level cache.
STREAM = 256_000_000
LOOP_COLUMNS = 128

Product = Callable[[torch.Tensor], torch.Tensor]


def pack(weight: torch.Tensor) -> tuple[Product, int]:
    """(x ↦ y = x Wᵀ over the packed weight, its bytes)."""
    bitmap, values, offsets = packed.pack(weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        return cpu.linear(x, bitmap, values, offsets)

    return product, bitmap.nbytes + values.nbytes + offsets.nbytes


@functools.cache
def dense_loop() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The hand-written dense bf16 loop, where this CPU and its compiler have one; columns a multiple of `LOOP_COLUMNS`."""
    if "avx512bf16" not in cpu.paths():
        return None
    cpu.build(Path(__file__).with_name("dense_loop.cpp"))
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.ops.losa_dense_loop.linear
    return function


def copies(nbytes: int) -> int:
    """How many copies of so many bytes no cache holds."""
    return STREAM // nbytes + 2


def quickest(sides: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Microseconds of the quickest of `repeats` calls of each side, taken in turns after one call each."""
    best = [float("inf")] * len(sides)
    for turn in range(repeats + 1):
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side()
            if turn:
                best[index] = min(best[index], (time.perf_counter() - start) * 1e6)
    return best


def read_rate() -> float:
    """TB/s of reading memory once: a sum over more than any cache holds."""
    numbers = torch.ones(STREAM // 4)
    return numbers.nbytes / quickest([numbers.sum], 5)[0] / 1e6


@torch.no_grad()
def times(
    products: Sequence[Product], weights: Sequence[torch.Tensor], x: torch.Tensor, repeats: int
) -> tuple[float, float]:
    """Microseconds of one product: (ours, the best dense)."""
    dense: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [nn.functional.linear]
    loop = dense_loop() if x.dtype == torch.bfloat16 and x.shape[1] % LOOP_COLUMNS == 0 else None
    if loop is not None:
        dense.append(loop)

    def ours() -> None:
        for product in products:
            product(x)

    def theirs(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for weight in weights:
            function(x, weight)

    first, *others = quickest([ours, *(partial(theirs, function) for function in dense)], repeats)
    return first / len(products), min(others) / len(weights)
