"""The CPU part of `bench decode`: packed products against the fastest dense ones.

The dense side is the faster of torch's linear and, in bf16 on CPUs with VDPBF16PS, an optimised loop like ours. Each side has
copies that exceed any cache and uses them in turn. The sides take turns, a product each, and the fastest of each counts: other
work on the machine only adds time, and a single product has the best chance to escape it.
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
from torch_impl.quantise import dequantise_rows, quantise_rows

# Minimum number of bytes of all copies: several times any last-level cache.
STREAM = 256_000_000
LOOP_COLUMNS = 128

Product = Callable[[torch.Tensor], torch.Tensor]


def pack(weight: torch.Tensor) -> tuple[Product, int]:
    """Return (the function x ↦ y = x Wᵀ with the packed weight, its size in bytes)."""
    parts = packed.pack(weight)
    return functools.partial(_product, *parts), sum(part.nbytes for part in parts)


def _product(bitmap: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return cpu.linear(x, bitmap, values, offsets)


def pack_codes(weight: torch.Tensor, bits: int) -> tuple[Product, int, torch.Tensor]:
    """Return (the function x ↦ y = x Wᵀ with the weight rounded to codes, its size in bytes, the rounded weight in float64)."""
    codes, scales = quantise_rows(weight, bits)
    bitmap, stream, offsets = packed.pack_codes(codes, bits)
    parts = (bitmap, stream, scales, offsets)
    size = sum(part.nbytes for part in parts)
    return functools.partial(_coded_product, *parts), size, dequantise_rows(codes, scales)


def _coded_product(
    bitmap: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    return cpu.linear_coded(x, bitmap, codes, scales, offsets)


@functools.cache
def dense_loop() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return the optimised dense bf16 loop if CPU and compiler support it; columns must be a multiple of `LOOP_COLUMNS`."""
    if "avx512bf16" not in cpu.paths():
        return None
    cpu.build(Path(__file__).with_name("dense_loop.cpp"))
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.ops.losa_dense_loop.linear
    return function


def copies(nbytes: int) -> int:
    """Return how many copies of `size` bytes exceed any cache."""
    return STREAM // nbytes + 2


def quickest(sides: Sequence[Sequence[Callable[[], Any]]], repeats: int) -> list[float]:
    """Return the microseconds of each side's fastest call.

    The sides take turns: a call of the first, one of the next. All calls of each count `repeats` times, after one warm-up.
    """
    best = [float("inf")] * len(sides)
    calls = max(map(len, sides))
    for turn in range(-calls, repeats * calls):
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side[turn % len(side)]()
            if turn >= 0:
                best[index] = min(best[index], (time.perf_counter() - start) * 1e6)
    return best


def read_rate() -> float:
    """Measure TB/s of reading memory: sum over more than any cache holds."""
    numbers = torch.ones(STREAM // 4)
    return numbers.nbytes / quickest([[numbers.sum]], 5)[0] / 1e6


@torch.no_grad()
def times(
    products: Sequence[Product], weights: Sequence[torch.Tensor], x: torch.Tensor, repeats: int
) -> tuple[float, float]:
    """Return the microseconds of one product: (ours, the fastest dense)."""
    dense: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [nn.functional.linear]
    loop = dense_loop() if x.dtype == torch.bfloat16 and x.shape[1] % LOOP_COLUMNS == 0 else None
    if loop is not None:
        dense.append(loop)

    sides = [[partial(product, x) for product in products]]
    sides += [[partial(function, x, weight) for weight in weights] for function in dense]
    ours, *others = quickest(sides, repeats)
    return ours, min(others)


def int8_product(weight: torch.Tensor) -> Product | None:
    """Return x ↦ y = x Wᵀ with the weight rounded to 8 bits, one scale a row, by torch's kernel; None if it has none."""
    if weight.dtype != torch.bfloat16:
        return None
    scales = (weight.float().abs().amax(1) / 127).clamp(min=1e-8).bfloat16()
    codes = (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    product = partial(_int8_product, codes, scales)
    x = torch.randn(2, weight.shape[1]).bfloat16()
    try:
        found, right = product(x).float(), x.float() @ (codes.float() * scales.float()[:, None]).T
    except (AttributeError, RuntimeError):
        return None
    return product if float((found - right).norm()) <= 2**-6 * float(right.norm()) else None


def _int8_product(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x, codes, scales)
