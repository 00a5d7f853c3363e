"""Text and tokens that a program passes: token ids, texts, records, data sets, or the name of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine.batches import IGNORED, Example
from torch_impl.experiment.text.documents import Document, unix_newlines
from torch_impl.experiment.text.protocols import protocol_named
from torch_impl.experiment.text.records import from_records
from torch_impl.experiment.text.sources import ALL, Found, Purpose, load_documents
from torch_impl.experiment.text.windows import (
    calibration_windows,
    describe_protocol,
    describe_windows,
    evaluation_windows,
    training_examples,
)

FORMS = "token ids (n, t), a list of texts or records, a data set, or the name of a text source"


def windows_of(
    given: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    nsamples: int,
    seqlen: int,
    seed: int,
    name: str = "calibration",
) -> torch.Tensor:
    """Calibration windows, token ids (n, t): token ids as they are; otherwise nsamples windows of seqlen tokens of the text.

    Errors: TypeError or ValueError with `name` and what is wrong.
    """
    if (ids := _token_ids(given, name)) is not None:
        if len(ids) < 2:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; give 2 or more sequences")
        return ids
    documents = _documents(given, name, tokenizer, "train").documents
    assert tokenizer is not None
    return calibration_windows(documents, tokenizer, nsamples, seqlen, seed, _named(given, name))


def examples_of(
    given: Any, tokenizer: PreTrainedTokenizerBase | None, seqlen: int, limit: int, seed: int
) -> list[Example]:
    """Training examples: token ids (n, t), each token learned; examples that are tokenized; or the text's, at most `limit`.

    Errors: TypeError or ValueError naming `train` and what is wrong with it.
    """
    if (ids := _token_ids(given, "train")) is not None:
        return [{"input_ids": row, "labels": row} for row in ids]
    given = listed(given, "train")
    if is_tokenized(given):
        return [_example(item, f"train[{index}]") for index, item in enumerate(given)]
    documents = _documents(given, "train", tokenizer, "train").documents
    assert tokenizer is not None
    return training_examples(documents, tokenizer, seqlen, seed, limit, _named(given, "train"))


def listed(given: Any, name: str) -> Any:
    """The items of what may be iterated over only once, as a list; None, the name of a source and arrays as they are."""
    return (
        given if given is None or isinstance(given, str | torch.Tensor | np.ndarray) else list(_iterated(given, name))
    )


def is_tokenized(given: Any) -> bool:
    """Return whether what `listed` returned is token ids or tokenized examples, and not text."""
    if isinstance(given, torch.Tensor | np.ndarray):
        return True
    return isinstance(given, list) and bool(given) and all(isinstance(i, Mapping) and "input_ids" in i for i in given)


def evaluation_of(
    given: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    seqlen: int,
    limit: int | None,
    protocol: str | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Evaluation windows and what describes them: token ids (n, t) as they are; otherwise windows of seqlen tokens of the text.

    protocol: a name in PROTOCOLS; None: that of the text.

    Errors: TypeError or ValueError naming `text` or `protocol` and what is wrong with it.
    """
    if (ids := _token_ids(given, "text")) is not None:
        if protocol is not None:
            raise TypeError("protocol is given, and text is token ids, which are measured as they are; leave it out")
        if ids.shape[1] < 2:
            raise ValueError(f"text has shape {tuple(ids.shape)}; give windows of 2 or more tokens")
        return ids[:limit], {"protocol": "token ids", **describe_windows(ids[:limit])}
    found = _documents(given, "text", tokenizer, "measure")
    assert tokenizer is not None
    used = protocol_named(protocol, found.protocol)
    windows = evaluation_windows(found.documents, tokenizer, seqlen, limit, used, _named(given, "text"), "seqlen")
    return windows, {**describe_protocol(used, windows, tokenizer), **describe_windows(windows)}


def check_ids(model: PreTrainedModel, named: Mapping[str, Iterable[torch.Tensor]]) -> None:
    """Check token ids. Errors: ValueError naming the argument with an id for which the model has no embedding."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    for name, parts in named.items():
        for ids in parts:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= rows:
                raise ValueError(
                    f"{name} has token id {low if low < 0 else high}; the model knows 0 to {rows - 1}: "
                    "use the tokenizer that belongs to this model"
                )


def _token_ids(given: Any, name: str) -> torch.Tensor | None:
    """Token ids (n, t) on the CPU if they are given as an array; None for anything else."""
    if not isinstance(given, torch.Tensor | np.ndarray):
        return None
    ids = torch.as_tensor(given)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise TypeError(f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; give token ids: integers (n, t)")
    return ids.long().cpu()


def _example(item: Mapping[str, Any], name: str) -> Example:
    try:
        ids = torch.as_tensor(item["input_ids"]).long().cpu()
        labels = torch.as_tensor(item["labels"] if item.get("labels") is not None else ids).long().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: input_ids and labels must be lists or arrays of integers ({error})") from None
    if ids.dim() != 1 or ids.shape != labels.shape or len(ids) < 2:
        raise ValueError(
            f"{name}: input_ids has shape {tuple(ids.shape)} and labels {tuple(labels.shape)}; give both the same length, "
            "2 or more"
        )
    ids, labels = _without_padding(item.get("attention_mask"), ids, labels, name)
    if not bool((labels[1:] != IGNORED).any()):
        raise ValueError(f"{name}: every label is {IGNORED}, so there is nothing to learn; give it a label")
    return {"input_ids": ids, "labels": labels}


def _without_padding(
    mask: Any, ids: torch.Tensor, labels: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut off the tokens on both sides that the mask leaves out: padding is no text to learn."""
    if mask is None:
        return ids, labels
    told = f"{name}: attention_mask must be 1 for {len(ids)} tokens, or 0 for padding before or after them"
    try:
        kept = torch.as_tensor(mask).cpu() != 0
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{told} ({error})") from None
    places = kept.nonzero().flatten()
    if kept.shape != ids.shape or len(places) < 2 or int(places[-1] - places[0]) + 1 != len(places):
        raise ValueError(f"{told}; it has shape {tuple(kept.shape)} and {len(places)} that are not 0")
    between = slice(int(places[0]), int(places[-1]) + 1)
    return ids[between], labels[between]


def _named(given: Any, name: str) -> str:
    """Name a text in messages: the argument, and its source if it has one."""
    return f"{name} {given!r}" if isinstance(given, str) else name


def _documents(given: Any, name: str, tokenizer: PreTrainedTokenizerBase | None, purpose: Purpose) -> Found:
    if tokenizer is None:
        raise ValueError(f"{name} is text and tokenizer is missing; give the model's tokenizer, or token ids (n, t)")
    if isinstance(given, str):
        return load_documents(given, purpose, name)
    numbered = enumerate(_iterated(given, name))
    records = ((f"[{index}]", {"text": item} if isinstance(item, str) else item) for index, item in numbered)
    found = list(from_records(records, name))
    if not found:
        raise ValueError(f"{name} holds no text; give at least one document")
    return Found([Document(unix_newlines(document.text), document.prompt) for document in found], ALL)


def _iterated(given: Any, name: str) -> Iterable[Any]:
    # A data set of several splits is a mapping; a table of pandas iterates over the names of its columns.
    if isinstance(given, Mapping | bytes) or hasattr(given, "iterrows") or not isinstance(given, Iterable):
        raise TypeError(f"{name} is {type(given).__name__}; give {FORMS}")
    return given
