"""What all text is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text to learn or to measure; a prompt, if there is one, stands before it and carries no loss."""

    text: str
    prompt: str = ""


def unix_newlines(text: str) -> str:
    """The text with every end of a line, of whatever system, as one line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
