"""Stop at a text of the answer, and leave it out, as OpenAI's API does.

transformers' criterion also reads the prompt, so that one which ends with the beginning of a stop text would be answered by its
rest alone; and its server sends the stop text.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)


class StopInAnswer(StoppingCriteria):
    """Stops one generation at the first of the stop texts within the new tokens. It begins with the first new token."""

    def __init__(self, texts: StopStringCriteria) -> None:
        self._texts = texts
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Return whether each sequence (n, t) stops, (n,)."""
        if self._prompt is None:
            self._prompt = input_ids.shape[1] - 1
        found: torch.Tensor = self._texts(input_ids[:, self._prompt :], scores, **more)
        return found


def criteria(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] | None) -> StoppingCriteriaList:
    """Return the criteria that stop at these texts."""
    return StoppingCriteriaList([StopInAnswer(StopStringCriteria(tokenizer, list(stops)))] if stops else [])


def read_answers_alone(model: PreTrainedModel) -> None:
    """Let `generate` of this model look for `stop_strings` among the new tokens alone."""
    served: Any = model
    plain = served._get_stopping_criteria

    def changed(*given: Any, **named: Any) -> StoppingCriteriaList:
        found = plain(*given, **named)
        return StoppingCriteriaList(StopInAnswer(one) if isinstance(one, StopStringCriteria) else one for one in found)

    served._get_stopping_criteria = changed


class StopText:
    """Passes on a text that comes in pieces, up to the first of the stop texts. found: whether there was one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def pass_on(self, piece: str) -> str:
        """Return what of the text so far is certainly before a stop text and was not returned yet."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        self.found = bool(starts)
        end = min(starts) if starts else len(text) - self._begun(text)
        self._held = "" if starts else text[end:]
        return text[:end]

    def _begun(self, text: str) -> int:
        """Return the length of the longest end of the text with which a stop text begins."""
        lengths = (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)

    def rest(self) -> str:
        """Return what was held back; call it at the end of the text."""
        held, self._held = self._held, ""
        return held


def cut(answer: dict[str, Any], stops: Sequence[str], suffix: str = "") -> None:
    """Cut a whole answer at the stop text, in place. suffix: what follows the generated text."""
    choice, stop = answer["choices"][0], StopText(stops)
    place, name = _text_of(choice)
    if place.get(name):
        place[name] = stop.pass_on(place[name]) + stop.rest()
    if stop.found and choice["finish_reason"] == "length":
        choice["finish_reason"] = "stop"
    if suffix:
        place[name] = place.get(name, "") + suffix


async def cut_stream(parts: Any, stops: Sequence[str], suffix: str = "") -> AsyncIterator[str]:
    """Cut a stream of server-sent events at the stop text. suffix: what follows the generated text."""
    stop = StopText(stops)
    async with contextlib.aclosing(parts):
        async for part in parts:
            for event in part.split("\n\n"):
                if event:
                    for found in _cut_event(event, stop, suffix):
                        yield f"{found}\n\n"


def _cut_event(event: str, stop: StopText, suffix: str) -> list[str]:
    """Return the events to send instead of one: none if its text is held back, two at the end if text was."""
    try:
        chunk = json.loads(event.removeprefix("data: "))
        choice = chunk["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        return [event]  # an error
    if choice.get("finish_reason") is not None:
        more = _with_text(chunk, stop.rest() + suffix)
        if stop.found and choice["finish_reason"] == "length":
            choice["finish_reason"] = "stop"
        return [*([more] if more else []), f"data: {json.dumps(chunk, allow_nan=False)}"]
    place, name = _text_of(choice)
    if not place.get(name):
        return [event]
    found = _with_text(chunk, stop.pass_on(place[name]))
    return [found] if found else []


def _with_text(chunk: dict[str, Any], text: str) -> str:
    """Return an event like a chunk's, of this text and without an end; nothing if there is no text."""
    if not text:
        return ""
    found = copy.deepcopy({name: value for name, value in chunk.items() if name != "usage"})
    choice = found["choices"][0]
    choice.pop("finish_reason", None)
    place, name = _text_of(choice)
    place[name] = text
    return f"data: {json.dumps(found, allow_nan=False)}"


def _text_of(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return where the text of a choice is: in a completion, in a chat's message, or in a part of one."""
    for kind in ("message", "delta"):
        if kind in choice:
            return choice[kind], "content"
    return choice, "text"
