"""Benchmark speed and memory: losa bench [--geometry llama-2-7b] [--blocks N] [--parts …].

`losa bench decode` benchmarks decoding with sparse weights (see its own --help).

Compares our code with the plain formulation of research code, in one process, with the same weights and tokens. The device's
limits are measured first. A ratio is printed only if both sides computed the same numbers.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers

from torch_impl.bench import base, checks, decode, large, parts, plain, reconstruct
from torch_impl.bench.measure import Row, ceilings, host_peak
from torch_impl.engine import files
from torch_impl.experiment.command import Parser, command
from torch_impl.experiment.planning import geometry

# Parts that measure one model, and those that have their own.
SHARED = ("rmi", *plain.METHODS, "train", "kl", "merge")
PARTS = (*SHARED, "reconstruct", "base")
# Parts that write checkpoints to disk, and their default number of blocks.
LARGE = ("stream", "scale", "plan")
FEW = 4
PARTS_HELP = """What to measure (default: everything). rmi: importance by mutual information; wanda, sparsegpt: masks; train, kl:
an optimizer step, with labels or against the dense model; merge: merging the adapters; reconstruct: one block; base: optimizer
steps over compressed base weights. On a checkpoint that is written to disk: stream: prune block by block; scale: the same at
several sizes of model; plan: planned against measured memory."""
# The whole run whose time is estimated from the measured parts: the paper's steps; 10,000 sequences in batches of four.
STEPS, MICRO_BATCHES = 5, 2500


def _parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = Parser(prog="losa bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--geometry",
        choices=list(geometry.GEOMETRIES),
        default="llama-2-7b" if cuda else "small",
        metavar="NAME",
        help=f"Shapes of the model: {', '.join(geometry.GEOMETRIES)} (default %(default)s).",
    )
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="Number of decoder blocks (default: all of the geometry)."
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS + LARGE, default=list(PARTS + LARGE), metavar="PART", help=PARTS_HELP
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        default=128 if cuda else 8,
        help="Calibration sequences; RMI uses half of them.",
    )
    parser.add_argument(
        "--length", type=int, metavar="N", default=2048 if cuda else 64, help="Tokens per calibration sequence."
    )
    parser.add_argument(
        "--train_lengths",
        type=int,
        nargs="+",
        default=[256, 512, 1024] if cuda else [32],
        metavar="N",
        help="Tokens per training sequence: one row for each.",
    )
    parser.add_argument(
        "--accumulation",
        type=int,
        metavar="N",
        default=2,
        help="Micro-batches per optimizer step; held weights are merged once for all of them (default: the paper's 2).",
    )
    parser.add_argument(
        "--reconstruct_epochs",
        type=int,
        metavar="N",
        default=0,
        help="Epochs of reconstruction of each block, in parts stream and scale; in part reconstruct 0 means 8.",
    )
    parser.add_argument(
        "--profile", action="store_true", help="Show the device's time by kernel, for one epoch of part reconstruct."
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=5, help="Timed repeats of each side; the median counts."
    )
    parser.add_argument("--ours_only", action="store_true", help="Skip the plain formulation; print no ratios.")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="auto, cpu or cuda (default %(default)s).")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16" if cuda else "float32",
        help="Default %(default)s.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write all figures to this file.")
    return parser


HEADINGS = f"{'part':<60}{'ours':>11}{'plain':>11}{'ratio':>8}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}{'plain':>7}"


def _shown(row: Row, top: tuple[float, float]) -> str:
    """Format a row."""
    plain_ms = "" if row.plain_ms is None else f"{row.plain_ms:.1f} ms"
    ratio = "" if row.plain_ms is None else f"{row.ratio:.2f}×" if row.ratio is not None else "refused"
    rate = "" if row.tflops is None else f"{row.tflops:.3g}"
    share = "" if row.tflops is None else f"{row.tflops / top[0]:.0%}"
    other = "" if row.plain_gib is None else f"{row.plain_gib:.1f}"
    line = (
        f"{row.part:<60}{row.ours_ms:>8.1f} ms{plain_ms:>11}{ratio:>8}{rate:>9}{share:>9}{row.ours_gib:>7.1f}{other:>7}"
    )
    if row.disagreement is None:
        return f"{line}\n{row.kernels}".rstrip("\n")
    return f"{line}\n    " + "; ".join([f"sides apart {row.disagreement:.1e}, allowed {row.bound:.1e}", *row.notes])


def whole_runs(rows: Sequence[Row]) -> dict[str, tuple[float, float | None]]:
    """Estimate the minutes (ours, plain) of runs of `STEPS` steps and `MICRO_BATCHES` micro-batches from measured rows.

    Returns one entry per method and training row; none if mutual information, masks or training were not measured.
    """
    first, sweeps, steps = ([row for row in rows if row.part.startswith(s)] for s in ("mutual", "masks", "training"))
    runs = {}
    for rmi, sweep, step in itertools.product(first, sweeps, steps):
        terms = ((rmi, STEPS), (sweep, STEPS), (step, MICRO_BATCHES))
        plain = [times * row.plain_ms for row, times in terms if row.plain_ms is not None and row.agrees]
        name = f"{sweep.part.split(', ')[1]}, {step.part.partition(', ')[2]}"
        ours = sum(times * row.ours_ms for row, times in terms) / 60_000
        runs[name] = (ours, sum(plain) / 60_000 if len(plain) == len(terms) else None)
    return runs


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Run the selected parts one after the other."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    bound = 5e-2 if dtype == torch.bfloat16 else 1e-3
    work = parts.Work(device, dtype, options.sequences, options.length, options.repeats, bound)
    if set(options.parts) & set(SHARED):
        yield from _of_one_model(work, options)
    if "reconstruct" in options.parts:
        block = geometry.build(options.geometry, 1, device, dtype)
        yield from reconstruct.rows(block, work, options.reconstruct_epochs, options.profile)
    if "base" in options.parts:
        yield from base.steps(
            geometry.build(options.geometry, options.blocks, device, dtype), work, tuple(options.train_lengths)
        )


def _of_one_model(work: parts.Work, options: argparse.Namespace) -> Iterator[Row]:
    compare = not options.ours_only

    def small() -> transformers.PreTrainedModel:
        return geometry.build(options.geometry, 2, work.device, torch.float32)

    # Claim a speed-up only for the same algorithm: check that in float32 on two blocks of the geometry.
    apart = dict.fromkeys(SHARED, 0.0)
    for method in plain.METHODS:
        if compare and method in options.parts:
            apart[method] = parts.masks_apart(small(), work, method)
    if compare and "train" in options.parts:
        apart["train"] = parts.gradients_apart(small(), work)
    gc.collect()
    model = geometry.build(options.geometry, options.blocks, work.device, work.dtype)
    if "rmi" in options.parts:
        yield parts.mutual_information(model, work, compare)
    for method in plain.METHODS:
        if method in options.parts:
            yield parts.prune_sweep(model, work, method, compare, apart[method])
            gc.collect()
    yield from _training(model, work, options, apart["train"])
    if "merge" in options.parts:
        yield parts.merge(model, work)


def _training(
    model: transformers.PreTrainedModel, work: parts.Work, options: argparse.Namespace, apart: float
) -> Iterator[Row]:
    if "train" in options.parts or "merge" in options.parts:
        lengths = tuple(options.train_lengths) if "train" in options.parts else ()
        yield from parts.training_steps(model, work, lengths, not options.ours_only, apart, options.accumulation)
    if "kl" in options.parts:
        teacher = geometry.build(options.geometry, options.blocks, work.device, work.dtype)
        yield from parts.divergence_steps(model, teacher, work, tuple(options.train_lengths), options.accumulation)


def measure_large(options: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    """Run and print the selected parts that write checkpoints to disk; return their figures by part."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    blocks, sizes = options.blocks or FEW, (options.sequences, options.length)
    epochs = options.reconstruct_epochs
    found: dict[str, list[dict[str, object]]] = {}
    if "stream" in options.parts:
        found["stream"] = [large.stream(options.geometry, blocks, device, dtype, *sizes, epochs=epochs)]
        print(f"\nstream\n{large.table(found['stream'])}", flush=True)
    if "scale" in options.parts:
        found["scale"] = large.scale(device, dtype, blocks, *sizes, epochs)
        print(f"\nscale\n{large.table(found['scale'])}", flush=True)
    if "plan" in options.parts:
        print("\nplan", flush=True)
        found["plan"] = []
        for row in large.plan(options.geometry, blocks, device, dtype, *sizes, options.train_lengths[-1]):
            print(large.line(row), flush=True)
            found["plan"].append(row)
    return found


