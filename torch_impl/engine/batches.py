"""Training examples and the micro-batches made of them: rows, padding, labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from torch_impl.engine.families import position_limit

IGNORED = -100
# On CUDA, pad rows to a multiple of this many tokens, so that there are few shapes.
FEW_SHAPES = 64
Example = dict[str, torch.Tensor]


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


def unlabelled(example: Example) -> Example:
    """Copy a sequence without labels, so that it adds nothing to loss or gradients."""
    return {**example, "labels": torch.full_like(example["labels"], IGNORED)}


def split(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
