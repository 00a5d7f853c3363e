"""Reconstruct pruned blocks: train their kept weights to reproduce the output of the dense blocks.

The kept weights were trained for a block that had all its weights. `reconstruct_block` trains them again, on the
calibration sequences. It minimises e of Eq. 6 (rank.py), the error by which LoSA allocates ranks. It uses no labels and no
fine-tuning tokens, and holds one block in the optimizer at a time. `reconstruct_blocks` does the same for a few blocks that
follow each other, trained together for the output of the last.

Legend: n calibration sequences of t tokens, d channels. A stream is the hidden states of all calibration sequences between
two blocks: the dense stream runs through the dense model, the pruned stream through the pruned one. D is the dense block's
output on the dense stream, S this block's output on the pruned stream; Z the weights in training, M their masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from reference import _checks, adamw, llama
from reference._checks import Array, Mask
from reference.llama import Block, Sizes


def channel_weights(targets: Array) -> Array:
    """Compute the weight of each channel's squared differences in the reconstruction error.

    Source: LoSA, Eq. 6, as a sum over tokens.

        e = Σ_tok Σ_c ω_c (S − D)²_{tok,c},   ω_c = 1 / (d · Σ_tok D²_{tok,c})

    Parameters: targets D (n, t, d). Returns: ω (d,); 0 for a channel that is 0 for all tokens of D. Such a channel has no
    gradient: it counts 1 for any S other than 0.

    *Deviation*: none.

    >>> channel_weights([[[1, 2, 0], [1, 0, 0]]])  # energies 2, 4 and 0; three channels
    array([0.16666667, 0.08333333, 0.        ])
    """
    D = _checks.array("targets", targets, "n", "t", "d")
    energy = (D**2).sum(axis=(0, 1))
    silent = energy == 0
    return np.where(silent, 0.0, 1.0 / (D.shape[2] * np.where(silent, 1.0, energy)))


def reconstruct_block(
    block: Block,
    masks: Mapping[str, Mask],
    inputs: Array,
    targets: Array,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    sizes: Sizes,
) -> Block:
    """Train the kept weights of a block so that its output on `inputs` comes closer to `targets`.

    Source: ours; EBFT (arXiv 2402.12419) first trained a pruned block against the dense one.

        min over Z = M⊙Z of  e(S(Z), D),  starting at M⊙W, by Adam:
        K = ceil(n / batch_size) batches; batch k has the sequences k, k + K, k + 2K, ... of an epoch
        gradient of a batch of b sequences: ∂/∂Z of (n / b) Σ_{tok in batch} Σ_c ω_c (S − D)², times M
        learning rate at step j of J = epochs · K, from 0: learning_rate · (J − j) / J

    Parameters: block, the pruned block with merged weights W; masks M by projection, bool (out, in), True = kept; inputs
    (n, t, d), the pruned stream; targets D (n, t, d), the dense block's output on the dense stream; epochs, 0 returns M⊙W;
    learning_rate, that of the first step; batch_size, sequences per step; sizes of the model.

    Returns: the block with new weights, exactly zero where M is False; norms and biases are unchanged.

    *Deviation*: the paper only measures e. EBFT minimises the plain squared error, with its own stopping rule. Combining
    reconstruction with LoSA's steps, masks and adapters is ours.

    Example: an MLP one unit wide adds 1/2 · down = (3/2, 0) to the input (1, 1); the dense block's output is (3, 1). The
    first step of Adam changes each kept weight by the learning rate; pruned weights stay 0:

    >>> gate = 1.2784645427610738  # silu of it is 1
    >>> mlp = {"gate": np.array([[gate, 0.0]]), "up": np.array([[0.5, 0.0]]), "down": np.array([[3.0], [0.0]])}
    >>> pruned = Block(np.ones(2), np.ones(2), {name: np.zeros((2, 2)) for name in "qkvo"} | mlp)
    >>> masks = {name: weight != 0 for name, weight in pruned.weights.items()}
    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=1, heads=1, kv_heads=1, norm_eps=0.0)
    >>> D = np.array([[[3.0, 1.0]]])
    >>> better = reconstruct_block(pruned, masks, np.ones((1, 1, 2)), D, 1, 0.1, 1, sizes)
    >>> better.weights["up"].round(6), better.weights["down"].round(6).ravel()
    (array([[0.6, 0. ]]), array([3.1, 0. ]))
    """
    return reconstruct_blocks([block], [masks], inputs, targets, epochs, learning_rate, batch_size, sizes)[0]


def reconstruct_blocks(
    blocks: Sequence[Block],
    masks: Sequence[Mapping[str, Mask]],
    inputs: Array,
    targets: Array,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    sizes: Sizes,
) -> list[Block]:
    """Train the kept weights of blocks that follow each other, so that the output of the last comes closer to `targets`.

    Source: ours, as `reconstruct_block`; for quantised weights, CBQ (arXiv 2312.07950) trains windows of blocks together.

        min over all Z of  e(S(Z), D),  S = the last block's output, each fed by the one before it

    Parameters: blocks, one or more, pruned, with merged weights; masks, those of each; inputs (n, t, d), the pruned stream
    before the first; targets (n, t, d), the dense stream after the last; the others as for `reconstruct_block`.

    Returns: the blocks with new weights, exactly zero where their masks are False.

    *Deviation*: as for `reconstruct_block`. CBQ minimises the squared error and a divergence, and trains step sizes of a
    quantiser too.

    Example: two blocks with all weights 0 add nothing. With the targets equal to the inputs nothing has a gradient:

    >>> zero = {name: np.zeros((2, 2)) for name in llama.PROJECTIONS}
    >>> masks = {name: np.ones((2, 2), bool) for name in zero}
    >>> sizes = Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1)
    >>> pruned = [Block(np.ones(2), np.ones(2), zero)] * 2
    >>> first, second = reconstruct_blocks(pruned, [masks] * 2, np.ones((1, 1, 2)), np.ones((1, 1, 2)), 1, 0.1, 1, sizes)
    >>> second.weights["down"]
    array([[0., 0.],
           [0., 0.]])
    """
    inputs = _checks.array("inputs", inputs, "n", "t", "d")
    _checks.same_shape("targets", np.asarray(targets), inputs, "inputs")
    _checks.integer("epochs", epochs, 0)
    _checks.number("learning_rate", learning_rate, 0)
    _checks.integer("batch_size", batch_size, 1)
    if not blocks or len(masks) != len(blocks):
        raise ValueError(
            f"masks has {len(masks)} entries for {len(blocks)} blocks; give one for each of one or more blocks"
        )
    for block, of_block in zip(blocks, masks, strict=True):
        for name, weight in block.weights.items():
            _checks.mask(f"masks[{name!r}]", of_block[name], weight, f"weights[{name!r}]")

    omega = channel_weights(targets)
    batches = math.ceil(len(inputs) / batch_size)
    steps = epochs * batches
    kept = [of_block[name] for block, of_block in zip(blocks, masks, strict=True) for name in block.weights]
    Z = [np.where(M, W, 0.0) for M, W in zip(kept, _weights(blocks), strict=True)]
    moments = adamw.start(Z)
    for step in range(steps):
        rows = slice(step % batches, None, batches)
        share = len(inputs) / len(inputs[rows])
        gradients = _gradients(_with_weights(blocks, Z), inputs[rows], targets[rows], share * omega, sizes)
        masked = [np.where(M, G, 0.0) for M, G in zip(kept, gradients, strict=True)]
        Z, moments = adamw.adamw(Z, masked, moments, learning_rate * (steps - step) / steps, 0.0)
    return _with_weights(blocks, Z)


def _weights(blocks: Sequence[Block]) -> list[Array]:
    """List all projections' weights, block by block."""
    return [weight for block in blocks for weight in block.weights.values()]


