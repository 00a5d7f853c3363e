"""Captured graphs own the memory they read: tested here with emulated graphs, on a GPU by programs/gpu_graphs.py."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import Cache, CompileConfig, DynamicCache, StaticCache

from oracle_tests import emulated_graphs
from oracle_tests.emulated_graphs import FreedMemoryError
from oracle_tests.programs import gpu_graphs
from oracle_tests.tiny_material import adapted_model, examples_for
from tiny_models.random_models import random_model
from torch_impl import reconstruct
from torch_impl.decode import captured_call, next_token
from torch_impl.decode.next_token import NextToken
from torch_impl.engine import adapted_linear, calibration, gradients, training
from torch_impl.engine import graphs as graphs_module
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradients import Gradients
from torch_impl.engine.graphs import Captured, Repeater
from torch_impl.engine.settings import TrainingConfig

# Sequences of five lengths, so that several shapes are captured and replayed in turn.
LENGTHS = [5, 9, 5, 7, 9, 5, 7, 9, 6, 4] * 4


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[emulated_graphs.Graph]:
    monkeypatch.setattr(Gradients, "_may_capture", lambda self: self._config.cuda_graphs)
    return emulated_graphs.emulate(monkeypatch)


def test_the_emulation_notices_freed_memory_and_repeats_the_work(graphs: list[emulated_graphs.Graph]) -> None:
    kept, outside, total = torch.ones(3), [torch.full((3,), 2.0)], torch.zeros(3)

    def work() -> torch.Tensor:
        doubled = kept * outside[0]
        total.add_(doubled.view(3))
        return doubled.sum()

    captured = Captured(work, None)
    assert not total.any()
    kept.fill_(5)
    assert float(captured.replay()) == 30
    assert torch.equal(total, torch.full((3,), 10.0))
    outside.clear()
    with pytest.raises(FreedMemoryError):
        captured.replay()


@pytest.mark.parametrize("hold", ["on", "off"])
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_training_in_graphs_is_training_launch_by_launch(
    loss: str, hold: str, graphs: list[emulated_graphs.Graph]
) -> None:
    """Losses and adapters, with sequences of many lengths; nothing that a graph reads is freed."""
    results = []
    teacher = random_model("llama-gqa", seed=3).double().eval()
    for captures in (True, False):
        model = adapted_model()
        config = TrainingConfig(
            learning_rate=1e-2,
            loss=loss,
            hold_merged=hold,
            cuda_graphs=captures,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        examples = examples_for(model, LENGTHS)
        losses = training.train(model, teacher, examples, config, (0, config.optimizer_steps(len(examples))))
        results.append((losses, [p.detach() for layer in adapted_linear.adapters(model) for p in (layer.A, layer.B)]))
        if captures:
            assert len(graphs) >= 2
            assert sum(graph.replays for graph in graphs) >= 5
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for ours, plain in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["gradients", "merged weights"])
def test_graphs_are_given_up_where_what_they_write_to_is_replaced(
    what: str, graphs: list[emulated_graphs.Graph]
) -> None:
    """Gradients set to None between steps, or merged weights released, as an evaluation in between may do."""
    model = adapted_model()
    with torch.no_grad():
        for layer in adapted_linear.adapters(model):
            layer.B.normal_(0, 0.1)
    config = TrainingConfig(hold_merged="on", per_device_train_batch_size=2, gradient_accumulation_steps=1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected, found = [], []
    for results, captures in ((expected, False), (found, True)):
        with Gradients(model, None, TrainingConfig(**{**vars(config), "cuda_graphs": captures})) as gradients:
            for step in range(12):
                if step in (5, 9):
                    if what == "gradients":
                        model.zero_grad(set_to_none=True)
                    else:
                        for layer in adapted_linear.adapters(model):
                            layer.release()
                gradients.of(examples_for(model, [6, 6], seed=step))
                results.append([p.grad.clone() for p in parameters])
                model.zero_grad(set_to_none=False)
    assert sum(graph.replays for graph in graphs) > 5
    for ours, plain in zip(found, expected, strict=True):
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert any(one.abs().max() > 0 for one in ours)


def test_a_model_that_cannot_be_captured_trains_without_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Gradients, "_may_capture", lambda self: self._config.cuda_graphs)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gradients, "Captured", refuse)
    losses = []
    for captures in (True, False):
        model = adapted_model()
        config = TrainingConfig(learning_rate=1e-2, cuda_graphs=captures)
        with caplog.at_level(logging.WARNING):
            losses.append(training.train(model, model, examples_for(model, [8] * 40), config, (0, 5)))
    assert losses[0] == losses[1]
    assert len(caplog.records) == 1
    assert "CUDA graph capture failed" in caplog.text


def test_out_of_memory_while_capturing_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a broken capture raises another error, which must not hide it: smaller micro-batches are the answer."""

    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        Captured(work, None, "pool")
    assert ended == [(0, "pool")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_in_graphs_is_reconstruction_launch_by_launch(
    dtype: torch.dtype, graphs: list[emulated_graphs.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, with batches and parts of batches of several sizes; nothing that a graph reads is freed."""
    monkeypatch.setattr(graphs_module, "_on_gpu", lambda owned: True)
    before = random_model("llama-gqa", seed=1).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 6, before.config.hidden_size, generator=generator).to(dtype)
    targets = inputs + 0.5 * torch.randn(inputs.shape, generator=generator).to(dtype)
    results = []
    for captures in (True, False):
        model = copy.deepcopy(before)
        arguments = calibration.block_arguments(Decoder(model), torch.zeros(1, 6, dtype=torch.int64))
        blocks = list(model.model.layers)[:2]
        masks = [
            {name: block.get_submodule(name).weight > 0 for name in Decoder(model).family.projections}
            for block in blocks
        ]
        reconstruct.reconstruct_blocks(
            blocks, masks, inputs, targets, 4, 0.01, 4, arguments[:2], 3, repeat=Repeater(captures)
        )
        results.append([parameter.detach().clone() for block in blocks for parameter in block.parameters()])
    # Batches of 4 and 3 sequences in parts of 3 and 1: both shapes recur.
    assert [graph.replays for graph in graphs] == [7, 3]
    for captured, plain in zip(*results, strict=True):
        torch.testing.assert_close(captured, plain, rtol=0, atol=0)


def test_reconstruction_that_cannot_be_captured_goes_on_without_graphs(
    graphs: list[emulated_graphs.Graph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs_module, "_on_gpu", lambda owned: True)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def work() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    repeat = Repeater(True)
    for _ in range(2):
        assert repeat(work, None) is work
    assert len(graphs) == 1
    assert caplog.text.count("CUDA graph capture failed, so reconstruction is slower") == 1

    def full() -> None:
        raise torch.OutOfMemoryError("out of memory")

    repeat = Repeater(True)
    assert repeat(full, None) is full
    assert repeat(lambda: None, None).__name__ == "replay"


def test_decoding_in_a_graph_owns_its_cache_and_tokens(graphs: list[emulated_graphs.Graph]) -> None:
    model = random_model("llama-gqa").double().eval().requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for captures in (True, False):
        cache = StaticCache(config=model.config, max_cache_len=16)
        following = NextToken(model, cache, graph=captures)
        following.captures = captures
        results.append([following(ids[:, [i]]).clone() for i in range(12)])
        assert copy.copy(cache.layers[0].cumulative_length) == 12
    assert [graph.replays for graph in graphs] == [10]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
@pytest.mark.parametrize(("do_sample", "kernels"), [(False, False), (True, False), (False, True)])
def test_generate_replays_its_tokens(
    family: str, do_sample: bool, kernels: bool, graphs: list[emulated_graphs.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a static cache, rows of different lengths, twice: the tokens are those of the uncompiled model. Only rows without
    padding can be fused. Qwen2 gets a dict of masks."""
    monkeypatch.setattr(next_token, "KERNELS", ("cpu",) if kernels else ())
    model = random_model(family).double().eval().requires_grad_(False)
    ids = torch.randint(model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": do_sample, "pad_token_id": 0}
    torch.manual_seed(0)
    expected = [model.generate(ids, **options), model.generate(ids[:2, :1], max_new_tokens=4, do_sample=False)]
    packed = copy.deepcopy(model)
    captured_call.capture_in_generate(packed)
    make = packed.get_compiled_call
    calls = []

    def on_a_gpu(config: CompileConfig | None) -> captured_call.CapturedCall:
        calls.append(make(config))
        calls[-1]._captures = True
        return calls[-1]

    monkeypatch.setattr(packed, "get_compiled_call", on_a_gpu)
    monkeypatch.setattr(packed, "_valid_auto_compile_criteria", lambda *_: True)
    torch.manual_seed(0)
    found = [packed.generate(ids, cache_implementation="static", **options)]
    found += [packed.generate(ids[:2, :1], cache_implementation="static", max_new_tokens=4, do_sample=False)]
    # The prompt gives a token, and two calls warm up.
    assert [graph.replays for graph in graphs] == [9 - 3, 4 - 3]
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)
    assert [call._fused is not None for call in calls] == [False, kernels]


def test_what_is_captured_in_generate(graphs: list[emulated_graphs.Graph]) -> None:
    """One token per row with a static cache; another cache or shape is another graph. Qwen2 takes a dict of masks."""
    model = random_model("qwen2").eval().requires_grad_(False)
    call = captured_call.CapturedCall(model)
    assert not call._captures
    call._captures = True
    ids = torch.ones(1, 1, dtype=torch.long)

    def run(times: int, cache: Cache | None = None, **inputs: object) -> int:
        before = sum(graph.replays for graph in graphs)
        cache = StaticCache(config=model.config, max_cache_len=16) if cache is None else cache
        for _ in range(times):
            call(**{"input_ids": ids, "past_key_values": cache, "use_cache": True, **inputs})
        return sum(graph.replays for graph in graphs) - before

    assert run(4) == run(4) == 2
    assert run(4, input_ids=ids.repeat(3, 1)) == 2
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    assert run(4, attention_mask=mask) == run(4, attention_mask={"full_attention": mask}) == 2
    assert run(4, attention_mask={"full_attention": None}) == 2
    assert run(4, attention_mask=mask, other="a setting that is no number") == 0
    assert run(4, DynamicCache(config=model.config)) == 0
    assert run(4, input_ids=ids.repeat(1, 2)) == 0
    assert run(4, output_hidden_states=True) == 0
    model.config.output_hidden_states = True
    assert run(4) == 0
    assert run(4, output_hidden_states=False) == 2


def test_a_model_that_cannot_be_captured_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("not\n  permitted")

    monkeypatch.setattr(next_token, "Captured", fail)
    model = random_model("llama-gqa").eval().requires_grad_(False)
    call = captured_call.CapturedCall(model)
    call._captures = True
    cache, ids = StaticCache(config=model.config, max_cache_len=16), torch.arange(8)[None]
    logits = [call(input_ids=ids[:, [i]], past_key_values=cache).logits[0] for i in range(8)]
    assert torch.equal(torch.cat(logits).argmax(-1), model(ids).logits[0].argmax(-1))
    assert capsys.readouterr().err == "decoding: CUDA graph capture failed, so decoding is slower (not permitted)\n"


def test_a_user_s_own_compile_config_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama-gqa").eval()
    captured_call.capture_in_generate(model)
    monkeypatch.setattr(torch, "compile", lambda *_, **settings: settings["mode"])
    assert model.get_compiled_call(CompileConfig(mode="default")) == "default"
    assert isinstance(model.get_compiled_call(None), captured_call.CapturedCall)


def test_the_program_for_a_gpu_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Without the compiled part, whose compiler is slow here."""
    assert gpu_graphs.main(["--small", "--device", "cpu", "--examples", "32", "--no_compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("0.0e+00 of" in line for line in lines) >= 8
    assert gpu_graphs.apart([1.0, float("nan")], [1.0, 2.0]) == gpu_graphs.apart([1.0], [1.0, 2.0]) == float("inf")
