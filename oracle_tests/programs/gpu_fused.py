"""Check the kernels of fused blocks on a GPU, and time whole models with them against compiled blocks.

    python -m oracle_tests.programs.gpu_fused [--geometries llama-2-7b] [--sparsities 50 60 70] [--layouts gaps panels] [--profile]
        [--variants] [--small]

First each kernel against the spec: dtypes, shared heads, caches from empty to full; and the products that compute a norm, SiLU or
a residual sum. Then greedy tokens of a small model in float32, which must be the model's own. Then for each geometry, dense and
packed, tokens/s of one sequence in CUDA graphs with compiled blocks and with fused ones, in eight launches a block and, where the
layout can end so, in five; packed as users get it, or in each of `--layouts`; logits against the model launched layer by layer;
how many greedy tokens are the same, which a near tie may end in bf16; and the share of the memory's limit: bytes of weights and
cache by the rate of a copy. `--profile` adds the microseconds of a token by kernel, `--variants` the speed of five launches with
other constants of modules. Exits with 1 if kernels, tokens or logits differ, or if a model is not fused. `--small` is a quick
test of the script.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import nn
from transformers import PreTrainedModel

from oracle_tests import ending_cases, fused_cases
from torch_impl.bench.measure import ceilings, relative, synchronize
from torch_impl.bench.whole import Decoding, places
from torch_impl.decode import cuda, cuda_endings, cuda_layouts, fused_attention, fused_kernels, packed_step
from torch_impl.decode.packed_group import Packed
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
# Rows and columns of a product that is normed (q, k, v), swiglu (gate, up), added (o; down): of 7B, 1B and others.
ENDINGS = {
    "normed": [(12288, 4096), (3072, 2048), (37, 200)],
    "swiglu": [(22016, 4096), (16384, 2048), (64, 100)],
    "added": [(4096, 4096), (2048, 8192), (4096, 11008), (37, 200)],
}
# Settings with which every weight has this layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    "gaps": dict.fromkeys(("FEW", "MOST_KEPT", "MOST_SIZE"), float("inf")),
    "panels": {"FEW": 0},
}
# Settings of five launches a block, and others that `--variants` times, one at a time.
SETTINGS: dict[str, Any] = {"FIVE": True, "LAUNCH_FIRST": True}
VARIANTS: list[dict[str, Any]] = [
    {"FIVE": False},
    {"LAUNCH_FIRST": False},
    {"GATED_WARPS": 8},
    {"GATED_WARPS": 12},
    {"MOST_SPLITS": 8},
    {"MOST_SPLITS": 4},
    {"MOST_SPLITS": 1},
    {"ATTENTION_WARPS": 8},
]
HOLDERS: dict[str, Any] = {
    "FIVE": packed_step,
    "LAUNCH_FIRST": cuda,
    "GATED_WARPS": cuda,
    "MOST_SPLITS": fused_attention,
    "ATTENTION_WARPS": fused_attention,
    **dict.fromkeys(LAYOUTS["gaps"], cuda_layouts),
}
CACHES = [(1, 0.0), (33, 1.0), (256, 0.4), (2048, 0.0), (2048, 0.7)]


def cases(small: bool) -> Iterator[tuple[str, Callable[[], float | None]]]:
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
                    fused_kernels, s[0], s[1], s[2], n, f, d, 0, s[1] > 8
                ),
            )


def ending_cases_of(small: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """Name and check of every product that computes more."""
    for kind, shapes in ENDINGS.items():
        for (rows, columns), batch, gaps in itertools.product(shapes[-1:] if small else shapes, (1, 8), (False, True)):
            yield (
                f"{kind} {rows} x {columns}, batch {batch}{', gaps' * gaps}",
                lambda k=kind, r=rows, c=columns, b=batch, g=gaps: ending_cases.ending(k, r, c, b, gaps=g),
            )


def kernels_are_right(small: bool) -> bool:
    """Run all cases; print those that fail."""
    count, failed, start = 0, 0, time.perf_counter()
    worst = 0.0
    for name, check in itertools.chain(cases(small), ending_cases_of(small)):
        count += 1
        try:
            worst = max(worst, check() or 0.0)
        except (AssertionError, *fused_kernels.ERRORS) as error:
            failed += 1
            print(f"    {name}: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"kernels: {count} cases, {failed} wrong, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"    largest error of products that compute more: {worst:.2f} of its bound", flush=True)
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
        name = event.key.replace("(anonymous namespace)::", "")
        print(f"        {event.device_time_total / count:>9.1f} µs in {event.count / count:>5.0f}: {name[:80]}")


@contextmanager
def settings(model: nn.Module, **values: Any) -> Iterator[None]:
    """Set constants of modules by name. Plans of layouts and attention depend on them."""
    before = {name: getattr(HOLDERS[name], name) for name in values}

    def change(new: dict[str, Any]) -> None:
        for name, value in new.items():
            setattr(HOLDERS[name], name, value)
        for module in model.modules():
            layout = getattr(module, "layout", None)
            if isinstance(layout, cuda.Layout):
                layout.__dict__.pop("plan", None)

    change(values)
    try:
        yield
    finally:
        change(before)


def token_bytes(model: PreTrainedModel, options: argparse.Namespace) -> int:
    """Bytes that a token reads: layouts or weights, but the embedding's, and the filled part of the cache, on average."""
    body: Any = model.base_model
    config: Any = model.config
    tied = model.get_output_embeddings().weight is body.embed_tokens.weight
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    embedding = 0 if tied else body.embed_tokens.weight.nbytes
    channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * channels
    return sum(tensors.values()) - embedding + options.batch * token * options.tokens // 2


