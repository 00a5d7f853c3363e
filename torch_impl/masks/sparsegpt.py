"""SparseGPT: prune column by column; later columns compensate for each error. Spec: reference/masks/sparsegpt.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from torch_impl import _checks, _kernels
from torch_impl.masks.method import Amount, InputStatistic, Method
from torch_impl.masks.nm import nm_mask
from torch_impl.masks.select import demote_pruned, matrix_mask, rest_sparsity
from torch_impl.quantise import (
    FEWEST_BITS,
    GROUP,
    MOST_BITS,
    dequantise_rows,
    group_scales,
    largest_code,
    nearest_codes,
    quantise_rows,
)

# Default number of columns whose mask is chosen together.
BLOCK_SIZE = 128
# If the Hessian cannot be factored, retry with 10 and 100 times the damping.
DAMPING_RETRIES = (1.0, 10.0, 100.0)

Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def hessian(inputs: torch.Tensor, samples: int) -> torch.Tensor:
    """Compute H = 2/N Σ x xᵀ (in, in) of calibration inputs (tokens, in) from N sequences, in float32 at least."""
    X = _checks.tensor("inputs", inputs, "tokens", "in")
    _checks.integer("samples", samples, 1)
    return _kernels.wide_product(X.T, X).mul_(2 / samples)


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sparsity: float,
    block_size: int = BLOCK_SIZE,
    damping: float = 0.01,
    kept: torch.Tensor | None = None,
    bits: int | None = None,
    group: int = GROUP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune and update a weight (SparseGPT, Algorithm 1, in float32 at least); return (weight, mask), both (out, in).

    hessian: (in, in). kept: weights not yet pruned; the others are pruned first and stay pruned. bits: also round the kept
    weights, with one scale for every `group` columns of a row, a divisor of block_size.
    Errors: ValueError with the damping values tried, if the Hessian cannot be factored.
    """
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)

    def choose(columns: torch.Tensor, diagonal: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return matrix_mask(demote_pruned((columns / diagonal).square(), kept), sparsity) & kept

    if bits is not None:
        _checks.integer("bits", bits, FEWEST_BITS, MOST_BITS)
        if _checks.integer("block_size", block_size, 1) % _checks.integer("group", group, 1):
            raise ValueError(f"group is {group}; allowed: a divisor of block_size {block_size}")
    return _prune(weight, hessian, block_size, damping, kept, choose, bits, group)[:2]


def sparsegpt_nm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    n: int,
    m: int,
    block_size: int = BLOCK_SIZE,
    damping: float = 0.01,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune with SparseGPT, keeping n of every m consecutive inputs of a row; m divides block_size and in."""
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    _checks.integer("block_size", block_size, 1)
    columns = _checks.finite("weight", weight, "out", "in").shape[1]
    if block_size % m or columns % m:
        raise ValueError(f"m is {m}; allowed: a divisor of block_size {block_size} and of the {columns} inputs")
    return _prune(weight, hessian, block_size, damping, kept, (n, m))[:2]


def sparsegpt_codes(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, damping: float = 0.01, kept: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the kept weights with compensation; return (codes (out, in) int8, scales (out, ⌈in/128⌉) float16).

    Errors: as `sparsegpt`.
    """
    _checks.integer("bits", bits, FEWEST_BITS, MOST_BITS)
    weight = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    rounded, _, found = _prune(weight, hessian, GROUP, damping, kept, lambda columns, diagonal, kept: kept, bits, GROUP)
    parts = zip(rounded.split(GROUP, 1), found, strict=True)
    return torch.cat([nearest_codes(part, scales, bits) for part, scales in parts], 1), torch.stack(found, 1)


def rounding_harm(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    output_weights: torch.Tensor,
    choices: Sequence[int],
    damping: float = 0.01,
) -> torch.Tensor:
    """Estimate how much the loss grows when a projection is rounded with compensation; return (choices,) float64.

    harm_b = Σ_i r_i Σ_j (W − Q_b)²_ij / U²_jj, r = output_weights over their mean. hessian: Σ x xᵀ, each token counted by the mean
    square of its outputs' gradients; output_weights: these squares (out,), summed over tokens. Errors: as `sparsegpt`.
    """
    W = _checks.wide(_checks.finite("weight", weight, "out", "in"))
    g2 = _checks.finite("output_weights", output_weights, "out").double()
    if len(g2) != len(W) or float(g2.min()) < 0:
        allowed = f"({len(W)},), 0 or more"
        raise ValueError(f"output_weights has shape {tuple(g2.shape)} and holds {float(g2.min())}; allowed: {allowed}")
    H = _hessian_of(hessian, W)
    if not float(g2.sum()):
        return g2.new_zeros(len(choices))
    inverse_scale = _inverse_factor(H, damping).diagonal().double().square().reciprocal()
    errors = ((W - dequantise_rows(*quantise_rows(W, bits))).square_() for bits in choices)
    return torch.stack([(g2 / g2.mean()) @ (error @ inverse_scale) for error in errors])


def _prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    block_size: int,
    damping: float,
    kept: torch.Tensor | None,
    choose: Choose | tuple[int, int],
    bits: int | None = None,
    group: int = GROUP,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Run the column loop: update within a block of columns first, then all later columns in one product.

    choose: the mask of a block of columns when the block is reached, or (N, M), of every M columns when they are reached.
    Returns the new weight, its mask, the scales (out,) of each group.
    """
    W = _checks.wide(_checks.finite("weight", weight, "out", "in")).clone(memory_format=torch.contiguous_format)
    H = _hessian_of(hessian, W)
    _checks.integer("block_size", block_size, 1)
    if kept is None:
        kept = torch.ones(W.shape, dtype=torch.bool, device=W.device)
    _checks.mask("kept", kept, W, "weight")
    U = _inverse_factor(H, damping).to(W.dtype)
    mask = torch.ones(W.shape, dtype=torch.bool, device=W.device)
    scales: list[torch.Tensor] = []
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block, factor, own = W[:, start:stop], U[start:stop, start:stop], mask[:, start:stop]
        errors = torch.zeros_like(block)
        if isinstance(choose, tuple):
            own.copy_(kept[:, start:stop])
            _visit_groups(block, factor, own, errors, *choose)
        else:
            own.copy_(choose(block, factor.diagonal(), kept[:, start:stop]))
            if bits is None:
                _visit(block, factor, own, errors, 0, stop - start)
            else:
                scales += _visit_rounding(block, factor, own, errors, bits, group)
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1.0)
    return W.masked_fill_(~mask, 0.0).to(weight.dtype), mask, scales


def _hessian_of(hessian: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Check the Hessian (in, in) of a weight (out, in)."""
    H = _checks.finite("hessian", _checks.square("hessian", hessian), "n", "n")
    columns = weight.shape[1]
    if len(H) != columns:
        raise ValueError(f"hessian has shape {tuple(H.shape)}; allowed: ({columns}, {columns}), the weight's inputs")
    return H


def _visit(
    block: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor, first: int, last: int
) -> None:
    """Prune columns `first` to `last` of a block (out, width) in place; the block's later columns compensate."""
    if _kernels.usable(block, factor):
        _kernels.sweep(block, factor, mask, errors, first, last)
        return
    for j in range(first, last):
        errors[:, j] = block[:, j].masked_fill(mask[:, j], 0.0) / factor[j, j]
        block[:, j:].addr_(errors[:, j], factor[j, j:], alpha=-1.0)


def _visit_groups(
    block: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor, n: int, m: int
) -> None:
    """Prune all columns of a block (out, width) in place, n of every m are kept; mask: at first, what may be kept."""
    width, diagonal = block.shape[1], factor.diagonal()
    if _kernels.usable(block, factor):
        _kernels.sweep(block, factor, mask, errors, 0, width, (n, m))
        return
    for first in range(0, width, m):
        group = slice(first, first + m)
        score = (block[:, group] / diagonal[group]).square()
        mask[:, group] &= nm_mask(demote_pruned(score, mask[:, group]), n, m)
        _visit(block, factor, mask, errors, first, first + m)


def _visit_rounding(
    block: torch.Tensor, factor: torch.Tensor, mask: torch.Tensor, errors: torch.Tensor, bits: int, group: int
) -> list[torch.Tensor]:
    """Prune a block of columns and round its kept weights in place; the block's later columns compensate. Return the scales."""
    q = largest_code(bits)
    # Columns in memory one after the other: a step reads and writes whole ones.
    later, pruned, found_errors = block.T.contiguous(), ~mask.T.contiguous(), torch.empty_like(errors.T)
    found = []
    for j, (column, error) in enumerate(zip(later, found_errors, strict=True)):
        if j % group == 0:
            sharing = slice(j, j + group)
            found.append(group_scales(later[sharing].masked_fill(pruned[sharing], 0.0).T, bits))
            scales = found[-1].double()
            # As `nearest_codes`, without its checks; v / ∞ is 0.
            steps = scales.masked_fill(scales == 0, math.inf)
        kept = column.masked_fill(pruned[j], 0.0)
        target = torch.div(kept, steps).round_().clamp_(-q, q).mul_(scales).to(block.dtype)
        torch.div(column - target, factor[j, j], out=error)
        later[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1.0)
        column.copy_(target)
    # Without negative zeros.
    block.copy_(later.T).add_(0.0)
    errors.copy_(found_errors.T)
    return found


def _inverse_factor(H: torch.Tensor, damping: float) -> torch.Tensor:
    """Return U, upper triangular, with (H + damping)⁻¹ = Uᵀ U."""
    _checks.number("damping", damping, 0.0)
    H = _checks.wide(H)
    tried = []
    for factor in DAMPING_RETRIES:
        tried.append(damping * factor)
        # Factor H with its rows and columns reversed: H = L Lᵀ. Then H⁻¹ = UᵀU, where U is L⁻¹ reversed again.
        damped = H.flip(0, 1) + torch.diag_embed((tried[-1] * H.diagonal().mean()).expand(len(H)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        U = torch.linalg.solve_triangular(lower, torch.eye(len(H), dtype=H.dtype, device=H.device), upper=False)
        # The inverse must be finite too: its diagonal is the sum of the squares of U.
        if bool(torch.isfinite(U.square().sum(0)).all()):
            return U.flip(0, 1)
    raise ValueError(f"hessian is not positive definite with damping {', '.join(f'{d:g}' for d in tried)}")


def _prune_further(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, amount: Amount
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune one projection further; blocks of columns that are already sparser reduce the share of the others."""
    if isinstance(amount, tuple):
        n, m = amount
        return sparsegpt_nm(weight, hessian, n, m, block_size=m * max(1, BLOCK_SIZE // m), kept=kept)
    blocks = kept.split(BLOCK_SIZE, dim=1)
    sizes = torch.tensor([block.numel() for block in blocks], dtype=torch.float64)
    zeros = sizes - torch.stack([block.sum() for block in blocks]).cpu()
    return sparsegpt(weight, hessian, rest_sparsity(zeros, sizes, amount), kept=kept)


def _workspace(rows: int, columns: int, itemsize: int) -> int:
    """Return the peak bytes (see `Workspace`): factors of the Hessian, then weights, errors and a block's scores."""
    wide = max(4, itemsize)
    return max(5 * columns**2 * wide, rows * columns * (4 * wide + 3))


HESSIAN = InputStatistic(part=hessian, finish=lambda total: total, entries=lambda inputs: inputs**2)
METHOD = Method("sparsegpt", _prune_further, _workspace, HESSIAN, moves_weights=True)
