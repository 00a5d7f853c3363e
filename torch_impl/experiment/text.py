"""Text for calibration, fine-tuning and evaluation: where it comes from, and the token windows made of it.

A source is one string: `stdlib` (Python's own sources, on every machine), a local file or folder, one of the named data
sets of the Hugging Face hub in HUB, or any other of its data sets as `hf:repo[:config][:split]`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tiny_models import corpus
from torch_impl import _checks
from torch_impl.engine.training import IGNORED, Example

Split = Literal["train", "heldout", "all"]

SEPARATOR = "<|endoftext|>"
KINDS = (".txt", ".raw", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
HELDOUT_SHARE = 0.1
# Calibration windows are drawn from a stream this many times longer than all of them, or from the whole text.
CALIBRATION_POOL = 8
_BATCH = 32


@dataclass(frozen=True)
class Document:
    """A text to learn or to measure; a prompt, if there is one, stands before it and carries no loss."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class HubSource:
    """Where a data set lies on the hub. A split it does not have is cut from `train`."""

    repo: str
    config: str | None = None
    train: str = "train"
    heldout: str | None = None
    data_files: dict[str, str] | None = None
    rows_joined: bool = False
    """Its rows are the lines of one text; as the papers do, they are joined by an empty line."""


# One shard of C4's 1,024 is 356,317 documents, far more than calibration or fine-tuning takes.
_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
HUB = {
    "c4": HubSource("allenai/c4", heldout="validation", data_files=_C4),
    "wikitext2": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", heldout="test", rows_joined=True),
    "alpaca-gpt4": HubSource("vicgalle/alpaca-gpt4"),
}


def load_documents(source: str, split: Split = "train") -> list[Document]:
    """The documents of a source.

    source: see the module's docstring. Files: .txt (documents split at lines `<|endoftext|>`, otherwise one document),
    .raw (WikiText's raw form: one document, its rows joined by an empty line), .jsonl, .json and .parquet of records
    (see document_of); .gz of the two JSON kinds. A folder stands for its files of these kinds in the order of their
    names. Blank documents are left out.
    split: "train" and "heldout" never share a document: a source that does not bring the two is cut, about 90 to 10,
    by a hash of each document after exact duplicates are dropped; a single document is cut at the end of a line.
    "all" is everything, for text that is only evaluated on; of a named data set with a test split, that split.

    Errors: FileNotFoundError if a path or a data set cannot be had; ValueError for an unknown source or split,
    unreadable text (naming file and line), or no text left.
    """
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split = {split!r}; allowed: 'train', 'heldout', 'all'")
    if source == "stdlib":
        found = list(_stdlib(split))
    elif source and Path(source).exists():
        found = split_documents(_read_path(Path(source)), split)
    elif source in HUB or source.startswith("hf:"):
        found = _load_hub(source, split)
    elif "/" in source or source.endswith(KINDS):
        raise FileNotFoundError(f"source = {source!r} does not exist; allowed: an existing file or folder")
    else:
        raise ValueError(
            f"source = {source!r}; allowed: stdlib, a file ({', '.join(KINDS)}), a folder of such files, "
            f"{', '.join(HUB)}, hf:repo[:config][:split]"
        )
    if not found:
        raise ValueError(f"source = {source!r} holds no text for split = {split!r}; allowed: at least one document")
    return found


@functools.cache
def _stdlib(split: Split) -> tuple[Document, ...]:
    return tuple(Document(text) for _, text in corpus.documents(split))


# --- splitting ---


def split_documents(documents: Sequence[Document], split: Split) -> list[Document]:
    """One side of a source that brings no split: about 90 % of its documents to train on, 10 % held out.

    Records with the same prompt stay on one side. A single document is cut at the last end of a line in its first 90 %.
    """
    if split == "all":
        return list(documents)
    unique = list(dict.fromkeys(documents))
    if len(unique) == 1 and not unique[0].prompt:
        text = unique[0].text
        cut = int(len(text) * (1 - HELDOUT_SHARE))
        cut = text.rfind("\n", 0, cut) + 1 or cut
        pieces = (text[:cut],) if split == "train" else (text[cut:],)
        return [Document(piece) for piece in pieces if piece.strip()]
    keys = [hashlib.sha256((document.prompt or document.text).encode()).digest() for document in unique]
    last_heldout = sorted(keys)[max(1, round(len(keys) * HELDOUT_SHARE)) - 1] if keys else b""
    return [
        document for document, key in zip(unique, keys, strict=True) if (key <= last_heldout) == (split == "heldout")
    ]


# --- reading ---


