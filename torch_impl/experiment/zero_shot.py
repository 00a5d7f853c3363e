"""Zero-shot accuracy by lm-eval, the literature's tool: on its own tasks from the hub, or on local files of the paper's seven.

lm-eval is the extra `eval`. Its import takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import _checks
from torch_impl.engine.files import sha256_of
from torch_impl.experiment import task_files
from torch_impl.experiment.command import closest
from torch_impl.experiment.evaluate import eval_mode
from torch_impl.experiment.log_likelihoods import language_model
from torch_impl.experiment.text.files import one_line

# Where lm-eval defines the paper's tasks. To read all of its definitions takes ten seconds.
DEFINED = {
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "boolq": "super_glue/boolq",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "arc_easy": "arc",
    "arc_challenge": "arc",
}
# The tasks of the paper's tables, in their order; as a task, ALL_SEVEN means all of them.
PAPER = tuple(DEFINED)
ALL_SEVEN = "paper"
LOCAL = Path(__file__).parent / "tasks"
METRIC = "acc"
# lm-eval's own seed of few-shot examples.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy by task.

    accuracy: lm-eval's plain `acc`, the share of documents whose right choice has the highest log-likelihood, not divided by
    its length. stderr: its standard error; None for one document. documents: how many were measured. sources: the hub's
    data set, or the local file with its SHA-256; and requests_sha256, of all prompts and continuations: equal hashes mean
    the same questions. mean: of accuracy over the tasks, as in the paper. version: of lm-eval.
    """

    accuracy: dict[str, float]
    stderr: dict[str, float | None]
    documents: dict[str, int]
    sources: dict[str, dict[str, Any]]
    mean: float
    version: str
    num_fewshot: dict[str, int]
    limit: int | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values by figure, for JSON."""
        return asdict(self)

    def by_task(self) -> dict[str, Any]:
        """Plain values by task, then what is common to all."""
        tasks = {
            name: {
                "acc": self.accuracy[name],
                "stderr": self.stderr[name],
                "documents": self.documents[name],
                "num_fewshot": self.num_fewshot[name],
                "source": self.sources[name],
            }
            for name in self.accuracy
        }
        return {"tasks": tasks, "average_acc": self.mean, "lm_eval": self.version, "limit": self.limit}


class Tokens:
    """A tokenizer, and the token ids of texts that it has encoded. Models that share it need not encode them again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # A copy, because lm-eval gives the tokenizer a padding token.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.known: dict[tuple[Any, ...], list[int]] = {}


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> ZeroShot:
    """Measure a model's accuracy on tasks.

    model: plain, pruned, packed or with adapters; its training mode stays as it is. tasks: names of lm-eval's tasks; "paper"
    means the paper's seven. data: folder with the tasks' documents, see `task_files`; None: from the hub. limit: only the
    first N documents of each task. num_fewshot: examples in the prompt; None: what the task says, normally none.

    batch_size: of the longest prompts.

    Errors: as `load_tasks` and `measure`.
    """
    return measure(model, Tokens(tokenizer), load_tasks(tasks, data, num_fewshot), limit, batch_size)


def load_tasks(tasks: Sequence[str], data: str | Path | None = None, num_fewshot: int | None = None) -> dict[str, Any]:
    """Load tasks with their documents, by name; arguments as for `zero_shot`. This needs no model.

    Errors: RuntimeError if lm-eval is missing; ValueError or FileNotFoundError naming the argument, or the task.
    """
    check_installed()
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks is {tasks!r}; give a list of names, for example {', '.join(PAPER)}")
    names = _expanded(tasks)
    if num_fewshot is not None:
        _checks.count("num_fewshot", num_fewshot, 0)
    with _quiet():
        found = _local(names, Path(data)) if data is not None else _of_the_hub(names)
        for name, task in found.items():
            _prepare(name, task, num_fewshot)
    return found


def check_installed() -> None:
    """Check that lm-eval is there. Errors: RuntimeError saying how to install it."""
    if find_spec("lm_eval") is None:
        raise RuntimeError('tasks need lm-eval, which is not installed: pip install "losa-oracle[eval]"')


def measure(
    model: PreTrainedModel,
    tokens: Tokens,
    tasks: dict[str, Any],
    limit: int | None = None,
    batch_size: int = 8,
) -> ZeroShot:
    """Measure a model on loaded tasks. Errors: ValueError naming limit or batch_size, or a choice that is too long."""
    if limit is not None:
        _checks.count("limit", limit)
    _checks.count("batch_size", batch_size)
    from lm_eval import evaluate

    with _quiet(), eval_mode(model):
        wrapped = language_model(model, tokens.tokenizer, tokens.known, batch_size)
        # Each task collects its requests, so the loaded ones stay as they are.
        used = {name: copy.copy(task) for name, task in tasks.items()}
        results = evaluate(wrapped, {"tasks": used, "groups": {}}, limit=limit, bootstrap_iters=1, log_samples=False)
    return _summarise(used, results, limit)


