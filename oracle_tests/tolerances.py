"""How much production may differ from the spec, and why. Relaxing a number needs a reason beside it."""

from __future__ import annotations

import numpy as np
import torch

# Layer 1: torch float64 on the CPU against NumPy float64. Same algorithm, other order of summation: a few ulps per sum of
# at most 16 × 16 terms, so 1e-10 is far above rounding and far below any difference in logic.
SAME_ALGORITHM = 1e-10
# A Cholesky factor of a Hessian of condition κ amplifies rounding by κ; the strategies keep κ under 1e5 after damping.
SPARSEGPT_FLOAT64 = 1e-8
# ALPS ends with ten steps of conjugate gradients. Near convergence they amplify rounding a millionfold and more (the Lanczos
# vectors lose their orthogonality), so weights agree within the residual at which they stop, 1e-4; masks agree exactly.
ALPS_FLOAT64 = 1e-4
METHOD_FLOAT64 = {"sparsegpt": SPARSEGPT_FLOAT64, "alps": ALPS_FLOAT64}
# The same through the blocks of a whole run, each pruned on what the one before puts out.
ALPS_RUN = 10 * ALPS_FLOAT64
# SparseGPT in float32. Damping keeps κ of any Hessian under in / 0.01; with 12 inputs 2⁻²⁴ κ is 7e-5.
SPARSEGPT_FLOAT32 = 1e-4


def ill_conditioned(condition: float) -> float:
    """SparseGPT in float64 without damping: the inverse of a Hessian of condition κ has an error of about κ · 2⁻⁵³."""
    return max(SAME_ALGORITHM, UNIT[torch.float64] * condition)


# Layer 2: unit roundoff of the inputs' dtype times the number of successive roundings in a result. In float32: sums
# of at most 16 terms and a few elementwise operations. In half precision sums are accumulated in float32; the weight, a product
# with it and the result are rounded.
ROUNDINGS = 32
FEW_ROUNDINGS = 4
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def bound(dtype: torch.dtype) -> float:
    """Largest error of an entry of a result, relative to the sum of the sizes of its terms."""
    if dtype == torch.float64:
        return SAME_ALGORITHM
    return (ROUNDINGS if dtype == torch.float32 else FEW_ROUNDINGS) * UNIT[dtype]


def same_product(dtype: torch.dtype) -> float:
    """Error of a product computed in two ways from the same numbers, relative to the largest entry."""
    return FEW_ROUNDINGS * UNIT[dtype]


def long_sum(terms: int) -> float:
    """Error of many terms of one sign added in float32 in turn: random roundings grow with the square root of their number."""
    return UNIT[torch.float32] * terms**0.5


def cancelled(dtype: torch.dtype, left: float) -> float:
    """Relative error of a difference that is only the share `left` of its terms: their roundings weigh 1 / left as much."""
    return 4 * UNIT[dtype] / left


def one_rounding(dtype: torch.dtype, value: np.ndarray, terms: float | np.ndarray) -> np.ndarray:
    """Error of a result rounded once to a half-precision dtype: half the gap between neighbours, plus float32's rounding of
    terms of that size before."""
    gap = np.maximum(UNIT[dtype] * value, torch.finfo(dtype).smallest_normal * UNIT[dtype])
    return gap + ROUNDINGS * UNIT[torch.float32] * terms


