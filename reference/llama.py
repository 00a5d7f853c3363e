"""A LLaMA short enough to read, with explicit gradients: the model that `losa.py` prunes and trains.

`block_forward` and `forward` define the model. `block_backward` and `backward` are their derivatives, line by line in
reverse. Only projections are trained, so the gradients stop there. For each projection y = x Wᵀ (+ b, frozen) the forward
trace holds x, and the backward pass returns ∂loss/∂y. Then ∂loss/∂W = (∂loss/∂y)ᵀ x, and `adapter.masked_lora_grad`
computes the gradients of the adapter from x and ∂loss/∂y.

Shapes: n sequences, t tokens, d hidden, h heads of e = d / h channels each, g ≤ h key/value heads, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference._checks import Array

Ids = NDArray[np.int64]

INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
"""The projections of a block in order of use, each with the name of its input; some share one input."""
PROJECTIONS = tuple(INPUT_OF)
IGNORED = -100
"""The label of a token that the loss ignores."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. A projection's weight is (out, in); o and down have `hidden` outputs.

    head_dim: channels of one head; default hidden / heads. A model that has lost heads keeps that of its dense model.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    head_dim: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim:
            if self.hidden % (2 * self.heads):
                raise ValueError(f"hidden is {self.hidden}; allowed: a multiple of twice heads, {2 * self.heads}")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; allowed: a divisor of heads, {self.heads}")


@dataclass(frozen=True)
class Block:
    """One decoder block: the gains (d,) of its two norms and the weights (out, in) of its seven projections by name.

    biases: (out,) of the projections that have one, such as queries, keys and values in Qwen2. The width of the MLP may
    differ between blocks.
    """

    attention_norm: Array
    mlp_norm: Array
    weights: dict[str, Array]
    biases: dict[str, Array] = field(default_factory=dict)

    def project(self, name: str, x: Array) -> Array:
        """Compute y (..., out) = x Wᵀ + b of one projection."""
        return x @ self.weights[name].T + self.biases.get(name, 0.0)


@dataclass(frozen=True)
class Llama:
    """A model: embedding (v, d), blocks, gain (d,) of the last norm, head (v, d). If tied, the head is the embedding."""

    sizes: Sizes
    embedding: Array
    blocks: tuple[Block, ...]
    norm: Array
    head: Array

    def with_weights(self, weights: list[dict[str, Array]]) -> Llama:
        """Return the same model with other projections."""
        blocks = tuple(replace(block, weights=new) for block, new in zip(self.blocks, weights, strict=True))
        return replace(self, blocks=blocks)


@dataclass(frozen=True)
class BlockTrace:
    """The intermediate results of one block: its input and output (n, t, d) and all that the gradient needs.

    inputs: the four inputs (n, t, in) of the projections, by the names of `INPUT_OF`; pruning reads them.
    query, key, value: (n, h, t, e). Queries and keys are rotated; keys and values are repeated for all heads that share
    them. attention: (n, h, t, t), rows sum to 1. middle: the hidden state between attention and MLP. gate, up: (n, t, m).
    """

    hidden: Array
    inputs: dict[str, Array]
    query: Array
    key: Array
    value: Array
    attention: Array
    middle: Array
    gate: Array
    up: Array
    output: Array


@dataclass(frozen=True)
class Trace:
    """The intermediate results of a forward pass: the traces of the blocks and the logits (n, t, v)."""

    blocks: tuple[BlockTrace, ...]
    logits: Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Scale each token's channels to root mean square 1, then multiply by the gain.

    Source: Zhang & Sennrich 2019. x: (..., d). gain: (d,). eps: added to the mean square.
    Returns: (..., d). *Deviation*: none.

    >>> rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), eps=12.5)  # mean square (9 + 16) / 2, plus 12.5: root 5
    array([0.6, 1.6])
    """
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm_grad(x: Array, gain: Array, eps: float, grad: Array) -> Array:
    """Compute ∂loss/∂x of `rms_norm`, from grad = ∂loss/∂y.

    Source: with r = (mean x² + ε)^(-1/2) and y = γ r x: ∂r/∂x_j = -r³ x_j / d. x, grad: (..., d). gain: (d,).
    Returns: (..., d). *Deviation*: none.

    >>> rms_norm_grad(np.array([1.0, 1.0]), np.ones(2), 0.0, np.array([1.0, 1.0]))  # the norm ignores the scale
    array([0., 0.])
    """
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    grad = grad * gain
    return inverse * grad - inverse**3 * x * np.mean(grad * x, axis=-1, keepdims=True)


def rotary_angles(tokens: int, head_dim: int, theta: float) -> Array:
    """Compute the angle by which token p rotates channel pair i: p · θ^(-2i/e).

    Source: Su et al. 2021 (RoPE). tokens: t. head_dim: e, even. theta: base.
    Returns: (t, e/2), radians. *Deviation*: none.

    >>> rotary_angles(3, 4, 100.0)  # frequencies 1 and 100^(-2/4) = 0.1
    array([[0. , 0. ],
           [1. , 0.1],
           [2. , 0.2]])
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.arange(tokens)[:, None] * frequencies


