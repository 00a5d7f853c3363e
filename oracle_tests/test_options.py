"""Every option of every command with invalid values: one line that names the option, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from torch_impl.commands import compare, evaluate, generate, pack, plan, run
from torch_impl.experiment import config, identity, run_files
from torch_impl.experiment.comparison import cells
from torch_impl.experiment.planning import dry_run

NONSENSE = ("nan", "inf", "-inf", "-1", "0", "1000000000000", "1e300", "word")
# Values that are valid after all: nothing pruned, nothing learned, no bound on the gradients, any seed.
ACCEPTED: dict[str, set[str]] = {
    "sparsity_ratio": {"0"},
    "first_token_weight": {"0"},
    "learning_rate": {"0", "1e300"},
    "weight_decay": {"0", "1e300", "1000000000000"},
    "warmup_ratio": {"0"},
    "reconstruct_epochs": {"0"},
    "written_per_sample": {"0"},
    "max_grad_norm": {"0", "1e300", "1000000000000"},
    "seed": {"0", "1000000000000"},
    "temperature": {"0", "1000000000000", "1e300"},
}
ACCEPTED["learning_rate"] = ACCEPTED["reconstruct_learning_rate"] = ACCEPTED["weight_decay"]
DATA = ["--calibration_data", "c4", "--finetune_data", "c4", "--eval_data", "c4"]
FREE = {
    "help",
    "device",
    "model",
    "out",
    "prompt",
    "calibration_data",
    "finetune_data",
    "eval_data",
    "output_dir",
    "config",
    "json",
}


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options, each once."""
    seen: set[str] = set()
    for action in parser._actions:
        if action.dest not in seen | FREE:
            seen.add(action.dest)
            yield action


def numbers(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in actions(parser) if action.type in (int, float)]


def words(parser: argparse.ArgumentParser) -> list[str]:
    return [a.dest for a in actions(parser) if a.type not in (int, float) and not isinstance(a.const, bool)]


def refuses(main: Callable[..., int], arguments: list[str], named: str, capsys: pytest.CaptureFixture) -> None:
    """Status 2 and one line with the option's name."""
    check_refusal(main(arguments), *capsys.readouterr(), named)


def check_refusal(status: int, out: str, err: str, named: str) -> None:
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert named in err, err


class Work(BaseException):
    """The options were accepted."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is loaded or read; a comparison's folder is made elsewhere."""
    monkeypatch.chdir(tmp_path)

    def work(*_: Any, **__: Any) -> None:
        raise Work

    places = (
        (dry_run, "make_plan"), (run, "run_job"), (cells, "load_material"), (generate, "_load"), (pack, "windows_of"),
    )  # fmt: skip
    for module, name in places:
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(pack.pretrained, "load_tokenizer", lambda *_: None)


