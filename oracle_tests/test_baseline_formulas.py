"""The formulas of the baselines, each against a loop that is written down independently."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from oracle_tests.tiny_material import examples_for
from reference import adamw
from tiny_models.random_models import random_model
from torch_impl import adapter
from torch_impl.engine import training
from torch_impl.engine.batches import Example
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import TrainingConfig
from torch_impl.engine.training import Extra
from torch_impl.experiment.baselines import peft_adapters, sora

ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def sparse_model(name: str = "llama-gqa") -> nn.Module:
    """A model in float64 with half of its projections' weights pruned, and nothing trained."""
    model = random_model(name).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for weight in Decoder(model).weights:
        weight.mul_(torch.rand(weight.shape, generator=generator, dtype=weight.dtype) > 0.5)
    return model


@pytest.mark.parametrize("ranks", [(1,), (3, 1, 2)])
def test_every_gate_meets_the_threshold(ranks: tuple[int, ...]) -> None:
    layers = [sora.GatedLinear(nn.Linear(4, 2), rank, 1.0, (0, number)) for number, rank in enumerate(ranks)]
    before = [layer.gate.detach().numpy().copy() for layer in layers]
    after = sora.gated(layers).after
    assert after is not None
    after(1)
    for layer, gate in zip(layers, before, strict=True):
        expected = np.sign(gate) * np.maximum(np.abs(gate) - np.float32(sora.THRESHOLD), 0)
        np.testing.assert_array_equal(layer.gate.detach().numpy(), expected)


class OneProjection(nn.Module):
    """Logits = a gated projection of the tokens' embeddings."""

    def __init__(self, layer: sora.GatedLinear, embedding: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.config = layer, SimpleNamespace()
        self.register_buffer("embedding", embedding)
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(self.embedding[input_ids]))


