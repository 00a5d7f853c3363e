"""More calibration text than there is: the dense model continues pieces of it (beyond the paper).

Reconstruction (`reconstruct.py`) fits its calibration text. With more text it fits that text less and other text better, and a
language model can write as much as is needed: what it writes is likely where it will be used, and costs no data. Legend: n
sequences, v vocabulary, z logits, u uniform random numbers, one for each token to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array, Ids


def next_token(logits: Array, uniforms: Array, excluded: Sequence[int] = ()) -> NDArray[np.int64]:
    """Draw the next token of every sequence from the model's prediction, at temperature 1.

    Source: none in the paper; sampling by the inverse of the distribution function. Text by the model for calibration: LLM-QAT
    (arXiv 2305.17888).

        p = softmax(z) over the tokens not excluded,    token = min { j : p_0 + … + p_j > u }

    So token j is drawn with probability p_j. A sum that rounding leaves at or below u gives the last token that can be drawn.

    Parameters: logits z (n, v); uniforms u (n,), in [0, 1); excluded: ids never drawn, such as those that end a text. Returns:
    token ids (n,).

    *Deviation*: LLM-QAT takes the most likely token for the first few; here a piece of text comes first.

    >>> next_token([[0, 0, 0, 0], [0, 0, 9, 0]], uniforms=[0.6, 0.6])  # a quarter each: 0.25, 0.5, 0.75 > 0.6
    array([2, 2])
    >>> next_token([[0, 0, 0, 0], [0, 0, 9, 0]], uniforms=[0.6, 0.6], excluded=[2])  # a third each
    array([1, 1])
    """
    z = _checks.array("logits", logits, "n", "v").copy()
    u = _checks.array("uniforms", uniforms, "n")
    if len(u) != len(z) or u.min() < 0 or u.max() >= 1:
        raise ValueError(f"uniforms has {len(u)} entries of {u.min()} to {u.max()}; allowed: {len(z)} in [0, 1)")
    allowed = np.ones(z.shape[1], dtype=bool)
    for token in excluded:
        allowed[_checks.integer("excluded", token, 0, z.shape[1] - 1)] = False
    if not allowed.any():
        raise ValueError(f"excluded has all {len(allowed)} tokens; allowed: fewer")
    z[:, ~allowed] = -np.inf
    p = np.exp(z - z.max(axis=1, keepdims=True))
    sums = np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)
    first = (sums <= u[:, None]).sum(axis=1)
    return np.minimum(first, np.flatnonzero(allowed)[-1]).astype(np.int64)


def continue_text(
    predict: Callable[[Ids], Array], prompts: Ids, uniforms: Array, excluded: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Continue each prompt by one token after the other, each drawn with all tokens before it known.

    Source: as `next_token`.

    Parameters: predict: token ids (n, t) → logits (n, v) of the token that follows them; prompts (n, t); uniforms (n, k);
    excluded: see `next_token`. Returns: token ids (n, t + k), prompts included.

    *Deviation*: see `next_token`.

    >>> def successor(ids):  # always one more than the last token, of four
    ...     return np.where(np.arange(4) == (ids[:, -1:] + 1) % 4, 0.0, -99.0)
    >>> continue_text(successor, prompts=[[3, 0], [1, 2]], uniforms=[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    array([[3, 0, 1, 2, 3],
           [1, 2, 3, 0, 1]])
    """
    ids = np.asarray(prompts)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"prompts has dtype {ids.dtype}; allowed: an integer dtype")
    u = _checks.array("uniforms", uniforms, "n", "k", empty=True)
    if ids.ndim != 2 or len(ids) != len(u):
        raise ValueError(f"prompts has shape {ids.shape}; allowed: ({len(u)}, t), a row for each of uniforms")
    ids = ids.astype(np.int64)
    for column in u.T:
        token = next_token(predict(ids), column, excluded)
        ids = np.concatenate([ids, token[:, None]], axis=1)
    return ids
