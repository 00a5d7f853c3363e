"""The stop text is no part of an answer, in whatever pieces it comes; needs no server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_impl.commands.stop_text import StopText, cut, cut_stream

TEXTS = st.text("ab.", max_size=12)
STOPS = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3)


@given(TEXTS, STOPS, st.data())
def test_a_text_ends_before_the_first_stop_text_that_is_complete(text: str, stops: list[str], data: Any) -> None:
    """Generation ends with the token that completes one; so the text has none before its last piece."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop, passed, seen = StopText(stops), "", ""
    for piece in pieces:
        seen += piece
        passed += stop.pass_on(piece)
        starts = [seen.find(s) for s in stops if s in seen]
        assert stop.found == bool(starts)
        if starts:
            assert passed == seen[: min(starts)]
            assert stop.pass_on("more") == stop.rest() == ""
            return
        held = max((n for s in stops for n in range(len(s)) if seen.endswith(s[:n])), default=0)
        assert passed == seen[: len(seen) - held], "no more is held back than may be a stop text"
    assert passed + stop.rest() == text


@pytest.mark.parametrize("kind", ["message", "text"])
@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("one\n\nUser: two", "length", ("one", "stop")),
        ("one\n\nUser: two", "tool_calls", ("one", "tool_calls")),
        ("one\n\nUse", "length", ("one\n\nUse", "length")),
        ("User:", "stop", ("", "stop")),
        ("", "stop", ("", "stop")),
    ],
)
def test_whole_answers(kind: str, text: str, reason: str, expected: tuple[str, str]) -> None:
    for suffix in ("", " User: END"):
        choice: dict[str, Any] = (
            {"text": text} if kind == "text" else {"message": {"role": "assistant", "content": text}}
        )
        answer = {"id": "x", "choices": [{**choice, "finish_reason": reason}], "usage": {"total_tokens": 3}}
        cut(answer, ["\n\nUser:", "User:"], suffix)
        found = answer["choices"][0]
        assert (found["text"] if kind == "text" else found["message"]["content"]) == expected[0] + suffix
        assert found["finish_reason"] == expected[1]
        assert answer["usage"] == {"total_tokens": 3}


def _events(events: list[str]) -> list[dict[str, Any]]:
    async def parts() -> AsyncIterator[str]:
        for event in events:
            yield event

    async def collect() -> list[str]:
        return [part async for part in cut_stream(parts(), ["STOP"], "!")]

    found = asyncio.run(collect())
    assert all(part.startswith("data: ") and part.endswith("\n\n") for part in found)
    return [json.loads(part.removeprefix("data: ")) for part in found]


def _chunk(reason: str | None = None, **delta: Any) -> str:
    end = {} if reason is None else {"finish_reason": reason}
    return f"data: {json.dumps({'id': 'x', 'choices': [{'delta': delta, **end}], 'usage': reason and 7})}\n\n"


def test_a_stream_keeps_its_other_events() -> None:
    """The role, what a model reasons, calls of tools, the usage. Several events may come in one part."""
    role, thought, call = _chunk(role="assistant"), _chunk(reasoning_content="STOP"), _chunk(tool_calls=[{"index": 0}])
    found = _events([role, thought + _chunk(content="a S"), call, _chunk(content="T") + _chunk("length")])
    assert [event["choices"][0]["delta"] for event in found] == [
        {"role": "assistant"},
        {"reasoning_content": "STOP"},
        {"content": "a "},
        {"tool_calls": [{"index": 0}]},
        {"content": "ST!"},
        {},
    ]
    assert [event["choices"][0].get("finish_reason") for event in found] == [None] * 5 + ["length"]
    assert [event.get("usage") for event in found[-2:]] == [None, 7]
    found = _events([_chunk(content="a ST"), _chunk(content="OP b"), _chunk("length")])
    assert [event["choices"][0]["delta"].get("content") for event in found] == ["a ", "!", None]
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_error_in_a_stream_stays() -> None:
    assert _events([_chunk(content="a"), 'data: {"error": "no memory"}\n\n'])[-1] == {"error": "no memory"}
