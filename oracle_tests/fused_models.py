"""Small models, and their tokens one by one after a prompt: for tests of fused blocks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from oracle_tests.tiny_material import prompt
from tiny_models.random_models import random_model
from torch_impl.decode import next_token
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.engine.decoder import Decoder

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gqa": ("llama-gqa", {}),
    "llama3-rope": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}  # fmt: skip


def model_of(name: str, **overrides: Any) -> PreTrainedModel:
    family, changes = MODELS[name]
    return random_model(family, **changes, **overrides).eval()


def pack(model: PreTrainedModel, sequences: int = 1) -> None:
    """Prune to 60 % at random, and pack for so many sequences at once."""
    torch.manual_seed(0)
    decoder = Decoder(model)
    for block in decoder.blocks:
        for name in decoder.family.projections:
            linear = block.get_submodule(name)
            linear.weight.data[torch.rand_like(linear.weight, dtype=torch.float32) < 0.6] = 0
            block.set_submodule(name, PackedLinear.of(linear, sequences))
    group_projections(model)


@torch.no_grad()
def next_tokens(
    model: PreTrainedModel, kernels: bool, batch: int = 1, **options: bool
) -> tuple[torch.Tensor, StaticCache, next_token.NextToken]:
    """Logits (tokens, b, vocabulary) of some tokens after a prompt, one at a time, and the cache behind them."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=prompt(batch)[:, :3], past_key_values=cache, use_cache=True)
    following = next_token.NextToken(model, cache, batch, kernels=kernels, **options)
    return torch.stack([following(ids).clone() for ids in prompt(batch)[:, 3:].split(1, dim=1)]), cache, following
