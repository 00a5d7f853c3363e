"""Random tiny models of every family, for tests: real architectures of transformers, created in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# 256 bytes and one begin-of-text token.
VOCABULARY = 257

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    # Larger than the usual 0.02, so that a tiny model's blocks have an effect.
    "initializer_range": 0.2,
}
_OPT = {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
    "dropout": 0.0,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-gqa": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),
    "opt": (OPTConfig, OPTForCausalLM, _OPT),
}


def random_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Create a randomly initialised model of `family` (a key of FAMILIES); overrides change its configuration.

    Biases and gains of norms are random too, as after training: with 0 and 1, losing one would go unnoticed. The override
    `dtype` sets the dtype of the parameters; default float32.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; allowed: {', '.join(FAMILIES)}")
    config_class, model_class, changes = FAMILIES[family]
    dtype = overrides.pop("dtype", torch.float32)
    last = overrides.get("vocab_size", VOCABULARY) - 1
    special = {f"{use}_token_id": last for use in ("bos", "eos", "pad")}
    sizes = {**_SIZES, **special, **changes, **overrides}
    if family == "opt":
        for name in ("intermediate_size", "num_key_value_heads", "initializer_range"):
            sizes.pop(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config_class(**sizes))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                nn.init.normal_(parameter, std=0.2)
            elif parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def save_random_model(folder: str | Path, family: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model with its tokenizer as a Hugging Face folder."""
    random_model(family, seed, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Path(folder)
