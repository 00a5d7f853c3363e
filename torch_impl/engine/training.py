"""Fine-tuning the adapters of one LoSA step: AdamW, warm-up and linear decay, clipping, accumulation, label masking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from torch_impl.engine.layers import AdaptedLinear, adapters, holding

IGNORED = -100
Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingConfig:
    """How the adapters are trained at each step."""

    finetune: bool = True
    """Train at all; without it LoSA is progressive pruning."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW (paper: 2e-4 at 7B; small models want far more)."""
    warmup_ratio: float = 0.3
    """Share of the schedule that warms up linearly; the rest decays linearly to 0."""
    weight_decay: float = 0.001
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 0.3
    """Gradients are clipped to this global norm."""
    per_device_train_batch_size: int = 4
    """Sequences of a micro-batch."""
    gradient_accumulation_steps: int = 2
    """Micro-batches of one optimizer step."""
    lr_schedule: str = "per_step"
    """per_step: the learning rate warms up and decays within every LoSA step (paper); whole_run: once over all steps."""
    loss: str = "ce"
    """ce: cross-entropy with the labels (paper); kl: divergence from the dense model's predictions."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""
    hold_merged: str = "auto"
    """Keep the merged weights of all projections during an optimizer step: on, off (rebuild them at every use: less
    memory, two more passes over the weights) or auto (on, if they take at most half of the device's free memory)."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("lr_schedule", ("per_step", "whole_run")),
            ("loss", ("ce", "kl")),
            ("hold_merged", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a finite number, 0 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; allowed: 0 to 1")

    @property
    def batch_size(self) -> int:
        """Sequences of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def optimizer_steps(self, examples: int) -> int:
        """Optimizer steps that one epoch over `examples` sequences takes."""
        return math.ceil(examples / self.batch_size)


def lr_factor(done: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate for optimizer step number `done` (from 0) of `total`: up linearly, down linearly."""
    warmup = math.ceil(total * warmup_ratio)
    if done < warmup:
        return done / warmup
    return (total - done) / max(1, total - warmup)


def collate(examples: Sequence[Example], device: torch.device) -> Example:
    """Pad examples on the right to the longest; padding is ignored by attention and loss."""
    length = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), length)
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    attention = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        used = len(example["input_ids"])
        ids[row, :used] = example["input_ids"]
        labels[row, :used] = example["labels"]
        attention[row, :used] = 1
    batch = {"input_ids": ids, "labels": labels}
    if not bool(attention.all()):
        batch["attention_mask"] = attention
    return {name: tensor.to(device) for name, tensor in batch.items()}


def label_count(examples: Sequence[Example]) -> int:
    """Tokens whose prediction counts: the first token of a sequence is never predicted."""
    return sum(int((example["labels"][1:] != IGNORED).sum()) for example in examples)


def _sum_loss(model: nn.Module, batch: Example, dense: nn.Module | None) -> torch.Tensor:
    """Loss summed over the predicted tokens of a micro-batch; against the dense model's predictions if it is given."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    logits = model(**inputs, use_cache=False).logits[:, :-1][counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if dense is None:
        return functional.cross_entropy(logits, targets[counted], reduction="sum")
    with torch.no_grad():
        teacher = dense(**inputs, use_cache=False).logits[:, :-1][counted].to(logits)
    return functional.kl_div(
        functional.log_softmax(logits, -1), functional.log_softmax(teacher, -1), reduction="sum", log_target=True
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each block's input for backward; transformers 5.2x calls it by another name than before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in adapters(model) for parameter in (layer.A, layer.B)]


def train(
    model: nn.Module,
    dense: nn.Module,
    examples: Sequence[Example],
    config: TrainingConfig,
    schedule: tuple[int, int],
    description: str = "train",
    on_loss: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """One epoch over `examples` in the order given. Returns the mean loss per predicted token of every optimizer step.

    schedule: (optimizer steps already done, optimizer steps in all) of the learning-rate schedule. The optimizer itself
    starts afresh, since the adapters' shapes have changed. on_loss(step, loss, learning rate) hears every step.

    Errors: FloatingPointError naming the step if loss or gradient norm is not finite.
    """
    done, total = schedule
    layers = adapters(model)
    parameters = _trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    device = next(model.parameters()).device
    teacher = dense if config.loss == "kl" else None
    losses: list[float] = []
    model.train()
    try:
        batches = list(_batches(examples, config.batch_size))
        for step, batch in enumerate(tqdm(batches, desc=description, leave=False)):
            rate = config.learning_rate * lr_factor(done + step, total, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _accumulate(model, teacher, layers, batch, config, device)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
                raise FloatingPointError(
                    f"{description}, optimizer step {step + 1}: loss {loss}, gradient norm {float(norm)}; "
                    f"lower learning_rate (now {config.learning_rate}) or max_grad_norm"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            if on_loss is not None:
                on_loss(step, loss, rate)
    finally:
        model.eval()
    return losses


def _holds(layers: Sequence[AdaptedLinear], config: TrainingConfig, device: torch.device) -> bool:
    """Whether merged weights are kept for the whole optimizer step."""
    if config.hold_merged != "auto" or device.type != "cuda":
        return config.hold_merged != "off"
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 2 * sum(layer.weight.nbytes for layer in layers) <= free


def _accumulate(
    model: nn.Module,
    teacher: nn.Module | None,
    layers: Sequence[AdaptedLinear],
    batch: Sequence[Example],
    config: TrainingConfig,
    device: torch.device,
) -> float:
    """Gradients of the mean loss per predicted token over all micro-batches of one optimizer step; returns that mean."""
    count = max(1, label_count(batch))
    total = 0.0
    with holding(layers if _holds(layers, config, device) else ()):
        for micro in _batches(batch, config.per_device_train_batch_size):
            loss = _sum_loss(model, collate(micro, device), teacher) / count
            loss.backward()
            total += float(loss.detach())
    return total
