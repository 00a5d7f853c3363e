"""What a model cannot do is refused at the start, by every command alike and before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from oracle_tests.small_runs import arguments
from tiny_models.random_models import byte_tokenizer, random_model, save_random_model
from torch_impl.commands import compare, generate, pack
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.families import position_limit
from torch_impl.experiment.config import parse
from torch_impl.experiment.material import load_material
from torch_impl.run import main

PLAIN = {"steps": 1, "finetune": "false"}
# Each way to use a model: a command, and the options of a run that matter.
RUNS: dict[str, dict[str, Any]] = {
    "healed": {},
    "plain": PLAIN,
    "from files": {**PLAIN, "offload": "on"},
    "dry run": {"dry_run": "true"},
}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if any weight is read."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were asked for")

    for name in ("load", "load_offloaded"):
        monkeypatch.setattr(pretrained, name, load)


def one_line(status: int, capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr().err.replace("\r", "\n")
    assert status == 2, said
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def lines_of_runs(place: Path, capsys: pytest.CaptureFixture, **changes: Any) -> dict[str, str]:
    """Messages of every kind of run, and of compare."""
    capsys.readouterr()
    said = {name: one_line(main(arguments(place, **{**kind, **changes})), capsys) for name, kind in RUNS.items()}
    options = {**changes, "output_dir": None, "learning_rate": None}
    said["compare"] = one_line(compare.main(["quick", *arguments(place, **options)]), capsys)
    assert not (place / "out").exists()
    return said


@pytest.mark.usefixtures("no_weights")
def test_learned_positions_bound_every_length(place: Path, capsys: pytest.CaptureFixture) -> None:
    save_random_model(place / "model", "opt", max_position_embeddings=64)
    words = "; this model has only 64 learned positions, use 64 or less"
    for name in ("seqlen", "eval_seqlen"):
        for line in lines_of_runs(place, capsys, **{name: 65}).values():
            assert line == f"error: {name} is 65{words}"
    said = lines_of_runs(place, capsys, train_seqlen=65, eval_seqlen=65)
    assert (
        said["healed"] == said["dry run"] == said["compare"] == f"error: eval_seqlen is 65, train_seqlen is 65{words}"
    )
    assert said["plain"] == said["from files"] == f"error: eval_seqlen is 65{words}", "nothing is trained"


@pytest.mark.usefixtures("no_weights")
def test_more_calibration_than_any_memory_holds(place: Path, capsys: pytest.CaptureFixture) -> None:
    for line in lines_of_runs(place, capsys, nsamples=10**9, seqlen=10**6, rmi_samples=2).values():
        assert line.startswith(
            "error: nsamples is 1000000000 and seqlen is 1000000: the token ids alone need 7,450,581 GiB"
        )


def test_as_many_tokens_as_positions_are_enough(place: Path) -> None:
    save_random_model(place / "model", "opt", max_position_embeddings=32)
    assert main(arguments(place, **PLAIN)) == 0


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "mistral", "qwen3", "opt"])
def test_whose_positions_are_learned(family: str) -> None:
    assert position_limit(random_model(family)) == (128 if family == "opt" else None)


@pytest.mark.parametrize("load", [load_material, partial(load_material, offloaded=True)])
def test_computed_positions_go_on_with_one_warning(
    place: Path, load: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    save_random_model(place / "model", "llama", max_position_embeddings=16)
    load(parse(arguments(place, **PLAIN)))
    expected = (
        "seqlen is 32, eval_seqlen is 32; this model was trained on at most 16 tokens, expect worse results beyond"
    )
    assert [record.message for record in caplog.records] == [expected]
    caplog.clear()
    assert main([*arguments(place, **PLAIN), "--dry_run"]) == 0
    assert [record.message for record in caplog.records] == [expected]
    caplog.clear()
    load(parse(arguments(place, **PLAIN, seqlen=16, eval_seqlen=16)))
    assert not caplog.records


@pytest.mark.usefixtures("no_weights")
def test_texts_that_cannot_be_are_named_by_their_option(place: Path, capsys: pytest.CaptureFixture) -> None:
    for option in ("calibration_data", "eval_data"):
        for line in lines_of_runs(place, capsys, **{option: "wikitext"}).values():
            assert line.startswith(
                f"error: {option} is 'wikitext'; allowed: stdlib, c4, wikitext2, alpaca-gpt4, a file"
            )
            assert line.endswith("; did you mean wikitext2?")
        for line in lines_of_runs(place, capsys, **{option: "no.txt"}).values():
            assert line == f"error: {option} is 'no.txt', which does not exist; give an existing file or folder"
    assert "finetune_data is 'x'; allowed" in one_line(main(arguments(place, finetune_data="x")), capsys)
    assert main(arguments(place, **PLAIN, finetune_data="x", dry_run="true")) == 0, "nothing is trained"


def test_a_text_without_text_is_named_by_its_option(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "empty.txt").write_text(" \n")
    for option in ("calibration_data", "finetune_data", "eval_data"):
        line = one_line(main(arguments(place, **{option: place / "empty.txt"})), capsys)
        assert line.startswith(f"error: {option} is '{place / 'empty.txt'}', which holds no text")


def test_tokens_that_the_model_does_not_know(place: Path, capsys: pytest.CaptureFixture) -> None:
    """A tokenizer with one token more than the model: an index out of range, on a GPU a lost context."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["fox jumps"])
    tokenizer.save_pretrained(place / "model")
    words = "the tokenizer returns token 257, 'fox jumps', but the model knows only 257 tokens; use the tokenizer of"
    for kind in ({}, {**PLAIN, "offload": "on"}):
        assert words in one_line(main(arguments(place, **kind)), capsys)


