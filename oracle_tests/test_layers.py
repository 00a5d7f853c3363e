"""The adapter layer: explicit gradients, holding, resizing, merging."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_impl.engine import masked_linear as operation
from torch_impl.engine.adapted_linear import AdaptedLinear


def masked_linear(out: int, inputs: int, bias: bool, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """A linear half of whose weights are zero."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        weight = torch.randn(out, inputs, generator=generator, dtype=dtype)
        linear.weight.copy_(weight * (torch.rand(out, inputs, generator=generator) < 0.5))
        if bias:
            linear.bias.copy_(torch.randn(out, generator=generator, dtype=dtype))
    return linear


def adapted(out: int = 6, inputs: int = 10, rank: int = 3, bias: bool = True) -> AdaptedLinear:
    """An adapted layer whose B is not zero."""
    layer = AdaptedLinear(masked_linear(out, inputs, bias), scale=2.0)
    layer.resize(rank, (0,))
    with torch.no_grad():
        layer.B.normal_(generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
def test_gradients_equal_autograd_of_the_plain_formula(held: bool, bias: bool, shape: tuple[int, ...]) -> None:
    layer = adapted(bias=bias)
    x = torch.randn(*shape, 10, dtype=torch.float64, requires_grad=True)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    mask = layer.weight != 0
    plain_x = x.detach().clone().requires_grad_()
    plain = nn.functional.linear(plain_x, (layer.weight + 2.0 * (B @ A)) * mask, layer.bias)
    if held:
        layer.hold()
    output = layer(x)
    weights = torch.randn_like(plain)
    (plain * weights).sum().backward()
    (output * weights).sum().backward()
    torch.testing.assert_close(output, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in ((x.grad, plain_x.grad), (layer.A.grad, A.grad), (layer.B.grad, B.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    layer = adapted(out=3, inputs=4, rank=2)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return operation.masked_linear(x, layer.weight, A, B, layer.bias, layer.scale, None)

    assert torch.autograd.gradcheck(function, (x, layer.A, layer.B))


def test_holding_does_not_outlive_a_change_of_rank_or_base() -> None:
    layer = adapted()
    x = torch.randn(4, 10, dtype=torch.float64)
    layer.hold()
    layer.resize(1, (0,))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merged(), layer.bias))
    layer.hold()
    layer.set_base(layer.weight * 2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.merged(), layer.bias))


def test_growing_and_folding_leave_the_function_alone() -> None:
    layer = adapted(rank=3)
    before = layer.merged()
    layer.resize(5, (1,))
    assert layer.rank == 5
    torch.testing.assert_close(layer.merged(), before, rtol=0, atol=0)
    layer.resize(1, (2,), fold=True)
    assert layer.rank == 1
    torch.testing.assert_close(layer.merged(), before, rtol=1e-12, atol=1e-12)


def test_new_rows_are_the_spec_s_and_new_columns_zero() -> None:
    from reference.adapter import initial_rows

    layer = adapted(rank=2)
    old = layer.A.detach().clone()
    layer.resize(4, (7, 8))
    torch.testing.assert_close(layer.A[:2], old, rtol=0, atol=0)
    torch.testing.assert_close(layer.A[2:].detach(), torch.from_numpy(initial_rows(2, 10, (7, 8))), rtol=0, atol=0)
    assert not layer.B[:, 2:].any()


def test_bfloat16_weights_have_float32_adapters() -> None:
    layer = AdaptedLinear(masked_linear(6, 10, True, dtype=torch.bfloat16), scale=2.0)
    layer.resize(2, (0,))
    assert layer.A.dtype == layer.B.dtype == torch.float32
    layer(torch.randn(3, 10, dtype=torch.bfloat16)).sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32
    assert layer.weight.grad is None
