"""Break runs in every way that a long run can break, resume them, and compare the bits.

    python -m oracle_tests.programs.faults [--faults 50] [--seed 0]

Breaks a small run of the embedded model repeatedly at random moments: killed, killed while writing, a failing write, a full disk
(a small tmpfs where one can be mounted), a truncated file of a checkpoint, a flipped byte in one, Ctrl-C, SIGTERM, a NaN gradient.
After every fault the run is resumed with `--resume`, possibly into the next fault. In the end its merged weights and metrics,
except times, must equal those of an undisturbed run. Prints a table and exits with 1 if anything was lost. Runs are forked from a
process that has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tiny_models import corpus
from torch_impl.engine import training
from torch_impl.engine.files import UNFINISHED, sha256_of
from torch_impl.engine.resume import run_checkpoints, run_folder
from torch_impl.experiment import report_page
from torch_impl.run import main as run_main

OPTIONS = [
    f"--{option}"
    for option in (
        "nsamples=4", "seqlen=32", "rmi_samples=4", "train_examples=16", "train_seqlen=32", "eval_seqlen=32", "eval_windows=2",
        "steps=2", "per_device_train_batch_size=2", "save_every=2", "device=cpu",
    )
]  # fmt: skip
DISK_BYTES = 48 << 20


@dataclass
class Attempt:
    """How one process ended."""

    status: int
    """Exit status, or minus the signal that ended it."""
    said: str
    seconds: float


def start(arguments: Sequence[str], prepare: Callable[[], None], log: Path) -> int:
    """Fork a process that runs the main job after `prepare`. Returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        # A shell's background job ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Drawing pictures would take most of the time.
        report_page.write = lambda *_: None
        prepare()
        status = run_main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(
    arguments: Sequence[str],
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    after: tuple[float, int] | None = None,
) -> Attempt:
    """Run the job to its end, or send it a signal: (seconds, number)."""
    begin = time.monotonic()
    child = start(arguments, prepare, log)
    ended = threading.Event()

    def send() -> None:
        assert after is not None
        if not ended.wait(after[0]):
            with suppress(ProcessLookupError):
                os.kill(child, after[1])

    if after is not None:
        threading.Thread(target=send, daemon=True).start()
    _, waited = os.waitpid(child, 0)
    ended.set()
    return Attempt(os.waitstatus_to_exitcode(waited), log.read_text(errors="replace"), time.monotonic() - begin)


# --- what a process does to itself ---


Write = Callable[[], object]
Act = Callable[[Path, Write], None]
"""Given the unfinished file of a write, and what writes it."""


def watch_writes(on_write: Act) -> None:
    """Call `on_write` before each write of a checkpoint: of a part's tensors, or of bytes."""
    plain_bytes, plain_tensors = run_checkpoints.write_atomically, run_checkpoints.save_tensors

    def write_bytes(path: Path, data: bytes) -> None:
        unfinished = path.with_name(path.name + UNFINISHED)
        on_write(unfinished, lambda: unfinished.write_bytes(data))
        plain_bytes(path, data)

    def write_tensors(tensors: dict[str, torch.Tensor], unfinished: Path, *metadata: Any) -> None:
        on_write(unfinished, lambda: plain_tensors(tensors, unfinished, *metadata))
        plain_tensors(tensors, unfinished, *metadata)

    run_checkpoints.write_atomically = write_bytes
    run_checkpoints.save_tensors = write_tensors  # type: ignore[assignment]


def at_write(number: int, act: Act) -> Callable[[], None]:
    """Call `act` before write N, counted from 1."""
    written = 0

    def on_write(unfinished: Path, write: Write) -> None:
        nonlocal written
        written += 1
        if written == number:
            act(unfinished, write)

    return lambda: watch_writes(on_write)


