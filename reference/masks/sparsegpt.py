"""SparseGPT: prune column by column from left to right; the columns not yet visited compensate for each error.

Legend: W (out × in) one projection's weight, X (tokens × in) its calibration input, H (in × in) the Hessian of the
squared output error, U upper triangular with H⁻¹ = Uᵀ U.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array, Mask
from reference.masks.method import Amount, Method
from reference.masks.nm import nm_mask
from reference.masks.select import demote_pruned, matrix_mask, rest_sparsity
from reference.quantise import (
    FEWEST_BITS,
    GROUP,
    MOST_BITS,
    dequantise_rows,
    group_scales,
    nearest_codes,
    quantise_rows,
)

# Default number of columns whose mask is chosen together.
BLOCK_SIZE = 128
# If the Hessian cannot be factored, retry with 10 and 100 times the damping.
DAMPING_RETRIES = (1.0, 10.0, 100.0)


def hessian(inputs: Array, samples: int) -> Array:
    """Compute the Hessian of the squared output error with respect to one row of the weight.

    Source: SparseGPT (arXiv 2301.00774), Section 3.

        H = 2/N Σ x xᵀ

    Parameters: inputs X (tokens, in), all calibration tokens; samples N, the number of calibration sequences.
    Returns: H (in, in), symmetric.

    *Deviation*: none.

    >>> hessian([[1, 2], [0, 1]], samples=2)
    array([[1., 2.],
           [2., 5.]])
    """
    X = _checks.array("inputs", inputs, "tokens", "in")
    _checks.integer("samples", samples, 1)
    return 2 / samples * (X.T @ X)


def sparsegpt(
    weight: Array,
    hessian: Array,
    sparsity: float,
    block_size: int = BLOCK_SIZE,
    damping: float = 0.01,
    kept: Mask | None = None,
    bits: int | None = None,
    group: int = GROUP,
) -> tuple[Array, Mask]:
    """Prune a share of each block of columns; update the kept weights so that the output changes least.

    Source: SparseGPT (arXiv 2301.00774), Algorithm 1.

        U = chol(H⁻¹) upper;   for every block of columns:
          mask: prune the k lowest of W²_ij / U²_jj over all rows,  k = floor(ρ · rows · columns + 1e-9)
          for every column j, left to right, E_j = (W_j − mask_j ⊙ W_j) / U_jj,   W_{j:} −= E_j U_{j,j:}

    The paper updates the columns of the block at once and the later ones when the block is done. The result is the same.

    With `bits` the kept weights are rounded as their column is reached, and the later ones compensate for that error too
    (Section 3.5). Each row has a scale for every `group` columns, chosen from its kept weights as they are when the first of
    these columns is reached. At ρ = 0 this is GPTQ (arXiv 2210.17323).

        Q_j = s · nearest code of W_j;   E_j = (W_j − mask_j ⊙ Q_j) / U_jj

    Parameters: weight W (out, in); hessian H (in, in), symmetric; sparsity ρ in [0, 1]; block_size, columns whose mask is
    chosen together; damping, the share of mean(diag H) added to the diagonal; kept bool (out, in), the weights not yet pruned,
    default all. The others are pruned first and stay pruned, even if they are more than k. bits from 2 to 8, default: no
    rounding; group, a divisor of block_size.

    Returns: (W' (out, in), zero where pruned; mask bool (out, in), True = kept). A kept weight may be rounded to 0.

    Ties: within a block of columns, the first in row-major order is pruned first. If H cannot be factored, the damping is
    raised to 10 and then 100 times its value.

    Errors: ValueError with the damping values tried, if H cannot be factored with any of them.

    *Deviation*: the published code first zeroes the weights of inputs that are always 0; here damping makes them cheap to
    prune. It ignores earlier masks, so a pruned weight can come back at the next step. It prunes k + 1 weights of each
    block of columns, and more if scores tie; here exactly k are pruned. Its scales, one per row from the weights before any
    update, include those that will be pruned.

    >>> W, mask = sparsegpt([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 0.5, damping=0.0)
    >>> mask  # U = [[1, −½], [0, ½]]: scores 1/1 and 4/¼
    array([[False,  True]])
    >>> W  # E = 1, so the second weight becomes 2 + 1·½
    array([[0. , 2.5]])
    """
    sparsity = _checks.number("sparsity", sparsity, 0.0, 1.0)

    def choose(columns: Array, diagonal: Array, kept: Mask) -> Mask:
        return matrix_mask(demote_pruned(columns**2 / diagonal**2, kept), sparsity) & kept

    if bits is not None:
        _checks.integer("bits", bits, FEWEST_BITS, MOST_BITS)
        if _checks.integer("block_size", block_size, 1) % _checks.integer("group", group, 1):
            raise ValueError(f"group is {group}; allowed: a divisor of block_size {block_size}")
    return _prune(weight, hessian, block_size, damping, kept, choose, None, bits, group)[:2]


def sparsegpt_nm(
    weight: Array,
    hessian: Array,
    n: int,
    m: int,
    block_size: int = BLOCK_SIZE,
    damping: float = 0.01,
    kept: Mask | None = None,
) -> tuple[Array, Mask]:
    """Prune with SparseGPT, keeping n of every m consecutive inputs of a row.

    Source: SparseGPT (arXiv 2301.00774), Section 3.4. The mask of a group is chosen when its first column is reached,
    from the weights updated so far.

    Parameters: as for `sparsegpt`; n from 0 to m; m, a divisor of block_size and of in. Returns: as `sparsegpt`.

    Ties: the lower column of a group is pruned first.

    Errors: as `sparsegpt`.

    *Deviation*: as `sparsegpt`.

    >>> sparsegpt_nm([[1.0, 2.0]], [[2.0, 2.0], [2.0, 4.0]], 1, 2, damping=0.0)
    (array([[0. , 2.5]]), array([[False,  True]]))
    """
    _checks.integer("m", m, 1)
    _checks.integer("n", n, 0, m)
    _checks.integer("block_size", block_size, 1)
    columns = _checks.array("weight", weight, "out", "in").shape[1]
    if block_size % m or columns % m:
        raise ValueError(f"m is {m}; allowed: a divisor of block_size {block_size} and of the {columns} inputs")

    def choose(columns: Array, diagonal: Array, kept: Mask) -> Mask:
        return nm_mask(demote_pruned(columns**2 / diagonal**2, kept), n, m) & kept

    return _prune(weight, hessian, block_size, damping, kept, choose, m)[:2]


def sparsegpt_codes(
    weight: Array, hessian: Array, bits: int, damping: float = 0.01, kept: Mask | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Round the kept weights as `sparsegpt` with ρ = 0 does, and return the codes and the scales.

    Source: GPTQ (arXiv 2210.17323) with a mask; the scales do not follow from the rounded weights (decision 49).

        C_ij = W'_ij / s_i⌊j/128⌋

    Parameters: weight W (out, in); hessian H (in, in); bits from 2 to 8; damping and kept as for `sparsegpt`. Returns: codes C
    (out, in) int8, 0 where pruned; scales s (out, ⌈in/128⌉) float16.

    Errors: as `sparsegpt`.

    *Deviation*: as `sparsegpt`.

    >>> sparsegpt_codes([[7.0, 2.5]], [[2.0, 0.0], [0.0, 1.0]], bits=4, kept=[[True, True]])
    (array([[7, 2]], dtype=int8), array([[1.]], dtype=float16))
    """
    _checks.integer("bits", bits, FEWEST_BITS, MOST_BITS)
    rounded, _, found = _prune(
        weight, hessian, GROUP, damping, kept, lambda columns, diagonal, kept: kept, None, bits, GROUP
    )
    scales = np.stack(found, axis=1)
    codes = [nearest_codes(rounded[:, i * GROUP : (i + 1) * GROUP], s, bits) for i, s in enumerate(found)]
    return np.concatenate(codes, axis=1), scales


def rounding_harm(
    weight: Array, hessian: Array, output_weights: Array, choices: Sequence[int], damping: float = 0.01
) -> Array:
    """Estimate how much the loss grows when a projection is rounded with compensation, for each number of bits.

    Source: ours (decision 50). To second order, with squared gradients g²_ti of the loss by output i at token t as its curvature
    (Fisher), a change ΔW costs Σ_i ΔW_i (Σ_t g²_ti x_t x_tᵀ) ΔW_iᵀ. The sums of all rows are one matrix and a factor for each row,
    as if a row's share of g² were the same at every token:

        Σ_t g²_ti x_t x_tᵀ ≈ r_i H,   H = Σ_t mean_i g²_ti · x_t x_tᵀ,   r_i = Σ_t g²_ti / (mean over rows)

    GPTQ's loop (`sparsegpt` with bits) with this H ends at Σ_ij r_i E_ij², where E_ij is the rounding error of W_ij, as it is
    when its column is reached, over U_jj. That error is about as large for the weight as given, so no loop is needed.

        harm_b = Σ_i r_i Σ_j (W − Q_b)²_ij / U²_jj

    Parameters: weight W (out, in), zeros stay zero; hessian H (in, in); output_weights Σ_t g²_ti (out,), 0 or more; choices,
    numbers of bits from 2 to 8; damping as for `sparsegpt`. Returns: the harms (choices,), 0 or more, comparable between
    projections of one model. All are 0 if output_weights are.

    Errors: as `sparsegpt`.

    *Deviation*: none known.

    >>> rounding_harm([[7.0, 2.5]], [[2.0, 0.0], [0.0, 1.0]], [3.0], (4, 5), damping=0.0).round(3)  # ½² · 1, 0.166² · 1
    array([0.25 , 0.028])
    """
    W = _checks.array("weight", weight, "out", "in")
    g2 = _checks.array("output_weights", output_weights, "out")
    if len(g2) != len(W) or g2.min() < 0:
        raise ValueError(f"output_weights has shape {g2.shape} and holds {g2.min()}; allowed: ({len(W)},), 0 or more")
    H = _checks.square("hessian", hessian)
    if len(H) != W.shape[1]:
        raise ValueError(f"hessian has shape {H.shape}; allowed: ({W.shape[1]}, {W.shape[1]}), the weight's inputs")
    if not g2.any():
        return np.zeros(len(choices))
    scale = np.diag(_inverse_factor(H, damping)) ** 2
    return np.array(
        [g2 / g2.mean() @ ((W - dequantise_rows(*quantise_rows(W, b))) ** 2 / scale).sum(axis=1) for b in choices]
    )


def _prune(
    weight: Array,
    hessian: Array,
    block_size: int,
    damping: float,
    kept: Mask | None,
    choose: Callable[[Array, Array, Mask], Mask],
    chosen_at_once: int | None,
    bits: int | None = None,
    group: int = GROUP,
) -> tuple[Array, Mask, list[NDArray[np.float16]]]:
    """Run the column loop. `choose(weights, diagonal of U, kept)` returns the mask of the next `chosen_at_once` columns.

    Returns: the new weight, its mask, the scales (out,) of each group.
    """
    W = _checks.array("weight", weight, "out", "in").copy()
    H = _checks.square("hessian", hessian)
    if len(H) != W.shape[1]:
        raise ValueError(f"hessian has shape {H.shape}; allowed: ({W.shape[1]}, {W.shape[1]}), the weight's inputs")
    _checks.integer("block_size", block_size, 1)
    kept = np.ones(W.shape, dtype=bool) if kept is None else _checks.mask("kept", kept, W, "weight")
    U = _inverse_factor(H, damping)
    diagonal = np.diag(U)
    columns = W.shape[1]
    mask = np.ones(W.shape, dtype=bool)
    found = []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        step = stop - start if chosen_at_once is None else chosen_at_once
        for j in range(start, stop):
            if (j - start) % step == 0:
                chosen = slice(j, j + step)
                mask[:, chosen] = choose(W[:, chosen], diagonal[chosen], kept[:, chosen])
            target = np.where(mask[:, j], W[:, j], 0.0)
            if bits is not None:
                if j % group == 0:
                    sharing = slice(j, min(j + group, stop))
                    found.append(group_scales(np.where(mask, W, 0.0)[:, sharing], bits))
                    scales = found[-1].astype(np.float64)
                target = scales * nearest_codes(target[:, None], scales, bits)[:, 0]
            error = (W[:, j] - target) / U[j, j]
            W[:, j:] -= np.outer(error, U[j, j:])
            W[:, j] = target
    return W, mask, found


def _inverse_factor(H: Array, damping: float) -> Array:
    """Return U, upper triangular, with (H + damping)⁻¹ = Uᵀ U."""
    _checks.number("damping", damping, 0.0)
    tried = []
    for factor in DAMPING_RETRIES:
        tried.append(damping * factor)
        damped = H + tried[-1] * np.diag(H).mean() * np.eye(len(H))
        try:
            np.linalg.cholesky(damped)  # inv() does not refuse an indefinite matrix
            inverse = np.linalg.inv(damped)
            U: Array = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float64)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(U).all():
            return U
    raise ValueError(f"hessian is not positive definite with damping {', '.join(f'{d:g}' for d in tried)}")


def _prune_further(weight: Array, hessian: Array, kept: Mask, amount: Amount) -> tuple[Array, Mask]:
    """Prune one projection further; blocks of columns that are already sparser reduce the share of the others."""
    if isinstance(amount, tuple):
        n, m = amount
        return sparsegpt_nm(weight, hessian, n, m, block_size=m * max(1, BLOCK_SIZE // m), kept=kept)
    blocks = [kept[:, start : start + BLOCK_SIZE] for start in range(0, kept.shape[1], BLOCK_SIZE)]
    zeros, sizes = np.array([(~block).sum() for block in blocks]), np.array([block.size for block in blocks])
    return sparsegpt(weight, hessian, rest_sparsity(zeros, sizes, amount), kept=kept)


METHOD = Method("sparsegpt", _prune_further, statistic=hessian)
