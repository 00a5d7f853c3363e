"""The command generate: what decides its text, and which settings of a checkpoint are ignored or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

import torch_impl
from tiny_models.random_models import byte_tokenizer, random_model, save_random_model
from torch_impl.commands import generate
from torch_impl.decode import next_token

PROMPT = "some text"


def folder(place: Path, family: str = "llama", **generation: Any) -> Path:
    """A model whose generation_config.json has these fields."""
    save_random_model(place / "model", family)
    file = place / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return place / "model"


def edit(model: Path, name: str, **changes: Any) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**content, **changes}))


def run(model: Path, capsys: pytest.CaptureFixture, *options: str, prompt: str = PROMPT) -> tuple[int, str, str]:
    """(status, standard output, standard error without progress)."""
    arguments = [str(model), "--prompt", prompt, "--device", "cpu", "--max_new_tokens", "8", *options]
    capsys.readouterr()
    status = generate.main(arguments)
    said = capsys.readouterr()
    kept = [line for line in said.err.replace("\r", "\n").splitlines() if line and not line.startswith("Loading")]
    return status, said.out, "\n".join(kept)


def greedy(model: Path, prompt: str = PROMPT, new: int = 8) -> list[int]:
    """The most likely tokens, by a full forward pass for each."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = byte_tokenizer()(prompt, return_tensors="pt")["input_ids"]
    for _ in range(new):
        ids = torch.cat([ids, plain(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, -new:].tolist()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the loop is called with, and the tokens that come of it."""
    found: dict[str, Any] = {}
    plain = next_token.decode

    def decode(model: Any, input_ids: torch.Tensor, **given: Any) -> torch.Tensor:
        ids = plain(model, input_ids, **given)
        found.update(given, new=ids[0, input_ids.shape[1] :].tolist())
        return ids

    monkeypatch.setattr(next_token, "decode", decode)
    return found


def processors(found: LogitsProcessorList) -> dict[str, Any]:
    return {type(one).__name__: one for one in found}


ASKING = {
    "do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.2, "max_length": 12, "max_new_tokens": 2, "num_beams": 4,
    "repetition_penalty": 1.9, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "use_cache": False,
}  # fmt: skip


@pytest.mark.parametrize("asking", [{}, ASKING], ids=["plain", "asking"])
def test_the_command_line_decides(
    asking: dict[str, Any], tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    """Greedy without options; with them, the temperature and the nucleus that they say, and no other filter."""
    model = folder(tmp_path, **asking)
    status, _, said = run(model, capsys)
    assert status == 0
    assert seen["new"] == greedy(model)
    assert not seen["generation_config"].do_sample
    assert not processors(seen["logits_processor"])
    unused = "num_beams 4, repetition_penalty 1.9"
    assert (
        "note: ignored settings of generation_config.json: min_new_tokens 5, no_repeat_ngram_size 2, " + unused in said
    ) == bool(asking)

    assert run(model, capsys, "--temperature", "0.7", "--top_p", "0.9")[0] == 0
    settings, found = seen["generation_config"], processors(seen["logits_processor"])
    assert (settings.do_sample, settings.num_beams, settings.use_cache) == (True, 1, True)
    assert set(found) == {"TemperatureLogitsWarper", "TopPLogitsWarper"}
    assert found["TemperatureLogitsWarper"].temperature == 0.7
    assert found["TopPLogitsWarper"].top_p == 0.9
    assert len(seen["new"]) == 8

    assert run(model, capsys, "--temperature", "2")[0] == 0
    assert set(processors(seen["logits_processor"])) == {"TemperatureLogitsWarper"}


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_as_stored_unless_told_otherwise(
    packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also on a CPU, where a run computes in float32."""
    model = folder(tmp_path)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    if packed:
        torch_impl.pack(model, tmp_path / "packed")
        model = tmp_path / "packed"
    for options, dtype in (([], "bfloat16"), (["--dtype", "float64"], "float64")):
        status, _, said = run(model, capsys, *options)
        assert status == 0
        assert f" MB, {dtype}; peak memory" in said


def test_draws_are_those_of_the_temperature(
    tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    """By hand: softmax of logits over temperature, all tokens in, one draw a token."""
    model = folder(tmp_path, top_k=1)
    assert run(model, capsys, "--temperature", "3", "--seed", "11")[0] == 0
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = byte_tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(11)
    with torch.no_grad():
        for _ in range(8):
            share = (plain(input_ids=ids, use_cache=False).logits[:, -1] / 3).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(share, 1)], 1)
    assert seen["new"] == ids[0, -8:].tolist()


@pytest.mark.parametrize("as_list", [False, True])
def test_a_text_ends_where_the_model_says(
    as_list: bool, tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    model = folder(tmp_path)
    end = greedy(model)[3]
    edit(model, "generation_config.json", eos_token_id=[250, end] if as_list else end)
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)[: greedy(model).index(end) + 1]


def test_a_text_ends_at_a_string(tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    expected = greedy(model)
    letter = next(i for i, token in enumerate(expected) if byte_tokenizer().decode([token]).isascii())
    edit(model, "generation_config.json", stop_strings=[byte_tokenizer().decode([expected[letter]])])
    assert run(model, capsys)[0] == 0
    assert seen["new"] == expected[: letter + 1]


def test_a_string_that_begins_in_the_prompt_ends_nothing(
    tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    model = folder(tmp_path)
    expected = greedy(model)
    first = byte_tokenizer().decode(expected[:1])
    assert first.isascii()
    assert PROMPT[-1] + first not in byte_tokenizer().decode(expected)
    edit(model, "generation_config.json", stop_strings=[PROMPT[-1] + first])
    assert run(model, capsys)[0] == 0
    assert seen["new"] == expected


def test_rows_of_a_batch_end_on_their_own() -> None:
    """Each at its own token, padded behind it as transformers pads; the batch ends with its last row."""
    model = random_model("llama")
    model.generation_config.eos_token_id = None
    prompts = torch.randint(0, 200, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    free = model.generate(prompts, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)[:, 7:]
    ends = [int(free[0, 1]), int(free[1, 5]), int(free[2, 3])]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": ends, "pad_token_id": 255}
    theirs = model.generate(prompts, attention_mask=mask, **options)
    lengths = [int((row[7:] != 255).sum()) for row in theirs]
    assert len(set(lengths)) > 1, "rows that end at different tokens are what this is about"

    class Silent:
        def put(self, value: torch.Tensor) -> None: ...
        def end(self) -> None: ...

    def loop(*given: Any, **named: Any) -> torch.Tensor:
        return next_token.decode(*given, **{**named, "streamer": Silent()})

    ours = model.generate(prompts, attention_mask=mask, custom_generate=loop, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 7 + max(lengths)


def test_a_configuration_without_a_cache(tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    """Fine-tuning with gradient checkpointing leaves it so."""
    model = folder(tmp_path, use_cache=False)
    edit(model, "config.json", use_cache=False)
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)


def refused(
    model: Path, capsys: pytest.CaptureFixture, words: Sequence[str], *options: str, prompt: str = PROMPT
) -> None:
    status, out, said = run(model, capsys, *options, prompt=prompt)
    assert (status, out) == (2, "")
    assert said.startswith("error: ")
    assert said.count("\n") == 0
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"eos_token_id": "</s>"}, ["generation_config.json", "eos_token_id", "'</s>'"]),
        ({"eos_token_id": [1, "</s>"]}, ["generation_config.json", "eos_token_id", "'</s>'"]),
        ({"eos_token_id": True}, ["generation_config.json", "eos_token_id", "True"]),
        ({"stop_strings": 7}, ["generation_config.json", "stop_strings", "7"]),
        ({"stop_strings": [""]}, ["generation_config.json", "stop_strings"]),
        ({"max_new_tokens": "many"}, ["generation_config.json"]),
    ],
)
def test_generation_settings_that_cannot_be_used(
    generation: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(folder(tmp_path, **generation), capsys, words)


@pytest.mark.parametrize("content", ["{", "[]", "null", "\xff"])
def test_generation_settings_that_are_none(content: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    (model / "generation_config.json").write_text(content, encoding="latin-1")
    refused(model, capsys, ["generation_config.json"])


def test_a_token_that_begins_texts_is_not_asked_for(
    tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    """The tokenizer has put it before the prompt, if the model wants it."""
    model = folder(tmp_path, bos_token_id=["x"])
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)


def test_no_generation_settings_at_all(tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    (model / "generation_config.json").unlink()
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)


def test_learned_positions_are_counted_before_any_token(
    tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    """128 of them: a prompt of 9 leaves room for 119."""
    model = folder(tmp_path, "opt", eos_token_id=None)
    words = [
        "prompt is 9 tokens long and max_new_tokens is 120",
        "128 learned positions",
        "--max_new_tokens 119 or fewer",
    ]
    refused(model, capsys, words, "--max_new_tokens", "120")
    refused(model, capsys, ["use a shorter prompt"], prompt="x" * 128)
    status, _, said = run(model, capsys, "--max_new_tokens", "119")
    assert (status, len(seen["new"])) == (0, 119)
    assert "note:" not in said


def test_computed_positions_go_on_with_a_note(
    tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    model = folder(tmp_path, eos_token_id=None)
    status, _, said = run(model, capsys, "--max_new_tokens", "120")
    assert (status, len(seen["new"])) == (0, 120)
    assert "note: this model was trained on at most 128 tokens" in said
    assert "note:" not in run(model, capsys, "--max_new_tokens", "119")[2]


def test_prompts_that_are_no_tokens_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    refused(model, capsys, ["prompt is ''"], prompt="")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    words = ["the tokenizer returns token 257, '<new>'", "the model knows only 257", "use the tokenizer of this model"]
    refused(model, capsys, words, prompt="a <new> one")
    assert run(model, capsys)[0] == 0


def test_a_tokenizer_without_a_mask(tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    edit(model, "tokenizer_config.json", model_input_names=["input_ids"])
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)


@pytest.mark.parametrize(
    ("choice", "device", "tokens", "found"),
    [
        ("auto", "cuda", 256, True),
        ("auto", "cuda", 255, False),
        ("auto", "cpu", 10_000, False),
        ("on", "cpu", 1, True),
        ("off", "cuda", 10_000, False),
    ],
)
def test_compiling_must_pay_off(choice: str, device: str, tokens: int, found: bool) -> None:
    """As --help says: on a GPU from 256 new tokens."""
    assert generate.compiles(choice, torch.device(device), tokens) is found


def test_the_summary_s_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares memory counts once; ru_maxrss is in KiB; the first token is timed from the prompt's echo."""
    model = torch.nn.Linear(500, 1000, bias=False)
    model.register_buffer("tied", model.weight.data.view(-1))
    model.device, model.dtype = torch.device("cpu"), torch.float32  # type: ignore[assignment]
    monkeypatch.setattr(generate.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=500_000))
    assert generate._summary(model, 7, [1.0, 1.5, 2.0, 2.5]).splitlines() == [  # type: ignore[arg-type]
        "prompt of 7 tokens: first token after 0.50 s",
        "2 more tokens: 2.00 tokens/s",
        "weights 2.0 MB, float32; peak memory 512 MB",
    ]


def test_ctrl_c_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The line stands apart from the text so far."""
    model = folder(tmp_path)
    call = next_token.NextToken.__call__

    def interrupted(self: next_token.NextToken, ids: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(next_token.NextToken, "__call__", stop)
        return call(self, ids)

    def stop(self: next_token.NextToken, ids: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(next_token.NextToken, "__call__", interrupted)
    assert generate.main([str(model), "--prompt", PROMPT, "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("\nerror: interrupted\n")


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"


def with_template(model: Path, template: str) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    return model


def test_chat_applies_the_template(tmp_path: Path, seen: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    """The prompt is a user's message; without the option it stays as it is."""
    model = with_template(folder(tmp_path), TEMPLATE)
    whole = f"<user>{PROMPT}<reply>"
    status, _, said = run(model, capsys, "--chat")
    assert status == 0
    assert seen["new"] == greedy(model, whole)
    assert f"prompt of {len(whole)} tokens" in said
    assert run(model, capsys)[0] == 0
    assert seen["new"] == greedy(model)


def test_chat_without_a_template_that_works(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = folder(tmp_path)
    refused(model, capsys, [str(model), "its tokenizer has no chat template; leave out --chat"], "--chat")
    with_template(model, "{{ raise_exception('a system message comes first') }}")
    refused(model, capsys, ["its chat template fails (a system message comes first); leave out --chat"], "--chat")


def test_a_line_keeps_the_space_it_begins_with(capsys: pytest.CaptureFixture) -> None:
    """What was printed is not decoded again; decoded alone, a SentencePiece token would lose its space."""
    words = Tokenizer(models.WordLevel({"▁a": 0, "\n": 1, "▁▁b": 2}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    streamer = generate._TimedStreamer(PreTrainedTokenizerFast(tokenizer_object=words), continues=True)
    streamer.put(torch.tensor([[0, 0]]))
    for token in (0, 1, 2, 0, 1, 1, 2):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == " a\n  b a\n\n  b\n"
