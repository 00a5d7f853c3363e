"""Round the kept weights of a model to codes, block by block; each block's inputs come from the blocks rounded before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from torch_impl import sparsity
from torch_impl.engine import blocks, calibration, statistics
from torch_impl.engine.adapted_linear import adapt_block, block_adapters
from torch_impl.engine.checkpoints.offload import sweep
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.measures import MutualInformation
from torch_impl.engine.progress import bar
from torch_impl.masks.sparsegpt import HESSIAN, sparsegpt_codes
from torch_impl.quantise import FEWEST_BITS, FIRST_TOKEN, MOST_BITS, dequantise_rows


@torch.no_grad()
def round_blocks(
    decoder: Decoder, bits: Sequence[int], ids: torch.Tensor, batch_size: int
) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor]]:
    """Round the projections with compensation on token ids (n, t); yield (block, projection, codes (out, in) int8, scales).

    bits: of each block. The blocks may be offloaded; those in memory become `AdaptedLinear`s of the rounded weights.
    """
    family = decoder.family
    stream = calibration.start_stream(decoder, ids, batch_size, on_host=True)
    for index, block in enumerate(bar(sweep(decoder), "rounding", len(decoder.blocks))):
        adapt_block(block, family, 1.0)
        found = statistics.of_inputs(HESSIAN, block, index, family, stream, FIRST_TOKEN)
        for name, layer in block_adapters(block, family).items():
            codes, scales = sparsegpt_codes(layer.weight, found.pop(name), bits[index], kept=layer.weight != 0)
            layer.set_base(dequantise_rows(codes, scales))
            yield index, name, codes, scales
        stream.advance(block, index)


def bits_by_information(
    decoder: Decoder, mean: float, ids: torch.Tensor, batch_size: int
) -> tuple[list[int], list[float]]:
    """Choose the bits of each block by mutual information on token ids (n, t); return them and the importances.

    Choices are the bits around the mean: one less than its floor to one more than its ceiling.
    """
    importance = blocks.measure_importance(decoder, MutualInformation(), ids[: calibration.RMI_SAMPLES], batch_size)
    choices = [bits for bits in range(int(mean) - 1, -int(-mean // 1) + 2) if FEWEST_BITS <= bits <= MOST_BITS]
    return sparsity.allocate_bits(importance, mean, choices).tolist(), importance.tolist()


def check_ids(decoder: Decoder, ids: torch.Tensor) -> None:
    """Check token ids (n, t). Errors: ValueError if they are beyond the model's vocabulary or positions."""
    rows = len(decoder.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ValueError(
            f"calibration has ids {int(ids.min())} to {int(ids.max())}; the model has embeddings for {rows}"
        )
    limit = position_limit(decoder.model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"calibration has sequences of {ids.shape[1]} tokens; this model has {limit} positions")
