"""Check and time the product with sparse codes and scales on a GPU (decode/cuda_coded.cu).

    python -m oracle_tests.programs.gpu_codes [--device cuda] [--check] [--sweep] [--dtype bfloat16]

Checks against the spec's weights: odd shapes, empty and full rows, batches of 1 to 8 and more, codes of 2 to 8 bits, bf16 and
fp16, x and bias at odd addresses, tiny and large scales, layouts stacked, unpacking, a CUDA graph. Then, without `--check`, times
LLaMA-2-7B's projections, those with the same input as one product: dense in bf16 (cuBLAS, apart and as one), torch's dense int4,
our bf16 values, int8 and int4; with `--sweep` instead the ways to divide ours at 70 % zeros. Exits with 1 if a number is wrong.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from oracle_tests import tolerances
from oracle_tests.poison import poisoned
from oracle_tests.programs.gpu_kernels import HEADING, Case, Maker, Worst, wide
from torch_impl import quantise
from torch_impl.bench import decode, int4
from torch_impl.bench.measure import graphed
from torch_impl.decode import cuda, cuda_coded
from torch_impl.decode.cuda_plan import MOST_WARPS, Card

SHAPES = (
    (1, 1),
    (1, 1000),
    (8, 63),
    (63, 1000),
    (129, 257),
    (16, 256),
    (1100, 300),
    (17, 4096),
    (33, 11008),
    (16, 30000),
)
BATCHES = ((1, 0), (1, 1), (2, 0), (3, 1), (4, 0), (5, 0), (6, 0), (7, 1), (8, 0), (8, 1), (13, 0))
BITS = (8, 4, 6, 2)


def rounded(make: Maker, rows: int, columns: int, density: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a sparse matrix whose rows differ in size."""
    weight = make.sparse(rows, columns, density, torch.float32)
    weight *= torch.logspace(-3, 2, rows, device=weight.device)[:, None]
    return quantise.quantise_rows(weight, bits)


Pack = Callable[[torch.Tensor, torch.Tensor, int, torch.dtype], cuda.Layout]


def check(
    make: Maker,
    dtype: torch.dtype,
    bits: int,
    shapes: Sequence[tuple[int, int]],
    pack: Pack = cuda_coded.pack_codes,
) -> Iterator[Case]:
    """Unpacking and products of every shape."""
    for (rows, columns), density in itertools.product(shapes, (0.0, 0.3, 1.0)):
        codes, scales = rounded(make, rows, columns, density, bits)
        layout = pack(codes, scales, bits, dtype)
        where = f"{rows} x {columns}, {density:.0%} kept"
        weight = quantise.dequantise_rows(codes, scales)
        [W] = wide(weight)
        yield f"{where}, unpacked", cuda.unpack(layout), *wide(weight.float().to(dtype)), np.zeros(W.shape)
        for batch, shift in BATCHES:
            x = make.normal(batch, columns, dtype=dtype, shift=shift)
            bias = make.normal(rows, dtype=dtype, shift=shift) if batch % 2 else None
            # More rows, and rows too long for shared memory, multiply with the unpacked weight, rounded to the dtype.
            unpacked = batch > layout.MOST_ROWS or layout.plan[5] == 0
            inputs, offset = wide(x)[0], 0.0 if bias is None else wide(bias)[0]
            expected, terms = inputs @ W.T + offset, abs(inputs) @ abs(W).T + abs(offset)
            allowed = tolerances.one_rounding(dtype, abs(expected), terms)
            if unpacked:
                allowed += 4 * tolerances.UNIT[dtype] * terms
            found = cuda.matvec(layout, x, bias)
            # What fp16 cannot hold is infinite in both.
            beyond = abs(expected) > torch.finfo(dtype).max
            yield f"{where}, batch {batch}", found, expected, np.where(beyond, np.inf, allowed)


def check_small_numbers(
    make: Maker, dtype: torch.dtype, bits: int, pack: Pack = cuda_coded.pack_codes
) -> Iterator[Case]:
    """Inputs near the ends of bf16's usual range: codes are subnormal numbers in the product."""
    codes, scales = rounded(make, 64, 512, 0.5, bits)
    [W] = wide(quantise.dequantise_rows(codes, scales))
    layout = pack(codes, scales, bits, dtype)
    for exponent in (-40, -14, 0, 8, 30) if dtype == torch.bfloat16 else (-14, -4, 0):
        x = make.put((torch.randn(3, 512) * 2.0**exponent).to(dtype))
        [inputs] = wide(x)
        expected, terms = inputs @ W.T, abs(inputs) @ abs(W).T
        allowed = tolerances.one_rounding(dtype, abs(expected), terms)
        beyond = abs(expected) > torch.finfo(dtype).max
        yield f"x of 2^{exponent}", cuda.matvec(layout, x), expected, np.where(beyond, np.inf, allowed)


