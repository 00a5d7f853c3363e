"""A decoder block whose hidden states are along other axes, or fewer, than where they are read (SliceGPT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_impl.engine.families import Family
from torch_impl.slicegpt import sliced_norm

NORMS = {
    "gated": ("input_layernorm", "post_attention_layernorm", "model.norm"),
    "opt": ("self_attn_layer_norm", "final_layer_norm", "model.decoder.final_layer_norm"),
}
"""By family: the norms of a block before attention and MLP, and the full name of the one after the last block."""


class SlicedNorm(nn.Module):
    """A norm without a gain over sliced states (..., k) of what were `width` channels."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sliced_norm(x, self.width, self.eps)


class SlicedBlock(nn.Module):
    """The modules of a block under their own names, with shortcuts: x S + attention(norm(x)), then x S' + mlp(norm(x)).

    Shortcuts are buffers, so that they are neither trained nor projections. None: the residual passes as it is.
    """

    attention_shortcut: torch.Tensor | None
    mlp_shortcut: torch.Tensor | None

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, module)
        self._names = NORMS[family.name]
        self.register_buffer("attention_shortcut", None)
        self.register_buffer("mlp_shortcut", None)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Map states (n, t, k) to (n, t, k')."""
        return self.after_mlp(self.after_attention(hidden_states, **arguments))

    def after_attention(self, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Compute the states between attention and MLP."""
        found: torch.Tensor = self.get_submodule("self_attn")(hidden_states=self.norm(0)(x), **arguments)[0]
        return _turned(x, self.attention_shortcut) + found

    def after_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the states after the MLP."""
        y = self.norm(1)(x)
        path = ("mlp",) if hasattr(self, "mlp") else ("fc1", "activation_fn", "fc2")
        for name in path:
            y = self.get_submodule(name)(y)
        return _turned(x, self.mlp_shortcut) + y

    def norm(self, half: int) -> nn.Module:
        """Return the norm before attention (0) or MLP (1)."""
        return self.get_submodule(self._names[half])

    def slice_norms(self, width: int) -> None:
        """Replace both norms by norms without gain, of sliced states."""
        for name in self._names[:2]:
            self.set_submodule(name, SlicedNorm(width, eps_of(self.get_submodule(name))))


def _turned(x: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    return x if matrix is None else x @ matrix


def eps_of(norm: nn.Module) -> float:
    """Return ε of a norm."""
    found: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(found)


def gain_and_bias(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return gain (d,) and bias (d,), if it has one, of a norm."""
    bias = getattr(norm, "bias", None)
    assert isinstance(norm.weight, torch.Tensor)
    return norm.weight.detach(), None if bias is None else bias.detach()


def subtracts_mean(norm: nn.Module) -> bool:
    """Return whether a norm subtracts the mean of a token's channels first."""
    return isinstance(norm, nn.LayerNorm)
