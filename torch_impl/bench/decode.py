"""Benchmark decoding with sparse against dense weights: losa bench decode [--geometries …] [--whole_model …].

Kernels: each projection of a block, ours against the fastest dense product in the same dtype, over copies that exceed any
cache. On a GPU that is cuBLAS, both in CUDA graphs; on a CPU torch or an optimised loop, in turns (decode_cpu.py). On a GPU,
packed projections that share an input are one product, laid out for as many sequences as are timed. Dense ones are separate, as
in Hugging Face's models; their time as one product is shown too. The times of torch's products with dense weights of 8 (CPU) and
4 bits, which are lossy, are shown for comparison.
Whole model: a Hugging Face model with a static cache. On a GPU tokens/s with CUDA graphs; on a CPU milliseconds of a token and
of a prompt, and of a token without its projections (whole_cpu.py). A ratio is printed only if both sides compute the same numbers.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from torch_impl import quantise
from torch_impl.bench import checks, decode_cpu, int4, whole, whole_cpu
from torch_impl.bench.measure import ceilings, graphed, relative
from torch_impl.decode import cpu, cuda, cuda_layouts
from torch_impl.engine import files
from torch_impl.engine.progress import note
from torch_impl.experiment.command import Parser, command
from torch_impl.experiment.planning import geometry
from torch_impl.masks.nm import nm_mask

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Cell:
    """One projection at one sparsity and batch: both sides."""

    geometry: str
    projection: str
    count: int
    """Number of such projections in a block."""
    sparsity: str
    batch: int
    ours_us: float
    dense_us: float
    ours_bytes: int
    dense_bytes: int
    peak_tb_per_s: float
    disagreement: float
    bound: float
    joined_us: float | None = None
    """Dense as one product, if this stands for several projections."""
    int8_us: float | None = None
    """The product with 8-bit dense weights on a CPU, if torch has a kernel; lossy, so no ratio."""
    int4_us: float | None = None
    """The product with 4-bit dense weights, if torch has a kernel; lossy, so no ratio."""

    @property
    def agrees(self) -> bool:
        """Return whether both sides computed the same numbers."""
        return self.disagreement <= self.bound

    @property
    def ratio(self) -> float | None:
        """Return how many times faster ours is; None if the sides disagree."""
        return self.dense_us / self.ours_us if self.agrees else None

    @property
    def tb_per_s(self) -> float:
        """Return the bytes of the packed weight per time."""
        return self.ours_bytes / self.ours_us / 1e6

    @property
    def share(self) -> float:
        """Return the share of the limit: reading the packed weight once at the measured memory rate."""
        return self.tb_per_s / self.peak_tb_per_s

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "tb_per_s": self.tb_per_s, "share_of_limit": self.share}


def projections(name: str, joined: bool) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return (rows of each, in, count) of the projections of a geometry's block, grouped by shape.

    joined: treat projections that share an input as one.
    """
    shape = geometry.GEOMETRIES[name]
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    down = ((hidden,), inner, 1)
    if joined:
        qkv, both = ((hidden, narrow, narrow), hidden, 1), ((inner, inner), hidden, 1)
        return {"q,k,v": qkv, "o": ((hidden,), hidden, 1), "gate,up": both, "down": down}
    if narrow == hidden:
        return {"q,k,v,o": ((hidden,), hidden, 4), "gate,up": ((inner,), hidden, 2), "down": down}
    return {
        "q,o": ((hidden,), hidden, 2),
        "k,v": ((narrow,), hidden, 2),
        "gate,up": ((inner,), hidden, 2),
        "down": down,
    }


def sparse(weight: torch.Tensor, sparsity: str) -> torch.Tensor:
    """Set weights to zero at random places (a percentage) or in an N:M pattern ("2:4")."""
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        kept = nm_mask(torch.rand_like(weight, dtype=torch.float32), n, m)
    else:
        kept = torch.rand_like(weight, dtype=torch.float32) >= float(sparsity) / 100
    # Do not multiply by 0: that makes negative zeros, which the bitmap keeps.
    return weight.masked_fill(~kept.bool(), 0)


def pack(weight: torch.Tensor, values: str = "same", sequences: int = 1) -> tuple[Product, int, torch.Tensor]:
    """Return (the function x ↦ y = x Wᵀ with the weight packed for its device, its size in bytes, W in float64).

    values: same, or int8 and int4, which round the weight. sequences: as `cuda_layouts.lay_out`.
    """
    if values != "same" and weight.is_cuda:
        bits = int(values.removeprefix("int"))
        codes, scales = quantise.quantise_rows(weight, bits)
        coded = cuda_layouts.lay_out_codes(codes, scales, bits, weight.dtype, sequences)
        return partial(cuda.matvec, coded), coded.nbytes, quantise.dequantise_rows(codes, scales).double()
    if values != "same":
        return decode_cpu.pack_codes(weight, int(values.removeprefix("int")))
    if not weight.is_cuda:
        return *decode_cpu.pack(weight), weight.double()
    layout = cuda_layouts.lay_out(weight, sequences)
    return partial(cuda.matvec, layout), layout.nbytes, weight.double()


