"""Local files of the paper's seven tasks: find them in a folder, read them, check them, bring them to one form.

A file is JSON Lines and its name begins with the task's name (piqa.jsonl, piqa_plain_text.validation.jsonl). A record has
either its data set's own fields, or `query`, `choices` and `gold`. A file with the word "train" in its name gives examples for
few-shot prompts and is not measured. The form that tasks read is `query`, the whole prompt, `choices` and `gold`: lm-eval compiles
a template again for every document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch_impl.experiment.text.files import read_records

Row = Mapping[str, Any]
WORD = re.compile(r"[._-]+")
QUESTION, ANSWER = "Question: ", "\nAnswer:"


def find(task: str, folder: str | Path) -> Path:
    """Return the file of a folder that a task is measured on.

    Errors: FileNotFoundError if the folder or the file does not exist; ValueError if several files fit.
    """
    files = [file for file in _files(task, Path(folder)) if not _is_training(file)]
    if not files:
        raise FileNotFoundError(f"{folder} has no file for the task {task}; put {task}.jsonl there")
    return _only(files, task)


def load(task: str, folder: str, **_: Any) -> dict[str, Any]:
    """Load a task's splits: documents to measure, and train, which may be empty. lm-eval calls this for the tasks in tasks/.

    Errors: as `find`; ValueError naming file, line and field.
    """
    from datasets import Dataset

    training = [file for file in _files(task, Path(folder)) if _is_training(file)]
    return {
        "documents": Dataset.from_list(_read(task, find(task, folder))),
        "train": Dataset.from_list(_read(task, _only(training, task)) if training else []),
    }


def _files(task: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tasks_data is {folder}, which is not a folder; give the folder of the tasks' .jsonl files"
        )
    return sorted(file for file in folder.glob("*.jsonl") if re.match(rf"{task}[._-]", file.name))


def _is_training(file: Path) -> bool:
    return "train" in WORD.split(file.name)


def _only(files: list[Path], task: str) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{files[0].parent} has several files for the task {task}: {names}; keep one")
    return files[0]


def _read(task: str, file: Path) -> list[dict[str, Any]]:
    """Read and convert the records of a file. Errors: ValueError naming file, line and what is wrong."""
    rows = []
    for place, record in read_records(file):
        if not isinstance(record, Mapping):
            raise ValueError(f"{file}, {place} is not a record; give one JSON object per line")
        try:
            rows.append(CONVERT[task](record))
        except KeyError as error:
            raise ValueError(f"{file}, {place} has no field {error}; give the fields of {task}'s data set") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file}, {place} is not a document of {task}: {error}") from None
    if not rows:
        raise ValueError(f"{file} holds no documents; download it again")
    return rows


def _gold(value: Any, choices: int) -> int:
    """Return the index of the right choice. Errors: ValueError if there is no such choice."""
    gold = int(value)
    if not 0 <= gold < choices:
        raise ValueError(f"the answer is choice {gold}, counted from 0, of {choices}")
    return gold


def _texts(*values: Any) -> list[str]:
    for value in values:
        if not isinstance(value, str) or not value:
            raise TypeError(f"{value!r} is not a text")
    return list(values)


def _chosen(query: Any, choices: Any, gold: Any) -> dict[str, Any]:
    [text], choices = _texts(query), _texts(*choices)
    return {"query": text, "choices": choices, "gold": _gold(gold, len(choices))}


def _hellaswag(row: Row) -> dict[str, Any]:
    if "query" in row:
        return _chosen(row["query"], row["choices"], row["gold"])
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _chosen(_without_marks(context), map(_without_marks, row["endings"]), row["label"])


def _without_marks(text: str) -> str:
    """Remove the marks of WikiHow's pages, as lm-eval does: [title] ends a sentence, other brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _question(row: Row) -> dict[str, Any]:
    """OpenBookQA, whose prompt is the question alone. A `query` may be framed; the question is what is inside."""
    if "query" in row:
        question = row["query"].removeprefix(QUESTION).removesuffix(ANSWER)
        return _chosen(question, row["choices"], row["gold"])
    question = row["question_stem"] if "question_stem" in row else row["question"]
    labels, texts, key = row["choices"]["label"], row["choices"]["text"], row["answerKey"].strip()
    if key not in labels:
        raise ValueError(f"the answer {key!r} is none of the choices {labels}")
    return _chosen(question, texts, labels.index(key))


def _framed_question(row: Row) -> dict[str, Any]:
    """ARC."""
    found = _question(row)
    return {**found, "query": f"{QUESTION}{found['query']}{ANSWER}"}


def _piqa(row: Row) -> dict[str, Any]:
    goal, first, second = _texts(row["goal"], row["sol1"], row["sol2"])
    return _chosen(f"{QUESTION}{goal}{ANSWER}", (first, second), row["label"])


def _boolq(row: Row) -> dict[str, Any]:
    passage, question = _texts(row["passage"], row["question"])
    answer = row["label"] if "label" in row else row["answer"]
    return _chosen(f"{passage}\n{QUESTION}{question}?{ANSWER}", ("no", "yes"), answer)


def _winogrande(row: Row) -> dict[str, Any]:
    sentence, first, second = _texts(row["sentence"], row["option1"], row["option2"])
    before, gap, rest = sentence.partition("_")
    if not gap:
        raise ValueError("the sentence has no gap (_)")
    return {
        "contexts": [before + first, before + second],
        "rest": rest.strip(),
        "gold": _gold(int(row["answer"]) - 1, 2),
    }


CONVERT: dict[str, Callable[[Row], dict[str, Any]]] = {
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "openbookqa": _question,
    "piqa": _piqa,
    "arc_easy": _framed_question,
    "arc_challenge": _framed_question,
}
