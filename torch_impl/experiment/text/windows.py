"""Windows of tokens to calibrate and to measure on, and examples to learn."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from torch_impl import _checks
from torch_impl.engine.training import IGNORED, Example
from torch_impl.experiment.text.documents import Document

logger = logging.getLogger(__name__)

# Calibration windows are drawn from a stream this many times longer than all of them, or from the whole text.
CALIBRATION_POOL = 8
_BATCH = 32


def calibration_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Token ids (nsamples, seqlen): random windows of the documents' stream, shuffled by `seed`.

    In the stream every document follows the tokenizer's begin-of-text token, if it has one and the text does not bring it.

    Errors: ValueError if the text is shorter than one window.
    """
    _checks.integer("nsamples", nsamples, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    stream = _stream(shuffled, tokenizer, seqlen, CALIBRATION_POOL * nsamples * seqlen, "seqlen")
    starts = torch.from_numpy(generator.integers(0, len(stream) - seqlen + 1, (nsamples, 1)))
    return stream[starts + torch.arange(seqlen)]


def training_examples(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    seed: int,
    limit: int | None = None,
) -> list[Example]:
    """Examples {input_ids (t,), labels (t,)} with t <= seqlen, of documents shuffled by `seed`.

    If a document has a prompt, each is one example, cut at seqlen, between the tokenizer's begin- and end-of-text tokens;
    labels of the prompt are -100, and a prompt that leaves no room for its text is left out. Otherwise they are windows
    of exactly seqlen that follow each other in the stream, shuffled in their turn, since those of one long document
    would fill whole batches. limit: at most so many examples; of windows, the stream's first.

    Errors: ValueError if not one example comes of it.
    """
    _checks.integer("train_seqlen", seqlen, 2)
    if limit is not None:
        _checks.integer("limit", limit, 1)
    generator = np.random.default_rng(seed)
    shuffled = [documents[index] for index in generator.permutation(len(documents))]
    if not any(document.prompt for document in shuffled):
        windows = _cut(_stream(shuffled, tokenizer, seqlen, limit and limit * seqlen, "train_seqlen"), seqlen, limit)
        windows = windows[torch.from_numpy(generator.permutation(len(windows)))]
        return [{"input_ids": ids, "labels": ids} for ids in windows]
    examples: list[Example] = []
    read = 0
    while read < len(shuffled) and (limit is None or len(examples) < limit):
        examples += _single_examples(shuffled[read : read + _BATCH], tokenizer, seqlen)
        read = min(read + _BATCH, len(shuffled))
    if not examples:
        raise ValueError(
            f"train_seqlen is {seqlen}, which leaves no token to learn; allowed: more than the shortest prompt's tokens"
        )
    if len(examples) < read:
        logger.warning(
            "%d of %d documents leave no token to learn within %d: not used", read - len(examples), read, seqlen
        )
    return examples[:limit]


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
            f"the {len(examples)} training examples are too few for parts of {list(shares)}, one for each step; take "
            "fewer steps, more text, a smaller train_seqlen or more train_examples"
        )
    return parts


def evaluation_windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int, limit: int | None = None
) -> torch.Tensor:
    """Token ids (n, seqlen): windows of the documents' stream that do not overlap, in order; at most `limit`.

    The rest that fills no window is left out.

    Errors: ValueError if the text is shorter than one window.
    """
    if limit is not None:
        _checks.integer("limit", limit, 1)
    return _cut(_stream(documents, tokenizer, seqlen, limit and limit * seqlen, "eval_seqlen"), seqlen, limit)


def describe_windows(windows: torch.Tensor) -> dict[str, str | int]:
    """What a measurement was made on, so that another can be compared: counts, and a hash of the token ids."""
    ids = windows.cpu().numpy().astype("<i8").tobytes()
    return {
        "windows": len(windows),
        "seqlen": windows.shape[1],
        "tokens": windows.numel(),
        "sha256": hashlib.sha256(ids).hexdigest(),
    }


def _cut(stream: torch.Tensor, seqlen: int, limit: int | None) -> torch.Tensor:
    return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[:limit]


def _stream(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seqlen: int, enough: int | None, option: str
) -> torch.Tensor:
    """The documents' tokens in one row, at least a window; no more documents are read than `enough` tokens take.

    option: what messages call `seqlen`.
    """
    _checks.integer(option, seqlen, 1)
    ids: list[int] = []
    for start in range(0, len(documents), _BATCH):
        if enough is not None and len(ids) >= enough:
            break
        texts = [document.prompt + document.text for document in documents[start : start + _BATCH]]
        for row in _encode(tokenizer, texts):
            ids += _bounded(row, tokenizer)
    if len(ids) < seqlen:
        raise ValueError(f"{option} is {seqlen}, longer than the text; allowed: at most its {len(ids)} tokens")
    return torch.tensor(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: texts longer than the model's window are meant, they are cut afterwards.
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return rows


def _bounded(row: list[int], tokenizer: PreTrainedTokenizerBase, end: bool = False) -> list[int]:
    """A row behind the begin-of-text token, and before the end-of-text token, unless it has them already."""
    first = [] if tokenizer.bos_token_id in (None, *row[:1]) else [tokenizer.bos_token_id]
    last = [] if not end or tokenizer.eos_token_id in (None, *row[-1:]) else [tokenizer.eos_token_id]
    return first + row + last
