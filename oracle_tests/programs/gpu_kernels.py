"""Compare every kernel on a GPU with the spec: Triton kernels of _kernels.py and CUDA entries of decode/cuda.cu.

    python -m oracle_tests.programs.gpu_kernels [--device cuda] [--small] [--only NAME ...]

Covers shapes that do not fit tiles, one and eight rows, rows with no weights and with no zeros, every dtype. Outputs are NaN
before each launch, as is the memory on both sides of inputs. Prints a line for every kernel and dtype: over all cases, the
error closest to its entry's bound, and that bound. Exits with 1 if an error exceeds its bound. On a CPU, Triton's kernels run
in its interpreter and the CUDA entries in torch; `--small` is a quick test of the script.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

from oracle_tests import tolerances
from oracle_tests.poison import fill, poisoned
from reference import adapter, tiles
from reference.masks import nm, select, sparsegpt
from torch_impl import _kernels
from torch_impl.decode import cuda

Case = tuple[str, torch.Tensor, np.ndarray, np.ndarray]
"""A case: its name, the kernel's result, the spec's, and the bound of every entry."""

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
FENCE = 64


@dataclass(frozen=True)
class Grid:
    """Combinations to test: shapes (rows, columns), longer rows for kernels that take them, ranks of adapters, shares of kept
    weights."""

    shapes: Sequence[tuple[int, int]]
    long: Sequence[tuple[int, int]]
    ranks: Sequence[int]
    densities: Sequence[float] = (0.0, 0.4, 1.0)


WHOLE = Grid(
    shapes=[(1, 1), (1, 1000), (8, 63), (63, 1000), (1000, 63), (129, 130), (16, 128), (1100, 300), (3, 1500)],
    long=[(33, 11008), (17, 28672)],
    ranks=[1, 3, 8, 16, 17, 33],
)
SMALL = Grid(shapes=[(1, 7), (8, 63)], long=[(2, 300)], ranks=[1, 17], densities=[0.4])


class Maker:
    """Random tensors on the device, with NaN on both sides of each. Zeros have either sign."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._generator = device, torch.Generator().manual_seed(0)
        self.interpreted = device.type != "cuda"

    def put(self, values: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """Put values on the device, contiguous, `shift` numbers beyond an aligned address."""
        buffer = torch.empty(values.numel() + 2 * FENCE + shift, dtype=values.dtype, device=self._device)
        fill(buffer)
        inside = buffer[FENCE + shift :][: values.numel()].view(values.shape)
        inside.copy_(values)
        return inside

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> torch.Tensor:
        """Normal numbers."""
        return self.put(torch.randn(shape, generator=self._generator).to(dtype), shift)

    def mask(self, rows: int, columns: int, density: float) -> torch.Tensor:
        """Random mask on the CPU; of several rows the last keeps nothing, of three or more the one before it keeps everything."""
        kept = torch.rand(rows, columns, generator=self._generator) < density
        if rows > 1:
            kept[-1] = False
        if rows > 2:
            kept[-2] = True
        return kept

    def sparse(self, rows: int, columns: int, density: float, dtype: torch.dtype) -> torch.Tensor:
        """Normal numbers where `mask` is true, zeros elsewhere."""
        values = torch.randn(rows, columns, generator=self._generator) * self.mask(rows, columns, density)
        return self.put(values.to(dtype))


def wide(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Convert tensors to float64 arrays."""
    return [tensor.double().cpu().numpy() for tensor in tensors]


def merge(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """Merge into a new tensor and into an existing one."""
    for (rows, columns), rank, density in itertools.product(grid.shapes, grid.ranks, grid.densities):
        weight = make.sparse(rows, columns, density, dtype)
        A, B = make.normal(rank, columns), make.normal(rows, rank)
        W, a, b = wide(weight, A, B)
        expected, terms = adapter.effective_weight(W, a, b, 0.5), abs(W) + 0.5 * abs(b) @ abs(a)
        allowed = tolerances.merged_by_kernel(dtype, abs(expected), terms)
        if make.interpreted:
            # The interpreter truncates bf16.
            allowed *= 2
        there = make.put(torch.full_like(weight, float("nan")))
        _kernels.merge(weight, A, B, 0.5, there)
        for found in (_kernels.merge(weight, A, B, 0.5), there):
            yield f"{rows} x {columns}, rank {rank}", found, expected, np.where(expected == 0, 0.0, allowed)


def contract(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """Both gradients, computed twice with the same bits."""
    for (rows, columns), rank, density in itertools.product(grid.shapes, grid.ranks, grid.densities):
        G, weight = make.normal(rows, columns, dtype=dtype), make.sparse(rows, columns, density, dtype)
        if make.interpreted:
            # The interpreter does not take -0 in bf16 for 0.
            weight.add_(0)
        A, B = make.normal(rank, columns), make.normal(rows, rank)
        g, W, a, b = wide(G, weight, A, B)
        masked = g * (W != 0)
        found = _kernels.contract(G, weight, A, B, 0.5)
        again = _kernels.contract(G, weight, A, B, 0.5)
        for left, right, ours, same in ((b.T, masked, found[0], again[0]), (masked, a.T, found[1], again[1])):
            where = f"{rows} x {columns}, rank {rank}"
            allowed = tolerances.contracted_by_kernel(dtype, left, right)
            yield where, ours, 0.5 * left @ right, allowed
            yield f"{where}, again", same, *wide(ours), np.zeros(allowed.shape)


def sweep(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """A block of columns inside a wider weight, in one call or in two, with errors and the columns after the block."""
    for (rows, width), density, cuts in itertools.product(grid.shapes, grid.densities, (1, 2)):
        width = min(width, 128)
        weight, factor = make.normal(rows, width + 5), make.normal(width, width).div_(width**0.5).triu_(1)
        factor.diagonal().add_(1).add_(make.normal(width).abs_())
        kept = make.mask(rows, width + 5, density).to(weight.device)
        expected, [U] = wide(weight)[0], wide(factor)
        expected_errors = np.zeros((rows, width))
        size = np.abs(expected)
        for j in range(width):
            expected_errors[:, j] = np.where(kept[:, j].cpu(), 0.0, expected[:, j]) / U[j, j]
            expected[:, j:width] -= expected_errors[:, j : j + 1] * U[j, j:]
            size = np.maximum(size, np.abs(expected))
        errors = make.put(torch.full((rows, width), float("nan")))
        places = [0, width // 2, width] if cuts == 2 else [0, width]
        for first, last in itertools.pairwise(places):
            _kernels.sweep(weight[:, :width], factor, kept[:, :width], errors, first, last)
        # A column is rounded once for each column before it, relative to the largest number of its row so far, and a quotient has
        # an error of up to two units.
        allowed = (2 * width + 8) * tolerances.UNIT[dtype] * size.max(1, keepdims=True) + 0 * expected
        allowed[:, width:] = 0
        where = f"{rows} x {width}, {cuts} calls"
        yield where, weight, expected, allowed
        yield f"{where}, errors", errors, expected_errors, allowed[:, :width]


def patterns(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """Masks of N:M that the sweep chooses, many scores equal; no column changes another, so that all is exact."""
    for (rows, columns), density, (n, m) in itertools.product(grid.shapes, grid.densities, ((2, 4), (1, 3), (2, 8))):
        width = min(columns, 128) // m * m
        if not width:
            continue
        weight, factor = make.normal(rows, width).mul_(2).round_(), make.put(2 * torch.eye(width))
        mask = make.mask(rows, width, density).to(weight.device)
        W, kept = wide(weight)[0], mask.cpu().numpy()
        expected = nm.nm_mask(select.demote_pruned(abs(W), kept), n, m) & kept
        _kernels.sweep(weight, factor, mask, torch.empty_like(weight), 0, width, (n, m))
        yield f"{rows} x {width}, {n}:{m}", mask, expected.astype(float), np.zeros(expected.shape)
        yield f"{rows} x {width}, {n}:{m}, weight", weight, np.where(expected, W, 0.0), np.zeros(expected.shape)


def lowest(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """Scores that differ, that tie, of both signs, and the extremes of a float."""
    limits = torch.tensor([-torch.inf, -1e38, -1e-45, -0.0, 0.0, 1e-45, 1e38, torch.inf])
    for (rows, columns), kind in itertools.product([*grid.shapes, (1, _kernels.WIDEST_ROW)], range(4)):
        score = make.normal(rows, columns)
        if kind == 1:
            score = make.put(score.mul(2).round().cpu())
        elif kind == 2:
            score.abs_()
        elif kind == 3:
            score = make.put(limits[score.mul(3).int().abs().cpu() % len(limits)])
        for count in sorted({0, 1, columns // 3, columns}):
            expected = select.row_mask(wide(score)[0], count / columns)
            found = _kernels.select(score, count)
            yield f"{rows} x {columns}, {count} go", found, expected, np.zeros(expected.shape)


def hessian(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """The product in the inputs' own dtype."""
    for tokens, columns in grid.shapes:
        X = make.normal(tokens, columns, dtype=dtype)
        [x] = wide(X)
        allowed = max(1.0, tokens**0.5 / 4) * tolerances.bound(torch.float32) * (abs(x).T @ abs(x))
        yield f"{tokens} x {columns}", _kernels.wide_product(X.T, X), sparsegpt.hessian(x, 2), allowed


def expand(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """The layout equals the spec's, and unpacking it gives the weight."""
    for (rows, columns), density in itertools.product(grid.shapes, grid.densities):
        weight = make.sparse(rows, columns, density, dtype)
        layout = cuda.pack_rows(weight)
        [W] = wide(weight)
        yield f"{rows} x {columns}", cuda.unpack(layout), W, np.zeros(W.shape)
        bitmaps, values = tiles.pack_tiles(W)
        starts = layout.starts.long()
        maps = layout.data[cuda._map_places(starts)]
        counts = torch.from_numpy(np.unpackbits(bitmaps, axis=1).sum(1).astype(np.int64)).to(starts.device)
        found = layout.data.view(dtype)[cuda._value_places(starts, counts)]
        yield f"{rows} x {columns}, bitmaps", maps, bitmaps.astype(float), np.zeros(bitmaps.shape)
        yield f"{rows} x {columns}, values", found, values, np.zeros(values.shape)


def matvec(make: Maker, dtype: torch.dtype, grid: Grid) -> Iterator[Case]:
    """Batches of one to eight rows, with x and bias at even and odd addresses."""
    for (rows, columns), density in itertools.product([*grid.shapes, *grid.long], grid.densities):
        weight = make.sparse(rows, columns, density, dtype)
        layout = cuda.pack_rows(weight)
        for batch, shift in ((1, 0), (1, 1), (2, 0), (3, 1), (5, 0), (8, 0), (8, 1)):
            x = make.normal(batch, columns, dtype=dtype, shift=shift)
            bias = make.normal(rows, dtype=dtype, shift=shift) if batch % 2 else None
            W, inputs, offset = *wide(weight, x), 0.0 if bias is None else wide(bias)[0]
            expected, terms = inputs @ W.T + offset, abs(inputs) @ abs(W).T + abs(offset)
            allowed = tolerances.one_rounding(dtype, abs(expected), terms)
            yield f"{rows} x {columns}, batch {batch}", cuda.matvec(layout, x, bias), expected, allowed


Check = Callable[[Maker, torch.dtype, Grid], Iterator[Case]]
CHECKS: dict[str, tuple[Check, list[torch.dtype]]] = {
    "merge": (merge, FLOATS),
    "contract": (contract, FLOATS),
    "sweep": (sweep, [torch.float32]),
    "sweep_nm": (patterns, [torch.float32]),
    "select": (lowest, [torch.float32]),
    "wide_product": (hessian, FLOATS),
    "losa_expand": (expand, HALVES),
    "losa_matvec": (matvec, HALVES),
}


HEADING = f"{'check':<14}{'dtype':<10}{'cases':>6}{'error':>11}{'bound':>11}  where the error is closest to its bound"


@dataclass
class Worst:
    """The error closest to its bound, over all cases so far."""

    cases: int = 0
    share: float = -1.0
    error: float = 0.0
    bound: float = 0.0
    where: str = ""

    def add(self, case: Case) -> None:
        """Add a case. A number that is not finite, or another shape, counts as an infinite error."""
        where, found, expected, allowed = case
        self.cases += 1
        [ours] = wide(found)
        if ours.shape != expected.shape:
            self.share, self.error, self.bound, self.where = np.inf, np.inf, 0.0, f"{where}: shape {ours.shape}"
            return
        if not ours.size:
            return
        error = np.where(np.isfinite(ours), np.abs(ours - expected), np.inf)
        share = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
        place = np.unravel_index(share.argmax(), share.shape)
        if share[place] > self.share:
            self.share, self.error, self.bound = float(share[place]), float(error[place]), float(allowed[place])
            self.where = f"{where}, entry {tuple(map(int, place))}"

    def report(self, check: str, dtype: torch.dtype) -> bool:
        """Print the line of a check under `HEADING`; return whether all errors are within their bounds."""
        kind, right = str(dtype).removeprefix("torch."), self.share <= 1
        figures = f"{self.cases:>6}{self.error:>11.2e}{self.bound:>11.2e}"
        print(f"{check:<14}{kind:<10}{figures}  {self.where}{'' if right else '  OUTSIDE'}", flush=True)
        return right


def run(name: str, dtype: torch.dtype, device: torch.device, small: bool) -> Worst:
    """Run all cases of one kernel and dtype."""
    check, worst = CHECKS[name][0], Worst()
    with poisoned():
        for case in check(Maker(device), dtype, SMALL if small else WHOLE):
            worst.add(case)
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every kernel. Returns 1 if one is wrong or cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="few shapes: runs anywhere in seconds")
    parser.add_argument(
        "--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these alone; processes can share them"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    built = device.type != "cuda" or not any(name.startswith("losa_") for name in options.only) or cuda.available()[0]
    print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    if not built:
        print(f"losa_expand, losa_matvec: {cuda.available()[1]}")
    print(HEADING)
    right = built
    for name in options.only:
        for dtype in CHECKS[name][1]:
            right &= run(name, dtype, device, options.small).report(name, dtype)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
