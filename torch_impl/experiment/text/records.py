"""Convert records to documents: plain text, instructions in Alpaca's fields, and conversations.

    {"text": …}
    {"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}
    {"messages": [{"role": "user", "content": …}, …]}           or "conversations" with "from" and "value" (ShareGPT)

The last answer is the text. Everything before it is the prompt, in Alpaca's form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch_impl.experiment.text.documents import Document, unix_newlines

FORMS = "text, or instruction, input and output, as strings, or messages"
CONVERSATIONS = ("messages", "conversations")
FIELDS = ("text", "instruction", *CONVERSATIONS)
TITLES = {
    **dict.fromkeys(("user", "human"), "Instruction"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "Response"),
}
ANSWER = "Response"


def from_records(records: Iterable[tuple[str, Any]], where: str) -> Iterator[Document]:
    """Yield the documents of (place, record) pairs, without blank ones. Errors: ValueError naming `where` and place."""
    for place, record in records:
        try:
            document = document_of(record)
        except ValueError as error:
            raise ValueError(f"{where}, {place}: {error}") from None
        if document.text.strip():
            yield document


def document_of(record: Any) -> Document:
    """Convert one record.

    In Alpaca's records, `text` (prompt and output together) is ignored in favour of its parts.

    Errors: ValueError if the record does not have the fields of one of the forms above.
    """
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}; give it the fields {FORMS}")
    if "instruction" not in record:
        for name in CONVERSATIONS:
            if record.get(name) is not None:
                return _join([*_system(record), *_turns(record, name)])
        if "text" in record:
            return Document(_string(record, "text"))
        if "output" not in record:
            raise ValueError(
                f"the record has {', '.join(sorted(map(str, record)))} but none of {', '.join(FIELDS)}; rename one to text"
            )
    question = [("Instruction", _string(record, "instruction")), ("Input", _optional(record, "input"))]
    return _join([*_system(record), *_history(record), *question, (ANSWER, _string(record, "output"))])


def _join(turns: list[tuple[str, str]]) -> Document:
    """Build the document of (title, body) turns, the last an answer. Without a question it is plain text."""
    *before, (_, text) = turns
    prompt = "".join(f"### {title}:\n{body}\n\n" for title, body in before if body)
    return Document(text, prompt and f"{prompt}### {ANSWER}:\n")


def _system(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [("System", _optional(record, "system"))]


def _history(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield Alpaca's earlier rounds: pairs of question and answer."""
    rounds = record.get("history")
    if rounds is None:
        return
    if not isinstance(rounds, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in rounds):
        raise ValueError("field 'history' is not a list of pairs: [[question, answer], ...]")
    for question, answer in rounds:
        yield "Instruction", _text(question, "history")
        yield ANSWER, _text(answer, "history")


def _turns(record: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """Return the (title, body) turns of a conversation, up to its last answer."""
    turns = record[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name!r} is not a list of records: [{{'role': ..., 'content': ...}}, ...]")
    found = []
    for turn in turns:
        role = _text(turn.get("role", turn.get("from")), f"{name}, role").lower()
        body = turn.get("content", turn.get("value"))
        # A turn that only calls a tool has no text.
        found.append((TITLES.get(role, role.capitalize()), "" if body is None else _text(body, f"{name}, content")))
    while found and found[-1][0] != ANSWER:
        found.pop()
    if not found:
        raise ValueError(f"field {name!r} has no answer; it needs a turn with role assistant or gpt")
    return found


def _string(record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise ValueError(f"field {name!r} is missing among {sorted(map(str, record))}; give {FORMS}")
    return _text(record[name], name)


def _optional(record: dict[str, Any], name: str) -> str:
    return "" if record.get(name) is None else _text(record[name], name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}; give {FORMS}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"field {name!r} holds half a surrogate pair, which is not valid text")
    return unix_newlines(value)