def _copies(nbytes: int, device: torch.device) -> int:
    """Return how many copies of `size` bytes exceed any cache."""
    if device.type != "cuda":
        return decode_cpu.copies(nbytes)
    return int(3 * torch.cuda.get_device_properties(device).L2_cache_size / nbytes) + 2


def _times(
    products: Sequence[Product], weights: Sequence[torch.Tensor], rows: tuple[int, ...], x: torch.Tensor, repeats: int
) -> tuple[float, float, float | None]:
    """Return the microseconds of one product: (ours, dense in parts of `rows`, dense as one if there are several parts)."""
    if not x.is_cuda:
        return *decode_cpu.times(products, weights, x, repeats), None
    ours = graphed([partial(product, x) for product in products], x.device, repeats)
    parts = [part for weight in weights for part in weight.split(rows)]
    dense = len(rows) * graphed([partial(functional.linear, x, part) for part in parts], x.device, repeats)
    if len(rows) == 1:
        return ours, dense, None
    return ours, dense, graphed([partial(functional.linear, x, weight) for weight in weights], x.device, repeats)


def _lossy(weight: torch.Tensor) -> list[tuple[Product, int] | None]:
    """Return torch's products with 8-bit weights (CPU) and 4-bit ones and their sizes in bytes; None without a kernel."""
    eight = None if weight.is_cuda else decode_cpu.int8_product(weight)
    four = int4.pack(weight)
    return [
        None if eight is None else (eight, weight.numel()),
        None if four is None else (partial(int4.product, *four), sum(part.nbytes for part in four)),
    ]


def _lossy_times(weight: torch.Tensor, inputs: Sequence[torch.Tensor], repeats: int) -> list[list[float | None]]:
    """Return the microseconds of the product with 8-bit and with 4-bit weights, for each input; None without a kernel."""
    copies = [
        None if found is None else [copy.deepcopy(found[0]) for _ in range(_copies(found[1], weight.device))]
        for found in _lossy(weight)
    ]

    def timed(products: Sequence[Product] | None, x: torch.Tensor) -> float | None:
        if products is None:
            return None
        actions = [partial(product, x) for product in products]
        return graphed(actions, x.device, repeats) if x.is_cuda else decode_cpu.quickest([actions], repeats)[0]

    return [[timed(products, x) for products in copies] for x in inputs]