def _with_weights(blocks: Sequence[Block], weights: Sequence[Array]) -> list[Block]:
    """Return the blocks with other weights, given in the order of `_weights`."""
    values = iter(weights)
    return [replace(block, weights={name: next(values) for name in block.weights}) for block in blocks]


def _gradients(blocks: Sequence[Block], inputs: Array, targets: Array, omega: Array, sizes: Sizes) -> list[Array]:
    """Compute ∂/∂W of Σ_tok Σ_c ω_c (S − D)² for every projection, in the order of `_weights`."""
    traces, stream = [], inputs
    for block in blocks:
        traces.append(llama.block_forward(block, stream, sizes))
        stream = traces[-1].output
    grad = 2 * omega * (stream - targets)
    found: list[list[Array]] = []
    for block, trace in zip(reversed(blocks), reversed(traces), strict=True):
        grad, of_outputs = llama.block_backward(block, trace, sizes, grad)
        # y = x Wᵀ, so ∂/∂W = (∂/∂y)ᵀ x, summed over all tokens.
        found.append(
            [
                of_outputs[name].reshape(-1, weight.shape[0]).T
                @ trace.inputs[llama.INPUT_OF[name]].reshape(-1, weight.shape[1])
                for name, weight in block.weights.items()
            ]
        )
    return [gradient for of_block in reversed(found) for gradient in of_block]