def rotate(x: Array, angles: Array) -> Array:
    """Rotate channel pairs (i, i + e/2) by their token's angles. Rotating by -angles is the inverse, and the gradient.

    Source: RoPE, in the half-split pairing of Hugging Face's LLaMA. x: (..., t, e). angles: (t, e/2).
    Returns: (..., t, e).
    *Deviation*: the RoPE paper pairs channels (2i, 2i + 1). Hugging Face's LLaMA checkpoints are permuted to match.

    >>> rotate(np.array([[1.0, 0.0]]), np.array([[np.pi / 2]])).round(12)  # a quarter turn
    array([[0., 1.]])
    """
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Compute exp(x) / Σ exp(x) over the last axis.

    Source: definition. Subtracting the row's maximum first does not change the result. x: (..., k); -inf gives exactly 0.
    Returns: (..., k). *Deviation*: none.

    >>> softmax(np.log([1.0, 3.0]))
    array([0.25, 0.75])
    """
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Compute the logarithm of `softmax` without rounding a small probability to 0.

    Source: definition. x: (..., k). Returns: (..., k). *Deviation*: none.

    >>> log_softmax(np.array([0.0, -1000.0]))  # softmax itself would round the second to 0
    array([    0., -1000.])
    """
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def silu(x: Array) -> Array:
    """Compute x · σ(x), the gate of SwiGLU.

    Source: Shazeer 2020. x: any shape. Returns: the same shape.
    *Deviation*: none.

    >>> silu(np.array([0.0, np.log(3.0)])).round(12)  # σ(log 3) = 3/4
    array([0.        , 0.82395922])
    """
    return x * _sigmoid(x)


def silu_grad(x: Array) -> Array:
    """Compute d silu / dx = σ(x) (1 + x (1 - σ(x))).

    Source: product rule. x: any shape. Returns: the same shape.
    *Deviation*: none.

    >>> silu_grad(np.array([0.0]))
    array([0.5])
    """
    sigma = _sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


def _sigmoid(x: Array) -> Array:
    # exp(-x) would overflow; tanh saturates.
    return 0.5 * (1 + np.tanh(0.5 * x))


