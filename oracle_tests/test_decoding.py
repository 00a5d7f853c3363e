"""The decoding loop draws what Hugging Face's own would, with either cache and every family."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import BaseStreamer

from tiny_models.random_models import FAMILIES, random_model
from torch_impl.engine import decoding


class Heard(BaseStreamer):
    """What a streamer is told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def prompt(batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 200, (batch, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str, cache: str) -> None:
    model = random_model(family).eval()
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 0}):
        options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, **settings}
        torch.manual_seed(5)
        theirs = model.generate(prompt(), **options)
        torch.manual_seed(5)
        heard = Heard()
        loop = partial(decoding.decode, streamer=heard)
        ours = model.generate(prompt(), **options, custom_generate=loop, cache_implementation=cache)
        assert torch.equal(ours, theirs)
        assert (heard.ids, heard.ended) == (ours[0].tolist(), 1)


def test_the_model_says_when_to_stop_and_what_not_to_repeat() -> None:
    model = random_model("llama").eval()
    loop = {"custom_generate": partial(decoding.decode, streamer=Heard())}
    options: dict[str, Any] = {"max_new_tokens": 30, "pad_token_id": 0, "do_sample": False}
    plain = model.generate(prompt(), **options)
    model.generation_config.repetition_penalty = 1.8
    theirs = model.generate(prompt(), **options)
    assert not torch.equal(theirs, plain)
    assert torch.equal(model.generate(prompt(), **options, **loop), theirs)
    model.generation_config.eos_token_id = int(theirs[0, 12])
    assert len(model.generate(prompt(), **options, **loop)[0]) < 7 + 30


def test_rows_of_a_batch_do_not_meet() -> None:
    model = random_model("llama-gqa").eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    loop = {"custom_generate": partial(decoding.decode, streamer=Heard())}
    both = model.generate(prompt(2), attention_mask=torch.ones(2, 7).long(), **options, **loop)
    for row, ids in enumerate(prompt(2)):
        assert torch.equal(both[row], model.generate(ids[None], **options)[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_token_has_the_same_shapes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph needs of a static cache: a decoding step reads and writes the same tensors every time."""
    model = random_model(family).eval()
    cache = StaticCache(config=model.config, max_cache_len=16)
    following = decoding.NextToken(model, cache)
    logits = [following(ids[None]) for ids in prompt()[0, :, None]]
    places = {layer.keys.data_ptr() for layer in cache.layers}
    logits += [following(ids[None]) for ids in prompt()[0, :, None]]
    assert places == {layer.keys.data_ptr() for layer in cache.layers}
    whole = model(input_ids=prompt().repeat(1, 2), past_key_values=DynamicCache(config=model.config)).logits[0]
    torch.testing.assert_close(torch.cat(logits), whole.detach(), rtol=0, atol=1e-5)
    assert not following.captures
