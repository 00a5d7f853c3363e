"""Rounding to a few bits in production: every dtype against the spec, and SparseGPT's rounding in lower precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from oracle_tests.assertions import assert_exact
from oracle_tests.ops import to_torch
from reference import quantise as spec
from reference.bits import allocate_bits_by_harm as spec_by_harm
from reference.masks import sparsegpt as spec_sparsegpt
from torch_impl import quantise
from torch_impl.bits import allocate_bits_by_harm
from torch_impl.masks import sparsegpt

LOW = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(values=strategies.matrices(rows=1).map(np.ravel), bits=strategies.BITS, group=st.integers(1, 13))
def test_codes_and_scales_are_exactly_the_spec_s_in_every_dtype(
    dtype: torch.dtype, values: np.ndarray, bits: int, group: int
) -> None:
    rounded = to_torch(values, dtype)
    codes, scales = quantise.quantise(rounded, bits, group)
    expected_codes, expected_scales = spec.quantise(rounded.double().numpy(), bits, group)
    assert_exact("codes", expected_codes, codes)
    assert_exact("scales", expected_scales, scales)
    assert_exact(
        "values", spec.dequantise(expected_codes, expected_scales, group), quantise.dequantise(codes, scales, group)
    )


def test_a_scale_between_two_float16_is_rounded_once_and_up() -> None:
    """Through float32, 7 · (1 + 2⁻³⁰) / 7 would be 1, and a value would be cut off."""
    for size, scale in ((7.0, 1.0), (7 * (1 + 2.0**-30), 1 + 2.0**-10), (7 * 2.0**-30, 2.0**-24), (0.0, 0.0)):
        for found in (
            quantise.group_scales(torch.tensor([[-size, 0.0]], dtype=torch.float64), 4),
            spec.group_scales([[-size, 0.0]], 4),
        ):
            assert found.tolist() == [scale]


def case(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    X = X @ (torch.eye(40, dtype=torch.float64) + 0.3 * torch.randn(40, 40, generator=generator, dtype=torch.float64))
    return torch.randn(24, 40, generator=generator).to(dtype), sparsegpt.hessian(X, 8)


def loss(new: torch.Tensor, weight: torch.Tensor, H: torch.Tensor) -> float:
    change = new.double() - weight.double()
    return float((change @ H * change).sum())


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sparsegpt_rounds_as_well_in_lower_precision(dtype: torch.dtype, sparsity: float) -> None:
    """Codes near ties flip, and the columns after them compensate. So what is compared is what it costs."""
    weight, H = case(0, dtype)
    new, mask = sparsegpt.sparsegpt(weight, H.float(), sparsity, 16, bits=4, group=8)
    spec_new, spec_mask = spec_sparsegpt.sparsegpt(weight.double().numpy(), H.numpy(), sparsity, 16, bits=4, group=8)
    assert new.dtype == dtype
    assert int(mask.sum()) == spec_mask.sum()
    assert not new[~mask].any()
    assert loss(new, weight, H) == pytest.approx(loss(torch.from_numpy(spec_new), weight, H), rel=0.05)
    for row in new.view(24, 5, 8).flatten(0, 1):
        # At most 15 values, of which the negatives are the same sizes.
        assert len(row.double().abs().unique()) <= 8
    if dtype == torch.float32:
        error = (new.double() - torch.from_numpy(spec_new)).abs()
        assert float((error > 1e-4).double().mean()) < 0.02, "nearly all codes are the spec's"


def test_without_bits_group_means_nothing_and_the_arguments_stay() -> None:
    weight, H = case(1)
    before = weight.clone(), H.clone()
    plain = sparsegpt.sparsegpt(weight, H, 0.5, 16)
    other = sparsegpt.sparsegpt(weight, H, 0.5, 16, group=7)
    sparsegpt.sparsegpt(weight, H, 0.5, 16, bits=3, group=4)
    assert all(torch.equal(a, b) for a, b in zip((*plain, weight, H), (*other, *before), strict=True))
    for function, w, h in (
        (sparsegpt.sparsegpt, weight, H),
        (spec_sparsegpt.sparsegpt, weight.numpy(), H.numpy()),
    ):
        with pytest.raises(ValueError, match="group is 7; allowed: a divisor of block_size 16"):
            function(w, h, 0.5, 16, bits=4, group=7)
        with pytest.raises(ValueError, match="bits is 9; allowed: 2 to 8"):
            function(w, h, 0.5, 16, bits=9, group=4)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sparsegpt_has_the_spec_s_values_to_the_last_bit(bits: int, sparsity: float) -> None:
    """In float64 the codes and the scales are equal, also where large weights are already pruned."""
    weight, H = case(2, torch.float64)
    kept = weight.abs() < 1.5
    new, _ = sparsegpt.sparsegpt(weight, H, sparsity, 16, kept=kept, bits=bits, group=8)
    expected, _ = spec_sparsegpt.sparsegpt(
        weight.numpy(), H.numpy(), sparsity, 16, kept=kept.numpy(), bits=bits, group=8
    )
    assert_exact("weight", expected, new)


def test_values_just_beside_a_tie_are_not_rounded_before() -> None:
    values = torch.tensor([[0.5 + 2.0**-40, 0.5, 0.5 - 2.0**-40]], dtype=torch.float64)
    assert quantise.nearest_codes(values, torch.ones(1), 4).tolist() == [[1, 0, 0]]


def test_of_equal_harms_the_last_projection_gets_fewer_bits() -> None:
    harm = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for bits in (
        spec_by_harm(harm.numpy(), [2, 2, 2], 3.4, (3, 4)),
        allocate_bits_by_harm(harm, [2, 2, 2], 3.4, (3, 4)),
    ):
        assert bits.tolist() == [4, 3, 3]
