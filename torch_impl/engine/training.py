"""Fine-tuning, of the adapters of one LoSA step or of a baseline's parameters: AdamW, warm-up and linear decay, clipping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine.adapted_linear import adapters
from torch_impl.engine.batches import Example, split
from torch_impl.engine.gradients import Gradients, add_gradients, trainable
from torch_impl.engine.progress import bar
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.engine.settings import TrainingConfig

logger = logging.getLogger(__name__)

# A gradient norm above this multiple of max_grad_norm is logged.
EXPLODING = 1e4


@dataclass(frozen=True)
class Extra:
    """What a method adds to every optimizer step.

    penalty: a loss of the parameters alone, without the tokens; its gradient is added before clipping. before: called with the
    number of the optimizer step, from 1, when its gradients are clipped and the parameters still those that they belong to.
    after: called with the number of optimizer steps done, right after the optimizer's step and before the gradients are zeroed.
    """

    penalty: Callable[[], torch.Tensor] | None = None
    after: Callable[[int], None] | None = None
    before: Callable[[int], None] | None = None


def lr_factor(done: int, total: int, warmup_ratio: float) -> float:
    """Return the learning rate at optimizer step `done` (from 0) of `total` as a share of its peak.

    It rises and falls linearly and is never 0, so that even a schedule of one step trains.
    """
    warmup = math.ceil(total * warmup_ratio)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return (total - done) / (total - warmup)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, whose method has different names in different versions of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # The whole block is recomputed, so recomputing one of its products separately saves nothing.
    for layer in adapters(model):
        layer.recomputed = False


def checkpoints_activations(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is enabled."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def same_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """At the end, give the model the gradient checkpointing and the hooks of its embeddings that it has now: enabling adds some."""
    enabled, embeddings = checkpoints_activations(model), model.get_input_embeddings()
    hooks, known = set(embeddings._forward_hooks), getattr(model, "_require_grads_hooks", [])
    try:
        yield
    finally:
        if not enabled and checkpoints_activations(model):
            (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        for added in set(embeddings._forward_hooks) - hooks:
            del embeddings._forward_hooks[added]
        if hasattr(model, "_require_grads_hooks"):
            model._require_grads_hooks = known


def train(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    examples: Sequence[Example],
    config: TrainingConfig,
    schedule: tuple[int, int],
    description: str = "train",
    on_loss: Callable[[int, float, float], None] | None = None,
    checkpointer: Checkpointer | None = None,
    extra: Extra | None = None,
) -> list[float]:
    """Train one epoch over `examples` in order. Return the mean loss per predicted token of every optimizer step.

    schedule: (optimizer steps done, optimizer steps in total) of the learning-rate schedule. The optimizer starts with fresh
    state, because the adapters' shapes have changed. on_loss(step, loss, learning rate) is called after every step. checkpointer:
    resume after the optimizer steps that it has recorded; each step may save a checkpoint. extra: see `Extra`; its penalty is not
    part of the losses.

    Errors: FloatingPointError naming the step if loss or gradient norm is not finite; that step changes no adapter.
    """
    extra = extra or Extra()
    done, total = schedule
    parameters = trainable(model)
    on_cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=on_cuda)
    gradients = Gradients(model, dense if config.loss == "kl" else None, config)
    checkpointer = checkpointer or Checkpointer()
    losses = checkpointer.begin_training(optimizer)
    gradients.micro_batch_size = checkpointer.progress.micro_batch_size or gradients.micro_batch_size
    model.train()
    try:
        batches = list(split(examples, config.batch_size))
        left = range(len(losses), len(batches))
        for step in bar(left, description):
            rate = config.learning_rate * lr_factor(done + step, total, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = gradients.of(batches[step])
            checkpointer.progress.micro_batch_size = gradients.micro_batch_size
            if extra.penalty is not None:
                add_gradients(extra.penalty(), parameters)
            _clip(parameters, loss, config, f"{description}, optimizer step {step + 1}")
            if extra.before is not None:
                extra.before(step + 1)
            optimizer.step()
            if extra.after is not None:
                extra.after(step + 1)
            # Zero in place: captured graphs add to these tensors.
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss)
            if on_loss is not None:
                on_loss(step, loss, rate)
            checkpointer.trained(last=step + 1 == len(batches))
    finally:
        gradients.close()
        optimizer.zero_grad()
        model.eval()
    return losses


def _clip(parameters: Sequence[nn.Parameter], loss: float, config: TrainingConfig, where: str) -> None:
    """Clip the gradients to max_grad_norm. Errors: FloatingPointError if they or the loss are not finite."""
    bound = config.max_grad_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
    if not math.isfinite(loss) or not math.isfinite(norm):
        clipping = f"max_grad_norm (now {bound})" if bound < math.inf else "set max_grad_norm (now 0, no clipping)"
        raise FloatingPointError(
            f"{where}: loss {loss}, gradient norm {norm}; "
            f"lower learning_rate (now {config.learning_rate}) or {clipping}"
        )
    if norm > EXPLODING * bound:
        logger.warning("%s: gradient norm %.3g, clipped to %g", where, norm, bound)
