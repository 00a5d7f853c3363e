"""A packed model's token in five launches a block: the model's own logits; models that cannot take them take eight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from oracle_tests.fused_models import model_of, next_tokens, pack
from oracle_tests.tolerances import PACKED_LOGITS
from torch_impl import packed, quantise
from torch_impl.bench import whole
from torch_impl.decode import (
    cuda_coded_gaps,
    cuda_endings,
    cuda_gaps,
    cuda_layouts,
    fused_kernels,
    fused_operations,
    packed_step,
)
from torch_impl.decode.coded_linear import CodedLinear
from torch_impl.decode.packed_linear import PackedLinear, group_projections
from torch_impl.engine.decoder import Decoder

BF16 = torch.bfloat16
BLOCK = ["normed", "attend", "added", "swiglu", "added"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: list[str]) -> list[str]:
    """What is launched besides single products, with torch in place of the kernels, in five launches a block."""
    monkeypatch.setattr(packed_step, "FIVE", True)
    found: list[str] = []
    for module, names in (
        (cuda_endings, ("normed", "added", "swiglu")),
        (fused_operations, ("add_norm", "attend", "begin", "gated")),
    ):
        for name in names:
            function = getattr(module, name)
            noted = lambda *given, name=name, function=function: (found.append(name), function(*given))[1]  # noqa: E731
            monkeypatch.setattr(module, name, noted)
    # `swiglu` of the stand-ins calls `normed`.
    monkeypatch.setattr(cuda_endings, "swiglu", lambda *given: (found.append("swiglu"), _silently(found, *given))[1])
    return found


def _silently(found: list[str], *given: Any) -> torch.Tensor:
    count = len(found)
    gate, up = cuda_endings.normed(*given).chunk(2, 1)
    del found[count:]
    return nn.functional.silu(gate) * up


def packed_model(name: str, dtype: torch.dtype = BF16, **overrides: Any) -> Any:
    model = model_of(name, dtype=dtype, num_hidden_layers=2, **overrides)
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            nn.init.uniform_(norm.weight, 0.5, 2)
    # Only panels can end so.
    pack(model, cuda_layouts.FEW + 1)
    return model


def assert_near(model: Any, batch: int = 1) -> None:
    plain = next_tokens(model, kernels=False, batch=batch)[0]
    found, _, following = next_tokens(model, kernels=True, batch=batch)
    assert following.kernels
    assert float((found - plain).abs().max() / plain.abs().max()) <= PACKED_LOGITS[BF16]


@pytest.mark.parametrize("name", ["llama", "biases", "llama-gqa", "qwen2", "qwen3"])
def test_logits_are_the_model_s(name: str, launches: list[str]) -> None:
    for batch in (1, 8):
        launches.clear()
        assert_near(packed_model(name), batch)
        # Four tokens and the check's, two blocks.
        assert launches == 5 * ["begin", *BLOCK, *BLOCK, "add_norm"]


def test_codes_too(launches: list[str]) -> None:
    model = packed_model("llama-gqa")
    decoder = Decoder(model)
    for block in decoder.blocks:
        for name in decoder.family.projections:
            codes, scales = quantise.quantise_rows(block.get_submodule(name).unpacked().float(), 8)
            bitmap, stream, offsets = packed.pack_codes(codes, 8)
            block.set_submodule(name, CodedLinear((bitmap, stream, scales, offsets), codes.shape[1], BF16, sequences=8))
    group_projections(model)
    launches.clear()
    assert_near(model)
    assert launches == 5 * ["begin", *BLOCK, *BLOCK, "add_norm"]


def test_the_first_kernel_is_torch_s_function() -> None:
    pytest.importorskip("triton")
    for rows, columns in ((1, 7), (3, 64), (8, 200), (2, 1500)):
        x = torch.randn(rows, columns + 5).bfloat16()[:, 3:-2]
        gain = torch.randn(columns).bfloat16()
        scaled, squares = fused_kernels.begin(x, gain)
        expected = cuda_endings.begun(x, gain)
        # The interpreter truncates.
        torch.testing.assert_close(scaled, expected[0], rtol=2**-7, atol=0)
        torch.testing.assert_close(squares, expected[1])
        torch.testing.assert_close(squares.sum(1), x.float().square().sum(1))


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)


def dense(model: Any) -> None:
    linear = model.model.layers[1].self_attn.o_proj
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=BF16)
    model.model.layers[1].self_attn.o_proj = plain


def beside(model: Any) -> None:
    for block, name in whole.places(model):
        block.set_submodule(name, whole.Beside(block.get_submodule(name), 2, torch.empty(0, dtype=BF16)))


def apart(model: Any) -> None:
    """Gate and up that are not one product."""
    mlp = model.model.layers[0].mlp
    mlp.up_proj = PackedLinear.of(nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False, dtype=BF16))


@pytest.mark.parametrize("change", [hooked, dense, beside, apart])
def test_other_projections_take_eight_launches(change: Callable[[Any], None], launches: list[str]) -> None:
    model = packed_model("llama")
    change(model)
    assert_near(model)
    assert "normed" not in launches
    assert launches.count("add_norm") == 5 * 5


@pytest.mark.parametrize(
    "make",
    [
        partial(packed_model, "llama", torch.float16),
        partial(packed_model, "llama", intermediate_size=40),
    ],
    ids=["fp16", "rows"],
)
def test_other_sizes_and_dtypes_take_eight_launches(make: Callable[[], Any], launches: list[str]) -> None:
    assert_near(make())
    assert "normed" not in launches


def test_more_than_eight_rows_take_eight_launches(launches: list[str]) -> None:
    model = packed_model("llama")
    cache = next_tokens(model, kernels=True, batch=9)[2]
    assert cache.kernels
    assert "normed" not in launches


def test_five_launches_can_be_turned_off(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_step, "FIVE", False)
    assert_near(packed_model("llama"))
    assert "normed" not in launches


def test_five_launches_are_taken_where_they_are_faster(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With values and gaps, in models that are wide enough: as measured, so not with panels, nor with codes."""
    monkeypatch.setattr(packed_step, "FIVE", None)
    monkeypatch.setattr(cuda_layouts, "MOST_SIZE", float("inf"))
    model = model_of("llama", dtype=BF16, num_hidden_layers=2, intermediate_size=64)
    with torch.no_grad():
        for block, name in whole.places(model):
            # As many values in every row, so that gate and up are in one order.
            block.get_submodule(name).weight.view(-1, 4)[:, ::2] = 0
    width = model.config.hidden_size
    for sequences, fewest, five in ((1, width, True), (1, width + 1, False), (8, width, False)):
        monkeypatch.setattr(packed_step, "FEWEST_COLUMNS", fewest)
        own = copy.deepcopy(model)
        for block, name in whole.places(own):
            block.set_submodule(name, PackedLinear.of(block.get_submodule(name), sequences))
        group_projections(own)
        launches.clear()
        assert_near(own)
        assert ("normed" in launches) == five
    coded = cuda_coded_gaps.pack_codes(
        torch.ones(32, width, dtype=torch.int8), torch.ones(32, 1, dtype=torch.float16), 8, BF16
    )
    assert isinstance(coded, cuda_gaps.GapLayout)
    assert not packed_step.pays(SimpleNamespace(qkv=SimpleNamespace(layout=coded)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["normed", "swiglu", "added", "begin"])
def test_the_check_notices(name: str, launches: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """If kernels of the five launches are wrong, there are eight."""
    module: Any = fused_operations if name == "begin" else cuda_endings
    right = getattr(module, name)

    def wrong(*given: Any) -> Any:
        result = right(*given)
        return result * 1.5 if isinstance(result, torch.Tensor) else (result[0], result[1] * 3)

    model = packed_model("llama")
    monkeypatch.setattr(module, name, wrong)
    assert_near(model)
    eight = 2 * ["add_norm", "attend", "add_norm", "gated"] + ["add_norm"]
    # The check of five, the check of eight, four tokens.
    assert launches == ["begin", *BLOCK, *BLOCK, "add_norm", *5 * eight]
    told = capsys.readouterr().err
    assert "decoding: blocks take eight launches, not five (their result differs from the model's by" in told
    # What both have in common, and what is wrong with eight as well.
    monkeypatch.setattr(fused_operations, "gated", lambda gate, up: up)
    assert not next_tokens(model, kernels=True)[2].kernels
    assert "decoding: fused kernels are not used (their result differs" in capsys.readouterr().err
