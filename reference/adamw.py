"""The optimizer of a LoSA step: AdamW, clipping by global norm, and a learning rate with warm-up and linear decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reference import _checks
from reference._checks import Array

BETAS = (0.9, 0.999)
"""Decay rates of the first and second moment."""
EPS = 1e-8
"""Added to the square root of the second moment."""


@dataclass(frozen=True)
class Moments:
    """The state of AdamW: steps done, and each parameter's running means of its gradient and squared gradient."""

    steps: int
    first: tuple[Array, ...]
    second: tuple[Array, ...]


def start(parameters: Sequence[Array]) -> Moments:
    """Return the state before the first step: zeros.

    Source: Kingma & Ba 2015, Algorithm 1. parameters: arrays of any shapes.
    Returns: moments of the same shapes. *Deviation*: none.

    >>> start([np.array([5.0])])
    Moments(steps=0, first=(array([0.]),), second=(array([0.]),))
    """
    return Moments(0, tuple(np.zeros_like(p) for p in parameters), tuple(np.zeros_like(p) for p in parameters))


def adamw(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    moments: Moments,
    learning_rate: float,
    weight_decay: float,
) -> tuple[list[Array], Moments]:
    """Take one step of AdamW: m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← (1-ηλ)p - η · m̂ / (√v̂ + ε).

    Source: Loshchilov & Hutter 2019, Algorithm 2; m̂ = m / (1-β₁ᵏ), v̂ = v / (1-β₂ᵏ) at step k = 1, 2, ...
    parameters, gradients: arrays of matching shapes. learning_rate: η. weight_decay: λ.
    Returns: (new parameters, new moments); the arguments are not changed.
    *Deviation*: the decay is η·λ, as in torch.optim.AdamW; the paper multiplies λ by the schedule's factor alone.

    >>> [p], moments = adamw([np.array([1.0])], [np.array([4.0])], start([np.array([1.0])]), 0.1, 0.0)
    >>> p.round(6)  # the first step is η · g / |g|
    array([0.9])
    >>> [p], _ = adamw([p], [np.array([-4.0])], moments, 0.1, 0.0)
    >>> p.round(6)  # m̂ = (0.9 · 0.1 · 4 - 0.1 · 4) / (1 - 0.81) = -4/19, √v̂ = 4: back by 0.1 / 19
    array([0.905263])
    """
    _checks.number("learning_rate", learning_rate, 0)
    _checks.number("weight_decay", weight_decay, 0)
    for number, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        _checks.same_shape(f"gradients[{number}]", g, p, f"parameters[{number}]")
    steps = moments.steps + 1
    beta1, beta2 = BETAS
    updated, first, second = [], [], []
    for p, g, m, v in zip(parameters, gradients, moments.first, moments.second, strict=True):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**steps)
        v_hat = v / (1 - beta2**steps)
        updated.append((1 - learning_rate * weight_decay) * p - learning_rate * m_hat / (np.sqrt(v_hat) + EPS))
        first.append(m)
        second.append(v)
    return updated, Moments(steps, tuple(first), tuple(second))


def clip_by_global_norm(gradients: Sequence[Array], max_norm: float) -> tuple[list[Array], float]:
    """Scale all gradients by one factor, so that their global norm is at most max_norm.

    Source: Pascanu et al. 2013. gradients: arrays of any shapes. max_norm: 0 or more; 0 means no clipping.
    Returns: (scaled gradients, norm before scaling).
    *Deviation*: the factor is max_norm / (norm + 1e-6), at most 1, as in torch.nn.utils.clip_grad_norm_. max_norm 0 turns
    clipping off, as in Hugging Face's Trainer; taken literally it would zero every gradient.

    >>> [clipped], norm = clip_by_global_norm([np.array([3.0, 4.0])], 0.5)
    >>> clipped.round(6), norm
    (array([0.3, 0.4]), 5.0)
    >>> [same], norm = clip_by_global_norm([np.array([3.0, 4.0])], 0)
    >>> same, norm
    (array([3., 4.]), 5.0)
    """
    _checks.number("max_norm", max_norm, 0)
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    return [factor * g for g in gradients], norm


def lr_factor(done: int, total: int, warmup_ratio: float) -> float:
    """Return the learning rate at an optimizer step as a share of its peak: linear warm-up, then linear decay.

        (k + 1) / (w + 1)           while k < w = ceil(n · warmup_ratio)
        (n − k) / (n − w)           from then on

    Source: LoSA's settings (linear decay, warm-up 0.3). done: k, optimizer steps already taken, 0 to n - 1. total: n,
    number of optimizer steps. warmup_ratio: 0 to 1. Returns: above 0, at most 1; 1 at k = w, if there is such a step.
    Ties and rounding: w is rounded up.
    *Deviation*: the published code uses Hugging Face's schedule, which warms up by k / w. Its first step has rate 0, so a
    LoSA step of one optimizer step would not train at all. The two schedules differ by at most 1 / (w + 1).

    >>> [lr_factor(done, 5, 0.3) for done in range(5)]  # w = ceil(1.5) = 2
    [0.3333333333333333, 0.6666666666666666, 1.0, 0.6666666666666666, 0.3333333333333333]
    >>> lr_factor(0, 1, 0.3)
    0.5
    """
    _checks.integer("total", total, 1)
    _checks.integer("done", done, 0, total - 1)
    _checks.number("warmup_ratio", warmup_ratio, 0, 1)
    warmup = math.ceil(total * warmup_ratio)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return (total - done) / (total - warmup)
