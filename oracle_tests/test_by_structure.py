"""LLM-Pruner, FLAP and LoRAPrune on models: what they score, what goes, and that a smaller block is one with zeros."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from oracle_tests.coupled_lines import lines, scores_by_autograd
from oracle_tests.tiny_material import token_ids
from tiny_models.random_models import random_model
from torch_impl.engine.adapted_linear import attach_adapters, block_adapters, merge_adapters
from torch_impl.engine.blocks import sweep_gradients
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines import by_structure, loraprune
from torch_impl.experiment.config import Config
from torch_impl.experiment.material import Material
from torch_impl.schedule import cubic_sparsity

FAMILIES = ["llama-gqa", "mistral", "qwen2", "qwen3", "opt"]


def decoder_of(family: str = "llama-gqa", blocks: int = 5, **sizes: int) -> Decoder:
    """A model whose heads and channels are of different use."""
    model = random_model(family, num_hidden_layers=blocks, **sizes).double().requires_grad_(False)
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(5)
    for block in decoder.blocks:
        for name in (decoder.family.reads_heads, decoder.family.reads_channels):
            weight = block.get_submodule(name).weight
            weight.mul_(torch.rand(weight.shape[1], generator=generator, dtype=weight.dtype) * 2)
    return decoder


def given(decoder: Decoder, sparsity: float = 0.3) -> tuple[Material, Config]:
    """Calibration sequences and a configuration."""
    ids = token_ids(decoder.model, 5, 11)
    config: Any = Config()
    config = dataclasses.replace(config, prune=dataclasses.replace(config.prune, sparsity_ratio=sparsity, steps=1))
    small = dataclasses.replace(config.calibration, calibration_batch_size=2)
    material: Any = Material(decoder.model, None, ids, [], ids, {}, {})  # type: ignore[arg-type]
    return material, dataclasses.replace(config, calibration=small)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_block_computes_what_the_block_with_zeros_does(family: str) -> None:
    decoder = decoder_of(family, 2)
    generator = torch.Generator().manual_seed(1)
    zeroed, smaller = copy.deepcopy(decoder.model), copy.deepcopy(decoder.model)
    for index in range(2):
        found = lines(decoder, index)
        kept = {}
        for reader in dict.fromkeys(reader for _, _, reader, _ in found):
            width = next(width for name, _, _, width in found if name == reader)
            count = decoder.blocks[index].get_submodule(reader).weight.shape[1] // width
            kept[reader] = torch.rand(count, generator=generator) > 0.4
            kept[reader][0] = True
        block = Decoder(zeroed).blocks[index]
        for name, axis, reader, width in found:
            gone = (~kept[reader]).repeat_interleave(width)
            linear = block.get_submodule(name)
            linear.weight[gone if axis == 0 else (slice(None), gone)] = 0
            if axis == 0 and linear.bias is not None:
                linear.bias[gone] = 0
        by_structure.cut_block(Decoder(smaller).blocks[index], decoder.family, kept)
    ids = token_ids(decoder.model, 3, 9)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in zeroed.parameters())
    torch.testing.assert_close(smaller(ids).logits, zeroed(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_llm_pruner_scores_structures_by_the_gradient_of_the_whole_loss(family: str) -> None:
    decoder = decoder_of(family)
    material, _ = given(decoder)
    taylor = by_structure.Taylor(decoder)
    sweep_gradients(decoder, material.calibration, 2, taylor)
    for ours, theirs in zip(taylor.scores, scores_by_autograd(decoder, material.calibration), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)


def test_llm_pruner_removes_the_lowest_of_the_middle_blocks() -> None:
    """Of 8 blocks the first stays whole and, at 1 / 16, the last: 0.5 is rounded up. The other six reach 30 % of the model."""
    decoder = decoder_of(blocks=8)
    material, config = given(decoder)
    scores = scores_by_autograd(decoder, material.calibration)
    dense = copy.deepcopy(decoder.model)
    by_structure.llm_pruner(decoder, material, config)
    o, down = decoder.family.reads_heads, decoder.family.reads_channels
    for index, (block, whole) in enumerate(zip(decoder.blocks, Decoder(dense).blocks, strict=True)):
        middle = 1 <= index < 7
        # 2 heads of 1536 weights, 48 channels of 96: 40 % of 7680 are 3072, and 0.8 of a head is none; 32 channels.
        assert block.get_submodule(o).weight.shape == (32, 32)
        assert block.get_submodule(down).weight.shape == (32, 16 if middle else 48)
        best = scores[index][down].argsort(descending=True)[:16].sort().values if middle else torch.arange(48)
        for name, axis, reader, _ in lines(decoder, index):
            expected = whole.get_submodule(name).weight
            expected = expected.index_select(axis, best) if reader == down else expected
            assert torch.equal(block.get_submodule(name).weight, expected), name
    assert by_structure.ends(32, by_structure.FIRST, by_structure.LAST) == (4, 2)
    # The nearest to 1.5 and 0.75 blocks; a half is rounded up.
    assert by_structure.ends(12, by_structure.FIRST, by_structure.LAST) == (2, 1)


def moments_of(decoder: Decoder, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    seen = {}
    handles = []
    for index, block in enumerate(decoder.blocks):
        for name in (decoder.family.reads_heads, decoder.family.reads_channels):

            def watch(module: nn.Module, inputs: tuple[torch.Tensor], place: Any = (index, name)) -> None:
                seen[place] = inputs[0].flatten(0, -2)

            handles.append(block.get_submodule(name).register_forward_pre_hook(watch))
    decoder.model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_flap_has_one_threshold_for_the_model_and_biases_for_what_goes(family: str) -> None:
    decoder = decoder_of(family, num_attention_heads=8, **({} if family == "opt" else {"num_key_value_heads": 4}))
    material, config = given(decoder)
    for block in decoder.blocks:
        reads = block.get_submodule(decoder.family.reads_heads).weight
        reads[:, : reads.shape[1] // 2] *= 0.1
    dense = Decoder(copy.deepcopy(decoder.model))
    by_structure.flap(decoder, material, config)
    inputs = moments_of(dense, material.calibration)
    ranked = []
    for index in range(len(dense.blocks)):
        found = lines(dense, index)
        for reader in (dense.family.reads_heads, dense.family.reads_channels):
            weight = dense.blocks[index].get_submodule(reader).weight
            width = next(width for name, _, _, width in found if name == reader)
            x = inputs[index, reader]
            score = x.var(0, unbiased=False) * weight.square().sum(0)
            z = ((score - score.mean()) / score.std(unbiased=False)).view(-1, width).mean(1)
            parts = [(name, axis, of) for name, axis, by, of in found if by == reader]
            weights = sum(
                dense.blocks[index].get_submodule(name).weight.shape[1 - axis] * of for name, axis, of in parts
            )
            ranked += [
                (float(value), weights, index, reader, number)
                for number, value in enumerate(z)
                if number != int(z.argmax())
            ]
    ranked.sort()
    total = sum(dense.prunable_weights)
    gone = list(itertools.accumulate(weights for _, weights, *_ in ranked))
    best = min(range(len(gone)), key=lambda count: abs(gone[count] - 0.3 * total)) + 1
    removed = {(index, reader, number) for _, _, index, reader, number in ranked[:best]}
    assert len({reader for _, reader, _ in removed}) == 2, "heads and channels"
    for index, block in enumerate(decoder.blocks):
        found = lines(dense, index)
        for reader in (dense.family.reads_heads, dense.family.reads_channels):
            before, after = dense.blocks[index].get_submodule(reader), block.get_submodule(reader)
            width = next(width for name, _, _, width in found if name == reader)
            kept = torch.tensor(
                [(index, reader, number) not in removed for number in range(before.weight.shape[1] // width)]
            ).repeat_interleave(width)
            assert torch.equal(after.weight, before.weight[:, kept])
            mean = inputs[index, reader].mean(0)
            bias = before.weight[:, ~kept] @ mean[~kept]
            bias = bias if before.bias is None else bias + before.bias
            torch.testing.assert_close(after.bias, bias, rtol=1e-5, atol=1e-8)


def test_flap_leaves_every_block_its_best_head_and_channel() -> None:
    decoder = decoder_of("opt")
    material, config = given(decoder, 0.98)
    by_structure.flap(decoder, material, config)
    for index in range(5):
        shapes = {name: linear.weight.shape for name, linear in decoder.projections(index).items()}
        assert shapes["self_attn.out_proj"] == (32, 8)
        assert shapes["fc2"] == (32, 1)
    assert decoder.model(material.calibration).logits.isfinite().all()


# --- LoRAPrune ---


def adapted(blocks: int = 10) -> Decoder:
    decoder = decoder_of(blocks=blocks)
    attach_adapters(decoder, 2.0)
    generator = torch.Generator().manual_seed(2)
    for index, block in enumerate(decoder.blocks):
        for number, layer in enumerate(block_adapters(block, decoder.family).values()):
            layer.resize(3, (index, number))
            layer.B.data.normal_(generator=generator)
    return decoder


def random_gradients(decoder: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for block in decoder.blocks:
        for layer in block_adapters(block, decoder.family).values():
            for parameter in (layer.A, layer.B):
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_loraprune_scores_by_the_adapters_gradients_and_averages_over_steps() -> None:
    decoder = adapted(blocks=20)
    pruner = loraprune.Pruner(decoder, 0.3, total=1000)
    expected: dict[tuple[int, str], torch.Tensor] = {}
    for step in (1, 2, 3):
        random_gradients(decoder, step)
        parts: dict[tuple[int, str], Any] = {}
        for index in range(20):
            for name, axis, reader, width in lines(decoder, index):
                layer = decoder.blocks[index].get_submodule(name)
                A, B, g_A, g_B = layer.A, layer.B, layer.A.grad, layer.B.grad
                score = ((g_B @ A + B @ g_A - g_B @ g_A) * (layer.weight + 2 * B @ A)).abs().sum(1 - axis)
                of_structures = score.view(-1, width).sum(1).detach()
                part = 0.1 * of_structures / of_structures.square().sum().sqrt()
                parts[index, reader] = parts.get((index, reader), 0) + part
        expected = {key: 0.9 * expected.get(key, 0) + part for key, part in parts.items()}
        pruner.before(step)
    for index, reader in expected:
        if 2 <= index < 19:
            torch.testing.assert_close(pruner._scores[index][reader], expected[index, reader])
        else:
            assert not pruner._scores[index][reader].any(), "the first tenth and the last block stay whole"


def test_loraprune_waits_for_the_device_only_when_structures_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand waits for a number in each step took 3 s of it on a GPU that other processes shared."""
    decoder = adapted()
    pruner = loraprune.Pruner(decoder, 0.3, total=100)
    random_gradients(decoder, 1)

    def read(*_: Any) -> None:
        raise AssertionError("a number was read")

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, read)
        pruner.before(1)
    (layer, *_) = block_adapters(decoder.blocks[3], decoder.family).values()
    layer.A.grad = torch.full_like(layer.A, float("nan"))
    for step in range(2, 10):
        pruner.before(step)
    with pytest.raises(
        ValueError, match=r"^the score of block 3, [a-z_.]+, holds NaN or infinity; allowed: finite numbers"
    ):
        pruner.before(10)