def accepts(main: Callable[..., int], name: str, values: Sequence[str], needed: list[str], capsys: Any) -> set[str]:
    """Which of the values are accepted; the others are refused as they should be."""
    accepted = set()
    for value in values:
        # An equals sign, since a dash looks like another option.
        arguments = [*needed, f"--{name}={value}"]
        status, said = main(arguments), capsys.readouterr()
        if "Work" in said.err:
            accepted.add(value)
        else:
            check_refusal(status, *said, name)
    return accepted


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", numbers(config._make_parser()))
def test_numbers_of_a_run(name: str, capsys: pytest.CaptureFixture) -> None:
    assert accepts(run.main, name, NONSENSE, ["--model", "x", *DATA, "--dry_run"], capsys) == ACCEPTED.get(name, set())
    assert not accepts(compare.main, name, ["word"], ["quick", "--model", "x", *DATA], capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", words(config._make_parser()))
def test_words_of_a_run(name: str, capsys: pytest.CaptureFixture) -> None:
    assert not accepts(run.main, name, ["word"], ["--model", "x", *DATA, "--steps", "1", "--finetune", "false"], capsys)


@pytest.mark.usefixtures("no_work")
def test_switches_of_a_run(capsys: pytest.CaptureFixture) -> None:
    switches = [a.dest for a in actions(config._make_parser()) if isinstance(a.const, bool)]
    assert len(switches) >= 6
    for name in switches:
        refuses(run.main, [f"--{name}", "word"], name, capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", [*numbers(generate._parser()), *words(generate._parser())])
def test_options_of_generate(name: str, capsys: pytest.CaptureFixture) -> None:
    values = NONSENSE if name in numbers(generate._parser()) else ("word",)
    assert accepts(generate.main, name, values, ["model", "--prompt", "x"], capsys) == ACCEPTED.get(name, set())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("name", "values", "accepted"),
    [
        ("learning_rates", NONSENSE, {"1000000000000", "1e300"}),
        ("seeds", (*NONSENSE, str(2**63)), {"0", "1000000000000"}),
        ("only", ("word", "recipe=word", "word=losa", "seed=7"), set()),
    ],
)
def test_options_of_compare(
    name: str, values: Sequence[str], accepted: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dry_run, "check", lambda config: None)
    assert accepts(compare.main, name, values, ["quick", "--model", "x", *DATA], capsys) == accepted


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", [*numbers(pack._parser()), *words(pack._parser())])
def test_options_of_pack(name: str, capsys: pytest.CaptureFixture) -> None:
    needed = ["model", "out", "--values", "mixed", "--calibration_data", "c4"]
    values = NONSENSE if name in numbers(pack._parser()) else ("word",)
    assert accepts(pack.main, name, values, needed, capsys) == ACCEPTED.get(name, set())


def test_a_device_that_is_none(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    refuses(run.main, ["--device", "word", "--output_dir", str(tmp_path / "out")], "device is 'word'", capsys)
    refuses(run.main, ["--device", "word", "--dry_run"], "device is 'word'", capsys)
    refuses(compare.main, ["quick", "--device", "word"], "device is 'word'", capsys)
    model = str(config.EMBEDDED_MODEL)
    refuses(generate.main, [model, "--prompt", "x", "--device", "word"], "device is 'word'", capsys)
    refuses(pack.main, [model, str(tmp_path / "out"), "--device", "word"], "device is 'word'", capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--sparsity_ratio 70", "sparsity_ratio is 70.0; allowed: 0 up to, not including, 1; did you mean 0.7?"),
        ("--sparsity_ratio 1", "sparsity_ratio is 1.0; allowed: 0 up to, not including, 1\n"),
        ("--nsamples 8 --rmi_samples 500", "rmi_samples is 500; allowed: up to nsamples 8"),
        ("--step_shares nan", "step_shares is [nan]; with steps 2, give 2 numbers above 0 that sum to 1"),
        ("--step_shares nan --steps 1", "step_shares is [nan]; with steps 1, give"),
        ("--step_shares 0.1 0.1 0.1 0.1 nan", "step_shares is"),
        ("--step_shares 0.5 0.5 0.5 0.5 -1", "step_shares is"),
        ("--devices 4", "devices is 4; add --dry_run"),
        ("--config no.toml", "config no.toml does not exist"),
    ],
)
def test_options_that_do_not_fit(words: str, named: str, capsys: pytest.CaptureFixture) -> None:
    refuses(run.main, words.split(), named, capsys)
    if not {"--devices", "--config", "--sparsity_ratio"} & set(words.split()):
        refuses(compare.main, ["quick", *words.split()], named, capsys)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "",
            "calibration_data, finetune_data and eval_data are not given; choose text that suits the model, for example "
            "--calibration_data c4 --finetune_data alpaca-gpt4 --eval_data wikitext2, or files (.txt",
        ),
        ("--calibration_data c4 --eval-data=c4", "finetune_data is not given; choose text"),
        ("--finetune false --eval_data c4", "calibration_data is not given; choose text"),
        ("--finetune false", "calibration_data and eval_data are not given; choose text"),
        ("--preset best", "calibration_data, finetune_data and eval_data are not given"),
    ],
)
def test_a_model_of_ones_own_needs_text_that_is_named(words: str, line: str, capsys: pytest.CaptureFixture) -> None:
    """Python's standard library, the default, suits the embedded model alone."""
    refuses(run.main, ["--model", "x", *words.split()], f"error: {line}", capsys)
    if words and "finetune false" not in words and "--preset" not in words:
        refuses(compare.main, ["quick", "--model", "x", *words.split()], f"error: {line}", capsys)


