"""What a decoder block computes between its products, for one token per row: kernels (without a GPU in Triton's interpreter)
and torch code against the spec's formulas."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from oracle_tests import fused_cases
from oracle_tests.fused_cases import DEVICE
from oracle_tests.strategies import examples
from torch_impl.decode import fused_kernels, fused_operations

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BATCHES = st.integers(1, 8)
SEEDS = st.integers(0, 2**31)
SIDES = pytest.mark.parametrize("side", [fused_kernels, fused_operations], ids=["kernel", "torch"])


@SIDES
@settings(max_examples=examples(20))
@given(rows=BATCHES, columns=st.sampled_from([1, 7, 64, 200]), dtype=DTYPES, adds=st.booleans(), seed=SEEDS)
def test_add_norm(side: ModuleType, rows: int, columns: int, dtype: torch.dtype, adds: bool, seed: int) -> None:
    fused_cases.add_norm(side, rows, columns, dtype, adds, seed)


@SIDES
@settings(max_examples=examples(15))
@given(rows=BATCHES, columns=st.sampled_from([1, 7, 200, 1500]), dtype=DTYPES, seed=SEEDS)
def test_gated(side: ModuleType, rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    fused_cases.gated(side, rows, columns, dtype, seed)


@SIDES
@settings(max_examples=examples(6))
@given(
    pairs=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (8, 1)]),
    shared=st.sampled_from([1, 2, 3, 7]),
    channels=st.sampled_from([8, 32, 48, 64, 128]),
    longest=st.integers(1, 300),
    share=st.floats(0, 1),
    dtype=DTYPES,
    seed=SEEDS,
    norms=st.booleans(),
)
@example((1, 1), 1, 128, 1, 0.0, torch.float32, 0, False)
@example((1, 1), 16, 64, 300, 1.0, torch.bfloat16, 0, True)
@example((2, 3), 2, 48, 70, 0.9, torch.float32, 0, True)
@example((1, 1), 2, 32, 300, 0.32, torch.float32, 0, False)
# More tokens than the programs read at once.
@example((1, 1), 2, 32, 600, 0.97, torch.float32, 0, False)
def test_attend(
    side: ModuleType,
    pairs: tuple[int, int],
    shared: int,
    channels: int,
    longest: int,
    share: float,
    dtype: torch.dtype,
    seed: int,
    norms: bool,
) -> None:
    fused_cases.attend(side, pairs, shared, channels, longest, share, dtype, seed, norms)


def test_a_full_cache_is_not_written_beyond_its_end() -> None:
    """The kernel cannot raise an error, so it takes the last place again."""
    cos, sin = torch.ones(4, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    room = torch.full((2, 6, 8), -1.0, device=DEVICE)
    keys, values = (x[:4].view(1, 1, 4, 8) for x in room)
    layer = fused_kernels.Attention(1, cos, sin, keys, values, torch.tensor(4, device=DEVICE), 1.0)
    fused_kernels.attend(*(torch.ones(1, 8, device=DEVICE) for _ in range(3)), layer)
    assert (room[:, 3] == 1).all()
    assert (room[:, 4:] == -1).all()
