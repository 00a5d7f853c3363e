"""Compiled blocks: their results, how often they are compiled, what they keep for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tiny_models.random_models import random_model
from torch_impl import adapter
from torch_impl.engine import adapted_linear, calibration, training
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.graphs import Repeater
from torch_impl.engine.masked_linear import masked_linear
from torch_impl.engine.reconstruction import ReconstructionConfig, reconstruct_blocks
from torch_impl.engine.settings import TrainingConfig
from torch_impl.experiment.planning.sizes import Sizes

# The compiler imports deprecated modules, and reads gradients of tensors that have none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

HIDDEN, INTERMEDIATE, VOCABULARY = 16, 40, 50


def adapted_llama(ranks: Sequence[int]) -> nn.Module:
    """A LLaMA with a block for each rank, B not zero, and biases."""
    model = random_model(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        num_hidden_layers=len(ranks),
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    adapted_linear.attach_adapters(Decoder(model), 2.0)
    set_ranks(model, ranks)
    return model


def set_ranks(model: nn.Module, ranks: Sequence[int]) -> None:
    for block, rank in zip(Decoder(model).blocks, ranks, strict=True):
        for layer in adapted_linear.adapters(block):
            layer.resize(rank, (rank,))
            nn.init.normal_(layer.B, std=0.1)


def gradients(model: nn.Module, sequences: int, length: int, held: str, compiled: str) -> list[torch.Tensor]:
    """Loss, and the gradient of every A and B."""
    rows = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))
    examples = [{"input_ids": row, "labels": row} for row in rows]
    config = TrainingConfig(per_device_train_batch_size=sequences, gradient_accumulation_steps=1, hold_merged=held)
    model.zero_grad()
    with calibration.compiled([Decoder(model)], compiled), Gradients(model, None, config) as found:
        loss = found.of(examples)
    return [torch.tensor(loss)] + [p.grad for layer in adapted_linear.adapters(model) for p in (layer.A, layer.B)]  # type: ignore


def reconstructed(model: nn.Module, compiled: str) -> list[torch.Tensor]:
    """The weights of every block after its own reconstruction, in parts of batches."""
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (5, 8), generator=generator)
    config = ReconstructionConfig(reconstruct_epochs=2, reconstruct_batch_size=2)
    with torch.no_grad(), calibration.compiled([decoder], compiled):
        stream = calibration.start_stream(decoder, ids, 2)
        arguments = calibration.block_arguments(decoder, ids[:1])
        for index, block in enumerate(decoder.blocks):
            target = stream.clone()
            target.hidden.add_(0.1 * torch.randn(target.hidden.shape, generator=generator))
            called = block._compiled_call_impl
            reconstruct_blocks(
                [block], index, decoder.family, stream, target, arguments[index : index + 1], config, Repeater(False)
            )
            assert block._compiled_call_impl is called
    return [layer.weight.detach() for layer in adapted_linear.adapters(model)]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Count graphs. Uses the real partitioner but generates no code, which would take long."""
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend=counter))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("held", ["on", "off"])
def test_gradients_are_the_same_and_graphs_few(held: str, counter: CompileCounterWithBackend) -> None:
    """Ranks of every kind, then of another LoSA step, other lengths, micro-batches that are not full."""
    model = adapted_llama([2, 5, 16, 1])
    for sequences, length, ranks, most in (
        (4, 8, [4, 4, 4, 4], 2),  # the first block, whose input has no gradient, and all others
        (4, 8, [2, 5, 16, 1], 3),  # rank 1
        (3, 12, [2, 5, 16, 1], 6),  # the same for any number of sequences of any length
        (4, 16, [3, 16, 1, 9], 6),
        (2, 28, [1, 2, 7, 1], 7),  # the first block at rank 1
    ):
        set_ranks(model, ranks)
        expected = gradients(model, sequences, length, held, "off")
        found = gradients(model, sequences, length, held, "on")
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert counter.frame_count <= most, (sequences, length, ranks)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_reconstruction_is_compiled_once_for_all_blocks(counter: CompileCounterWithBackend) -> None:
    """Without adapters; a batch and a shorter last one have the same code, or one more for any number of sequences."""
    before = [layer.weight.detach() for layer in adapted_linear.adapters(adapted_llama([2, 5, 3]))]
    expected, found = (reconstructed(adapted_llama([2, 5, 3]), compiled) for compiled in ("off", "on"))
    for ours, theirs, old in zip(found, expected, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        assert not torch.equal(ours, old)
    assert 1 <= counter.frame_count <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_what_is_made_again_is_the_same(counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward without held weights sees the same numbers, to the last bit, as backward with them and all that was kept;
    no merged weight is built twice for it."""
    model = adapted_llama([2, 5])
    held = gradients(model, 3, 8, "on", "on")
    built = 0
    merge = adapter.merge

    def counted(*operands: Any) -> torch.Tensor:
        nonlocal built
        built += 1
        return merge(*operands)

    monkeypatch.setattr(adapter, "merge", counted)
    for ours, theirs in zip(gradients(model, 3, 8, "off", "on"), held, strict=True):
        assert torch.equal(ours, theirs)
    # Forward and backward of two blocks, less q, k and v of the first one, whose input has no gradient.
    assert built == 2 * 2 * 7 - 3


def bytes_kept(blocks: int, held: bool) -> int:
    """Bytes that forward keeps for backward beside parameters and merged weights, 3 sequences of 32 tokens."""
    model = adapted_llama([4] * blocks)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    held_layers = adapted_linear.adapters(model) if held else []
    with (
        calibration.compiled([Decoder(model)], "on"),
        adapted_linear.hold_merged_weights(held_layers),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(input_ids=torch.zeros(3, 32, dtype=torch.int64), use_cache=False)
        for tensor in (*model.parameters(), *(layer._held for layer in held_layers)):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("held", [True, False])
def test_no_more_is_kept_for_backward_than_products_and_attention_need(
    held: bool, counter: CompileCounterWithBackend
) -> None:
    one_block = bytes_kept(3, held) - bytes_kept(2, held)
    # The block's input and what attention adds to it; q, k, v and what attention makes of them; gate and, if its merged
    # weight is held, up; else up is made again when that weight is built for backward.
    needed = 3 * 32 * 4 * (2 * HIDDEN + 4 * HIDDEN + (2 if held else 1) * INTERMEDIATE)
    small = 3 * 32 * 4 * (2 + 2)  # a number per token and norm, one per token and head
    assert needed <= one_block <= needed + small
    # The dry run predicts it.
    model = adapted_llama([4])
    sizes = Sizes.of(Decoder(model), torch.float32)
    foretold = 3 * 32 * sizes.kept_for_backward(True, recomputed=not held)
    assert foretold == needed < 3 * 32 * sizes.kept_for_backward(False)
    # Blocks that are computed again as a whole have nothing of it twice.
    training.checkpoint_activations(model)
    assert not any(layer.recomputed for layer in adapted_linear.adapters(model))


@pytest.mark.parametrize("grad", [True, False])
def test_watchers_hear_compiled_blocks(grad: bool, counter: CompileCounterWithBackend) -> None:
    model = adapted_llama([2, 2])
    decoder = Decoder(model)
    ids = torch.arange(12).view(2, 6)
    found: dict[str, list[torch.Tensor]] = {"on": [], "off": []}
    for wanted, heard in found.items():
        for block in decoder.blocks:
            # Warm: the graph without a watcher is there already.
            with calibration.compiled([decoder], wanted), torch.set_grad_enabled(grad):
                model(input_ids=ids, use_cache=False)
                for name in ("self_attn.q_proj", "mlp.down_proj"):
                    block.get_submodule(name).input_hook = heard.append
                model(input_ids=ids, use_cache=False)
                for layer in adapted_linear.block_adapters(block, decoder.family).values():
                    layer.input_hook = None
                model(input_ids=ids, use_cache=False)
    assert len(found["on"]) == len(found["off"]) == 4
    for ours, theirs in zip(found["on"], found["off"], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shapes_promised_to_the_compiler_are_kept(held: bool, dtype: torch.dtype) -> None:
    """Also strides, and that no input is changed or handed back."""
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, weight, bias = draw(2, 3, 5).requires_grad_(), draw(4, 5), draw(4)
    A, B = draw(2, 5, dtype=wide).requires_grad_(), draw(4, 2, dtype=wide).requires_grad_()
    arguments = (x, weight, A, B, bias, 2.0, weight.clone() if held else None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(torch.ops.losa.masked_linear, arguments, test_utils=checks, **tolerances)
    grad_y = draw(2, 3, 4).transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(
        torch.ops.losa.masked_linear_grad_x, (grad_y, weight, A, B, 2.0, arguments[-1]), test_utils=checks[:2]
    )
    torch.library.opcheck(
        torch.ops.losa.masked_linear_grad_adapter, (grad_y, x, weight, A, B, 2.0), test_utils=checks[:2]
    )
    torch.library.opcheck(torch.ops.losa.merge, (weight, A.detach(), B.detach(), 2.0), test_utils=checks[:2])
    assert masked_linear(*arguments).dtype == dtype
