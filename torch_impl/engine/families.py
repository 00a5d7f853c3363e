"""Model families: the path of the decoder blocks and the projections in a block.

A family is one entry of `FAMILIES`. A model belongs to it by structure: the path of its list of blocks and the linears in
a block. Its name and class do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import _checks


@dataclass(frozen=True)
class Family:
    """One decoder architecture.

    name: for reports. blocks: path from the causal-LM model to its `nn.ModuleList` of decoder blocks. inputs: the
    projections of a block, grouped by the input they share: one statistic serves a whole group. The groups are what computes
    the attention's heads, what reads them, what computes the MLP's channels, and what reads them.
    """

    name: str
    blocks: str
    inputs: tuple[tuple[str, ...], ...]

    @property
    def reads_heads(self) -> str:
        """Return the projection whose columns read the attention's heads."""
        return self.inputs[1][0]

    @property
    def reads_channels(self) -> str:
        """Return the projection whose columns read the MLP's channels."""
        return self.inputs[3][0]

    def coupled(self, name: str) -> tuple[str, int]:
        """Return the projection that reads the structures of `name`, and the axis of `name` along which they are."""
        group = next(number for number, names in enumerate(self.inputs) if name in names)
        return self.inputs[group | 1][0], group % 2

    @property
    def projections(self) -> tuple[str, ...]:
        """List all projections of a block, in order of use."""
        return tuple(name for group in self.inputs for name in group)

    def projections_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """Return the projections of a decoder block by name, in order of use."""
        return {name: block.get_submodule(name) for name in self.projections}

    def weights_of(self, block: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights (out, in) of a block's projections by name, in order of use."""
        weights: dict[str, Any] = {name: module.weight for name, module in self.projections_of(block).items()}
        return weights

    def key_value_heads(self, block: nn.Module) -> int:
        """Count the key-value heads of a block: the structures that o reads."""
        return self.weights_of(block)[self.inputs[0][1]].shape[0] // self.head_dim(block)

    def head_dim(self, block: nn.Module) -> int:
        """Return the channels of one head; 0 if the attention does not say."""
        return int(getattr(block.get_submodule(self.inside[0].removesuffix(".")), "head_dim", 0))

    @property
    def inside(self) -> tuple[str, ...]:
        """Return the prefixes of the names of modules inside the attention and, if it is one, the MLP's module."""
        parents = (self.reads_heads.rpartition(".")[0], self.reads_channels.rpartition(".")[0])
        return tuple(f"{name}." for name in parents if name)

    def in_attention(self, name: str) -> bool:
        """Return whether a projection belongs to the attention, not to the MLP."""
        return name.startswith("self_attn.")

    def full_name(self, index: int, name: str = "") -> str:
        """Return the full name of module `name` of block `index`; by default that of the block itself."""
        return f"{self.blocks}.{index}.{name}".removesuffix(".")


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILIES = (
    # LLaMA 1-3, Vicuna, Mistral, Qwen2, Qwen3: gated MLP.
    Family(
        "gated",
        "model.layers",
        (_QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    ),
    Family("opt", "model.decoder.layers", (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))),
)


def find_family(model: nn.Module) -> Family:
    """Find the family with the structure of `model`.

    Errors: ValueError listing the known structures if none matches, or if a block has matrices that its family does not
    list, such as a mixture of experts: silently pruning only some of a block's weights would be wrong.
    """
    differs = ""
    for family in FAMILIES:
        try:
            blocks = model.get_submodule(family.blocks)
        except AttributeError:
            continue
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            continue
        other = next((index for index, block in enumerate(blocks) if _matrices(block) != set(family.projections)), None)
        if other is None:
            return family
        found = _matrices(blocks[other])
        apart = {"holds": found - set(family.projections), "lacks": set(family.projections) - found}
        listed = [f"{verb} {_checks.few(sorted(names))}" for verb, names in apart.items() if names]
        differs = f"{family.full_name(other)} {', and '.join(listed)}"
    known = "; ".join(f"{f.name}: {f.blocks}[i].{{{', '.join(f.projections)}}}" for f in FAMILIES)
    raise ValueError(
        f"model {type(model).__name__}: its decoder blocks match no known family: {differs or known}; "
        "to support it, add an entry to FAMILIES in torch_impl/engine/families.py"
    )


def _matrices(block: nn.Module) -> set[str]:
    """Return the names of a block's modules with a matrix: linears, their replacements and all others.

    What a replacement is made of is its own affair: peft's linear holds the original and the adapter.
    """
    found: set[str] = set()
    for name, module in block.named_modules():
        # Plain, adapted and packed linears all have in_features.
        matrix = hasattr(module, "in_features") or any(p.dim() > 1 for p in module.parameters(recurse=False))
        if matrix and not any(name.startswith(f"{outer}.") for outer in found):
            found.add(name)
    return found


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the maximum sequence length of a model with learned positions; None if positions are computed, as rotary ones."""
    positions = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    # Learned positions are an embedding with one row per position and a few extra rows (OPT: two).
    learned = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return positions if positions and any(positions <= rows <= positions + 8 for rows in learned) else None
