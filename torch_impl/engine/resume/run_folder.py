"""The output folder of a run: written under a hidden name and renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torch_impl.engine.files import flush_folder
from torch_impl.engine.resume.run_checkpoints import has_checkpoints

logger = logging.getLogger(__name__)

CHECKPOINTS = ".points"
LOCK = ".lock"


@dataclass(frozen=True)
class Kind:
    """What a folder holds, so that nothing else is replaced. marker: a file that all of the kind have; argument and replacing: how
    messages call the folder and the option that replaces it."""

    name: str
    marker: str
    argument: str
    replacing: str = "--overwrite"


RUN = Kind("a run", "losa_result.json", "output_dir")
MODEL = Kind("a model", "config.json", "OUT")


@contextmanager
def run_folder(
    target: Path,
    overwrite: bool,
    resume: bool = False,
    kind: Kind = RUN,
) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `target` if the body succeeds.

    If the body fails, the folder is kept if it has checkpoints, and a note on the exception says how to resume; otherwise it
    is deleted. The lock on the folder ends with the process. Only an empty folder is replaced, or, with `overwrite`, one of
    the same kind. Symbolic links are followed.

    Errors: ValueError if `target` exists and must not be replaced, cannot be written, is in use by another process, or has an
    unfinished run without `resume` or `overwrite`.
    """
    named = f"{kind.argument} {target}"
    target = _place_of(target, named)
    check_target = functools.partial(_check_target, target, named, overwrite, resume, kind)
    check_target()
    partial = _partial(target)
    with _locked(partial, named):
        # Check again: another process may have finished in the meantime.
        check_target()
        unfinished = _check_unfinished(partial, named, overwrite, resume, kind)
        if not (unfinished and resume):
            _empty(partial)
        try:
            yield partial
            _publish(partial, target)
        except BaseException as error:
            if has_checkpoints(partial / CHECKPOINTS):
                error.add_note(f"progress saved in {partial}; rerun with --resume")
            else:
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, KeyboardInterrupt):
                    error.add_note("nothing was written")
            raise


def check_folder(target: Path, overwrite: bool, resume: bool = False) -> None:
    """Check what `run_folder` would refuse of a run, as far as it shows without writing. Errors: as `run_folder`."""
    named = f"{RUN.argument} {target}"
    place = _place_of(target, named)
    _check_target(place, named, overwrite, resume, RUN)
    _check_unfinished(_partial(place), named, overwrite, resume, RUN)
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise ValueError(f"{named} cannot be written: {reason}; use a writable folder")


def _partial(target: Path) -> Path:
    """Return the folder of an unfinished run."""
    return target.parent / f".{target.name}.partial"


def _check_target(target: Path, named: str, overwrite: bool, resume: bool, kind: Kind) -> None:
    if not target.exists() or _is_empty_folder(target):
        return
    same = (target / kind.marker).is_file()
    if not overwrite:
        finished = " and its run is finished" if resume and same else ""
        raise ValueError(f"{named} exists{finished}; use another folder or {kind.replacing}")
    if not same:
        raise ValueError(
            f"{named} is not the folder of {kind.name}, so {kind.replacing} does not replace it; use another folder"
        )


def _check_unfinished(partial: Path, named: str, overwrite: bool, resume: bool, kind: Kind) -> bool:
    """Return whether there is an unfinished run; log if `resume` finds none, which starts one.

    Errors: ValueError if there is one without `resume` or `overwrite`.
    """
    unfinished = has_checkpoints(partial / CHECKPOINTS)
    if unfinished and not (resume or overwrite):
        ways = f"--resume, {kind.replacing} to start over" if kind == RUN else f"{kind.replacing} to delete it"
        raise ValueError(f"{named} has an unfinished run in {partial}; use {ways}, or another folder")
    if resume and not unfinished:
        # Not refused: a job that is restarted whenever it stops has --resume from the start.
        others = [
            found.parent.name
            for found in sorted(partial.parent.glob(f".*.partial/{CHECKPOINTS}"))
            if has_checkpoints(found)
        ]
        beside = ", ".join(name.removeprefix(".").removesuffix(".partial") for name in others)
        there = f"; unfinished in the same place: {beside}" if beside else ""
        logger.warning("%s has no unfinished run to resume: starting from the beginning%s", named, there)
    return unfinished


def _place_of(target: Path, named: str) -> Path:
    """Resolve symbolic links. Errors: ValueError if no folder can be moved there."""
    try:
        place = target.resolve()
        str(place).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{named} is not a valid UTF-8 name; use another folder") from None
    except (OSError, RuntimeError):
        place = target
    if place.is_symlink():
        raise ValueError(f"{named} is a symbolic link to itself; use another folder")
    if os.path.ismount(place):
        raise ValueError(f"{named} is a mount point, which cannot be replaced; use a folder inside it")
    return place


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


@contextmanager
def _locked(partial: Path, named: str) -> Iterator[None]:
    """Create and lock the folder; delete it afterwards if it is empty."""
    try:
        file = _lock(partial)
    except BlockingIOError:
        raise ValueError(f"{named} is in use by another process; wait for it or use another folder") from None
    except OSError as error:
        raise ValueError(f"{named} cannot be written: {error.strerror}; use a writable folder") from error
    with file:
        try:
            yield
        finally:
            if partial.is_dir() and {entry.name for entry in partial.iterdir()} <= {LOCK}:
                shutil.rmtree(partial, ignore_errors=True)


def _lock(partial: Path) -> IO[str]:
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file = (partial / LOCK).open("a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The folder may have been moved or deleted between opening and locking.
            if _same(partial / LOCK, file):
                return file
            file.close()


def _same(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(partial: Path, target: Path) -> None:
    """Move the folder to its place, then delete its checkpoints."""
    for folder, _, names in os.walk(partial):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(folder))
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    flush_folder(target.parent)
    shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    (target / LOCK).unlink(missing_ok=True)
