"""Check and time products of codes, scales and gaps with one to eight rows of input, and unpacking, on a GPU (cuda_coded_gaps.cu).

    python -m oracle_tests.programs.gpu_coded_gaps [--device cuda] [--check] [--sweep] [--dtype bfloat16]

Checks as gpu_codes, and the ways to divide a product. Then times LLaMA-2-7B's projections, those with one input as one product:
dense (cuBLAS, apart), bf16 gaps, and codes of 8 and 4 bits as panels (cuda_coded.cu) and as gaps; and the unpacking of a block.
`--sweep` times instead the ways to divide a product of one row at 70 % zeros. Exits with 1 if a number is wrong. Without a GPU,
torch computes the products.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from oracle_tests import tolerances
from oracle_tests.poison import poisoned
from oracle_tests.programs import gpu_codes, gpu_gaps
from oracle_tests.programs.gpu_kernels import HEADING, Case, Maker, Worst, wide
from oracle_tests.programs.gpu_rows import built, parsed
from torch_impl import quantise
from torch_impl.bench import decode
from torch_impl.bench.measure import graphed
from torch_impl.decode import cuda, cuda_coded, cuda_coded_gaps, cuda_gaps

pack = cuda_coded_gaps.pack_codes
KINDS = ("bf16 gaps", "int8 panels", "int8 gaps", "int4 panels", "int4 gaps")


def check_divisions(make: Maker, dtype: torch.dtype, bits: int) -> Iterator[Case]:
    """Some ways to divide a product."""
    for rows, columns in ((176, 4096), (70, 1000)):
        codes, scales = gpu_codes.rounded(make, rows, columns, 0.3, bits)
        [W] = wide(quantise.dequantise_rows(codes, scales))
        for parts in (1, 3, 8, 13, 25, 32):
            layout = pack(codes, scales, bits, dtype, parts)
            some = itertools.product(gpu_gaps.ways(layout)[::2], (1, 2, 4, 8)) if codes.is_cuda else [(1, 1)]
            for together, batch in some:
                x = make.normal(batch, columns, dtype=dtype)
                [inputs] = wide(x)
                expected, terms = inputs @ W.T, abs(inputs) @ abs(W).T
                allowed = tolerances.one_rounding(dtype, abs(expected), terms)
                beyond = abs(expected) > torch.finfo(dtype).max
                found = gpu_gaps.divided(layout, x, together)
                yield f"{parts} parts, {together} strips", found, expected, np.where(beyond, np.inf, allowed)


def check_all(device: torch.device, shapes: Sequence[tuple[int, int]], numbers: Sequence[int]) -> bool:
    """Print a line for each dtype and number of bits; return whether all are right."""
    right = True
    print(HEADING)
    for dtype, bits in itertools.product(cuda.DTYPES, numbers):
        worst, make = Worst(), Maker(device)
        with poisoned():
            checks = (
                gpu_codes.check(make, dtype, bits, shapes, pack),
                gpu_codes.check_small_numbers(make, dtype, bits, pack),
                gpu_codes.check_stacked(make, dtype, bits, pack),
                check_divisions(make, dtype, bits),
            )
            for where, found, expected, allowed in itertools.chain(*checks):
                known = np.isfinite(allowed)
                finite = torch.where(torch.from_numpy(known).to(found.device), found, 0)
                worst.add((where, finite, np.where(known, expected, 0), np.where(known, allowed, 0)))
        right &= worst.report(f"{bits} bits", dtype)
    return right


def layouts_of(weight: torch.Tensor) -> list[cuda.Layout]:
    """Return a weight's layouts, in the order of `KINDS`."""
    layouts: list[cuda.Layout] = [cuda_gaps.pack_gaps_rows(weight)]
    for bits in (8, 4):
        coded = quantise.quantise_rows(weight, bits)
        layouts += [own(*coded, bits, weight.dtype) for own in (cuda_coded.pack_codes, pack)]
    return layouts


