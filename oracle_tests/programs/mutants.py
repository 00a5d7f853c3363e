"""Make small random mistakes in production, one at a time, and count those that a test notices: the mutation score.

    python -m oracle_tests.programs.mutants --part experiment [--sample 150] [--seed 0] [--jobs N]

Works on copies of this checkout. First runs every test once and records which functions it calls (`reach`; kept in
build/mutants/reach.json and updated for test files that changed; `--record`: for all). Then runs for each mutant (`mutations`) the
tests that call its function, fastest first, until one fails. They run under a time limit in a process forked from this one, which
has imported the libraries and computed nothing; a test that hangs counts as noticed. Prints the score, its 95 % interval and the
survivors as diffs, and writes everything to build/mutants/PART-SEED.json. `--again FILE` repeats the survivors of such a file that
are still in the code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from oracle_tests.programs.mutations import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "mutants"
PARTS = {
    "core": ["torch_impl/*.py", "torch_impl/masks/*.py"],
    "engine": ["torch_impl/engine/**/*.py", "torch_impl/decode/*.py"],
    "experiment": ["torch_impl/experiment/**/*.py"],
    "commands": ["torch_impl/api.py", "torch_impl/commands/*.py"],
}
# These need a GPU, or are Triton's, whose interpreter reads the source.
ELSEWHERE = ("torch_impl/_kernels.py", "torch_impl/decode/cuda.py")
OWN = ("oracle_tests", "reference", "tiny_models", "torch_impl")
IMPORTS = (
    "import sys, oracle_tests.conftest, oracle_tests.test_resume, torch_impl.commands.generate; print(*sys.modules)"
)
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "mutants", "runs", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info"
)
PYTEST = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "--profile", "mutants"]
# No GPU: a forked process could not use it, and a score must be the same everywhere.
QUIET = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def files_of(part: str) -> list[Path]:
    """Files that belong to a part."""
    found = [file for pattern in PARTS[part] for file in sorted(ROOT.glob(pattern))]
    names = {file: file.relative_to(ROOT).as_posix() for file in found}
    own = () if part == "commands" else PARTS["commands"]
    return [file for file, name in names.items() if name not in (*ELSEWHERE, *own)]


def import_libraries() -> None:
    """Import the libraries of production and tests, for forked processes."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.split():
        if name.partition(".")[0] not in (*OWN, "__main__"):
            # Some names are not modules.
            with suppress(Exception):
                importlib.import_module(name)


# --- which tests call which function ---


@dataclass
class Reach:
    """Result of `record`: seconds of every passing test, the tests of every function, hashes of the test files."""

    seconds: dict[str, float] = field(default_factory=dict)
    tests: dict[str, list[str]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def of(self, mutant: Mutant) -> list[str]:
        """Tests to run on a mutant, fastest first: those of its function, else of any function of its file."""
        found = set(self.tests.get(f"{mutant.file}::{mutant.function}", ())) if mutant.function else set()
        if not found:
            found = {t for name, tests in self.tests.items() if name.startswith(f"{mutant.file}::") for t in tests}
        return sorted(found, key=lambda test: (self.seconds[test], test))


def record(place: Path, jobs: int, every: bool) -> Reach:
    """Run all tests, or those whose files changed since the last time, and record what they call."""
    store = KEPT / "reach.json"
    known = Reach(**json.loads(store.read_text())) if store.is_file() and not every else Reach()
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in _test_files()}
    stale = [name for name, digest in hashes.items() if known.hashes.get(name) != digest]
    gone = [f"oracle_tests/{name}" for name in {*known.hashes, *stale} if name not in hashes or name in stale]
    known.seconds = {test: s for test, s in known.seconds.items() if test.partition("::")[0] not in gone}
    if stale:
        print(f"recording what {len(stale)} files of tests start", flush=True)
        _run_recorded(place, jobs, [f"oracle_tests/{name}" for name in stale], known)
    for name, tests in known.tests.items():
        known.tests[name] = sorted(test for test in set(tests) if test in known.seconds)
    known.hashes = hashes
    KEPT.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(vars(known), indent=0))
    return known


def _test_files() -> list[Path]:
    return sorted((ROOT / "oracle_tests").glob("test_*.py"))


def _run_recorded(place: Path, jobs: int, files: list[str], known: Reach) -> None:
    reach = "oracle_tests.programs.reach"
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "sitecustomize.py").write_text(
            f"import os\nif os.environ.get('LOSA_REACH_TEST'):\n    from {reach} import start\n    start()\n"
        )
        paths = os.pathsep.join([name, str(place)])
        environment = {**os.environ, **QUIET, "PYTHONPATH": paths, "LOSA_REACH": name}
        command = [sys.executable, "-m", "pytest", *PYTEST, "-p", reach, "-n", str(jobs), *files]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the tests could not be run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = [line for file in Path(name).glob("*.tsv") for line in file.read_text().splitlines()]
    failed, seconds = set(), Counter[str]()
    for test, outcome, duration in (json.loads(line) for line in lines if line.startswith("[")):
        seconds[test] += duration
        if outcome != "passed":
            failed.add(test)
    known.seconds |= {test: round(s, 3) for test, s in seconds.items() if test not in failed}
    print(
        f"{len(seconds) - len(failed)} of {len(seconds)} tests pass; left out: {sorted(failed) or 'none'}", flush=True
    )
    for test, _, function in (line.partition("\t") for line in lines if not line.startswith("[")):
        of_file = [known_test for known_test in known.seconds if known_test.startswith(f"{test}::")]
        known.tests.setdefault(function, []).extend([test] if "::" in test else of_file)


