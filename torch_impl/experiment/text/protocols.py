"""Protocols: how a text becomes the windows that a perplexity is measured on. Figures compare only within one protocol.

The windows follow each other without overlap (stride = their length), each is predicted from its own tokens alone, all but its
first, and the incomplete last window is dropped. This is common to all protocols.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_impl import _checks


@dataclass(frozen=True)
class Protocol:
    """How the documents of a text are joined, and how many of them and of their windows are measured.

    joined_by: the text between two documents, which are tokenized as one, with the special tokens that the tokenizer adds by
    itself; None: each document is tokenized alone, after the begin-of-text token. documents, windows: the first N; None: all.
    """

    name: str
    joined_by: str | None = None
    documents: int | None = None
    windows: int | None = None

    def most(self, limit: int | None) -> int | None:
        """Return the maximum number of windows; None if there is none. limit: the user's."""
        return min((number for number in (limit, self.windows) if number is not None), default=None)


# For any text.
DOCUMENTS = Protocol("documents")
# GPTQ, SparseGPT, Wanda and LoSA: the rows of the test split, which end with a line feed, joined by empty lines.
WIKITEXT2 = Protocol("wikitext2", joined_by="\n\n")
# Wanda and LoSA: the beginning of the first of the eight files of the validation split.
C4 = Protocol("c4", joined_by=" ", documents=1100, windows=256)
PROTOCOLS = {protocol.name: protocol for protocol in (WIKITEXT2, C4, DOCUMENTS)}


def protocol_named(name: str | None, default: Protocol, option: str = "protocol") -> Protocol:
    """Return the protocol of a name, or the default for None. Errors: ValueError naming the option and the names."""
    if name is None:
        return default
    _checks.choice(option, name, PROTOCOLS)
    return PROTOCOLS[name]
