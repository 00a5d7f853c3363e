"""The rows and columns that go together in a block, written out, and the scores of structures by autograd."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional

from torch_impl.engine.decoder import Decoder


def lines(decoder: Decoder, index: int) -> list[tuple[str, int, str, int]]:
    """(projection, its axis of structures, what reads them, rows or columns of one) of a block, written out."""
    family, block = decoder.family, decoder.blocks[index]
    o, down = family.projections[3], family.projections[-1]
    size = block.self_attn.head_dim
    heads = len(block.get_submodule(family.projections[1]).weight) // size
    shared = len(block.get_submodule(family.projections[0]).weight) // size // heads
    q, k, v = family.projections[:3]
    attention = [(q, 0, o, shared * size), (k, 0, o, size), (v, 0, o, size), (o, 1, o, shared * size)]
    return [*attention, *((name, 0, down, 1) for name in family.projections[4:-1]), (down, 1, down, 1)]


def scores_by_autograd(decoder: Decoder, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Σ |w · ∂loss/∂w| over all rows and columns of each structure, by one backward pass of the whole model."""
    model = copy.deepcopy(decoder.model).requires_grad_(True)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    found: list[dict[str, torch.Tensor]] = []
    for index in range(len(decoder.blocks)):
        of_block: dict[str, torch.Tensor] = {}
        for name, axis, reader, width in lines(decoder, index):
            weight = Decoder(model).blocks[index].get_submodule(name).weight
            score = (weight * weight.grad).abs().sum(1 - axis)
            runs = torch.stack([score[start : start + width].sum() for start in range(0, len(score), width)])
            of_block[reader] = of_block.get(reader, 0) + runs.detach()
        found.append(of_block)
    return found
