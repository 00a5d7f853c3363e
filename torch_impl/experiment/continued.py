"""The text of new tokens as it continues that of a prompt.

Decoded alone, SentencePiece tokens such as those of LLaMA 2 and Mistral lose the space before the first word.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

# Tokens before a text that are decoded with it.
BEFORE = 8


def text_after(tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, new: torch.Tensor) -> str:
    """Decode new tokens (n,) after a prompt (t,), without special ones."""
    before = prompt[-BEFORE:].tolist()
    known, whole = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, [*before, *new.tolist()]))
    return whole[len(known) :]


def stream_after(prompt: torch.Tensor) -> Any:
    """Return what decodes new tokens one after the other as they continue a prompt (t,)."""
    return DecodeStream(prompt[-BEFORE:].tolist(), skip_special_tokens=True)
