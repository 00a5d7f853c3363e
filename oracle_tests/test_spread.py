"""Several processes give the result of one: the same decisions, the same numbers up to the order of summation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oracle_tests.processes import in_processes
from oracle_tests.spread_runs import (
    Outcome,
    all_peaks,
    gram,
    peak_config,
    peak_model,
    received,
    run,
    settings,
    spread_config,
)
from oracle_tests.tolerances import OTHER_ORDER, UNIT
from tiny_models.random_models import random_model, save_random_model
from torch_impl.engine import adapted_linear, distributed
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import phases
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.planning.traffic import calibration_traffic, step_traffic
from torch_impl.run import main


def assert_same(several: Outcome, one: Outcome) -> None:
    for record, expected in zip(several.records, one.records, strict=True):
        assert record.ranks == expected.ranks
        for name in ("sparsity", "realised", "importance", "errors", "losses"):
            values, wanted = getattr(record, name), getattr(expected, name)
            assert values == pytest.approx(wanted, rel=OTHER_ORDER, abs=OTHER_ORDER), f"step {record.step}: {name}"
    assert several.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        assert np.array_equal(several.weights[name] == 0, weight == 0), f"{name}: masks differ"
        np.testing.assert_allclose(several.weights[name], weight, rtol=0, atol=OTHER_ORDER)


CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"prune_method": "sparsegpt", "rank_shrink": "fold", "loss": "ce", "first_token_weight": 50.0}),
    (2, {"prune_method": "pruner_zero", "rank_shrink": "fold"}),
    (4, {"prune_method": "magnitude", "gradient_checkpointing": True, "reconstruct_epochs": 2}),
    (2, {"prune_method": "wanda", "reconstruct_epochs": 1, "reconstruct_window": 2}),
    (4, {"sparsity_ratio": None, "sparsity_type": "mixed-2:4", "layer_sparsity": "gradient"}),
    (4, {"layer_sparsity": "atp", "prune_method": "magnitude"}),
    (2, {"layer_sparsity": "owl", "loss": "ce"}),
    (2, {"layer_sparsity": "lamp", "prune_method": "magnitude"}),
    (2, {"layer_sparsity": "uniform", "sparsity_type": "structured"}),
    (
        2,
        {
            "prune_method": "taylor",
            "sparsity_type": "structured",
            "sparsity_ratio": 0.4,
            "layer_sparsity": "uniform",
            "channel_multiple": 1,
            "dense_blocks": [1, 0],
        },
    ),
]


@pytest.mark.parametrize(("count", "changes"), CASES)
def test_a_whole_run_is_that_of_one_process(count: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Rates, masks, ranks, losses and merged weights; every process holds its rows alone, and all know the same."""
    case = settings(**changes)
    one = run(case)
    outcomes = in_processes(count, run, case, tmp_path)
    for outcome in outcomes:
        assert_same(outcome, one)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    for name, parameter in saved.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), outcomes[0].weights[name]), name


# Only one process alone writes samples of text; memory is each process's own.
ALONE = ("samples", "peak_memory")


def timeless(value: Any, number: Callable[[float], Any] = lambda x: x) -> Any:
    """JSON without what takes a while; its floats through `number`."""
    if isinstance(value, dict):
        kept = {name: entry for name, entry in value.items() if "seconds" not in name and name not in ALONE}
        return {name: timeless(entry, number) for name, entry in kept.items()}
    if isinstance(value, list):
        return [timeless(entry, number) for entry in value]
    return number(value) if isinstance(value, float) else value


def near(value: float) -> Any:
    """Up to the order of summation."""
    return pytest.approx(value, rel=OTHER_ORDER, abs=OTHER_ORDER)


