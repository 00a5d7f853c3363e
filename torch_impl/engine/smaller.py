"""Make a pruned model smaller: leave out the heads and channels that are zero, as far as a configuration can say so.

A configuration of transformers has one number of heads and of channels for all blocks: the largest that any block keeps. Other
blocks keep some of their zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from torch_impl.engine.decoder import Decoder
from torch_impl.masks.structured import cut, kept_structures

# What configurations call the number of channels of the MLP.
CHANNELS = ("intermediate_size", "ffn_dim")
# Configurations with one head for keys and values per query head have no number of them.
KEY_VALUE = "num_key_value_heads"

Kept = list[dict[str, torch.Tensor]]
"""For each block, the structures that stay, bool (u,), by the projection that reads them."""


@dataclass(frozen=True)
class Smaller:
    """A smaller model and what was cut. note: why zeros remain although they are whole structures; empty if none do."""

    model: PreTrainedModel
    kept: Kept
    note: str

    def cut(self, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cut the masks of the original model's projections, by full name, as its weights were."""
        decoder = Decoder(self.model)
        return dict(_cut(decoder, self.kept, lambda name: masks[name]))


def find_structures(decoder: Decoder) -> Kept:
    """Find the structures of every block that some weight reads."""
    family = decoder.family
    found = []
    for block in decoder.blocks:
        weights = family.weights_of(block)
        channels = weights[family.reads_channels].shape[1]
        counts = {family.reads_heads: family.key_value_heads(block), family.reads_channels: channels}
        found.append({name: kept_structures(weights[name] != 0, count).cpu() for name, count in counts.items()})
    return found


@torch.no_grad()
def make_smaller(model: PreTrainedModel) -> Smaller:
    """Return a smaller model that computes the same, of the same class if that can be, or the model itself with the reason."""
    decoder = Decoder(model)
    family, found = decoder.family, find_structures(decoder)
    full = [{name: torch.ones_like(kept) for name, kept in of_block.items()} for of_block in found]
    padded = [
        {name: _padded(kept, max(int(other[name].sum()) for other in found)) for name, kept in of_block.items()}
        for of_block in found
    ]
    without_heads = [
        {**of_block, family.reads_heads: everything[family.reads_heads]}
        for of_block, everything in zip(padded, full, strict=True)
    ]
    for kept in (padded, without_heads):
        for kind, config in _configurations(decoder, kept):
            if (smaller := _build(kind, config, decoder, kept)) is not None:
                return Smaller(smaller, kept, _note(model, found, kept, family.reads_heads))
    return Smaller(model, full, _note(model, found, full, family.reads_heads))


def _padded(kept: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the first of the other structures, too, until there are `count`."""
    order = torch.argsort((~kept).int(), stable=True)
    return torch.zeros_like(kept).index_fill(0, order[:count], True)


def _note(model: PreTrainedModel, found: Kept, kept: Kept, heads: str) -> str:
    """Say why whole structures of zeros remain."""
    if all(torch.equal(a[name], b[name]) for a, b in zip(found, kept, strict=True) for name in a):
        return ""
    # Heads that are missing in every block could be cut, if the configuration had a place for fewer.
    missing = all(int(of_block[heads].sum()) < len(of_block[heads]) for of_block in found)
    if missing and all(bool(of_block[heads].all()) for of_block in kept):
        return (
            f"the removed heads are stored as zeros, since {type(model.config).__name__} has no place for fewer heads"
        )
    return "blocks keep different numbers of heads or channels, and the configuration has one for all: the rest is stored as zeros"


def _configurations(decoder: Decoder, kept: Kept) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Yield classes with configurations of these sizes, those that do not refuse them."""
    model: Any = decoder.model
    family, given = decoder.family, model.config.to_dict()
    heads, channels = (int(kept[0][name].sum()) for name in (family.reads_heads, family.reads_channels))
    there = len(kept[0][family.reads_heads])
    sizes: dict[str, Any] = {name: channels for name in CHANNELS if name in given}
    if heads < there:
        sizes["num_attention_heads"] = given["num_attention_heads"] // there * heads
        sizes["head_dim"] = family.head_dim(decoder.blocks[0])
        if KEY_VALUE in given:
            sizes[KEY_VALUE] = heads
    kinds: list[tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]] = [
        (type(model), type(model.config), {})
    ]
    if given.get("model_type") == "llama" and not (given.get("attention_bias") or given.get("mlp_bias")):
        # The same architecture, whose configuration allows any number of heads.
        named = {"sliding_window": None, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        kinds.append((MistralForCausalLM, MistralConfig, named))
    for kind, of_kind, more in kinds:
        try:
            config = of_kind.from_dict({**copy.deepcopy(given), **sizes, **more})
        except (ValueError, StrictDataclassError):
            continue
        config._attn_implementation = model.config._attn_implementation
        yield kind, config


def _build(
    kind: type[PreTrainedModel], config: PreTrainedConfig, decoder: Decoder, kept: Kept
) -> PreTrainedModel | None:
    """Build the model of the cut weights; None if a model of this configuration has other shapes."""
    model: Any = decoder.model
    state = dict(model.state_dict())
    state |= dict(_cut(decoder, kept, lambda name: state[f"{name}.weight"], ".weight"))
    state |= dict(_cut(decoder, kept, lambda name: state.get(f"{name}.bias"), ".bias"))
    try:
        with init_empty_weights(include_buffers=False):
            other: Any = kind._from_config(config, dtype=model.dtype)
    except ValueError:
        return None
    other.tie_weights()
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    if shapes != {name: value.shape for name, value in state.items()}:
        return None
    other.load_state_dict(state, assign=True)
    other.tie_weights()
    other.generation_config = model.generation_config
    other.config.name_or_path = model.config.name_or_path
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    smaller: PreTrainedModel = other.to(model.device).train(model.training)
    return smaller


def _cut(decoder: Decoder, kept: Kept, value_of: Any, suffix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (full name and suffix, cut value) of every projection: weights or masks (out, in), biases (out,), None is left out."""
    for index, of_block in enumerate(kept):
        for name in decoder.family.projections:
            full = decoder.full_name(index, name)
            reader, axis = decoder.family.coupled(name)
            value = value_of(full)
            if value is not None and axis < value.dim():
                whole = value.double() if value.dtype == torch.bool else value
                yield f"{full}{suffix}", cut(whole, of_block[reader], axis).to(value.dtype)
