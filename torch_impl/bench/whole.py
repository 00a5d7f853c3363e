"""Tokens per second of a whole model, its projections dense or packed, everything else Hugging Face's own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from torch_impl.bench import geometry
from torch_impl.bench.measure import relative, resident, synchronize
from torch_impl.engine.decoding import WARM_UP, NextToken
from torch_impl.engine.families import decoder_blocks, find_family

Packer = Callable[[torch.Tensor], tuple[Callable[[torch.Tensor], torch.Tensor], int]]
LONGEST = 256


class PackedProjection(nn.Module):
    """A projection over a packed weight, for a batch of single tokens."""

    def __init__(self, linear: nn.Linear, pack: Packer) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.product, self.nbytes = pack(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (b, 1, in) → (b, 1, out)."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


@dataclass
class Speed:
    """One sparsity and batch: tokens/s of both sides, in a graph and as Hugging Face runs them."""

    sparsity: str
    batch: int
    packed: float
    dense: float
    packed_eager: float
    dense_eager: float
    packed_gib: float
    """Memory of the weights."""
    dense_gib: float
    graph: bool
    disagreement: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the logits are the same within the bound."""
        return self.disagreement <= self.bound

    @property
    def ratio(self) -> float | None:
        """How many times as many tokens per second; None where the sides disagree."""
        return self.packed / self.dense if self.agrees else None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


class _Decoder:
    """Greedy tokens, one after another, from a model with a static cache; `graph`: as CUDA graphs where there is a GPU."""

    def __init__(self, model: nn.Module, batch: int, device: torch.device, graph: bool) -> None:
        self.device = device
        self.cache = StaticCache(config=model.config, max_cache_len=LONGEST)  # type: ignore[arg-type]
        self.following = NextToken(model, self.cache, batch, graph)
        self.ids = torch.ones(batch, 1, dtype=torch.long, device=device)

    def step(self) -> torch.Tensor:
        """Logits (b, vocabulary) of the next token, which becomes the input."""
        logits = self.following(self.ids)
        self.ids = logits.argmax(-1, keepdim=True)
        return logits

    def first_logits(self) -> torch.Tensor:
        """After one given token."""
        self.restart()
        return self.step().float()

    def restart(self) -> None:
        """Forget what was decoded."""
        if self.cache.is_initialized:
            self.cache.reset()
        self.ids = torch.ones_like(self.ids)

    def tokens_per_second(self, tokens: int, repeats: int) -> float:
        """Of the whole batch; the best of some runs."""
        self.restart()
        for _ in range(WARM_UP + 1):
            self.step()
        times = []
        for _ in range(max(2, repeats // 3)):
            self.restart()
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(tokens):
                self.step()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return tokens * len(self.ids) / min(times)


def _speed(model: nn.Module, options: argparse.Namespace, batch: int) -> tuple[float, float, bool, torch.Tensor]:
    """(tokens/s in a graph, eager, whether there is a graph, first logits)."""
    device = torch.device(options.device)
    eagerly, graphed = (_Decoder(model, batch, device, graph) for graph in (False, True))
    logits = eagerly.first_logits()
    eager = eagerly.tokens_per_second(max(2, options.tokens // 8), options.repeats)
    if not graphed.following.captures:
        return eager, eager, False, logits
    return graphed.tokens_per_second(options.tokens, options.repeats), eager, True, logits


def measure(options: argparse.Namespace, pack: Packer) -> list[Speed]:
    """Every percentage of `options.sparsities` and every batch, from one model that gets sparser."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = geometry.build(options.whole_model, options.blocks, device, dtype)
    family = find_family(model)
    places = [(block, name) for block in decoder_blocks(model, family) for name in family.projections]
    rows, before = [], 0.0
    for percent in sorted(float(s) for s in options.sparsities if ":" not in s):
        stay = (1 - percent / 100) / (1 - before) if before < 1 else 1.0
        before = percent / 100
        linears = [block.get_submodule(name) for block, name in places]
        for linear in linears:
            linear.weight.data.masked_fill_(torch.rand_like(linear.weight, dtype=torch.float32) >= stay, 0)  # type: ignore[operator, arg-type, union-attr]
        dense_gib = resident(model)
        dense = {batch: _speed(model, options, batch) for batch in options.batches}
        packed = [PackedProjection(linear, pack) for linear in linears]  # type: ignore[arg-type]
        for (block, name), layer in zip(places, packed, strict=True):
            block.set_submodule(name, layer)
        packed_gib = resident(model) + sum(layer.nbytes for layer in packed) / 2**30
        for batch in options.batches:
            fast, eager, graph, logits = _speed(model, options, batch)
            apart = relative(logits, dense[batch][3])
            # A projection rounds once on either side; the difference grows over the blocks.
            bound = 8 * torch.finfo(dtype).eps
            speeds = (fast, dense[batch][0], eager, dense[batch][1])
            rows.append(Speed(f"{percent:g}", batch, *speeds, packed_gib, dense_gib, graph, apart, bound))
        for (block, name), linear in zip(places, linears, strict=True):
            block.set_submodule(name, linear)
        del packed
    return rows


def show(rows: Sequence[Speed]) -> None:
    """What a person reads."""
    if rows:
        how = "a CUDA graph a token" if rows[0].graph else "no graphs"
        print(
            f"\nwhole model, tokens/s, {how}{'packed':>12}{'dense':>9}{'ratio':>8}   eager: packed, dense   GiB: packed, dense"
        )
    for row in rows:
        ratio = "refused" if row.ratio is None else f"{row.ratio:.2f}×"
        shown = f"    {row.sparsity + ' %':<8}batch {row.batch}{row.packed:>31.1f}{row.dense:>9.1f}{ratio:>8}"
        eager = f"{row.packed_eager:>15.1f}{row.dense_eager:>8.1f}{row.packed_gib:>15.2f}{row.dense_gib:>7.2f}"
        print(f"{shown}{eager}   apart {row.disagreement:.1e}, allowed {row.bound:.1e}")
