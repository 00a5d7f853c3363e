"""Load documents from a text source.

A source is one string: `stdlib` (the sources of Python's standard library, on every machine), a local file or folder, one of
the data sets in HUB, or any other data set of the Hugging Face hub as `hf:repo[:config][:split]`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiny_models import corpus
from torch_impl.experiment.command import closest
from torch_impl.experiment.text.documents import Document, unix_newlines
from torch_impl.experiment.text.files import KINDS, one_line, read_path
from torch_impl.experiment.text.records import from_records

Purpose = Literal["train", "measure"]
ALL = "all of it"
HELD_OUT = "held out"


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub. heldout: the split for evaluation, if it has one."""

    repo: str
    config: str | None = None
    train: str = "train"
    heldout: str | None = None
    data_files: dict[str, str] | None = None
    rows_joined: bool = False
    """The rows are lines of one text; join them with empty lines, as the papers do."""


# One of C4's 1,024 shards has 356,317 documents, far more than calibration or fine-tuning needs.
_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
HUB = {
    "c4": HubSource("allenai/c4", heldout="validation", data_files=_C4),
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", heldout="test", rows_joined=True),
    "alpaca-gpt4": HubSource("vicgalle/alpaca-gpt4"),
}


@dataclass(frozen=True)
class Found:
    """Documents of a source, and a description of the part of the source they are."""

    documents: list[Document]
    part: str


def check_source(source: str, option: str = "source") -> None:
    """Check that a source exists; of a hub source, check only the form.

    Errors: FileNotFoundError or ValueError naming the option.
    """
    if source == "stdlib" or source in HUB or (source and Path(source).exists()):
        return
    if source.startswith("hf:"):
        if source.count(":") > 3 or not _parse_hub(source).repo:
            raise ValueError(f"{option} is {source!r}; allowed: hf:repo[:config][:split]")
    elif "/" in source or source.endswith(KINDS):
        raise FileNotFoundError(f"{option} is {source!r}, which does not exist; give an existing file or folder")
    else:
        raise ValueError(
            f"{option} is {source!r}; allowed: stdlib, a file ({', '.join(KINDS)}), a folder of such files, "
            f"{', '.join(HUB)}, hf:repo[:config][:split]{closest(source, HUB)}"
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
    if source == "stdlib":
        found = Found(list(_stdlib(purpose)), ALL if purpose == "train" else HELD_OUT)
    elif Path(source).exists():
        found = Found(read_path(Path(source)), ALL)
    else:
        found = _load_hub(source, purpose, option)
    if not found.documents:
        raise ValueError(f"{option} is {source!r}, which holds no text; give a source with at least one document")
    return found


@functools.cache
def _stdlib(purpose: Purpose) -> tuple[Document, ...]:
    """Return the standard library's documents. The embedded model was trained on the "train" files, so measure the others."""
    found = corpus.documents("train" if purpose == "train" else "heldout")
    return tuple(Document(unix_newlines(text)) for _, text in found)


def _load_hub(source: str, purpose: Purpose, option: str) -> Found:
    place = HUB.get(source) or _parse_hub(source)
    if purpose == "train" or place.heldout is None:
        return Found(_read_hub(source, place, place.train, option), ALL)
    return Found(_read_hub(source, place, place.heldout, option), f"{place.heldout} split")


def _parse_hub(source: str) -> HubSource:
    repo, config, split = (*source.removeprefix("hf:").split(":"), "", "")[:3]
    return HubSource(repo, config or None, split or "train")


def _read_hub(source: str, place: HubSource, split: str, option: str) -> list[Document]:
    import datasets

    files = {split: place.data_files[split]} if place.data_files else None
    try:
        rows = datasets.load_dataset(place.repo, place.config, split=split, data_files=files)
    except Exception as error:  # the hub's client raises its own classes, those of its transports, and plain ones
        raise FileNotFoundError(
            f"{option} is {source!r}: {place.repo}, split {split}, cannot be loaded ({one_line(error)}); "
            f"check its name and the network, or give a local file ({', '.join(KINDS)})"
        ) from error
    if place.rows_joined:
        text = unix_newlines("\n\n".join(rows["text"]))
        return [Document(text)] if text.strip() else []
    return list(from_records(((f"record {number}", row) for number, row in enumerate(rows, 1)), source))
