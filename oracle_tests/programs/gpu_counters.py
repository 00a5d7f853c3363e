"""Read the hardware counters of the decoding products on a GPU: which unit is busy, and what warps wait for.

    python -m oracle_tests.programs.gpu_counters [--geometry llama-2-7b] [--sparsity 70] [--rows 1 8 16 32]

Runs itself under Nsight Compute (`ncu`, part of CUDA's toolkit), which empties the caches before each kernel, and launches every
product of a block once: cuBLAS with the dense weight, which may be two kernels, and ours with each form of values. Prints for
each kernel its time; the bytes that it reads from memory; the share of memory's and the L2 cache's rate; the share of cycles in
which a scheduler issues an instruction; the share of their rates of accesses and instructions at which shared memory, integer and
matrix units work; the share of a processor's warps that are there; its instructions; and what a warp waits for, in cycles per
instruction that it issues. One matrix instruction occupies its unit for several cycles, one of cuBLAS's for many: compare only
ours. ncu replays a kernel while the clock idles in between, so times are longer than those of gpu_codes and gpu_rows: compare
shares. Clocks are left alone. `--save FILE` keeps all that ncu prints.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from torch_impl.bench import decode
from torch_impl.experiment.planning import geometry

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# Heading: the counter, and what to multiply it with; ncu counts ns, bytes and instructions.
COLUMNS = {
    "µs": ("gpu__time_duration.sum", 1e-3),
    "MB": ("dram__bytes_read.sum", 1e-6),
    "memory %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "L2 %": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed", 1),
    "issue %": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "shared %": ("l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed", 1),
    "integer %": ("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", 1),
    "matrix %": ("sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active", 1),
    "warps %": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "k instr.": ("smsp__inst_executed.sum", 1e-3),
}
REASONS = {
    "long_scoreboard": "global memory",
    "short_scoreboard": "shared memory",
    "mio_throttle": "shared memory's queue",
    "lg_throttle": "global memory's queue",
    "wait": "fixed latency",
    "math_pipe_throttle": "arithmetic unit",
    "not_selected": "another warp's turn",
    "barrier": "barrier",
    "dispatch_stall": "dispatch",
    "no_instruction": "instructions",
    "branch_resolving": "branch",
    "sleeping": "sleep",
    "membar": "fence",
    "tex_throttle": "texture queue",
    "imc_miss": "constants",
    "drain": "stores",
    "gmma": "matrix products",
}
MARK = "#"
"""Begins the name of a range, which says what product it is."""


def launch(options: argparse.Namespace, device: torch.device) -> None:
    """Launch every product once, in a range that names it."""
    for name, (rows, columns, _) in decode.projections(options.geometry, joined=True).items():
        weight = torch.randn(sum(rows), columns, device=device, dtype=torch.bfloat16) / columns**0.5
        zeroed = decode.sparse(weight, options.sparsity)
        dense: decode.Product = partial(_multiply, weight)
        for batch, values in itertools.product(options.rows, ["dense", *options.values]):
            # More rows than eight unpack codes first.
            if batch <= 8 or values in ("dense", "same"):
                product = dense if values == "dense" else decode.pack(zeroed, values, batch)[0]
                x = torch.randn(batch, columns, device=device, dtype=torch.bfloat16)
                product(x)
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                with torch.cuda.nvtx.range(f"{MARK}{name} {values} {batch}"):
                    product(x)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def _multiply(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


def count(ncu: str, own: Sequence[str]) -> str:
    """Run `launch` under ncu. Returns what it printed.

    own: this program's arguments.
    Errors: RuntimeError if ncu fails.
    """
    counters = [counter for counter, _ in COLUMNS.values()] + [STALLED.format(reason) for reason in REASONS]
    command = [ncu, "--metrics", ",".join(counters), "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--nvtx", "--csv", "--page", "raw", sys.executable, "-m", "oracle_tests.programs.gpu_counters"]
    done = subprocess.run([*command, *own, "--launch"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ncu failed with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def kernels(text: str) -> list[dict[str, str]]:
    """Read what `ncu --csv --page raw` prints: messages, a header, a line of units, and a line for each kernel."""
    table = csv.DictReader(line for line in text.splitlines() if line.startswith('"'))
    return [row for row in table if row["ID"]]


def number(value: str | None) -> float:
    """Return a counter's number; NaN if it was not counted."""
    try:
        return float((value or "").replace(",", ""))
    except ValueError:
        return float("nan")


def report(text: str) -> list[str]:
    """Return the lines of the table; none if nothing was counted.

    text: of `ncu --csv --page raw`.
    """
    lines, seen = [f"{'':<28}" + "".join(f"{name:>11}" for name in COLUMNS) + "  waits for"], Counter[str]()
    for row in kernels(text):
        name = product_of(row)
        seen[name] += 1
        cells = "".join(f"{number(row.get(counter)) * scale:>11.1f}" for counter, scale in COLUMNS.values())
        waits = {what: number(row.get(STALLED.format(reason))) for reason, what in REASONS.items()}
        most = sorted((what for what in waits if waits[what] >= 0.1), key=waits.__getitem__, reverse=True)[:5]
        shown = name if seen[name] == 1 else f"{name}, kernel {seen[name]}"
        lines.append(f"{shown:<28}{cells}  " + ", ".join(f"{what} {waits[what]:.1f}" for what in most))
    return lines if seen else []


def product_of(row: dict[str, str]) -> str:
    """Return which product a kernel is part of: the name of its range, as in `"<default domain>:#o same 1:none:…"`."""
    marked = (value.partition(MARK)[2] for value in row.values() if MARK in value)
    return next(marked, "unnamed").partition(":")[0]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-2-7b", choices=sorted(geometry.GEOMETRIES))
    parser.add_argument("--sparsity", default="70", help="percentage, or N:M")
    parser.add_argument("--values", nargs="+", default=["same", "int8", "int4"], choices=["same", "int8", "int4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32], help="of input")
    parser.add_argument("--save", type=Path, help="keep what ncu prints in this file")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and print. Returns 1 without ncu or a GPU, or if nothing was counted."""
    options = parser().parse_args(arguments)
    ncu = shutil.which("ncu") or next(map(str, Path("/opt/nvidia").glob("nsight-compute/*/ncu")), None)
    if not torch.cuda.is_available() or not (ncu or options.launch):
        print("error: needs a GPU and ncu, Nsight Compute's command, on the PATH")
        return 1
    if options.launch:
        launch(options, torch.device("cuda"))
        return 0
    text = count(str(ncu), sys.argv[1:] if arguments is None else arguments)
    if options.save:
        options.save.write_text(text)
    lines = report(text)
    print("\n".join(lines) or f"error: nothing was counted: {text[-2000:]}")
    return int(not lines)


if __name__ == "__main__":
    sys.exit(main())
