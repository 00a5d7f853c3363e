"""Where a run's folder may be: links, empty folders, impossible names and places; what remains when writing fails."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

from oracle_tests.small_runs import WORDS, arguments, fails
from torch_impl.engine import distributed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.resume import run_checkpoints
from torch_impl.engine.resume import run_folder as folder
from torch_impl.engine.resume.run_folder import run_folder
from torch_impl.experiment import config
from torch_impl.run import main

PLAIN: dict[str, object] = {"steps": 1, "finetune": "false", "offload": "off"}


def fill(target: Path, **options: Any) -> None:
    with run_folder(target, options.pop("overwrite", False), **options) as partial:
        (partial / "losa_result.json").write_text("{}")


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# --- places ---


@pytest.mark.parametrize("there", [True, False], ids=["empty folder", "dangling"])
def test_a_symbolic_link_stands_for_what_it_points_to(there: bool, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "out").mkdir()
    (tmp_path / "link").symlink_to(disk / "out")
    fill(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(disk) == {"out"}
    assert names(disk / "out") == {"losa_result.json"}
    with pytest.raises(ValueError, match=r"link exists; use another folder or --overwrite"):
        fill(tmp_path / "link")
    (disk / "out" / "old").write_text("")
    fill(tmp_path / "link", overwrite=True)
    assert names(disk / "out") == {"losa_result.json"}
    assert names(tmp_path) == {"disk", "link"}


@pytest.mark.parametrize("check", [folder.check_folder, lambda *given: run_folder(*given).__enter__()])
def test_resuming_without_a_run_says_so_and_what_is_there(
    check: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistyped folder began a run of hours with a line that named no other, and a plan said nothing."""
    for name in ("seed-1", "seed-2"):
        run_checkpoints.RunCheckpoints(tmp_path / f".{name}.partial" / folder.CHECKPOINTS).commit({})
    (tmp_path / ".other.partial" / folder.CHECKPOINTS).mkdir(parents=True)
    check(tmp_path / "sed-1", False, True)
    check(tmp_path / "seed-1", False, True)
    check(tmp_path / "elsewhere" / "new", False, True)
    check(tmp_path / "plain", False, False)
    beginning = "has no unfinished run to resume: starting from the beginning"
    assert [record.getMessage() for record in caplog.records] == [
        f"output_dir {tmp_path / 'sed-1'} {beginning}; unfinished in the same place: seed-1, seed-2",
        f"output_dir {tmp_path / 'elsewhere' / 'new'} {beginning}",
    ]


def test_a_run_behind_a_link_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")

    def stop(partial: Path) -> None:
        run_checkpoints.RunCheckpoints(partial / folder.CHECKPOINTS).commit({})
        raise KeyError

    with pytest.raises(KeyError) as caught, run_folder(tmp_path / "link", False) as partial:
        stop(partial)
    assert any("--resume" in note for note in caught.value.__notes__)
    with run_folder(tmp_path / "disk" / "out", False, resume=True) as partial:
        assert run_checkpoints.has_checkpoints(partial / folder.CHECKPOINTS)
    assert names(tmp_path / "disk") == {"out"}


