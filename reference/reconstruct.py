"""Reconstruct a block after it is pruned: train its kept weights until it computes what the dense block does.

Pruning decides which weights go; what is left was trained for a block that had all of them. `reconstruct_block` trains
the kept weights of one block on the calibration sequences, and minimises exactly what LoSA measures and hands out ranks
by: e of Eq. 6 (rank.py). No label and no fine-tuning token is used, and one block at a time is in the optimizer.

Legend: n calibration sequences of t tokens, d channels; D the dense block's output on the dense stream, S this block's
output on the pruned stream; Z the weights in training, M their masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from reference import _checks, adamw, llama
from reference._checks import Array, Mask
from reference.llama import Block, Sizes


def channel_weights(targets: Array) -> Array:
    """What a squared difference of 1 in each channel adds to the reconstruction error.

    Source: LoSA, Eq. 6, as a sum over tokens.

        e = Σ_tok Σ_c ω_c (S − D)²_{tok,c},   ω_c = 1 / (d · Σ_tok D²_{tok,c})

    Parameters: targets D (n, t, d). Returns: ω (d,), 0 for a channel that is 0 in all of D: it counts the same wherever S is
    not 0 there, so no small change of a weight makes it better.

    Ties and rounding: none. Errors: ValueError or TypeError naming targets. *Deviation*: none.

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
    """The block with kept weights that make its output on `inputs` closer to `targets`.

    Source: this project; EBFT (arXiv 2402.12419) has the idea of training a pruned block against the dense one.

        min over Z = M⊙Z of  e(S(Z), D),  started at M⊙W, by Adam:
        K = ceil(n / batch_size) batches; batch k has the sequences k, k + K, k + 2K, ... of an epoch
        gradient of a batch of b sequences: ∂/∂Z of (n / b) Σ_{tok in batch} Σ_c ω_c (S − D)², times M
        learning rate at step j of J = epochs · K, from 0: learning_rate · (J − j) / J

    Parameters: block, whose weights W are the pruned block's, merged; masks M by projection, bool (out, in), True = kept;
    inputs (n, t, d), the pruned stream; targets D (n, t, d), the dense block's output on the dense stream; epochs, 0 leaves
    M⊙W; learning_rate, the first step's; batch_size, sequences of a step; sizes of the model.

    Returns: the block with new weights, exactly zero where M is False; its norms and biases as they were.

    Ties and rounding: none. Errors: ValueError or TypeError naming the argument.

    *Deviation*: the paper only measures e. EBFT minimises the plain squared error, with its own stopping rule; the
    combination with LoSA's steps, masks and adapters is this project's.

    An MLP one unit wide that puts out 1/2 · down: (3/2, 0), added to the input (1, 1), where the dense block has (3, 1). The
    first step of Adam is one learning rate long, for gate, up and down alike, and what is pruned stays 0:

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
    inputs = _checks.array("inputs", inputs, "n", "t", "d")
    _checks.same_shape("targets", np.asarray(targets), inputs, "inputs")
    _checks.integer("epochs", epochs, 0)
    _checks.number("learning_rate", learning_rate, 0)
    _checks.integer("batch_size", batch_size, 1)
    for name, weight in block.weights.items():
        _checks.same_shape(f"masks[{name!r}]", masks[name], weight, f"weights[{name!r}]")

    omega = channel_weights(targets)
    batches = math.ceil(len(inputs) / batch_size)
    steps = epochs * batches
    names = tuple(block.weights)
    Z = [np.where(masks[name], block.weights[name], 0.0) for name in names]
    moments = adamw.start(Z)
    for step in range(steps):
        rows = slice(step % batches, None, batches)
        share = len(inputs) / len(inputs[rows])
        current = replace(block, weights=dict(zip(names, Z, strict=True)))
        gradients = _gradients(current, inputs[rows], targets[rows], share * omega, sizes)
        masked = [np.where(masks[name], gradients[name], 0.0) for name in names]
        Z, moments = adamw.adamw(Z, masked, moments, learning_rate * (steps - step) / steps, 0.0)
    return replace(block, weights=dict(zip(names, Z, strict=True)))


def _gradients(block: Block, inputs: Array, targets: Array, omega: Array, sizes: Sizes) -> dict[str, Array]:
    """∂/∂W of Σ_tok Σ_c ω_c (S − D)² for every projection."""
    trace = llama.block_forward(block, inputs, sizes)
    _, of_outputs = llama.block_backward(block, trace, sizes, 2 * omega * (trace.output - targets))
    found = {}
    for name, grad in of_outputs.items():
        x = trace.inputs[llama.INPUT_OF[name]]
        # y = x Wᵀ: ∂/∂W = (∂/∂y)ᵀ x, summed over all tokens.
        found[name] = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return found