@pytest.mark.parametrize(
    ("total", "events"), [(100, [10, 20, 30, 40, 50, 60, 70, 80]), (12, list(range(1, 10))), (1, [1])]
)
def test_loraprune_removes_on_a_cubic_schedule_until_the_sparsity_is_reached(total: int, events: list[int]) -> None:
    """Every tenth step until four fifths are done, in a short run more often. What is gone stays 0 and stays gone."""
    decoder = adapted()
    pruner, whole = loraprune.Pruner(decoder, 0.3, total), sum(decoder.prunable_weights)
    before, happened = 0.0, []
    masks = [weight != 0 for weight in decoder.weights]
    for step in range(1, total + 1):
        random_gradients(decoder, step)
        pruner.before(step)
        gone = 1 - sum(int(weight.count_nonzero()) for weight in decoder.weights) / whole
        if gone > before:
            happened.append(step)
            now = [weight != 0 for weight in decoder.weights]
            assert not any(bool((new & ~old).any()) for new, old in zip(now, masks, strict=True))
            goal = cubic_sparsity(events.index(step) + 1, len(events), 0.3)
            # Before the last event each kind is rounded by itself: up to one of two heads, 1536 of 7680 weights, is missing.
            assert goal - 0.21 < gone < goal + 0.01
            before, masks = gone, now
    # The last steps of the cube may be less than a channel.
    assert (happened[0], happened[-1]) == (events[0], events[-1])
    assert len(happened) >= len(events) - 2
    # A channel is a hundredth of a block.
    assert before == pytest.approx(0.3, abs=0.01)
    zeros = copy.deepcopy(decoder.model)
    merge_adapters(Decoder(zeros))
    merge_adapters(decoder)
    for block, kept in zip(decoder.blocks, pruner.kept, strict=True):
        by_structure.cut_block(block, decoder.family, kept)
    ids = token_ids(decoder.model, 2, 7)
    torch.testing.assert_close(decoder.model(ids).logits, zeros(ids).logits, rtol=1e-6, atol=1e-6)
    assert 1 - sum(decoder.prunable_weights) / whole == pytest.approx(before)
