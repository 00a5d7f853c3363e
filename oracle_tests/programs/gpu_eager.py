"""Compare Hugging Face's own `model.generate` on a packed model with a dense one on a GPU: logits, tokens and tokens/s.

    python -m oracle_tests.programs.gpu_eager [--device cuda] [--blocks 16] [--tokens 48] [--small]

Random LLaMAs of 7B's and 1B's shapes, pruned to 70 %, run dense and packed with the same weights: uncompiled as `generate` does
by default; and with `cache_implementation="static"`, which captures a packed model. Checks that the logits agree, and that
captured tokens are those of the uncaptured model. Then host time per projection, and the product of one block with 8 to 64 rows:
the kernel in slices of 8 rows against unpacking.
Exits with 1 if anything differs. Time per token is about proportional to the blocks. `--small` is a quick test of the script.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from torch_impl.bench.decode import sparse
from torch_impl.bench.measure import graphed, relative, synchronize
from torch_impl.decode import cuda
from torch_impl.decode.captured_call import capture_in_generate
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning import geometry

SPARSITY = "70"
ROUNDS = 5
ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128)
ALWAYS = 2**30
# Each side rounds each projection once; the difference grows over the blocks. As in bench/whole.py.
BOUND = 8 * torch.finfo(torch.bfloat16).eps


def models(name: str, blocks: int | None, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Build a dense model with zeros, and the packed model of the same weights."""
    dense = geometry.build(name, blocks, device, torch.bfloat16)
    for weight in Decoder(dense).weights:
        weight.data.copy_(sparse(weight.data, SPARSITY))
    packed = copy.deepcopy(dense)
    decoder = Decoder(packed)
    for block in decoder.blocks:
        for projection in decoder.family.projections:
            linear: Any = block.get_submodule(projection)
            block.set_submodule(projection, PackedLinear.of(linear))
    group_projections(packed)
    capture_in_generate(packed)
    return dense, packed


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and of four single tokens after it: (b, tokens, vocabulary), float32."""
    cache, found = DynamicCache(config=model.config), []
    for part in (ids[:, :-4], *ids[:, -4:].split(1, dim=1)):
        found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits.float())
    return torch.cat(found, 1)


def generate(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """Greedy new tokens, always as many."""
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return found[:, ids.shape[1] :]


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Time one call."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def compare(name: str, options: argparse.Namespace) -> bool:
    """Compare the two models: logits, tokens, tokens/s."""
    device, tokens = torch.device(options.device), options.tokens
    start = time.perf_counter()
    dense, packed = models(name, options.blocks if "7b" in name else None, device)
    blocks = dense.config.num_hidden_layers
    print(f"{name}, {blocks} blocks, {SPARSITY} %, bf16: built in {time.perf_counter() - start:.0f} s")
    passed = True
    for batch in (1, 3):
        ids = torch.randint(0, 500, (batch, 24), generator=torch.Generator().manual_seed(1)).to(device)
        apart = relative(logits(packed, ids), logits(dense, ids))
        passed &= apart <= BOUND
        print(f"    logits, batch {batch}: apart {apart:.1e}, allowed {BOUND:.1e}")
    ids = ids[:1, :8]
    sides: dict[str, Callable[[], Any]] = {
        "dense": lambda: generate(dense, ids, tokens),
        "packed": lambda: generate(packed, ids, tokens),
    }
    if device.type == "cuda":
        sides["packed, inference_mode"] = torch.inference_mode()(sides["packed"])
        sides["packed, static, not captured"] = lambda: generate(
            packed, ids, tokens, cache_implementation="static", disable_compile=True
        )
    sides["packed, static"] = lambda: generate(packed, ids, tokens, cache_implementation="static")
    sides["packed, static, longer"] = lambda: generate(packed, ids, 4 * tokens, cache_implementation="static")
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(2 if options.small else 1 + ROUNDS):
        for side, action in sides.items():
            taken = seconds(action, device)
            if turn:
                times[side].append(taken)
    best = {side: min(found) for side, found in times.items()}
    for side, taken in best.items():
        count = 4 * tokens if side.endswith("longer") else tokens
        # Of the same turn, because a busy machine is sometimes slower.
        turns = [one / other for one, other in zip(times["dense"], times[side], strict=True)]
        rate, ratio = count / taken, count / tokens * statistics.median(turns)
        print(
            f"    {side + ':':<32}{rate:>8.1f} tokens/s{ratio:>8.2f} × dense   ({taken * 1e3 / count:.2f} ms a token)"
        )
    rest = (best["packed, static, longer"] - best["packed, static"]) / (3 * tokens)
    print(f"    {'packed, static, once captured:':<32}{1 / rest:>8.1f} tokens/s")
    own = generate(packed, ids, tokens, cache_implementation="static", disable_compile=True)
    captured = generate(packed, ids, tokens, cache_implementation="static")
    alike = int((own == captured).flatten().cumprod(0).sum())
    print(
        f"    {alike} of {tokens} captured tokens are the uncaptured ones; a near tie may end that: kernels round otherwise"
    )
    host(dense, packed, device)
    return passed and alike > 0


@torch.no_grad()
def host(dense: PreTrainedModel, packed: PreTrainedModel, device: torch.device) -> None:
    """Print the time that one call takes on the host, while the device is far behind or idle."""
    plain, ours = Decoder(dense).projections(0), Decoder(packed).projections(0)
    groups = [[name for name in names if name in ours] for names in Decoder(dense).family.inputs]

    def of(layers: list[Any], count: int = 100) -> float:
        xs = [torch.randn(1, 1, layers[0].in_features, device=device, dtype=torch.bfloat16) for _ in range(count)]
        found = []
        for _ in range(5):
            synchronize(device)
            start = time.perf_counter()
            for x in xs:
                for layer in layers:
                    layer(x)
            found.append((time.perf_counter() - start) / count / len(layers) * 1e6)
        return min(found)

    for names in groups:
        one, other = of([plain[name] for name in names]), of([ours[name] for name in names])
        print(f"    host µs per call, {', '.join(names)}: dense {one:.1f}, packed {other:.1f}")


def crossover(device: torch.device, small: bool) -> bool:
    """Print the time of the products of one block of 7B's shapes for several numbers of rows: kernel, unpacking, dense."""
    passed = True
    shapes = [(256, 128)] if small else [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    for sparsity in (SPARSITY,) if small else ("50", "60", "70", "80"):
        print(f"one block's products, {sparsity} %, µs: rows, kernel in slices of 8, unpack + cuBLAS, dense cuBLAS")
        weights = [
            sparse(torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[1] ** 0.5, sparsity)
            for shape in shapes
        ]
        layouts = [cuda.pack_rows(weight) for weight in weights]
        for rows in ROWS:
            xs = [torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16) for shape in shapes]
            found = []
            for most in (ALWAYS, 0):
                plans = [[*layout.plan[:7], most, *layout.plan[8:]] for layout in layouts]
                calls = [
                    functools.partial(layout.product, x, layout.data, layout.starts, plan, None)
                    for layout, x, plan in zip(layouts, xs, plans, strict=True)
                    if layout.product is not None
                ]
                found.append(
                    calls or [functools.partial(cuda.matvec, layout, x) for layout, x in zip(layouts, xs, strict=True)]
                )
            found.append([functools.partial(nn.functional.linear, x, w) for x, w in zip(xs, weights, strict=True)])
            apart = max(relative(a(), b()) for side in found[:2] for a, b in zip(side, found[2], strict=True))
            passed &= apart <= 2**-7
            repeats = 2 if small else 12
            times = [graphed(side, device, repeats) * len(side) for side in found]
            print(f"    {rows:>4}{times[0]:>10.1f}{times[1]:>10.1f}{times[2]:>10.1f}   apart {apart:.1e}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Run all comparisons. Returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=16, help="Blocks of the 7B model.")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        usable, reason = cuda.available()
        if not usable:
            print(reason)
            return 1
    names = ["small"] if options.small else ["llama-3.2-1b", "llama-2-7b"]
    passed = [compare(name, options) for name in names]
    passed.append(crossover(torch.device(options.device), options.small))
    print("passed" if all(passed) else "FAILED")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
