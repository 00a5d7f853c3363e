"""A reference LLaMA and a Hugging Face LLaMA with the same weights, and Hugging Face's modules in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from reference import llama

HF_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def random_llama(
    sizes: llama.Sizes, blocks: int, tied: bool, seed: int, biased: bool = False, widths: Sequence[int] = ()
) -> llama.Llama:
    """Draw weights that keep hidden states of order 1, with gains around 1 and no ties.

    biased: whether projections have biases. widths: of the blocks' MLPs, in turn; default: that of `sizes`.
    """
    generator = np.random.default_rng(seed)
    kv = sizes.kv_heads * sizes.head_dim
    h, v = sizes.hidden, sizes.vocabulary

    def block(m: int) -> llama.Block:
        shapes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h), "gate": (m, h), "up": (m, h), "down": (h, m)}
        return llama.Block(
            attention_norm=generator.uniform(0.5, 1.5, h),
            mlp_norm=generator.uniform(0.5, 1.5, h),
            weights={
                name: generator.normal(size=shapes[name]) / np.sqrt(shapes[name][1]) for name in llama.PROJECTIONS
            },
            biases={name: 0.3 * generator.normal(size=shapes[name][0]) for name in llama.PROJECTIONS if biased},
        )

    made = tuple(block(m) for m in islice(cycle(widths or [sizes.intermediate]), blocks))
    embedding = generator.normal(size=(v, h))
    head = embedding if tied else generator.normal(size=(v, h)) / np.sqrt(h)
    return llama.Llama(sizes, embedding, made, generator.uniform(0.5, 1.5, h), head)


def to_hugging_face(model: llama.Llama) -> LlamaForCausalLM:
    """The same model in float64, in evaluation mode."""
    sizes = model.sizes
    tied = model.head is model.embedding
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bool(model.blocks[0].biases),
        mlp_bias=bool(model.blocks[0].biases),
        attn_implementation="sdpa",
    )
    twin = LlamaForCausalLM(config)
    for layer, block in zip(twin.model.layers, model.blocks, strict=True):
        if len(block.weights["up"]) != sizes.intermediate:
            layer.mlp = LlamaMLP(LlamaConfig(**config.to_dict() | {"intermediate_size": len(block.weights["up"])}))
    twin = twin.double().eval()
    state = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head,
    }
    for index, block in enumerate(model.blocks):
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = block.attention_norm
        state[prefix + "post_attention_layernorm.weight"] = block.mlp_norm
        state |= {f"{prefix}{HF_NAMES[name]}.weight": weight for name, weight in block.weights.items()}
        state |= {f"{prefix}{HF_NAMES[name]}.bias": bias for name, bias in block.biases.items()}
    twin.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return twin


def _norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def _rotary(
    self: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    config: Any = self.config
    dim = config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (position_ids[..., None].double() * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@contextmanager
def float64_llama() -> Iterator[None]:
    """Compute Hugging Face's norms and rotary angles in float64 instead of float32; its sdpa softmax keeps float64."""
    with (
        mock.patch.object(LlamaRMSNorm, "forward", _norm),
        mock.patch.object(LlamaRotaryEmbedding, "forward", _rotary),
    ):
        yield
