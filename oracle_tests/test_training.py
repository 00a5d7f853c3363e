"""Fine-tuning: schedule, accumulation, sequences of several lengths, labels, losses."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close
from oracle_tests.spread_runs import peak_config, peak_model
from oracle_tests.tiny_material import adapted_model, examples_for
from reference.loss import kl_divergence
from tiny_models.random_models import FAMILIES, random_model
from torch_impl.bench.large import device_peak
from torch_impl.engine import adapted_linear, batches, gradients, loss, training
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients, sum_loss
from torch_impl.engine.settings import TrainingConfig


@pytest.mark.parametrize(("total", "ratio"), [(10, 0.3), (7, 0.0), (5, 1.0), (1, 0.3), (100, 0.03), (2500, 0.3)])
def test_lr_factor_is_the_field_s_schedule_but_never_zero(total: int, ratio: float) -> None:
    """Hugging Face's, at most one part of the warm-up higher while that lasts, and equal from then on."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(total * ratio)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    for done in range(total):
        [theirs] = scheduler.get_last_lr()
        ours = training.lr_factor(done, total, ratio)
        if done < warmup:
            assert 0 < ours - theirs <= 1 / (warmup + 1) + 1e-12
        else:
            assert ours == pytest.approx(theirs)
        optimizer.step()
        scheduler.step()


def test_the_shortest_training_moves_the_adapters() -> None:
    """A LoSA step of one optimizer step, with the warm-up of the defaults."""
    model = adapted_model()
    config = TrainingConfig(learning_rate=1e-2)
    training.train(model, model, examples_for(model, [8] * 4), config, (0, 1))
    assert all(bool(layer.B.any()) for layer in adapted_linear.adapters(model))


def test_without_clipping_a_step_is_that_of_a_bound_out_of_reach() -> None:
    """max_grad_norm 0 is no bound at all; it used to zero every gradient."""
    results = []
    for bound in (0.0, 1e9):
        model = adapted_model()
        train(model, examples_for(model, [8] * 8), max_grad_norm=bound)
        results.append([layer.merged() for layer in adapted_linear.adapters(model)])
    for ours, unbounded in zip(*results, strict=True):
        assert torch.equal(ours, unbounded)


def train(model: nn.Module, examples: list[batches.Example], dense: nn.Module | None = None, **changes: object) -> list:
    config = TrainingConfig(learning_rate=1e-2, warmup_ratio=0.0, **changes)  # type: ignore[arg-type]
    total = config.optimizer_steps(len(examples))
    return training.train(model, dense or model, examples, config, (0, total))


@pytest.mark.parametrize("lengths", [[8] * 8, [3, 8, 5, 7, 4, 8, 6, 2]])
def test_accumulation_changes_nothing_but_memory(lengths: list[int]) -> None:
    """4 × 1 and 1 × 4 and 2 × 2 micro-batches are the same optimizer step, sequences of any length."""
    results = []
    for micro, accumulation in ((4, 1), (1, 4), (2, 2)):
        model = adapted_model()
        losses = train(
            model,
            examples_for(model, lengths),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
        )
        results.append((losses, [layer.merged() for layer in adapted_linear.adapters(model)]))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        for ours, first in zip(weights, results[0][1], strict=True):
            # Adam's first steps are the gradient's sign: float32 noise of the norms and the softmax shows at 1e-5.
            torch.testing.assert_close(ours, first, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_takes_no_second_set_of_gradients() -> None:
    """Measured with adapters larger than all else that a pass over a few tokens takes."""
    model = peak_model(64)
    adapted_linear.attach_adapters(Decoder(model), 1.0)
    for number, layer in enumerate(adapted_linear.adapters(model)):
        layer.resize(64, (number,))
    batch = [{"input_ids": row, "labels": row} for row in torch.randint(64, (4, 8))]
    with Gradients(model, None, peak_config(8).training) as gradients:
        gradients.of(batch)
        size = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        step = device_peak(lambda: gradients.of(batch), torch.device("cpu"))[0]
    assert step < size / 2


def test_gradients_are_backward_s() -> None:
    """To the bit, over two micro-batches; a projection without ranks has none."""
    model = adapted_model()
    adapted_linear.adapters(model)[0].resize(0, (0,))
    examples = examples_for(model, [6, 6, 6, 6])
    micro = [batches.collate(part, torch.device("cpu")) for part in (examples[:2], examples[2:])]
    share = 1 / batches.label_count(examples)
    for batch in micro:
        (sum_loss(model, batch, None) * share).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert sum(gradient is not None for gradient in expected.values()) == 2 * (len(adapted_linear.adapters(model)) - 1)
    model.zero_grad()
    config = TrainingConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with Gradients(model, None, config) as gradients:
        gradients.of(examples)
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [0, 4])
def test_loss_is_the_model_s_own_on_labels(prompt: int) -> None:
    model = adapted_model()
    [example] = examples_for(model, [9])
    example["labels"][:prompt] = batches.IGNORED
    with torch.no_grad():
        expected = float(model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss)
    losses = train(model, [example], per_device_train_batch_size=1, gradient_accumulation_steps=1)
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert batches.label_count([example]) == min(8, 9 - prompt), "the first token is never predicted"


