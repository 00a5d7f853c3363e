"""The product with a masked adapter as one custom operation for torch.compile, and its gradients (LoSA, Eq. 1).

A compiled block is one graph that contains these operations. The compiler fuses the code between them, and recomputes it in
the backward pass if that saves memory. It does not see inside the operations; otherwise it would keep the merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_impl import adapter


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    held: torch.Tensor | None,
) -> torch.Tensor:
    """Compute y (..., out) = x W̃ᵀ + b with W̃ = M⊙(W + s·BA), x (..., in); differentiable by x, A and B.

    held: W̃, if the caller keeps it across calls; W̃ depends on parameters only. Without it, W̃ is built here and again in
    the backward pass, so that it takes no memory in between.
    """
    operation = _forward if torch.compiler.is_compiling() else _Product.apply
    y: torch.Tensor = operation(x, weight, A, B, bias, scale, held)
    return y


def recomputed_masked_linear(
    x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Compute `masked_linear` in a compiled block, and recompute y in the backward pass from the W̃ that dx needs anyway."""

    def product() -> torch.Tensor:
        return masked_linear(x, weight, A, B, bias, scale, _merge(weight, A.detach(), B.detach(), scale))

    y: torch.Tensor = checkpoint(product, use_reentrant=False, preserve_rng_state=False)
    return y


def unpacking_linear(
    x: torch.Tensor,
    unpacked: Callable[[], torch.Tensor],
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Compute `masked_linear` with a weight that `unpacked` returns, here and again in the backward pass.

    In between, it takes no memory. The adapter's rank may be 0.
    """
    y: torch.Tensor = _UnpackingProduct.apply(x, A, B, bias, scale, unpacked)  # type: ignore[no-untyped-call]
    return y


@torch.library.custom_op("losa::merge", mutates_args=())
def _merge(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    return adapter.merge(weight, A, B, scale)


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    held: torch.Tensor | None,
) -> torch.Tensor:
    return nn.functional.linear(x, adapter.merge(weight, A, B, scale) if held is None else held, bias)


def _derive_x(
    grad_y: torch.Tensor,
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    held: torch.Tensor | None,
) -> torch.Tensor:
    effective = adapter.merge(weight, A, B, scale) if held is None else held
    return (grad_y.reshape(-1, weight.shape[0]) @ effective).view(*grad_y.shape[:-1], weight.shape[1])


def _derive_adapter(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    # Contract G = dyᵀx with the adapter at once, so that nothing of shape (out, in) outlives this call.
    G = grad_y.reshape(-1, weight.shape[0]).T @ x.reshape(-1, weight.shape[1])
    return adapter.contract_gradient(G, weight, A, B, scale)


_forward = torch.library.custom_op(
    "losa::masked_linear",
    _multiply,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, float scale, Tensor? held) -> Tensor",
)
_grad_x = torch.library.custom_op(
    "losa::masked_linear_grad_x",
    _derive_x,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor weight, Tensor A, Tensor B, float scale, Tensor? held) -> Tensor",
)
_grad_adapter = torch.library.custom_op(
    "losa::masked_linear_grad_adapter",
    _derive_adapter,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor x, Tensor weight, Tensor A, Tensor B, float scale) -> (Tensor, Tensor)",
)


@_merge.register_fake
def _merge_shape(weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return weight.new_empty(weight.shape)


@_forward.register_fake
def _forward_shape(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_grad_x.register_fake
def _grad_x_shape(grad_y: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1])


@_grad_adapter.register_fake
def _grad_adapter_shape(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, A, B, _, ctx.scale, held = inputs
    ctx.save_for_backward(x, weight, A, B, held)


def _differentiate(
    ctx: Any,
    grad_y: torch.Tensor,
    of_x: Callable[..., torch.Tensor],
    of_adapter: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients by all inputs; x may need none."""
    x, weight, A, B, held = ctx.saved_tensors
    grad_x = of_x(grad_y, weight, A, B, ctx.scale, held) if ctx.needs_input_grad[0] else None
    return grad_x, None, *of_adapter(grad_y, x, weight, A, B, ctx.scale), None, None, None


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _differentiate(ctx, grad_y, _grad_x, _grad_adapter)


_forward.register_autograd(_backward, setup_context=_save)


class _Product(torch.autograd.Function):
    """The same outside a compiled block, without the custom operation's 150 µs of Python per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        y = _multiply(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _differentiate(ctx, grads[0], _derive_x, _derive_adapter)


class _UnpackingProduct(torch.autograd.Function):
    """The product over a weight that is unpacked anew in each pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *others: Any) -> torch.Tensor:
        bias, ctx.scale, ctx.unpacked = others
        ctx.save_for_backward(x, A, B)
        weight = ctx.unpacked()
        return _multiply(x, weight, A, B, bias, ctx.scale, None if len(A) else weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        weight = ctx.unpacked()
        of_x = ctx.needs_input_grad[0]
        grad_x = _derive_x(grads[0], weight, A, B, ctx.scale, None if len(A) else weight) if of_x else None
        grad_A, grad_B = _derive_adapter(grads[0], x, weight, A, B, ctx.scale) if len(A) else (None, None)
        return grad_x, grad_A, grad_B, None, None, None
