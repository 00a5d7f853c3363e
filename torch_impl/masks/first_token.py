"""Let the first token of each calibration sequence count more in attention. Spec: reference/masks/first_token.py."""

from __future__ import annotations

import torch

from torch_impl import _checks


def weigh_first(inputs: torch.Tensor, weight: float) -> torch.Tensor:
    """Make the first token of each sequence (sequences, tokens, in) count `weight` times; return (sequences · tokens, in)."""
    X = _checks.tensor("inputs", inputs, "sequences", "tokens", "in").clone()
    X[:, 0] *= _checks.number("weight", weight, 0.0) ** 0.5
    return X.flatten(0, 1)