def check_tasks(tasks: Sequence[str], data: str | Path | None) -> None:
    """Check that lm-eval is there, and the files of tasks from a folder, without loading anything. Errors: as `load_tasks`."""
    check_installed()
    if data is not None:
        _check_files(_expanded(tasks), Path(data))


def _expanded(tasks: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for given in tasks for name in (PAPER if given == ALL_SEVEN else (given,))))


def _local(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Load tasks from files."""
    from lm_eval.tasks import TaskManager

    _check_files(names, folder)
    manager = TaskManager(include_path=str(LOCAL), include_defaults=False, metadata={"folder": str(folder)})
    return dict(manager.load(list(names))["tasks"])


def _check_files(names: Sequence[str], folder: Path) -> None:
    for name in names:
        if name not in PAPER:
            raise ValueError(
                f"tasks has {name}, and from tasks_data come only {', '.join(PAPER)}; leave tasks_data out, so that it "
                f"comes from the hub{closest(name, PAPER)}"
            )
        task_files.find(name, folder)


def _of_the_hub(names: Sequence[str]) -> dict[str, Any]:
    """Load lm-eval's own tasks; their data come through the hub's client, or from its cache."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if all(name in DEFINED for name in names):
        folder = Path(lm_eval.tasks.__file__).parent
        places = [str(folder / place) for place in dict.fromkeys(DEFINED[name] for name in names)]
        manager = TaskManager(include_path=places, include_defaults=False)
    else:
        manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise ValueError(f"tasks has {name}, which lm-eval does not know{closest(name, manager.all_tasks)}")
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # the hub's client raises its own classes, those of its transports, and plain ones
            raise FileNotFoundError(
                f"the documents of the task {name} cannot be loaded from the hub ({one_line(error)}); check the network, or "
                "give a folder with local files by tasks_data"
            ) from error
    return found


def _prepare(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples. Errors: ValueError if the task has no accuracy, or no examples."""
    if METRIC not in task.aggregation():
        raise ValueError(
            f"the task {name} measures {', '.join(task.aggregation())}, not accuracy ({METRIC}); leave it out"
        )
    shots = task.config.num_fewshot or 0 if num_fewshot is None else num_fewshot
    if shots and "folder" in task.config.metadata and (there := len(task.training_docs())) < shots:
        raise ValueError(
            f"num_fewshot is {shots}, and tasks_data has {there or 'no'} examples for the task {name}; put {shots} or more into "
            f"{name}_train.jsonl there"
        )
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _summarise(tasks: dict[str, Any], results: Any, limit: int | None) -> ZeroShot:
    """Build the result from lm-eval's."""
    accuracy, stderr = {}, {}
    for name in tasks:
        figures = results["results"][name]
        key = next(key for key in figures if key.partition(",")[0] == METRIC)
        error = figures[key.replace(METRIC, f"{METRIC}_stderr", 1)]
        accuracy[name] = float(figures[key])
        stderr[name] = None if isinstance(error, str) else float(error)
    return ZeroShot(
        accuracy,
        stderr,
        {name: int(results["n-samples"][name]["effective"]) for name in tasks},
        {name: _source(name, task) for name, task in tasks.items()},
        sum(accuracy.values()) / len(accuracy),
        importlib.metadata.version("lm_eval"),
        {name: task.config.num_fewshot for name, task in tasks.items()},
        limit,
    )


def _source(name: str, task: Any) -> dict[str, Any]:
    """Describe where a task's documents come from."""
    digest = hashlib.sha256()
    for request in task.instances:
        digest.update("\0".join(map(str, request.args)).encode() + b"\1")
    config, asked = task.config, {"requests_sha256": digest.hexdigest()}
    if "folder" in config.metadata:
        file = task_files.find(name, config.metadata["folder"])
        return {"file": file.name, "sha256": sha256_of(file), **asked}
    split = config.test_split or config.validation_split
    return {"hub": config.dataset_path, "config": config.dataset_name, "split": split, **asked}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs, and progress bars where no terminal shows them; leave Python's random numbers as they are."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("lm_eval", "huggingface_hub")}
    shown = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    state = random.getstate()
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        with shown:
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        random.setstate(state)
