"""The loss of predicting each next token, by labels or against a teacher, with its gradient by the logits.

Shapes: n sequences, t tokens, v vocabulary.
"""

from __future__ import annotations

import numpy as np

from reference import _checks
from reference._checks import Array, Ids
from reference.layers import log_softmax, softmax

IGNORED = -100
"""The label of a token that the loss ignores."""


def label_count(labels: Ids) -> int:
    """Count the predicted tokens; the first token of a sequence is never predicted.

    Source: next-token prediction. labels: (n, t), `IGNORED` for tokens not to predict.
    Returns: count. *Deviation*: none.

    >>> label_count(np.array([[5, 7, IGNORED, 2]]))
    2
    """
    return int((labels[:, 1:] != IGNORED).sum())


def cross_entropy(logits: Array, labels: Ids) -> tuple[float, Array]:
    """Compute -Σ log p(label) over the predicted tokens, and its gradient; divide both by `label_count` for the mean.

    Source: next-token prediction; gradient p - onehot(label). logits: (n, t, v). labels: (n, t); `IGNORED` is skipped.
    Returns: (sum, ∂sum/∂logits (n, t, v)).
    *Deviation*: none; the published code averages each micro-batch, `losa.py` averages over an optimizer step.

    >>> total, grad = cross_entropy(np.log([[[1.0, 3.0], [1.0, 1.0]]]), np.array([[0, 1]]))
    >>> float(np.exp(total).round(12))  # token 0 predicts label 1 with probability 3/4; the last token predicts nothing
    1.333333333333
    >>> grad
    array([[[ 0.25, -0.25],
            [ 0.  ,  0.  ]]])
    """
    labels = _labels(labels, logits)
    target = np.zeros(logits.shape)
    rows, columns = np.nonzero(labels[:, 1:] != IGNORED)
    target[rows, columns, labels[rows, columns + 1]] = 1
    counted = target.sum(axis=-1, keepdims=True)
    return float(-(target * log_softmax(logits)).sum()), counted * softmax(logits) - target


def kl_divergence(logits: Array, teacher: Array, labels: Ids) -> tuple[float, Array]:
    """Compute Σ KL(p of the teacher ‖ p) over the predicted tokens, and its gradient by the logits.

    Source: Hinton et al. 2015, temperature 1; gradient p - p_teacher. logits, teacher: (n, t, v). labels: (n, t), used
    only to skip `IGNORED` tokens. Returns: (sum, ∂sum/∂logits (n, t, v)).
    *Deviation*: the paper trains on labels; this loss is our option.

    >>> logits, teacher = np.log([[[1.0, 1.0], [1.0, 1.0]]]), np.log([[[1.0, 3.0], [1.0, 1.0]]])
    >>> total, grad = kl_divergence(logits, teacher, np.array([[0, 0]]))
    >>> bool(np.isclose(total, 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)))
    True
    >>> grad[0, 0]
    array([ 0.25, -0.25])
    """
    _checks.same_shape("teacher", teacher, logits, "logits")
    labels = _labels(labels, logits)
    counted = np.zeros((*labels.shape, 1))
    counted[:, :-1, 0] = labels[:, 1:] != IGNORED
    goal = counted * softmax(teacher)
    total = float((goal * (log_softmax(teacher) - log_softmax(logits))).sum())
    return total, counted * softmax(logits) - goal


def _labels(labels: Ids, logits: Array) -> Ids:
    if np.ndim(logits) != 3 or np.shape(labels) != np.shape(logits)[:2]:
        raise ValueError(
            f"labels has shape {np.shape(labels)}; allowed: {np.shape(logits)[:2]}, the first two axes of logits"
        )
    checked = np.where(np.equal(labels, IGNORED), 0, labels)
    _checks.token_ids("labels", checked, np.shape(logits)[-1])
    return np.asarray(labels)