@command
def main(arguments: Sequence[str]) -> int:
    """Measure and print; return 1 if the two sides of any part disagree."""
    if arguments and arguments[0] == "decode":
        return decode.main(arguments[1:])
    transformers.utils.logging.disable_progress_bar()
    options = _parser().parse_args(arguments)
    checks.check(options)
    device = torch.device(options.device)
    top = ceilings(device, getattr(torch, options.dtype))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    blocks = options.blocks or geometry.GEOMETRIES[options.geometry]["num_hidden_layers"]
    print(f"{name}, torch {torch.__version__}, {options.dtype}; {options.geometry}, {blocks} blocks")
    print(f"limits measured now: {top[0]:.3g} TFLOP/s matrix product, {top[1]:.3g} TB/s copy\n")
    rows = []
    if set(options.parts) & set(PARTS):
        print(HEADINGS, flush=True)
        for row in measure(options):
            print(_shown(row, top), flush=True)
            rows.append(row)
    runs = whole_runs(rows)
    if runs:
        print(f"\nwhole runs of {STEPS} steps and {MICRO_BATCHES:,} micro-batches, estimated from these rows, minutes:")
    for what, (ours, other) in runs.items():
        print(f"{what:<50}{ours:>11.1f}" + ("" if other is None else f"{other:>14.1f}{other / ours:>10.2f}×"))
    gc.collect()
    on_disk = measure_large(options)
    print(f"\nhost memory, peak: {host_peak():.1f} GiB")
    if options.json:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "geometry": options.geometry,
            "blocks": blocks,
            "dtype": options.dtype,
            "peak_tflops": top[0],
            "peak_tb_per_s": top[1],
            "host_gib": host_peak(),
            "rows": [row.as_dict() for row in rows],
            "whole_run_minutes": runs,
            **on_disk,
        }
        options.json.write_text(files.dumps(figures, "figures", indent=1))
    return int(any(row.disagreement is not None and not row.agrees for row in rows))


if __name__ == "__main__":
    sys.exit(main())