def _half(unfinished: Path, write: Write) -> None:
    write()
    os.truncate(unfinished, unfinished.stat().st_size // 2)


def _killed(unfinished: Path, write: Write) -> None:
    _half(unfinished, write)
    os.kill(os.getpid(), signal.SIGKILL)


def _failing(unfinished: Path, write: Write) -> None:
    _half(unfinished, write)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _simulated_full(unfinished: Path, write: Write) -> None:
    _half(unfinished, write)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(filler: Path) -> None:
    """Fill a small disk."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def nan_at(number: int) -> Callable[[], None]:
    """Make a gradient NaN at this optimizer step, from 1."""
    done = 0

    def prepare() -> None:
        plain = training._clip

        def clip(parameters: Sequence[torch.nn.Parameter], *rest: Any) -> None:
            nonlocal done
            done += 1
            if done == number:
                gradient = parameters[-1].grad
                assert gradient is not None
                gradient.view(-1)[0] = float("nan")
            plain(parameters, *rest)

        training._clip = clip  # type: ignore[assignment]

    return prepare


# --- the harness ---


@dataclass
class Row:
    """Outcomes of the faults of one kind."""

    tried: int = 0
    went_back: int = 0
    started_over: int = 0
    lost: int = 0


@dataclass
class Harness:
    """Break runs in `place`; `plain` is the undisturbed run."""

    place: Path
    small_disk: bool
    chance: random.Random
    options: list[str] = field(default_factory=lambda: list(OPTIONS))
    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.log = self.place.parent / "log.txt"
        # Reading Python's own sources would take longer than such a run.
        text = self.place.parent / "text.txt"
        text.write_text("\n<|endoftext|>\n".join(part for _, part in itertools.islice(corpus.documents("train"), 12)))
        for kind in ("calibration", "finetune", "eval"):
            self.options += [f"--{kind}_data", str(text)]
        counted: Counter[str] = Counter()
        count_file = self.place.parent / "count.json"

        def prepare() -> None:
            plain_clip = training._clip

            def count(*_: Any) -> None:
                counted["writes"] += 1
                count_file.write_text(json.dumps(counted))

            def clip(*arguments: Any) -> None:
                counted["steps"] += 1
                plain_clip(*arguments)

            watch_writes(count)
            training._clip = clip  # type: ignore[assignment]

        out = self.place.parent / "plain"
        self.plain = attempt([*self.options, "--output_dir", str(out)], self.log, prepare)
        if self.plain.status:
            raise RuntimeError(f"the run without faults ended with {self.plain.status}: {self.plain.said[-500:]}")
        self.expected = outcome(out)
        counts = json.loads(count_file.read_text())
        self.writes, self.steps = counts["writes"], counts["steps"]

    @property
    def target(self) -> Path:
        return self.place / "out"

    @property
    def points(self) -> Path:
        return self.place / ".out.partial" / run_folder.CHECKPOINTS

    def arguments(self) -> list[str]:
        return [*self.options, "--output_dir", str(self.target), "--resume"]

    def break_once(self, kind: str) -> bool:
        """Cause one fault. Returns whether it came before the run's end."""
        write = self.chance.randint(1, self.writes)
        moment = self.chance.uniform(0.0, self.plain.seconds)
        filler = self.place / "filler"
        full = (lambda *_: fill(filler)) if self.small_disk else _simulated_full
        plans: dict[str, dict[str, Any]] = {
            "killed": {"after": (moment, signal.SIGKILL)},
            "killed while writing": {"prepare": at_write(write, _killed)},
            "write failed": {"prepare": at_write(write, _failing)},
            "disk full": {"prepare": at_write(write, full)},
            "file cut short": {"prepare": at_write(write, _killed)},
            "byte flipped": {"prepare": at_write(write, _killed)},
            "Ctrl-C": {"after": (moment, signal.SIGINT)},
            "SIGTERM": {"after": (moment, signal.SIGTERM)},
            "NaN gradient": {"prepare": nan_at(self.chance.randint(1, self.steps))},
        }
        allowed = {
            "killed": {-signal.SIGKILL},
            "Ctrl-C": {128 + signal.SIGINT},
            # Before the first checkpoint SIGTERM has its default effect.
            "SIGTERM": {128 + signal.SIGTERM, -signal.SIGTERM},
        }.get(kind, {2} if kind in ("write failed", "disk full", "NaN gradient") else {-signal.SIGKILL})
        had_checkpoints = run_checkpoints.has_checkpoints(self.points)
        done = attempt(self.arguments(), self.log, **plans[kind])
        filler.unlink(missing_ok=True)
        self.hear(done, had_checkpoints)
        if done.status == 0:
            return False
        row = self.rows.setdefault(kind, Row())
        row.tried += 1
        self.last = kind
        if done.status not in allowed:
            row.lost += 1
            self.problems.append(f"{kind}: ended with {done.status}: {done.said[-600:]}")
        if self.target.exists():
            row.lost += 1
            self.problems.append(f"{kind}: {self.target} is there though the run did not end well")
        if kind in ("file cut short", "byte flipped"):
            self.damage(kind)
        return True

    def damage(self, kind: str) -> None:
        """Corrupt a random file of a checkpoint."""
        files = sorted(self.points.glob("*")) if self.points.is_dir() else []
        if not files:
            return
        file = self.chance.choice(files)
        data = bytearray(file.read_bytes())
        position = self.chance.randrange(max(1, len(data)))
        if kind == "file cut short":
            data = data[:position]
        elif data:
            data[position] ^= 1 << self.chance.randrange(8)
        file.write_bytes(data)

    def hear(self, done: Attempt, had_checkpoints: bool) -> None:
        """Count what the run that was resumed after the last fault reports."""
        row = self.rows.get(getattr(self, "last", ""))
        if row is None:
            return
        if had_checkpoints and "starting over" in done.said:
            row.started_over += 1
        elif "skipping corrupt checkpoint" in done.said:
            row.went_back += 1

    def finish(self) -> None:
        """Let the run finish, and compare."""
        if not self.target.exists():
            had_checkpoints = run_checkpoints.has_checkpoints(self.points)
            done = attempt(self.arguments(), self.log)
            self.hear(done, had_checkpoints)
            if done.status:
                self.rows[self.last].lost += 1
                self.problems.append(f"after {self.last}: ended with {done.status}: {done.said[-600:]}")
        if self.target.exists() and (difference := differs(outcome(self.target), self.expected)):
            self.rows[self.last].lost += 1
            self.problems.append(f"after {self.last}: {difference}")
        for left in self.place.iterdir():
            if left != self.target and self.target.exists():
                self.problems.append(f"after {self.last}: {left} is left over")
            shutil.rmtree(left)


KINDS = (
    "killed",
    "killed while writing",
    "write failed",
    "disk full",
    "file cut short",
    "byte flipped",
    "Ctrl-C",
    "SIGTERM",
    "NaN gradient",
)


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on faults: the hash of the weights, and events without times."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("seconds", None)
    return {"weights": sha256_of(folder / "model" / "model.safetensors"), "metrics": events}


def differs(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Name the first part that is not as expected."""
    return next((f"{name} differ" for name in expected if found[name] != expected[name]), None)


def run_faults(harness: Harness, count: int) -> None:
    """Cause faults of all kinds in turn, sometimes several in one run."""
    tried = 0
    while tried < count:
        for _ in range(harness.chance.randint(1, 4)):
            if tried == count:
                break
            if not harness.break_once(KINDS[tried % len(KINDS)]):
                break
            tried += 1
        if hasattr(harness, "last"):
            harness.finish()
        elif harness.target.exists():
            shutil.rmtree(harness.target)


@contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """Yield a folder, on its own tmpfs if one can be mounted, and whether it is."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
        mounted = shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
        try:
            yield place, mounted
        finally:
            if mounted:
                subprocess.run(["umount", str(place)], check=True)


def table(harness: Harness) -> str:
    """One line per kind of fault."""
    lines = [f"{'fault':<24}{'tried':>7}{'previous checkpoint':>20}{'started over':>13}{'lost':>7}"]
    rows = {**harness.rows, "in all": Row()}
    for row in harness.rows.values():
        for name in vars(row):
            setattr(rows["in all"], name, getattr(rows["in all"], name) + getattr(row, name))
    for name, row in rows.items():
        lines.append(f"{name:<24}{row.tried:>7}{row.went_back:>20}{row.started_over:>13}{row.lost:>7}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    with small_disk() as (place, mounted):
        harness = Harness(place, mounted, random.Random(options.seed))
        run_faults(harness, options.faults)
    print(table(harness))
    disk = f"a tmpfs of {DISK_BYTES >> 20} MiB" if mounted else "simulated: no tmpfs could be mounted"
    print(
        f"\nfull disk: {disk}; a run without faults takes {harness.plain.seconds:.1f} s, all {time.monotonic() - begin:.0f} s"
    )
    print("\n".join(harness.problems))
    return int(bool(harness.problems))


if __name__ == "__main__":
    sys.exit(main())
