"""The adapter layer: one merged weight in forward, explicit backward, variable rank, exact merge (LoSA, Eq. 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from torch_impl import adapter, rank
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.masked_linear import masked_linear, recomputed_masked_linear


class AdaptedLinear(nn.Module):
    """A linear layer with a frozen, masked weight (out, in) and an adapter B·A trained under the same mask.

    weight: frozen, zero where pruned; the mask is weight ≠ 0. A (rank, in) and B (out, rank) are trained, in float32 at
    least. scale: s = α / r₀, the same at every rank.
    """

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.scale = scale
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.A = nn.Parameter(self.weight.new_zeros(0, self.in_features, dtype=wide))
        self.B = nn.Parameter(self.weight.new_zeros(self.out_features, 0, dtype=wide))
        self._held: torch.Tensor | None = None
        self.outdated = False
        """The held weight is of an earlier A and B: passes without gradients do not use it until the next `hold`."""
        self.recomputed = False
        """Recompute the output in the backward pass; applies in a compiled block while no merged weight is held."""
        self.input_hook: Callable[[torch.Tensor], None] | None = None
        """If set, called with every input (..., in)."""

    @property
    def rank(self) -> int:
        """Return the current rank."""
        return self.A.shape[0]

    @property
    def held(self) -> torch.Tensor | None:
        """Return the merged weight built by `hold`, None after `release`."""
        return self._held

    @property
    def mask(self) -> torch.Tensor:
        """Return the mask, bool (out, in), True = kept."""
        return self.weight != 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out)."""
        if torch.is_grad_enabled() and self.input_hook is None and self.rank:
            if self.recomputed and self._held is None and torch.compiler.is_compiling():
                return recomputed_masked_linear(x, self.weight, self.A, self.B, self.bias, self.scale)
            return self._product(x)
        return self._forward_apart(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_apart(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output outside the compiled graph, so that new watchers and held weights cause no recompilation."""
        if self.input_hook is not None:
            self.input_hook(x)
        if torch.is_grad_enabled() and self.rank:
            return self._product(x)
        held = None if self.outdated else self._held
        return nn.functional.linear(x, self.merged() if held is None else held, self.bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output, differentiable by x, A and B."""
        return masked_linear(x, self.weight, self.A, self.B, self.bias, self.scale, self._held)

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """Compute M⊙(W + s·BA), rounded once to the weight's dtype."""
        return adapter.merge(self.weight, self.A, self.B, self.scale) if self.rank else self.weight.detach()

    @torch.no_grad()
    def hold(self) -> None:
        """Build the merged weight and use it until `release`. Call again after A or B change; the address stays."""
        self.outdated = False
        if not self.rank:
            self._held = None
        elif self._held is None:
            self._held = self.merged()
        else:
            adapter.merge_into(self._held, self.weight, self.A, self.B, self.scale)

    def release(self) -> None:
        """Free the merged weight built by `hold`."""
        self._held, self.outdated = None, False

    @torch.no_grad()
    def set_base(self, weight: torch.Tensor) -> None:
        """Replace the masked base weight (out, in)."""
        self.release()
        self.weight.copy_(weight)

    @torch.no_grad()
    def remove(self, mask: torch.Tensor) -> None:
        """Zero the weights that mask (out, in) leaves out, in place: the merged weight of `hold`, too, keeps its address."""
        for weight in (self.weight, self._held):
            if weight is not None:
                weight.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def resize(self, new_rank: int, seed: Sequence[int], fold: bool = False) -> None:
        """Change the adapter's rank (LoSA, Section 3.3). Growing, or shrinking by `fold`, leaves the output unchanged."""
        self.release()
        if fold and new_rank < self.rank:
            self.set_base(rank.fold_adapter(self.weight, self.A, self.B, new_rank, self.scale))
        new_rows = None
        if new_rank > self.rank:
            new_rows = adapter.initial_rows(new_rank - self.rank, self.in_features, seed).to(self.A)
        A, B = rank.resize_adapter(self.A.detach(), self.B.detach(), new_rank, new_rows)
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        for parameter, dimension in ((self.A, 0), (self.B, 1)):
            # Let blocks of different ranks share one compiled graph.
            torch._dynamo.maybe_mark_dynamic(parameter, dimension)


def attach_adapters(decoder: Decoder, scale: float) -> None:
    """Replace all projections of all blocks with `AdaptedLinear`s of rank 0; freeze all other parameters."""
    model: nn.Module = decoder.model
    model.requires_grad_(False)
    for block in decoder.blocks:
        adapt_block(block, decoder.family, scale)


def adapt_block(block: nn.Module, family: Family, scale: float) -> None:
    """Replace all projections of one block with `AdaptedLinear`s of rank 0.

    An existing `AdaptedLinear`, as in a model that was sharded on loading, stays and gets the scale.
    """
    # The projection with the largest output: the last one into the MLP.
    widest = [group[-1] for group in family.inputs[-2:-1]]
    for name, linear in family.projections_of(block).items():
        if isinstance(linear, AdaptedLinear):
            linear.scale = scale
        else:
            assert isinstance(linear, nn.Linear)
            linear = AdaptedLinear(linear, scale)
            block.set_submodule(name, linear)
        linear.recomputed = name in widest


def block_adapters(block: nn.Module, family: Family) -> dict[str, AdaptedLinear]:
    """Return the adapted projections of one block by name, in order of use."""
    return {name: layer for name, layer in family.projections_of(block).items() if isinstance(layer, AdaptedLinear)}


def adapters(model: nn.Module) -> list[AdaptedLinear]:
    """List all adapted projections of a model."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


@contextmanager
def hold_merged_weights(layers: Sequence[AdaptedLinear]) -> Iterator[None]:
    """Hold the merged weights of `layers` within this context."""
    try:
        for layer in layers:
            layer.hold()
        yield
    finally:
        for layer in layers:
            layer.release()


@contextmanager
def plain_linears(
    block: nn.Module, layers: Mapping[str, AdaptedLinear], compiled: bool = False
) -> Iterator[dict[str, nn.Linear]]:
    """Within this context, give the block plain linears with copies of the merged weights instead of its adapted `layers`.

    It is called without the hooks of FSDP; a sharded block must be gathered. compiled: compile a block that was compiled
    with its adapters again, without them; all blocks of one kind share the code. Otherwise it is called uncompiled.
    """
    linears = {}
    for name, layer in layers.items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.merged().clone(), requires_grad=False)
        linear.bias = layer.bias
        linears[name] = linear
    compiled_call = block._compiled_call_impl
    try:
        for name, linear in linears.items():
            block.set_submodule(name, linear)
        again = compiled and compiled_call is not None
        block._compiled_call_impl = torch.compile(block.forward) if again else block.forward
        yield linears
    finally:
        block._compiled_call_impl = compiled_call
        for name, layer in layers.items():
            block.set_submodule(name, layer)


@torch.no_grad()
def merge_adapters(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Replace the adapted projections with plain linears of merged weights. Return the masks by full name, bool, on the CPU.

    Errors: RuntimeError naming a projection whose merged weight is not zero where its mask is.
    """
    masks = {}
    for index, block in enumerate(decoder.blocks):
        for name, layer in block_adapters(block, decoder.family).items():
            full_name = decoder.full_name(index, name)
            merged, mask = layer.merged(), layer.mask
            if bool((merged != 0).logical_and_(~mask).any()):
                raise RuntimeError(f"{full_name}: the merged weight is not zero where its mask is")
            linear = nn.Linear(
                layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=merged.dtype
            )
            linear.weight = nn.Parameter(merged, requires_grad=False)
            linear.bias = layer.bias
            block.set_submodule(name, linear)
            masks[full_name] = mask.cpu()
    return masks