# --- one mutant ---


class Chosen:
    """A pytest plugin: run these tests in this order; write the first failure to a file."""

    def __init__(self, tests: Sequence[str], said: Path) -> None:
        self._order = {test: number for number, test in enumerate(tests)}
        self._said = said

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._order), key=lambda i: self._order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._said.write_text(report.nodeid)


@dataclass
class Outcome:
    """Outcome of a mutant: killed, timeout, survived, or unreached by any test."""

    mutant: Mutant
    result: str
    by: str = ""
    tests: int = 0
    of: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        named = {name: getattr(self.mutant, name) for name in ("file", "function", "line", "kind", "diff")}
        return {**named, **{name: value for name, value in vars(self).items() if name != "mutant"}}


@dataclass
class Attempt:
    """A process that runs the tests of a mutant in a copy of the checkout."""

    mutant: Mutant
    place: Path
    tests: list[str]
    of: int
    limit: float
    child: int = 0
    begun: float = 0.0
    original: bytes = b""

    def start(self) -> None:
        file = self.place / self.mutant.file
        self.original = file.read_bytes()
        file.write_text(self.mutant.source, encoding="utf-8")
        self._said.unlink(missing_ok=True)
        self.begun = time.monotonic()
        sys.stdout.flush()
        self.child = os.fork()
        if not self.child:
            status = 3
            try:
                status = self._run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    @property
    def log(self) -> Path:
        """File with the output of the process."""
        return self.place.with_name(self.place.name + ".log")

    @property
    def _said(self) -> Path:
        return self.place.with_name(self.place.name + ".said")

    def _run(self) -> int:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        for name in [n for n in sys.modules if n.partition(".")[0] in OWN]:
            del sys.modules[name]
        os.chdir(self.place)
        os.environ["PYTHONPATH"] = str(self.place)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        sys.path[:] = [str(self.place), *(p for p in sys.path if p not in ("", str(ROOT)))]
        files = list(dict.fromkeys(test.partition("::")[0] for test in self.tests))
        more = ["-x", f"--basetemp={self.place}.tmp", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return int(pytest.main([*PYTEST, *more, *files], plugins=[Chosen(self.tests, self._said)]))

    def ended(self) -> Outcome | None:
        """Return the outcome, None while it runs; end child processes that are left."""
        child, waited = os.waitpid(self.child, os.WNOHANG)
        late = time.monotonic() - self.begun > self.limit
        if not child and not late:
            return None
        with suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGKILL)
        if not child:
            os.waitpid(self.child, 0)
        result = "timeout" if not child else "survived" if waited == 0 else "killed"
        by = self._said.read_text() if self._said.exists() else ""
        if result == "killed" and not by:
            by = "".join(self.log.read_text(errors="replace").strip().splitlines()[-1:])
        (self.place / self.mutant.file).write_bytes(self.original)
        return Outcome(self.mutant, result, by, len(self.tests), self.of, round(time.monotonic() - self.begun, 1))


def check_control(reach: Reach, place: Path) -> None:
    """Check that tests pass on an unchanged file. Errors: RuntimeError if one fails that passed when recorded."""
    file = "torch_impl/schedule.py"
    tests = sorted(reach.seconds, key=lambda test: reach.seconds[test])[:100]
    control = Attempt(Mutant(file, "", 0, "", (ROOT / file).read_text(encoding="utf-8"), ""), place, tests, 0, 600)
    control.start()
    while (outcome := control.ended()) is None:
        time.sleep(0.05)
    if outcome.result != "survived":
        raise RuntimeError(
            f"{outcome.by or 'a test'} fails on code that was not changed: {control.log.read_text()[-2000:]}"
        )


def attempts(mutants: Sequence[Mutant], reach: Reach, budget: float, places: list[Path]) -> list[Outcome]:
    """Test all mutants, one per place at a time."""
    outcomes: list[Outcome] = []
    waiting, running = list(mutants)[::-1], list[Attempt]()
    while waiting or running:
        free = [place for place in places if place not in {attempt.place for attempt in running}]
        while waiting and free:
            mutant = waiting.pop()
            every = reach.of(mutant)
            if not every:
                outcomes.append(Outcome(mutant, "unreached"))
                _tell(outcomes[-1], len(outcomes), len(mutants))
                continue
            chosen: list[str] = []
            taken = 0.0
            for test in every:
                if not chosen or taken + reach.seconds[test] <= budget:
                    chosen.append(test)
                    taken += reach.seconds[test]
            running.append(Attempt(mutant, free.pop(), chosen, len(every), 60 + 5 * taken))
            running[-1].start()
        time.sleep(0.05)
        for attempt in list(running):
            if outcome := attempt.ended():
                running.remove(attempt)
                outcomes.append(outcome)
                _tell(outcome, len(outcomes), len(mutants))
    return outcomes