def layouts_of(model: nn.Module) -> list[cuda.Layout]:
    """The layouts of a packed model; none without kernels."""
    return [module.layout for module in model.modules() if isinstance(module, Packed) and module.layout is not None]


def prune(weight: torch.Tensor, percent: float) -> None:
    """Set more weights to 0 until so many percent of each row are, at random, as many in each row, as Wanda does."""
    scores = torch.rand_like(weight, dtype=torch.float32).masked_fill_(weight == 0, -1)
    weight.scatter_(1, scores.topk(int(weight.shape[1] * percent / 100), 1, largest=False).indices, 0)


def takes_five(model: nn.Module) -> bool:
    """Whether the layouts of a packed model can end as five launches a block need."""
    found = [module for module in model.modules() if isinstance(module, Packed) and module.layout is not None]
    # Gate and up are the two with one input.
    ends = (("swiglu" if len(getattr(module, "sizes", ())) == 2 else "added", module.layout) for module in found)
    return bool(found) and all(cuda_endings.fits(layout, ending) for ending, layout in ends if layout is not None)


def right(fused: Decoding, own: list[list[int]], logits: torch.Tensor, five: bool) -> tuple[bool, str]:
    """Whether a fused model is right, and what is said about it."""
    theirs = greedy(fused, GREEDY)
    alike = next((i for i, (one, other) in enumerate(zip(own, theirs, strict=True)) if one != other), GREEDY)
    apart = relative(fused.given_logits(), logits)
    step: Any = fused.following._fused
    passed = apart <= BOUND and fused.following.kernels and (not five or bool(step._step.packed))
    said = f"logits apart {apart:.1e}, allowed {BOUND:.1e}   {alike} of {GREEDY} greedy tokens the same"
    if not fused.following.captures and fused.device.type == "cuda":
        said += "   NOT CAPTURED"
    return passed, said + ("" if passed else "   WRONG")