def sora_loop(
    X: np.ndarray, labels: np.ndarray, W: np.ndarray, parameters: list[np.ndarray], scale: float, config: TrainingConfig
) -> list[np.ndarray]:
    """SoRA in NumPy on batches X (steps, n, in) of inputs and labels (steps, n) of a linear layer with softmax."""
    A, B, g = parameters
    moments = adamw.start(parameters)
    for step in range(len(X)):
        x, n = X[step], len(labels[step])
        low = x @ A.T
        z = x @ W.T + scale * (low * g) @ B.T
        softmax = np.exp(z - z.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        dz = (softmax - np.eye(len(W))[labels[step]]) / n
        dlow = scale * dz @ B  # of g ⊙ low
        gradients = [(dlow * g).T @ x, scale * dz.T @ (low * g), (dlow * low).sum(axis=0)]
        gradients[2] = gradients[2] + sora.PENALTY * np.sign(g) / len(g)
        gradients, _ = adamw.clip_by_global_norm(gradients, config.max_grad_norm)
        rate = config.learning_rate * adamw.lr_factor(step, len(X), config.warmup_ratio)
        (A, B, g), moments = adamw.adamw([A, B, g], gradients, moments, rate, config.weight_decay)
        g = np.array([0.0 if abs(v) <= sora.THRESHOLD else v - sora.THRESHOLD * np.sign(v) for v in g])
    return [A, B, g]


def test_sora_is_its_formula_over_several_steps() -> None:
    """Gradients of A, B and gate, the penalty, AdamW, and the threshold, which makes gates exactly 0."""
    rng, steps, length, rank, scale = np.random.default_rng(0), 6, 5, 4, 2.0
    embedding, linear = rng.standard_normal((11, 6)), nn.Linear(6, 11, bias=False).double()
    layer = sora.GatedLinear(linear, rank, scale, (0,))
    assert torch.equal(layer.A, adapter.initial_rows(rank, 6, (0,)))
    assert not layer.B.any()
    assert 0.1 < float(layer.gate.detach().std()) < 3
    with torch.no_grad():
        layer.B.copy_(torch.from_numpy(rng.standard_normal((11, rank))))
        # The second one reaches 0 and stays there, as its gradient is small against the penalty's.
        layer.gate.copy_(torch.tensor([0.9, 2e-4, -0.6, 0.4]))
    start = [p.detach().numpy().copy() for p in (layer.A, layer.B, layer.gate)]
    tokens = rng.integers(11, size=(steps, 2, length))
    examples: list[Example] = [
        {"input_ids": ids, "labels": ids} for ids in torch.from_numpy(tokens.reshape(-1, length))
    ]
    config = TrainingConfig(learning_rate=3e-4, weight_decay=0.1, max_grad_norm=0.5, **ONE_BY_ONE)
    model = OneProjection(layer, torch.from_numpy(embedding))
    training.train(model, model, examples, config, (0, steps), extra=sora.gated([layer]))  # type: ignore[arg-type]
    inputs = embedding[tokens[:, :, :-1]].reshape(steps, -1, 6)
    expected = sora_loop(
        inputs, tokens[:, :, 1:].reshape(steps, -1), linear.weight.detach().numpy(), start, scale, config
    )
    for name, ours, theirs in zip(("A", "B", "gate"), (layer.A, layer.B, layer.gate), expected, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-9, atol=1e-12, err_msg=name)
    assert [float(gate) == 0 for gate in layer.gate.detach()] == [False, True, False, False]


def test_lora_by_peft_is_a_plain_loop() -> None:
    """Two optimizer steps, so that A moves, too; W stays, and what the projections add is s·BA x."""
    rank, scale, model = 3, 2.0, sparse_model()
    plain, again, decoder = copy.deepcopy(model), copy.deepcopy(model), Decoder(model)
    names = [decoder.full_name(i, name) for i in range(len(decoder.blocks)) for name in decoder.family.projections]
    peft_adapters.attach_lora(decoder, rank, scale, seed=0)
    torch.manual_seed(5)
    peft_adapters.attach_lora(Decoder(again), rank, scale, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    def trained(kind: str) -> dict[str, torch.Tensor]:
        return {name: model.get_parameter(f"{name}.lora_{kind}.default.weight").detach().clone() for name in names}

    A, B = trained("A"), trained("B")
    assert all(matrix.any() for matrix in A.values())
    assert not any(matrix.any() for matrix in B.values())
    examples = examples_for(model, [6, 9, 7, 8])
    config = TrainingConfig(learning_rate=1e-2, weight_decay=0.1, **ONE_BY_ONE)
    training.train(model, model, examples, config, (0, 2))  # type: ignore[arg-type]

    parameters = [matrix.requires_grad_() for name in names for matrix in (A[name], B[name])]
    for name in names:
        plain.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: output + scale * inputs[0] @ A[name].T @ B[name].T
        )
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    for step in range(2):
        pair = examples[2 * step : 2 * step + 2]
        predicted = torch.cat([plain(input_ids=e["input_ids"][None]).logits[0, :-1] for e in pair])
        loss = functional.cross_entropy(predicted, torch.cat([e["labels"][1:] for e in pair]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * training.lr_factor(step, 2, config.warmup_ratio)
        optimizer.step()
    for kind, matrices in (("A", A), ("B", B)):
        for name, ours in trained(kind).items():
            # The model's norms and softmax are float32's; Adam's first steps are the gradient's sign.
            torch.testing.assert_close(ours, matrices[name].detach(), rtol=1e-4, atol=1e-5, msg=f"{name} {kind}")


@pytest.mark.parametrize("steps", [2, 3, 21])
def test_adalora_s_ranks_fall_from_12_to_8_within_the_run(steps: int) -> None:
    """By the cubic schedule, in whole: what each step leaves, and that it stays."""
    model = sparse_model()
    decoder, projections = Decoder(model), len(Decoder(model).weights)
    tuner = peft_adapters.attach_adalora(decoder, 8, 2.0, steps, seed=0)
    values = [parameter for name, parameter in model.named_parameters() if ".lora_E." in name]
    assert [len(value) for value in values] == [12] * projections
    left: list[int] = []

    def after(done: int) -> None:
        tuner.update_and_allocate(done)
        left.append(sum(int((value != 0).sum()) for value in values))

    config = TrainingConfig(learning_rate=1e-2, **ONE_BY_ONE)
    extra = Extra(peft_adapters.penalty(tuner), after)
    training.train(model, model, examples_for(model, [6] * (2 * steps)), config, (0, steps), extra=extra)  # type: ignore[arg-type]
    warm, settled = int(0.1 * steps), max(2, int(0.7 * steps))
    for done, ranks in enumerate(left, start=1):
        progress = min(1.0, max(0.0, (done - warm) / (settled - warm)))
        assert ranks == int(projections * (8 + 4 * (1 - progress) ** 3)), done
    assert left[-1] == 8 * projections


@torch.no_grad()
def test_adalora_s_ranks_are_those_of_peft() -> None:
    """Step by step, with the same gradients: importances, the singular values that are left, the pattern, what is frozen."""
    from peft.tuners.adalora.layer import RankAllocator

    steps = 40
    ours, theirs = (peft_adapters.attach_adalora(Decoder(sparse_model()), 8, 2.0, steps, seed=0) for _ in range(2))
    theirs.rankallocator = RankAllocator(theirs.model, theirs.peft_config["default"], "default")
    assert type(ours.rankallocator) is not RankAllocator
    generator, patterns = torch.Generator().manual_seed(1), set()
    for done in range(1, steps + 1):
        for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            if one.requires_grad:
                one.grad = torch.randn(one.shape, generator=generator).to(one)
                other.grad = one.grad.clone()
                one -= 0.01 * one.grad
                other.copy_(one)
        for tuner in (ours, theirs):
            tuner.update_and_allocate(done)
        for part in ("exp_avg_ipt", "exp_avg_unc"):
            found, expected = getattr(ours.rankallocator, part), getattr(theirs.rankallocator, part)
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-15)
        for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(one, other), done
        pattern = ours.peft_config["default"].rank_pattern
        assert pattern == theirs.peft_config["default"].rank_pattern
        patterns.add(repr(pattern))
    assert not found, "the importances are gone when the ranks are settled"
    assert len(patterns) > 10


def test_adalora_s_penalty_is_peft_s() -> None:
    model = sparse_model()
    tuner = peft_adapters.attach_adalora(Decoder(model), 2, 2.0, 10, seed=0)
    ids = examples_for(model, [9])[0]["input_ids"][None]
    with torch.no_grad():
        theirs = tuner(input_ids=ids, labels=ids).loss - model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(peft_adapters.penalty(tuner)(), theirs, rtol=1e-4, atol=0, check_dtype=False)
