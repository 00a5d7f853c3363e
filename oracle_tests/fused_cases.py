"""What a decoder block computes between its products against the spec's formulas: cases for tests and for GPUs.

Each takes the functions of `fused_kernels` or of `fused_operations` and raises AssertionError where they differ.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close, assert_exact
from reference import layers
from torch_impl.decode.fused_kernels import Attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wide(*tensors: torch.Tensor) -> list[np.ndarray]:
    """Convert tensors to float64 arrays."""
    return [tensor.double().cpu().numpy() for tensor in tensors]


def part(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a joined product leaves them: apart, from some column on."""
    return torch.randn(rows, columns + 5, generator=generator).to(DEVICE, dtype)[:, 3:-2]


def add_norm(side: ModuleType | Any, rows: int, columns: int, dtype: torch.dtype, adds: bool, seed: int) -> None:
    """The sum within its roundings, and the norm of that sum."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = part(generator, rows, columns, dtype), part(generator, rows, columns, dtype).contiguous()
    gain = torch.randn(columns, generator=generator).to(DEVICE, dtype)
    normed, total = side.add_norm(x, residual if adds else None, gain, 1e-5)
    X, Y, g, found = wide(x, residual, gain, total)
    bound = tolerances.bound(dtype)
    if adds:
        assert_close("sum", X + Y, total.cpu(), bound, scale=abs(X) + abs(Y))
    else:
        assert_exact("sum", X, found)
    expected = layers.rms_norm(found, g, 1e-5)
    assert normed.dtype == total.dtype == dtype
    assert_close("norm", expected, normed.cpu(), bound, scale=abs(expected) + tolerances.UNIT[dtype])


def gated(side: ModuleType | Any, rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    """SiLU of the gate times up."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (part(generator, rows, columns, dtype).mul_(4) for _ in range(2))
    G, U = wide(gate, up)
    expected = layers.silu(G) * U
    found = side.gated(gate, up)
    assert found.dtype == dtype
    # Numbers too small for fp16 are rounded absolutely.
    scale = abs(expected) + torch.finfo(dtype).smallest_normal * (1 + abs(U))
    assert_close("gated", expected, found.cpu(), tolerances.bound(dtype), scale=scale)


def attend(
    side: ModuleType | Any,
    pairs: tuple[int, int],
    shared: int,
    channels: int,
    longest: int,
    share: float,
    dtype: torch.dtype,
    seed: int,
    norms: bool = False,
) -> None:
    """Two tokens in turn, from a share of the cache on: the second sees the first, and what programs leave for each other is
    reset. pairs: batch and key-value heads."""
    (batch, groups), generator = pairs, torch.Generator().manual_seed(seed)
    filled = min(longest - 1, round(share * longest))
    angles = layers.rotary_angles(longest, channels, 100.0)
    cos, sin = (torch.from_numpy(x).to(DEVICE, dtype) for x in (np.cos(angles), np.sin(angles)))
    keys, values = (torch.randn(batch, groups, longest, channels, generator=generator) for _ in range(2))
    for cache in (keys, values):
        # No program may let a token count that is not there yet.
        cache[:, :, filled:] = 1e3
    keys, values = keys.to(DEVICE, dtype), values.to(DEVICE, dtype)
    count = torch.tensor(filled, device=DEVICE)
    gains = [torch.randn(channels, generator=generator).to(DEVICE, dtype) for _ in range(2 * norms)]
    both = (gains[0], gains[1]) if norms else (None, None)
    layer = Attention(groups * shared, cos, sin, keys, values, count, channels**-0.5, both, 1e-5)
    # Queries, keys and the cosines are rounded, on a GPU the weights of the tokens too; the interpreter truncates.
    bound = 2 * tolerances.bound(dtype)
    for place in range(filled, min(filled + 2, longest)):
        q, k, v = (part(generator, batch, number * channels, dtype) for number in (groups * shared, groups, groups))
        before = keys.clone(), values.clone()
        found = side.attend(q, k, v, layer)
        heads = [x.reshape(batch, -1, 1, channels) for x in wide(q, k)]
        if norms:
            heads = [layers.rms_norm(x, gain, 1e-5) for x, gain in zip(heads, wide(*gains), strict=True)]
        turned = [layers.rotate(x, angles[place : place + 1])[:, :, 0] for x in heads]
        others = torch.arange(longest) != place
        for old, cache in zip(before, (keys, values), strict=True):
            assert_exact("cache", *(x[:, :, others].float().cpu() for x in (old, cache)))
        assert_close("key", turned[1], keys[:, :, place].cpu(), bound, scale=abs(heads[1]).max())
        assert_exact("value", v.reshape(batch, groups, channels).cpu(), values[:, :, place].cpu())
        for row in range(batch):
            expected, terms = _attention(turned[0][row], *(x[row, :, : place + 1] for x in wide(keys, values)))
            assert_close("attention", expected, found[row].cpu().view(expected.shape), bound, scale=terms)
        count += 1


def _attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One query of each head over keys and values (g, tokens, e) that heads share: (result, what roundings are relative to)."""
    heads, channels = q.shape
    keys, values = (np.repeat(x, heads // len(x), axis=0) for x in (keys, values))
    weight = layers.softmax(np.einsum("he,hte->ht", q, keys) / np.sqrt(channels))
    # An error of a score is one of its weight's logarithm.
    terms = (np.einsum("he,hte->ht", abs(q), abs(keys)) / np.sqrt(channels)).max(-1, keepdims=True)
    return np.einsum("ht,hte->he", weight, values), np.einsum("ht,hte->he", weight, abs(values)) * (1 + terms)