def _read_path(path: Path) -> list[Document]:
    if not path.is_dir():
        return list(_read_file(path))
    files = sorted(file for file in path.iterdir() if file.name.endswith(KINDS) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{path} holds no text files; allowed: {', '.join(KINDS)}")
    return [document for file in files for document in _read_file(file)]


def _read_file(path: Path) -> Iterable[Document]:
    kind = path.name.removesuffix(".gz")
    if not path.name.endswith(KINDS):
        raise ValueError(f"{path} is of no known kind; allowed: {', '.join(KINDS)}")
    if kind.endswith(".parquet"):
        return _from_records(_read_parquet(path), str(path))
    text = _read_text(path)
    if kind.endswith((".json", ".jsonl")):
        return _from_records(_parse_json(text, path), str(path))
    pieces = [wikitext(text)] if kind.endswith(".raw") else _between_separators(text)
    return [Document(piece) for piece in pieces if piece.strip()]


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} has a bad byte at {error.start}; allowed: text in UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}); allowed: a whole gzip file") from None


def wikitext(text: str) -> str:
    """WikiText's raw file as the papers evaluate it: the rows its data set has, joined by an empty line."""
    rows = ["" if line == " " else line + "\n" for line in text.split("\n")[:-1]]
    return "\n\n".join(rows)


def _between_separators(text: str) -> list[str]:
    pieces: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.strip() == SEPARATOR:
            pieces.append([])
        else:
            pieces[-1].append(line)
    joined = ["".join(piece) for piece in pieces]
    return [piece.strip("\n") for piece in joined] if len(joined) > 1 else joined


def _parse_json(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON list, or of one record a line."""
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"{path}{place}: {_reason(error)}; allowed: a JSON list of records") from None
        yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
        return
    # Not splitlines: JSON strings may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {_reason(error)}; allowed: one JSON record a line") from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read ({_one_line(error)}); allowed: a parquet file") from None
    return ((f"record {number}", row) for number, row in enumerate(rows, 1))


def _from_records(records: Iterable[tuple[str, Any]], where: str) -> Iterator[Document]:
    for place, record in records:
        try:
            document = document_of(record)
        except ValueError as error:
            raise ValueError(f"{where}, {place}: {error}") from None
        if document.text.strip():
            yield document


def document_of(record: Any) -> Document:
    """A record's document: `output` behind a prompt in Alpaca's form, made of `instruction` and `input`, or `text`.

    Alpaca's `text`, the whole of prompt and output, is passed over for the parts it is made of.

    Errors: ValueError if the record is no mapping with these fields, each a string.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is {type(record).__name__}; allowed: fields text, or instruction, input and output")
    instruction = "instruction" in record or "text" not in record
    for name in ("instruction", "input", "output") if instruction else ("text",):
        value = record.get(name)
        if not isinstance(value, str) and not (name == "input" and value is None):
            given = type(value).__name__ if name in record else f"missing among {sorted(map(str, record))}"
            raise ValueError(f"field {name!r} is {given}; allowed: text, or instruction, input and output, as strings")
        if value is not None and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"field {name!r} holds half a surrogate pair; allowed: text")
    if not instruction:
        return Document(record["text"])
    parts = [("Instruction", record["instruction"]), ("Input", record.get("input"))]
    prompt = "".join(f"### {title}:\n{body}\n\n" for title, body in parts if body)
    return Document(record["output"], prompt + "### Response:\n")


def _load_hub(source: str, split: Split) -> list[Document]:
    place = HUB.get(source) or _parse_hub(source)
    if place.heldout is None:
        return split_documents(_read_hub(source, place, place.train), split)
    return _read_hub(source, place, place.train if split == "train" else place.heldout)


def _parse_hub(source: str) -> HubSource:
    repo, config, split = (*source.removeprefix("hf:").split(":"), "", "")[:3]
    if not repo or source.count(":") > 3:
        raise ValueError(f"source = {source!r}; allowed: hf:repo[:config][:split]")
    return HubSource(repo, config or None, split or "train")


def _read_hub(source: str, place: HubSource, split: str) -> list[Document]:
    import datasets

    files = {split: place.data_files[split]} if place.data_files else None
    try:
        rows = datasets.load_dataset(place.repo, place.config, split=split, data_files=files)
    except Exception as error:  # the hub's client raises its own classes, those of its transports, and plain ones
        raise FileNotFoundError(
            f"source = {source!r}: {place.repo}, split {split}, cannot be loaded ({_one_line(error)}); "
            f"allowed: a data set the hub holds and this machine can reach, or a local file ({', '.join(KINDS)})"
        ) from error
    if place.rows_joined:
        return [Document("\n\n".join(rows["text"]))]
    return list(_from_records(((f"record {number}", row) for number, row in enumerate(rows, 1)), source))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- windows of tokens ---


