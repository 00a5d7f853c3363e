"""Zero-shot accuracy by lm-eval against a loop over log-likelihoods; prompts against those of lm-eval's own tasks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.experiment import zero_shot as subject
from torch_impl.experiment.zero_shot import PAPER, load_tasks, zero_shot

pytest.importorskip("lm_eval", reason="needs the extra eval")

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


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Token by token; in float64 from the logits on."""
    first, ids = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in (context, context + continuation))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for place in range(len(first), len(ids)):
        row = logits[place - 1]
        total += float(row[ids[place]] - torch.log(torch.exp(row).sum()))
    return total


def write(folder: Path, task: str, rows: list[dict[str, Any]], name: str = "") -> Path:
    file = folder / (name or f"{task}.jsonl")
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven tasks in their data sets' own fields."""
    made = tmp_path_factory.mktemp("tasks")
    for task in PAPER:
        write(made, task, records(task))
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model("llama-gqa", max_position_embeddings=256)


@pytest.mark.parametrize("task", ["piqa", "winogrande", "openbookqa"])
def test_accuracy_is_that_of_a_loop(task: str, model: PreTrainedModel, folder: Path) -> None:
    """Two choices, WinoGrande's partial evaluation, four choices."""
    right, by_length = 0, 0
    for row in records(task):
        pairs, gold = asked(task, row)
        scores = [log_likelihood(model, *pair) for pair in pairs]
        right += max(range(len(scores)), key=scores.__getitem__) == gold
        mean = [score / len(pair[1]) for score, pair in zip(scores, pairs, strict=True)]
        by_length += max(range(len(mean)), key=mean.__getitem__) == gold
    share = right / DOCUMENTS
    found = zero_shot(model, TOKENIZER, [task], folder)
    assert found.accuracy == {task: share}
    assert found.mean == share
    assert found.stderr[task] == pytest.approx(math.sqrt(share * (1 - share) / (DOCUMENTS - 1)), rel=1e-12)
    assert found.documents == {task: DOCUMENTS}
    assert 0 < right < DOCUMENTS
    # WinoGrande scores the same text for both choices.
    assert task == "winogrande" or right != by_length, "these documents cannot tell acc from acc_norm"


def requests(tasks: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    for task in tasks.values():
        task.build_all_requests()
    return {name: [request.args for request in task.instances] for name, task in tasks.items()}


def theirs(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's own task, whatever it says, on given documents."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / subject.DEFINED[task]
    manager = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)
    data = Dataset.from_list(rows)
    changed = {"task": task, "custom_dataset": lambda **_: dict.fromkeys(("train", "validation", "test"), data)}
    tasks: dict[str, Any] = manager.load([{"group": "theirs", "task": [changed]}])["tasks"]
    tasks[task].set_config(key="num_fewshot", value=0)
    return tasks


@pytest.mark.parametrize("task", PAPER)
def test_prompts_are_those_of_lm_eval(task: str, folder: Path) -> None:
    """And those that the papers describe, written again here."""
    ours = requests(load_tasks([task], folder))
    assert ours == requests(theirs(task, records(task)))
    assert ours[task] == [pair for row in records(task) for pair in asked(task, row)[0]]
    [measured] = load_tasks([task], folder).values()
    golds = [
        measured.doc_to_text(d) if task == "winogrande" else measured.doc_to_target(d) for d in measured.test_docs()
    ]
    assert golds == [asked(task, row)[1] for row in records(task)]
