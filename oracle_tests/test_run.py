"""The command line: whole runs on tiny models, the folders they write, errors for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oracle_tests.small_runs import ROOT, arguments, fails
from tiny_models.random_models import save_random_model
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.rates import RULES
from torch_impl.engine.resume import run_checkpoints
from torch_impl.experiment import config, job
from torch_impl.experiment.material import check_text
from torch_impl.experiment.text.sources import SOURCES
from torch_impl.masks.prune import METHODS
from torch_impl.run import main


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prune_method": "sparsegpt", "sparsity_type": "mixed-2:4", "lr_schedule": "whole_run", "loss": "kl"},
        {"prune_method": "magnitude", "sparsity_ratio": "0.5", "finetune": "false", "steps": 1},
        {"dtype": "bfloat16", "rank_shrink": "fold"},
    ],
    ids=["plain", "sparsegpt mixed-2:4 kl", "magnitude one shot", "bfloat16"],
)
def test_a_run_leaves_a_whole_folder(place: Path, changes: dict, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments(place, **changes)) == 0
    printed = capsys.readouterr().out
    plain = changes.get("finetune") == "false"
    for row in ("dense", "pruned, uniform rates" if plain else "LoSA", "perplexity", "sparsity"):
        assert row in printed
    # A run that is one-shot pruning does it once.
    assert ("pruned at once" in printed) != plain
    out = place / "out"
    expected = {
        "model",
        "losa_config.toml",
        "environment.json",
        "metrics.jsonl",
        "steps.json",
        "losa_result.json",
        "report.html",
    }
    assert expected | {"sparsity.png", "perplexity.png"} <= {path.name for path in out.iterdir()}
    assert not list(place.glob(".*partial"))
    result = json.loads((out / "losa_result.json").read_text())
    steps = json.loads((out / "steps.json").read_text())
    events = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == changes.get("steps", 2)
    assert events.count("train") == sum(len(step["losses"]) for step in steps)
    assert events.count("perplexity") == 3 + len(steps) - plain
    assert (result["pruned_at_once"] == result["losa"]) == plain
    assert set(json.loads((out / "environment.json").read_text())) >= {"torch", "transformers", "model_sha256"}
    assert "sparsity_config" not in json.loads((out / "model" / "config.json").read_text())

    # The saved model, read again, has the reported zeros. Its perplexity: `test_a_pruned_model_can_be_pruned_further`.
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert model.dtype == pretrained.DTYPES[str(changes.get("dtype", "float32"))]
    zeros: dict[str, torch.Tensor] = {}
    for name, (pruned, saved) in result["verification"]["sparsity_pruned_and_saved"].items():
        zeros[name] = (model.get_submodule(name).weight == 0).double()
        assert float(zeros[name].mean()) == pytest.approx(saved, abs=1e-7)
        assert saved >= pruned
    share = float(torch.cat([part.flatten() for part in zeros.values()]).mean())
    assert result["losa"]["sparsity"] == pytest.approx(share, abs=1e-7)
    # No block more than its rate; where rows have 32 inputs, up to a 32nd less.
    assert result["target_sparsity"] - 1 / 32 < result["losa"]["sparsity"] <= result["target_sparsity"] + 1e-9
    assert result["losa"]["packed_bytes"] < result["losa"]["bytes"]


def test_the_same_seed_gives_the_same_file(place: Path) -> None:
    for name in ("a", "b"):
        assert main(arguments(place, output_dir=place / name)) == 0
    first, second = (load_file(place / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_pruned_model_can_be_pruned_further(place: Path) -> None:
    assert main(arguments(place, sparsity_ratio="0.5")) == 0
    assert main(arguments(place, model=place / "out" / "model", output_dir=place / "more")) == 0
    once, more = (json.loads((place / name / "losa_result.json").read_text()) for name in ("out", "more"))
    assert once["losa"]["perplexity"] == more["dense"]["perplexity"], "the saved model's perplexity is the one reported"
    assert once["losa"]["perplexity"] != once["dense"]["perplexity"]
    before, after = (load_file(place / name / "model" / "model.safetensors") for name in ("out", "more"))
    for name in before:
        if name.endswith("_proj.weight"):
            assert not ((after[name] != 0) & (before[name] == 0)).any(), name


def test_the_plan_is_shown_and_nothing_written(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*arguments(place), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for word in ("prunable weights", "MiB", "TFLOP", "mean rank", "optimizer steps"):
        assert word in printed
    assert not (place / "out").exists()


def test_a_plan_is_of_the_records_that_there_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "few.txt").write_text("word " * 60)
    few = arguments(place, finetune_data=place / "few.txt", train_examples=20, step_shares="0.5 0.5")
    found = check_text(config.parse(few))
    assert found is not None
    assert 2 < found < 20
    assert main([*few, "--dry_run"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fine-tuning")]
    assert line.split()[1:3] == [str(found), "×"]


def test_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_impl.run", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for word in ("--sparsity_type", "mixed-N:M", "paper: 5", "examples", "--config", *METHODS, *RULES, *SOURCES):
        assert word in done.stdout


def test_file_then_flags(place: Path) -> None:
    file = place / "some.toml"
    file.write_text("steps = 3\n[training]\nlearning_rate = 1e-3\nfinetune = false\n[text]\nstep_shares = [0.5, 0.5]\n")
    found = config.parse(["--config", str(file), "--model", "x", "--steps", "2"])
    assert (found.prune.steps, found.training.learning_rate, found.training.finetune) == (2, 1e-3, False)
    assert found.text.shares(2) == [0.5, 0.5]
    assert config.parse(["--model", "x"]).training.learning_rate == 2e-4
    assert config.parse([]).calibration.seqlen == 256, "the embedded model has its own defaults"


def test_rates_without_training(tmp_path: Path) -> None:
    """Rates by mutual information are part of LoSA: without training they are for those who ask, by flag, file or pattern."""
    file = tmp_path / "some.toml"
    file.write_text("steps = 2\n[prune]\nlayer_sparsity = 'rmi'\n")
    plain = ["--finetune", "false"]
    for words, expected in (
        ([], "rmi"),
        (plain, "uniform"),
        ([*plain, "--dry_run"], "uniform"),
        ([*plain, "--layer_sparsity", "rmi"], "rmi"),
        ([*plain, "--layer-sparsity=rmi"], "rmi"),
        ([*plain, "--config", str(file)], "rmi"),
        ([*plain, "--preset", "paper"], "uniform"),
        ([*plain, "--preset", "best"], "uniform"),
        (["--preset", "best"], "rmi"),
        (["--preset", "quick"], "uniform"),
        ([*plain, "--config", "llama_7b"], "uniform"),
        ([*plain, "--sparsity_type", "mixed-2:4"], "rmi"),
        ([*plain, "--sparsity_type", "2:4"], "uniform"),
    ):
        assert config.parse(["--model", "x", *words]).prune.layer_sparsity == expected, words


def test_a_configuration_for_some_model_asks_for_it() -> None:
    """`--config llama_7b` alone ran the embedded model with a 7B model's settings and text."""
    for words in (["--config", "llama_7b"], ["--config", "llama_13b", "--preset", "best"]):
        with pytest.raises(
            ValueError, match=r"the configuration names text and no model; add --model, the folder or hub"
        ):
            config.parse(words)


