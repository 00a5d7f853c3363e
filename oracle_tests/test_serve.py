"""The server: OpenAI's API over HTTP with OpenAI's own client, bad requests answered, and what it will not do."""

from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oracle_tests.packed_models import save_sparse
from tiny_models.random_models import byte_tokenizer, save_random_model
from torch_impl.commands import generate, pack, requests, serve
from torch_impl.decode import packed_folder

if any(serve.find_spec(name) is None for name in serve.NEEDED):
    pytest.skip("needs the extra serve", allow_module_level=True)

import openai
import uvicorn
from fastapi.testclient import TestClient

from torch_impl.commands import server

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if tools %}{{ tools }}{% endif %}assistant: "
)
PROMPT, CHAT = "def main", [{"role": "user", "content": "def main"}]

# All printable characters are equally likely, nearly.
EVEN = {str(byte_tokenizer()(chr(code))["input_ids"][0]): 60 for code in range(33, 127)}


def with_template() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model whose configuration asks for beams and an early end, and whose tokenizer has a chat template."""
    place = tmp_path_factory.mktemp("serve")
    save_sparse(place / "plain", "llama")
    with_template().save_pretrained(place / "plain")
    settings = place / "plain" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_beams": 2}))
    assert pack.main([str(place / "plain"), str(place / "tiny"), "--device", "cpu"]) == 0
    return place / "tiny"


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The server, on a free port, in a thread."""
    model, tokenizer = packed_folder.load(folder, torch.device("cpu"))
    listening = serve._listen("127.0.0.1", 0)
    running = uvicorn.Server(uvicorn.Config(server.build("tiny", model, tokenizer), log_level="critical"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join(20)
    listening.close()
    assert not thread.is_alive()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def greedy(folder: Path, prompt: str, new: int) -> str:
    """The likeliest tokens, by the whole plain model again for each."""
    model, tokenizer = packed_folder.load(folder, torch.device("cpu"))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_completions(client: openai.OpenAI, folder: Path) -> None:
    """Whole and in pieces the same text, the model's likeliest."""
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9)
    assert answer.choices[0].text == greedy(folder, PROMPT, 9)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 9)
    assert answer.model == "tiny"
    parts = list(client.completions.create(model="tiny", prompt=[PROMPT], max_tokens=9, stream=True))
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text
    assert len(parts) > 2


def test_chat_completions(client: openai.OpenAI, folder: Path) -> None:
    """Through the chat template."""
    expected = greedy(folder, f"user: {PROMPT}\nassistant: ", 9)
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=9)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    pieces = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    parts = list(client.chat.completions.create(model="tiny", messages=pieces, max_tokens=9, stream=True, tools=None))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_temperature_decides(client: openai.OpenAI, folder: Path) -> None:
    def text(**options: Any) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, **options).choices[0].text

    assert text(temperature=2, seed=1) == text(temperature=2, seed=1) != text(temperature=2, seed=2)
    assert text(temperature=0) == text(temperature=1e-40) == greedy(folder, PROMPT, 9) != text(temperature=2, seed=1)
    letter = byte_tokenizer()("x")["input_ids"][0]
    assert text(logit_bias={str(letter): 100}) == "x" * 9


def test_each_request_has_its_own_seed_also_if_they_come_together(client: openai.OpenAI) -> None:
    def text(seed: int | openai.NotGiven) -> str:
        given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 2, "logit_bias": EVEN}
        return client.completions.create(**given, seed=seed).choices[0].text

    alone = [text(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(text, range(6))) == alone
    assert len(set(alone)) == 6
    after = [text(openai.NOT_GIVEN) for seed in (1, 1) if text(seed)]
    assert after[0] != after[1], "the seed is that of its own request alone"


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0), (0, 0.5), (-0.3, 0.7)])
def test_penalties_are_subtracted_for_tokens_of_the_answer(
    client: openai.OpenAI, folder: Path, frequency: float, presence: float
) -> None:
    """As OpenAI defines them: for each time that a token is in the answer, and once if it is; not for the prompt's."""
    letter = byte_tokenizer()("d")["input_ids"][0]
    model, tokenizer = packed_folder.load(folder, torch.device("cpu"))
    ids, answer = tokenizer(PROMPT, return_tensors="pt")["input_ids"], []
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            logits[letter] += 2
            for token in set(answer):
                logits[token] -= frequency * answer.count(token) + presence
            answer.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([answer[-1:]])], 1)
    found = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=12,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias={str(letter): 2},
    )
    assert found.choices[0].text == tokenizer.decode(answer, skip_special_tokens=True)


