"""Check requests of OpenAI's API before they are computed: what is wrong with one is a ValueError in one sentence."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine.families import position_limit
from torch_impl.experiment.planning import checks

# Arguments of rendering a chat template that requests may not change: templates of their own, for one.
OWN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
# New tokens if a request does not say.
TOKENS = 1024


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


# Each field: whether a value is right, and what is allowed. What is not here is up to transformers.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (_count, "1 or more"),
    "max_completion_tokens": (_count, "1 or more"),
    "temperature": (_number(0, 2), "0 to 2"),
    "top_p": (lambda value: _number(0, 1)(value) and value > 0, "above 0, up to 1"),
    "frequency_penalty": (_number(-2, 2), "-2 to 2"),
    "presence_penalty": (_number(-2, 2), "-2 to 2"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**63, "0 or more, below 2**63"),
    "stop": (_stops, "a text, or a list of texts"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "n": (lambda value: value == 1, "1"),
    "best_of": (lambda value: value == 1, "1"),
    "logprobs": (lambda value: value in (False, 0), "false"),
    "top_logprobs": (lambda value: value == 0, "0"),
    "echo": (lambda value: value is False, "false"),
    "suffix": (lambda value: isinstance(value, str), "a text"),
    "tools": (lambda value: isinstance(value, list), "a list"),
    "tool_choice": (lambda value: value in ("auto", "none"), "auto or none"),
    "parallel_tool_calls": (lambda value: value is True, "true"),
    "response_format": (lambda value: value == {"type": "text"}, '{"type": "text"}'),
    "modalities": (lambda value: value == ["text"], '["text"]'),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "an object"),
    "functions": (lambda value: False, "nothing; use tools"),
    "function_call": (lambda value: False, "nothing; use tool_choice"),
    "web_search_options": (lambda value: False, "nothing"),
    "generation_config": (lambda value: False, "nothing; use the fields of OpenAI's API"),
}


def check_fields(body: dict[str, Any], vocabulary: int) -> None:
    """Check the fields that both kinds of requests have, and remove those that are null or say nothing."""
    for name in [name for name, value in body.items() if value is None or value == []]:
        if name not in ("messages", "prompt"):
            del body[name]
    for name, (right, allowed) in FIELDS.items():
        if name in body and not right(body[name]):
            # As it was sent; NaN, too, which no JSON that is written may have.
            raise ValueError(f"{name} is {json.JSONEncoder().encode(body[name])[:80]}; allowed: {allowed}")
    if body.get("tool_choice") == "none":
        body.pop("tools", None)
    bias = body.get("logit_bias", {})
    fine = isinstance(bias, dict) and all(
        token.isascii() and token.isdigit() and int(token) < vocabulary and _number(-100, 100)(value)
        for token, value in bias.items()
    )
    if not fine:
        raise ValueError(f"logit_bias does not map token ids below {vocabulary} to numbers from -100 to 100")
    if "logit_bias" in body:
        body["logit_bias"] = {token: float(value) for token, value in bias.items()}


def chat_ids(tokenizer: PreTrainedTokenizerBase, body: dict[str, Any]) -> torch.Tensor:
    """Check the messages of a chat; return their tokens (1, n)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is missing or empty; give a list of {role, content}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{number}] has no role; give {{role, content}}")
        content = message.get("content")
        pieces = content if isinstance(content, list) else []
        texts = all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in pieces)
        if not texts or not (isinstance(content, str | list) or "tool_calls" in message):
            raise ValueError(f"messages[{number}] has no text as its content; this model reads text alone")
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; use /v1/completions")
    more = body.get("chat_template_kwargs", {})
    own = sorted(more.keys() & OWN)
    if own:
        raise ValueError(f"chat_template_kwargs may not set {', '.join(own)}; give what the chat template reads")
    plain = [{**m, "content": _joined(m.get("content"))} for m in messages]
    found: Any = tokenizer.apply_chat_template(
        plain,
        add_generation_prompt=True,
        tools=body.get("tools"),
        return_tensors="pt",
        return_dict=True,
        **more,
    )
    ids: torch.Tensor = found["input_ids"]
    return ids


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(piece["text"] for piece in content or [])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, body: dict[str, Any]) -> torch.Tensor:
    """Check the prompt of a completion; return its tokens (1, n)."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt = prompt[0]
    if not prompt:
        raise ValueError("prompt is missing or empty; give one text")
    if not isinstance(prompt, str):
        raise ValueError("prompt is not one text but several, or tokens; give one text")
    ids: torch.Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ids


def check_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, body: dict[str, Any]
) -> None:
    """Check that the tokens and the new ones fit the model; set how many new ones, if the request does not.

    Also of a model whose positions go on beyond those that it was trained on: there it would work for minutes and answer nonsense.
    """
    if not ids.shape[1]:
        raise ValueError("the prompt has no token; give some text")
    checks.check_tokens(model, tokenizer, ids)
    asked = body.get("max_completion_tokens", body.get("max_tokens"))
    limit = position_limit(model) or getattr(model.config, "max_position_embeddings", None)
    room = TOKENS if limit is None else limit - ids.shape[1]
    if limit is not None and (room < 1 or (asked or 0) > room):
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens and {asked or TOKENS} new ones are asked for, but this model has only "
            f"{limit} positions; use a shorter prompt, or a smaller max_tokens"
        )
    body["max_tokens"] = asked or min(TOKENS, room)
    body.pop("max_completion_tokens", None)