@pytest.mark.parametrize("name", ["llama_7b", "llama_13b", "llama_70b", "embedded"])
def test_ready_made_configurations_parse(name: str) -> None:
    found = config.parse(["--config", str(config.CONFIGS / f"{name}.toml"), "--model", "x"])
    assert sum(found.text.shares(found.prune.steps)) == pytest.approx(1)


BAD = [
    ({"model": "no/such/folder"}, ["no/such/folder", "give a Hugging Face model folder"]),
    ({"model": "/nowhere"}, ["/nowhere", "no such folder"]),
    ({"prune_method": "best"}, ["prune_method", "best", "magnitude, wanda, sparsegpt"]),
    ({"sparsity_ratio": "1.0"}, ["sparsity_ratio", "1.0", "allowed"]),
    ({"sparsity_ratio": "-0.1"}, ["sparsity_ratio", "-0.1", "allowed"]),
    ({"sparsity_ratio": "much"}, ["sparsity_ratio", "much"]),
    ({"sparsity_type": "4:2"}, ["sparsity_type", "4:2", "allowed"]),
    ({"sparsity_type": "2:4", "sparsity_ratio": "0.7"}, ["sparsity_ratio", "0.5"]),
    ({"sparsity_type": "3:7"}, ["sparsity_type", "multiple of 7"]),
    ({"steps": 0}, ["steps", "1 or more"]),
    ({"steps": 30}, ["steps", "max_rank"]),
    ({"seqlen": 100000}, ["100000", "token"]),
    ({"eval_seqlen": 100000}, ["100000", "token"]),
    ({"calibration_data": "nothing.txt"}, ["calibration_data", "nothing.txt", "does not exist"]),
    ({"device": "cuda:7"}, ["cuda:7", "allowed"]),
    ({"device": "abacus"}, ["abacus", "allowed"]),
    ({"dtype": "int8"}, ["int8", "allowed"]),
    ({"step_shares": "0.9 0.9"}, ["step_shares", "sum to 1"]),
    ({"learning_rate": "nan"}, ["learning_rate", "finite"]),
    ({"config": "missing.toml"}, ["missing.toml"]),
    ({"colour": "blue"}, ["--colour"]),
    ({"loss": "mse"}, ["loss", "ce, kl"]),
    ({"seed": -1}, ["seed", "0 or more"]),
    ({"offload": "maybe"}, ["offload", "maybe", "auto, on, off"]),
    ({"offload": "on"}, ["offload", "steps 2, finetune True; a model on disk", "use --steps 1 --finetune false"]),
    (
        {"offload": "on", "preset": "best"},
        [
            "steps 2, finetune True, written_per_sample 3; a model on disk is pruned in one shot, on given text: ",
            "use --steps 1 --finetune false --written_per_sample 0 and a larger --nsamples",
        ],
    ),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda v: " ".join(map(str, v)) if isinstance(v, dict) else "")
