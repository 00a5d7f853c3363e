"""Reconstruction in production against the spec, on every family, in half precision, in smaller parts, and resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from oracle_tests.llama_pair import HF_NAMES, random_llama, to_hugging_face
from reference import llama
from reference import reconstruct as spec
from reference.llama import Sizes
from tiny_models.random_models import FAMILIES, random_model
from torch_impl import losa, rank, reconstruct
from torch_impl.engine import calibration, reconstruction
from torch_impl.engine.adapted_linear import attach_adapters, block_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.graphs import Repeater
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.settings import PruneConfig, Settings

SIZES = Sizes(vocabulary=11, hidden=8, intermediate=12, heads=2, kv_heads=1)


def problem(n: int = 6) -> tuple[llama.Llama, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(model of one block, masks, inputs, targets)."""
    generator = np.random.default_rng(0)
    model = random_llama(SIZES, 1, True, 0, biased=True)
    masks = {name: generator.random(weight.shape) < 0.5 for name, weight in model.blocks[0].weights.items()}
    inputs = generator.normal(size=(n, 5, SIZES.hidden))
    targets = llama.block_forward(model.blocks[0], inputs + 0.1 * generator.normal(size=inputs.shape), SIZES).output
    return model, masks, inputs, targets


def ours(
    model: llama.Llama, masks: dict[str, np.ndarray], inputs: np.ndarray, targets: np.ndarray, **more: object
) -> dict[str, np.ndarray]:
    """Weights by the spec's names after production's reconstruction of the only block."""
    twin = to_hugging_face(model)
    decoder = Decoder(twin)
    [arguments] = calibration.block_arguments(decoder, torch.zeros(1, inputs.shape[1], dtype=torch.int64))
    block = twin.model.layers[0]
    settings = {"epochs": 3, "learning_rate": 0.02, "batch_size": 4, **more}
    reconstruct.reconstruct_block(
        block,
        {HF_NAMES[name]: torch.from_numpy(mask) for name, mask in masks.items()},
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        arguments=arguments,
        **settings,  # type: ignore[arg-type]
    )
    return {name: block.get_submodule(full).weight.detach().numpy() for name, full in HF_NAMES.items()}


@pytest.mark.parametrize("rows_at_once", [None, 1, 3])
def test_a_block_is_reconstructed_as_by_the_spec(rows_at_once: int | None) -> None:
    model, masks, inputs, targets = problem()
    expected = spec.reconstruct_block(model.blocks[0], masks, inputs, targets, 3, 0.02, 4, SIZES)
    found = ours(model, masks, inputs, targets, rows_at_once=rows_at_once)
    for name, weight in expected.weights.items():
        # Hugging Face's norms, angles and softmax are float32 in a float64 model.
        np.testing.assert_allclose(found[name], weight, rtol=1e-4, atol=1e-5, err_msg=name)
        assert not found[name][~masks[name]].any()
        assert np.abs(found[name] - model.blocks[0].weights[name] * masks[name]).max() > 0.01


@pytest.mark.parametrize("rows_at_once", [None, 3])
def test_blocks_are_trained_together_as_by_the_spec(rows_at_once: int | None) -> None:
    generator = np.random.default_rng(1)
    model = random_llama(SIZES, 3, True, 0, biased=True)
    masks = [{name: generator.random(w.shape) < 0.5 for name, w in block.weights.items()} for block in model.blocks]
    inputs = generator.normal(size=(6, 5, SIZES.hidden))
    targets = inputs + 0.5 * generator.normal(size=inputs.shape)
    expected = spec.reconstruct_blocks(model.blocks, masks, inputs, targets, 3, 0.02, 4, SIZES)
    twin = to_hugging_face(model)
    arguments = calibration.block_arguments(Decoder(twin), torch.zeros(1, 5, dtype=torch.int64))
    blocks = list(twin.model.layers)
    given = [{HF_NAMES[name]: torch.from_numpy(mask) for name, mask in of_block.items()} for of_block in masks]
    x, D = torch.from_numpy(inputs), torch.from_numpy(targets)
    assert reconstruct.reconstruct_blocks(blocks, given, x, D, 3, 0.02, 4, arguments, rows_at_once) == blocks
    for number, block in enumerate(expected):
        for name, weight in block.weights.items():
            found = blocks[number].get_submodule(HF_NAMES[name]).weight.detach().numpy()
            np.testing.assert_allclose(found, weight, rtol=1e-4, atol=1e-5, err_msg=f"{number}, {name}")
            assert not found[~masks[number][name]].any()
    with pytest.raises(ValueError, match="masks has 1 entries for 3 blocks"):
        reconstruct.reconstruct_blocks(blocks, given[:1], x, D, 3, 0.02, 4, arguments)