def compare(
    model: PreTrainedModel, what: str, options: argparse.Namespace, dense: float | None, rate: float
) -> tuple[bool, float]:
    """Print tokens/s with compiled and with fused blocks. Returns whether fused models are right, and tokens/s compiled.

    dense: tokens/s of the dense model, compiled, if this one is packed; rate: bytes that a copy moves in a second.
    """
    batch, device = options.batch, torch.device(options.device)
    make = partial(Decoding, model, batch, longest=options.longest)
    plain, compiled = make(graph=False), make(graph=True, fuse=device.type == "cuda")
    own, logits = greedy(plain, GREEDY), plain.given_logits()
    base = compiled.tokens_per_second(options.tokens, RUNS)
    print(f"    {what:<12}{'compiled':<20}{base:>7.1f} tokens/s", flush=True)
    del compiled
    limit = rate / token_bytes(model, options) * batch
    passed = True

    def measure(name: str, detailed: bool, **values: Any) -> None:
        nonlocal passed
        with settings(model, **values):
            fused = make(graph=True, kernels=True)
            fine, said = right(fused, own, logits, values["FIVE"] and takes_five(model))
            speed = fused.tokens_per_second(options.tokens, RUNS)
            passed &= fine
            more = "" if dense is None else f"   {speed / dense:.2f}× dense"
            print(
                f"    {'':<12}{name:<20}{speed:>7.1f} tokens/s   {speed / base:.2f}× compiled{more}   "
                f"{speed / limit:.0%} of the memory's limit   {said}",
                flush=True,
            )
            if detailed and options.profile and device.type == "cuda":
                profile(fused)

    measure("eight", True, **SETTINGS | {"FIVE": False})
    if takes_five(model):
        measure("five", True, **SETTINGS)
    if dense is not None:
        for values in VARIANTS if options.variants else []:
            measure(" ".join(f"{name} {value}" for name, value in values.items()), False, **SETTINGS | values)
    return passed, base


def whole(name: str, options: argparse.Namespace, rate: float) -> bool:
    """Compare a model dense, and packed at each sparsity in each layout; it is made sparser and sparser."""
    start = time.perf_counter()
    model = geometry.build(name, options.blocks, torch.device(options.device), torch.bfloat16)
    print(
        f"{name}, {model.config.num_hidden_layers} blocks, bf16, batch {options.batch}, cache {options.longest}",
        flush=True,
    )
    passed, dense = compare(model, "dense", options, None, rate)
    everywhere = places(model)
    linears = [block.get_submodule(place) for block, place in everywhere]
    for percent in sorted(options.sparsities):
        for linear in linears:
            weight: torch.Tensor = linear.weight.data  # type: ignore[union-attr, assignment]
            prune(weight, percent)
        for layout in options.layouts or [""]:
            with settings(model, **LAYOUTS.get(layout, {})):
                for (block, place), linear in zip(everywhere, linears, strict=True):
                    assert isinstance(linear, nn.Linear)
                    block.set_submodule(place, PackedLinear.of(linear, options.batch))
                group_projections(model)
            kinds = Counter(type(found).__name__ for found in layouts_of(model))
            print(f"    {percent:g} %: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}", flush=True)
            passed &= compare(model, f"{percent:g} % {layout}", options, dense, rate)[0]
    print(f"    {time.perf_counter() - start:.0f} s", flush=True)
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Run all comparisons. Returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometries", nargs="*", default=["llama-3.2-1b", "llama-3.2-3b", "llama-2-7b"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[50.0, 60.0, 70.0], metavar="PERCENT")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, help="Default: one for so many sequences.")
    parser.add_argument("--blocks", type=int, help="Number of blocks of each model (default: all).")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--longest", type=int, default=256, help="Length of the cache.")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    if options.small:
        options.geometries, options.sparsities, options.tokens = ["small"], [70.0], 2
    if options.device != "cpu" and not cuda.available()[0]:
        print(cuda.available()[1])
        return 1
    passed = [kernels_are_right(options.small), tokens_are_the_same(torch.device(options.device))]
    rate = ceilings(torch.device(options.device), torch.bfloat16)[1] * 1e12
    print(f"a copy moves {rate / 1e12:.2f} TB/s", flush=True)
    passed += [whole(name, options, rate) for name in options.geometries]
    print("passed" if all(passed) else "FAILED")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
