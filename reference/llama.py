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

from reference import _checks
from reference._checks import Array, Ids
from reference.layers import rms_norm, rms_norm_grad, rotary_angles, rotate, silu, silu_grad, softmax
from reference.loss import cross_entropy, label_count

INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
"""The projections of a block in order of use, each with the name of its input; some share one input."""
PROJECTIONS = tuple(INPUT_OF)


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
    hidden = model.embedding[_checks.token_ids("ids", ids, model.sizes.vocabulary)]
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
