"""Attention of one token per row over the filled part of a static cache, in one launch, in Triton.

Norms of heads if any, rotary embedding, writing key and value to the cache, attention: several programs share the cached tokens of
a sequence and key-value head, and the last one to arrive adds up what they have found. What the previous kernel does not write,
the cache and the angles, is read before it ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from torch_impl.decode.cuda import Card
from torch_impl.decode.early_launch import early

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU does not install it
    triton = None

MOST_SHARED = 16
"""Up to this many query heads may share a key-value head: the rows of a matrix unit."""
# Cached tokens that a program reads at once; programs per sequence and key-value head at most; programs per processor at most;
# warps of a program.
TOKENS, MOST_SPLITS, PER_PROCESSOR = 32, 16, 2
ATTENTION_WARPS = 4

if triton is not None:
    from torch_impl.decode.early_launch import take_turn

    @triton.jit
    def _turned(x, channel, partner, inside, cos, sin, gain, eps, CHANNELS: tl.constexpr, NORM: tl.constexpr):
        """Rotate the channels of rows of x, in the dtype of x; before that, norm each row if asked."""
        own = tl.load(x + channel, mask=inside, other=0.0)
        other = tl.load(x + partner, mask=inside, other=0.0)
        dtype = own.dtype
        own, other = own.to(tl.float32), other.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(own * own, -1, keep_dims=True) / CHANNELS + eps)
            own = (own * scale).to(dtype).to(tl.float32) * tl.load(gain + channel, mask=inside, other=0.0)
            other = (other * scale).to(dtype).to(tl.float32) * tl.load(gain + partner, mask=inside, other=0.0)
            own, other = own.to(dtype).to(tl.float32), other.to(dtype).to(tl.float32)
        return (own * cos + other * sin).to(dtype)

    @triton.jit
    def _seen(query, keys, values, there, scale, top, total, sum_, WIDE: tl.constexpr):
        """Add tokens to the sums of an online softmax: largest score, sum of the weights, weighted sum of values."""
        if WIDE:
            query, keys, values = query.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        power, rest = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
        part = tl.dot(power.to(values.dtype), values, input_precision="ieee")
        return higher, total * rest + tl.sum(power, 1), sum_ * rest[:, None] + part

    # One compilation serves every length of the cache and every batch.
    @triton.jit(do_not_specialize=["longest", "groups", "splits"])
    def _attend(
        q,
        k,
        v,
        cos,
        sin,
        q_gain,
        k_gain,
        keys,
        values,
        filled,
        out,
        sums,
        tops,
        totals,
        arrived,
        scale,
        eps,
        longest,
        q_stride,
        k_stride,
        v_stride,
        groups,
        splits,
        SHARED: tl.constexpr,
        CHANNELS: tl.constexpr,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
        HEADS: tl.constexpr,
        SPLITS: tl.constexpr,
        TOKENS: tl.constexpr,
        NORM: tl.constexpr,
        WIDE: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        pair, split = tl.program_id(0), tl.program_id(1)
        row, group = pair // groups, pair % groups
        # A full cache must not be written beyond its end.
        count = tl.minimum(tl.load(filled), longest - 1).to(tl.int32)
        # The splits share the filled part evenly, in whole tiles. Those without a tile have nothing to do, but the first has
        # the new token.
        share = tl.maximum(tl.cdiv(tl.cdiv(count, splits), TOKENS), 1) * TOKENS
        active = tl.maximum(tl.cdiv(count, share), 1)
        if split >= active:
            return
        first = split * share
        last = tl.minimum(first + share, count)

        HALF: tl.constexpr = CHANNELS // 2
        channel = tl.arange(0, WIDTH)
        inside = channel < CHANNELS
        lower = channel < HALF
        partner, angle = tl.where(lower, channel + HALF, channel - HALF), tl.where(lower, channel, channel - HALF)
        turn_cos = tl.load(cos + count * HALF + angle, mask=inside, other=0.0).to(tl.float32)
        turn_sin = tl.load(sin + count * HALF + angle, mask=inside, other=0.0).to(tl.float32)
        turn_sin = tl.where(lower, -turn_sin, turn_sin)
        start_of_cache = pair.to(tl.int64) * longest * CHANNELS
        token = first + tl.arange(0, TOKENS)
        there = (token[:, None] < last) & inside[None, :]
        place = start_of_cache + token[:, None] * CHANNELS + channel[None, :]
        key_tile = tl.load(keys + place, mask=there, other=0.0)
        value_tile = tl.load(values + place, mask=there, other=0.0)
        # Earlier tokens have written all that so far; the kernel before this one writes q, k and v.
        take_turn(EARLY)
        head = tl.arange(0, ROWS)
        fits = (head[:, None] < SHARED) & inside[None, :]
        queries = q + row * q_stride + (group * SHARED + head[:, None]) * CHANNELS
        columns, partners = channel[None, :], partner[None, :]
        all_cos, all_sin = turn_cos[None, :], turn_sin[None, :]
        query = _turned(queries, columns, partners, fits, all_cos, all_sin, q_gain, eps, CHANNELS, NORM)

        # Online softmax. The first split begins with the new token, so that no program reads what another one writes.
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sum_ = tl.zeros((ROWS, WIDTH), tl.float32)
        if split == 0:
            own = k + row * k_stride + group * CHANNELS
            key = _turned(own, channel, partner, inside, turn_cos, turn_sin, k_gain, eps, CHANNELS, NORM)
            value = tl.load(v + row * v_stride + group * CHANNELS + channel, mask=inside, other=0.0)
            tl.store(keys + start_of_cache + count * CHANNELS + channel, key, mask=inside)
            tl.store(values + start_of_cache + count * CHANNELS + channel, value, mask=inside)
            top = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
            total += 1.0
            sum_ += value.to(tl.float32)[None, :]
        top, total, sum_ = _seen(query, key_tile, value_tile, token < last, scale, top, total, sum_, WIDE)
        for start in range(first + TOKENS, last, TOKENS):
            token = start + tl.arange(0, TOKENS)
            there = (token[:, None] < last) & inside[None, :]
            place = start_of_cache + token[:, None] * CHANNELS + channel[None, :]
            key_tile = tl.load(keys + place, mask=there, other=0.0)
            value_tile = tl.load(values + place, mask=there, other=0.0)
            top, total, sum_ = _seen(query, key_tile, value_tile, token < last, scale, top, total, sum_, WIDE)

        if active == 1:
            own_place = ((row * groups + group) * SHARED + head[:, None]) * CHANNELS + channel[None, :]
            tl.store(out + own_place, (sum_ / total[:, None]).to(out.dtype.element_ty), mask=fits)
            return
        place = (pair * splits + split) * SHARED + head
        tl.store(tops + place, top, mask=head < SHARED)
        tl.store(totals + place, total, mask=head < SHARED)
        tl.store(sums + place[:, None] * CHANNELS + channel[None, :], sum_, mask=fits)
        # The last program to arrive adds up what all of them have stored.
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == active - 1:
            tl.store(arrived + pair, 0)
            each, mate = tl.arange(0, SPLITS)[:, None], tl.arange(0, HEADS)
            stored = (pair * splits + each) * SHARED + mate[None, :]
            written = (each < active) & (mate[None, :] < SHARED)
            all_tops = tl.load(tops + stored, mask=written, other=float("-inf"))
            highest = tl.where(mate < SHARED, tl.max(all_tops, 0), 0.0)
            weight = tl.exp(all_tops - highest[None, :])
            whole = tl.sum(weight * tl.load(totals + stored, mask=written, other=1.0), 0)
            wanted = written[:, :, None] & inside[None, None, :]
            all_sums = tl.load(sums + stored[:, :, None] * CHANNELS + channel[None, None, :], mask=wanted, other=0.0)
            result = tl.sum(weight[:, :, None] * all_sums, 0) / tl.where(mate < SHARED, whole, 1.0)[:, None]
            target = out + ((row * groups + group) * SHARED + mate[:, None]) * CHANNELS + channel[None, :]
            kept = (mate[:, None] < SHARED) & inside[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=kept)


@dataclass(frozen=True)
class Attention:
    """The attention of one layer over its static cache.

    heads: h, of queries; cos, sin (longest, e / 2): of the rotary embedding by position; keys, values (b, g, longest, e),
    contiguous; filled: the number of cached tokens, int64, on the device; scale: of the scores; gains (e,), eps: of the norms of
    each head's query and key before rotary embedding, if there are any.
    """

    heads: int
    cos: torch.Tensor
    sin: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    filled: torch.Tensor
    scale: float
    gains: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    eps: float = 0.0

    @functools.cached_property
    def splits(self) -> int:
        """Return how many programs share the cached tokens of a sequence and key-value head."""
        batch, groups, longest, _ = self.keys.shape
        programs = PER_PROCESSOR * Card.of(self.keys.device).processors
        return max(1, min(MOST_SPLITS, -(-longest // TOKENS), programs // (batch * groups)))

    @functools.cached_property
    def scratch(self) -> tuple[torch.Tensor, ...]:
        """Allocate what programs leave for the last one of a head: sums, largest scores, totals; and how many are done.

        That number is 0 between calls.
        """
        batch, groups, _, channels = self.keys.shape
        stored, device = batch * self.heads * self.splits, self.keys.device
        sums, tops, totals = (torch.empty(stored * size, device=device) for size in (channels, 1, 1))
        return sums, tops, totals, torch.zeros(batch * groups, dtype=torch.int32, device=device)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Attention) -> torch.Tensor:
    """Write the token's key and value to the cache, and attend to all tokens up to it: (b, h·e).

    q (b, h·e), k, v (b, g·e): before rotary embedding; rows may be apart. The caller counts the token afterwards.
    """
    batch, groups, longest, channels = layer.keys.shape
    shared = layer.heads // groups
    out = q.new_empty(batch, layer.heads * channels)
    _attend[(batch * groups, layer.splits)](
        q,
        k,
        v,
        layer.cos,
        layer.sin,
        *layer.gains,
        layer.keys,
        layer.values,
        layer.filled,
        out,
        *layer.scratch,
        layer.scale,
        layer.eps,
        longest,
        *(x.stride(0) for x in (q, k, v)),
        groups,
        layer.splits,
        SHARED=shared,
        CHANNELS=channels,
        ROWS=MOST_SHARED,
        WIDTH=max(16, triton.next_power_of_2(channels)),
        HEADS=triton.next_power_of_2(shared),
        SPLITS=MOST_SPLITS,
        TOKENS=TOKENS,
        NORM=layer.gains[0] is not None,
        # The interpreter cannot multiply bf16.
        WIDE=q.dtype == torch.float32 or triton.knobs.runtime.interpret,
        num_warps=ATTENTION_WARPS,
        num_stages=3,
        **early(q),
    )
    return out
