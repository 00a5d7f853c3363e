"""Load documents from a text source.

A source is one string: a name in SOURCES (`stdlib`, the sources of Python's standard library, on every machine, or a data set
of the Hugging Face hub), a local file or folder, or any other data set of the hub as `hf:repo[:config][:split]`. A new source is
one record in SOURCES.
"""

from __future__ import annotations

import functools
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiny_models import corpus
from torch_impl.experiment.command import closest
from torch_impl.experiment.text.documents import Document, unix_newlines
from torch_impl.experiment.text.files import KINDS, one_line, read_path
from torch_impl.experiment.text.protocols import C4, DOCUMENTS, WIKITEXT2, Protocol
from torch_impl.experiment.text.records import from_records

Purpose = Literal["train", "measure"]
ALL = "all of it"
HELD_OUT = "held out"


@dataclass(frozen=True)
class Found:
    """Documents of a source, a description of the part of the source they are, and the protocol to measure them by."""

    documents: list[Document]
    part: str
    protocol: Protocol = DOCUMENTS


class Source(typing.Protocol):
    """A source of text."""

    @property
    def gives_way(self) -> bool:
        """Return whether a local file or folder of the same name takes precedence."""

    def load(self, name: str, purpose: Purpose, option: str) -> Found:
        """Load the documents for a purpose. name: the source as the user wrote it; option: its name in messages."""


@dataclass(frozen=True)
class StandardLibrary:
    """The sources of Python's standard library."""

    gives_way: bool = False

    def load(self, name: str, purpose: Purpose, option: str) -> Found:
        """Load the standard library's documents. The embedded model was trained on the "train" files, so measure others."""
        return Found(list(_stdlib(purpose)), ALL if purpose == "train" else HELD_OUT)


@functools.cache
def _stdlib(purpose: Purpose) -> tuple[Document, ...]:
    found = corpus.documents("train" if purpose == "train" else "heldout")
    return tuple(Document(unix_newlines(text)) for _, text in found)


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub. heldout: the split for evaluation, if it has one. protocol: the literature's, to measure by."""

    repo: str
    config: str | None = None
    train: str = "train"
    heldout: str | None = None
    data_files: dict[str, str] | None = None
    rows_joined: bool = False
    """The rows are lines of one text; join them as the protocol does."""
    protocol: Protocol = DOCUMENTS
    gives_way: bool = True

    def load(self, name: str, purpose: Purpose, option: str) -> Found:
        """Read the split for the purpose, through the hub's client."""
        if purpose == "train" or self.heldout is None:
            return Found(self._read(name, self.train, option), ALL, self.protocol)
        return Found(self._read(name, self.heldout, option), f"{self.heldout} split", self.protocol)

    def _read(self, name: str, split: str, option: str) -> list[Document]:
        import datasets

        files = {split: self.data_files[split]} if self.data_files else None
        try:
            rows = datasets.load_dataset(self.repo, self.config, split=split, data_files=files)
        except Exception as error:  # the hub's client raises its own classes, those of its transports, and plain ones
            raise FileNotFoundError(
                f"{option} is {name!r}: {self.repo}, split {split}, cannot be loaded ({one_line(error)}); "
                f"check its name and the network, or give a local file ({', '.join(KINDS)})"
            ) from error
        if self.rows_joined:
            text = unix_newlines((self.protocol.joined_by or "").join(rows["text"]))
            return [Document(text)] if text.strip() else []
        return list(from_records(((f"record {number}", row) for number, row in enumerate(rows, 1)), name))


# One of C4's 1,024 shards has 356,317 documents, far more than calibration or fine-tuning needs.
_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
SOURCES: dict[str, Source] = {
    "stdlib": StandardLibrary(),
    "c4": HubSource("allenai/c4", heldout="validation", data_files=_C4, protocol=C4),
    "wikitext2": HubSource(
        "Salesforce/wikitext", "wikitext-2-raw-v1", heldout="test", rows_joined=True, protocol=WIKITEXT2
    ),
    "alpaca-gpt4": HubSource("vicgalle/alpaca-gpt4"),
}


# Longer than a path of any use; texts given for a name are.
LONGEST_NAME = 1000


def is_local(source: str) -> bool:
    """Return whether a source is read without the hub."""
    return os.path.exists(source) or isinstance(SOURCES.get(source), StandardLibrary)


def check_source(source: str, option: str = "source") -> None:
    """Check that a source exists; of a hub source, check only the form.

    Errors: FileNotFoundError or ValueError naming the option.
    """
    # os.path.exists, because Path.exists raises for a text that is too long to be a name.
    if source in SOURCES or (source and os.path.exists(source)):
        return
    if "\n" in source or len(source) > LONGEST_NAME:
        raise ValueError(
            f"{option} is a string of {len(source):,} characters that begins with {source[:30]!r}; a string names a source or "
            "a file: give texts as a list"
        )
    if source.startswith("hf:"):
        if source.count(":") > 3 or not _parse_hub(source).repo:
            raise ValueError(f"{option} is {source!r}; allowed: hf:repo[:config][:split]")
    elif "/" in source or source.endswith(KINDS):
        raise FileNotFoundError(f"{option} is {source!r}, which does not exist; give an existing file or folder")
    else:
        raise ValueError(
            f"{option} is {source!r}; allowed: {', '.join(SOURCES)}, a file ({', '.join(KINDS)}), a folder of such files, "
            f"hf:repo[:config][:split]{closest(source, SOURCES)}"
        )


def load_documents(source: str, purpose: Purpose = "train", option: str = "source") -> Found:
    """Load the documents of a source for training or evaluation. They differ only if the source has an evaluation split.

    source: see the module's docstring. Files: .txt (documents separated by lines `<|endoftext|>`, otherwise one document),
    .raw (WikiText's raw form: one document, rows joined by empty lines), .jsonl, .json and .parquet of records (see
    records.py); .gz for the two JSON types. A folder means its files of these types, in the order of their names. Blank
    documents are skipped. option: the name of the source in messages.

    Errors: FileNotFoundError if a path or data set is not found; ValueError for an unknown source, unreadable text (naming
    file and line), or no text.
    """
    check_source(source, option)
    place = SOURCES.get(source)
    if (place is None or place.gives_way) and Path(source).exists():
        found = Found(read_path(Path(source)), ALL, _protocol_of(source, place))
    else:
        found = (place or _parse_hub(source)).load(source, purpose, option)
    if not found.documents:
        raise ValueError(f"{option} is {source!r}, which holds no text; give a source with at least one document")
    return found


def _protocol_of(path: str, place: Source | None) -> Protocol:
    """Choose the protocol of local text: WikiText's of its raw file; that of a source for its copy of the same name."""
    if path.endswith(".raw"):
        return WIKITEXT2
    return place.protocol if isinstance(place, HubSource) else DOCUMENTS


def _parse_hub(source: str) -> HubSource:
    repo, config, split = (*source.removeprefix("hf:").split(":"), "", "")[:3]
    return HubSource(repo, config or None, split or "train")
