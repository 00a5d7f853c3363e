"""Train the adapters of one LoSA step, with a fresh optimizer and explicit gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from reference import adamw, adapter, llama
from reference._checks import Array, Ids
from reference.adapted_linear import Layers, merge_adapters, parameters, with_parameters
from reference.llama import Llama
from reference.loss import cross_entropy, kl_divergence, label_count
from reference.settings import Settings

Example = dict[str, Ids]
"""One training sequence: input_ids (t,) and labels (t,); the loss ignores tokens with label `loss.IGNORED`."""


def train(
    dense: Llama, layers: list[Layers], examples: Sequence[Example], settings: Settings, position: tuple[int, int]
) -> tuple[list[Layers], list[float]]:
    """Train one epoch over `examples` in order, with a fresh optimizer. Also return the loss of every optimizer step.

    position: optimizer steps done and in all of the learning-rate schedule, see `lr_positions`. Errors: FloatingPointError if
    a loss or the norm of its gradients is not finite.
    """
    done, total = position
    moments = adamw.start(parameters(layers))
    losses = []
    for step, start in enumerate(range(0, len(examples), settings.batch_size)):
        batch = examples[start : start + settings.batch_size]
        rate = settings.learning_rate * adamw.lr_factor(done + step, total, settings.warmup_ratio)
        loss, gradients = loss_and_gradients(dense, layers, batch, settings)
        clipped, norm = adamw.clip_by_global_norm(gradients, settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"optimizer step {step + 1}: loss {loss}, gradient norm {norm}")
        trained, moments = adamw.adamw(parameters(layers), clipped, moments, rate, settings.weight_decay)
        layers = with_parameters(layers, trained)
        losses.append(loss)
    return layers, losses


def loss_and_gradients(
    dense: Llama, layers: Sequence[Layers], batch: Sequence[Example], settings: Settings
) -> tuple[float, list[Array]]:
    """Compute the mean loss per predicted token of one optimizer step, and its gradients by the trained parameters.

    Sequences pass the model one by one. The loss is a sum over tokens, so batching and padding would not change it.
    """
    model = merge_adapters(dense, layers, settings.scale)
    count = max(1, sum(label_count(example["labels"][None]) for example in batch))
    loss = 0.0
    gradients = [np.zeros_like(P) for P in parameters(layers)]
    for example in batch:
        ids, labels = example["input_ids"][None], example["labels"][None]
        trace = llama.forward(model, ids)
        if settings.loss == "kl":
            total, grad_logits = kl_divergence(trace.logits, llama.forward(dense, ids).logits, labels)
        else:
            total, grad_logits = cross_entropy(trace.logits, labels)
        loss += total / count
        contributions = _adapter_gradients(layers, trace, llama.backward(model, trace, grad_logits / count), settings)
        gradients = [G + more for G, more in zip(gradients, contributions, strict=True)]
    return loss, gradients


def _adapter_gradients(
    layers: Sequence[Layers], trace: llama.Trace, grads: Sequence[dict[str, Array]], settings: Settings
) -> list[Array]:
    """Compute ∂loss/∂A and ∂loss/∂B of every projection, in order, from ∂loss/∂y of its output."""
    gradients: list[Array] = []
    for of_block, block_trace, grad in zip(layers, trace.blocks, grads, strict=True):
        for name, layer in of_block.items():
            x = block_trace.inputs[llama.INPUT_OF[name]]
            gradients += adapter.masked_lora_grad(x, layer.weight, layer.A, layer.B, settings.scale, grad[name])[1:]
    return gradients


def lr_positions(parts: Sequence[Sequence[Example]], settings: Settings) -> list[tuple[int, int]]:
    """Return (optimizer steps done, total optimizer steps) of the learning-rate schedule at the start of each step."""
    counts = [math.ceil(len(part) / settings.batch_size) for part in parts]
    if settings.lr_schedule == "per_step":
        return [(0, count) for count in counts]
    return [(sum(counts[:t]), sum(counts)) for t in range(len(counts))]


def nothing_to_train(model: Llama, layers: Sequence[Layers], settings: Settings) -> bool:
    """Return whether the loss is kl and no weight is pruned yet, so that the model still equals the dense one.

    This happens at step 1 of 5 with 1:2, say. The gradient is then 0 up to rounding. In float32 the rounding is larger than
    Adam's ε, and Adam divides by the gradient's size, so it would take full steps in random directions. Such a step trains
    nothing: its examples are skipped, and the learning-rate schedule continues after them. With labels (loss ce) the gradient
    is more than rounding, so training takes place.
    """
    unchanged = all(
        np.array_equal(layer.weight, block.weights[name])
        for block, of_block in zip(model.blocks, layers, strict=True)
        for name, layer in of_block.items()
    )
    return settings.loss == "kl" and unchanged
