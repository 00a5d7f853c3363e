"""The CPU part of `bench decode --whole_model`: what a token and a prompt take, dense and packed, and where the time goes.

All sides are one model whose projections are exchanged: the rest, Hugging Face's code, is the same. They take turns, a token or
a prompt each, and the fastest of each counts, as for single products (decode_cpu.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import packed
from torch_impl.bench import int4
from torch_impl.bench.measure import relative, resident
from torch_impl.bench.whole import Beside, Decoding, places
from torch_impl.decode.coded_linear import CodedLinear
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.experiment.planning import geometry
from torch_impl.quantise import dequantise_rows, quantise_rows


@dataclass
class Times:
    """Milliseconds of one sparsity and batch: of a token of each sequence, and of a prompt of `prompt` tokens each."""

    sparsity: str
    batch: int
    packed: float
    dense: float
    int4: float | None
    """With dense weights of 4 bits by torch's kernel; None if it has none for these shapes."""
    unmerged: float | None
    """Packed, with low-rank adapters beside the projections; None if not measured."""
    rest: float
    """Everything but the projections of the blocks: attention, norms, the output layer and Python."""
    prompt: int
    packed_prompt: float
    dense_prompt: float
    packed_gib: float
    """Memory of the weights."""
    dense_gib: float
    disagreement: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Return whether the logits are equal within the bound."""
        return self.disagreement <= self.bound

    @property
    def ratio(self) -> float | None:
        """Return how many times as many tokens per second the packed model takes; None if the sides disagree."""
        return self.dense / self.packed if self.agrees else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


class _Int4(nn.Module):
    """A projection with a dense weight of 4 bits, by torch's kernel."""

    def __init__(self, tiles: torch.Tensor, both: torch.Tensor, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.tiles, self.both = tiles, both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = int4.product(self.tiles, self.both, x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


class _Nothing(nn.Module):
    """A projection that costs nothing: its output is 0."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def pack(linear: nn.Linear, values: str) -> PackedLinear:
    """Pack a linear layer without a bias; values: same, int8 or int4, with the weight rounded to the nearest."""
    if values == "same":
        return PackedLinear.of(linear)
    codes, scales = quantise_rows(linear.weight.detach(), int(values.removeprefix("int")))
    bitmap, stream, offsets = packed.pack_codes(codes, int(values.removeprefix("int")))
    linear.weight.data.copy_(dequantise_rows(codes, scales))
    return CodedLinear((bitmap, stream, scales, offsets), linear.in_features, linear.weight.dtype)


class _Sides:
    """The projections of a model, in several forms, one of which is in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.places = model, places(model)
        self.linears: list[Any] = [block.get_submodule(name) for block, name in self.places]

    def install(self, modules: Sequence[nn.Module]) -> None:
        for (block, name), module in zip(self.places, modules, strict=True):
            block.set_submodule(name, module)

    def forms(self, options: argparse.Namespace) -> Iterator[tuple[str, Sequence[nn.Module]]]:
        """Yield the name and modules of each side. Rounded values replace those of the dense side."""
        packs = [pack(linear, options.values) for linear in self.linears]
        yield "packed", packs
        yield "dense", self.linears
        yield "rest", [_Nothing(linear) for linear in self.linears]
        tiles = [int4.pack(linear.weight.detach()) for linear in self.linears]
        if all(found is not None for found in tiles):
            yield "int4", [_Int4(*found, linear) for found, linear in zip(tiles, self.linears, strict=True)]  # type: ignore[misc, call-arg]
        if options.adapters:
            yield "unmerged", [Beside(layer, options.adapters, self.linears[0].weight) for layer in packs]


def fastest(sides: dict[str, Callable[[], Any]], begin: Callable[[str], None], turns: int) -> dict[str, float]:
    """Return the milliseconds of each side's fastest call; the sides take turns. begin(name): what comes before, untimed."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(-1, turns):
        for name, action in sides.items():
            begin(name)
            start = time.perf_counter()
            action()
            if turn >= 0:
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


@torch.no_grad()
def _times(sides: _Sides, forms: dict[str, Sequence[nn.Module]], options: argparse.Namespace, batch: int) -> Times:
    model = sides.model

    def begin(name: str) -> None:
        sides.install(forms[name])

    decoding = {name: Decoding(model, batch, graph=False) for name in forms}
    logits = {}
    for name in forms:
        begin(name)
        logits[name] = decoding[name].given_logits()
    token = fastest({name: each.step for name, each in decoding.items()}, begin, options.tokens)
    ids = torch.randint(model.config.vocab_size, (batch, options.prompt))
    both = {name: lambda: model(ids, use_cache=False, logits_to_keep=1) for name in ("packed", "dense")}
    prompt = fastest(both, begin, max(2, options.repeats // 3))
    gib = {}
    for name in ("packed", "dense"):
        begin(name)
        gib[name] = resident(model)
    apart = max(relative(logits[name], logits["dense"]) for name in ("packed", "unmerged") if name in forms)
    speeds = (token["packed"], token["dense"], token.get("int4"), token.get("unmerged"), token["rest"])
    prompts = (options.prompt, prompt["packed"], prompt["dense"])
    bound = 8 * torch.finfo(model.dtype).eps
    return Times("", batch, *speeds, *prompts, gib["packed"], gib["dense"], apart, bound)


def measure(options: argparse.Namespace) -> list[Times]:
    """Measure all percentages in `options.sparsities` and all batches, with one model that is made sparser and sparser."""
    model = geometry.build(options.whole_model, options.blocks, torch.device("cpu"), getattr(torch, options.dtype))
    sides, rows, before = _Sides(model), [], 0.0
    for percent in sorted(float(s) for s in options.sparsities if ":" not in s):
        stay = (1 - percent / 100) / (1 - before) if before < 1 else 1.0
        before = percent / 100
        for linear in sides.linears:
            linear.weight.data.masked_fill_(torch.rand_like(linear.weight, dtype=torch.float32) >= stay, 0)
        forms = dict(sides.forms(options))
        for batch in options.batches:
            row = _times(sides, forms, options, batch)
            row.sparsity = f"{percent:g}"
            rows.append(row)
        sides.install(sides.linears)
    return rows


def show(rows: Sequence[Times]) -> None:
    """Print the rows."""
    if not rows:
        return
    print(
        f"\nwhole model, ms a token{'packed':>9}{'dense':>9}{'ratio':>8}{'int4':>9}{'all but projections':>21}"
        f"   ms a prompt of {rows[0].prompt}: packed, dense   GiB: packed, dense"
    )
    for row in rows:
        ratio = "refused" if row.ratio is None else f"{row.ratio:.2f}×"
        four_bits = "" if row.int4 is None else f"{row.int4:.1f}"
        shown = (
            f"    {row.sparsity + ' %':<8}batch {row.batch}{row.packed:>13.1f}{row.dense:>9.1f}{ratio:>8}{four_bits:>9}"
        )
        shown += f"{row.rest:>21.1f}{row.packed_prompt:>28.0f}{row.dense_prompt:>7.0f}{row.packed_gib:>15.2f}{row.dense_gib:>7.2f}"
        if row.unmerged is not None:
            shown += f"   adapters beside {row.unmerged:.1f} ms ({row.dense / row.unmerged:.2f}×)"
        print(f"{shown}   apart {row.disagreement:.1e}, allowed {row.bound:.1e}")
