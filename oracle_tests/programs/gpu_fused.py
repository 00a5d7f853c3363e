"""Check the kernels of fused blocks on a GPU, and time whole models with them against compiled blocks.

    python -m oracle_tests.programs.gpu_fused [--geometries llama-2-7b] [--sparsities 50 60 70] [--profile] [--small]

First each kernel against the spec: dtypes, shared heads, caches from empty to full. Then greedy tokens of a small model in
float32, which must be the model's own. Then for each geometry, dense and packed: logits against the model launched layer by
layer, and tokens/s of one sequence in CUDA graphs with compiled blocks and with fused ones, and how many greedy tokens are the
same; in bf16 a near tie may end that. `--profile` adds the microseconds of a fused token by kernel. Exits with 1 if kernels,
tokens or logits differ, or if a model is not fused. `--small` is a quick test of the script.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import nn
from transformers import PreTrainedModel

from oracle_tests import fused_cases
from torch_impl.bench.measure import relative, synchronize
from torch_impl.bench.whole import Decoding, places
from torch_impl.decode import cuda, fused_kernels
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.experiment.planning import geometry

# As in bench/whole.py.
BOUND = 8 * torch.finfo(torch.bfloat16).eps
GREEDY = 48
RUNS = 3
# (batch, key-value heads), query heads that share one, channels of a head: 7B, 1B, 3B and others.
SHAPES = [
    ((1, 32), 1, 128),
    ((1, 8), 4, 64),
    ((8, 8), 3, 128),
    ((3, 1), 16, 48),
]
CACHES = [(1, 0.0), (33, 1.0), (256, 0.4), (2048, 0.0), (2048, 0.7)]


def cases(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and check of every case."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        for columns, rows in itertools.product((64, 200) if small else (2048, 3072, 11008), (1, 8)):
            for adds in (False, True):
                yield (
                    f"add_norm {kind} {rows} x {columns}",
                    lambda c=columns, r=rows, a=adds, d=dtype: fused_cases.add_norm(fused_kernels, r, c, d, a, 0),
                )
            yield (
                f"gated {kind} {rows} x {columns}",
                lambda c=columns, r=rows, d=dtype: fused_cases.gated(fused_kernels, r, c, d, 0),
            )
        shapes = SHAPES[-1:] if small else SHAPES if dtype == torch.bfloat16 else SHAPES[1:2]
        for shape, (longest, share) in itertools.product(shapes, CACHES[:2] if small else CACHES):
            yield (
                f"attend {kind} {shape}, {share:.0%} of {longest}",
                lambda s=shape, n=longest, f=share, d=dtype: fused_cases.attend(
                    fused_kernels, *s, n, f, d, 0, s[1] > 8
                ),
            )


def kernels_are_right(small: bool) -> bool:
    """Run all cases; print those that fail."""
    count, failed, start = 0, 0, time.perf_counter()
    for name, check in cases(small):
        count += 1
        try:
            check()
        except (AssertionError, *fused_kernels.ERRORS) as error:
            failed += 1
            print(f"    {name}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"kernels: {count} cases, {failed} wrong, {time.perf_counter() - start:.0f} s", flush=True)
    return not failed


@torch.no_grad()
def greedy(decoding: Decoding, tokens: int) -> list[list[int]]:
    """Decode from an empty cache; returns ids of each token."""
    decoding.restart()
    found = []
    for _ in range(tokens):
        decoding.step()
        found.append(decoding.ids.flatten().tolist())
    return found


def tokens_are_the_same(device: torch.device) -> bool:
    """Compare the greedy tokens of a small float32 model, captured and fused, with the model's own: one row and three."""
    model = geometry.build("small", None, device, torch.float32)
    passed = True
    for batch in (1, 3):
        plain = greedy(Decoding(model, batch, graph=False), GREEDY)
        fused = Decoding(model, batch, True, kernels=True)
        same = greedy(fused, GREEDY) == plain and fused.following.kernels
        passed &= same
        print(
            f"float32, small, batch {batch}: {GREEDY} greedy tokens {'the same' if same else 'NOT the same'}",
            flush=True,
        )
    return passed


