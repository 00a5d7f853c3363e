"""The folder of a comparison: a file per cell, each written at once, and results.json with all of them, which is enough."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch_impl.experiment.comparison.statistics import perplexity
from torch_impl.experiment.metrics import write_json

CELLS, CLAIMS, ALL = "cells", ".claims", "results.json"
PROCESS = "process-"
DONE, DIVERGED, FAILED = "done", "diverged", "failed"


@dataclass(frozen=True)
class Outcome:
    """The result of a cell.

    status: done; diverged, with infinite perplexity; or failed, to be tried again. losses: of each text, per window of the half
    that is reported, in nats per token. tuning: perplexity of the first text's other half. hashes: of each text's token ids.
    zero_shot: accuracy by task in percent, its standard error, their mean, and who measured. unmerged: the model runs with
    separate adapters. sparsity: share of the blocks' weights that are gone, parameters: those of the whole model that are left.
    trained: parameters that were trained. seconds, gib: of each part of the work. tokens_per_second: of decoding, of the packed
    model, or a smaller one as it is, and of the dense one beside it.
    """

    labels: dict[str, str]
    status: str
    error: str | None = None
    tuning: float | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    zero_shot: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    parameters: int | None = None
    unmerged: bool = False
    trained: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    gib: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """Hardware, software, the model's name and sizes."""

    @property
    def finished(self) -> bool:
        """Return whether there is no reason to run the cell again."""
        return self.status in (DONE, DIVERGED)

    def perplexity(self, text: str) -> float | None:
        """Return the perplexity of a text; None if the run diverged."""
        return perplexity(self.losses[text]) if text in self.losses else None


class Results:
    """The outcomes in a folder, by the key of the cell. Several processes share a folder by claims.

    others: folders whose outcomes count too, if the cell has none here.
    """

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._finished: dict[str, Outcome] = {}
        self._earlier = _merged([*(Results(other).everything() for other in reversed(others)), self.together()])

    def get(self, key: str) -> Outcome | None:
        """Return the outcome of a cell; None if it has not run. Errors: ValueError naming a file that is no outcome."""
        if key in self._finished:
            return self._finished[key]
        path = self.folder / CELLS / f"{key}.json"
        cell = {key: _outcome(path, _read(path))} if path.is_file() else {}
        earlier = {key: self._earlier[key]} if key in self._earlier else {}
        found = _merged([earlier, cell]).get(key)
        if found is not None and found.finished:
            self._finished[key] = found
        return found

    def put(self, key: str, outcome: Outcome) -> None:
        """Write the outcome of a cell."""
        (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CELLS / f"{key}.json", asdict(outcome))

    def written(self, key: str) -> float:
        """Return when the outcome of a cell was written, in seconds since the epoch; 0 if it was not, or only into results.json."""
        path = self.folder / CELLS / f"{key}.json"
        return path.stat().st_mtime if path.is_file() else 0.0

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Keep other processes from running a cell meanwhile. False: another process runs it.

        A claim ends with its process, however that ends. Look at the outcome again after claiming: it may just have been written.
        """
        (self.folder / CLAIMS).mkdir(parents=True, exist_ok=True)
        path = self.folder / CLAIMS / key
        with path.open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Be one of the processes that run cells, until this one ends, however that is."""
        with self.claim(f"{PROCESS}{uuid.uuid4().hex}"):
            yield

    def processes(self) -> int:
        """Return how many processes run cells. What killed ones have left does not count, and goes."""
        alive = 0
        for path in (self.folder / CLAIMS).glob(f"{PROCESS}*"):
            with self.claim(path.name) as ended:
                alive += not ended
        return alive

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process writes what is made of all outcomes: results.json, tables and curves."""
        place = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(place, fcntl.LOCK_EX)
            yield
        finally:
            os.close(place)

    def collect(self) -> None:
        """Write all outcomes into results.json."""
        self._earlier = self.everything()
        if self._earlier:
            write_json(self.folder / ALL, {key: asdict(outcome) for key, outcome in sorted(self._earlier.items())})

    def everything(self) -> dict[str, Outcome]:
        """Return all outcomes, of whatever comparison they are."""
        files = sorted((self.folder / CELLS).glob("*.json"))
        cells = {file.stem: _outcome(file, _read(file)) for file in files}
        return _merged([self._earlier, self.together(), cells])

    def together(self) -> dict[str, Outcome]:
        """Return the outcomes in results.json."""
        path = self.folder / ALL
        return {key: _outcome(path, value) for key, value in _read(path).items()} if path.is_file() else {}


def _merged(parts: Iterable[Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """Merge outcomes by key: later ones count, but a failure never counts more than a result."""
    found: dict[str, Outcome] = {}
    for part in parts:
        found |= {key: new for key, new in part.items() if new.finished or key not in found or not found[key].finished}
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); delete it and run the comparison again") from error


def _outcome(path: Path, found: Any) -> Outcome:
    names = {item.name for item in fields(Outcome)}
    if not isinstance(found, dict) or not {"labels", "status"} <= found.keys() <= names:
        raise ValueError(
            f"{path} is not a result of this version of losa compare; delete it and run the comparison again"
        )
    return Outcome(**found)
