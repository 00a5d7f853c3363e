"""Split all text of a run, so that no evaluation text is used for calibration or training."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.protocols import Protocol
from torch_impl.experiment.text.sources import HELD_OUT, load_documents

HELDOUT_SHARE = 0.1


@dataclass(frozen=True)
class Texts:
    """The documents of a run. facts: which documents are measured, and how many the other texts lost. protocol: that of the
    evaluation text."""

    calibration: list[Document]
    finetune: list[Document]
    evaluation: list[Document]
    facts: dict[str, Any]
    protocol: Protocol


@dataclass(frozen=True)
class Separated:
    """Training documents by source, evaluation documents, and how many documents each source lost to evaluation."""

    training: dict[str, list[Document]]
    evaluation: list[Document]
    removed: dict[str, int]
    cut: bool = False


def load_texts(calibration: str, finetune: str | None, evaluation: str) -> Texts:
    """Load the three sources and keep the evaluation documents out of the others; see `separate`.

    finetune: None without fine-tuning. Errors: as `sources.load_documents` and `separate`.
    """
    options = {calibration: "calibration_data"}
    if finetune is not None:
        options.setdefault(finetune, "finetune_data")
    measured = load_documents(evaluation, "measure", "eval_data")
    training = {name: load_documents(name, "train", option).documents for name, option in options.items()}
    found = separate(training, measured.documents)
    whole = found.evaluation == measured.documents
    facts = {
        "source": evaluation,
        "split": measured.part if whole else HELD_OUT,
        "documents": len(found.evaluation),
        "documents_of_source": len(measured.documents),
        "end_of_document": found.cut,
        "documents_left_out": {
            "calibration": found.removed[calibration],
            "fine-tuning": 0 if finetune is None else found.removed[finetune],
        },
    }
    return Texts(
        found.training[calibration],
        [] if finetune is None else found.training[finetune],
        found.evaluation,
        facts,
        measured.protocol,
    )


def leave_out(texts: Texts, evaluation: str) -> tuple[Texts, list[Document], Protocol]:
    """Keep the documents of another source to measure out of calibration and fine-tuning; return both, and its protocol.

    Errors: as `load_texts`.
    """
    measured = load_documents(evaluation, "measure", "eval_data")
    training = {"calibration": texts.calibration, **({"fine-tuning": texts.finetune} if texts.finetune else {})}
    found = separate(training, measured.documents)
    rest = replace(
        texts, calibration=found.training["calibration"], finetune=found.training.get("fine-tuning", texts.finetune)
    )
    return rest, found.evaluation, measured.protocol


def separate(training: Mapping[str, Sequence[Document]], evaluation: Sequence[Document]) -> Separated:
    """Separate evaluation from training documents; drop exact duplicates in the training documents.

    Two documents are the same if their prompts agree, if prompt and text together agree, or, if one has no prompt, if their
    texts agree; white space is ignored. Documents that only the evaluation source has are measured. Shared documents, in the
    order of a hash, are measured and removed from training, as long as no source loses more than a tenth. If nothing is left
    to measure, one shared document is, provided that every source keeps some. If that is impossible, because a source is a
    single document, it is cut at a line end: nine tenths are for training.

    Errors: ValueError if nothing is left to train on or to measure.
    """
    sources = {name: list(dict.fromkeys(documents)) for name, documents in training.items()}
    units = _units(evaluation)
    index = _index(units)
    shared = {name: [_known(document, index) for document in documents] for name, documents in sources.items()}
    holders = _holders(units, list(shared.values()))
    alone = units.keys() - holders.keys()
    held_out = _held_out(holders, [len(documents) for documents in sources.values()], bool(alone))
    if not alone and not held_out:
        return _cut(sources, shared, units)
    kept = {
        name: [document for document, keys in zip(documents, shared[name], strict=True) if keys.isdisjoint(held_out)]
        for name, documents in sources.items()
    }
    measured = list(evaluation)
    if len(held_out) < len(holders):
        wanted = alone | held_out
        measured = [document for document in dict.fromkeys(evaluation) if _key(document) in wanted]
    return Separated(kept, measured, {name: len(sources[name]) - len(kept[name]) for name in sources})


def _key(document: Document) -> str:
    """Return the key of an evaluation document: documents with the same prompt, or the same text without one, share it."""
    return _plain(document.prompt or document.text)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _units(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Group documents by key, in the order of a hash, which does not depend on the order of the documents."""
    units: dict[str, list[Document]] = {}
    for document in dict.fromkeys(documents):
        units.setdefault(_key(document), []).append(document)

    def order(unit: list[Document]) -> bytes:
        return min(hashlib.sha256((document.prompt or document.text).encode()).digest() for document in unit)

    return dict(sorted(units.items(), key=lambda item: order(item[1])))


