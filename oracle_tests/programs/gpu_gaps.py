"""Check and time products of values and gaps with one to eight rows of input, and unpacking, on a GPU (decode/cuda_gaps.cu).

    python -m oracle_tests.programs.gpu_gaps [--device cuda] [--check] [--sweep] [--dtype bfloat16]

Checks against the spec: odd shapes, empty, full and uneven rows, 1 to 8 rows of input and more, bf16 and fp16, x and bias at odd
addresses, the ways to divide a product, layouts stacked and in part, unpacking, a CUDA graph. Then times LLaMA-2-7B's
projections, those with the same input as one product: dense (cuBLAS, apart), our panels (cuda.cu) and gaps; and the unpacking of
a block. `--sweep` times instead the ways to divide a product of one row at 70 % zeros, and windows of unpacking. Exits with 1 if
a number is wrong. Without a GPU, torch computes the products.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from oracle_tests import tolerances
from oracle_tests.poison import poisoned
from oracle_tests.programs.gpu_kernels import HEADING, Case, Maker, Worst, wide
from oracle_tests.programs.gpu_rows import built, library, parsed
from torch_impl.bench import decode
from torch_impl.bench.measure import graphed
from torch_impl.decode import cuda, cuda_gaps
from torch_impl.decode.cuda_plan import Card

SHAPES = (
    (1, 1),
    (1, 1000),
    (8, 63),
    (63, 1000),
    (129, 257),
    (1100, 300),
    (33, 4096),
    (17, 11008),
    (40, 30000),
    (3, 70000),
)
BATCHES = ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 1), (5, 0), (8, 0), (8, 3), (13, 0))
PARTS = (4, 6, 8, 10, 12, 16, 20, 24, 28, 32)
WIDTHS = (256, 512, 1024, 1536)


def uneven(make: Maker, rows: int, columns: int, density: float, dtype: torch.dtype) -> torch.Tensor:
    """A sparse weight, of whose rows every third keeps a tenth, and whose last columns are zero in every fourth."""
    weight = make.sparse(rows, columns, density, torch.float32).cpu()
    weight[2::3] *= torch.rand(weight[2::3].shape) < 0.1
    weight[3::4, columns // 2 :] = 0
    return make.put(weight.to(dtype))


def case(
    where: str, found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> Case:
    """A product: off by float32's sums and one rounding; of more rows, by those of cuBLAS."""
    W, inputs = wide(weight, x)
    offset = 0.0 if bias is None else wide(bias)[0]
    expected, terms = inputs @ W.T + offset, abs(inputs) @ abs(W).T + abs(offset)
    allowed = tolerances.one_rounding(weight.dtype, abs(expected), terms)
    if len(x) > cuda_gaps.GapLayout.MOST_ROWS:
        allowed += 4 * tolerances.UNIT[weight.dtype] * terms
    return where, found, expected, allowed


