"""lm-eval's model of transformers with faster log-likelihoods: few large batches, logits only where they are asked for, and no
wait for the device at every request.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine.progress import bar

Ids = tuple[int, ...]
Request = tuple[Any, list[int], list[int]]
"""Texts, token ids of the context and of the continuation."""
Answer = tuple[float, bool]
"""The continuation's log-likelihood, and whether greedy decoding gives it."""
SHORTEST = 0.8
"""Length of the shortest input of a batch, as a share of the longest's: padding costs time too."""
AT_ONCE_ON_CPU = 2048
"""Tokens of a batch on the CPU, where larger ones are slower: their activations fit in no cache."""


def language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    known: dict[tuple[Any, ...], list[int]],
    batch_size: int,
) -> Any:
    """Return what `lm_eval.evaluate` measures.

    known: token ids by text, to which encoded texts are added. batch_size: of the longest prompts; shorter ones come in batches
    of as many tokens.
    """
    from lm_eval.models.huggingface import HFLM

    class LanguageModel(HFLM):
        def tok_encode(self, string: str, *options: Any, **named: Any) -> list[int]:
            """Encode a text, once."""
            key = (string, *options, *named.items())
            if key not in known:
                known[key] = super().tok_encode(string, *options, **named)
            return known[key]

        def _loglikelihood_tokens(self, requests: Sequence[Request], *_: Any, **__: Any) -> list[Answer]:
            return answers(model, requests, self.max_length, batch_size)

    return LanguageModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def answers(model: PreTrainedModel, requests: Sequence[Request], longest: int, batch_size: int) -> list[Answer]:
    """Answer requests. longest: tokens that the model takes; too long a context is cut on the left.

    Errors: ValueError if a continuation has no tokens, or more than `longest`.
    """
    places: defaultdict[Ids, list[int]] = defaultdict(list)
    for place, (_, context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= longest:
            raise ValueError(f"a choice has {len(continuation)} tokens; the model takes 1 to {longest}")
        places[tuple((context + continuation)[-longest - 1 : -1])].append(place)
    found: dict[int, Answer] = {}
    most = AT_ONCE_ON_CPU if model.device.type == "cpu" else math.inf
    for batch in bar(list(batches(places, batch_size, most)), "log-likelihoods"):
        asked = [(row, place) for row, ids in enumerate(batch) for place in places[ids]]
        scored = log_likelihoods(model, batch, [(row, requests[place][2]) for row, place in asked])
        found.update(zip((place for _, place in asked), scored, strict=True))
    return [found[place] for place in range(len(requests))]


def batches(inputs: Iterable[Ids], size: int, most: float = math.inf) -> Iterator[list[Ids]]:
    """Split inputs into batches of similar lengths, longest first.

    None has more tokens, padded, than the `size` longest, nor, but for a single input, than `most`.
    """
    ordered = sorted(inputs, key=lambda ids: (-len(ids), ids))
    budget = min(most, size * len(ordered[0])) if ordered else 0
    while ordered:
        longest = len(ordered[0])
        batch = [ids for ids in ordered[: max(1, int(budget) // longest)] if len(ids) >= SHORTEST * longest]
        yield batch
        del ordered[: len(batch)]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, inputs: Sequence[Ids], wanted: Sequence[tuple[int, Sequence[int]]]
) -> list[Answer]:
    """Compute the log-likelihood of continuations, and whether each is what greedy decoding gives.

    inputs: token ids without the last one. wanted: rows of `inputs`, and the continuation with which that row and the last token
    end. As in lm-eval, the softmax is in the logits' dtype, and so is the sum.
    """
    length = max(map(len, inputs))
    # Padding on the right, which no token before it sees.
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in inputs])
    ends = [(row * length + len(inputs[row]), continuation) for row, continuation in wanted]
    positions = torch.cat([torch.arange(end - len(continuation), end) for end, continuation in ends])
    targets = torch.tensor([token for _, continuation in ends for token in continuation]).to(model.device)
    with _logits_at(model, positions.to(model.device)):
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0]
    greedy = (logits.argmax(-1) == targets).cpu()
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
    lengths = [len(continuation) for _, continuation in ends]
    parts = zip(chosen.split(lengths), greedy.split(lengths), strict=True)
    return [(float(values.sum()), bool(hits.all())) for values, hits in parts]


@contextmanager
def _logits_at(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Make a model compute its logits (1, n, vocabulary) only at n positions, counted through all rows of the batch."""

    def keep(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1)[None, positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
