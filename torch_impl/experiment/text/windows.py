"""Token windows for calibration and evaluation, and training examples.

The token stream of documents is their tokens one after another, each document after the begin-of-text token.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from torch_impl import _checks
from torch_impl.engine import distributed
from torch_impl.engine.batches import IGNORED, Example
from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.protocols import DOCUMENTS, Protocol

logger = logging.getLogger(__name__)

# Calibration windows are sampled from a token stream this many times longer than all windows, or from the whole text.
CALIBRATION_POOL = 8
_BATCH = 32
Item = TypeVar("Item")


def calibration_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    nsamples: int,
    seqlen: int,
    seed: int,
    name: str = "the text",
) -> torch.Tensor:
    """Sample token ids (nsamples, seqlen): windows of the token stream of the documents, shuffled by `seed`.

    The windows are drawn without replacement from the stream cut into pieces that follow each other. When all are used, a
    warning says so, and the stream is cut again from a random place within the first. name: of the text, in messages.

    Errors: ValueError if the text is shorter than one window.
    """
    _checks.integer("nsamples", nsamples, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    stream = _stream(shuffled, tokenizer, seqlen, CALIBRATION_POOL * nsamples * seqlen, "seqlen", name)
    starts: list[int] = []
    last, offset = len(stream) - seqlen, 0
    _warn_of_few(
        "nsamples", nsamples, len(stream) // seqlen, f"windows of {seqlen:,} tokens; further ones overlap them", name
    )
    while len(starts) < nsamples:
        starts += generator.permutation(np.arange(offset, last + 1, seqlen)).tolist()
        offset = int(generator.integers(0, min(seqlen, last + 1)))
    return stream[torch.tensor(starts[:nsamples])[:, None] + torch.arange(seqlen)]


def training_examples(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    seed: int,
    limit: int | None = None,
    name: str = "the text",
) -> list[Example]:
    """Build examples {input_ids (t,), labels (t,)} with t <= seqlen, of documents shuffled by `seed`.

    If any document has a prompt, each document is one example between the begin- and end-of-text tokens, cut at seqlen.
    Labels of the prompt are -100. A prompt that leaves no room for its text is skipped. Otherwise examples are consecutive
    windows of exactly seqlen of the token stream. They are shuffled too, because one long document would fill whole batches.
    limit: maximum number of examples; for windows, the first of the stream; a warning says if there are fewer. name: of the
    text, in messages.

    Errors: ValueError if there is no example.
    """
    _checks.integer("train_seqlen", seqlen, 2)
    if limit is not None:
        _checks.integer("limit", limit, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    if not any(document.prompt for document in shuffled):
        stream = _stream(shuffled, tokenizer, seqlen, limit and limit * seqlen, "train_seqlen", name)
        windows = _cut(stream, seqlen, limit)
        _warn_of_few("train_examples", limit, len(windows), f"windows of {seqlen:,} tokens, which are all used", name)
        windows = windows[torch.from_numpy(generator.permutation(len(windows)))]
        return [{"input_ids": ids, "labels": ids} for ids in windows]
    examples: list[Example] = []
    read = 0
    while read < len(shuffled) and (limit is None or len(examples) < limit):
        examples += _single_examples(shuffled[read : read + _BATCH], tokenizer, seqlen)
        read = min(read + _BATCH, len(shuffled))
    if not examples:
        raise ValueError(
            f"train_seqlen is {seqlen}, no longer than the shortest prompt; increase it so that there are tokens to learn"
        )
    if len(examples) < read:
        logger.warning(
            "skipped %d of %d documents: no token to learn within train_seqlen %d", read - len(examples), read, seqlen
        )
    _warn_of_few("train_examples", limit, len(examples), "records to learn, which are all used", name)
    return examples[:limit]


def _warn_of_few(option: str, asked: int | None, found: int, kind: str, name: str) -> None:
    """Warn if a text holds less than is asked for."""
    if asked is not None and found < asked and distributed.is_main_process():
        logger.warning("%s is %s, but %s has only %s %s", option, f"{asked:,}", name, f"{found:,}", kind)


def _single_examples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int
) -> Iterator[Example]:
    prompts = _encode(tokenizer, [document.prompt for document in documents])
    texts = _encode(tokenizer, [document.text for document in documents])
    for prompt, text in zip(prompts, texts, strict=True):
        row = _bounded(prompt + text, tokenizer, end=True)
        ids = torch.tensor(row[:seqlen])
        labels = ids.clone()
        if prompt:
            labels[: len(_bounded(prompt, tokenizer))] = IGNORED
        # The first token is never predicted.
        if bool((labels[1:] != IGNORED).any()):
            yield {"input_ids": ids, "labels": labels}


def split_parts(examples: Sequence[Item], shares: Sequence[float]) -> list[list[Item]]:
    """Split the examples into len(shares) consecutive parts by their shares; LoSA trains on one part per step.

    Rounding: a part ends at rint(cumulative share · examples).

    Errors: ValueError if shares are not positive with sum 1, or a part would be empty.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares is {list(shares)}; allowed: positive numbers with sum 1")
    ends = [0, *(round(end) for end in np.cumsum(shares) * len(examples))]
    parts = [list(examples[start:end]) for start, end in itertools.pairwise(ends)]
    if not all(parts):
        raise ValueError(
            f"{len(examples)} training examples are too few for one part per step ({list(shares)}); use "
            "fewer steps, more text, a smaller train_seqlen or more train_examples"
        )
    return parts