def check_products(make: Maker, dtype: torch.dtype, shapes: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Unpacking and products of every shape."""
    for (rows, columns), density, kind in itertools.product(shapes, (0.0, 0.3, 1.0), (Maker.sparse, uneven)):
        if kind is uneven and density != 0.3:
            continue
        weight = kind(make, rows, columns, density, dtype)
        layout, where = cuda_gaps.pack_gaps_rows(weight), f"{rows} x {columns}, {density:.0%} kept, {kind.__name__}"
        [W] = wide(weight)
        yield f"{where}, unpacked", cuda.unpack(layout), W, np.zeros(W.shape)
        for batch, shift in BATCHES:
            x = make.normal(batch, columns, dtype=dtype, shift=shift)
            bias = make.normal(rows, dtype=dtype, shift=shift) if batch % 2 else None
            yield case(f"{where}, batch {batch}, shift {shift}", cuda.matvec(layout, x, bias), weight, x, bias)


def ways(layout: cuda_gaps.GapLayout) -> list[int]:
    """Return the numbers of strips that a block can have."""
    card = Card.of(layout.data.device)
    return [
        together
        for together in range(1, 32 // layout.panels + 1)
        if layout.shared(layout.panels * together, 8) <= card.shared
    ]


def divided(layout: cuda.Layout, x: torch.Tensor, together: int) -> torch.Tensor:
    """Multiply with so many strips in a block; without a GPU, by torch."""
    if layout.product is None:
        return cuda.matvec(layout, x)
    numbers = list(layout.plan)
    numbers[cuda.TOGETHER] = together
    y: torch.Tensor = layout.product(x, layout.data, layout.starts, numbers, None)
    return y


def check_divisions(make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """Some ways to divide a product."""
    for rows, columns in ((176, 4096), (70, 1000)):
        weight = make.sparse(rows, columns, 0.3, dtype)
        for parts in (1, 3, 8, 13, 25, 32):
            layout = cuda_gaps.pack_gaps_rows(weight, parts)
            some = itertools.product(ways(layout)[::2], (1, 2, 4, 8)) if weight.is_cuda else [(1, 1)]
            for together, batch in some:
                x = make.normal(batch, columns, dtype=dtype)
                yield case(f"{parts} parts, {together} strips", divided(layout, x, together), weight, x)


def check_stacked(make: Maker, dtype: torch.dtype) -> Iterator[Case]:
    """Layouts with the same input as one, some of its rows, and a CUDA graph."""
    weights = [make.sparse(rows, 1000, 0.4, dtype) for rows in (96, 32, 21)]
    stacked = cuda.stack([cuda_gaps.pack_gaps_rows(weight) for weight in weights])
    x = make.normal(2, 1000, dtype=dtype)
    assert stacked is not None
    first = cuda.matvec(stacked, x)
    yield case("stacked", first, torch.cat(weights), x)
    second = stacked.part(96, 32)
    assert second is not None
    yield case("a part", cuda.matvec(second, x), weights[1], x)
    yield "a part, unpacked", cuda.unpack(second), *wide(weights[1]), np.zeros(weights[1].shape)
    if x.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dense = cuda.matvec(stacked, x), cuda.unpack(stacked)
        y.fill_(float("nan"))
        dense.fill_(float("nan"))
        graph.replay()
        yield "in a CUDA graph", y, *wide(first), np.zeros(first.shape)
        yield "unpacked in a CUDA graph", dense, *wide(torch.cat(weights)), np.zeros(dense.shape)


def check_all(device: torch.device, shapes: Sequence[tuple[int, int]]) -> bool:
    """Print a line for each dtype and check; return whether all are right."""
    right = True
    checks: dict[str, Callable[[Maker, torch.dtype], Iterator[Case]]] = {
        "products": lambda make, dtype: check_products(make, dtype, shapes),
        "divisions": check_divisions,
        "stacked": check_stacked,
    }
    print(HEADING)
    for dtype, (name, check) in itertools.product(cuda.DTYPES, checks.items()):
        worst = Worst()
        with poisoned():
            for one in check(Maker(device), dtype):
                worst.add(one)
        right &= worst.report(name, dtype)
    return right


def microseconds(layout: cuda.Layout | torch.Tensor, action: Callable[..., torch.Tensor], *arguments: object) -> float:
    """Time an action on copies of a layout, or weight, that no cache holds."""
    device = layout.device if isinstance(layout, torch.Tensor) else layout.data.device
    count = decode._copies(layout.nbytes, device) if device.type == "cuda" else 1
    copies = [copy.deepcopy(layout) for _ in range(count)]
    return graphed([partial(action, own, *arguments) for own in copies], device, 5)


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


def _weight(rows: int, columns: int, sparsity: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return decode.sparse(torch.randn(rows, columns, device=device, dtype=dtype) / columns**0.5, sparsity)


def time_products(
    name: str, sparsities: Sequence[str], batches: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Print the µs of each projection, and the sums of a block: dense, panels, gaps."""
    print(
        f"{'':<9}{'zeros':>5}{'rows':>5}{'dense':>9}{'panels':>9}{'ratio':>7}{'bits':>6}{'gaps':>9}{'ratio':>7}{'bits':>6}{'TB/s':>6}"
    )
    for sparsity in sparsities:
        sums = {batch: np.zeros(3) for batch in batches}
        for projection, (rows, columns, _) in decode.projections(name, joined=True).items():
            weight = _weight(sum(rows), columns, sparsity, dtype, device)
            panels, gaps = cuda.pack_rows(weight), cuda_gaps.pack_gaps_rows(weight)
            bits = [8 * own.nbytes / weight.numel() for own in (panels, gaps)]
            for batch in batches:
                x = torch.randn(batch, columns, device=device, dtype=dtype)
                dense = sum(microseconds(part.clone(), _linear, x) for part in weight.split(rows))
                ours = [microseconds(own, cuda.matvec, x) for own in (panels, gaps)]
                sums[batch] += (dense, *ours)
                _print_line(projection, sparsity, batch, (dense, *ours), bits, f"{gaps.nbytes / ours[1] / 1e6:>6.2f}")
        for batch, total in sums.items():
            _print_line("a block", sparsity, batch, total, [float("nan")] * 2)


def _print_line(
    name: str, sparsity: str, batch: int, times: Sequence[float] | np.ndarray, bits: Sequence[float], rate: str = ""
) -> None:
    dense, *ours = times
    cells = "".join(f"{us:>9.2f}{dense / us:>6.2f}×{each:>6.2f}" for us, each in zip(ours, bits, strict=True))
    print(f"{name:<9}{sparsity:>3} %{batch:>5}{dense:>9.2f}{cells}{rate}", flush=True)


def time_unpacking(name: str, sparsity: str, dtype: torch.dtype, device: torch.device) -> None:
    """Print the µs of unpacking a block's projections, from panels and from gaps."""
    sums = np.zeros(2)
    for rows, columns, _ in decode.projections(name, joined=True).values():
        weight = _weight(sum(rows), columns, sparsity, dtype, device)
        # What is unpacked is larger than any cache.
        layouts = cuda.pack_rows(weight), cuda_gaps.pack_gaps_rows(weight)
        sums += [graphed([partial(cuda.unpack, own)] * 2, device, 5) for own in layouts]
    print(f"{name}, {sparsity} %, µs to unpack a block: panels {sums[0]:.0f}, gaps {sums[1]:.0f}", flush=True)


def expanded(layout: cuda.Layout, dense: torch.Tensor, width: int) -> torch.Tensor:
    """Unpack by blocks of so many columns."""
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (layout.data, layout.starts, dense)]
    shape = (layout.rows, layout.columns, layout.panels, layout.slot, width)
    error = library().losa_expand_gaps(*pointers, *shape, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if error:
        raise RuntimeError(f"losa_expand_gaps failed with CUDA error {error}, width {width}")
    return dense


def sweep(name: str, sparsity: str, dtype: torch.dtype, device: torch.device, batches: Sequence[int]) -> None:
    """Print the fastest (parts of a strip, strips of a block) of each projection, beside the rule's; and of unpacking."""
    sums = {batch: np.zeros(2) for batch in batches}
    for projection, (rows, columns, _) in decode.projections(name, joined=True).items():
        weight = _weight(sum(rows), columns, sparsity, dtype, device)
        rule = cuda_gaps.pack_gaps_rows(weight)
        planned = rule.panels, rule.plan[cuda.TOGETHER]
        found: dict[int, dict[tuple[int, int], float]] = {batch: {} for batch in batches}
        for parts in sorted({*PARTS, rule.panels}):
            layout = cuda_gaps.pack_gaps_rows(weight, parts)
            for batch, together in itertools.product(batches, ways(layout)):
                x = torch.randn(batch, columns, device=device, dtype=dtype)
                found[batch][parts, together] = microseconds(layout, divided, x, together)
        for batch, times in found.items():
            best = sorted(times, key=times.__getitem__)[:5]
            cells = "  ".join(f"{way} {times[way]:.2f}" for way in best)
            print(f"{projection:<9}{batch:>3} rows: {cells}   rule {planned} {times[planned]:.2f} µs", flush=True)
            sums[batch] += (times[best[0]], times[planned])
        dense = torch.empty_like(weight)
        unpacked = {width: graphed([partial(expanded, rule, dense, width)] * 2, device, 3) for width in WIDTHS}
        print(
            f"{projection:<9}unpacked by widths: " + "  ".join(f"{w} {us:.1f}" for w, us in unpacked.items()),
            flush=True,
        )
    for batch, (first, own) in sums.items():
        print(f"a block, {batch} rows: best {first:.2f}, rule {own:.2f} µs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then time. Returns 1 if a number is wrong or the kernels cannot run."""
    options = parsed(__doc__, arguments, batches=True)
    device, start = torch.device(options.device), time.perf_counter()
    if not built(device):
        return 1
    right = check_all(device, SHAPES[:3] if options.small else SHAPES)
    print(f"checked after {time.perf_counter() - start:.0f} s")
    dtype, name = getattr(torch, options.dtype), "small" if options.small else "llama-2-7b"
    if options.sweep and device.type == "cuda":
        sweep(name, options.sparsities[0], dtype, device, options.batches[:1])
    elif not options.check:
        time_products(name, options.sparsities, options.batches, dtype, device)
        for sparsity in options.sparsities[:2]:
            time_unpacking(name, sparsity, dtype, device)
    print(f"{'all right' if right else 'WRONG'}, {time.perf_counter() - start:.0f} s")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