@pytest.mark.parametrize(("resume", "kept"), [(False, set()), (True, {folder.CHECKPOINTS, "metrics.jsonl"})])
def test_overwriting_starts_over_unless_the_run_is_resumed(resume: bool, kept: set[str], tmp_path: Path) -> None:
    """Nothing of the discarded run is left to be resumed, or to be published beside the new one."""
    partial = tmp_path / ".out.partial"
    run_checkpoints.RunCheckpoints(partial / folder.CHECKPOINTS).commit({})
    (partial / "metrics.jsonl").write_text("{}")
    with run_folder(tmp_path / "out", True, resume) as found:
        assert names(found) - {folder.LOCK} == kept


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_can_be_used_and_stays_if_nothing_comes_of_it(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(KeyError), run_folder(target, overwrite):
        raise KeyError
    assert names(tmp_path) == {"out"}
    assert not names(target)
    fill(target, overwrite=overwrite)
    assert names(target) == {"losa_result.json"}


def test_the_current_folder_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(Path("."))
    assert names(tmp_path / "here") == {"losa_result.json"}


def test_places_that_cannot_be_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"output_dir .*a is a symbolic link to itself"):
        fill(tmp_path / "a")
    with pytest.raises(ValueError, match=r"not a valid UTF-8 name; use another folder"):
        fill(tmp_path / os.fsdecode(b"caf\xe9"))
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(ValueError, match=r"disk is a mount point, which cannot be replaced; use a folder inside it"):
        fill(tmp_path / "disk")
    fill(tmp_path / "disk" / "out")
    assert names(tmp_path) == {"a", "b", "disk"}


def test_overwriting_never_removes_the_model_that_is_read(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "run").mkdir()
    (place / "run" / "losa_result.json").write_text("{}")
    (place / "model").rename(place / "run" / "model")
    options = arguments(place, model=place / "run" / "model", output_dir=place / "run", **PLAIN)
    fails(capsys, place, [*options, "--overwrite"], ["output_dir", "contains model", "another folder"])
    assert (place / "run" / "model" / "config.json").is_file()


# --- writing that fails ---


def test_a_disk_full_in_the_writer_of_tensors_is_one_line(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real writer, not allowed as many bytes as the model has. What is done is kept, and can be gone on with."""
    save, limits = pretrained.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*given: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        try:
            save(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(pretrained, "save", limited)
    assert main(arguments(place, **PLAIN)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "File too large" in line
    assert "--resume" in line
    assert not (place / "out").exists()
    monkeypatch.setattr(pretrained, "save", save)
    assert main(arguments(place, resume="true", **PLAIN)) == 0


def test_packing_on_a_full_disk_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_impl.commands import pack

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "serialize_file", full)
    assert pack.main([str(place / "model"), str(place / "packed")]) == 2
    line = capsys.readouterr().err
    assert "packed-00001-of-00001.safetensors: Error while serializing: I/O error: No space left on device" in line
    assert names(place) == {"model", "text.txt"}


# --- names and terminals ---


def test_names_that_no_terminal_and_no_page_can_hold(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text file whose name is not UTF-8, an output folder beyond ASCII, a terminal of ASCII alone."""
    text = place / os.fsdecode(b"caf\xe9.txt")
    text.write_text(WORDS * 40)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(arguments(place, eval_data=text, output_dir=place / "αusgabe", **PLAIN)) == 0
    assert b"caf\\udce9.txt" in raw.getvalue()
    assert b"\\u03b1usgabe" in raw.getvalue()
    out = place / "αusgabe"
    assert "caf\\udce9.txt" in (out / "report.html").read_text()
    assert "caf\\udce9.txt" in (out / "model" / "README.md").read_text()
    assert json.loads((out / "losa_result.json").read_text())["evaluation"]["source"] == str(text)


@pytest.mark.parametrize(
    ("name", "value", "line"), [("RANK", "1", ""), ("WORLD_SIZE", "two", "WORLD_SIZE in the environment is 'two'")]
)
def test_leftovers_of_a_launcher_in_the_environment(
    name: str, value: str, line: str, place: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number without a count means nothing: the table is printed; a count that is none is named."""
    monkeypatch.setenv(name, value)
    if line:
        fails(capsys, place, arguments(place, **PLAIN), [line, "unset it"])
        return
    assert main(arguments(place, **PLAIN)) == 0
    assert "perplexity" in capsys.readouterr().out


def test_an_empty_count_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert distributed.launched() == 1


def test_a_byte_order_mark_in_a_configuration(place: Path) -> None:
    file = place / "some.toml"
    file.write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert config.parse(["--config", str(file), "--model", "x"]).prune.steps == 3