def time_products(
    name: str, sparsities: Sequence[str], batches: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Print the µs of each projection, dense / ours and bits a weight, and the sums of a block."""
    print(
        f"{'':<9}{'zeros':>5}{'rows':>5}{'dense':>9}" + "".join(f"{kind:>13}{'ratio':>7}{'bits':>6}" for kind in KINDS)
    )
    for sparsity in sparsities:
        sums = {batch: np.zeros(1 + len(KINDS)) for batch in batches}
        for projection, (rows, columns, _) in decode.projections(name, joined=True).items():
            weight = gpu_gaps._weight(sum(rows), columns, sparsity, dtype, device)
            layouts = layouts_of(weight)
            bits = [8 * own.nbytes / weight.numel() for own in layouts]
            for batch in batches:
                x = torch.randn(batch, columns, device=device, dtype=dtype)
                dense = sum(gpu_gaps.microseconds(part.clone(), gpu_gaps._linear, x) for part in weight.split(rows))
                times = [dense, *(gpu_gaps.microseconds(own, cuda.matvec, x) for own in layouts)]
                sums[batch] += times
                _print_line(projection, sparsity, batch, times, bits)
        for batch, total in sums.items():
            _print_line("a block", sparsity, batch, total, [float("nan")] * len(KINDS))


def _print_line(
    name: str, sparsity: str, batch: int, times: Sequence[float] | np.ndarray, bits: Sequence[float]
) -> None:
    dense, *ours = times
    cells = "".join(f"{us:>13.2f}{dense / us:>6.2f}×{each:>6.2f}" for us, each in zip(ours, bits, strict=True))
    print(f"{name:<9}{sparsity:>3} %{batch:>5}{dense:>9.2f}{cells}", flush=True)


def time_unpacking(name: str, sparsity: str, dtype: torch.dtype, device: torch.device) -> None:
    """Print the µs of unpacking a block's projections from each layout."""
    sums = np.zeros(len(KINDS))
    for rows, columns, _ in decode.projections(name, joined=True).values():
        weight = gpu_gaps._weight(sum(rows), columns, sparsity, dtype, device)
        # What is unpacked is larger than any cache.
        sums += [graphed([partial(cuda.unpack, own)] * 2, device, 5) for own in layouts_of(weight)]
    cells = ", ".join(f"{kind} {us:.0f}" for kind, us in zip(KINDS, sums, strict=True))
    print(f"{name}, {sparsity} %, µs to unpack a block: {cells}", flush=True)


def sweep(name: str, sparsity: str, dtype: torch.dtype, device: torch.device, batch: int) -> None:
    """Print the fastest (parts of a strip, strips of a block) of each projection, beside the rule's."""
    for bits in (8, 4):
        sums = np.zeros(2)
        for projection, (rows, columns, _) in decode.projections(name, joined=True).items():
            coded = quantise.quantise_rows(gpu_gaps._weight(sum(rows), columns, sparsity, dtype, device), bits)
            x = torch.randn(batch, columns, device=device, dtype=dtype)
            rule, found = pack(*coded, bits, dtype), {}
            planned = rule.panels, rule.plan[cuda.TOGETHER]
            for parts in sorted({*gpu_gaps.PARTS, rule.panels}):
                layout = pack(*coded, bits, dtype, parts)
                for together in gpu_gaps.ways(layout):
                    found[parts, together] = gpu_gaps.microseconds(layout, gpu_gaps.divided, x, together)
            best = sorted(found, key=found.__getitem__)[:5]
            cells = "  ".join(f"{way} {found[way]:.2f}" for way in best)
            print(f"int{bits} {projection:<9}{cells}   rule {planned} {found[planned]:.2f} µs", flush=True)
            sums += (found[best[0]], found[planned])
        print(f"int{bits} a block, {batch} rows: best {sums[0]:.2f}, rule {sums[1]:.2f} µs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time. Returns 1 if a number is wrong or the kernels cannot run."""
    options = parsed(__doc__, arguments, batches=True)
    device, start = torch.device(options.device), time.perf_counter()
    if not built(device):
        return 1
    right = check_all(
        device, gpu_codes.SHAPES[: 3 if options.small else None], (8, 4) if options.small else (8, 4, 6, 2)
    )
    print(f"checked after {time.perf_counter() - start:.0f} s")
    dtype, name = getattr(torch, options.dtype), "small" if options.small else "llama-2-7b"
    if options.sweep and device.type == "cuda":
        sweep(name, options.sparsities[0], dtype, device, options.batches[0])
    elif not options.check:
        time_products(name, options.sparsities, options.batches, dtype, device)
        for sparsity in options.sparsities[:2]:
            time_unpacking(name, sparsity, dtype, device)
    print(f"{'all right' if right else 'WRONG'}, {time.perf_counter() - start:.0f} s")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
