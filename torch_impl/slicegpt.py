"""SliceGPT: rotate hidden states onto their principal axes, and leave out the last ones. Spec: reference/slicegpt.py.

With a model: experiment/baselines/slicegpt.py. Everything but the norm computes in float64, once for a model.
"""

from __future__ import annotations

import torch

from torch_impl import _checks


def principal_axes(gram: torch.Tensor) -> torch.Tensor:
    """Return the eigenvectors (d, d) of XᵀX by falling eigenvalue, float64, an axis in each column."""
    gram = _checks.square("gram", gram)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("gram holds NaN or infinity; allowed: finite numbers")
    Q = torch.linalg.eigh(gram.double())[1].flip(1)
    rising = torch.arange(1, len(Q) + 1, dtype=Q.dtype, device=Q.device)
    return Q * torch.where(rising @ Q < 0, -1.0, 1.0)


def kept_axes(sparsity: float, width: int, weights: int, multiple: int = 8) -> int:
    """Return the number k of axes of d = width, with which k·n/d + 2k² is nearest to (1 − s)·n, n = weights of a block."""
    s = _checks.number("sparsity", sparsity, 0.0, 1.0)
    d, n = _checks.integer("width", width, 1), _checks.integer("weights", weights, 1)
    _checks.integer("multiple", multiple, 1)
    choices = range(multiple, d + 1, multiple) if d >= multiple else [d]
    return min(choices, key=lambda k: (abs(k * n / d + 2 * k * k - (1 - s) * n), -k))


def centred(axes: torch.Tensor) -> torch.Tensor:
    """Compute (I − 11ᵀ/d) Q of axes Q (d, k)."""
    Q = _checks.finite("axes", axes, "d", "k").double()
    return Q - Q.mean(0)


def slice_inputs(weight: torch.Tensor, gain: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Compute W diag(γ) Q (out, k) of a weight (out, d), the gain (d,) of the norm before it and axes (d, k)."""
    W, gain = _checks.finite("weight", weight, "out", "d"), _checks.finite("gain", gain, "d")
    Q = _checks.finite("axes", axes, "d", "k")
    if gain.shape != (W.shape[1],):
        raise ValueError(f"gain has shape {tuple(gain.shape)}; allowed: {(W.shape[1],)}")
    _as_long("axes", Q, W.shape[1])
    return (W.double() * gain.double()) @ Q.double()


def slice_outputs(weight: torch.Tensor, axes: torch.Tensor) -> torch.Tensor:
    """Compute Qᵀ W (k, in) of a weight (d, in) and axes (d, k) of the norm that reads its outputs."""
    W, Q = _checks.finite("weight", weight, "d", "in"), _checks.finite("axes", axes, "d", "k")
    _as_long("axes", Q, len(W))
    return Q.double().T @ W.double()


def shortcut(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Compute Qᵀ Q' (k, k'), by which the residual turns from axes Q (d, k) to Q' (d, k')."""
    Q, new = _checks.finite("before", before, "d", "k"), _checks.finite("after", after, "d", "k")
    _as_long("after", new, len(Q))
    return Q.double().T @ new.double()


def sliced_norm(x: torch.Tensor, width: int, eps: float) -> torch.Tensor:
    """Compute x / √(Σ x² / d + ε) of sliced states (..., k) with d = width, in float32 at least, rounded to the dtype of x."""
    _checks.tensor("x", x, "...", "k")
    _checks.integer("width", width, 1)
    _checks.number("eps", eps, 1e-12)
    wide = _checks.wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / width + eps)).to(x.dtype)


def _as_long(name: str, axes: torch.Tensor, width: int) -> None:
    if len(axes) != width:
        raise ValueError(f"{name} has {len(axes)} rows; allowed: {width}")
