"""Calibration text that the model writes: the spec's tokens, its prompts, and how a run uses and keeps it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import torch_impl
from oracle_tests.llama_pair import random_llama, to_hugging_face
from oracle_tests.small_runs import arguments, make_place
from reference import continuation as spec
from reference import llama
from reference.llama import Sizes
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.engine import distributed
from torch_impl.experiment.config import parse
from torch_impl.experiment.planning.dry_run import make_plan
from torch_impl.experiment.planning.show import plan_text
from torch_impl.experiment.text import written
from torch_impl.experiment.text.written import WRITTEN, with_written, written_windows
from torch_impl.run import main

SIZES = Sizes(vocabulary=40, hidden=16, intermediate=24, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("written"))


def windows_of(model: torch.nn.Module, rows: int = 3, tokens: int = 12) -> torch.Tensor:
    return torch.randint(4, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))


def test_the_model_writes_what_the_spec_says_token_by_token() -> None:
    """With a cache and several sequences at once, against the spec, which runs the whole text again for each token."""
    model = random_llama(SIZES, 3, True, 0)
    windows = windows_of(twin := to_hugging_face(model))
    twin.generation_config.eos_token_id, twin.config.eos_token_id = [1, 2], 1
    found = written_windows(twin, None, windows, 7, seed=5)
    generator = np.random.default_rng((5, 1))
    starts = generator.integers(0, 12 - 6 + 1, 7)
    prompts = np.stack([windows[i % 3, starts[i] : starts[i] + 6].numpy() for i in range(7)])
    excluded = {1, 2, *(t for t in (twin.config.bos_token_id, twin.config.pad_token_id) if t is not None)}

    def predict(ids: np.ndarray) -> np.ndarray:
        return llama.forward(model, ids).logits[:, -1]

    expected = spec.continue_text(predict, prompts, generator.random((7, 6)), sorted(excluded))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "qwen3"])
def test_written_sequences_begin_as_texts_do_and_never_end(family: str) -> None:
    model, tokenizer = random_model(family).eval(), byte_tokenizer()
    windows = windows_of(model, tokens=16)
    found = written_windows(model, tokenizer, windows, 5, 0)
    assert found.shape == (5, 16)
    assert found.dtype == torch.int64
    pieces = {tuple(piece.tolist()) for row in windows for piece in row.unfold(0, 8, 1)}
    begin = tokenizer.bos_token_id
    first = 0 if begin is None else 1
    assert all(tuple(row[first : first + 8].tolist()) in pieces for row in found)
    assert begin is None or bool((found[:, 0] == begin).all())
    assert not set(tokenizer.all_special_ids) & set(found[:, first + 8 :].flatten().tolist())
    assert torch.equal(found, written_windows(model, tokenizer, windows, 5, 0))
    assert not torch.equal(found, written_windows(model, tokenizer, windows, 5, 1))


def test_a_full_device_writes_the_same_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama-gqa").double().eval()
    windows = windows_of(model)
    expected = written_windows(model, None, windows, 5, 0)
    original = written.StaticCache

    class Full(original):  # type: ignore[misc, valid-type]
        def update(self, keys: torch.Tensor, *rest: object, **more: object) -> object:
            if len(keys) > 2:
                raise torch.OutOfMemoryError("full")
            return super().update(keys, *rest, **more)

    monkeypatch.setattr(written, "StaticCache", Full)
    assert torch.equal(written_windows(model, None, windows, 5, 0), expected)


def test_what_is_written_is_kept_for_the_windows_and_the_seed_it_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A resumed run, which reads it, said that the model writes."""
    model = random_model("llama-gqa").train()
    windows, kept = windows_of(model), tmp_path / WRITTEN
    found = with_written(model, None, windows, 2, 0, kept)
    assert model.training
    assert torch.equal(found[:3], windows)
    assert found.shape == (5, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert "the model writes 2 calibration sequences of 12 tokens\n" in capsys.readouterr().err
    assert torch.equal(with_written(model, None, windows, 2, 0, kept), found)
    assert capsys.readouterr().err == ""
    # The file holds what was written last: each changes one thing.
    for changed in ((windows, 2, 1), (windows + 1, 2, 1), (windows + 1, 1, 1)):
        before, found = found, with_written(model, None, *changed, kept)
        assert found[-1].tolist() != before[-1].tolist()
    assert [path.name for path in tmp_path.iterdir()] == [WRITTEN]
    assert with_written(model, None, windows, 0, 0) is windows


def test_a_run_calibrates_on_both_and_keeps_what_was_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    original = torch_impl.losa.run

    def heard(model: object, ids: torch.Tensor, *rest: object, **more: object) -> object:
        seen.append(ids)
        return original(model, ids, *rest, **more)

    monkeypatch.setattr("torch_impl.losa.run", heard)
    options = {"written_per_sample": 1, "nsamples": 4, "seqlen": 16, "output_dir": tmp_path / "out", "steps": 1}
    assert main(arguments(place, **options, finetune="false", seed=5)) == 0
    [(key, tokens)] = load_file(tmp_path / "out" / WRITTEN).items()
    assert key.endswith(".4.5"), "written with the seed of the run"
    assert seen[0].shape == (8, 16)
    assert torch.equal(seen[0][4:], tokens.long())
    assert torch.equal(seen[-1], seen[0])


def test_the_library_writes_too(place: Path) -> None:
    model, tokenizer = random_model("llama-gqa"), byte_tokenizer()
    options = {"sparsity": 0.5, "steps": 1, "nsamples": 3, "seqlen": 16, "written_per_sample": 2}
    result = torch_impl.prune(model, tokenizer, calibration=["def f(x): return x + 1\n" * 30], **options)
    assert result.settings["calibration"]["written_per_sample"] == 2
    assert result.settings["calibration"]["nsamples"] == 3


def test_a_plan_counts_it_and_says_it(place: Path) -> None:
    plans = [
        make_plan(parse(arguments(place, nsamples=8, seqlen=32, written_per_sample=written, finetune="false", steps=1)))
        for written in (0, 3)
    ]
    assert plans[1].work.sweeps > 3 * plans[0].work.sweeps
    assert plans[0].work.writing == 0
    assert plans[1].work.writing == 2 * plans[1].prunable * 24 * 32
    streams = [plan.memory.device.streams for plan in plans]
    assert streams[1] == 4 * streams[0]
    assert "8 × 32 tokens of" in plan_text(plans[1])
    assert "and 24 × 32 that the model writes" in plan_text(plans[1])
    assert "that the model writes" not in plan_text(plans[0])


def test_what_cannot_write_is_said_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="written_per_sample is -1"):
        parse(arguments(place, written_per_sample=-1))
    with pytest.raises(
        ValueError, match=r"offload is 'on' with written_per_sample 2; .* use --written_per_sample 0 and a"
    ):
        parse(arguments(place, written_per_sample=2, steps=1, finetune="false", offload="on"))
    with pytest.raises(ValueError, match="written_per_sample is above 0, and the model is spread over 4 processes"):
        make_plan(parse(arguments(place, written_per_sample=2, devices=4, dry_run=True)))
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    model = random_model("llama-gqa")
    with pytest.raises(ValueError, match="written_per_sample is above 0, and the model is spread over 2 processes"):
        with_written(model, None, windows_of(model), 2, 0)


def test_uniforms_of_different_sequences_differ() -> None:
    """The same prompt, many times: sequences are not copies of one another."""
    model = random_model("llama-gqa").eval()
    found = written_windows(model, None, windows_of(model, rows=1, tokens=2).repeat(1, 6), 8, 0)
    assert all(not torch.equal(one[6:], other[6:]) for one, other in itertools.combinations(found, 2))
