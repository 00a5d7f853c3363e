"""Round the kept weights of a model to codes, block by block; each block's inputs come from the blocks rounded before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from torch_impl import _checks
from torch_impl.bits import allocate_bits, allocate_bits_by_harm, nearby_bits
from torch_impl.engine import blocks, calibration, statistics
from torch_impl.engine.adapted_linear import adapt_block, block_adapters
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.measures import FirstOrder, MutualInformation
from torch_impl.engine.progress import bar
from torch_impl.masks.sparsegpt import HESSIAN, rounding_harm, sparsegpt_codes
from torch_impl.quantise import FEWEST_BITS, FIRST_TOKEN, MOST_BITS, dequantise_rows

logger = logging.getLogger(__name__)

RMI, GRADIENT, ERROR = "rmi", "gradient", "error"
BITS_BY = (RMI, GRADIENT, ERROR)
ALL_BITS = range(FEWEST_BITS, MOST_BITS + 1)


@torch.no_grad()
def round_blocks(
    decoder: Decoder, bits: Sequence[Mapping[str, int]], ids: torch.Tensor, batch_size: int
) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor]]:
    """Round the projections with compensation on token ids (n, t); yield (block, projection, codes (out, in) int8, scales).

    bits: of each block, by projection. The blocks may be offloaded; those in memory become `AdaptedLinear`s of the rounded weights.
    """
    family = decoder.family
    stream = calibration.start_stream(decoder, ids, batch_size, on_host=True)
    for index, block in enumerate(bar(sweep(decoder), "rounding", len(decoder.blocks))):
        adapt_block(block, family, 1.0)
        found = statistics.of_inputs(HESSIAN, block, index, family, stream, FIRST_TOKEN)
        for name, layer in block_adapters(block, family).items():
            try:
                codes, scales = sparsegpt_codes(
                    layer.weight, found.pop(name), bits[index][name], kept=layer.weight != 0
                )
            except ValueError as error:
                raise ValueError(f"{decoder.full_name(index, name)} cannot be rounded on this text: {error}") from error
            layer.set_base(dequantise_rows(codes, scales))
            yield index, name, codes, scales
        stream.advance(block, index)


@dataclass(frozen=True)
class Chosen:
    """The bits of each block, by projection; importance: of each block, if the bits follow it."""

    bits: list[dict[str, int]]
    importance: list[float] = field(default_factory=list)


def choose_bits(decoder: Decoder, by: str, mean: float, ids: torch.Tensor, batch_size: int) -> Chosen:
    """Choose the bits of all projections on token ids (n, t). by: one of `BITS_BY`; mean: bits of a weight."""
    if by == ERROR:
        return _by_error(decoder, mean, ids, batch_size)
    measure = MutualInformation() if by == RMI else FirstOrder(decoder)
    importance = blocks.measure_importance(decoder, measure, ids[: calibration.RMI_SAMPLES], batch_size)
    if by == GRADIENT:
        # A sum over the block's weights, of which each gets the bits.
        importance = importance / torch.tensor(decoder.prunable_weights, dtype=torch.float64)
    bits = allocate_bits(importance, mean, nearby_bits(mean)).tolist()
    return Chosen([dict.fromkeys(decoder.family.projections, own) for own in bits], importance.tolist())


def _by_error(decoder: Decoder, mean: float, ids: torch.Tensor, batch_size: int) -> Chosen:
    """Choose the bits of each projection by the harm that rounding does to the loss on token ids (n, t)."""
    harms = RoundingHarms()
    blocks.sweep_gradients(decoder, ids, batch_size, harms)
    places = [(index, name) for index in range(len(decoder.blocks)) for name in decoder.family.projections]
    table = torch.stack([harms.found[place] for place in places])
    bits = allocate_bits_by_harm(table, [harms.sizes[place] for place in places], mean, ALL_BITS).tolist()
    chosen: list[dict[str, int]] = [{} for _ in decoder.blocks]
    for (index, name), own in zip(places, bits, strict=True):
        chosen[index][name] = own
    return Chosen(chosen)


class RoundingHarms:
    """Measures the harm of rounding each projection to each of `ALL_BITS`; see `gradient_sweep.Collector`.

    found, sizes: harms (choices,) and number of weights by (block, projection).
    """

    def __init__(self) -> None:
        self._hessians: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}
        self.found: dict[tuple[int, str], torch.Tensor] = {}
        self.sizes: dict[tuple[int, str], int] = {}

    def add(self, index: int, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Sum the Hessian of the input, weighted by the gradients, and the squares of these."""
        squares = _checks.wide(grad_y.flatten(0, 1)).square()
        rows = _checks.wide(x.flatten(0, 1)) * squares.mean(1, keepdim=True).sqrt_()
        _add(self._hessians, name, rows.T @ rows)
        _add(self._squares, name, squares.sum(0))

    def done(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Compute the harms of the block's projections."""
        for name, weight in weights.items():
            harm = rounding_harm(weight, self._hessians.pop(name), self._squares.pop(name), ALL_BITS)
            self.found[index, name], self.sizes[index, name] = harm.cpu(), weight.numel()


def _add(sums: dict[str, torch.Tensor], name: str, part: torch.Tensor) -> None:
    sums[name] = sums[name].add_(part) if name in sums else part


def check_ids(decoder: Decoder, ids: torch.Tensor) -> None:
    """Check token ids (n, t); warn of sequences longer than the model was trained on.

    Errors: ValueError if they are beyond the model's vocabulary or positions.
    """
    rows = len(decoder.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ValueError(
            f"calibration has ids {int(ids.min())} to {int(ids.max())}; the model has embeddings for {rows}"
        )
    limit = position_limit(decoder.model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"calibration has sequences of {ids.shape[1]} tokens; this model has {limit} positions")
    trained = getattr(decoder.model.config, "max_position_embeddings", None)
    if trained and ids.shape[1] > trained:
        logger.warning(
            "calibration has sequences of %d tokens; this model was trained on at most %d, so take seqlen %d or fewer",
            ids.shape[1],
            trained,
            trained,
        )
