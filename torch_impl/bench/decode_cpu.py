"""Decoding on the CPU, kernel by kernel: packed projections against the best dense bf16 there.

Dense is torch's own linear and, where the CPU has VDPBF16PS, a loop as well written as ours; the faster of the two counts.
One pass goes over all projections of enough blocks to overflow any cache; sides take turns, and the quickest pass of each counts:
other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl import packed
from torch_impl.bench.geometry import GEOMETRIES
from torch_impl.bench.measure import relative
from torch_impl.engine import cpu_decode

PATTERNS: tuple[float | str, ...] = (0.0, 0.5, 0.6, 0.7, 0.8, "2:4")
# Packed weights that one pass reads, at least: several times any last-level cache.
STREAM = 256e6


@dataclass
class DecodeRow:
    """One pattern and batch: milliseconds of a block's projections by each side, bytes read, and how far apart they are."""

    geometry: str
    pattern: str
    batch: int
    packed_ms: float
    torch_ms: float
    loop_ms: float | None
    packed_bytes: int
    dense_bytes: int
    disagreement: float

    @property
    def ratio(self) -> float:
        """How many times faster than the best dense."""
        return min(self.torch_ms, self.loop_ms or self.torch_ms) / self.packed_ms

    @property
    def limit(self) -> float:
        """The ratio if both sides read their weights at the same rate."""
        return self.dense_bytes / self.packed_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "limit": self.limit}


def projections(geometry: str) -> list[tuple[int, int]]:
    """(out, in) of a block's projections."""
    shape = GEOMETRIES[geometry]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return [
        (hidden, hidden),
        (narrow, hidden),
        (narrow, hidden),
        (hidden, hidden),
        *[(inner, hidden)] * 2,
        (hidden, inner),
    ]


def dense_loop() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The hand-written dense bf16 loop, where this CPU and its compiler have one."""
    if "avx512bf16" not in cpu_decode.paths():
        return None
    cpu_decode.build(Path(__file__).with_name("dense_loop.cpp"))
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.ops.losa_dense_loop.linear
    return function


def kept(rows: int, columns: int, pattern: float | str, generator: torch.Generator) -> torch.Tensor:
    """A random mask (rows, columns): that share of zeros, or two of every four kept."""
    score = torch.rand(rows, columns, generator=generator)
    if pattern == "2:4":
        groups = score.view(rows, -1, 4)
        return (groups >= groups.topk(2, dim=2).values[..., 1:]).view(rows, columns)
    return score >= float(pattern)


def quickest(sides: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Milliseconds of the quickest of `repeats` calls of each side, taken in turns after one call each."""
    best = [float("inf")] * len(sides)
    for turn in range(repeats + 1):
        for index, side in enumerate(sides):
            start = time.perf_counter()
            side()
            if turn:
                best[index] = min(best[index], (time.perf_counter() - start) * 1e3)
    return best


@torch.no_grad()
def measure(geometry: str, pattern: float | str, batches: Sequence[int], repeats: int) -> list[DecodeRow]:
    """All projections of a block, at one pattern, for every batch."""
    generator = torch.Generator().manual_seed(0)
    loop, shapes, blocks = dense_loop(), projections(geometry), 1
    dense: list[torch.Tensor] = []
    sparse: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    while not sparse or sum(part.nbytes for parts in sparse for part in parts) < STREAM:
        blocks = len(sparse) // len(shapes) + 1
        for rows, columns in shapes:
            # Filled, not multiplied: 0 times a negative weight is a negative zero, which packing keeps.
            weight = torch.randn(rows, columns, generator=generator)
            weight.masked_fill_(~kept(rows, columns, pattern, generator), 0.0)
            dense.append(weight.bfloat16())
            sparse.append(packed.pack(dense[-1]))
    rows_found = []
    for batch in batches:
        xs = [torch.randn(batch, weight.shape[1], generator=generator).bfloat16() for weight in dense]

        plain = [(weight,) for weight in dense]
        sides = [partial(_each, cpu_decode.linear, xs, sparse), partial(_each, nn.functional.linear, xs, plain)]
        sides += [partial(_each, loop, xs, plain)] if loop else []
        times = [milliseconds / blocks for milliseconds in quickest(sides, repeats)]
        expected = nn.functional.linear(xs[0].float(), dense[0].float())
        bitmap, values, offsets = sparse[0]
        rows_found.append(
            DecodeRow(
                geometry,
                str(pattern),
                batch,
                times[0],
                times[1],
                times[2] if loop else None,
                sum(part.nbytes for parts in sparse for part in parts) // blocks,
                sum(weight.nbytes for weight in dense) // blocks,
                relative(cpu_decode.linear(xs[0], bitmap, values, offsets), expected),
            )
        )
    return rows_found


def _each(
    function: Callable[..., torch.Tensor], xs: Sequence[torch.Tensor], weights: Sequence[Sequence[torch.Tensor]]
) -> None:
    for x, weight in zip(xs, weights, strict=True):
        function(x, *weight)


def line(row: DecodeRow) -> str:
    """One row of the table."""
    loop = "" if row.loop_ms is None else f"{row.loop_ms:.2f} ms"
    return (
        f"{row.geometry:<12}{row.pattern:>6}{row.batch:>7}{row.packed_ms:>9.2f} ms{row.torch_ms:>9.2f} ms{loop:>12}"
        f"{row.ratio:>8.2f}×{row.limit:>8.2f}×{row.packed_bytes / row.packed_ms / 1e6:>8.1f}{row.disagreement:>11.1e}"
    )


HEADER = f"{'':<12}{'zeros':>6}{'batch':>7}{'packed':>12}{'torch':>12}{'loop':>12}{'ratio':>9}{'limit':>9}{'GB/s':>8}{'apart':>11}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print, a line as soon as it is there."""
    parser = argparse.ArgumentParser(prog="python -m torch_impl.bench.decode_cpu", description=__doc__)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="llama-2-7b")
    parser.add_argument("--zeros", nargs="+", default=[str(p) for p in PATTERNS], choices=[str(p) for p in PATTERNS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], choices=range(1, 9))
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each side; the quickest counts")
    options = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads, path {', '.join(cpu_decode.paths()[:1])}, bf16; a block's projections")
    print(HEADER)
    for pattern in options.zeros:
        for row in measure(options.geometry, pattern, options.batches, options.repeats):
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