def _index(units: Mapping[str, Sequence[Document]]) -> dict[tuple[str, str], set[str]]:
    """Map everything that a training document can share with a unit to the units' keys."""
    index: dict[tuple[str, str], set[str]] = {}
    for key, unit in units.items():
        for document in unit:
            text = _plain(document.text)
            whole = _plain(document.prompt + document.text) if document.prompt else text
            found = [("whole", whole), ("plain", whole), ("plain", text)]
            for place in [*found, ("prompt", key)] if document.prompt else [*found, ("text", text)]:
                index.setdefault(place, set()).add(key)
    return index


def _known(document: Document, index: Mapping[tuple[str, str], set[str]]) -> set[str]:
    """Return the keys of the units that share a document."""
    text = _plain(document.text)
    if not document.prompt:
        return index.get(("plain", text), set())
    places = [("prompt", _plain(document.prompt)), ("text", text), ("whole", _plain(document.prompt + document.text))]
    return set().union(*(index.get(place, set()) for place in places))


def _holders(units: Mapping[str, object], shared: Sequence[Sequence[set[str]]]) -> dict[str, list[set[int]]]:
    """Return for each shared unit, in order, the documents of each source that share it."""
    holders: dict[str, list[set[int]]] = {}
    for place, source in enumerate(shared):
        for number, keys in enumerate(source):
            for key in keys:
                holders.setdefault(key, [set() for _ in shared])[place].add(number)
    return {key: holders[key] for key in units if key in holders}


def _held_out(holders: Mapping[str, Sequence[set[int]]], sizes: Sequence[int], alone: bool) -> set[str]:
    """Choose the shared units to measure. alone: there are unshared units too, so the choice may be empty."""
    most = [min(round(HELDOUT_SHARE * size), size - 1) for size in sizes]
    lost: list[set[int]] = [set() for _ in sizes]
    held_out = set()
    for key, of_source in holders.items():
        more = [found - gone for found, gone in zip(of_source, lost, strict=True)]
        if all(not new or len(gone) + len(new) <= m for new, gone, m in zip(more, lost, most, strict=True)):
            held_out.add(key)
            for gone, new in zip(lost, more, strict=True):
                gone |= new
    if not held_out and not alone:
        leave_some = (
            key
            for key, of_source in holders.items()
            if all(len(found) < size for found, size in zip(of_source, sizes, strict=True))
        )
        held_out.update(itertools.islice(leave_some, 1))
    return held_out


def _cut(
    sources: Mapping[str, Sequence[Document]],
    shared: Mapping[str, Sequence[set[str]]],
    units: Mapping[str, Sequence[Document]],
) -> Separated:
    """Cut documents without a prompt: measure the end, and keep the beginning in each source."""
    pieces = {key: cut_document(unit[0]) for key, unit in units.items() if not unit[0].prompt}
    kept: dict[str, list[Document]] = {name: [] for name in sources}
    for name, documents in sources.items():
        for document, keys in zip(documents, shared[name], strict=True):
            kept[name] += [document] if keys.isdisjoint(pieces) else [pieces[key][0] for key in keys & pieces.keys()]
    measured = [end for _, end in pieces.values() if end.text.strip()]
    ends = _index(_units(measured))
    kept = {
        name: [document for document in documents if document.text.strip() and not _known(document, ends)]
        for name, documents in kept.items()
    }
    if not measured or not all(kept.values()):
        raise ValueError(
            f"{', '.join(sources)}: too few documents to train on some and evaluate on others; "
            "give more documents or another eval_data"
        )
    return Separated(kept, measured, dict.fromkeys(sources, 0), cut=True)


def cut_document(document: Document) -> tuple[Document, Document]:
    """Cut a document in two, at the last line end in its first nine tenths, or after nine tenths if there is none."""
    text = document.text
    cut = int(len(text) * (1 - HELDOUT_SHARE))
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return Document(text[:cut]), Document(text[cut:])
