"""Random documents of the paper's seven tasks, in their data sets' own fields, and what each task asks about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tiny_models.random_models import byte_tokenizer
from torch_impl.experiment.zero_shot import PAPER

DOCUMENTS = 26
TOKENIZER = byte_tokenizer()
SYLLABLES = ["ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve"]


def words(seed: int, least: int = 2, most: int = 9) -> str:
    """Random words, a text of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(least, most + 1, (1,), generator=generator))
    return " ".join(SYLLABLES[int(i)] for i in torch.randint(len(SYLLABLES), (count,), generator=generator))


def chosen(seed: int, texts: list[str]) -> int:
    """The right choice: mostly the shortest, which acc prefers and acc_norm does not."""
    if seed % 300:
        return min(range(len(texts)), key=lambda i: len(texts[i]))
    return int(torch.randint(len(texts), (1,), generator=torch.Generator().manual_seed(seed)))


def records(task: str) -> list[dict[str, Any]]:
    """Documents of a task in its data set's own fields."""
    return [record(task, 100 * number) for number in range(DOCUMENTS)]


def record(task: str, n: int) -> dict[str, Any]:
    four = [words(n + i, 1, 6) for i in range(1, 5)]
    if task == "hellaswag":
        context = {
            "activity_label": words(n),
            "ctx_a": f"{words(n + 7)} [title] X",
            "ctx_b": f"{words(n + 8)} [step]  b",
        }
        return {**context, "endings": [f"{text} [substeps]" for text in four], "label": str(chosen(n, four))}
    if task == "winogrande":
        options = {f"option{i}": words(n + i, 1, 2) for i in (1, 2)}
        return {
            "sentence": f"{words(n)} _ {words(n + 9)}.",
            **options,
            "answer": str(chosen(n, list(options.values())) + 1),
        }
    if task == "boolq":
        return {"passage": words(n), "question": words(n + 1), "label": chosen(n, ["no", "yes"])}
    if task == "piqa":
        return {"goal": words(n), "sol1": four[0], "sol2": four[1], "label": chosen(n, four[:2])}
    labels = ["1", "2", "3", "4"] if n % 200 else ["A", "B", "C", "D"]
    name = "question_stem" if task == "openbookqa" else "question"
    return {name: words(n), "choices": {"text": four, "label": labels}, "answerKey": labels[chosen(n, four)]}


def asked(task: str, row: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Context and continuation of each choice, and the right choice, as the papers describe the tasks."""
    if task == "hellaswag":
        first, second = row["ctx_a"].replace(" [title]", ". "), row["ctx_b"].capitalize().replace("[step]", "")
        context = f"{row['activity_label']}: {first} {second}".replace("  ", " ")
        return [(context, f" {text.removesuffix('[substeps]')}") for text in row["endings"]], int(row["label"])
    if task == "winogrande":
        before, rest = row["sentence"].split("_")
        return [(before + row[f"option{i}"], f" {rest.strip()}") for i in (1, 2)], int(row["answer"]) - 1
    if task == "boolq":
        return [(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", f" {a}") for a in ("no", "yes")], row[
            "label"
        ]
    if task == "piqa":
        return [(f"Question: {row['goal']}\nAnswer:", f" {row[name]}") for name in ("sol1", "sol2")], row["label"]
    question = row["question_stem"] if task == "openbookqa" else f"Question: {row['question']}\nAnswer:"
    choices = row["choices"]
    return [(question, f" {text}") for text in choices["text"]], choices["label"].index(row["answerKey"])


def write(folder: Path, task: str, rows: list[dict[str, Any]], name: str = "") -> Path:
    file = folder / (name or f"{task}.jsonl")
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def write_all(folder: Path) -> Path:
    """Write the documents of all seven tasks into a folder."""
    for task in PAPER:
        write(folder, task, records(task))
    return folder
