"""Checkpoints of a run on disk: what is written in which order, what is removed when, and the effect of corruption."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oracle_tests.interruptions import cut, flip
from torch_impl.engine.files import UNFINISHED, write_atomically
from torch_impl.engine.resume.run_checkpoints import RunCheckpoints
from torch_impl.engine.resume.run_folder import CHECKPOINTS, run_folder


def some(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((3,), value)}


def test_a_point_gives_back_what_was_put(tmp_path: Path) -> None:
    first = RunCheckpoints(tmp_path)
    first.put("a", some(1))
    first.put_bytes("notes.txt", b"some")
    first.commit({"n": 0.1})
    again = RunCheckpoints(tmp_path)
    assert again.open_last() == {"n": 0.1}
    assert torch.equal(again.get("a")["x"], some(1)["x"])
    assert again.get_bytes("notes.txt") == b"some"
    assert "a" in again
    assert "b" not in again
    assert RunCheckpoints(tmp_path / "empty").open_last() is None


def test_what_has_not_changed_has_two_files_that_take_turns_and_old_points_go(tmp_path: Path) -> None:
    run = RunCheckpoints(tmp_path, keep=2)
    for number in range(4):
        run.put("same", some(1))
        run.put("other", some(number))
        run.commit({"n": number})
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [
        "000001-same.safetensors",
        "000002-same.safetensors",
        "000003-other.safetensors",
        "000003.json",
        "000004-other.safetensors",
        "000004.json",
    ]
    run.drop("other")
    assert run.commit({}) == 5
    assert not (tmp_path / "000003-other.safetensors").exists()
    assert RunCheckpoints(tmp_path).open_last() == {}


@pytest.mark.parametrize("name", ["000002-a.safetensors", "000002.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_point_is_named_and_the_one_before_serves(
    tmp_path: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    run = RunCheckpoints(tmp_path)
    for number in (1, 2):
        run.put("a", some(number))
        run.commit({"n": number})
    damage(tmp_path / name)
    again = RunCheckpoints(tmp_path)
    assert again.open_last() == {"n": 1}
    assert torch.equal(again.get("a")["x"], some(1)["x"])
    if (tmp_path / "000002.json").exists() or name != "000002.json" or damage is not Path.unlink:
        assert "skipping corrupt checkpoint 2" in caplog.text
    if damage is not cut or name.endswith("safetensors"):
        assert name in caplog.text or damage is Path.unlink
    again.put("a", some(3))
    # No file of a checkpoint in use is overwritten.
    assert again.commit({"n": 3}) == 3
    assert RunCheckpoints(tmp_path).open_last() == {"n": 3}


def test_a_write_that_fails_leaves_the_last_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunCheckpoints(tmp_path)
    run.put("a", some(1))
    run.commit({"n": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.put("a", some(2))
    monkeypatch.undo()
    assert list(tmp_path.glob(f"*{UNFINISHED}"))
    assert RunCheckpoints(tmp_path).open_last() == {"n": 1}
    assert not list(tmp_path.glob(f"*{UNFINISHED}"))


# --- the disk ---


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk, in order: fsync, rename or remove, and the file; of a rename its new name."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename, rmtree = os.fsync, Path.replace, Path.rename, shutil.rmtree

    def synced(handle: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        seen.append(("rename", str(target)))
        return replace(self, target)

    def renamed(self: Path, target: Path) -> Path:
        seen.append(("rename", str(target)))
        return rename(self, target)

    def removed(path: Path, **options: Any) -> None:
        seen.append(("remove", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_used(
    tmp_path: Path, disk: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced, sizes = tmp_path / "some", os.fsync, []

    def measured(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        synced(handle)

    monkeypatch.setattr(os, "fsync", measured)
    write_atomically(file, b"data")
    assert sizes[0] == 4, "all of it, nothing is left in a buffer"
    assert disk == [("fsync", f"{file}{UNFINISHED}"), ("rename", str(file)), ("fsync", str(tmp_path))]
    assert file.read_bytes() == b"data"


def test_the_manifest_is_written_after_every_part_that_it_names(tmp_path: Path, disk: list[tuple[str, str]]) -> None:
    run = RunCheckpoints(tmp_path)
    for _ in range(2):
        run.put("changing", some(len(disk)))
        run.put("same", some(1))
        run.commit({})
    names = [Path(name).name for kind, name in disk if kind == "rename"]
    assert names == [
        "000001-changing.safetensors",
        "000001-same.safetensors",
        "000001.json",
        "000002-changing.safetensors",
        "000002-same.safetensors",
        "000002.json",
    ]


def test_a_finished_run_is_on_the_disk_before_it_is_moved_and_its_checkpoints_go_after_that(
    tmp_path: Path, disk: list[tuple[str, str]]
) -> None:
    target = tmp_path / "out"
    partial = tmp_path / ".out.partial"
    with run_folder(target, False, False) as folder:
        (folder / "model").mkdir()
        for name in ("result", "model/weights"):
            (folder / name).write_text(name)
        run = RunCheckpoints(folder / CHECKPOINTS)
        run.commit({})
        disk.clear()
    moved = disk.index(("rename", str(target)))
    before = {name for kind, name in disk[:moved] if kind == "fsync"}
    assert before >= {str(partial / name) for name in ("result", "model/weights")}
    assert before >= {str(partial), str(partial / "model")}
    assert disk[moved + 1] == ("fsync", str(tmp_path))
    assert ("remove", str(target / CHECKPOINTS)) in disk[moved + 1 :]
    assert all(kind == "fsync" for kind, _ in disk[:moved])
    assert {entry.name for entry in target.iterdir()} == {"result", "model"}


def test_a_run_that_cannot_be_moved_to_its_place_keeps_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)

    def fail() -> None:
        with run_folder(tmp_path / "out", False, False) as folder:
            RunCheckpoints(folder / CHECKPOINTS).commit({"n": 1})

    with pytest.raises(OSError, match="Permission denied") as caught:
        fail()
    assert "--resume" in caught.value.__notes__[0]
    assert RunCheckpoints(tmp_path / ".out.partial" / CHECKPOINTS).open_last() == {"n": 1}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept_and_no_file_but_theirs(tmp_path: Path, keep: int) -> None:
    run = RunCheckpoints(tmp_path, keep)
    for number in range(1, 6):
        run.put("changing", some(number))
        run.put("same", some(0))
        run.put_bytes("notes.txt", b"x" * number)
        run.commit({"n": number})
        manifests = sorted(tmp_path.glob("*.json"))
        assert [int(file.stem) for file in manifests] == list(range(max(1, number - keep + 1), number + 1))
        bodies = [json.loads(json.loads(file.read_text())["body"]) for file in manifests]
        named = [entry["file"] for body in bodies for entry in body["parts"].values()]
        assert {file.name for file in tmp_path.iterdir()} == {*named, *(file.name for file in manifests)}
        if keep == 2 and len(bodies) == 2:
            assert len(named) == len(set(named)) == 6, "two that follow each other share no file"
    for kept in range(number, number - keep, -1):
        newest = RunCheckpoints(tmp_path, keep)
        assert newest.open_last() == {"n": kept}
        assert newest.get_bytes("notes.txt") == b"x" * kept
        flip(tmp_path / newest.parts["notes.txt"].file)
