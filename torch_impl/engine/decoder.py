"""A model together with where it keeps its decoder blocks and their projections: what the engine works on."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from torch_impl.engine.families import find_family


class Decoder:
    """A causal-LM model of a known family.

    Holds no weights of its own: `blocks` and `projections` are the model's modules as they are now.

    Errors: ValueError if the model's structure matches no family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family = find_family(model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        blocks = self.model.get_submodule(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def body(self) -> nn.Module:
        """The module that embeds token ids, runs the blocks and applies the last norm: the model without its head."""
        return self.model.get_submodule(self.family.blocks.rpartition(".")[0])

    def projections(self, index: int) -> dict[str, nn.Module]:
        """The projections of block `index` by name, in order of use."""
        return self.family.projections_of(self.blocks[index])

    def full_name(self, index: int, name: str = "") -> str:
        """Name in the model of what block `index` calls `name`; of the block itself by default."""
        return self.family.full_name(index, name)

    @property
    def prunable_weights(self) -> list[int]:
        """Number of prunable weights of each block: the w of LoSA, Eq. 5."""
        return [sum(weight.numel() for weight in self.family.weights_of(block).values()) for block in self.blocks]