def test_the_main_job_is_that_of_one_process(tmp_path: Path) -> None:
    """Loaded in rows, evaluated in turns, saved block by block, reloaded and checked; process 0 writes. Biases included."""
    model = save_random_model(tmp_path / "model", "qwen2")
    generation = {"bos_token_id": 256, "eos_token_id": [7, 9], "do_sample": True, "top_k": 3, "max_length": 77}
    (model / "generation_config.json").write_text(json.dumps(generation))
    options = ["--model", str(model), "--dtype", "float64", "--steps", "2"]
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    sources = {"calibration_data": text, "finetune_data": text, "eval_data": text, "loss": "kl", "nsamples": 4}
    sizes = {"rmi_samples": 4, "seqlen": 16, "train_examples": 12, "train_seqlen": 16, "eval_seqlen": 16}
    sizes |= {"eval_windows": 3, "eval_batch_size": 1}
    options += [word for name, value in {**sources, **sizes}.items() for word in (f"--{name}", str(value))]
    assert in_processes(2, main, [*options, "--output_dir", str(tmp_path / "two")]) == [0, 0]
    assert main([*options, "--output_dir", str(tmp_path / "one")]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    results = [json.loads((folder / "losa_result.json").read_text()) for folder in (one, two)]
    reloaded = [result["verification"].pop("reloaded") for result in results]
    assert reloaded == ["with transformers alone", "over 2 processes"]
    shares = [result["verification"].pop("sparsity_pruned_and_saved") for result in results]
    assert shares[1] == timeless(shares[0], lambda share: pytest.approx(share, abs=1e-6))
    assert timeless(results[1]) == timeless(results[0], near)
    steps = [json.loads((folder / "steps.json").read_text()) for folder in (one, two)]
    assert timeless(steps[1]) == timeless(steps[0], near)
    lines = [(folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in (one, two)]
    events = [[json.loads(line) for line in of_run] for of_run in lines]
    assert timeless(events[1]) == timeless(events[0], near)
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    models = [AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto") for folder in (one, two)]
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(weight == 0, other == 0), name
        torch.testing.assert_close(other, weight, rtol=0, atol=OTHER_ORDER)
    assert_same_files(one / "model", two / "model")


def assert_same_files(one: Path, several: Path) -> None:
    """All files of a saved model but its weights, which are one file or a file a block."""
    names = {file.name for file in one.iterdir()} - {"model.safetensors"}
    parts = {f"model-0000{k}-of-00004.safetensors" for k in range(1, 5)} | {"model.safetensors.index.json"}
    assert {file.name for file in several.iterdir()} == names | parts
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    for name in names - {"README.md"}:
        ours, theirs = ((folder / name).read_text(encoding="utf-8") for folder in (one, several))
        assert json.loads(ours) == json.loads(theirs), name
    index = json.loads((several / "model.safetensors.index.json").read_text())
    kept = [load_file(several / name) for name in sorted(parts) if name.endswith(".safetensors")]
    whole = load_file(one / "model.safetensors")
    assert {name for tensors in kept for name in tensors} == set(whole) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for file, name in ((file, name) for name, file in index["weight_map"].items()):
        assert name in load_file(several / file)
    cards = [(folder / "README.md").read_text(encoding="utf-8").splitlines() for folder in (one, several)]
    differing = [pair for pair in zip(*cards, strict=True) if pair[0] != pair[1]]
    assert all("Reloaded" in ours or " s |" in ours for ours, _ in differing), differing


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.own_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.own_device("auto") == distributed.own_device("cuda") == "cuda:1"
    assert distributed.own_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="device is 'cuda:0'; allowed with several processes: auto, cuda"):
        distributed.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 has no GPU: this machine has 2; start one process per GPU"):
        distributed.own_device("auto")


def test_fewer_sequences_than_processes_and_held_weights_are_refused() -> None:
    few = dataclasses.replace(settings(), calibration=CalibrationConfig(nsamples=7, seqlen=6, rmi_samples=2))
    with pytest.raises(RuntimeError, match="rmi_samples is 2; allowed: 4 or more with 4 processes"):
        in_processes(4, run, few)
    held = settings(hold_merged="on", layer_sparsity="uniform")
    with pytest.raises(
        RuntimeError, match="hold_merged is 'on', which several processes do not support; use auto or off"
    ):
        in_processes(2, run, held)


def test_the_plan_for_many_cards(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--model", str(save_random_model(tmp_path / "model", "llama-gqa"))]
    options += ["--calibration_data", "c4", "--finetune_data", "c4", "--eval_data", "c4"]
    assert main([*options, "--dry_run", "--devices", "8"]) == 0
    printed = capsys.readouterr().out
    assert "memory of each of 8 cards" in printed
    assert "received by each in an optimizer step" in printed
    assert main([*options, "--devices", "8"]) == 2
    assert capsys.readouterr().err == "error: devices is 8; add --dry_run, or start that many processes with torchrun\n"


def test_gram_matrices_are_of_all_sequences_in_their_order() -> None:
    features = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype, added_in in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        wide = features.to(dtype).double().flatten(1)
        expected = (wide @ wide.T).numpy()
        for ours in in_processes(4, gram, features.numpy(), dtype):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=expected.max() * 32 * UNIT[added_in])


@pytest.mark.parametrize("fatal", [2, 6, 10])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_on_any_number(fatal: int, tmp_path: Path) -> None:
    """Killed while pruning, while training, in the second step; one, two or four processes resume from the last checkpoint."""
    case = settings(prune_method="sparsegpt", rank_shrink="fold") if fatal == 10 else settings()
    # Both end by themselves; had one gone on waiting, the message would say that it is silent.
    with pytest.raises(RuntimeError, match=r"process \d: "):
        in_processes(2, run, case, None, tmp_path / "points", fatal)
    one = run(case)
    for count in (1, 4) if fatal == 6 else (2,):
        points = shutil.copytree(tmp_path / "points", tmp_path / f"points of {count}")
        for outcome in in_processes(count, run, case, None, points):
            assert_same(outcome, one)


def test_one_process_needs_no_group() -> None:
    values = torch.ones(3)
    assert distributed.processes() == 1
    assert distributed.is_main_process()
    assert distributed.all_reduce(values) is values
    assert distributed.broadcast(values) is values
    assert distributed.split_evenly([1, 2], lambda item: -item) == [1, 2]
    assert distributed.own_rows(5) == slice(0, 5)


@pytest.mark.parametrize(
    ("method", "epochs", "window", "rule"),
    [
        *(("wanda", 0, 1, "rmi"), ("sparsegpt", 0, 1, "rmi"), ("wanda", 2, 1, "owl"), ("wanda", 1, 2, "lamp")),
        *(("magnitude", 0, 1, "gradient"), ("magnitude", 0, 1, "atp"), ("pruner_zero", 0, 1, "uniform")),
    ],
)
def test_bytes_received_and_held_are_the_formulas(method: str, epochs: int, window: int, rule: str) -> None:
    """Exactly, apart from single numbers that are agreed on."""
    sizes = Sizes.of(Decoder(random_model("llama")), torch.float32)
    config = spread_config(method, epochs, window, rule)
    calibration = calibration_traffic(config, sizes, 2)
    first_step = dataclasses.replace(config, prune=dataclasses.replace(config.prune, steps=1))
    step = step_traffic(first_step, sizes, 2)
    fullest = 0
    for calibrating, stepping, held in in_processes(2, received, method, epochs, window, rule):
        assert stepping["_allgather_base_"] == step.weights
        assert stepping["allreduce_"] == step.gradients
        few = 1000
        # Gathered once more: the token by which FSDP2 learns what is outermost, in the model and in the dense one.
        assert calibrating["_allgather_base_"] == calibration.weights + 2 * sizes.weights(cards=2)
        assert 0 <= calibrating["broadcast_"] - calibration.pruned < few
        assert 0 <= calibrating["allreduce_"] - calibration.statistics - calibration.reconstruction < few
        assert calibrating.get("alltoall_base_", 0) == calibration.features
        fullest = max(fullest, held)
    # 257 rows of the vocabulary on two cards: the first holds one more.
    assert fullest == phases(config, sizes, Place("cpu", 2))["calibration"].weights


def test_the_peak_memory_is_foretold() -> None:
    """Of two processes, in an optimizer step and an evaluation, with small and large embeddings."""
    cases = [(300, 16), (9000, 16)]
    for (vocabulary, tokens), *found in zip(cases, *in_processes(2, all_peaks, cases), strict=True):
        sizes = Sizes.of(Decoder(peak_model(vocabulary)), torch.float32)
        foretold = phases(peak_config(tokens), sizes, Place("cpu", 2))
        training, evaluation = foretold["training"], foretold["evaluation"]
        # There is no optimizer.
        training_bytes = training.total - training.moments
        evaluation_bytes = evaluation.total - evaluation.moments - evaluation.gradients
        for phase, expected in (("training", training_bytes), ("evaluation", evaluation_bytes)):
            measured = max(peaks[phase] for peaks in found)
            assert 0.95 < expected / measured < 1.15, (
                f"{phase}, {vocabulary}, {tokens}: {expected:,} of {measured:,} bytes"
            )


def test_a_saved_model_that_lost_a_zero_is_caught(tmp_path: Path) -> None:
    ours = random_model("llama")
    adapted_linear.attach_adapters(Decoder(ours), 2.0)
    [name, layer] = next((n, m) for n, m in ours.named_modules() if isinstance(m, adapted_linear.AdaptedLinear))
    mask = torch.rand(layer.weight.shape) < 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
        assert pretrained.check_zeros(tmp_path, ours, {name: mask})[name][0] == float((~mask).double().mean())
        layer.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match=f"{name}: {int((~mask).sum())} pruned weights are not zero"):
        pretrained.check_zeros(tmp_path, ours, {name: mask})
