"""Measure tokens per second of a whole model with dense or packed projections, the dense one compiled and by our kernels."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StaticCache

from torch_impl.bench.measure import relative, resident, synchronize
from torch_impl.decode import cuda_layouts
from torch_impl.decode.next_token import WARM_UP, NextToken
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning import geometry

# What runs between the projections.
KERNELS, COMPILED, PLAIN = "our kernels", "compiled code", "Hugging Face's code"
LONGEST = 256
GIVEN = 4
"""Number of tokens decoded before logits are compared."""


@dataclass
class Speed:
    """One sparsity and batch: tokens/s of both sides, packed as by `generate` on a GPU, dense compiled; and as by Hugging Face."""

    sparsity: str
    batch: int
    packed: float
    dense: float
    dense_joined: float | None
    """Dense, with q, k and v as one product and gate and up as one, like ours; None if not compiled."""
    dense_kernels: float | None
    """Dense, by the same kernels between the projections as packed; None without them."""
    packed_eager: float
    dense_eager: float
    packed_gib: float
    """Memory of the weights."""
    dense_gib: float
    graph: bool
    between: str
    """What runs between the packed projections: compiled code, kernels or Hugging Face's code."""
    dense_between: str
    disagreement: float
    bound: float
    unmerged: float | None = None
    """Packed, with low-rank adapters beside the projections, as LoRA leaves them; None if not measured."""

    @property
    def agrees(self) -> bool:
        """Return whether the logits are equal within the bound."""
        return self.disagreement <= self.bound

    @property
    def ratio(self) -> float | None:
        """Return the ratio of tokens per second; None if the sides disagree."""
        return self.packed / self.dense if self.agrees else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@torch.library.custom_op("losa::dense_rows", mutates_args=())
def _dense_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as a custom operation, so that `compiled_blocks` computes it once for the group, as with packed weights."""
    return nn.functional.linear(x, weight)


@_dense_rows.register_fake
def _dense_shape(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class _DenseRows(nn.Module):
    """One projection's rows in the stacked dense weight of several projections."""

    def __init__(self, weight: torch.Tensor, rows: slice) -> None:
        super().__init__()
        self.in_features, self.weight, self.rows = weight.shape[1], weight, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.losa.dense_rows(x, self.weight)
        return y[..., self.rows]


def _join_dense(decoder: Decoder) -> None:
    """Compute the projections of a block that share an input as one product, if the block is compiled."""
    for block in decoder.blocks:
        for names in decoder.family.inputs:
            if len(names) == 1:
                continue
            weights: list[torch.Tensor] = [block.get_submodule(name).weight for name in names]  # type: ignore[misc]
            joined, end = torch.cat(weights), 0
            for name, weight in zip(names, weights, strict=True):
                end += len(weight)
                block.set_submodule(name, _DenseRows(joined, slice(end - len(weight), end)))


class Beside(nn.Module):
    """A packed projection and an adapter beside it: y = x Wᵀ + (x Aᵀ) Bᵀ. B is 0, so that the output is the projection's."""

    def __init__(self, base: PackedLinear, rank: int, like: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.base = base.in_features, base
        self.A = nn.Parameter(torch.randn(rank, base.in_features).to(like), requires_grad=False)
        self.B = nn.Parameter(like.new_zeros(base.out_features, rank), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.A), self.B)


