"""Shapes of common models, and models of these shapes with random weights and any number of blocks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

GEOMETRIES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_hidden_layers": 3,
    },
    "medium": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_hidden_layers": 4,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 16,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 28,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "num_hidden_layers": 32,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "num_hidden_layers": 40,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "num_hidden_layers": 32,
    },
    "llama-30b": {
        "hidden_size": 6656,
        "intermediate_size": 17920,
        "num_attention_heads": 52,
        "num_key_value_heads": 52,
        "vocab_size": 32000,
        "num_hidden_layers": 60,
    },
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_hidden_layers": 80,
    },
}


def build(geometry: str, blocks: int | None, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a LLaMA of this geometry with `blocks` decoder blocks, default all. Some embedding channels are large."""
    shape = {**GEOMETRIES[geometry], "max_position_embeddings": 4096}
    if blocks is not None:
        shape["num_hidden_layers"] = blocks
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        loud = torch.exp(torch.randn(shape["hidden_size"], generator=torch.Generator().manual_seed(0)))
        model.model.embed_tokens.weight.mul_(loud.to(device, dtype))
    return model.eval().requires_grad_(False)
