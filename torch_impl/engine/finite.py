"""Detect NaN and infinity: report the first module that produces them, its dtype, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from torch_impl.engine import distributed

ADVICE = {
    torch.float16: "float16 ends at 65,504: use dtype bfloat16 or float32",
    torch.bfloat16: "the weights may be corrupt: download the model again, or try dtype float32",
}
OTHERWISE = "the weights may be corrupt: download the model again"


class NotFiniteError(FloatingPointError):
    """The output of a part of a model holds NaN or infinity."""

    def __init__(self, where: str, dtype: torch.dtype, name: str = "") -> None:
        """Build the message. where: "output of ..." or "input of ..."; name: of the model, if there are several."""
        prefix, named = f"{name}: " if name else "", str(dtype).removeprefix("torch.")
        super().__init__(f"{prefix}the {where} holds NaN or infinity in {named}; {ADVICE.get(dtype, OTHERWISE)}")


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum the values in float32 at least: the sum is not finite if a value is not finite. One pass."""
    return values.detach().sum(dtype=torch.promote_types(values.dtype, torch.float32))


def check(found: torch.Tensor | float, where: str, dtype: torch.dtype) -> None:
    """Check a result of `total`. Errors: NotFiniteError in all processes if it is not finite in one of them."""
    if not math.isfinite(distributed.all_reduce_number(float(found))):
        raise NotFiniteError(where, dtype)


@torch.no_grad()
def locate(model: nn.Module, ids: torch.Tensor, model_name: str = "") -> NotFiniteError:
    """Find the first module with non-finite output by running token ids (n, t) again; return the error to raise."""
    first: list[str] = []

    def watch(name: str) -> Any:
        def check_output(module: nn.Module, inputs: Any, output: Any) -> None:
            if not first and not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                first.append(name)

        return check_output

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return NotFiniteError(f"output of {first[0]}" if first else "output of the model", dtype, model_name)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, Iterable) and not isinstance(output, str):
        for part in output:
            yield from _tensors(part)