def test_sampling_is_from_all_tokens(client: openai.OpenAI) -> None:
    """transformers' own default leaves out all but the likeliest 50."""
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 2, "logit_bias": EVEN}
    answers = (client.completions.create(**given, seed=seed) for seed in range(200))
    assert len({answer.choices[0].text for answer in answers}) > 50


def test_a_completion_continues_its_prompt_also_with_a_space(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """SentencePiece tokens that are decoded alone lose the space before the first word; an answer in a chat needs none."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"▁w{n}": n for n in range(1, 257)}}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", chat_template="{{ messages[0].content }}"
    )
    save_random_model(tmp_path / "model", "llama")
    tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = generate.load(str(tmp_path / "model"), "cpu", "auto")
    client = TestClient(server.build("tiny", model, tokenizer))
    prompt, given = "w1 w2", {"max_tokens": 5, "temperature": 0}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:]
    expected = "".join(f" w{token}" for token in new.tolist())

    def pieces(route: str, body: dict[str, Any], text: Callable[[Any], str]) -> str:
        lines = client.post(route, json={**body, **given, "stream": True}).text.splitlines()
        chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        return "".join(text(chunk) for chunk in chunks)

    body: dict[str, Any] = {"prompt": prompt}
    assert client.post("/v1/completions", json={**body, **given}).json()["choices"][0]["text"] == expected
    assert pieces("/v1/completions", body, lambda chunk: chunk.get("text", "")) == expected
    body = {"messages": [{"role": "user", "content": prompt}]}
    answer = client.post("/v1/chat/completions", json={**body, **given}).json()["choices"][0]["message"]["content"]
    assert answer == expected[1:]
    assert pieces("/v1/chat/completions", body, lambda chunk: chunk["delta"].get("content") or "") == expected[1:]
    words_of = [str(tmp_path / "model"), "--prompt", prompt, "--max_new_tokens", "5", "--device", "cpu"]
    assert generate.main(words_of) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert generate.main([*words_of, "--chat"]) == 0
    assert capsys.readouterr().out == f"{expected[1:]}\n"


def test_no_tools_if_none_are_chosen(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    given = {"model": "tiny", "messages": CHAT, "max_tokens": 1}

    def tokens(**more: Any) -> int:
        return client.chat.completions.create(**given, **more).usage.prompt_tokens

    assert tokens(tools=tools, tool_choice="none") == tokens() < tokens(tools=tools, tool_choice="auto")


def test_stop_texts_are_no_part_of_the_answer(client: openai.OpenAI, folder: Path) -> None:
    """Whole and in pieces, of one character each, so the stop text comes in two; the end may be its first half."""
    letters = {str(byte_tokenizer()(letter)["input_ids"][0]): 100 for letter in "x"}

    def text(words: str, **options: Any) -> tuple[str, str]:
        given = {"model": "tiny", "max_tokens": 9, "temperature": 0, "logit_bias": letters, **options}
        if words:
            answer = client.completions.create(prompt=words, **given).choices[0]
            parts = list(client.completions.create(prompt=words, stream=True, **given))
            pieces = "".join(part.choices[0].text for part in parts)
            whole = answer.text
        else:
            answer = client.chat.completions.create(messages=CHAT, **given).choices[0]
            parts = list(client.chat.completions.create(messages=CHAT, stream=True, **given))
            pieces = "".join(part.choices[0].delta.content or "" for part in parts)
            whole = answer.message.content
        assert (pieces, parts[-1].choices[0].finish_reason) == (whole, answer.finish_reason)
        return whole, answer.finish_reason

    for words in (PROMPT, ""):
        assert text(words) == ("x" * 9, "length")
        assert text(words, stop="xx") == text(words, stop=["y", "xx"]) == ("", "stop")
        assert text(words, stop="xy") == ("x" * 9, "length"), "the last x is held back until the end"
    plain = text(PROMPT, logit_bias={})[0]
    stop = next(
        plain[i : i + 2] for i in range(1, 8) if plain[i : i + 2].isascii() and plain.find(plain[i : i + 2]) == i
    )
    assert text(PROMPT, logit_bias={}, stop=stop) == (plain[: plain.index(stop)], "stop")
    assert text(PROMPT, logit_bias={}, stop=stop, suffix=stop) == (plain[: plain.index(stop)] + stop, "stop")


def test_a_stop_text_does_not_begin_in_the_prompt(client: openai.OpenAI) -> None:
    letters = {str(byte_tokenizer()("x")["input_ids"][0]): 100}
    answer = client.completions.create(
        model="tiny", prompt=f"{PROMPT}x", max_tokens=9, stop="xxx", temperature=0, logit_bias=letters
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 3


def test_the_newer_name_of_the_length_wins(client: openai.OpenAI) -> None:
    for older, newer in ((9, 3), (3, 9)):
        answer = client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=older, max_completion_tokens=newer, logit_bias={"1": -100}
        )
        assert answer.usage.completion_tokens == newer


def test_the_length_if_nobody_says(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "TOKENS", 5)
    assert client.completions.create(model="tiny", prompt=PROMPT).usage.completion_tokens <= 5


def test_streams_end_as_openai_s(url: str) -> None:
    lines = post(url, "completions", {"prompt": PROMPT, "max_tokens": 2, "stream": True})[1].strip().splitlines()
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines if line)


def test_models(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with urllib.request.urlopen(f"{url}/health", timeout=20) as answer:
        assert json.load(answer) == {"status": "ok"}


def post(url: str, route: str, body: Any, kind: str = "application/json") -> tuple[int, str]:
    """(status, text). body: bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/{route}", data, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


CHATS = [
    ({}, 400, "messages is missing or empty"),
    ({"messages": []}, 400, "messages is missing or empty"),
    ({"messages": "hello"}, 400, "messages is missing or empty"),
    ({"messages": ["hello"]}, 400, "messages[0] has no role"),
    ({"messages": [*CHAT, {"role": "user"}]}, 400, "messages[1] has no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]}, 400, "text alone"),
    ({"messages": CHAT, "chat_template_kwargs": {"tokenize": False}}, 400, "may not set tokenize"),
    ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "{% x"}}, 400, "may not set chat_template"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "no such role"),
    ({"messages": CHAT, "chat_template_kwargs": 3}, 400, "chat_template_kwargs is 3"),
    ({"messages": CHAT, "generation_config": "{}"}, 400, 'generation_config is "{}"; allowed: nothing'),
    ({"messages": CHAT, "colour": "red"}, 422, "colour"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}}, 400, 'allowed: {"type": "text"}'),
    ({"messages": CHAT, "tool_choice": "required"}, 400, 'tool_choice is "required"; allowed: auto or none'),
    ({"messages": CHAT, "parallel_tool_calls": False}, 400, "parallel_tool_calls is false; allowed: true"),
    ({"messages": CHAT, "modalities": ["text", "audio"]}, 400, "modalities is"),
    ({"messages": CHAT, "functions": [{"name": "f"}]}, 400, "allowed: nothing; use tools"),
    ({"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs is 2; allowed: 0"),
]
TEXTS = [
    ({}, 400, "prompt is missing or empty"),
    ({"prompt": ""}, 400, "prompt is missing or empty"),
    ({"prompt": [PROMPT, PROMPT]}, 400, "give one text"),
    ({"prompt": [1, 2]}, 400, "prompt is not one text"),
    ({"prompt": PROMPT, "model": "gpt-4"}, 404, "model 'gpt-4' is not served here; the model is 'tiny'"),
    ({"prompt": PROMPT, "max_tokens": 0}, 400, "max_tokens is 0; allowed: 1 or more"),
    ({"prompt": PROMPT, "max_tokens": "many"}, 400, 'max_tokens is "many"'),
    ({"prompt": PROMPT, "temperature": -1}, 400, "temperature is -1; allowed: 0 to 2"),
    ({"prompt": PROMPT, "temperature": float("nan")}, 400, "temperature is NaN"),
    ({"prompt": PROMPT, "top_p": 0}, 400, "top_p is 0; allowed: above 0, up to 1"),
    ({"prompt": PROMPT, "frequency_penalty": -3}, 400, "frequency_penalty is -3; allowed: -2 to 2"),
    ({"prompt": PROMPT, "presence_penalty": 3}, 400, "presence_penalty is 3; allowed: -2 to 2"),
    ({"prompt": PROMPT, "seed": "x"}, 400, 'seed is "x"'),
    ({"prompt": PROMPT, "stop": [3]}, 400, "stop is [3]; allowed: a text"),
    ({"prompt": PROMPT, "n": 2}, 400, "n is 2; allowed: 1"),
    ({"prompt": PROMPT, "stream": "yes"}, 400, 'stream is "yes"'),
    ({"prompt": PROMPT, "stop": ["\ud800", 3]}, 400, r'stop is ["\ud800", 3]'),
    ({"prompt": PROMPT, "logit_bias": {"257": 1}}, 400, "logit_bias does not map token ids below 257"),
]


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [*(("chat/completions", *case) for case in CHATS), *(("completions", *case) for case in TEXTS)],
)
def test_bad_requests_are_answered(url: str, route: str, body: dict[str, Any], status: int, words: str) -> None:
    """In OpenAI's format, also if a stream is asked for, and the next request is served."""
    for more in ({}, {"stream": True}) if "stream" not in body else ({},):
        code, text = post(url, route, {**body, **more})
        assert code == status, text
        assert words in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "kind"), [(b"{", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain")]
)
def test_bodies_that_are_none(url: str, body: bytes, kind: str) -> None:
    """The last is what a web page elsewhere may send without being asked."""
    code, text = post(url, "completions", body, kind)
    assert code == 400
    assert "not a JSON object" in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    "route", ["load_model", "reset", "v1/responses", "v1/audio/transcriptions", "docs", "openapi.json"]
)
def test_nothing_else_is_served(url: str, route: str) -> None:
    """transformers' server would load any model that a client names."""
    code, text = post(url, f"../{route}", {"model": "x"})
    assert code == 404
    assert "error" in json.loads(text)


