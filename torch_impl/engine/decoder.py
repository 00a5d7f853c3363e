"""A model with access to its decoder blocks and their projections; the engine works on it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine.families import find_family


class Decoder:
    """A causal-LM model of a known family.

    It stores no weights: `blocks` and `projections` return the model's current modules.

    Errors: ValueError if the model's structure matches no family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family = find_family(model)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the decoder blocks, in order."""
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def body(self) -> nn.Module:
        """Return the model without its head: it embeds token ids, runs the blocks and applies the last norm."""
        return self.model.get_submodule(self.family.blocks.rpartition(".")[0])

    def projections(self, index: int) -> dict[str, nn.Module]:
        """Return the projections of block `index` by name, in order of use."""
        return self.family.projections_of(self.blocks[index])

    def full_name(self, index: int, name: str = "") -> str:
        """Return the full name of module `name` of block `index`; by default that of the block itself."""
        return self.family.full_name(index, name)

    @property
    def weights(self) -> list[torch.Tensor]:
        """Return the weights (out, in) of all projections, block by block."""
        return [weight for block in self.blocks for weight in self.family.weights_of(block).values()]

    @property
    def prunable_weights(self) -> list[int]:
        """Count the prunable weights of each block: the w of LoSA, Eq. 5."""
        return [sum(weight.numel() for weight in self.family.weights_of(block).values()) for block in self.blocks]
