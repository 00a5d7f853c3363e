"""Sizes of one model, and the bytes that each piece of work on it takes. Peaks are of tensors, as PyTorch's allocator counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from torch_impl.engine.families import Family, decoder_blocks, prunable_weights, weight_of
from torch_impl.engine.loss import AT_ONCE
from torch_impl.engine.memory import bytes_in_training
from torch_impl.masks.select import SORTED_AT_ONCE


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model in one dtype; numbers of elements unless they are said to be bytes."""

    itemsize: int
    parameters: int
    outside: int
    """Parameters that lie outside the decoder blocks."""
    largest_block: int
    prunable_of_blocks: list[int]
    entries_per_rank: int
    """Of all adapters, for one rank."""
    largest_projection: int
    inputs: list[int]
    """Inputs of each group of projections that share them."""
    hidden: int
    width: int
    """Of the MLP inside."""
    gated: bool
    keys: int
    """Key channels of the attention: fewer than hidden ones with grouped queries."""
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module, family: Family, dtype: torch.dtype) -> Sizes:
        """Read off a model, which needs no weights."""
        blocks = decoder_blocks(model, family)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        of_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
        weights = [weight_of(blocks[0], name) for name in family.projections]
        inputs = [weight_of(blocks[0], group[0]).shape[1] for group in family.inputs]
        head = model.get_output_embeddings().weight  # type: ignore[operator]
        return cls(
            itemsize=dtype.itemsize,
            parameters=parameters,
            outside=parameters - sum(of_blocks),
            largest_block=max(of_blocks),
            prunable_of_blocks=prunable_weights(model, family),
            entries_per_rank=len(blocks) * sum(sum(weight.shape) for weight in weights),
            largest_projection=max(weight.numel() for weight in weights),
            inputs=inputs,
            hidden=weights[-1].shape[0],
            width=inputs[-1],
            gated=len(family.inputs[-2]) == 2,
            keys=weights[1].shape[0],
            vocabulary=head.shape[0],
        )

    def stream(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.hidden * self.itemsize

    def forward(self, tokens: int) -> int:
        """Bytes that one decoder block takes to be computed for so many tokens, without gradients."""
        in_mlp = 2 * self.hidden + (3 if self.gated else 2) * self.width
        return tokens * max(in_mlp, 9 * self.hidden) * self.itemsize

    def logits(self, windows: int, seqlen: int) -> int:
        """Bytes of the logits of evaluation windows, one of them in float32 at least and once more as log-probabilities."""
        return self.vocabulary * seqlen * (windows * self.itemsize + 2 * max(4, self.itemsize))

    def pruning(self, method: str) -> int:
        """Bytes that pruning one projection takes beside its weight, statistics of the block's inputs included."""
        wide = max(4, self.itemsize)
        entries = self.largest_projection
        sorting = min(entries, SORTED_AT_ONCE) * 36 if method == "wanda" else entries * 36
        if method != "sparsegpt":
            return max(entries * (2 * wide + 3) + sorting, entries * (3 * wide + self.itemsize + 2))
        return self._hessians() + max(5 * max(self.inputs) ** 2 * wide, entries * (4 * wide + 3))

    def _hessians(self) -> int:
        return sum(inputs**2 for inputs in self.inputs) * max(4, self.itemsize)

    def calibration(self, method: str, tokens: int) -> int:
        """Bytes that gathering a block's statistics from batches of so many tokens, or pruning it, takes at most."""
        gathering = self.forward(tokens) + (self._hessians() if method == "sparsegpt" else 0)
        return max(gathering, self.pruning(method))

    def kept_for_backward(self, compiled: bool, recomputed: bool = False) -> int:
        """Bytes that a decoder block keeps of one token until its backward pass.

        Queries, keys, values and output of the attention; and if the block is compiled, the inputs of its norms and of the
        MLP's non-linear part, of which the rest is made again, and one of these too if it is recomputed; else the inputs
        of its norms in float32, those of its projections, and all that the MLP's product is made of.
        """
        attention = 2 * self.hidden + 2 * self.keys
        if compiled:
            inside = (2 if self.gated else 1) - recomputed
            return (2 * self.hidden + attention + inside * self.width) * self.itemsize
        norms = 2 * self.hidden * max(4, self.itemsize)
        mlp = 4 * self.width if self.gated else 2 * self.width
        return norms + (2 * self.hidden + attention + mlp) * self.itemsize

    def reconstruction(self, tokens: int) -> int:
        """Bytes that training the weights of one block takes beside them, with so many tokens at once: values, gradients and two
        moments in float32 at least, the masks, the merged weights twice, in half precision also a rounded copy and its
        gradients, what the block keeps for its backward pass, and its output's error."""
        per_token = self.kept_for_backward(compiled=False) + 2 * max(4, self.itemsize) * self.hidden
        return max(self.prunable_of_blocks) * bytes_in_training(self.itemsize) + tokens * per_token

    def loss(self, tokens: int, distilled: bool) -> int:
        """Bytes of what the loss of a training micro-batch needs: logits, their gradient, the dense model's logits if it learns
        from them, and a part of each twice in float32 at least."""
        wide, logits = max(4, self.itemsize), tokens * self.vocabulary
        models = 2 if distilled else 1
        return logits * (1 + models) * self.itemsize + min(logits, AT_ONCE) * 2 * models * wide

    def working(self, method: str, calibration_tokens: int, evaluation: tuple[int, int]) -> int:
        """Bytes of the device that streamed pruning takes beside what lies outside the blocks and the hidden states:
        a block, the next one, and the largest piece of work. evaluation: windows at once and their length."""
        work = max(
            self.calibration(method, calibration_tokens),
            self.forward(evaluation[0] * evaluation[1]),
            self.logits(*evaluation),
        )
        return 2 * self.largest_block * self.itemsize + work