@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_of_one_micro_batch_do_not_see_each_other(name: str) -> None:
    """Loss and gradients of sequences of several lengths are the sum of each one's alone."""
    model = adapted_model(name)
    with torch.no_grad():
        for layer in adapted_linear.adapters(model):
            layer.B.normal_(0, 0.1)
    examples = examples_for(model, [5, 1, 9, 2])
    examples[2]["labels"][:4] = batches.IGNORED
    results = []
    for micro_batches in ([examples], [[example] for example in examples]):
        model.zero_grad()
        loss = sum(sum_loss(model, batches.collate(micro, torch.device("cpu"), 4), None) for micro in micro_batches)
        loss.backward()  # type: ignore[union-attr]
        results.append(
            [loss.detach(), *(p.grad for layer in adapted_linear.adapters(model) for p in (layer.A, layer.B))]
        )
    assert float(results[0][0]) > 1
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 15, 1000])
def test_cross_entropy_in_parts_is_torch_s(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of rows at once, the last part shorter; some rows or all of them not counted."""
    monkeypatch.setattr(loss, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(10, 7, generator=generator)).to(dtype).requires_grad_()
    for targets in (torch.tensor([0, 6, -100, 3, 3, 1, -100, 2, 5, 4]), torch.full((10,), -100)):
        wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        expected = functional.cross_entropy(wide, targets, ignore_index=-100, reduction="sum") * 0.25
        expected.backward()
        found = loss.summed_cross_entropy(logits, targets, -100) * 0.25
        [gradient] = torch.autograd.grad(found, logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wide.grad.to(dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_divergence_is_the_spec_s_whatever_the_logits_dtype(dtype: torch.dtype) -> None:
    """Summed in float32 at least from the logits as they are, and so its gradient, rounded once."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(2, 6, 11, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    logits.requires_grad_()
    labels = torch.randint(11, (2, 6), generator=generator)
    labels[0, :3] = labels[1, 4] = batches.IGNORED

    def model(values: torch.Tensor) -> Any:
        return lambda input_ids, use_cache: SimpleNamespace(logits=values)

    batch = {"input_ids": torch.zeros(2, 6, dtype=torch.long), "labels": labels}
    found = sum_loss(model(logits), batch, model(teacher))
    [gradient] = torch.autograd.grad(found, logits)
    expected, expected_gradient = kl_divergence(
        *(values.detach().double().numpy() for values in (logits, teacher)), labels.numpy()
    )
    wide = torch.promote_types(dtype, torch.float32)
    assert (found.dtype, gradient.dtype) == (wide, dtype)
    assert_close("divergence", expected, found, tolerances.bound(wide))
    assert_close(
        "gradient",
        expected_gradient,
        gradient,
        tolerances.bound(dtype) / 2,
        scale=np.abs(expected_gradient),
        floor=1e-7,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 15, 1000])