def test_a_tokenizer_that_fails_at_its_first_word(place: Path, capsys: pytest.CaptureFixture) -> None:
    file = place / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": {"a": 1}}))
    commands = [(main, arguments(place)), (generate.main, [str(place / "model"), "--prompt", "x", "--device", "cpu"])]
    for command, argv in commands:
        assert f"model {place / 'model'} does not load as a tokenizer: " in one_line(command(argv), capsys)


def test_a_model_without_a_tokenizer_asks_for_its_files(place: Path, capsys: pytest.CaptureFixture) -> None:
    for file in (place / "model").glob("token*"):
        file.unlink()
    line = one_line(main(arguments(place)), capsys)
    assert line.startswith(
        f"error: model {place / 'model'} has no tokenizer; copy tokenizer.json and tokenizer_config.json of"
    )


def mixture(folder: Path) -> Path:
    """Experts in every block but the first, which is dense; transformers saves them apart and loads them as one tensor."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257, "max_position_embeddings": 128,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, eos_token_id=256)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_mixture_of_experts_behind_a_dense_block(place: Path, capsys: pytest.CaptureFixture) -> None:
    """No command prunes or packs it; text comes of it all the same."""
    model = mixture(place / "mixture")
    words = "match no known family: model.layers.1 holds mlp.experts, mlp.gate, "
    for line in lines_of_runs(place, capsys, model=model).values():
        assert words in line
    assert words in one_line(pack.main([str(model), str(place / "packed"), "--device", "cpu"]), capsys)
    assert generate.main([str(model), "--prompt", "x", "--max_new_tokens", "3", "--device", "cpu"]) == 0


BAD_CONFIGURATIONS = {
    "eos_token_id": "</s>",
    "model_type": "none such",
    "num_attention_heads": 5,
    "num_hidden_layers": "three",
    "hidden_act": "none such",
    "vocab_size": -1,
}


@pytest.mark.parametrize("dtype", ["bf16", "auto", "torch.fp16", "load"])
def test_a_dtype_that_is_none(dtype: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    file = place / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": dtype}))
    line = one_line(generate.main([str(place / "model"), "--prompt", "x", "--device", "cpu"]), capsys)
    assert line.endswith(f"config.json has dtype {dtype!r}, not a torch dtype; use bfloat16, say, or remove that line")


@pytest.mark.parametrize("field", BAD_CONFIGURATIONS)
def test_a_configuration_that_cannot_be(field: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    """The same one line from every command, which names the folder, its file and what is wrong there."""
    file = place / "model" / "config.json"
    value = BAD_CONFIGURATIONS[field]
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    said = lines_of_runs(place, capsys)
    model = str(place / "model")
    said["pack"] = one_line(pack.main([model, str(place / "packed"), "--device", "cpu"]), capsys)
    said["generate"] = one_line(generate.main([model, "--prompt", "x", "--device", "cpu"]), capsys)
    assert len(set(said.values())) == 1
    for name, line in said.items():
        assert model in line, name
        assert "config.json" in line, (name, line)