@pytest.mark.usefixtures("no_work")
def test_the_embedded_model_and_configurations_bring_their_text(capsys: pytest.CaptureFixture) -> None:
    stdlib = ["--calibration_data", "stdlib", "--finetune_data", "stdlib", "--eval_data", "stdlib"]
    for words in (
        [],
        ["--model", str(config.EMBEDDED_MODEL)],
        ["--model", "x", "--config", "llama_7b"],
        ["--model", "x", *stdlib],
    ):
        run.main([*words, "--dry_run"])
        assert "Work" in capsys.readouterr().err, words


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_names_of_dtypes(short: str, name: str, capsys: pytest.CaptureFixture) -> None:
    line = f"dtype is '{short}'; allowed: auto, float32, bfloat16, float16, float64; did you mean {name}?"
    refuses(run.main, ["--dtype", short, "--dry_run"], line, capsys)
    refuses(generate.main, ["x", "--prompt", "x", "--dtype", short], line, capsys)
    refuses(evaluate.main, ["x", "--dtype", short, "--text", "stdlib"], line, capsys)


def test_few_calibration_sequences_need_no_second_option() -> None:
    assert config.parse(["--model", "x"]).calibration.rmi_rows == 64
    assert config.parse(["--model", "x", "--nsamples", "8"]).calibration.rmi_rows == 8
    assert config.parse(["--model", "x", "--nsamples", "8", "--rmi_samples", "4"]).calibration.rmi_rows == 4


@pytest.mark.parametrize("name", ["llama_7b", "llama_13b", "llama_70b"])
def test_a_ready_made_configuration_takes_another_number_of_steps(name: str) -> None:
    arguments = ["--config", str(config.CONFIGS / f"{name}.toml"), "--model", "x"]
    for steps in (1, 2, 3, 7):
        found = config.parse([*arguments, "--steps", str(steps)])
        assert found.text.shares(steps) == pytest.approx([1 / steps] * steps)
    assert config.parse([*arguments, "--steps=2", "--step-shares", "0.3", "0.7"]).text.shares(2) == [0.3, 0.7]


