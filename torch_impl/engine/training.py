"""Fine-tuning the adapters of one LoSA step: AdamW, warm-up and linear decay, clipping, accumulation, label masking."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from torch_impl import _checks
from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import adapters
from torch_impl.engine.calibration import block_arguments
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.graphs import Captured
from torch_impl.engine.loss import summed_cross_entropy, summed_divergence
from torch_impl.engine.memory import halving
from torch_impl.engine.resume.journal import Journal

logger = logging.getLogger(__name__)

IGNORED = -100
# On CUDA, rows are padded to a multiple of FEW_SHAPES tokens, and at most MOST_GRAPHS shapes are captured.
FEW_SHAPES = 64
MOST_GRAPHS = 16
# A gradient norm above this multiple of max_grad_norm is logged.
EXPLODING = 1e4
Example = dict[str, torch.Tensor]
Work = TypeVar("Work")


@dataclass(frozen=True)
class TrainingConfig:
    """Training of the adapters at each step."""

    finetune: bool = True
    """Train the adapters. Without training, LoSA is progressive pruning."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW (paper: 2e-4 at 7B; small models need much more)."""
    warmup_ratio: float = 0.3
    """Share of the schedule with linear warm-up; the rest decays linearly to 0."""
    weight_decay: float = 0.001
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 0.3
    """Clip gradients to this global norm; 0: no clipping."""
    per_device_train_batch_size: int = 4
    """Sequences per micro-batch, in each process."""
    gradient_accumulation_steps: int = 2
    """Micro-batches per optimizer step. Several processes share the sequences of one optimizer step."""
    lr_schedule: str = "per_step"
    """per_step: warm up and decay the learning rate within every LoSA step (paper); whole_run: once over all steps."""
    loss: str = "ce"
    """ce: cross-entropy with the labels (paper); kl: KL divergence from the dense model's predictions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    hold_merged: str = "auto"
    """Keep all merged weights in memory during an optimizer step. on; off: rebuild them at each use, with less memory and
    more time; auto: on if they take at most half of the device's free memory."""

    compile_blocks: str = "auto"
    """Compile the blocks with torch.compile for calibration and training: on, off or auto (on CUDA, from a billion prunable
    weights)."""
    cuda_graphs: bool = True
    """On CUDA, capture micro-batches of a recurring shape as CUDA graphs."""

    def __post_init__(self) -> None:
        _checks.choice("lr_schedule", self.lr_schedule, ("per_step", "whole_run"))
        _checks.choice("loss", self.loss, ("ce", "kl"))
        _checks.choice("hold_merged", self.hold_merged, ("auto", "on", "off"))
        _checks.choice("compile_blocks", self.compile_blocks, ("auto", "on", "off"))
        _checks.count("per_device_train_batch_size", self.per_device_train_batch_size)
        _checks.count("gradient_accumulation_steps", self.gradient_accumulation_steps)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a finite number, 0 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; allowed: 0 to 1")

    @property
    def batch_size(self) -> int:
        """Return the number of sequences per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def optimizer_steps(self, examples: int) -> int:
        """Return the number of optimizer steps of one epoch over `examples` sequences."""
        return math.ceil(examples / self.batch_size)


def lr_factor(done: int, total: int, warmup_ratio: float) -> float:
    """Return the learning rate at optimizer step `done` (from 0) of `total` as a share of its peak.

    It rises and falls linearly and is never 0, so that even a schedule of one step trains.
    """
    warmup = math.ceil(total * warmup_ratio)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    return (total - done) / max(1, total - warmup)


def collate(examples: Sequence[Example], device: torch.device, multiple: int = 1) -> Example:
    """Collate a micro-batch: one sequence per row, padded on the right to the longest, rounded up to a multiple.

    No attention mask is needed: attention is causal, so no token sees the padding, and padding has no labels. So the fast
    attention kernels can be used.
    """
    length = -(-max(len(example["input_ids"]) for example in examples) // multiple) * multiple

    def rows(name: str, filler: int) -> torch.Tensor:
        wide = [functional.pad(example[name], (0, length - len(example[name])), value=filler) for example in examples]
        return torch.stack(wide).to(device)

    return {"input_ids": rows("input_ids", 0), "labels": rows("labels", IGNORED)}


def row_multiple(model: PreTrainedModel, device: torch.device) -> int:
    """Return what row lengths are rounded up to: on CUDA few shapes, unless padding would exceed the learned positions."""
    limit = position_limit(model)
    return FEW_SHAPES if device.type == "cuda" and (limit or 0) % FEW_SHAPES == 0 else 1


def label_count(examples: Sequence[Example]) -> int:
    """Count the predicted tokens; the first token of a sequence is never predicted."""
    return sum(int((example["labels"][1:] != IGNORED).sum()) for example in examples)


def _unlabelled(example: Example) -> Example:
    """Copy a sequence without labels, so that it adds nothing to loss or gradients."""
    return {**example, "labels": torch.full_like(example["labels"], IGNORED)}


def _sum_loss(model: nn.Module, batch: Example, dense: nn.Module | None) -> torch.Tensor:
    """Sum the loss over the predicted tokens of a micro-batch; if `dense` is given, against its predictions.

    Nothing here waits for the device, so that a CUDA graph can capture it.
    """
    # Each token predicts the next one; the last token predicts nothing.
    targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    if dense is None:
        return summed_cross_entropy(logits.flatten(0, 1), targets.flatten(), IGNORED)
    with torch.no_grad():
        teacher = dense(input_ids=batch["input_ids"], use_cache=False).logits
    return summed_divergence(logits.flatten(0, 1), teacher.flatten(0, 1), (targets != IGNORED).flatten())


def _add_gradients(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Do `loss.backward()`, but add the gradients of all parameters in a few kernel launches."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    totals, added = [], []
    for parameter, gradient in zip(parameters, found, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            totals.append(parameter.grad)
            added.append(gradient)
    if added:
        torch._foreach_add_(totals, added)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing, whose method has different names in different versions of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # The whole block is recomputed, so recomputing one of its products separately saves nothing.
    for layer in adapters(model):
        layer.recomputed = False


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


class Gradients:
    """Computes the gradients of the adapters for each optimizer step; ranks must not change in between.

    If memory allows, merged weights are built once per optimizer step and used by all its micro-batches. Sequences of
    similar length share a micro-batch. On CUDA, micro-batches of a recurring shape are captured as graphs: one launch
    instead of thousands.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, config: TrainingConfig) -> None:
        self._model, self._teacher, self._config = model, teacher, config
        self.micro_batch_size = config.per_device_train_batch_size
        self._layers = adapters(model)
        self._device = next(model.parameters()).device
        self._trained = _trainable(model)
        self._held = self._layers if self._holds() else []
        # On CUDA use few shapes, so that graphs and compiled kernels are reused.
        self._multiple = row_multiple(model, self._device)  # type: ignore[arg-type]
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, _Graph] = {}
        self._merges: Captured[None] | None = None
        # None: graphs are not used.
        self._owned: _Owned | None = _Owned(model, teacher) if self._may_capture() else None

    def _holds(self) -> bool:
        if distributed.is_sharded(self._model):
            if self._config.hold_merged == "on":
                raise ValueError("hold_merged is 'on', which several processes do not support; use auto or off")
            return False
        if self._config.hold_merged != "auto" or self._device.type != "cuda":
            return self._config.hold_merged != "off"
        free = torch.cuda.mem_get_info(self._device)[0]
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 2 * sum(layer.weight.nbytes for layer in self._layers) <= free

    def of(self, batch: Sequence[Example]) -> float:
        """Compute the gradients of the mean loss per predicted token of one optimizer step; return that mean.

        Batch, gradients and loss are those of all processes together. Gradients must be zero or None before. If the device
        runs out of memory, micro-batches are halved from then on. Gradients are sums over tokens, so this changes only the
        order of summation.
        """
        self._hold()
        share = 1 / max(1, label_count(batch))
        by_length = sorted(batch, key=lambda example: len(example["input_ids"]))
        own = distributed.deal(by_length, _unlabelled)

        def attempt(size: int) -> float:
            if size != self.micro_batch_size:
                self._forget_attempt()
            micro_batches = _batches(own, size)
            return float(
                sum(self._micro(collate(micro, self._device, self._multiple), share) for micro in micro_batches)
            )

        loss, self.micro_batch_size = halving(attempt, self.micro_batch_size, "per_device_train_batch_size")
        distributed.total_gradients(self._trained)
        return distributed.total_of(loss)

    def _may_capture(self) -> bool:
        allowed = self._config.cuda_graphs and not self._config.gradient_checkpointing
        return allowed and self._device.type == "cuda" and not distributed.is_sharded(self._model)

    def _hold(self) -> None:
        """Build the merged weights; on CUDA as one graph, from the second time on."""
        if self._owned is not None and self._owned.moved():
            self._forget_graphs()
        if self._merges is not None:
            self._merges.replay()
            return
        self._build_merged()
        if self._owned is not None and any(layer.rank for layer in self._held):
            # Capture without running: the merged weights now exist and keep their addresses.
            self._merges = self._capture(partial(Captured, self._build_merged, self._owned.tensors()))

    def _build_merged(self) -> None:
        for layer in self._held:
            layer.hold()

    def _capture(self, attempt: Callable[[], Work]) -> Work | None:
        """Return what `attempt` captures. If the model cannot be captured, return None and stop using graphs."""
        try:
            return attempt()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            logger.warning("CUDA graph capture failed, so training is slower (%s)", reason)
            self._forget_graphs()
            self._owned = None
            return None

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._seen.clear()
        self._merges = None

    def _forget_attempt(self) -> None:
        """Zero the gradients of the failed attempt, and free the graphs and their memory."""
        self._forget_graphs()
        self._model.zero_grad(set_to_none=False)

    def _micro(self, batch: Example, share: float) -> torch.Tensor:
        shape = batch["input_ids"].shape
        if shape not in self._graphs and self._worth_capturing(shape):
            pool = next(iter(self._graphs.values())).pool if self._graphs else None
            assert self._owned is not None
            graph = self._capture(
                partial(_Graph, self._model, self._teacher, batch, self._trained, self._owned.tensors(), pool)
            )
            if graph is not None:
                self._graphs[shape] = graph
        if shape in self._graphs:
            return self._graphs[shape].replay(batch, share)
        self._seen[shape] += 1
        loss = _sum_loss(self._model, batch, self._teacher) * share
        _add_gradients(loss, self._trained)
        return loss.detach()

    def _worth_capturing(self, shape: torch.Size) -> bool:
        """Return whether to capture this shape: after two uncaptured micro-batches, which compile kernels and gradients."""
        return self._owned is not None and self._seen[shape] >= 2 and len(self._graphs) < MOST_GRAPHS

    def close(self) -> None:
        """Free the merged weights and the graphs."""
        self._forget_graphs()
        for layer in self._held:
            layer.release()

    def __enter__(self) -> Gradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Owned:
    """The tensors that training graphs use by address.

    They are parameters and buffers of the model and the teacher, gradients and merged weights. Graphs keep them alive. If one
    of them is replaced, the graphs are invalid.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None) -> None:
        self._models = [part for part in (model, teacher) if part is not None]
        self._trained, self._layers = _trainable(model), adapters(model)
        self._known: list[torch.Tensor | None] = []

    def tensors(self) -> list[torch.Tensor | None]:
        """Return the current tensors, for a graph to keep alive."""
        self._known = self._replaceable()
        return [*self._known, *(t for part in self._models for t in (*part.parameters(), *part.buffers()))]

    def moved(self) -> bool:
        """Return whether a gradient or merged weight that a graph uses has been replaced."""
        if not self._known:
            return False
        pairs = zip(self._known, self._replaceable(), strict=True)
        return any(before is not None and before is not after for before, after in pairs)

    def _replaceable(self) -> list[torch.Tensor | None]:
        return [*(parameter.grad for parameter in self._trained), *(layer.held for layer in self._layers)]


class _Graph:
    """A captured forward and backward pass for one micro-batch shape; replaying it adds to the gradients.

    Graphs are replayed one after the other, so they share one memory pool.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        batch: Example,
        trained: Sequence[nn.Parameter],
        owned: Sequence[torch.Tensor | None],
        pool: Any,
    ) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        self._share = torch.zeros((), device=batch["input_ids"].device)

        def work() -> torch.Tensor:
            loss = _sum_loss(model, self._batch, teacher) * self._share
            _add_gradients(loss, trained)
            return loss.detach()

        with ExitStack() as stack:
            arguments = [
                stack.enter_context(_fixed_block_arguments(part, self._batch))
                for part in (model, teacher)
                if part is not None
            ]
            self._captured = Captured(work, (owned, arguments, self._batch, self._share), pool)
        self.pool = self._captured.pool

    def replay(self, batch: Example, share: float) -> torch.Tensor:
        """Run the captured passes on other tokens."""
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor)
        self._share.fill_(share)
        return self._captured.replay().clone()