def evaluation_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    limit: int | None = None,
    protocol: Protocol = DOCUMENTS,
    name: str = "the text",
    option: str = "eval_seqlen",
) -> torch.Tensor:
    """Cut the documents' tokens into consecutive windows by a protocol: token ids (n, seqlen), at most `limit`.

    The incomplete last window is dropped. name: of the text, and option: of `seqlen`, in messages.

    Errors: ValueError if the text is shorter than one window.
    """
    if limit is not None:
        _checks.integer("limit", limit, 1)
    used, most = documents[: protocol.documents], protocol.most(limit)
    if protocol.joined_by is None:
        stream = _stream(used, tokenizer, seqlen, most and most * seqlen, option, name)
    else:
        _checks.integer(option, seqlen, 1)
        text = protocol.joined_by.join(document.prompt + document.text for document in used)
        stream = torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
        _check_length(len(stream), seqlen, option, name)
    return _cut(stream, seqlen, most)


def describe_windows(windows: torch.Tensor) -> dict[str, str | int]:
    """Describe evaluation windows by counts and a hash of the token ids, so that measurements can be compared.

    predicted_tokens: all but the first of each window. stride: from the beginning of a window to that of the next.
    """
    ids = windows.cpu().numpy().astype("<i8").tobytes()
    return {
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "stride": windows.shape[1],
        "tokens": windows.numel(),
        "predicted_tokens": windows[:, 1:].numel(),
        "sha256": hashlib.sha256(ids).hexdigest(),
    }


def describe_protocol(
    protocol: Protocol, windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str | None]:
    """Describe how the windows were made: the protocol, what joins documents, where begin-of-text tokens are."""
    begin = tokenizer.bos_token_id
    if protocol.joined_by is None:
        where = "none" if begin is None else "before each document"
    else:
        where = "before the text" if begin is not None and int(windows[0, 0]) == begin else "none"
    return {"protocol": protocol.name, "joined_by": protocol.joined_by, "begin_of_text": where}


def _cut(stream: torch.Tensor, seqlen: int, limit: int | None) -> torch.Tensor:
    return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[:limit]


def _stream(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    enough: int | None,
    option: str,
    name: str,
) -> torch.Tensor:
    """Return the documents' token stream, at least one window long; stop reading documents after `enough` tokens.

    option: the name of `seqlen` in messages; name: of the text.
    """
    _checks.integer(option, seqlen, 1)
    ids: list[int] = []
    for start in range(0, len(documents), _BATCH):
        if enough is not None and len(ids) >= enough:
            break
        texts = [document.prompt + document.text for document in documents[start : start + _BATCH]]
        for row in _encode(tokenizer, texts):
            ids += _bounded(row, tokenizer)
    _check_length(len(ids), seqlen, option, name)
    return torch.tensor(ids)


def _check_length(tokens: int, seqlen: int, option: str, name: str) -> None:
    if tokens < seqlen:
        raise ValueError(
            f"{option} is {seqlen}, but {name} has only {tokens} tokens: too few for one window; give more text or a smaller "
            f"{option}"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the model's window, because they are cut afterwards.
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return rows


def _bounded(row: list[int], tokenizer: PreTrainedTokenizerBase, end: bool = False) -> list[int]:
    """Add the begin-of-text token, and with `end` the end-of-text token, unless the row already has them."""
    first = [] if tokenizer.bos_token_id in (None, *row[:1]) else [tokenizer.bos_token_id]
    last = [] if not end or tokenizer.eos_token_id in (None, *row[-1:]) else [tokenizer.eos_token_id]
    return first + row + last
