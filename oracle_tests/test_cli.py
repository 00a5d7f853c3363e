"""The one command: what it lists, what it starts, what it says to a word that it does not know."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import torch_impl
from oracle_tests.small_runs import arguments, make_place
from tiny_models.random_models import save_random_model
from torch_impl import cli
from torch_impl.commands import evaluate, generate, pack, plan, run, serve
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume import run_folder
from torch_impl.experiment import config, progress

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("cli"))


def test_help_is_one_screen_and_needs_no_torch() -> None:
    """Also: the version, and what an unknown command may have meant."""
    program = (
        "import sys; from torch_impl import cli; codes = [cli.main(['--help']), cli.main(['--version']), cli.main(['plam'])]; "
        "heavy = {'torch', 'transformers', 'numpy', 'argparse'} & set(sys.modules); print(codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert lines[-2:] == [f"losa {torch_impl.__version__}", "[0, 0, 2] set()"]
    assert len(lines) - 2 <= 30
    assert max(map(len, lines)) <= 120
    for name in cli.COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in lines)
    assert done.stderr == "error: plam is not a command of losa; did you mean plan?; see losa --help\n"


def test_no_word_is_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out == cli.HELP


def test_the_console_script() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"losa": "torch_impl.cli:main"}


@pytest.mark.parametrize(
    ("name", "module"),
    [("run", run), ("plan", plan), ("pack", pack), ("generate", generate), ("eval", evaluate), ("serve", serve)],
)
def test_a_command_gets_its_words(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "main", lambda words: seen.append(words) or 7)
    assert cli.main([name, "--seed", "3"]) == 7
    assert seen == [["--seed", "3"]]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: losa {name}" in capsys.readouterr().out


def shown(name: str, capsys: pytest.CaptureFixture, everything: str = "--help") -> list[str]:
    """Options that the help of a command lists."""
    with pytest.raises(SystemExit):
        cli.main([name, everything])
    return re.findall(r"^ {2,4}(?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)


FROZEN = dict(line.split(": ") for line in (ROOT / "oracle_tests/data/command_line.txt").read_text().splitlines())


@pytest.mark.parametrize("name", FROZEN)
def test_no_command_or_option_is_lost(name: str, capsys: pytest.CaptureFixture) -> None:
    """command_line.txt lists what users rely on. A new option joins it with the release that brings it; none ever leaves."""
    found = shown(name, capsys, "--help-all" if name in ("run", "plan") else "--help")
    assert not set(FROZEN[name].split()) - set(found), "scripts and configurations of users would break"
    assert len(found) == len(set(found)), "each once"


def test_the_frozen_commands() -> None:
    assert set(FROZEN) <= set(cli.COMMANDS)
    assert len(FROZEN) >= 7


def test_help_in_groups(capsys: pytest.CaptureFixture) -> None:
    """The sections of a TOML file, every option once with its default, the rare ones on request."""
    usual, everything = shown("run", capsys), shown("run", capsys, "--help-all")
    assert [name for name in everything if name not in usual] == [
        f"--{item.name}" for section in config.SECTIONS.values() for item in fields(section) if item.name in config.RARE
    ]
    with pytest.raises(SystemExit):
        cli.main(["run", "--help-all"])
    text = capsys.readouterr().out
    assert [name for name in re.findall(r"^(\w+):$", text, re.MULTILINE) if name != "options"] == list(config.SECTIONS)
    for name, section in config.SECTIONS.items():
        assert f"\n{name}:\n  {section.__doc__}\n" in text
        for item in fields(section):
            [entry] = re.findall(rf"^  --{item.name} .*(?:\n {{5,}}.*)*", text, re.MULTILINE)
            if item.default is not None and "default" not in item.metadata["help"]:
                default = str(item.default).lower() if isinstance(item.default, bool) else str(item.default)
                assert f"(default {default})" in " ".join(entry.split()), item.name
    assert "--finetune [true|false]" in text
    assert "--no_" not in text
    assert "--nsamples N" in text
    assert "--learning_rate X" in text


def test_shipped_configurations_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama_70b", "llama_70b.toml", str(config.CONFIGS / "llama_70b.toml")):
        assert config.parse(["--config", name, "--model", "x"]).training.gradient_checkpointing
    Path("llama_70b").write_text("seed = 5\n")
    found = config.parse(["--config", "llama_70b", "--model", "x"])
    assert (found.output.seed, found.training.gradient_checkpointing) == (5, False), "a file of that name comes first"
    with pytest.raises(FileNotFoundError, match=r"one of llama_13b, llama_70b, llama_7b; did you mean llama_7b"):
        config.parse(["--config", "lama_7b", "--model", "x"])


def test_an_option_is_named_once(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "--train-examples", "word"]) == 2
    assert capsys.readouterr().err == "error: argument --train_examples: invalid int value: 'word'; see --help\n"


def test_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fly", SimpleNamespace(module="torch_impl.commands.fly"))
    assert cli.main(["fly"]) == 2
    assert capsys.readouterr().err == "error: this version has no losa fly\n"


def test_a_command_interrupted_while_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """That takes some seconds."""

    def interrupted(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["pack"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_perplexity_of_a_plain_and_a_packed_model(place: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--text", str(place / "text.txt"), "--seqlen", "32", "--windows", "3", "--device", "cpu"]
    assert cli.main(["pack", str(place / "model"), str(place / "packed"), "--device", "cpu"]) == 0
    found = []
    for model in ("model", "packed"):
        capsys.readouterr()
        assert cli.main(["eval", str(place / model), *options, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-5)
    assert math.isfinite(found[0]["perplexity"])
    assert [found[0][name] for name in ("windows", "seqlen", "tokens")] == [3, 32, 96]
    assert cli.main(["eval", str(place / "model"), *options]) == 0
    assert f"model: perplexity {found[0]['perplexity']:.4f} on 3 windows of 32 tokens of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--seqlen", "1"], "seqlen is 1; allowed"),
        (["--windows", "0"], "windows is 0; allowed"),
        (["--batch_size", "0"], "batch_size is 0; allowed"),
        (["--dtype", "half"], "dtype is 'half'; allowed: auto"),
        (["--text", "wikitext"], "text is 'wikitext'; allowed: stdlib"),
        (["--text", "stdlib", "--seqlen", "4096", "--windows", "1"], "seqlen is 4096; this model has 128 positions"),
    ],
)
def test_bad_options_of_eval(tmp_path: Path, changes: list[str], line: str, capsys: pytest.CaptureFixture) -> None:
    save_random_model(tmp_path / "model", "opt")
    assert cli.main(["eval", str(tmp_path / "model"), "--device", "cpu", *changes]) == 2
    assert line in capsys.readouterr().err


def test_plan_writes_nothing(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", *arguments(place, output_dir=place / "planned")]) == 0
    assert "prunable weights" in capsys.readouterr().out
    assert not (place / "planned").exists()


REFUSED = {
    "a dtype": ({"dtype": "bf16"}, "did you mean bfloat16?"),
    "no such text": ({"eval_data": "nothing.txt"}, "eval_data is 'nothing.txt', which does not exist"),
    "a text without text": ({"finetune_data": "PLACE/empty.txt"}, "which holds no text"),
    "a text too short": ({"eval_seqlen": 9999}, "eval_seqlen is 9999, but the held-out part of eval_data "),
    "a pattern": ({"sparsity_type": "1:3"}, "sparsity_type '1:3' needs a multiple of 3 inputs"),
    "too few examples": ({"train_examples": 1}, "1 training examples are too few"),
    "a folder that exists": ({"output_dir": "PLACE/full"}, "full exists; use another folder or --overwrite"),
    "a folder of others": ({"output_dir": "PLACE/full", "overwrite": "true"}, "is not the folder of a run"),
    "the model's folder": ({"output_dir": "PLACE", "overwrite": "true"}, "contains model"),
    "a folder in a file": ({"output_dir": "PLACE/text.txt/out"}, "cannot be written: Not a directory"),
    "a packed model": ({"model": "PLACE/small"}, "is packed; unpack it first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_what_the_run_refuses(name: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "empty.txt").write_text(" ")
    (place / "full").mkdir(exist_ok=True)
    (place / "full" / "file").write_text("of somebody")
    if not (place / "small").exists():
        assert cli.main(["pack", str(place / "model"), str(place / "small"), "--device", "cpu"]) == 0
    changes, line = REFUSED[name]
    options = arguments(place, **{key: str(value).replace("PLACE", str(place)) for key, value in changes.items()})
    before = sorted(place.iterdir())
    lines = []
    for command in ("plan", "run"):
        capsys.readouterr()
        assert cli.main([command, *options]) == 2
        lines += [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert line in lines[0]
    assert sorted(place.iterdir()) == before


def test_plan_refuses_an_unfinished_run(place: Path, capsys: pytest.CaptureFixture) -> None:
    out = place / "begun"
    checkpoints = place / ".begun.partial" / run_folder.CHECKPOINTS
    checkpoints.mkdir(parents=True)
    (checkpoints / "000001.json").write_text("{}")
    assert cli.main(["plan", *arguments(place, output_dir=out)]) == 2
    assert "has an unfinished run in" in capsys.readouterr().err
    assert cli.main(["plan", *arguments(place, output_dir=out), "--resume"]) == 0


def test_without_a_terminal_a_line_a_step(place: Path) -> None:
    """Standard error of a real process: no carriage return, perplexity and time left after each step."""
    command = [sys.executable, "-m", "torch_impl.cli", "run", *arguments(place, output_dir=place / "lines")]
    done = subprocess.run(command, capture_output=True, timeout=240, cwd=ROOT)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    assert b"\r" not in done.stderr
    steps = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    assert re.fullmatch(r"step 1 of 2: sparsity 0\.\d{3}, perplexity \d+\.\d\d, about \d+:\d\d left", steps[0])
    assert re.fullmatch(r"step 2 of 2: sparsity 0\.\d{3}, perplexity \d+\.\d\d, saving and verifying", steps[1])


def test_time_left_counts_the_shares_of_training() -> None:
    """Step 1 of 3 took 10 s and 20 s of training on a tenth; the others train on two and seven tenths."""
    record = StepRecord(1, 0.5, [], [], [0.25, 0.75], [], [], [], {"prune": 7.0, "errors": 3.0, "train": 20.0})
    line = progress.step_line(record, 12.345, [0.1, 0.2, 0.7])
    assert line == "step 1 of 3: sparsity 0.500, perplexity 12.35, about 3:20 left"
    record.step = 3
    assert progress.step_line(record, 9.0, [0.1, 0.2, 0.7]).endswith("perplexity 9.00, saving and verifying")
    assert [progress.clock(seconds) for seconds in (0.2, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
