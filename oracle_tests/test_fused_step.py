"""One token through fused blocks: the model's own logits and tokens, with Hugging Face's cache; other models run as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel, StaticCache

from oracle_tests import fused_cases
from oracle_tests.fused_models import MODELS, model_of, next_tokens, pack
from oracle_tests.programs import gpu_fused
from oracle_tests.tiny_material import Heard, prompt
from oracle_tests.tolerances import PACKED_LOGITS
from tiny_models.random_models import random_model
from torch_impl.bench import whole
from torch_impl.decode import fused_kernels, fused_operations, fused_step, next_token, packed_step


def assert_same(model: PreTrainedModel, batch: int = 1) -> None:
    plain, theirs, _ = next_tokens(model, kernels=False, batch=batch)
    found, ours, following = next_tokens(model, kernels=True, batch=batch)
    assert following.kernels
    bound = PACKED_LOGITS[model.dtype]
    pairs = [(found, plain)]
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        pairs += [(own.keys, other.keys), (own.values, other.values)]
        assert own.cumulative_length.equal(other.cumulative_length)
    for own, other in pairs:
        assert own.dtype == other.dtype
        assert float((own - other).abs().max() / other.abs().max()) <= bound


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, in Triton's interpreter."""
    pytest.importorskip("triton")
    found: list[str] = []
    monkeypatch.setattr(fused_kernels, "usable", lambda *tensors: True)
    for name in ("add_norm", "attend", "gated"):
        kernel = getattr(fused_kernels, name)
        monkeypatch.setattr(
            fused_kernels, name, lambda *given, name=name, kernel=kernel: (found.append(name), kernel(*given))[1]
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_cache_are_the_model_s(name: str, dtype: torch.dtype) -> None:
    """By torch's functions; one row, then more."""
    model = model_of(name, dtype=dtype)
    for batch in (1, 3):
        assert_same(model, batch)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_logits_and_cache_by_the_kernels(name: str, launches: list[str]) -> None:
    """With biases or norms of each head, and heads that share keys."""
    assert_same(model_of(name, num_hidden_layers=2))
    # Four tokens and the check's, two blocks.
    assert launches == 5 * (2 * ["add_norm", "attend", "add_norm", "gated"] + ["add_norm"])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_tokens_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loop of `losa generate`; nothing of the model is changed afterwards."""
    monkeypatch.setattr(next_token, "KERNELS", ("cpu",))
    steps = []
    step = fused_step._Step.__call__
    monkeypatch.setattr(fused_step._Step, "__call__", lambda self, ids: (steps.append(ids), step(self, ids))[1])
    model = model_of(name)
    pack(model)
    options: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": False}
    theirs = model.generate(prompt(), **options)
    loop = partial(next_token.decode, streamer=Heard())
    ours = model.generate(prompt(), **options, custom_generate=loop, cache_implementation="static")
    assert torch.equal(ours, theirs)
    assert len(steps) == 12 - 1 + 1
    assert torch.equal(model.generate(prompt(), **options), theirs)
    assert len(steps) == 12


def test_any_module_may_be_a_projection() -> None:
    """Such as an adapter beside a packed weight."""
    model = model_of("llama-gqa")
    pack(model)
    for block, name in whole.places(model):
        block.set_submodule(name, whole.Beside(block.get_submodule(name), 2, torch.empty(0)))
    assert_same(model)


def test_projections_of_one_input_are_one_product(as_on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight launches a block."""
    monkeypatch.setattr(packed_step, "FIVE", False)
    model = model_of("llama-gqa", dtype=torch.bfloat16)
    pack(model)
    plain = next_tokens(model, kernels=False)[0]
    as_on_a_gpu.clear()
    found = next_tokens(model, kernels=True)[0]
    assert float((found - plain).abs().max() / plain.abs().max()) <= PACKED_LOGITS[torch.bfloat16]
    # The prompt, four tokens; of the check its prompt, the model's own token and ours.
    assert as_on_a_gpu.count("matvec") == (1 + 4 + 3) * 3 * 4


def granite(**changes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return GraniteForCausalLM(GraniteConfig(**sizes, **changes)).eval()


def gemma() -> PreTrainedModel:
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    return GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=1)).eval()


