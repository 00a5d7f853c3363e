"""What a model takes: parameters, operations, memory and time. Structured pruning is for these, so a run measures them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from torch_impl.bench.measure import peak_of, synchronize
from torch_impl.bench.whole import Decoding
from torch_impl.decode.next_token import WARM_UP
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.packed import bits_per_weight

logger = logging.getLogger(__name__)

DECODED, PROMPT, RUNS = 32, 512, 3
# Each speed is measured for about so long at most: a large model on a busy CPU takes seconds for a token.
SECONDS = 10.0


@dataclass(frozen=True)
class Footprint:
    """What one model takes.

    operations: floating-point operations of a token in projections and head, 2 per weight; attention to earlier tokens comes on
    top. bytes: of all weights. cache_bytes: of the keys and values of one token. tokens_per_second: decoding one sequence, with
    a CUDA graph per token on a GPU; prompt_tokens_per_second: reading up to 512 tokens at once; the fastest of three, or of as
    many as `SECONDS` leave time for. None if the model cannot be measured. peak_bytes: the most memory in either, weights
    included; None on a CPU, which does not count it.
    """

    parameters: int
    operations: int
    bytes: int
    cache_bytes: int
    tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Footprints:
    """Those of the full-size model, whose pruned weights are zeros, and of the saved one. note: why zeros remain, if any do."""

    dense: Footprint
    saved: Footprint
    note: str


def packing_saves(shape: Sequence[int], sparsity: float, itemsize: int) -> int:
    """Compute how many bytes of a weight (out, in) `losa pack` saves: none if the packed form would be larger."""
    rows, columns = shape
    bits = 8 * itemsize - bits_per_weight(sparsity, 8 * itemsize, columns)
    return max(0, round(bits * rows * columns / 8))


@torch.no_grad()
def footprint(model: PreTrainedModel, ids: torch.Tensor) -> Footprint:
    """Measure a model that one process holds. ids: token ids (n, t), whose first row is the prompt."""
    decoder = Decoder(model)
    head = model.get_output_embeddings().weight
    computed = sum(weight.numel() for weight in decoder.weights) + head.numel()  # type: ignore[operator]
    cached = 0
    for block in decoder.blocks:
        weights = decoder.family.weights_of(block)
        cached += sum(len(weights[name]) for name in decoder.family.inputs[0][1:])
    parameters, device = list(model.parameters()), model.device
    prompt = ids[:1, :PROMPT].to(device)
    decoding, while_decoding = peak_of(model, lambda: _decoding(model), device)
    reading, while_reading = peak_of(model, lambda: _reading(model, prompt), device)
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        operations=2 * computed,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        cache_bytes=cached * model.dtype.itemsize,
        tokens_per_second=decoding,
        prompt_tokens_per_second=reading,
        peak_bytes=None if while_decoding is None or while_reading is None else max(while_decoding, while_reading),
    )


def _decoding(model: PreTrainedModel) -> float | None:
    """Measure tokens per second. A run does not fail for a model that our way to decode does not know."""
    length = min(DECODED, (position_limit(model) or DECODED + WARM_UP + 1) - WARM_UP - 1)
    try:
        decoding = Decoding(model, 1, graph=model.device.type == "cuda", longest=length + WARM_UP + 1)
        return decoding.tokens_per_second(length, RUNS, SECONDS)
    except Exception as error:
        logger.warning("the speed of decoding is not measured: %s", error)
        return None


def _reading(model: PreTrainedModel, ids: torch.Tensor) -> float:
    times: list[float] = []
    while len(times) <= RUNS and sum(times) < SECONDS:
        synchronize(model.device)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        synchronize(model.device)
        times.append(time.perf_counter() - start)
    # The first run warms up, and counts if no other does.
    return ids.numel() / min(times[1:] or times)