def measure(name: str, options: argparse.Namespace, peak: float) -> list[Cell]:
    """Measure all cells of a geometry."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    bound = 4 * torch.finfo(dtype).eps
    cells = []
    for projection, (rows, columns, count) in projections(name, joined=device.type == "cuda").items():
        weight = torch.randn(sum(rows), columns, device=device, dtype=dtype) / columns**0.5
        inputs = {batch: torch.randn(batch, columns, device=device, dtype=dtype) for batch in options.batches}
        dense_bytes = weight.numel() * weight.element_size()
        weights = [weight.clone() for _ in range(_copies(dense_bytes, device))]
        lossy = dict(zip(inputs, _lossy_times(weight, list(inputs.values()), options.repeats), strict=True))
        for sparsity in options.sparsities:
            zeroed = sparse(weight, sparsity)
            for batches in cuda_layouts.by_layout(options.batches):
                product, size, meant = pack(zeroed, options.values, batches[0])
                # The tensors that a product holds are copied with it.
                products = [copy.deepcopy(product) for _ in range(_copies(size, device))]
                for batch in batches:
                    x = inputs[batch]
                    ours, dense, joined = _times(products, weights, rows, x, options.repeats)
                    apart = relative(products[0](x), x.double() @ meant.T)
                    sizes = (size, dense_bytes, peak, apart, bound)
                    others = (joined, *lossy[batch])
                    cells.append(Cell(name, projection, count, sparsity, batch, ours, dense, *sizes, *others))
    return cells


def block(cells: Sequence[Cell], sparsity: str, batch: int) -> tuple[float, float, float] | None:
    """Sum the microseconds of a block's projections: (ours, dense, dense with those that share an input as one product).

    None if the sides disagree on a projection.
    """
    chosen = [cell for cell in cells if (cell.sparsity, cell.batch) == (sparsity, batch)]
    if not all(cell.agrees for cell in chosen):
        return None
    joined = sum(c.count * (c.dense_us if c.joined_us is None else c.joined_us) for c in chosen)
    return sum(c.count * c.ours_us for c in chosen), sum(c.count * c.dense_us for c in chosen), joined


def _print_cells(name: str, cells: Sequence[Cell], options: argparse.Namespace) -> None:
    print(
        f"\n{name}: {'projection':<10}{'zeros':>7}{'batch':>6}{'ours':>11}{'dense':>11}{'ratio':>8}"
        f"{'TB/s':>7}{'of limit':>9}{'dense as one':>14}{'int8':>12}{'int4':>12}"
    )
    for c in cells:
        ratio = "refused" if c.ratio is None else f"{c.ratio:.2f}×"
        shown = f"{c.projection:<{len(name) + 12}}{c.sparsity:>7}{c.batch:>6}{c.ours_us:>8.1f} µs{c.dense_us:>8.1f} µs"
        joined, eight, four = ("" if us is None else f"{us:.1f} µs" for us in (c.joined_us, c.int8_us, c.int4_us))
        print(f"{shown}{ratio:>8}{c.tb_per_s:>7.2f}{c.share:>9.0%}{joined:>14}{eight:>12}{four:>12}")
    several = any(c.joined_us is not None for c in cells)
    print(f"{name}, the projections of a block, dense / ours{' (dense as one / ours)' * several}:")
    for batch in options.batches:
        found = {sparsity: block(cells, sparsity, batch) for sparsity in options.sparsities}
        ratios = [f"{s}: {_ratios(times, several)}" for s, times in found.items()]
        print(f"    batch {batch}   {'   '.join(ratios)}")


def _ratios(times: tuple[float, float, float] | None, several: bool) -> str:
    if times is None:
        return "refused"
    ours, dense, joined = times
    return f"{dense / ours:.2f}×" + (f" ({joined / ours:.2f}×)" if several else "")


def _whole_models(options: argparse.Namespace, device: torch.device) -> Sequence[whole.Speed | whole_cpu.Times]:
    """Measure and print a whole model."""
    if device.type == "cuda":
        whole.show(speeds := whole.measure(options))
        return speeds
    whole_cpu.show(times := whole_cpu.measure(options))
    return times


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = Parser(prog="losa bench decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(geometry.GEOMETRIES)
    every = ["llama-2-7b", "llama-3-8b", "llama-2-70b"]
    parser.add_argument(
        "--geometries", nargs="*", choices=known, default=every if cuda else ["small"], metavar="NAME",
        help=f"Shapes whose projections to time, from {', '.join(known)}.",
    )  # fmt: skip
    parser.add_argument(
        "--sparsities", nargs="+", default=["0", "50", "60", "70", "80", "2:4"], metavar="S",
        help="Percentages of zeros, or N:M (default 0 50 60 70 80 2:4).",
    )  # fmt: skip
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=range(1, 9), default=[1, 2, 4, 8], metavar="N",
        help="Sequences at once, from 1 to 8 (default 1 2 4 8).",
    )  # fmt: skip
    parser.add_argument("--whole_model", choices=known, metavar="NAME", help="Also measure tokens/s of this geometry.")
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="Number of decoder blocks of the whole model (default: all)."
    )
    parser.add_argument(
        "--adapters", type=int, metavar="RANK", help="The whole model also with unmerged adapters of this rank."
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=64 if cuda else 12, help="Tokens of the whole model to time."
    )
    parser.add_argument(
        "--prompt", type=int, default=128, metavar="TOKENS", help="Length of a prompt to time; on a CPU."
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=9,
        help="Timed repeats; the median counts on a GPU, the best on a CPU.",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="auto, cpu or cuda (default %(default)s).")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="Default %(default)s.")
    parser.add_argument(
        "--values",
        choices=["same", "int8", "int4"],
        default="same",
        help="How kept values are stored; int8 and int4 are rounded (default %(default)s).",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write all figures to this file.")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    """Measure and print; return 1 if any two sides disagree."""
    options = _parser().parse_args(arguments)
    checks.check_decode(options)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    if device.type == "cuda":
        name, peak, how = torch.cuda.get_device_name(device), ceilings(device, dtype)[1], "copy"
        usable, reason = cuda.available()
        if not usable:
            note(f"nothing to measure: {reason}")
            return 1
    else:
        path = next(iter(cpu.paths()), "no kernels")
        name, peak, how = f"CPU, {torch.get_num_threads()} threads, {path}", decode_cpu.read_rate(), "read"
    print(
        f"{name}, torch {torch.__version__}, {options.dtype}, values {options.values}; {how} {peak:.3g} TB/s, measured now"
    )
    cells = []
    for shape in options.geometries:
        found = measure(shape, options, peak)
        _print_cells(shape, found, options)
        cells += found
    rows = _whole_models(options, device) if options.whole_model else []
    if options.json:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "dtype": options.dtype,
            "values": options.values,
            "peak_tb_per_s": peak,
            "kernels": [cell.as_dict() for cell in cells],
            "whole_model": [row.as_dict() for row in rows],
        }
        options.json.write_text(files.dumps(figures, "figures", indent=1))
    return int(not (all(cell.agrees for cell in cells) and all(row.agrees for row in rows)))


if __name__ == "__main__":
    sys.exit(main())
