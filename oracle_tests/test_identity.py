"""An unfinished run is resumed only with the same options, model and texts; the message names what has changed."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from oracle_tests.small_runs import WORDS, arguments, events, make_place
from tiny_models.random_models import random_model
from torch_impl.experiment import identity
from torch_impl.experiment.config import SECTIONS, Config
from torch_impl.experiment.material import Material, environment_of
from torch_impl.experiment.sections import CHANGEABLE
from torch_impl.run import main

TEXTS = {"calibration_data": "calibration", "finetune_data": "fine-tuning", "eval_data": "evaluation"}


def options(place: Path, **changes: object) -> list[str]:
    """Options of a small run with a separate text for every purpose."""
    texts = {name: place / f"{name}.txt" for name in TEXTS}
    return arguments(place, **{**texts, "train_examples": 8, "steps": 1, "prune_method": "magnitude", **changes})


@pytest.fixture
def stopped(tmp_path: Path, at_clip: Callable, ctrl_c: None) -> Path:
    """A place with a run that was stopped while training."""
    place = make_place(tmp_path)
    for number, name in enumerate(TEXTS):
        # Twice as long as the part that is read, so that the rest may change.
        (place / f"{name}.txt").write_text("\n<|endoftext|>\n".join(f"{number} {k} {WORDS * 3}" for k in range(20)))
    at_clip(1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert main(options(place)) == 128 + signal.SIGTERM
    at_clip(0, lambda _: None)
    return place


def test_another_model_text_or_seed_is_refused_and_named(stopped: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(words: str, **changes: object) -> None:
        capsys.readouterr()
        assert main(options(stopped, resume="true", **changes)) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("since the run began") + said.count(", the run began with") == 1, said

    for name, kind in TEXTS.items():
        file = stopped / f"{name}.txt"
        before = file.read_bytes()
        file.write_text(before.decode().replace("fox", "cat"))
        refused(f"the {kind} text ({name}) has changed since the run began: ")
        file.write_bytes(before)
        other = stopped / "other.txt"
        other.write_bytes(before)
        refused(f"{name} is {str(other)!r}, the run began with {str(file)!r}", **{name: other})
    file = stopped / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused("the model (its weights) has changed since the run began: model_sha256 is ")
    tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] -= 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused("seed is 1, the run began with 0", seed=1)
    refused("loss is 'kl', the run began with 'ce'", loss="kl")


def test_what_may_change_is_accepted_if_named_and_only_then(stopped: Path, capsys: pytest.CaptureFixture) -> None:
    changed = {"learning_rate": 5e-3, "max_grad_norm": 0.1, "reconstruct_learning_rate": 1e-3, "weight_decay": 0.5}
    assert tuple(sorted(changed)) == tuple(sorted(CHANGEABLE))
    assert (
        main(
            options(
                stopped, resume="true", accept_changes="learning_rate reconstruct_learning_rate weight_decay", **changed
            )
        )
        == 2
    )
    said = capsys.readouterr().err
    assert "max_grad_norm is 0.1, the run began with 0.3; resume with the original options" in said
    assert "learning_rate is" not in said
    assert main(options(stopped, resume="true", accept_changes=" ".join(changed), save_every=7, **changed)) == 0
    assert max(event["learning_rate"] for event in events(stopped) if event["event"] == "train") == 5e-3


def test_every_option_counts_but_those_that_say_where_and_how_often_to_write() -> None:
    every = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)}
    before = identity.options(Config())
    assert every - set(before) == {
        "output_dir", "overwrite", "dry_run", "plan_for", "config", "preset", "resume", "accept_changes", "save_every",
        "keep_points", "report_to",
    }  # fmt: skip
    identity.check_options(before, dict(before), ())
    for name in before:
        with pytest.raises(ValueError, match=re.escape(f"{name} is 'another', the run began with {before[name]!r}; ")):
            identity.check_options(before, {**before, name: "another"}, ())
        identity.check_options(before, {**before, name: "another"}, [name])


def test_an_option_that_an_older_version_did_not_know_had_its_default() -> None:
    now = identity.options(Config())
    for name in now:
        before = {other: value for other, value in now.items() if other != name}
        identity.check_options(before, now, ())
        with pytest.raises(ValueError, match=re.escape(f"{name} is 'another', the run began with {now[name]!r}; ")):
            identity.check_options(before, {**now, name: "another"}, ())
    with pytest.raises(ValueError, match="the run began with gone = 1, which this version does not know"):
        identity.check_options({**now, "gone": 1}, now, ["gone"])


def test_other_versions_are_said_and_other_contents_refused(caplog: pytest.LogCaptureFixture) -> None:
    before = {name: name for name in (*identity.VERSIONS, *identity.CONTENTS)}
    identity.check_material(before, dict(before))
    assert not caplog.text
    identity.check_material(before, {**before, "torch": "9.9"})
    assert "torch is 9.9, the run began with torch: results may differ" in caplog.text
    assert len(caplog.records) == 1
    for name, what in identity.CONTENTS.items():
        with pytest.raises(ValueError, match="since the run began") as caught:
            identity.check_material(before, {**before, name: "x" * 64})
        assert str(caught.value) == (
            f"{what} has changed since the run began: {name} is {'x' * 12}, not {name[:12]}; "
            "restore the original, or start over with --overwrite"
        )


def material(rows: list[list[int]], labels: list[list[int]]) -> dict[str, object]:
    """The record of a run's material with such examples."""
    examples = [{"input_ids": torch.tensor(x), "labels": torch.tensor(y)} for x, y in zip(rows, labels, strict=True)]
    some, tokenizer = torch.arange(4).view(2, 2), PreTrainedTokenizerFast
    found = Material(random_model("llama"), tokenizer, some, examples, some + 1, {})  # type: ignore[arg-type]
    # The model was never saved, so it has no files.
    with mock.patch("torch_impl.engine.checkpoints.pretrained.weights_hash", return_value=""):
        return environment_of(Config(), found)


def test_what_is_learned_and_where_sequences_end_is_part_of_a_fine_tuning_text() -> None:
    base = material([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    hashes = {
        str(material(rows, labels)["finetune_tokens_sha256"])
        for rows, labels in (
            ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
            ([[1, 2], [3, 5]], [[1, 2], [3, 4]]),
            ([[1, 2], [3, 4]], [[1, 2], [-100, 4]]),
            ([[1, 2, 3], [4]], [[1, 2, 3], [4]]),
            ([[3, 4], [1, 2]], [[3, 4], [1, 2]]),
        )
    }
    assert len(hashes) == 5
    assert base["finetune_tokens_sha256"] in hashes
    assert base["calibration_tokens_sha256"] != base["evaluation_tokens_sha256"]
    assert material([], [])["finetune_tokens_sha256"] not in hashes