def normed(channels: int | None) -> PreTrainedModel:
    """A LLaMA that has norms of queries and keys, of some number of channels or of queries alone, and does not use them."""
    model = random_model("llama")
    for block in model.model.layers:
        for name in ("q_norm", "k_norm") if channels else ("q_norm",):
            block.self_attn.add_module(name, type(model.model.norm)(channels or 8))
    return model


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}
OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "opt": (partial(random_model, "opt"), "the body has embed_positions, final_layer_norm"),
    "whole norms": (partial(normed, 32), "attention does not norm head by head"),
    "one norm": (partial(normed, None), "attention has no k_norm"),
    "sliding": (partial(random_model, "mistral"), "layers slide"),
    "gelu": (partial(random_model, "llama", hidden_act="gelu"), "the MLP's activation is not SiLU"),
    "dynamic": (
        partial(random_model, "llama", **DYNAMIC),
        "rotary embedding dynamic depends on the length of the text",
    ),
    "gemma": (gemma, "a block's norm is not RMSNorm"),
    "granite": (partial(granite, residual_multiplier=0.5), "their result differs from the model's by"),
    "shared": (
        partial(random_model, "llama", hidden_size=68, num_attention_heads=34, num_key_value_heads=2),
        "17 heads share keys; the kernel supports 16",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_as_they_are_and_say_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, reason = OTHERS[name]
    model = make().eval()
    plain = next_tokens(model, kernels=False)[0]
    found, _, following = next_tokens(model, kernels=True)
    assert torch.equal(found, plain)
    assert not following.kernels
    said = capsys.readouterr().err
    assert said.startswith(f"decoding: fused kernels are not used ({reason}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("change", ["norm", "sin", "value", "count"])
def test_the_check_notices(change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that looks the same and computes something else; kernels that are wrong."""
    model = model_of("llama-gqa")
    plain = next_tokens(model, kernels=False)[0]
    attend = fused_operations.attend

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any) -> torch.Tensor:
        heads = attend(q, k, v, layer)
        if change == "value":
            layer.values[:, :, layer.filled] = 0
        elif change == "count":
            layer.filled.add_(1)
        return heads

    if change == "norm":
        monkeypatch.setattr(fused_operations, "add_norm", lambda x, total, gain, eps: (gain * x, x))
    elif change == "sin":
        monkeypatch.setattr(fused_operations, "_turned", lambda x, cos, sin: x)
    else:
        monkeypatch.setattr(fused_operations, "attend", wrong)
    assert not next_tokens(model, kernels=True)[2].kernels
    assert "their result differs from the model's by" in capsys.readouterr().err
    assert torch.equal(next_tokens(model, kernels=True)[0], plain)


def test_what_fails_in_the_kernels_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no C compiler\n  here")

    monkeypatch.setattr(fused_operations, "gated", broken)
    model = model_of("llama")
    plain = next_tokens(model, kernels=False)[0]
    assert torch.equal(next_tokens(model, kernels=True)[0], plain)
    assert capsys.readouterr().err == "decoding: fused kernels are not used (no C compiler here)\n"


@torch.no_grad()
def test_everything_else_takes_the_model_s_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt after tokens, another cache, a mask, hidden states: inside the context too."""
    model = model_of("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=prompt()[:, :3], past_key_values=cache)
    fused = fused_step.FusedStep(model, cache)
    token = prompt()[:, 3:4]
    calls: list[dict[str, Any]] = [
        {"input_ids": prompt()[:, 3:], "past_key_values": cache},
        {"input_ids": token},
        {"input_ids": token, "past_key_values": cache, "attention_mask": torch.ones(1, 8)},
        {"input_ids": token, "past_key_values": cache, "output_hidden_states": True},
        {"inputs_embeds": model.get_input_embeddings()(token), "past_key_values": cache},
        {"input_ids": token.repeat(2, 1), "past_key_values": StaticCache(config=model.config, max_cache_len=4)},
    ]

    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("the fused step was taken")

    monkeypatch.setattr(fused_step._Step, "__call__", refuse)
    with fused.in_place():
        for call in calls:
            model(**call)
        with pytest.raises(AssertionError, match="was taken"):
            model(input_ids=token, past_key_values=cache)
    model(input_ids=token, past_key_values=cache)
    assert model.model._compiled_call_impl is None


@pytest.mark.parametrize("values", [gpu_fused.SETTINGS, *gpu_fused.VARIANTS, *gpu_fused.LAYOUTS.values()], ids=str)
def test_a_variant_of_the_program_is_set_for_a_while(values: dict[str, Any]) -> None:
    def found() -> dict[str, Any]:
        return {name: getattr(gpu_fused.HOLDERS[name], name) for name in values}

    before = found()
    with gpu_fused.settings(torch.nn.Module(), **values):
        assert found() == values
    assert found() == before


def test_the_program_for_a_gpu_runs_and_notices_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    run = partial(gpu_fused.main, ["--small", "--device", "cpu"])
    assert run() == 0
    said = capsys.readouterr().out
    assert "kernels: 54 cases, 0 wrong" in said
    assert said.endswith("passed\n")

    def wrong(*_: Any) -> None:
        raise AssertionError("off by\n  much")

    monkeypatch.setattr(gpu_fused, "tokens_are_the_same", lambda device: True)
    monkeypatch.setattr(gpu_fused, "whole", lambda *given: True)
    with monkeypatch.context() as patch:
        patch.setattr(fused_cases, "attend", wrong)
        assert run() == 1
        assert "    attend float16 ((3, 1), 16, 48), 100% of 33: off by much\n" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(gpu_fused, "kernels_are_right", lambda small: True)
    monkeypatch.setattr(fused_operations, "gated", lambda gate, up: up)
    assert run() == 1
    said = capsys.readouterr().out
    assert said.count("NOT the same") == 2
    # Dense and packed.
    assert said.count("WRONG") == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_program_for_a_gpu_compares_five_launches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_fused, "GREEDY", 4)
    for name in ("kernels_are_right", "tokens_are_the_same"):
        monkeypatch.setattr(gpu_fused, name, lambda given: True)
    arguments = ["--small", "--device", "cpu", "--blocks", "1", "--layouts"]
    assert gpu_fused.main([*arguments, "gaps", "panels"]) == 0
    said = capsys.readouterr().out
    # q, k and v; o; gate and up; down. Both layouts can end so.
    gaps, panels = said.index("    70 %: 4 GapLayout\n"), said.index("    70 %: 4 Layout\n")
    assert gaps < said.index(" five ") < panels < said.rindex(" five ")
    assert said.count(" five ") == 2
    monkeypatch.setattr(packed_step, "blocks", lambda layers: [])
    assert gpu_fused.main([*arguments, "panels"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if "WRONG" in line] == ["five"]