def test_unequal_shares_of_a_file_fit_its_own_steps_alone(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("steps = 2\nstep_shares = [0.25, 0.75]\n")
    arguments = ["--config", str(file), "--model", "x"]
    assert config.parse([*arguments, "--steps", "2"]).text.shares(2) == [0.25, 0.75]
    assert config.parse([*arguments, "--steps", "1"]).text.shares(1) == [1.0]
    with pytest.raises(ValueError, match=r"step_shares is \[0.25, 0.75\]; with steps 3, give"):
        config.parse([*arguments, "--steps", "3"])
    file.write_text("stepz = 2\n")
    with pytest.raises(ValueError, match=r"'stepz' is not an option; did you mean steps\?"):
        config.parse(arguments)


@pytest.mark.parametrize("name", config.PRESETS)
def test_presets_are_recipes_that_flags_win_over(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each by what it is, also on the embedded model, whose own settings it wins over. So it does over a configuration file, and
    says what it replaces there; a preset that the file names is overridden by the file."""
    recipe = {
        "paper": ("ce", "per_step", "error", 5, True, 0),
        "best": ("kl", "whole_run", "uniform", 5, True, 2),
        "quick": ("kl", "whole_run", "error", 1, False, 32),
    }[name]

    def of(found: config.Config) -> tuple[object, ...]:
        training = found.training
        return (
            training.loss,
            training.lr_schedule,
            found.adapter.rank_allocation,
            found.prune.steps,
            training.finetune,
            found.reconstruction.reconstruct_epochs,
        )

    assert of(config.parse(["--preset", name])) == recipe
    file = tmp_path / "file.toml"
    file.write_text("reconstruct_epochs = 3\n")
    assert of(config.parse(["--preset", name, "--config", str(file)])) == recipe
    [said] = [record.getMessage() for record in caplog.records]
    assert f"preset {name} overrides the configuration file: reconstruct_epochs {recipe[-1]} (file: 3); flags" in said
    assert of(config.parse(["--preset", name, "--config", str(file), "--reconstruct_epochs", "5"]))[-1] == 5
    file.write_text(f'preset = "{name}"\nreconstruct_epochs = 3\n')
    assert of(config.parse(["--config", str(file)])) == (*recipe[:-1], 3)
    assert of(config.parse(["--config", str(file), "--preset", "paper"])) == ("ce", "per_step", "error", 5, True, 0)
    other = config.parse(["--preset", name, "--model", "somewhere"])
    assert other.calibration.nsamples == 128
    assert of(other)[3:] == recipe[3:]


@pytest.mark.parametrize("name", config.PRESETS)
def test_a_preset_is_the_same_recipe_beside_any_configuration(name: str, tmp_path: Path) -> None:
    """`--config llama_7b --preset quick` pruned in five steps; beside the options of a whole run a preset did nothing."""
    plain = config.parse(["--model", "x", "--preset", name])
    recipes = {key for other in config.PRESETS for key in config.preset_options(other)}
    ranks = {"initial_rank", "rank_allocation", "rank_shrink", "lr_schedule", "loss", "reconstruct_learning_rate"}
    compared = recipes - (ranks if name == "quick" else {"reconstruct_learning_rate"} if name == "paper" else set())
    files = ["llama_7b"]
    for other in config.PRESETS:
        run = config.parse(["--model", "x", "--preset", other, "--reconstruct_batch_size", "4"])
        files.append(str(tmp_path / f"{other}.toml"))
        Path(files[-1]).write_text(run_files.as_toml(run))
    for file in files:
        found = config.parse(["--config", file, "--model", "x", "--preset", name])
        before, now = identity.options(plain), identity.options(found)
        assert {key: now[key] for key in compared} == {key: before[key] for key in compared}, file
        assert sum(found.text.shares(found.prune.steps)) == pytest.approx(1)
    assert found.reconstruction.reconstruct_batch_size == 4, "what no preset names is the file's"
    steps = config.parse(["--config", "llama_7b", "--model", "x", "--preset", name, "--steps", "3"])
    assert steps.text.step_shares == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "name", ["plain", 'quo"te', "back\\slash", "über", "\N{GRINNING FACE}", "new\nline", "tab\t", "del\x7f"]
)
def test_a_run_s_configuration_is_read_back_whatever_its_paths(name: str, tmp_path: Path) -> None:
    """An emoji in a path was written as JSON has it, which TOML does not read."""
    run = config.parse(["--model", "x", "--calibration_data", name])
    file = tmp_path / "file.toml"
    file.write_bytes(run_files.as_toml(run).encode())
    assert config.parse(["--config", str(file)]).text.calibration_data == name


def test_flags_of_reconstruction_without_it_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """`--reconstruct_window 3` alone did nothing without a word. Files have all options."""
    words = ["--model", "x", *DATA, "--reconstruct_window", "3", "--reconstruct-learning-rate=1e-3"]
    for more in (["--reconstruct_epochs", "1"], ["--preset", "quick"]):
        config.warn_of_idle(config.parse([*words, *more]), [*words, *more])
    assert not caplog.records
    words += ["--preset", "paper"]
    config.warn_of_idle(config.parse(words), words)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("reconstruct_learning_rate, reconstruct_window: no effect without reconstruction")
    for command in (run, plan):
        caplog.clear()
        command.main(["--dry_run", "--preset", "paper", "--reconstruct_window", "3"][command is plan :])
        assert "reconstruct_window: no effect" in caplog.text


def test_rates_of_a_file_are_not_asked_for_if_a_preset_replaces_them(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text('layer_sparsity = "owl"\n')
    words = ["--model", "x", "--config", str(file), "--finetune", "false"]
    assert config.parse(words).prune.layer_sparsity == "owl"
    assert config.parse([*words, "--preset", "paper"]).prune.layer_sparsity == "uniform"
