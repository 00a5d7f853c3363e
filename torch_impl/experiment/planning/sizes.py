"""The shapes of a model, and the memory that each piece of work on it needs.

Peaks count the memory of tensors, like PyTorch's allocator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from torch_impl.engine.decoder import Decoder
from torch_impl.engine.loss import AT_ONCE
from torch_impl.masks.method import GradientStatistic, Method

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockShapes:
    """Shapes of one decoder block: all its parameters without adapters, and its projections (out, in)."""

    parameters: tuple[Shape, ...]
    projections: tuple[tuple[int, int], ...]

    @property
    def prunable(self) -> int:
        """Return the number of prunable weights."""
        return _numbers(self.projections)


@dataclass(frozen=True)
class Sizes:
    """Shapes of a model in one dtype. Methods return bytes, properties numbers of elements."""

    itemsize: int
    """Bytes of a number."""
    blocks: tuple[BlockShapes, ...]
    outside: tuple[Shape, ...]
    """Shapes of all parameters outside the decoder blocks."""
    inputs: tuple[int, ...]
    """Width of each input that projections share; the largest of all blocks."""
    hidden: int
    width: int
    """Inner width of the MLP."""
    gated: bool
    keys: int
    """Key channels of the attention; fewer than hidden channels with grouped queries."""
    vocabulary: int

    @classmethod
    def of(cls, decoder: Decoder, dtype: torch.dtype) -> Sizes:
        """Read the shapes of a model, which may have no weights or be sharded."""
        family, model = decoder.family, decoder.model
        weights = [family.weights_of(block) for block in decoder.blocks]
        blocks = tuple(
            BlockShapes(
                parameters=tuple(tuple(p.shape) for n, p in block.named_parameters() if not n.endswith((".A", ".B"))),
                projections=tuple((int(w.shape[0]), int(w.shape[1])) for w in of_block.values()),
            )
            for block, of_block in zip(decoder.blocks, weights, strict=True)
        )
        outside = (p for name, p in model.named_parameters() if not name.startswith(f"{family.blocks}."))
        inputs = tuple(max(int(of_block[group[0]].shape[1]) for of_block in weights) for group in family.inputs)
        names = family.projections
        return cls(
            itemsize=dtype.itemsize,
            blocks=blocks,
            outside=tuple(tuple(parameter.shape) for parameter in outside),
            inputs=inputs,
            hidden=int(weights[0][names[-1]].shape[0]),
            width=inputs[-1],
            gated=len(family.inputs[-2]) == 2,
            keys=int(weights[0][names[1]].shape[0]),
            vocabulary=int(model.get_output_embeddings().weight.shape[0]),  # type: ignore[operator]
        )

    @property
    def parameters(self) -> int:
        """Return the number of parameters of the model."""
        return _numbers(self.outside) + sum(_numbers(block.parameters) for block in self.blocks)

    @property
    def prunable(self) -> int:
        """Return the number of prunable weights."""
        return sum(block.prunable for block in self.blocks)

    @property
    def largest_prunable(self) -> int:
        """Return the largest number of prunable weights of a block."""
        return max(block.prunable for block in self.blocks)

    @property
    def entries_per_rank(self) -> int:
        """Return the number of entries of all adapters per rank."""
        return sum(sum(shape) for block in self.blocks for shape in block.projections)

    @property
    def largest_projection(self) -> int:
        """Return the number of weights of the largest projection."""
        return max(math.prod(shape) for block in self.blocks for shape in block.projections)

    def rows(self, shapes: Iterable[Shape], cards: int) -> int:
        """Return the bytes of the parameters on one of several cards: ⌈rows / N⌉ of each, as FSDP2 pads the last card."""
        return sum(math.ceil(shape[0] / cards) * math.prod(shape[1:]) for shape in shapes) * self.itemsize

    def weights(self, cards: int = 1) -> int:
        """Return the bytes of all weights on each of several cards."""
        return sum(self.rows(block.parameters, cards) for block in self.blocks) + self.rows(self.outside, cards)

    def block(self, cards: int = 1) -> int:
        """Return the bytes of the largest block; gathered from several cards, with padding."""
        return cards * max(self.rows(block.parameters, cards) for block in self.blocks)

    def outside_blocks(self, cards: int = 1) -> int:
        """Return the bytes of all weights outside the blocks; gathered from several cards, with padding."""
        return cards * self.rows(self.outside, cards)

    @property
    def _wide(self) -> int:
        """Return the bytes of a number in float32 at least."""
        return max(4, self.itemsize)

    def adapters(self, rank: int) -> int:
        """Return the bytes of all adapters at a mean rank; gradients need as much, moments twice as much."""
        return rank * self.entries_per_rank * self._wide

    def stream(self, tokens: int) -> int:
        """Return the bytes of the hidden states of `tokens` tokens."""
        return tokens * self.hidden * self.itemsize

    def forward(self, tokens: int) -> int:
        """Return the bytes to compute one decoder block for `tokens` tokens, without gradients."""
        in_mlp = 2 * self.hidden + (3 if self.gated else 2) * self.width
        return tokens * max(in_mlp, 9 * self.hidden) * self.itemsize

    def logits(self, windows: int, seqlen: int) -> int:
        """Return the bytes of the logits of evaluation windows, with one window's float32 copy and log-probabilities."""
        return self.vocabulary * seqlen * (windows * self.itemsize + 2 * self._wide)

    def statistics(self, method: Method) -> int:
        """Return the bytes of a pruning method's statistics of the inputs of one block, or of the gradients by its weights."""
        if isinstance(method.statistic, GradientStatistic):
            return self._wide * self.largest_prunable
        entries = method.statistic.entries if method.statistic is not None else lambda inputs: 0
        return self._wide * sum(entries(inputs) for inputs in self.inputs)

    def calibration(self, method: Method, tokens: int) -> int:
        """Return the peak bytes for gathering a block's statistics from batches of `tokens` tokens and pruning a projection."""
        shapes = {shape for block in self.blocks for shape in block.projections}
        pruning = max(method.workspace(rows, columns, self.itemsize) for rows, columns in shapes)
        return self.statistics(method) + max(self.forward(tokens), pruning)

    def kept_for_backward(self, compiled: bool, recomputed: bool = False) -> int:
        """Return the bytes that a decoder block keeps per token until its backward pass.

        It keeps queries, keys, values and output of the attention. A compiled block also keeps the inputs of its norms and of
        the MLP's non-linear part and recomputes the rest; with `recomputed` one of these too. An uncompiled block keeps the
        inputs of its norms in float32, the inputs of its projections, and all factors of the MLP's product.
        """
        attention = 2 * self.hidden + 2 * self.keys
        if compiled:
            inside = (2 if self.gated else 1) - recomputed
            return (2 * self.hidden + attention + inside * self.width) * self.itemsize
        norms = 2 * self.hidden * self._wide
        mlp = 4 * self.width if self.gated else 2 * self.width
        return norms + (2 * self.hidden + attention + mlp) * self.itemsize

    def reconstruction(self, tokens: int, window: int = 1) -> int:
        """Return the additional bytes for training the weights of a window of blocks with `tokens` tokens at once.

        Per weight: value, gradient and two moments in float32 at least, the merged weight twice, a byte of the mask, and in
        half precision a rounded copy and its gradient. Per token: the activations of each block kept for the backward pass,
        and the error of the last one's output in float32 twice.
        """
        rounded = 2 * self.itemsize if self.itemsize < 4 else 0
        per_weight = 4 * self._wide + 2 * self.itemsize + rounded + 1
        per_token = window * self.kept_for_backward(compiled=False) + 2 * self._wide * self.hidden
        return window * self.largest_prunable * per_weight + tokens * per_token

    def gradients(self, tokens: int) -> int:
        """Return the bytes for the gradients of a block's weights, and for their sum over batches of `tokens` tokens.

        Per weight: the sum in float32 at least; once more for the projection at hand. Per token: the activations kept for the
        backward pass, the block's input and the gradient of its output, and the gradients of the MLP's inner states.
        """
        weights = (self.largest_prunable + self.largest_projection) * self._wide
        states = 2 * self.hidden + (3 if self.gated else 2) * self.width
        return weights + tokens * (self.kept_for_backward(compiled=False) + states * self.itemsize)

    def loss(self, tokens: int, distilled: bool) -> int:
        """Return the bytes for the loss of a training micro-batch.

        They are logits, their gradient, the dense model's logits with `distilled`, and a part of each twice in float32.
        """
        logits = tokens * self.vocabulary
        models = 2 if distilled else 1
        return logits * (1 + models) * self.itemsize + min(logits, AT_ONCE) * 2 * models * self._wide


def _numbers(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