def _split_heads(x: Array, heads: int) -> Array:
    """Reshape (n, t, heads · e) → (n, heads, t, e)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _join_heads(x: Array) -> Array:
    """Reshape (n, heads, t, e) → (n, t, heads · e)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def block_forward(block: Block, hidden: Array, sizes: Sizes) -> BlockTrace:
    """Run one decoder block: causal attention with grouped keys and values, then SwiGLU, both with residuals.

    Source: LLaMA (Touvron et al. 2023); grouped queries (Ainslie et al. 2023). hidden: (n, t, d).
    Returns: the trace; pruning reads its `inputs`, and its `output` (n, t, d) is the next block's `hidden`.
    *Deviation*: none from LLaMA. Norm and softmax are float64 here; Hugging Face computes them in float32 for any dtype.

    >>> zero = {name: np.zeros((2, 2)) for name in PROJECTIONS}
    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1)
    >>> trace = block_forward(Block(np.ones(2), np.ones(2), zero), np.ones((1, 2, 2)), sizes)
    >>> trace.output[0, 0]  # all weights are 0, so only the residual is left
    array([1., 1.])
    >>> trace.attention[0, 0]  # and each token attends evenly to itself and all earlier tokens
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    eps = sizes.norm_eps
    tokens = hidden.shape[1]
    angles = rotary_angles(tokens, sizes.head_dim, sizes.rope_theta)
    shared = sizes.heads // sizes.kv_heads

    qkv = rms_norm(hidden, block.attention_norm, eps)
    query = rotate(_split_heads(block.project("q", qkv), sizes.heads), angles)
    key = np.repeat(rotate(_split_heads(block.project("k", qkv), sizes.kv_heads), angles), shared, axis=1)
    value = np.repeat(_split_heads(block.project("v", qkv), sizes.kv_heads), shared, axis=1)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(sizes.head_dim)
    attention = softmax(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))
    heads = _join_heads(attention @ value)
    middle = hidden + block.project("o", heads)

    gate_up = rms_norm(middle, block.mlp_norm, eps)
    gate, up = block.project("gate", gate_up), block.project("up", gate_up)
    down = silu(gate) * up
    output = middle + block.project("down", down)

    inputs = {"qkv": qkv, "o": heads, "gate_up": gate_up, "down": down}
    return BlockTrace(hidden, inputs, query, key, value, attention, middle, gate, up, output)


def block_backward(block: Block, trace: BlockTrace, sizes: Sizes, grad: Array) -> tuple[Array, dict[str, Array]]:
    """Differentiate `block_forward`, its lines in reverse.

    Source: chain rule. grad: ∂loss/∂output (n, t, d).
    Returns: ∂loss/∂hidden (n, t, d), and by projection ∂loss/∂y (n, t, out) of its output y = x Wᵀ + b, where x is
    `trace.inputs[INPUT_OF[name]]`. *Deviation*: none.

    >>> zero = {name: np.zeros((2, 2)) for name in PROJECTIONS}
    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1)
    >>> block = Block(np.ones(2), np.ones(2), zero)
    >>> trace = block_forward(block, np.ones((1, 1, 2)), sizes)
    >>> grad_hidden, grads = block_backward(block, trace, sizes, np.ones((1, 1, 2)))
    >>> grad_hidden[0, 0], grads["down"][0, 0], grads["up"][0, 0]  # all weights are 0: only the residual has a gradient
    (array([1., 1.]), array([1., 1.]), array([0., 0.]))
    """
    w, eps = block.weights, sizes.norm_eps
    angles = rotary_angles(grad.shape[1], sizes.head_dim, sizes.rope_theta)

    # MLP: output = middle + (silu(gate) ⊙ up) Wdownᵀ
    grads = {"down": grad}
    grad_down = grad @ w["down"]
    grads["gate"] = grad_down * trace.up * silu_grad(trace.gate)
    grads["up"] = grad_down * silu(trace.gate)
    grad_gate_up = grads["gate"] @ w["gate"] + grads["up"] @ w["up"]
    grad_middle = grad + rms_norm_grad(trace.middle, block.mlp_norm, eps, grad_gate_up)

    # Attention: middle = hidden + (P V) Woᵀ, P = softmax(Q Kᵀ / √e)
    grads["o"] = grad_middle
    grad_heads = _split_heads(grad_middle @ w["o"], sizes.heads)
    grad_attention = grad_heads @ trace.value.swapaxes(-1, -2)
    weighted = grad_attention * trace.attention
    grad_scores = weighted - trace.attention * weighted.sum(axis=-1, keepdims=True)
    grad_scores = grad_scores / np.sqrt(sizes.head_dim)
    grad_value = trace.attention.swapaxes(-1, -2) @ grad_heads
    grads["q"] = _join_heads(rotate(grad_scores @ trace.key, -angles))
    grads["k"] = _join_heads(rotate(_sum_shared(grad_scores.swapaxes(-1, -2) @ trace.query, sizes.kv_heads), -angles))
    grads["v"] = _join_heads(_sum_shared(grad_value, sizes.kv_heads))
    grad_qkv = grads["q"] @ w["q"] + grads["k"] @ w["k"] + grads["v"] @ w["v"]
    grad_hidden = grad_middle + rms_norm_grad(trace.hidden, block.attention_norm, eps, grad_qkv)
    return grad_hidden, grads


def _sum_shared(grad: Array, kv_heads: int) -> Array:
    """Sum the gradients of all heads that share a key or value head: (n, h, t, e) → (n, g, t, e)."""
    n, heads, tokens, channels = grad.shape
    return grad.reshape(n, kv_heads, heads // kv_heads, tokens, channels).sum(axis=2)


def forward(model: Llama, ids: Ids) -> Trace:
    """Run the whole model: embedding, blocks, norm, head.

    Source: LLaMA. ids: token ids (n, t), from 0 to v - 1.
    Returns: the trace, with logits (n, t, v); the logits at token p predict token p + 1.
    *Deviation*: none, see `block_forward`.

    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1, norm_eps=0.0)
    >>> model = Llama(sizes, np.ones((2, 2)), (), np.ones(2), np.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> forward(model, np.array([[0]])).logits  # no blocks: the embedding (1, 1), times each row of the head
    array([[[1., 2.]]])
    """
    hidden = model.embedding[_token_ids("ids", ids, model.sizes.vocabulary)]
    traces: list[BlockTrace] = []
    for block in model.blocks:
        traces.append(block_forward(block, hidden, model.sizes))
        hidden = traces[-1].output
    return Trace(tuple(traces), rms_norm(hidden, model.norm, model.sizes.norm_eps) @ model.head.T)


def backward(model: Llama, trace: Trace, grad_logits: Array) -> list[dict[str, Array]]:
    """Differentiate `forward` back to the first block's projections.

    Source: chain rule. grad_logits: ∂loss/∂logits (n, t, v). The model needs at least one block.
    Returns: for each block ∂loss/∂y by projection, see `block_backward`. Embedding, norms and head are frozen.
    *Deviation*: none.

    >>> zero = {name: np.zeros((2, 2)) for name in PROJECTIONS}
    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1, norm_eps=0.0)
    >>> model = Llama(sizes, np.ones((2, 2)), (Block(np.ones(2), np.ones(2), zero),), np.ones(2), np.eye(2))
    >>> trace = forward(model, np.array([[0]]))  # all weights are 0: the block returns its input (1, 1)
    >>> backward(model, trace, np.array([[[1.0, -1.0]]]))[0]["down"]
    array([[[ 1., -1.]]])
    """
    grad = rms_norm_grad(trace.blocks[-1].output, model.norm, model.sizes.norm_eps, grad_logits @ model.head)
    grads: list[dict[str, Array]] = []
    for block, block_trace in zip(reversed(model.blocks), reversed(trace.blocks), strict=True):
        grad, of_block = block_backward(block, block_trace, model.sizes, grad)
        grads.insert(0, of_block)
    return grads


def weight_gradients(model: Llama, ids: Ids) -> list[dict[str, Array]]:
    """Compute the gradient of the mean cross-entropy of predicting each next token, by every projection's weight.

    Source: ∂loss/∂W = Σ_tok (∂loss/∂y) xᵀ for y = W x. ids: token ids (n, t); the first token of a sequence is not predicted.
    Returns: for each block G (out, in) by projection. One token: nothing is predicted, and all gradients are 0.
    *Deviation*: none.
    """
    trace = forward(model, ids)
    grad_logits = cross_entropy(trace.logits, ids)[1] / max(1, label_count(ids))
    return [
        {name: np.einsum("nto,nti->oi", grad, block.inputs[INPUT_OF[name]]) for name, grad in backward_of_block.items()}
        for block, backward_of_block in zip(trace.blocks, backward(model, trace, grad_logits), strict=True)
    ]


def _token_ids(name: str, value: Ids, vocabulary: int, least: int = 0) -> Ids:
    ids = np.asarray(value)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {ids.dtype}; allowed: integers")
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"{name} has shape {ids.shape}; allowed: (n, t), none of them 0")
    if ids.min() < least or ids.max() >= vocabulary:
        raise ValueError(f"{name} holds {ids.min()} to {ids.max()}; allowed: {least} to {vocabulary - 1}")
    return ids


def _labels(labels: Ids, logits: Array) -> Ids:
    if np.ndim(logits) != 3 or np.shape(labels) != np.shape(logits)[:2]:
        raise ValueError(
            f"labels has shape {np.shape(labels)}; allowed: {np.shape(logits)[:2]}, the first two axes of logits"
        )
    checked = np.where(np.equal(labels, IGNORED), 0, labels)
    _token_ids("labels", checked, np.shape(logits)[-1])
    return np.asarray(labels)


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
