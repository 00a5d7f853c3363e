"""The decoding loop generates the tokens of Hugging Face's own, with either cache and every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from oracle_tests.programs import gpu_eager
from oracle_tests.tiny_material import Heard, prompt
from oracle_tests.tolerances import PACKED_LOGITS
from tiny_models.random_models import FAMILIES, random_model
from torch_impl.decode import compiled_blocks, cpu, next_token
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.engine.decoder import Decoder

FIXED = [family for family in FAMILIES if family != "mistral"]


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
        loop = partial(next_token.decode, streamer=heard)
        ours = model.generate(prompt(), **options, custom_generate=loop, cache_implementation=cache)
        assert torch.equal(ours, theirs)
        assert (heard.ids, heard.ended) == (ours[0].tolist(), 1)


def test_the_model_says_when_to_stop_and_what_not_to_repeat() -> None:
    model = random_model("llama").eval()
    loop = {"custom_generate": partial(next_token.decode, streamer=Heard())}
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
    loop = {"custom_generate": partial(next_token.decode, streamer=Heard())}
    both = model.generate(prompt(2), attention_mask=torch.ones(2, 7).long(), **options, **loop)
    for row, ids in enumerate(prompt(2)):
        assert torch.equal(both[row], model.generate(ids[None], **options)[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_token_has_the_same_shapes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph needs a static cache: a decoding step must read and write the same tensors every time."""
    model = random_model(family).eval()
    cache = StaticCache(config=model.config, max_cache_len=16)
    following = next_token.NextToken(model, cache)
    logits = [following(ids[None]) for ids in prompt()[0, :, None]]
    places = {layer.keys.data_ptr() for layer in cache.layers}
    logits += [following(ids[None]) for ids in prompt()[0, :, None]]
    assert places == {layer.keys.data_ptr() for layer in cache.layers}
    whole = model(input_ids=prompt().repeat(1, 2), past_key_values=DynamicCache(config=model.config)).logits[0]
    torch.testing.assert_close(torch.cat(logits), whole.detach(), rtol=0, atol=1e-5)
    assert not following.captures


def pack_some(model: PreTrainedModel) -> None:
    """Every projection of every block, each block sparser than the one before."""
    decoder = Decoder(model)
    for number, block in enumerate(decoder.blocks):
        for name in decoder.family.projections:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with torch.no_grad():
                linear.weight[torch.rand_like(linear.weight) < 0.4 + 0.1 * number] = 0
            block.set_submodule(name, PackedLinear.of(linear))


def next_tokens(model: PreTrainedModel, fuse: bool, batch: int = 1) -> tuple[torch.Tensor, next_token.NextToken]:
    """Logits (tokens, b, vocabulary) of some tokens after a prompt, one at a time."""
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=prompt(batch)[:, :3], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        # As transformers does, and as older versions of torch take it: an address is a constant of the code.
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            torch._dynamo.mark_static_address(tensor, guard=True)
    following = next_token.NextToken(model, cache, batch, fuse=fuse)
    return torch.stack([following(ids).clone() for ids in prompt(batch)[:, 3:].split(1, dim=1)]), following


def assert_near(ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert float((ours - plain).abs().max() / plain.abs().max()) <= PACKED_LOGITS[plain.dtype]


@pytest.fixture
def untouched_compiler() -> None:
    """Counts from zero; without packed kernels being built while a graph is traced."""
    cpu.paths()
    counters.clear()


@pytest.mark.usefixtures("untouched_compiler")
@pytest.mark.parametrize("family", FIXED)
def test_compiled_blocks_give_the_same_logits_and_compile_once(family: str) -> None:
    """Three blocks that differ in sparsity, so in the sizes of what is packed, are one graph."""
    model = random_model(family).eval()
    pack_some(model)
    plain, _ = next_tokens(model, fuse=False)
    calls = [module._compiled_call_impl for module in model.modules()]
    ours, following = next_tokens(model, fuse=True)
    assert following.fuses
    assert_near(ours, plain)
    # The blocks; the last norm; rotary angles where the family has them.
    assert counters["stats"]["unique_graphs"] == (2 if family == "opt" else 3)
    assert [module._compiled_call_impl for module in model.modules()] == calls
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("untouched_compiler")
@pytest.mark.parametrize("family", FIXED)
def test_projections_of_one_input_are_one_product(family: str, as_on_a_gpu: list[str]) -> None:
    """Compiled or not, in a prompt or a token, with the logits that they give alone."""
    model = random_model(family, dtype=torch.bfloat16)
    torch.manual_seed(0)
    pack_some(model)
    decoder = Decoder(model)
    plain, _ = next_tokens(model, fuse=False)
    as_on_a_gpu.clear()
    group_projections(model)
    assert Decoder(model).family is decoder.family
    blocks = decoder.blocks
    assert as_on_a_gpu.count("stack") == len(blocks) * sum(len(names) > 1 for names in decoder.family.inputs)
    for fuse in (False, True):
        as_on_a_gpu.clear()
        ours, following = next_tokens(model, fuse)
        assert following.fuses == fuse
        assert_near(ours, plain)
        # Four tokens and the prompt, whose three rows are few enough.
        assert as_on_a_gpu.count("matvec") == (4 + 1) * len(blocks) * len(decoder.family.inputs)
    assert counters["stats"]["unique_graphs"] == (2 if family == "opt" else 3)
    assert_near(next_tokens(copy.deepcopy(model), fuse=True)[0], plain)


@pytest.mark.usefixtures("untouched_compiler")
def test_compiled_tokens_are_those_of_generate() -> None:
    model = random_model("llama-gqa").eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    loop = partial(next_token.decode, streamer=Heard(), fuse=True)
    given = {"attention_mask": torch.ones(2, 7).long()}
    with torch.inference_mode():
        theirs = model.generate(prompt(2), **given, **options)
        ours = model.generate(prompt(2), **given, **options, custom_generate=loop, cache_implementation="static")
    assert torch.equal(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 3


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first block runs, the second does not: the token counts once all the same."""
    model = random_model("llama").eval()
    plain, _ = next_tokens(model, fuse=False)
    calls = []

    def compiler() -> Callable[..., Any]:
        def call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            calls.append(module)
            if module is model.model.layers[1]:
                raise RuntimeError("no compiler\n  here")
            return module._call_impl(*arguments, **named)

        return call

    monkeypatch.setattr(compiled_blocks, "_compile", compiler)
    ours, following = next_tokens(model, fuse=True)
    assert model.model.layers[0] in calls
    assert not following.fuses
    assert torch.equal(ours, plain)
    assert capsys.readouterr().err == "decoding: compilation failed, so decoding is slower (no compiler here)\n"


def test_a_sliding_window_is_not_compiled() -> None:
    model = random_model("mistral").eval()
    assert not next_tokens(model, fuse=True)[1].fuses
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"^cache slides or is empty"):
        compiled_blocks.FusedBlocks(model, cache)


def test_the_program_for_a_gpu_runs_and_notices_other_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(gpu_eager.main, ["--small", "--device", "cpu", "--tokens", "2"])
    assert run() == 0
    assert capsys.readouterr().out.endswith("passed\n")
    monkeypatch.setattr(gpu_eager, "crossover", lambda *_: True)
    monkeypatch.setattr(PackedLinear, "product", lambda self, x: 2 * nn.functional.linear(x, self.unpacked()))
    assert run() == 1