def divisions(layout: cuda.Layout) -> list[tuple[int, int]]:
    """Return the ways to divide a product that fit: (panels of a warp, strips of a block)."""
    found, most = [], Card.of(layout.data.device).shared
    for share, groups in itertools.product(range(1, min(layout.panels, 29) + 1), range(1, 17)):
        across = -(-layout.panels // share)
        shared = layout.shared(across * groups)
        if 4 <= across * groups <= MOST_WARPS and across * share < 1.25 * layout.panels and shared <= most:
            found.append((share, groups))
    return found


def divided(layout: cuda.Layout, x: torch.Tensor, way: tuple[int, int]) -> torch.Tensor:
    """Multiply up to eight rows, divided as given; without a GPU, by torch."""
    if layout.product is None:
        return cuda.matvec(layout, x)
    numbers = list(layout.plan)
    numbers[cuda.SHARE], numbers[cuda.TOGETHER] = way
    y: torch.Tensor = layout.product(x, layout.data, layout.starts, numbers, None)
    return y


def check_divisions(make: Maker, dtype: torch.dtype, bits: int) -> Iterator[Case]:
    """Some ways to divide a product, of codes and of values."""
    codes, scales = rounded(make, 176, 4096, 0.3, bits)
    weight = quantise.dequantise_rows(codes, scales)
    values = weight.float().to(dtype)
    for layout, same in ((cuda_coded.pack_codes(codes, scales, bits, dtype), weight), (cuda.pack_rows(values), values)):
        [W] = wide(same)
        for batch, way in itertools.product((1, 8), divisions(layout)[::6]):
            x = make.normal(batch, 4096, dtype=dtype)
            [inputs] = wide(x)
            expected, terms = inputs @ W.T, abs(inputs) @ abs(W).T
            yield (
                f"divided by {way}",
                divided(layout, x, way),
                expected,
                tolerances.one_rounding(dtype, abs(expected), terms),
            )


def check_stacked(make: Maker, dtype: torch.dtype, bits: int, pack: Pack = cuda_coded.pack_codes) -> Iterator[Case]:
    """Layouts with the same input as one, captured in a CUDA graph, bit for bit."""
    layouts = [pack(*rounded(make, rows, 700, 0.4, bits), bits, dtype) for rows in (32, 64, 21)]
    stacked, x = cuda.stack(layouts), make.normal(2, 700, dtype=dtype)
    assert stacked is not None
    expected = torch.cat([cuda.matvec(layout, x) for layout in layouts], 1)
    yield "stacked", cuda.matvec(stacked, x), *wide(expected), np.zeros(expected.shape)
    if x.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.matvec(stacked, x)
        y.fill_(float("nan"))
        graph.replay()
        yield "in a CUDA graph", y, *wide(expected), np.zeros(expected.shape)


def check_all(device: torch.device, shapes: Sequence[tuple[int, int]]) -> bool:
    """Print a line for each dtype and number of bits; return whether all are right."""
    right = True
    print(HEADING)
    for dtype, bits in itertools.product(cuda.DTYPES, BITS):
        worst, make = Worst(), Maker(device)
        with poisoned():
            checks = (
                check(make, dtype, bits, shapes),
                check_small_numbers(make, dtype, bits),
                check_stacked(make, dtype, bits),
                check_divisions(make, dtype, bits),
            )
            for case in itertools.chain(*checks):
                where, found, expected, allowed = case
                known = np.isfinite(allowed)
                finite = torch.where(torch.from_numpy(known).to(found.device), found, 0)
                worst.add((where, finite, np.where(known, expected, 0), np.where(known, allowed, 0)))
        right &= worst.report(f"{bits} bits", dtype)
    return right


Product = Callable[[torch.Tensor], torch.Tensor]


def microseconds(product: Product, nbytes: int, x: torch.Tensor) -> float:
    """Time a product over copies that exceed the cache."""
    copies = [copy.deepcopy(product) for _ in range(decode._copies(nbytes, x.device))]
    return graphed([partial(own, x) for own in copies], x.device, 5)


def packed(weight: torch.Tensor, values: str, batch: int) -> tuple[Product, int]:
    """Return the product with the weight packed for so many rows of input, and its bytes."""
    product, nbytes, _ = decode.pack(weight, values, batch)
    return product, nbytes


def time_projection(name: str, rows: tuple[int, ...], columns: int, dtype: torch.dtype, batches: Sequence[int]) -> None:
    """Print the rows of the table for a projection."""
    weight = torch.randn(sum(rows), columns, device="cuda", dtype=dtype) / columns**0.5
    inputs = {batch: torch.randn(batch, columns, device="cuda", dtype=dtype) for batch in batches}
    dense = {}
    for batch, x in inputs.items():
        apart = sum(microseconds(partial(_linear, part.clone()), part.nbytes, x) for part in weight.split(rows))
        dense[batch] = apart, microseconds(partial(_linear, weight), weight.nbytes, x)
    tiles = int4.pack(weight)
    four = {
        batch: microseconds(partial(_int4, *tiles), sum(t.nbytes for t in tiles), x) if tiles else float("nan")
        for batch, x in inputs.items()
    }
    for sparsity in ("50", "60", "70"):
        zeroed = decode.sparse(weight, sparsity)
        for batch, x in inputs.items():
            forms = {values: packed(zeroed, values, batch) for values in ("same", "int8", "int4")}
            ours = {values: microseconds(*form, x) for values, form in forms.items()}
            cells = "".join(
                f"{us:>8.2f} µs{dense[batch][0] / us:>6.2f}×{forms[values][1] * 8 / weight.numel():>6.2f}"
                for values, us in ours.items()
            )
            apart, joined = dense[batch]
            print(
                f"{name:<9}{sparsity:>3} %{batch:>6}{apart:>9.2f}{joined:>9.2f}{four[batch]:>9.2f}{cells}", flush=True
            )


def sweep(name: str, rows: int, columns: int, dtype: torch.dtype, batches: Sequence[int]) -> None:
    """Print the fastest ways to divide a product, by (panels of a warp, strips of a block), beside that of today."""
    weight = decode.sparse(torch.randn(rows, columns, device="cuda", dtype=dtype) / columns**0.5, "70")
    layouts = {"bf16": cuda.pack_rows(weight)}
    for bits in (8, 4):
        layouts[f"int{bits}"] = cuda_coded.pack_codes(*quantise.quantise_rows(weight, bits), bits, dtype)
    for batch, (kind, layout) in itertools.product(batches, layouts.items()):
        x, own = (
            torch.randn(batch, columns, device="cuda", dtype=dtype),
            (layout.plan[cuda.SHARE], layout.plan[cuda.TOGETHER]),
        )
        copies = [cuda.stack([layout]) or layout for _ in range(decode._copies(layout.nbytes, x.device))]
        ways = {own, *divisions(layout)}
        found = {way: graphed([partial(divided, one, x, way) for one in copies], x.device, 3) for way in ways}
        best = "  ".join(f"{way} {found[way]:.2f}" for way in sorted(found, key=found.__getitem__)[:5])
        print(f"{name:<9}{kind:<5}{batch:>3} rows, today {own} {found[own]:.2f} µs; best {best}", flush=True)


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


def _int4(tiles: torch.Tensor, both: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return int4.product(tiles, both, x)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time. Returns 1 if a number is wrong or the kernels cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check", action="store_true", help="do not time")
    parser.add_argument("--small", action="store_true", help="few shapes: runs anywhere in seconds")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of the timed products")
    parser.add_argument("--sweep", action="store_true", help="time the ways to divide a product instead")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not cuda.available()[0]:
        print(cuda.available()[1])
        return 1
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    right = check_all(device, SHAPES[:3] if options.small else SHAPES)
    if options.check or device.type != "cuda":
        return int(not right)
    dtype, shapes = getattr(torch, options.dtype), decode.projections("llama-2-7b", joined=True)
    if options.sweep:
        for name, (rows, width, _) in shapes.items():
            sweep(name, sum(rows), width, dtype, options.batches)
        return int(not right)
    columns = "".join(f"{name:>11}{'ratio':>7}{'bits':>6}" for name in ("our bf16", "int8", "int4"))
    print(f"{'':<9}{'zeros':>5}{'batch':>6}{'cuBLAS':>9}{'as one':>9}{'int4':>9}{columns}")
    for name, (rows, width, _) in shapes.items():
        time_projection(name, rows, width, dtype, options.batches)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
