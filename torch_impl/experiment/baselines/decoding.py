"""What a fine-tuned model's decoding costs with packed weights: adapters that cannot be merged stay beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from torch_impl.bench.measure import peak_of
from torch_impl.bench.whole import Decoding
from torch_impl.decode.next_token import WARM_UP
from torch_impl.decode.packed_linear import PackedLinear, join
from torch_impl.engine.decoder import Decoder


@dataclass(frozen=True)
class DecodingCost:
    """Tokens per second of the dense model and of the pruned one, packed if it has zeros, decoded in the same way.

    dense_bytes, packed_bytes: the most memory meanwhile, weights included; None on a CPU.
    """

    dense: float
    packed: float
    dense_bytes: int | None = None
    packed_bytes: int | None = None

    @property
    def ratio(self) -> float:
        """Return how many times faster the pruned model is (paper, at 7B and 70 %: LoSA 2.23, LoRA 1.71)."""
        return self.packed / self.dense


def decoding_cost(
    model: PreTrainedModel, dense: PreTrainedModel, batch: int = 1, tokens: int = 64, runs: int = 3, packs: bool = True
) -> DecodingCost:
    """Measure how fast both models decode `tokens` tokens, on a GPU with CUDA graphs and without compilation.

    model: a baseline's result; while it is measured, its projections are packed, and its adapters, if any, stay beside them. packs:
    False for a model that is smaller and has no zeros.
    """

    def speed(of: PreTrainedModel) -> float:
        decoding = Decoding(of, batch, graph=True, longest=tokens + WARM_UP + 1)
        return decoding.tokens_per_second(tokens, runs)

    with packed_weights(model, batch) if packs else nullcontext():
        (of_dense, dense_bytes), (of_model, model_bytes) = (
            peak_of(of, partial(speed, of), of.device) for of in (dense, model)
        )
    return DecodingCost(of_dense, of_model, dense_bytes, model_bytes)


@contextmanager
def packed_weights(model: PreTrainedModel, sequences: int = 1) -> Iterator[None]:
    """Pack the projections within this context, for decoding so many sequences at once.

    Adapters of peft and SoRA keep theirs as `base_layer`.
    """
    decoder, linears = Decoder(model), {}
    for index in range(len(decoder.blocks)):
        projections = decoder.projections(index)
        for name, module in projections.items():
            place = decoder.full_name(index, name if isinstance(module, nn.Linear) else f"{name}.base_layer")
            linear = model.get_submodule(place)
            assert isinstance(linear, nn.Linear)
            linears[place] = linear
    try:
        for place, linear in linears.items():
            model.set_submodule(place, PackedLinear.of(linear, sequences))
        _group(decoder)
        yield
    finally:
        for place, linear in linears.items():
            model.set_submodule(place, linear)


def _group(decoder: Decoder) -> None:
    """Group the packed weights of a block that share an input into one product on a GPU."""
    for index in range(len(decoder.blocks)):
        projections = decoder.projections(index)
        for names in decoder.family.inputs:
            modules = [projections[name] for name in names]
            join([getattr(module, "base_layer", module) for module in modules])