class Decoding:
    """Decodes greedily, token by token, with a static cache of `longest` tokens. graph, fuse, kernels: of `NextToken`."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        graph: bool,
        fuse: bool = False,
        longest: int = LONGEST,
        kernels: bool | None = False,
    ) -> None:
        self.device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        self.following = NextToken(model, self.cache, batch, graph=graph, fuse=fuse, kernels=kernels)
        self.ids = torch.ones(batch, 1, dtype=torch.long, device=self.device)

    def step(self) -> torch.Tensor:
        """Compute logits (b, vocabulary) of the next token, which becomes the next input."""
        logits = self.following(self.ids)
        self.ids = logits.argmax(-1, keepdim=True)
        return logits

    def given_logits(self) -> torch.Tensor:
        """Return the logits after some tokens that are the same for every model."""
        self.restart()
        for token in range(1, GIVEN + 1):
            logits = self.following(torch.full_like(self.ids, token))
        return logits.float()

    def restart(self) -> None:
        """Reset the cache."""
        if self.cache.is_initialized:
            self.cache.reset()
        self.ids = torch.ones_like(self.ids)

    def tokens_per_second(self, tokens: int, runs: int, seconds: float = math.inf) -> float:
        """Measure tokens per second of the whole batch; the fastest run counts.

        seconds: once the runs have taken so long, no other starts; one that takes so long by itself ends, after a token at least.
        """
        self.restart()
        for _ in range(WARM_UP + 1):
            self.step()
        fastest, spent = 0.0, 0.0
        for _ in range(runs):
            done, took = self._run(tokens, seconds)
            fastest, spent = max(fastest, done * len(self.ids) / took), spent + took
            if spent >= seconds:
                break
        return fastest

    def _run(self, tokens: int, seconds: float) -> tuple[int, float]:
        """Return the tokens decoded and the seconds that they took."""
        self.restart()
        synchronize(self.device)
        start, done = time.perf_counter(), 0
        while done < tokens:
            self.step()
            done += 1
            if seconds < math.inf and time.perf_counter() - start >= seconds:
                break
        synchronize(self.device)
        return done, time.perf_counter() - start


@dataclass
class _Side:
    """Tokens/s and logits of one model: fast, and as run by Hugging Face."""

    fast: float
    eager: float
    graph: bool
    between: str
    fast_logits: torch.Tensor
    logits: torch.Tensor


def _side(model: PreTrainedModel, options: argparse.Namespace, batch: int, kernels: bool | None = False) -> _Side:
    device, runs = torch.device(options.device), max(2, options.repeats // 3)
    eagerly = Decoding(model, batch, graph=False)
    fast = Decoding(model, batch, True, fuse=device.type == "cuda", kernels=kernels)
    eager = eagerly.tokens_per_second(max(2, options.tokens // 8), runs)
    logits = eagerly.given_logits()
    if not fast.following.captures:
        return _Side(eager, eager, False, PLAIN, logits, logits)
    speed = fast.tokens_per_second(options.tokens, runs)
    between = KERNELS if fast.following.kernels else COMPILED if fast.following.fuses else PLAIN
    return _Side(speed, eager, True, between, fast.given_logits(), logits)


def _compare(
    sparsity: str, batch: int, packed: _Side, others: Sequence[_Side], gib: tuple[float, float], bound: float
) -> Speed:
    """Compare the sides; the dense model, as run by Hugging Face, is the reference.

    others: dense; with joined projections; by kernels. gib: of the packed and dense model.
    """
    dense, joined, same = others
    apart = max(relative(side.fast_logits, dense.logits) for side in (packed, *others))
    compiled = joined.fast if joined.between == COMPILED else None
    kernels = same.fast if same.between == KERNELS else None
    speeds = (packed.fast, dense.fast, compiled, kernels, packed.eager, dense.eager)
    return Speed(sparsity, batch, *speeds, *gib, packed.graph, packed.between, dense.between, apart, bound)


def _add_unmerged(row: Speed, unmerged: _Side, dense: _Side) -> None:
    row.unmerged = unmerged.fast
    row.disagreement = max(row.disagreement, relative(unmerged.fast_logits, dense.logits))


def places(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Return (block, name) of all projections of all blocks."""
    decoder = Decoder(model)
    return [(block, name) for block in decoder.blocks for name in decoder.family.projections]


