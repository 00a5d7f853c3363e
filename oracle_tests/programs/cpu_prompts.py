"""Time products of prompts with a packed weight on the CPU against torch's with the dense one (decode/cpu.py `linear_unpacked`).

    OMP_NUM_THREADS=1 python -m oracle_tests.programs.cpu_prompts [--rows 16 32 128 512] [--shapes 4096x4096 …] [--seconds 3]

70 % zeros, bf16, the values of the weight and codes of 8 bits. The sides take turns, a product each; the fastest of each counts.
With one thread the CPU's clock of that thread counts, which other work on the machine moves least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional

from torch_impl import packed
from torch_impl.decode import cpu
from torch_impl.quantise import quantise_rows

SHAPES = ("4096x4096", "11008x4096", "4096x11008", "2048x2048", "8192x2048", "2048x8192")


def fastest(sides: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the milliseconds of each side's fastest call, of at least three."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(sides)
    end, turn = time.monotonic() + seconds, 0
    while turn < 3 or time.monotonic() < end:
        for index, side in enumerate(sides):
            start = clock()
            side()
            best[index] = min(best[index], 1e3 * (clock() - start))
        turn += 1
    return best


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=3.0, help="per line")
    options = parser.parse_args(arguments)
    print(
        f"{torch.get_num_threads()} threads, {' '.join(cpu.paths())}; ms (dense / ours)\nweight rows | dense | bf16 | int8"
    )
    for shape in options.shapes:
        height, width = map(int, shape.split("x"))
        weight = torch.randn(height, width).bfloat16() * (torch.rand(height, width) >= 0.7)
        codes, scales = quantise_rows(weight, 8)
        bitmap, stream, offsets = packed.pack_codes(codes, 8)
        parts = (packed.pack(weight), (bitmap, stream, scales, offsets))
        for rows in options.rows:
            x = torch.randn(rows, width).bfloat16()
            sides = [partial(functional.linear, x, weight), *(partial(cpu.linear_unpacked, x, each) for each in parts)]
            dense, *ours = fastest(sides, options.seconds)
            print(f"{shape} {rows} | {dense:.2f} | " + " | ".join(f"{each:.2f} ({dense / each:.2f}×)" for each in ours))
    return 0


if __name__ == "__main__":
    sys.exit(main())
