"""What a decoder block computes between its products, for one token per row: kernels (in Triton's interpreter) and torch
code against the spec's formulas."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close, assert_exact
from oracle_tests.strategies import examples
from reference import llama as spec
from torch_impl.decode import fused_kernels, fused_operations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BATCHES = st.integers(1, 8)
SEEDS = st.integers(0, 2**31)
SIDES = pytest.mark.parametrize("side", [fused_kernels, fused_operations], ids=["kernel", "torch"])


def wide(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.double().cpu().numpy() for tensor in tensors]


def part(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a joined product leaves them: apart, from some column on."""
    return torch.randn(rows, columns + 5, generator=generator).to(DEVICE, dtype)[:, 3:-2]


@SIDES
@settings(max_examples=examples(20))
@given(rows=BATCHES, columns=st.sampled_from([1, 7, 64, 200]), dtype=DTYPES, adds=st.booleans(), seed=SEEDS)
def test_add_norm(side: ModuleType, rows: int, columns: int, dtype: torch.dtype, adds: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (
        part(generator, rows, columns, dtype),
        torch.randn(rows, columns, generator=generator).to(DEVICE, dtype),
    )
    gain = torch.randn(columns, generator=generator).to(DEVICE, dtype)
    normed, total = side.add_norm(x, residual if adds else None, gain, 1e-5)
    X, Y, g, found = wide(x, residual, gain, total)
    bound = tolerances.bound(dtype)
    if adds:
        assert_close("sum", X + Y, total.cpu(), bound, scale=abs(X) + abs(Y))
    else:
        assert_exact("sum", X, found)
    expected = spec.rms_norm(found, g, 1e-5)
    assert normed.dtype == total.dtype == dtype
    assert_close("norm", expected, normed.cpu(), bound, scale=abs(expected) + tolerances.UNIT[dtype])


@SIDES
@settings(max_examples=examples(15))
@given(rows=BATCHES, columns=st.sampled_from([1, 7, 200, 1500]), dtype=DTYPES, seed=SEEDS)
def test_gated(side: ModuleType, rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (4 * part(generator, rows, columns, dtype) for _ in range(2))
    G, U = wide(gate, up)
    expected = spec.silu(G) * U
    found = side.gated(gate, up)
    assert found.dtype == dtype
    # Numbers too small for fp16 are rounded absolutely.
    scale = abs(expected) + torch.finfo(dtype).smallest_normal * (1 + abs(U))
    assert_close("gated", expected, found.cpu(), tolerances.bound(dtype), scale=scale)


def attention_of_the_spec(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(result (h, e), bound factors): one query of each head over keys and values (g, tokens, e) that heads share."""
    heads, channels = q.shape
    keys, values = (np.repeat(x, heads // len(x), axis=0) for x in (keys, values))
    weight = spec.softmax(np.einsum("he,hte->ht", q, keys) / np.sqrt(channels))
    terms = (np.einsum("he,hte->ht", abs(q), abs(keys)) / np.sqrt(channels)).max(-1, keepdims=True)
    return np.einsum("ht,hte->he", weight, values), np.einsum("ht,hte->he", weight, abs(values)) * (1 + terms)


@SIDES
@settings(max_examples=examples(12))
@given(
    pairs=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (8, 1)]),
    shared=st.sampled_from([1, 2, 3, 7]),
    channels=st.sampled_from([8, 32, 48, 64, 128]),
    longest=st.integers(1, 300),
    share=st.floats(0, 1),
    dtype=DTYPES,
    seed=SEEDS,
)
@example((1, 1), 1, 128, 1, 0.0, torch.float32, 0)
@example((1, 1), 16, 64, 300, 1.0, torch.bfloat16, 0)
@example((1, 1), 2, 32, 300, 0.32, torch.float32, 0)
def test_attend(
    side: ModuleType,
    pairs: tuple[int, int],
    shared: int,
    channels: int,
    longest: int,
    share: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Twice in turn: the second token sees the first, and what programs leave for each other is reset."""
    (batch, groups), generator = pairs, torch.Generator().manual_seed(seed)
    filled = min(longest - 1, round(share * longest))
    angles = spec.rotary_angles(longest, channels, 100.0)
    cos, sin = (torch.from_numpy(x).to(DEVICE, dtype) for x in (np.cos(angles), np.sin(angles)))
    keys, values = (torch.randn(batch, groups, longest, channels, generator=generator) for _ in range(2))
    for cache in (keys, values):
        # No program may let a token count that is not there yet.
        cache[:, :, filled:] = 1e3
    keys, values = keys.to(DEVICE, dtype), values.to(DEVICE, dtype)
    count = torch.tensor(filled, device=DEVICE)
    layer = fused_kernels.Attention(groups * shared, cos, sin, keys, values, count, channels**-0.5)
    for place in range(filled, min(filled + 2, longest)):
        q, k, v = (part(generator, batch, heads * channels, dtype) for heads in (groups * shared, groups, groups))
        before = keys.clone(), values.clone()
        found = side.attend(q, k, v, layer)
        turned = [
            spec.rotate(x.reshape(batch, -1, 1, channels), angles[place : place + 1])[:, :, 0] for x in wide(q, k)
        ]
        new = turned[1], wide(v)[0].reshape(batch, groups, channels)
        for name, cache, old, expected in zip(("keys", "values"), (keys, values), before, new, strict=True):
            others = torch.arange(longest) != place
            assert_exact(name, old[:, :, others].float().cpu(), cache[:, :, others].float().cpu())
            scale = abs(wide(k)[0]).max() if name == "keys" else 1e-300
            bound = 2 * tolerances.bound(dtype) if name == "keys" else 0
            assert_close(name, expected, cache[:, :, place].cpu(), bound, scale=scale)
        for row in range(batch):
            seen = [x[row, :, : place + 1] for x in wide(keys, values)]
            expected, terms = attention_of_the_spec(turned[0][row], *seen)
            assert_close(
                "attend", expected, found[row].cpu().view(expected.shape), 2 * tolerances.bound(dtype), scale=terms
            )
        count += 1
