"""Gradients of the adapters for one optimizer step: merged weights, micro-batches, CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from torch_impl.engine import distributed
from torch_impl.engine.adapted_linear import adapters
from torch_impl.engine.batches import IGNORED, Example, collate, label_count, row_multiple, split, unlabelled
from torch_impl.engine.calibration import block_arguments
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.graphs import Captured
from torch_impl.engine.loss import summed_cross_entropy, summed_divergence
from torch_impl.engine.memory import find_executable_batch_size, free_bytes
from torch_impl.engine.settings import TrainingConfig

logger = logging.getLogger(__name__)

# Maximum number of captured shapes.
MOST_GRAPHS = 16
Work = TypeVar("Work")


def sum_loss(model: nn.Module, batch: Example, dense: nn.Module | None) -> torch.Tensor:
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


def add_gradients(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients by `parameters` to theirs one after the other, so that there is never a second set of them."""
    torch.autograd.backward(loss, inputs=parameters)


def _add_together(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Do `add_gradients` in a few kernel launches. The second set of gradients takes less than the activations freed by then."""
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


class Gradients:
    """Computes the gradients of the adapters for each optimizer step; ranks must not change in between.

    If memory allows, merged weights are built once per optimizer step and used by all its micro-batches. Sequences of
    similar length share a micro-batch. On CUDA, micro-batches of a recurring shape are captured as graphs: one launch
    instead of thousands.
    """

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None, config: TrainingConfig) -> None:
        self._model, self._teacher, self._config = model, teacher, config
        self.micro_batch_size = config.per_device_train_batch_size
        self._layers = adapters(model)
        self._device = next(model.parameters()).device
        self._trained = trainable(model)
        self._held = self._layers if self._holds() else []
        # On CUDA use few shapes, so that graphs and compiled kernels are reused.
        self._multiple = row_multiple(model, self._device)
        self._seen: set[torch.Size] = set()
        self._graphs: dict[torch.Size, _Graph] = {}
        self._merges: Captured[None] | None = None
        # None: graphs are not used.
        self._owned: _Owned | None = _Owned(model, teacher) if self._may_capture() else None

    def _holds(self) -> bool:
        if distributed.is_sharded(self._model):
            if self._config.hold_merged == "on":
                raise ValueError("hold_merged is 'on', which several processes do not support; use auto or off")
            return False
        if self._config.compressed:
            return False
        if self._config.hold_merged != "auto" or self._device.type != "cuda":
            return self._config.hold_merged != "off"
        return 2 * sum(layer.weight.nbytes for layer in self._layers) <= free_bytes(self._device)

    def of(self, batch: Sequence[Example]) -> float:
        """Compute the gradients of the mean loss per predicted token of one optimizer step; return that mean.

        Batch, gradients and loss are those of all processes together. Gradients must be zero or None before. If the device
        runs out of memory, micro-batches are halved from then on. Gradients are sums over tokens, so this changes only the
        order of summation.
        """
        self._hold()
        share = 1 / max(1, label_count(batch))
        by_length = sorted(batch, key=lambda example: len(example["input_ids"]))
        own = distributed.split_evenly(by_length, unlabelled)

        def attempt(size: int) -> float:
            if size != self.micro_batch_size:
                self._forget_attempt()
            micro_batches = split(own, size)
            return float(
                sum(self._micro(collate(micro, self._device, self._multiple), share) for micro in micro_batches)
            )

        loss, self.micro_batch_size = find_executable_batch_size(
            attempt, self.micro_batch_size, "per_device_train_batch_size"
        )
        # The optimizer's step comes next; what a caller measures then is of the adapters as they are.
        for layer in self._held:
            layer.outdated = True
        distributed.all_reduce_gradients(self._trained)
        return distributed.all_reduce_number(loss)

    def _may_capture(self) -> bool:
        allowed = self._config.cuda_graphs and not self._config.gradient_checkpointing
        return allowed and self._device.type == "cuda" and not distributed.is_sharded(self._model)

    def _hold(self) -> None:
        """Build the merged weights; on CUDA as one graph, from the second time on."""
        if self._owned is not None and self._owned.moved():
            self._forget_graphs()
        if self._merges is not None:
            self._merges.replay()
            for layer in self._held:
                layer.outdated = False
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
        self._seen.add(shape)
        loss = sum_loss(self._model, batch, self._teacher) * share
        add_gradients(loss, self._trained)
        return loss.detach()

    def _worth_capturing(self, shape: torch.Size) -> bool:
        """Return whether to capture this shape: after one uncaptured micro-batch, which loads kernels and makes gradients.

        Uncaptured and captured passes take as long as Python takes, many times a replay; with a small model they are most of
        the time of a step that meets few batches of each shape.
        """
        return self._owned is not None and shape in self._seen and len(self._graphs) < MOST_GRAPHS

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

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self._models = [part for part in (model, teacher) if part is not None]
        self._trained, self._layers = trainable(model), adapters(model)
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
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batch: Example,
        trained: Sequence[nn.Parameter],
        owned: Sequence[torch.Tensor | None],
        pool: Any,
    ) -> None:
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        self._share = torch.zeros((), device=batch["input_ids"].device)

        def work() -> torch.Tensor:
            loss = sum_loss(model, self._batch, teacher) * self._share
            # A small kernel for each of hundreds of parameters is a few percent of a replay of a small model.
            _add_together(loss, trained)
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
def _fixed_block_arguments(model: PreTrainedModel, batch: Example) -> Iterator[list[dict[str, Any]]]:
    """Give every block the arguments of a pass outside a capture; yield them, because a graph must keep them alive.

    During a capture, transformers always builds an attention mask, which disables the fast attention kernels. Without
    padding masks, the arguments depend on the shape only.
    """
    decoder = Decoder(model)
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


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, A and B of every adapted projection; all others are frozen or empty."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