def test_divergence_in_parts_is_torch_s(dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of rows at once, the last part shorter; some rows or all of them not counted."""
    monkeypatch.setattr(loss, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(10, 7, generator=generator)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(10, 7, generator=generator)).to(dtype)
    for counts in (torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool), torch.zeros(10, dtype=torch.bool)):
        wide = logits.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        both = wide.log_softmax(-1), teacher.to(wide).log_softmax(-1)
        each = functional.kl_div(*both, reduction="none", log_target=True).sum(-1)
        expected = each.masked_fill(~counts, 0.0).sum() * 0.25
        expected.backward()
        found = loss.summed_divergence(logits, teacher, counts) * 0.25
        [gradient] = torch.autograd.grad(found, logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wide.grad.to(dtype))  # type: ignore[union-attr]


def test_rows_are_filled_up_on_the_right_without_labels() -> None:
    short, long = examples_for(adapted_model(), [5, 9])
    batch = batches.collate([short, long], torch.device("cpu"), 4)
    assert batch["input_ids"].shape == (2, 12)
    for row, example in enumerate([short, long]):
        used = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][row, :used], example["input_ids"])
        assert torch.equal(batch["labels"][row, :used], example["labels"])
        assert (batch["labels"][row, used:] == batches.IGNORED).all()
    assert batches.collate([short, long], torch.device("cpu"))["input_ids"].shape == (2, 9)


def test_rows_are_not_filled_up_beyond_learned_positions() -> None:
    """100 positions would be rounded up to 128: an index out of range, on a GPU a lost context."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for family, positions, expected in (("opt", 128, 64), ("opt", 100, 1), ("llama", 100, 64)):
        model = random_model(family, max_position_embeddings=positions)
        assert batches.row_multiple(model, cuda) == expected
        assert batches.row_multiple(model, cpu) == 1


def test_sequences_of_similar_length_share_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    collate = batches.collate

    def watched(*arguments: object) -> batches.Example:
        shapes.append(tuple((batch := collate(*arguments))["input_ids"].shape))  # type: ignore[arg-type]
        return batch

    monkeypatch.setattr(gradients, "collate", watched)
    model = adapted_model()
    train(model, examples_for(model, [3, 9, 2, 8]), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert shapes == [(2, 3), (2, 9)]


def test_kl_is_zero_against_itself_and_pulls_to_the_dense_model() -> None:
    model = adapted_model()
    same = train(copy.deepcopy(model), examples_for(model, [8] * 4), dense=model, loss="kl")
    assert abs(same[0]) < 1e-6
    other = random_model("llama-gqa", seed=3).double().eval()
    losses = train(model, examples_for(model, [8] * 8) * 10, dense=other, loss="kl")
    assert losses[-1] < losses[0]


def test_only_adapters_move_and_pruned_weights_stay_zero() -> None:
    model = adapted_model()
    with torch.no_grad():
        for layer in adapted_linear.adapters(model):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, examples_for(model, [8] * 8))
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == name.endswith((".A", ".B")), name
    for layer in adapted_linear.adapters(model):
        assert not (layer.merged() * ~layer.mask).any()


@pytest.mark.parametrize("changes", [{"hold_merged": "off"}, {"gradient_checkpointing": True}])
def test_memory_options_do_not_change_the_result(changes: dict[str, bool]) -> None:
    def trained(**options: bool) -> list[torch.Tensor]:
        model = adapted_model()
        if options.get("gradient_checkpointing"):
            training.checkpoint_activations(model)
        train(model, examples_for(model, [8] * 8), **options)
        return [layer.merged() for layer in adapted_linear.adapters(model)]

    for ours, plain in zip(trained(**changes), trained(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_divergence_stops_with_the_step_named() -> None:
    model = adapted_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="optimizer step 1"):
        train(model, examples_for(model, [8] * 2))


@pytest.mark.parametrize("hold", ["on", "auto", "off"])
def test_merged_weights_are_held_while_training_and_no_longer(hold: str) -> None:
    model = adapted_model()
    batch = examples_for(model, [5, 6, 7])
    with Gradients(model, None, TrainingConfig(hold_merged=hold)) as gradients:
        for step in range(2):
            with torch.no_grad():
                for layer in adapted_linear.adapters(model):
                    layer.B.add_(step + 1)
            gradients.of(batch)
            held = [layer.held for layer in adapted_linear.adapters(model)]
            if hold == "off":
                assert held == [None] * len(held)
            else:
                assert all(torch.equal(layer.merged(), layer.held) for layer in adapted_linear.adapters(model)), (
                    "as they are now"
                )
    assert [layer.held for layer in adapted_linear.adapters(model)] == [None] * len(held)
