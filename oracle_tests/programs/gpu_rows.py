"""Check and time products with 9 to 64 rows of input, and unpacking, on a GPU (decode/cuda*.cu).

    python -m oracle_tests.programs.gpu_rows [--device cuda] [--check] [--sweep]

Checks them against the spec: shapes that do not fit tiles, empty and full rows, 1 to 64 rows of input, bf16 and fp16, 0 to 100 %
zeros, odd addresses, projections joined in one layout, a CUDA graph, the ways to divide a product by cuda_plan.py, products
that keep the whole GPU busy.
Then times the products of a block of LLaMA-2-7B's and LLaMA-3.2-1B's shapes: 8, 16 and 32 rows at a time, unpacked before cuBLAS,
dense by cuBLAS. Prints from how many rows unpacking is faster, which `MOST_ROWS` has to be. `--sweep` times instead how each
projection of 7B can be divided, for one and eight rows too, beside what cuda_plan.py chooses and the kernel for eight rows.
Exits with 1 if a number is wrong. Without a GPU, torch computes the products.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils import cpp_extension

from oracle_tests import tolerances
from oracle_tests.poison import poisoned
from oracle_tests.programs.gpu_kernels import HEADING, Case, Maker, Worst, wide
from torch_impl import quantise
from torch_impl.bench import decode
from torch_impl.bench.measure import graphed
from torch_impl.decode import cuda, cuda_coded
from torch_impl.decode.cuda_plan import MOST_ROW_WARPS, Card, Division, rows_kernel_bytes

SHAPES = ((1, 8), (8, 64), (17, 1000), (33, 4096), (129, 136), (1100, 304), (63, 1001), (16, 128), (48, 11008))
BATCHES = (1, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64)
KEPT = (0.0, 0.2, 0.3, 0.5, 1.0)
ROWS = (8, 16, 24, 32, 48, 64, 96, 128)
# Strips, warps for a row and groups of a block, as the sweep tries them.
DIVISIONS = tuple(itertools.product((1, 2), (1, 2, 4, 6, 8, 11, 16, 22, 24), (1, 2, 3, 4, 6, 11)))
ALWAYS = 2**30


def plan(layout: cuda.Layout, at_once: int, most: int = ALWAYS) -> list[int]:
    """Return a layout's plan with another number of rows at once, and up to which it is not unpacked."""
    own = layout.plan
    return [*own[:7], most, own[8], at_once, *own[10:]]