def test_what_a_route_does_not_do_is_refused_as_json(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/v1/completions", timeout=30)
    assert caught.value.code == 405
    assert "error" in json.loads(caught.value.read())


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_positions_and_no_template(tmp_path: Path, family: str) -> None:
    """128 of them, learned or trained on; the tokenizer has no chat template."""
    save_random_model(tmp_path / "model", family)
    model, tokenizer = generate.load(str(tmp_path / "model"), "cpu", "auto")
    ids = tokenizer("x" * 100, return_tensors="pt")["input_ids"]
    body: dict[str, Any] = {}
    requests.check_length(model, tokenizer, ids, body)
    assert body == {"max_tokens": 28}
    for tokens, asked in ((100, 29), (128, None)):
        with pytest.raises(ValueError, match=f"has {tokens} tokens and .* only 128 positions"):
            requests.check_length(model, tokenizer, torch.zeros(1, tokens, dtype=torch.long), {"max_tokens": asked})
    with pytest.raises(ValueError, match="no chat template; use /v1/completions"):
        requests.chat_ids(tokenizer, {"messages": CHAT})


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """It listens on this machine only unless told otherwise, and says where. Weights are as stored unless told otherwise."""
    seen: list[Any] = []
    dtypes: list[torch.dtype] = []
    monkeypatch.setattr(server, "run", lambda app, listening: seen.append(listening.getsockname()))
    monkeypatch.setattr(server, "build", lambda name, model, tokenizer: dtypes.append(model.dtype))
    assert serve.main([str(folder), "--port", "0", "--device", "cpu"]) == 0
    assert seen[0][0] == "127.0.0.1"
    assert f"tiny at http://127.0.0.1:{seen[0][1]}/v1: " in capsys.readouterr().out
    options = ["--port", "0", "--device", "cpu", "--host", "0.0.0.0", "--dtype", "float64"]
    assert serve.main([str(folder), *options]) == 0
    assert seen[1][0] == "0.0.0.0"
    assert dtypes == [torch.float32, torch.float64]


def test_bad_options(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, words in (
            (["--port", "70000"], "port is 70000; allowed: 0 to 65535"),
            (["--port", str(port)], f"cannot listen on 127.0.0.1, port {port}"),
            (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
            (["--trust_remote_code"], "--trust_remote_code is not an option"),
        ):
            assert serve.main([str(folder), *options]) == 2
            assert words in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("fastapi", "openai") else sys)
    assert serve.main([str(folder)]) == 2
    line = 'error: serving needs fastapi, openai; install them: pip install "losa-oracle[serve]"\n'
    assert capsys.readouterr().err == line