def measure(options: argparse.Namespace) -> list[Speed]:
    """Measure all percentages in `options.sparsities` and all batches, with one model that is made sparser and sparser."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = geometry.build(options.whole_model, options.blocks, device, dtype)
    decoder = Decoder(model)
    rows, before = [], 0.0
    # Each side rounds each projection once; the difference grows over the blocks.
    bound = 8 * torch.finfo(dtype).eps
    for percent in sorted(float(s) for s in options.sparsities if ":" not in s):
        stay = (1 - percent / 100) / (1 - before) if before < 1 else 1.0
        before = percent / 100
        linears = [block.get_submodule(name) for block, name in places(model)]
        for linear in linears:
            linear.weight.data.masked_fill_(torch.rand_like(linear.weight, dtype=torch.float32) >= stay, 0)  # type: ignore[operator, arg-type, union-attr]
        dense_gib = resident(model)
        dense = {batch: _side(model, options, batch) for batch in options.batches}
        same = {batch: _side(model, options, batch, kernels=None) for batch in options.batches}
        _join_dense(decoder)
        # Only compiled code computes these products once for all layers that read them.
        joined = {batch: _side(model, options, batch) for batch in options.batches}
        for batches in cuda_layouts.by_layout(options.batches):
            _pack(model, linears, batches[0])
            gib = (resident(model), dense_gib)
            packed = {batch: _side(model, options, batch, kernels=None) for batch in batches}
            found = [
                _compare(f"{percent:g}", batch, packed[batch], (dense[batch], joined[batch], same[batch]), gib, bound)
                for batch in batches
            ]
            if options.adapters:
                _put_beside(model, options.adapters, torch.empty(0, dtype=dtype, device=device))
                for row in found:
                    _add_unmerged(row, _side(model, options, row.batch, kernels=None), dense[row.batch])
            rows += found
        for (block, name), linear in zip(places(model), linears, strict=True):
            block.set_submodule(name, linear)
    return rows


def _pack(model: PreTrainedModel, linears: Sequence[nn.Module], sequences: int) -> None:
    """Put packed projections in the places of all, for so many sequences at once."""
    for (block, name), linear in zip(places(model), linears, strict=True):
        block.set_submodule(name, PackedLinear.of(linear, sequences))  # type: ignore[arg-type]
    group_projections(model)


def _put_beside(model: PreTrainedModel, rank: int, like: torch.Tensor) -> None:
    """Put adapters beside all packed projections."""
    for block, name in places(model):
        block.set_submodule(name, Beside(block.get_submodule(name), rank, like))  # type: ignore[arg-type]


def show(rows: Sequence[Speed]) -> None:
    """Print the rows."""
    if rows:
        print(f"\nwhole model, tokens/s, {'a CUDA graph a token' if rows[0].graph else 'no graphs'}")
        for side, found in (("packed", {row.between for row in rows}), ("dense", {row.dense_between for row in rows})):
            print(f"    {side}: {' or '.join(sorted(found))} between the projections")
        print(
            f"{'packed':>32}{'dense':>9}{'ratio':>8}{'q,k,v one product':>19}{'by our kernels':>16}"
            "   eager: packed, dense   GiB: packed, dense"
        )
    for row in rows:
        ratio = "refused" if row.ratio is None else f"{row.ratio:.2f}×"
        shown = f"    {row.sparsity + ' %':<8}batch {row.batch:<3}{row.packed:>11.1f}{row.dense:>9.1f}{ratio:>8}"
        shown += "".join(
            f"{'' if speed is None else format(speed, '.1f'):>{width}}"
            for speed, width in ((row.dense_joined, 19), (row.dense_kernels, 16))
        )
        eager = f"{row.packed_eager:>15.1f}{row.dense_eager:>8.1f}{row.packed_gib:>15.2f}{row.dense_gib:>7.2f}"
        if row.unmerged is not None:
            eager += f"   adapters beside {row.unmerged:.1f} ({row.unmerged / row.dense:.2f}×)"
        print(f"{shown}{eager}   apart {row.disagreement:.1e}, allowed {row.bound:.1e}")
