"""What the rate rules measure, in production against the spec: in memory, sharded, offloaded, resumed, in small batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oracle_tests.llama_pair import float64_llama, to_hugging_face
from oracle_tests.plans import config
from oracle_tests.small_runs import arguments, make_place
from oracle_tests.spread_runs import peak_model
from oracle_tests.tiny_material import SIZES
from oracle_tests.whole_runs import PLAIN, special
from reference import rates as reference_rates
from reference import sparsity as reference_sparsity
from tiny_models.random_models import random_model
from torch_impl import sparsity
from torch_impl.bench.large import device_peak
from torch_impl.engine import blocks, gradient_sweep
from torch_impl.engine.adapted_linear import attach_adapters
from torch_impl.engine.checkpoints.offload import open_offloaded
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.rates import RULES
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak, phases
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.run import main

MEASURED = [name for name, rule in RULES.items() if rule.measure is not None]
PLAN = {"steps": 1, "finetune": "false"}
ONE_SHOT = {"steps": 1, "finetune": "false", "eval_windows": 2, "sparsity_ratio": 0.5}


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("name", MEASURED)
def test_a_measure_is_the_spec_s(name: str, batch: int) -> None:
    case = special(widths=(12, 20, 8), biased=True, blocks=5, start=(0.3, 0.0))
    model = case.model()
    ids = np.random.default_rng(5).integers(case.sizes.vocabulary, size=(9, 7))
    expected = reference_rates.RULES[name].measure(model, ids, 0.6)
    decoder = Decoder(to_hugging_face(model))
    attach_adapters(decoder, 1.0)
    with float64_llama():
        found = blocks.measure_importance(decoder, RULES[name].measure(decoder, 0.6), torch.tensor(ids), batch)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert len(set(np.round(expected, 9))) > 1


@pytest.mark.parametrize("name", ["owl", "gradient"])
def test_an_offloaded_run_measures_the_same(name: str, tmp_path: Path) -> None:
    place = make_place(tmp_path)
    for choice in ("off", "on"):
        options = {**ONE_SHOT, "layer_sparsity": name, "offload": choice, "output_dir": place / choice}
        assert main(arguments(place, **options)) == 0
    inside, offloaded = (json.loads((place / choice / "steps.json").read_text()) for choice in ("off", "on"))
    assert inside[0]["importance"] == offloaded[0]["importance"] != []
    assert inside[0]["sparsity"] == offloaded[0]["sparsity"]


@pytest.mark.parametrize("name", MEASURED)
def test_an_offloaded_model_measures_the_same(name: str, tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(257, (5, 9), generator=torch.Generator().manual_seed(0))
    offloaded = Decoder(open_offloaded(tmp_path / "model", torch.device("cpu"), torch.float32))
    decoder = Decoder(model)
    attach_adapters(decoder, 1.0)
    inside, outside = (
        blocks.measure_importance(one, RULES[name].measure(one, 0.6), ids, 2) for one in (decoder, offloaded)
    )
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("name", ["atp", "gradient"])
def test_smaller_batches_when_memory_is_full(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sweep begins again, and finds the same."""
    case = PLAIN
    decoder = Decoder(to_hugging_face(case.model()))
    attach_adapters(decoder, 1.0)
    ids = torch.tensor(case.calibration())

    def measured(size: int) -> torch.Tensor:
        return blocks.measure_importance(decoder, RULES[name].measure(decoder, 0.5), ids, size)

    expected = measured(4)
    loss, calls = gradient_sweep.next_token_loss, []

    def limited(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*given)

    monkeypatch.setattr(gradient_sweep, "next_token_loss", limited)
    found, size = find_executable_batch_size(measured, 4, "calibration_batch_size")
    assert size == 2
    assert "reducing calibration_batch_size from 4 to 2" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["owl", "gradient"])
def test_the_memory_of_a_measure_is_foretold(name: str) -> None:
    """The tensors that exist at its peak besides the model's: never more than planned, and most of it."""
    decoder = Decoder(peak_model(300))
    attach_adapters(decoder, 1.0)
    ids = torch.randint(300, (16, 64), generator=torch.Generator().manual_seed(0))
    options = {"nsamples": 16, "seqlen": 64, "calibration_batch_size": 4, **PLAN}
    foretold = phases(config(layer_sparsity=name, **options), Sizes.of(decoder, torch.float32), Place("cpu"))
    parts = foretold["importance"]
    measured, _ = device_peak(
        lambda: blocks.measure_importance(decoder, RULES[name].measure(decoder, 0.5), ids, 4), torch.device("cpu")
    )
    expected = parts.total - parts.weights - parts.dense_copy
    assert 0.7 * expected < measured <= expected


def test_hidden_states_kept_for_gradients_are_planned() -> None:
    """Two blocks, six tokens: on a GPU they are on the host, on the CPU with the rest, offloaded too."""
    some = {"layer_sparsity": "gradient", "nsamples": 3, "seqlen": 2, **PLAN}
    kept, stream = 2 * 6 * 8 * 2, 6 * 8 * 2
    on_gpu, on_cpu = (phases(config(**some), SIZES, Place(kind))["importance"] for kind in ("cuda", "cpu"))
    assert (on_gpu.streams, on_cpu.streams) == (stream, stream + kept)
    # A projection has 96 weights, a block 280; of each token 240 bytes, two hidden states and three inner ones.
    work = (96 + 280) * 4 + 4 * (240 + (2 * 8 + 3 * 12) * 2)
    assert (on_gpu.work, on_gpu.logits) == (work, 0)
    assert peak(config(**some, offload="off"), SIZES, Place("cuda")).host.streams == kept
    for kind, hosted in (("cuda", kept), ("cpu", 0)):
        large = {**some, "nsamples": 300, "eval_windows": 1}
        assert peak(config(**large, offload="on"), SIZES, Place(kind)).host.streams >= (64 * kept // 3 if hosted else 0)
    windows = config(**{**some, "seqlen": 300})
    assert phases(windows, replace(SIZES, vocabulary=10**5), Place("cuda"))["importance"].logits > 0
    assert phases(config(**{**some, "layer_sparsity": "rmi"}), SIZES, Place("cpu"))["importance"].streams == stream


def test_moves_that_earlier_steps_force_are_counted() -> None:
    """Ceilings below the even share, which random sampling of whole cases seldom draws."""
    generator, forced = np.random.default_rng(0), 0
    for _ in range(300):
        importance, ceiling = generator.permutation(8) / 8, generator.integers(1, 5, 8)
        case = {"kept_total": 16, "m": 4, "spread": 1, "moves": int(generator.integers(0, 4))}
        if np.minimum(ceiling, 3).sum() < 16:
            continue
        forced += bool((ceiling < 2).any())
        expected = reference_sparsity.allocate_kept(importance, ceiling=ceiling, **case)
        found = sparsity.allocate_kept(torch.tensor(importance), ceiling=torch.tensor(ceiling), **case)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert forced > 50