@contextmanager
def _fixed_block_arguments(model: nn.Module, batch: Example) -> Iterator[list[dict[str, Any]]]:
    """Give every block the arguments of a pass outside a capture; yield them, because a graph must keep them alive.

    During a capture, transformers always builds an attention mask, which disables the fast attention kernels. Without
    padding masks, the arguments depend on the shape only.
    """
    decoder = Decoder(model)  # type: ignore[arg-type]
    recorded: list[dict[str, Any]] = block_arguments(decoder, batch["input_ids"])

    def repeat(
        given: dict[str, Any], block: nn.Module, arguments: tuple[Any, ...], _: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return arguments, given

    handles = [
        block.register_forward_pre_hook(partial(repeat, given), with_kwargs=True)
        for block, given in zip(decoder.blocks, recorded, strict=True)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, A and B of every projection; all others are frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module,
    dense: nn.Module,
    examples: Sequence[Example],
    config: TrainingConfig,
    schedule: tuple[int, int],
    description: str = "train",
    on_loss: Callable[[int, float, float], None] | None = None,
    journal: Journal | None = None,
) -> list[float]:
    """Train one epoch over `examples` in order. Return the mean loss per predicted token of every optimizer step.

    schedule: (optimizer steps done, optimizer steps in total) of the learning-rate schedule. The optimizer starts with fresh
    state, because the adapters' shapes have changed. on_loss(step, loss, learning rate) is called after every step. journal:
    resume after the optimizer steps that it has recorded; each step may save a checkpoint.

    Errors: FloatingPointError naming the step if loss or gradient norm is not finite; that step changes no adapter.
    """
    done, total = schedule
    parameters = _trainable(model)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    gradients = Gradients(model, dense if config.loss == "kl" else None, config)
    journal = journal or Journal()
    losses = journal.begin_training(optimizer)
    gradients.micro_batch_size = journal.progress.micro_batch_size or gradients.micro_batch_size
    model.train()
    try:
        batches = list(_batches(examples, config.batch_size))
        left = range(len(losses), len(batches))
        for step in tqdm(left, desc=description, leave=False, disable=not distributed.leads()):
            rate = config.learning_rate * lr_factor(done + step, total, config.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = gradients.of(batches[step])
            journal.progress.micro_batch_size = gradients.micro_batch_size
            _clip(parameters, loss, config, f"{description}, optimizer step {step + 1}")
            optimizer.step()
            # Zero in place: captured graphs add to these tensors.
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss)
            if on_loss is not None:
                on_loss(step, loss, rate)
            journal.trained(last=step + 1 == len(batches))
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