def calibration_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Token ids (nsamples, seqlen): random windows of the documents' stream, shuffled by `seed`.

    In the stream every document follows the tokenizer's begin-of-text token, if it has one.

    Errors: ValueError if the text is shorter than one window.
    """
    _checks.integer("nsamples", nsamples, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    stream = _stream(shuffled, tokenizer, seqlen, enough=CALIBRATION_POOL * nsamples * seqlen)
    starts = torch.from_numpy(generator.integers(0, len(stream) - seqlen + 1, (nsamples, 1)))
    return stream[starts + torch.arange(seqlen)]


def training_examples(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    seed: int,
    packed: bool = True,
    limit: int | None = None,
) -> list[Example]:
    """Examples {input_ids (t,), labels (t,)} with t <= seqlen, of documents shuffled by `seed`.

    packed: windows of exactly seqlen that follow each other in the stream, shuffled in their turn, since those of one
    long document would fill whole batches. Otherwise, and always if a document has a prompt, each document is one
    example, cut at seqlen, between the tokenizer's begin- and end-of-text tokens; labels of the prompt are -100, and a
    prompt that leaves no room for its text is left out. limit: at most so many examples; packed, the stream's first.

    Errors: ValueError if not one example comes of it.
    """
    _checks.integer("seqlen", seqlen, 2)
    if limit is not None:
        _checks.integer("limit", limit, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    if packed and not any(document.prompt for document in shuffled):
        windows = _cut(_stream(shuffled, tokenizer, seqlen, limit and limit * seqlen), seqlen, limit)
        windows = windows[torch.from_numpy(generator.permutation(len(windows)))]
        return [{"input_ids": ids, "labels": ids} for ids in windows]
    examples: list[Example] = []
    for start in range(0, len(shuffled), _BATCH):
        examples += _single_examples(shuffled[start : start + _BATCH], tokenizer, seqlen)
        if limit is not None and len(examples) >= limit:
            return examples[:limit]
    if not examples:
        raise ValueError(f"seqlen = {seqlen} leaves no token to learn; allowed: more than the longest prompt's tokens")
    return examples


def _single_examples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> Iterator[Example]:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = _encode(tokenizer, [document.prompt for document in documents])
    texts = _encode(tokenizer, [document.text for document in documents])
    for prompt, text in zip(prompts, texts, strict=True):
        masked = len(start + prompt) if prompt else 0
        ids = torch.tensor((start + prompt + text + end)[:seqlen])
        labels = ids.clone()
        labels[:masked] = IGNORED
        # The first label predicts nothing.
        if bool((labels[1:] != IGNORED).any()):
            yield {"input_ids": ids, "labels": labels}


def split_parts(examples: Sequence[Example], shares: Sequence[float]) -> list[list[Example]]:
    """The examples in len(shares) parts that follow each other, each with its share of them; LoSA trains on one a step.

    Rounding: a part ends at rint(cumulative share · examples).

    Errors: ValueError if shares are not positive with sum 1, or a part would be empty.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares = {list(shares)}; allowed: positive numbers with sum 1")
    ends = [0, *(round(end) for end in np.cumsum(shares) * len(examples))]
    parts = [list(examples[start:end]) for start, end in itertools.pairwise(ends)]
    if not all(parts):
        raise ValueError(
            f"examples has {len(examples)}, too few for shares = {list(shares)}; allowed: one a part or more"
        )
    return parts


def evaluation_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None = None,
    join: str | None = None,
) -> torch.Tensor:
    """Token ids (n, seqlen): windows of the documents' stream that do not overlap, in order.

    The rest that fills no window is left out.
    join: the documents are first joined by this string into one. limit: at most so many windows.

    Errors: ValueError if the text is shorter than one window.
    """
    if limit is not None:
        _checks.integer("limit", limit, 1)
    if join is not None:
        documents = [Document(join.join(document.prompt + document.text for document in documents))]
    return _cut(_stream(documents, tokenizer, seqlen, limit and limit * seqlen), seqlen, limit)


def describe_windows(source: str, documents: Sequence[Document], windows: torch.Tensor) -> dict[str, str | int]:
    """What a measurement was made on, so that another can be compared: counts, and a hash of the token ids."""
    ids = windows.cpu().numpy().astype("<i8").tobytes()
    return {
        "source": source,
        "documents": len(documents),
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "tokens": windows.numel(),
        "sha256": hashlib.sha256(ids).hexdigest(),
    }


def _cut(stream: torch.Tensor, seqlen: int, limit: int | None) -> torch.Tensor:
    return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[:limit]


def _stream(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int, enough: int | None
) -> torch.Tensor:
    """The documents' tokens in one row, at least a window; no more documents are read than `enough` tokens take."""
    _checks.integer("seqlen", seqlen, 1)
    ids: list[int] = []
    for start in range(0, len(documents), _BATCH):
        if enough is not None and len(ids) >= enough:
            break
        texts = [document.prompt + document.text for document in documents[start : start + _BATCH]]
        for row in _encode(tokenizer, texts):
            ids += row if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *row]
    if len(ids) < seqlen:
        raise ValueError(f"seqlen = {seqlen} is longer than the text; allowed: at most its {len(ids)} tokens")
    return torch.tensor(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: texts longer than the model's window are meant, they are cut afterwards.
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return rows