def profile(decoding: Decoding) -> None:
    """Print the microseconds of a token by kernel."""
    count = 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(count):
            decoding.step()
        synchronize(decoding.device)
    found = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    for event in found[:14]:
        print(f"        {event.device_time_total / count:>9.1f} µs in {event.count / count:>5.0f}: {event.key[:80]}")


def compare(model: PreTrainedModel, what: str, options: argparse.Namespace) -> bool:
    """Print tokens/s with compiled and with fused blocks. Returns whether the fused model is right."""
    batch, device = options.batch, torch.device(options.device)
    plain = Decoding(model, batch, graph=False, longest=options.longest)
    fused = Decoding(model, batch, True, longest=options.longest, kernels=True)
    compiled = Decoding(model, batch, True, fuse=device.type == "cuda", longest=options.longest)
    own, logits = greedy(plain, GREEDY), plain.given_logits()
    theirs = greedy(fused, GREEDY)
    alike = next((i for i, (one, other) in enumerate(zip(own, theirs, strict=True)) if one != other), GREEDY)
    apart = relative(fused.given_logits(), logits)
    rates = [side.tokens_per_second(options.tokens, RUNS) for side in (compiled, fused)]
    passed = apart <= BOUND and fused.following.kernels
    print(
        f"    {what:<12}compiled {rates[0]:>7.1f}   fused {rates[1]:>7.1f} tokens/s   {rates[1] / rates[0]:.2f}×   "
        f"logits apart {apart:.1e}, allowed {BOUND:.1e}   {alike} of {GREEDY} greedy tokens the same"
        f"{'' if fused.following.captures or device.type != 'cuda' else '   NOT CAPTURED'}{'' if passed else '   WRONG'}",
        flush=True,
    )
    if options.profile and device.type == "cuda":
        profile(fused)
    return passed


def whole(name: str, options: argparse.Namespace) -> bool:
    """Compare a model dense, and packed at each sparsity; it is made sparser and sparser."""
    start = time.perf_counter()
    model = geometry.build(name, options.blocks, torch.device(options.device), torch.bfloat16)
    print(
        f"{name}, {model.config.num_hidden_layers} blocks, bf16, batch {options.batch}, cache {options.longest}",
        flush=True,
    )
    passed, before = compare(model, "dense", options), 0.0
    everywhere = places(model)
    linears = [block.get_submodule(place) for block, place in everywhere]
    for percent in sorted(options.sparsities):
        stay, before = (1 - percent / 100) / (1 - before), percent / 100
        for (block, place), linear in zip(everywhere, linears, strict=True):
            weight: torch.Tensor = linear.weight.data  # type: ignore[union-attr, assignment]
            weight.masked_fill_(torch.rand_like(weight, dtype=torch.float32) >= stay, 0)
            assert isinstance(linear, nn.Linear)
            block.set_submodule(place, PackedLinear.of(linear))
        group_projections(model)
        passed &= compare(model, f"{percent:g} %", options)
    print(f"    {time.perf_counter() - start:.0f} s", flush=True)
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Run all comparisons. Returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometries", nargs="*", default=["llama-3.2-1b", "llama-3.2-3b", "llama-2-7b"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[50.0, 60.0, 70.0], metavar="PERCENT")
    parser.add_argument("--blocks", type=int, help="Number of blocks of each model (default: all).")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--longest", type=int, default=256, help="Length of the cache.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    if options.small:
        options.geometries, options.sparsities, options.tokens = ["small"], [70.0], 2
    if options.device != "cpu" and not cuda.available()[0]:
        print(cuda.available()[1])
        return 1
    passed = [kernels_are_right(options.small), tokens_are_the_same(torch.device(options.device))]
    passed += [whole(name, options) for name in options.geometries]
    print("passed" if all(passed) else "FAILED")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