def packed_product(dtype: torch.dtype, value: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Error of a product with a packed weight, summed in float32 in any order and rounded once. Roundings of the sum are
    relative to its terms; VDPBF16PS rounds each of its two additions and flushes subnormal float32 to 0."""
    gap = np.maximum(UNIT[dtype] * np.abs(value), torch.finfo(dtype).smallest_normal * UNIT[dtype])
    return gap * (1 + 1e-3) + ROUNDINGS * UNIT[torch.float32] * terms + 1e-36


def merged_by_kernel(dtype: torch.dtype, value: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Error of Triton's `merge`: on a GPU its factors are split into two numbers, accurate to 2⁻¹⁷ in bf16 and 2⁻²⁰ in TF32,
    and the product of the lower ones is omitted; then one rounding."""
    if dtype == torch.float32:
        return bound(dtype) * terms
    return one_rounding(dtype, value, terms) + (2.0**-15 if dtype == torch.bfloat16 else 2.0**-18) * terms


def contracted_by_kernel(dtype: torch.dtype, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Error of Triton's `contract` in left @ right: on a GPU the float32 factor is split into two numbers of the other's dtype,
    accurate to 2⁻¹⁷, in fp16 no better than half of its smallest number, 2⁻²⁵."""
    terms = np.abs(left) @ np.abs(right)
    if dtype == torch.float32:
        return bound(dtype) * terms
    smallest = 2.0**-24 * (np.abs(left) @ np.ones(right.shape) + np.ones(left.shape) @ np.abs(right))
    return 2.0**-16 * terms + (smallest if dtype == torch.float16 else 0.0)


# ALPS and ADMM in lower precision (test_searches.py): the error of the pruned weight relative to the spec's, decisive where near
# ties flip. The iterations run in float32 at least, so only the rounding of the result is felt in half precision: its square
# adds to the error what 2⁻⁹ or 2⁻¹² of each weight does, times the condition of the Hessian.
SEARCH = {
    "mask entries that differ (share)": 1e-3,
    torch.float32: 1e-5,
    torch.float16: 1e-4,
    torch.bfloat16: 2e-3,
}

# Logits of a packed model against the plain one's, relative to the largest: sums in another order, then the same roundings.
# In half precision a sum near the midpoint of two numbers may round to the other one, and three blocks propagate that.
PACKED_LOGITS = {
    torch.float32: 1e-5,
    torch.float16: 8 * UNIT[torch.float16],
    torch.bfloat16: 8 * UNIT[torch.bfloat16],
}


# A score of Wanda is one product of a rounded weight and a float32 norm: three roundings.
SCORE_ROUNDINGS = 4

# One LoSA step at LLaMA-2-7B's shapes, bf16 on the GPU against float32 on the CPU (programs/gpu_step.py). Hidden states
# are rounded to bf16 (2⁻⁹ relative, at random) some ten times a block; norms over 2,048 tokens average that out.
GPU_STEP = {
    # Scores near the threshold are dense: a relative score error of 2⁻⁸ moves about that share of the entries there.
    "mask entries that differ (share)": 5e-3,
    # The worst of up to 4·10⁸ entries, six standard deviations: 6 · √10 · 2⁻⁹ for the score, and its row's threshold moves too.
    "their distance from the threshold": 6e-2,
    "reconstruction error": 3e-2,
    "loss": 5e-3,
    # Two blocks, forward and backward, with bf16 on both sides of every product.
    "adapter gradients": 6e-2,
    # bf16 rounds each merged weight once.
    "merged weights": 2.0**-8,
}

# A run in several processes against one process, float64: only the order of summation differs. As between production and
# spec (test_whole_run.BOUND), rounding leaves 1e-17 in a clipped gradient, Adam makes at most lr · 1e-17 / 1e-8 of it, 1e-11
# at lr = 1e-2; five optimizer steps of it, stretched ten times through the model, stay under 1e-9.
OTHER_ORDER = 1e-9

# One LoSA step of a tiny model in float32 or bf16 against the spec in float64 from the same state (test_stepwise.py).
STEPWISE = {
    torch.float32: {
        # Averaging hundreds of hidden states cancels roundings; I is the exponential of a share of about 1/4.
        "importance": 1e-7,
        "mask entries that differ (share)": 0.0,
        "pruned weights": 16 * UNIT[torch.float32],
        "reconstruction error": 32 * UNIT[torch.float32],
        # A divergence is small compared with the logits it is computed from.
        "loss": 1e-5,
        # Adam divides by a gradient's size: the smallest entries, with large relative roundings, move as far as the
        # largest.
        "what training moved": 1e-3,
    },
    torch.bfloat16: {
        "importance": 5e-4,
        # Scores have errors of up to 2⁻⁸, so up to two entries in 2⁸ are close enough to their threshold to differ.
        "mask entries that differ (share)": 2.0**-7,
        "pruned weights": 4 * UNIT[torch.bfloat16],
        "reconstruction error": 8 * UNIT[torch.bfloat16],
        "loss": 0.1,
        "what training moved": 0.4,
    },
}
