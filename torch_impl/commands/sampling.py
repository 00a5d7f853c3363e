"""Penalties and seeds of one generation, as OpenAI's API defines them.

transformers' server multiplies the logits of every token that occurs, in the prompt too, instead of subtracting from those of the
answer's, knows no presence penalty, and seeds torch when a request arrives, while another one may be sampling.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessor

# The lowest temperature above 0: logits are divided by it and must stay finite.
COLDEST = 1e-5


@dataclass(frozen=True)
class Asked:
    """What a request asks for. seed: None for other tokens each time."""

    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


ASKED = tuple(field.name for field in fields(Asked))


class AsAsked(LogitsProcessor):  # type: ignore[misc]
    """Processes the logits of one generation; its first call is for the first new token, waits for `ready`, and seeds torch."""

    def __init__(self, asked: Asked, ready: threading.Event) -> None:
        self._asked, self._ready = asked, ready
        self._prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Subtract the frequency penalty from a logit (n, v) as often as its token is in the answer, the presence penalty once."""
        asked = self._asked
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
            self._ready.wait()
            torch.seed() if asked.seed is None else torch.manual_seed(asked.seed)
        if not (asked.frequency_penalty or asked.presence_penalty):
            return scores
        answer = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - asked.frequency_penalty * counts - asked.presence_penalty * (counts > 0)
