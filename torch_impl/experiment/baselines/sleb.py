"""SLEB: remove whole blocks by the loss without them. Formula: reference/sleb.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from torch_impl.engine.calibration import Stream, start_stream
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradient_sweep import next_token_loss, predicted_tokens
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.sleb import remove_blocks, removed_blocks

# Sequences whose logits are computed at once: with a large vocabulary they take more memory than a block.
AT_ONCE = 8
# What configurations say of each block: the kind of attention, and whether it has positions.
BY_BLOCK = ("layer_types", "no_rope_layers")


class LossWithout:
    """The loss of a model with some of its blocks, on token ids (n, t).

    Candidates are tried from the front, so that the hidden states before the first difference to the last call are kept.
    """

    def __init__(self, decoder: Decoder, ids: torch.Tensor, batch_size: int) -> None:
        self._decoder = decoder
        self._start = start_stream(decoder, ids, batch_size)
        self._shared = self._start.clone()
        self._passed: tuple[int, ...] = ()
        self._last: tuple[int, ...] = ()

    def __call__(self, left: tuple[int, ...]) -> float:
        """Compute the mean cross-entropy per predicted token with these blocks, by index."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, self._last, strict=False))
        shared = tuple(index for index, _ in pairs)
        if shared[: len(self._passed)] != self._passed:
            self._shared, self._passed = self._start.clone(), ()
        self._advance(self._shared, shared[len(self._passed) :])
        self._passed, self._last = shared, left
        stream = self._shared.clone()
        self._advance(stream, left[len(shared) :])
        pieces = (slice(start, start + AT_ONCE) for start in range(0, len(stream.ids), AT_ONCE))
        total = sum(float(next_token_loss(self._decoder, stream.ids[rows], stream.states(rows))) for rows in pieces)
        return total / predicted_tokens(stream)

    def _advance(self, stream: Stream, indices: Sequence[int]) -> None:
        for index in indices:
            stream.advance(self._decoder.blocks[index], index)


def remove(decoder: Decoder, material: Material, config: Config) -> None:
    """Remove the blocks that the calibration sequences miss least. Errors: ValueError if fewer than two would be left."""
    blocks, sparsity = len(decoder.blocks), config.prune.final_sparsity
    count = removed_blocks(sparsity, blocks)
    if count + 0.5 < sparsity * blocks:
        raise ValueError(
            f"sparsity_ratio is {sparsity}; SLEB keeps the first and the last of {blocks} blocks, so use "
            f"{(blocks - 2) / blocks:.2g} or less"
        )
    loss = LossWithout(decoder, material.calibration, config.calibration.calibration_batch_size)
    keep(decoder, sorted(set(range(blocks)) - set(remove_blocks(loss, blocks, count).tolist())))


def keep(decoder: Decoder, indices: Sequence[int]) -> None:
    """Leave only these blocks in a model. It is as if it had been made with fewer."""
    config = decoder.model.config
    left = [decoder.blocks[index] for index in indices]
    for place, block in enumerate(left):
        block.self_attn.layer_idx = place  # type: ignore[union-attr]
    for name in BY_BLOCK:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[index] for index in indices])
    decoder.model.set_submodule(decoder.family.blocks, nn.ModuleList(left))
    config.num_hidden_layers = len(left)