def _tell(outcome: Outcome, done: int, of: int) -> None:
    where = f"{outcome.mutant.file}:{outcome.mutant.line}"
    print(f"{done}/{of} {outcome.result} {where} {outcome.mutant.kind} {outcome.seconds} s {outcome.by}", flush=True)


# --- the report ---


def interval(killed: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share `killed` / `tried`."""
    z, share = 1.96, killed / tried
    middle = (share + z * z / (2 * tried)) / (1 + z * z / tried)
    half = z / (1 + z * z / tried) * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    return max(0.0, middle - half), min(1.0, middle + half)


def _folder(file: str) -> str:
    name = file.removeprefix("torch_impl/")
    return f"torch_impl/{name.partition('/')[0]}/" if "/" in name else "torch_impl/*.py"


def report(outcomes: Sequence[Outcome], population: int) -> str:
    """Format the survivors as diffs, and the counts of outcomes by folder."""
    lines = []
    for outcome in sorted(outcomes, key=lambda o: (o.mutant.file, o.mutant.line)):
        if outcome.result in ("survived", "unreached"):
            of = f"{outcome.tests} of {outcome.of} tests"
            lines += [f"{outcome.result}: {outcome.mutant.file}:{outcome.mutant.line} {outcome.mutant.kind}, {of}"]
            lines += [f"  {line}" for line in outcome.mutant.diff.splitlines()]
    folders = Counter((_folder(o.mutant.file), o.result) for o in outcomes)
    lines += [
        "",
        f"{'folder':<28}{'tried':>7}{'killed':>8}{'timeout':>9}{'survived':>10}{'unreached':>11}{'score':>8}  95 %",
    ]
    for folder in sorted({folder for folder, _ in folders}):
        counts = [folders[folder, result] for result in ("killed", "timeout", "survived", "unreached")]
        noticed, tried = sum(counts[:2]), sum(counts)
        low, high = interval(noticed, tried)
        cells = "".join(f"{count:>{width}}" for count, width in zip(counts, (8, 9, 10, 11), strict=True))
        lines.append(f"{folder:<28}{tried:>7}{cells}{noticed / tried:>8.1%}  {low:.0%} to {high:.0%}")
    lines.append(f"drawn from {population} mutants")
    return "\n".join(lines)


def draw(options: argparse.Namespace) -> tuple[list[Mutant], int]:
    """Sample mutants. Returns them and the number of all mutants."""
    parts = list(PARTS) if options.part == "all" else [options.part]
    files = [file for part in parts for file in files_of(part) if options.file in file.as_posix()]
    every = [
        m for file in files for m in mutants_of(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    if options.again:
        survivors = {
            f"{o['file']}::{o['function']}\n{o['diff']}"
            for o in json.loads(Path(options.again).read_text())["outcomes"]
            if o["result"] in ("survived", "unreached")
        }
        return [mutant for mutant in every if mutant.name in survivors], len(every)
    chance = random.Random(options.seed)
    return chance.sample(every, min(options.sample, len(every))), len(every)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the score is below `--least`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--file", default="", help="only files whose path contains this")
    parser.add_argument("--sample", type=int, default=150, help="number of mutants to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="number of parallel processes")
    parser.add_argument("--budget", type=float, default=240, help="most seconds of tests for one mutant")
    parser.add_argument("--record", action="store_true", help="record again what every test calls")
    parser.add_argument("--again", help="a file of results: test its survivors again")
    parser.add_argument("--least", type=float, default=0.0, help="fail if the score is below this share")
    options = parser.parse_args(arguments)
    os.environ |= QUIET
    import_libraries()
    mutants, population = draw(options)
    print(
        f"part {options.part}, seed {options.seed}: {len(mutants)} of {population} mutants, {options.jobs} at a time",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(options.jobs)]
        for place in places:
            shutil.copytree(ROOT, place, ignore=IGNORED)
        reach = record(places[0], options.jobs, options.record)
        check_control(reach, places[0])
        outcomes = attempts(mutants, reach, options.budget, places)
    if not outcomes:
        print("nothing to try")
        return 0
    print(report(outcomes, population))
    facts = {"part": options.part, "file": options.file, "seed": options.seed, "population": population}
    result = KEPT / f"{options.part}-{options.seed}{'-again' if options.again else ''}.json"
    result.write_text(json.dumps({**facts, "outcomes": [outcome.as_dict() for outcome in outcomes]}, indent=1) + "\n")
    print(f"written to {result}")
    return int(sum(o.result in ("killed", "timeout") for o in outcomes) < options.least * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