def test_no_epoch_leaves_the_pruned_weights() -> None:
    model, masks, inputs, targets = problem()
    for name, weight in ours(model, masks, inputs, targets, epochs=0).items():
        np.testing.assert_array_equal(weight, np.where(masks[name], model.blocks[0].weights[name], 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32(dtype: torch.dtype) -> None:
    """The error falls by about as much as in float64, though a step is far below the rounding of a weight."""
    model, masks, inputs, targets = problem(8)
    errors = {}
    for kind in (torch.float64, dtype):
        twin = to_hugging_face(model).to(kind)
        [arguments] = calibration.block_arguments(Decoder(twin), torch.zeros(1, 5, dtype=torch.int64))
        block = twin.model.layers[0]
        given = {HF_NAMES[name]: torch.from_numpy(mask) for name, mask in masks.items()}
        x, D = torch.from_numpy(inputs).to(kind), torch.from_numpy(targets).to(kind)
        before = {name: block.get_submodule(name).weight for name in given}
        reconstruct.reconstruct_block(block, given, x, D, 20, 1e-3, 4, arguments)
        with torch.no_grad():
            output = block(x, **arguments)
        errors[kind] = rank.reconstruction_error(D.flatten(0, 1).double(), output.flatten(0, 1).double())
        for name, parameter in before.items():
            assert block.get_submodule(name).weight is parameter
            assert parameter.dtype == kind
            assert not parameter[~given[name]].any()
    assert errors[dtype] == pytest.approx(errors[torch.float64], rel=0.05)


def first_gradients(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The gradients of the first step; the targets are so large that float16 has no numbers as small as their errors' weights."""
    model, masks, inputs, targets = problem()
    twin = to_hugging_face(model).to(kind)
    [arguments] = calibration.block_arguments(Decoder(twin), torch.zeros(1, 5, dtype=torch.int64))
    given = {HF_NAMES[name]: torch.from_numpy(mask) for name, mask in masks.items()}
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        reconstruct._Weights, "step", lambda self, *_: found.extend(wide.grad.clone() for wide in self._wide)
    )
    x, D = torch.from_numpy(inputs).to(kind), torch.from_numpy(3000 * targets).to(kind)
    reconstruct.reconstruct_block(twin.model.layers[0], given, x, D, 1, 1e-3, 6, arguments)
    return torch.cat([gradient.flatten().double() for gradient in found])


@pytest.mark.parametrize(("kind", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_gradients_in_half_precision_lose_nothing_small(
    kind: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = first_gradients(torch.float64, monkeypatch)
    assert exact.abs().max() < 1e-3
    assert (first_gradients(kind, monkeypatch) - exact).norm() < bound * exact.norm()


def test_a_weight_that_is_not_finite_stops_it_with_the_block_as_it_was() -> None:
    model, masks, inputs, targets = problem()
    twin = to_hugging_face(model)
    [arguments] = calibration.block_arguments(Decoder(twin), torch.zeros(1, 5, dtype=torch.int64))
    block = twin.model.layers[0]
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    inputs[0, 0, 0] = np.nan
    given = {HF_NAMES[name]: torch.from_numpy(mask) for name, mask in masks.items()}
    with pytest.raises(FloatingPointError, match="lower reconstruct_learning_rate"):
        reconstruct.reconstruct_block(
            block, given, torch.from_numpy(inputs), torch.from_numpy(targets), 1, 0.1, 4, arguments
        )
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name])


def settings(method: str, pattern: str, **changes: object) -> Settings:
    return Settings(
        prune=PruneConfig(
            prune_method=method, sparsity_ratio=None if ":" in pattern else 0.6, sparsity_type=pattern, steps=2
        ),
        calibration=calibration.CalibrationConfig(nsamples=8, seqlen=12, rmi_samples=8),
        training=losa.TrainingConfig(learning_rate=1e-2, **changes),  # type: ignore[arg-type]
        reconstruction=ReconstructionConfig(
            reconstruct_epochs=4, reconstruct_learning_rate=3e-3, reconstruct_batch_size=4
        ),
    )


def tokens(model: nn.Module) -> tuple[torch.Tensor, list[list[dict[str, torch.Tensor]]]]:
    ids = torch.randint(model.config.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    return ids, [
        [{"input_ids": row, "labels": row} for row in ids[:4]],
        [{"input_ids": row, "labels": row} for row in ids[4:]],
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_ends_closer_to_its_dense_model(name: str) -> None:
    """With adapters there at the second step; masks are nested and zeros stay."""
    results = {}
    for epochs in (0, 4):
        model = random_model(name).eval()
        setup = settings("wanda", "unstructured")
        setup = Settings(
            setup.prune, setup.adapter, setup.calibration, setup.training,
            ReconstructionConfig(reconstruct_epochs=epochs, reconstruct_learning_rate=3e-3, reconstruct_batch_size=4),
        )  # fmt: skip
        results[epochs] = losa.run(model, *tokens(model), setup)
        assert all(
            (layer.merged() == 0).float().mean() > 0.5
            for block in Decoder(model).blocks
            for layer in block_adapters(block, Decoder(model).family).values()
        )
    for plain, healed in zip(results[0], results[4], strict=True):
        assert healed.sparsity == pytest.approx(plain.sparsity, abs=0.05)
        assert sum(healed.errors) < 0.9 * sum(plain.errors)


def test_merged_weights_are_the_reconstructed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """base = M⊙(reconstructed − s·BA), with adapters that are not 0."""
    model = random_model("llama-gqa").double().eval()
    decoder = Decoder(model)
    attach_adapters(decoder, 2.0)
    block = decoder.blocks[0]
    layers = block_adapters(block, decoder.family)
    for number, layer in enumerate(layers.values()):
        layer.resize(2, (number,))
        with torch.no_grad():
            layer.B.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(number)) < 0.5)
    masks = {name: layer.mask for name, layer in layers.items()}
    made = {}

    def moved(given: list[nn.Module], *_: object, **__: object) -> list[nn.Module]:
        for name in masks:
            weight = given[0].get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(torch.where(masks[name], weight + 1.0, 0.0))
            made[name] = weight.clone()
        return given

    monkeypatch.setattr(reconstruct, "reconstruct_blocks", moved)
    stream = calibration.start_stream(decoder, tokens(model)[0], 4)
    reconstruction.reconstruct_blocks(
        [block], 0, decoder.family, stream, stream, [{}], ReconstructionConfig(reconstruct_epochs=1), Repeater(False)
    )
    for name, layer in layers.items():
        assert block.get_submodule(name) is layer
        torch.testing.assert_close(layer.merged(), made[name], rtol=1e-12, atol=1e-12)
        assert torch.equal(layer.mask, masks[name])


@pytest.mark.parametrize(("pattern", "damaged"), [("unstructured", True), ("1:2", False)])
def test_only_what_pruning_has_damaged_is_reconstructed(
    pattern: str, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1:2 prunes nothing at the first of five steps: there is only rounding to train on."""
    called: list[int] = []
    original: Callable[..., None] = reconstruction.reconstruct_blocks

    def heard(blocks: list[nn.Module], last: int, *rest: object) -> None:
        called.append(last)
        original(blocks, last, *rest)

    monkeypatch.setattr(reconstruction, "reconstruct_blocks", heard)
    model = random_model("llama-gqa").eval()
    base = settings("wanda", pattern)
    setup = Settings(
        PruneConfig(prune_method="wanda", sparsity_type=pattern, sparsity_ratio=0.5, steps=5),
        base.adapter, base.calibration, losa.TrainingConfig(finetune=False), base.reconstruction,
    )  # fmt: skip
    blocks = model.config.num_hidden_layers
    ids = tokens(model)[0]
    dense = copy.deepcopy(model)
    heard_at: list[int] = []
    losa.run(model, ids, [], setup, on_step=lambda record: heard_at.append(len(called)), dense=dense)
    assert heard_at[0] == (blocks if damaged else 0)
    assert heard_at[-1] >= 2 * blocks