def product(layout: cuda.Layout, x: torch.Tensor, numbers: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by a plan."""
    if layout.product is None:
        return cuda.matvec(layout, x, bias)
    y: torch.Tensor = layout.product(x, layout.data, layout.starts, numbers, bias)
    return y


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels without operators, to divide a product in other ways."""
    return ctypes.CDLL(str(Path(cpp_extension._get_build_directory("losa_cuda_decode", False)) / "losa_cuda_decode.so"))


def divided(layout: cuda.Layout, x: torch.Tensor, y: torch.Tensor, way: Division) -> torch.Tensor:
    """Multiply up to 32 rows, divided as given."""
    pointers = [
        ctypes.c_void_p(t.data_ptr()) if t is not None else None for t in (layout.data, layout.starts, x, None, y)
    ]
    half, early = layout.plan[4], layout.plan[6]
    shape = (layout.rows, layout.columns, layout.panels, layout.slot, half, len(x))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = library().losa_matvec_rows(*pointers, *shape, *way, early, stream)
    if error:
        raise RuntimeError(f"losa_matvec_rows failed with CUDA error {error}, divided by {way}")
    return y


def divisions(layout: cuda.Layout) -> list[Division]:
    """Return the ways to divide a product that fit, each once."""
    found, card = [], Card.of(layout.data.device)
    for strips, warps, groups in DIVISIONS:
        way = Division(strips, min(-(-layout.panels // warps), 29), groups)
        warps = way.warps(layout.panels)
        if warps <= MOST_ROW_WARPS and warps * rows_kernel_bytes(layout.slot, strips) <= card.shared:
            found.append(way)
    return sorted(set(found))


def _bounds(
    weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Return the spec's product and the bound of every entry."""
    W, inputs = wide(weight, x)
    offset = 0.0 if bias is None else wide(bias)[0]
    expected = inputs @ W.T + offset
    return expected, tolerances.one_rounding(dtype, abs(expected), abs(inputs) @ abs(W).T + abs(offset))


def check_products(make: Maker, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Products through the operator, 16 and 32 rows at once, and unpacking."""
    for (rows, columns), density in itertools.product(shapes, KEPT):
        weight = make.sparse(rows, columns, density, dtype)
        layout, where = cuda.pack_rows(weight), f"{rows} x {columns}, {density:.0%} kept"
        [W] = wide(weight)
        yield f"{where}, unpacked", cuda.unpack(layout), W, np.zeros(W.shape)
        for batch, shift, at_once in itertools.product(BATCHES, (0, 1), (16, 32)):
            if shift and batch not in (9, 32):
                continue
            x = make.normal(batch, columns, dtype=dtype, shift=shift)
            bias = make.normal(rows, dtype=dtype, shift=shift) if batch % 2 else None
            expected, allowed = _bounds(weight, x, bias, dtype)
            found = product(layout, x, plan(layout, at_once), bias)
            yield f"{where}, batch {batch} by {at_once}, shift {shift}", found, expected, allowed


def check_codes(make: Maker, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Unpacking of codes and scales."""
    for (rows, columns), density, bits in itertools.product(shapes, KEPT, (8, 4)):
        codes, scales = quantise.quantise_rows(make.sparse(rows, columns, density, torch.float32), bits)
        layout = cuda_coded.pack_codes(codes, scales, bits, dtype)
        [W] = wide(quantise.dequantise_rows(codes, scales).float().to(dtype))
        found = cuda.unpack(layout)
        yield f"{rows} x {columns}, {density:.0%} kept, {bits} bits", found, W, np.zeros(W.shape)


def check_busy(make: Maker, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Products that fill the GPU: what goes wrong in one of 10,000 blocks shows only here."""
    rows, columns = (64, 256) if small else (22016, 4096)
    for density in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5):
        weight = make.sparse(rows, columns, density, dtype)
        layout = cuda.pack_rows(weight)
        for batch in (8, 16, 32, 128):
            x = make.normal(batch, columns, dtype=dtype)
            expected = x.double() @ weight.double().T
            allowed = tolerances.one_rounding(
                dtype, expected.abs().cpu().numpy(), (x.double().abs() @ weight.double().abs().T).cpu().numpy()
            )
            for attempt in range(4):
                found = product(layout, x, plan(layout, 32))
                yield (
                    f"{rows} x {columns}, {density:.0%} kept, {batch} rows, attempt {attempt}",
                    found,
                    *wide(expected),
                    allowed,
                )


def check_divisions(make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """All ways to divide a product; without a GPU there is one."""
    for rows, columns in ((176, 4096), (33, 1000)):
        weight = make.sparse(rows, columns, 0.3, dtype)
        layout = cuda.pack_rows(weight)
        for batch in (5, 16, 32):
            x = make.normal(batch, columns, dtype=dtype)
            expected, allowed = _bounds(weight, x, None, dtype)
            ways = divisions(layout) if x.is_cuda else [Division(1, 1, 1)]
            for way in ways:
                y = make.put(torch.full((batch, rows), float("nan"), dtype=dtype))
                try:
                    found = divided(layout, x, y, way) if x.is_cuda else cuda.matvec(layout, x)
                except RuntimeError as error:
                    # y is NaN, so the case counts as wrong.
                    print(error, flush=True)
                    found = y
                yield f"{rows} x {columns}, batch {batch}, {way}", found, expected, allowed


def check_joined(make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """Layouts with the same input as one, in a CUDA graph: the bits of each alone, in any group of rows."""
    weights = [make.sparse(rows, 1024, 0.4, dtype) for rows in (32, 16, 21)]
    stacked, x = cuda.stack([cuda.pack_rows(weight) for weight in weights]), make.normal(19, 1024, dtype=dtype)
    assert stacked is not None
    whole = torch.cat(weights)
    expected, allowed = _bounds(whole, x, None, dtype)
    numbers = plan(stacked, 32)
    first = product(stacked, x, numbers)
    yield "joined", first, expected, allowed
    if x.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dense = product(stacked, x, numbers), cuda.unpack(stacked)
        y.fill_(float("nan"))
        dense.fill_(float("nan"))
        graph.replay()
        yield "in a CUDA graph", y, *wide(first), np.zeros(expected.shape)
        yield "unpacked in a CUDA graph", dense, *wide(whole), np.zeros(whole.shape)


def check_all(device: torch.device, small: bool) -> bool:
    """Print a line for each dtype and check; return whether all are right."""
    right = True
    shapes = SHAPES[1:3] if small else SHAPES
    print(HEADING)
    checks: dict[str, Callable[[Maker, torch.dtype], Iterator[Case]]] = {
        "products": lambda make, dtype: check_products(make, dtype, shapes),
        "codes": lambda make, dtype: check_codes(make, dtype, shapes),
        "busy": lambda make, dtype: check_busy(make, dtype, small),
        "divisions": check_divisions,
        "joined": check_joined,
    }
    for dtype, (name, check) in itertools.product(cuda.DTYPES, checks.items()):
        worst = Worst()
        with poisoned():
            for case in check(Maker(device), dtype):
                worst.add(case)
        right &= worst.report(name, dtype)
    return right


def time_block(name: str, sparsity: str, dtype: torch.dtype, device: torch.device, rows: Sequence[int]) -> None:
    """Print the µs of a block's products for several numbers of rows of input, and where unpacking becomes faster."""
    shapes = [(sum(parts), width) for parts, width, _ in decode.projections(name, joined=True).values()]
    # Blocks enough that no cache holds their weights.
    blocks = _copies(sum(height * width for height, width in shapes) // 3, device)
    weights = [
        decode.sparse(torch.randn(shape, device=device, dtype=dtype) / shape[1] ** 0.5, sparsity)
        for _ in range(blocks)
        for shape in shapes
    ]
    layouts = [cuda.pack_rows(weight) for weight in weights]
    print(f"{name}, {sparsity} %, µs of one block's products; ratio: dense / the faster of 16 and 32 at once")
    print(f"{'rows':>6}{'8 at once':>11}{'16':>9}{'32':>9}{'unpacked':>10}{'dense':>9}{'ratio':>8}")
    last = 0
    for count in rows:
        xs = [torch.randn(count, width, device=device, dtype=dtype) for _, width in shapes] * blocks
        ways = [(8, ALWAYS), (16, ALWAYS), (32, ALWAYS), (8, 0)]
        found = [
            _microseconds(
                [partial(product, own, x, plan(own, *way)) for own, x in zip(layouts, xs, strict=True)], device
            )
            for way in ways
        ]
        found.append(
            _microseconds([partial(functional.linear, x, w) for x, w in zip(xs, weights, strict=True)], device)
        )
        eight, sixteen, more, unpacked, dense = (us * len(shapes) for us in found)
        packed = min(eight, sixteen, more)
        last = count if packed < unpacked else last
        print(
            f"{count:>6}{eight:>11.1f}{sixteen:>9.1f}{more:>9.1f}{unpacked:>10.1f}{dense:>9.1f}"
            f"{dense / min(sixteen, more):>7.2f}×",
            flush=True,
        )
    print(f"    the packed weight is faster than unpacking up to {last} rows (of those timed)")


def time_unpacking(name: str, sparsity: str, dtype: torch.dtype, device: torch.device) -> None:
    """Print the µs of unpacking a block's projections: of values, and of codes of 8 and 4 bits."""
    found: dict[str, float] = {}
    for parts, width, _ in decode.projections(name, joined=True).values():
        weight = decode.sparse(torch.randn(sum(parts), width, device=device, dtype=dtype) / width**0.5, sparsity)
        layouts: dict[str, cuda.Layout] = {"values": cuda.pack_rows(weight)}
        for bits in (8, 4):
            codes, scales = quantise.quantise_rows(weight, bits)
            layouts[f"int{bits}"] = cuda_coded.pack_codes(codes, scales, bits, dtype)
        for kind, layout in layouts.items():
            # What is unpacked is larger than any cache.
            found[kind] = found.get(kind, 0) + _microseconds([partial(cuda.unpack, layout)] * 2, device)
    cells = ", ".join(f"{kind} {us:.0f}" for kind, us in found.items())
    print(f"{name}, {sparsity} %, µs to unpack a block: {cells}", flush=True)


def _copies(nbytes: int, device: torch.device) -> int:
    return decode._copies(nbytes, device) if device.type == "cuda" else 1


def _microseconds(actions: Sequence[Callable[[], Any]], device: torch.device) -> float:
    return graphed(actions, device, 5)


def _timed(actions: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Time them; infinite if the GPU cannot launch them."""
    try:
        return graphed(actions, device, 3)
    except RuntimeError as error:
        print(f"    {error}", flush=True)
        return math.inf


def sweep(name: str, sparsity: str, dtype: torch.dtype, device: torch.device, rows: Sequence[int]) -> None:
    """Print the fastest ways to divide each projection, what the plan chooses, and the sums over a block."""
    print(f"{name}, {sparsity} %: µs of a projection by (strips of a warp, its panels, groups of a block)")
    sums = {count: np.zeros(3) for count in rows}
    for projection, (parts, width, _) in decode.projections(name, joined=True).items():
        weight = torch.randn(sum(parts), width, device=device, dtype=dtype) / width**0.5
        layout = cuda.pack_rows(decode.sparse(weight, sparsity))
        copies = [cuda.stack([layout]) or layout for _ in range(_copies(layout.nbytes, device))]
        planned = Division(*layout.plan[10:13])
        for count in rows:
            x, y = torch.randn(count, width, device=device, dtype=dtype), weight.new_empty(count, sum(parts))
            ways = {planned, *divisions(layout)}
            found = {way: _timed([partial(divided, own, x, y, way) for own in copies], device) for way in ways}
            today = _microseconds([partial(product, own, x, plan(own, 8)) for own in copies], device)
            best = sorted(ways, key=found.__getitem__)[:4]
            cells = "  ".join(f"{tuple(way)} {found[way]:.1f}" for way in best)
            print(
                f"    {projection:<8}{count:>3} rows: {cells}   plan {tuple(planned)} {found[planned]:.1f}   "
                f"eight at once {today:.1f}",
                flush=True,
            )
            sums[count] += (found[best[0]], found[planned], today)
    for count, (first, own, today) in sums.items():
        print(f"    a block, {count} rows: best {first:.1f}, plan {own:.1f}, eight at once {today:.1f}")


def parsed(description: str | None, arguments: Sequence[str] | None, batches: bool = False) -> argparse.Namespace:
    """Read the options of a program that checks and times products. batches: the rows of input can be chosen."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="do not time")
    parser.add_argument("--sweep", action="store_true", help="time the ways to divide a product instead")
    parser.add_argument("--small", action="store_true", help="few shapes: runs anywhere in seconds")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the timed products")
    parser.add_argument("--sparsities", nargs="+", default=["70", "50", "60", "80"], metavar="PERCENT")
    if batches:
        parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8], metavar="ROWS")
    return parser.parse_args(arguments)


def built(device: torch.device) -> bool:
    """Build the kernels and print where they run, and how long that took; or print why they cannot."""
    start = time.perf_counter()
    if device.type == "cuda" and not cuda.available()[0]:
        print(cuda.available()[1])
        return False
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print(f"built in {time.perf_counter() - start:.0f} s")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time. Returns 1 if a number is wrong or the kernels cannot run."""
    options = parsed(__doc__, arguments)
    device, start = torch.device(options.device), time.perf_counter()
    if not built(device):
        return 1
    right = check_all(device, options.small)
    dtype = getattr(torch, options.dtype)
    if options.sweep and device.type == "cuda":
        for sparsity in options.sparsities:
            sweep("llama-2-7b", sparsity, dtype, device, (1, 8, 16, 32))
    elif not options.check:
        for name, sparsity in itertools.product(
            ["small"] if options.small else ["llama-2-7b", "llama-3.2-1b"], options.sparsities
        ):
            time_block(name, sparsity, dtype, device, ROWS[:2] if options.small else ROWS)
        time_unpacking("small" if options.small else "llama-2-7b", options.sparsities[0], dtype, device)
    print(f"{'all right' if right else 'WRONG'}, {time.perf_counter() - start:.0f} s")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
