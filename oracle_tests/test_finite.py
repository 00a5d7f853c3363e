"""Overflow stops every command at once, with one line that names the place, the dtype and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from oracle_tests.small_runs import arguments, make_place
from oracle_tests.tiny_material import Heard, prompt, settings, token_ids
from tiny_models.random_models import random_model
from torch_impl import losa
from torch_impl.commands import generate
from torch_impl.decode import next_token
from torch_impl.engine import calibration, finite
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.evaluate import perplexity, stream_perplexity
from torch_impl.run import main

ADVICE = "holds NaN or infinity in float16; float16 ends at 65,504: use dtype bfloat16 or float32"


def loud(dtype: torch.dtype = torch.float16, block: int = 1) -> PreTrainedModel:
    """A model where the product of gate and up in one block overflows float16, but no other dtype."""
    model = random_model("llama", dtype=dtype)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[block].mlp.get_submodule(name).weight.mul_(300)
    return model


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_place(tmp_path)
    loud().save_pretrained(tmp_path / "model")
    return tmp_path


def error_of(main: Callable[..., int], argv: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, "dense: the output of model.layers.1.mlp.down_proj"),
        ({"steps": 1, "finetune": "false"}, "dense: the output of model.layers.1.mlp.down_proj"),
        ({"steps": 1, "finetune": "false", "offload": "on"}, "the output of model.layers.1"),
        (
            {"steps": 1, "finetune": "false", "offload": "on", "layer_sparsity": "uniform"},
            "the output of model.layers.1",
        ),
    ],
    ids=["healed", "plain", "from files", "from files, uniform"],
)
def test_a_run_in_float16_that_overflows(place: Path, changes: dict, where: str, capsys: pytest.CaptureFixture) -> None:
    line = error_of(main, arguments(place, dtype="float16", **changes), capsys)
    assert line == f"error: {where} {ADVICE}"
    assert not (place / "out").exists()


def test_text_in_float16_that_overflows_and_the_advice(place: Path, capsys: pytest.CaptureFixture) -> None:
    """As stored and as asked for; nothing is printed. What the line advises helps."""
    argv = [str(place / "model"), "--prompt", "some", "--max_new_tokens", "2", "--device", "cpu"]
    line = error_of(generate.main, argv, capsys)
    assert line == f"error: the output of model.layers.1.mlp.down_proj {ADVICE}"
    for dtype in ("bfloat16", "float32"):
        assert generate.main([*argv, "--dtype", dtype]) == 0
        assert capsys.readouterr().out
    assert main(arguments(place, dtype="bfloat16", steps=1, finetune="false")) == 0


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"layer_sparsity": "rmi"}, "output of model.layers.1"),
        ({"layer_sparsity": "uniform"}, "output of model.layers.1"),
    ],
)
def test_calibration_that_overflows(changes: dict, where: str) -> None:
    """Text that the dense perplexity was not of."""
    model = loud()
    with pytest.raises(finite.NotFiniteError, match=f"^the {where} {ADVICE}$"):
        losa.run(model, token_ids(model, 6, 12), [], settings(training={"finetune": False}, **changes))


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("magnitude", "output of model.layers.1"),
        ("wanda", "input of model.layers.1.mlp.down_proj"),
        ("sparsegpt", "input of model.layers.1.mlp.down_proj"),
    ],
)
def test_a_pruned_model_that_overflows_alone(method: str, where: str) -> None:
    model = loud()
    dense = random_model("llama").to(model.dtype)
    plain = settings(training={"finetune": False}, layer_sparsity="uniform", prune_method=method)
    with pytest.raises(finite.NotFiniteError, match=f"^the {where} {ADVICE}$"):
        losa.run(model, token_ids(model, 6, 12), [], plain, dense=dense)


def test_one_value_in_one_batch_is_enough() -> None:
    model = random_model("llama")
    decoder = Decoder(model)
    stream = calibration.start_stream(decoder, token_ids(model, 5, 9), 2)
    stream.hidden[4, 8, 31] = float("inf")
    with pytest.raises(
        finite.NotFiniteError, match=r"^the output of model\.layers\.0 holds NaN or infinity in float32"
    ):
        stream.advance(decoder.blocks[0], 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["lm_head", "model.norm", "model.layers.2.self_attn.o_proj", "model.layers.0", "model.embed_tokens"]
)
def test_the_first_module_is_named(name: str, bad: float) -> None:
    model = random_model("llama", dtype=torch.bfloat16)

    def spoil(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([3]), bad)

    model.get_submodule(name).register_forward_hook(spoil)
    ids = token_ids(model, 3, 9)
    message = rf"the output of {name} holds NaN or infinity in bfloat16; the weights may be corrupt: download"
    assert finite.locate(model, ids).args[0].startswith(message)
    with pytest.raises(finite.NotFiniteError, match=message):
        perplexity(model, ids, 2)
    heard = Heard()
    with pytest.raises(finite.NotFiniteError, match=message):
        model.generate(prompt(), max_new_tokens=4, custom_generate=partial(next_token.decode, streamer=heard))
    assert heard.ids == prompt()[0].tolist()
    assert not any(hook for module in model.modules() for hook in module._forward_hooks.values() if hook is not spoil)


def test_a_head_that_overflows_behind_a_stream() -> None:
    model = random_model("llama")
    decoder = Decoder(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e38)
    ids = token_ids(model, 3, 9)
    stream = calibration.start_stream(decoder, ids, 2)
    with pytest.raises(finite.NotFiniteError, match=r"^dense: the output of the model's head holds NaN"):
        stream_perplexity(decoder, ids, stream, "dense")


def test_tokens_that_a_model_rules_out_are_no_overflow() -> None:
    """Minus infinity is a logit like any other, where it is not the only one."""
    model = random_model("llama")
    rules_out = [True]

    def mask(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        share = output.shape[-1] if not rules_out else 100
        return output.index_fill(-1, torch.arange(share), -float("inf"))

    model.lm_head.register_forward_hook(mask)
    loop = partial(next_token.decode, streamer=Heard())
    ids = model.generate(prompt(), max_new_tokens=4, custom_generate=loop)
    assert (ids[0, 7:] >= 100).all()
    rules_out.clear()
    with pytest.raises(finite.NotFiniteError, match="lm_head"):
        model.generate(prompt(), max_new_tokens=4, custom_generate=loop)
