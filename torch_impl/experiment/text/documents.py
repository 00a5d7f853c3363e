"""The document: the unit of all text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text to train or to evaluate on. An optional prompt precedes it and carries no loss."""

    text: str
    prompt: str = ""


def unix_newlines(text: str) -> str:
    """Convert all line endings to line feeds."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