def test_bad_options(place: Path, changes: dict, words: list[str], capsys: pytest.CaptureFixture) -> None:
    fails(capsys, place, arguments(place, **changes), words)


def test_too_few_blocks(place: Path, capsys: pytest.CaptureFixture) -> None:
    save_random_model(place / "model", "llama", num_hidden_layers=2)
    fails(capsys, place, arguments(place), ["layer_sparsity", "3 or more decoder blocks", "the model has 2"])


def test_weights_with_nan(place: Path, capsys: pytest.CaptureFixture) -> None:
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    fails(capsys, place, arguments(place), ["model.layers.1.mlp.up_proj", "NaN"])


def test_a_hessian_that_will_not_factor(place: Path, capsys: pytest.CaptureFixture) -> None:
    """Norm weights of zero: every projection behind them sees nothing but zeros."""
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layers.1.input_layernorm.weight"):
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    words = ["block 1", "self_attn.q_proj", "6 calibration sequences", "damping 0.01, 0.1, 1"]
    fails(capsys, place, arguments(place, prune_method="sparsegpt"), words)


@pytest.mark.parametrize("text", ["steps = [", "stepz = 3", "[prune]\nstepz = 3", 'steps = "many"'])
def test_bad_toml(place: Path, text: str, capsys: pytest.CaptureFixture) -> None:
    (place / "bad.toml").write_text(text)
    word = "bad.toml" if "many" not in text else "many"
    fails(capsys, place, arguments(place, config=place / "bad.toml"), [word])


def test_output_folders_that_cannot_be(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").write_text("")
    fails(capsys, place, arguments(place, output_dir=place / "taken"), ["taken", "--overwrite"])
    fails(capsys, place, [*arguments(place, output_dir=place / "taken"), "--overwrite"], ["not the folder of a run"])
    (place / "file").write_text("")
    fails(capsys, place, arguments(place, output_dir=place / "file" / "out"), ["file/out", "cannot be written"])


def test_a_disk_that_fills_before_the_first_point_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for write in ("write_atomically", "save_tensors"):
        with monkeypatch.context() as patched:
            patched.setattr(run_checkpoints, write, full)
            fails(capsys, place, arguments(place), ["No space left on device"])


def test_a_model_that_lost_a_zero_is_caught(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    merge = job.fsdp.merge

    def broken(decoder: Decoder) -> dict[str, torch.Tensor]:
        masks = merge(decoder)
        name = next(iter(masks))
        with torch.no_grad():
            weight = decoder.model.get_submodule(name).weight
            weight[~masks[name]] = 1e-3
        return masks

    monkeypatch.setattr(job.fsdp, "merge", broken)
    assert main(arguments(place)) == 2
    assert "pruned weights are not zero" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_overwrite_replaces_a_run(place: Path) -> None:
    assert main(arguments(place)) == 0
    (place / "out" / "stale").write_text("")
    assert main([*arguments(place), "--overwrite"]) == 0
    assert not (place / "out" / "stale").exists()


def test_one_line_from_a_real_process(place: Path) -> None:
    command = [sys.executable, "-m", "torch_impl.run", *arguments(place, model=place / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: model ")
    assert "Traceback" not in done.stderr
