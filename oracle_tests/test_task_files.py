"""The tasks that read local files: prompts against those of lm-eval's own tasks, forms of records, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from oracle_tests.task_documents import asked, record, records, write, write_all
from torch_impl.experiment.zero_shot import DEFINED, PAPER, load_tasks

pytest.importorskip("lm_eval", reason="needs the extra eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("tasks"))


def requests(tasks: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    for task in tasks.values():
        task.build_all_requests()
    return {name: [request.args for request in task.instances] for name, task in tasks.items()}


def theirs(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's own task, whatever it says, on given documents."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / DEFINED[task]
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
    golds = [measured.doc_to_text(d) if task == "winogrande" else measured.doc_to_target(d) for d in measured.eval_docs]
    assert golds == [asked(task, row)[1] for row in records(task)]


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "arc_challenge", "openbookqa"])
def test_a_second_form_of_records(task: str, folder: Path, tmp_path: Path) -> None:
    """query, choices and gold: the prompt's frame is taken off first, so the prompts are the same."""
    rows = []
    for row in records(task):
        pairs, gold = asked(task, row)
        query = f"Question: {pairs[0][0]}\nAnswer:" if task == "openbookqa" else pairs[0][0]
        rows.append({"query": query, "choices": [text.removeprefix(" ") for _, text in pairs], "gold": gold})
    write(tmp_path, task, rows, f"{task}_test.docs.jsonl")
    ours, own = load_tasks([task], tmp_path), load_tasks([task], folder)
    assert requests(ours) == requests(own)
    assert list(ours[task].eval_docs) == list(own[task].eval_docs)


def test_examples_in_the_prompt(folder: Path, tmp_path: Path) -> None:
    """From the training file, the ones that lm-eval would take."""
    write(tmp_path, "piqa", records("piqa"), "piqa_validation.jsonl")
    write(tmp_path, "piqa", records("piqa")[:5], "piqa.train.jsonl")
    own = theirs("piqa", records("piqa"))
    other = theirs("piqa", records("piqa")[:5])["piqa"]
    own["piqa"].sampler = other.sampler
    own["piqa"].set_config(key="num_fewshot", value=2)
    own["piqa"].set_fewshot_seed(seed=1234)
    ours = load_tasks(["piqa"], tmp_path, num_fewshot=2)
    found = requests(ours)["piqa"]
    assert all(prompt.count("Question: ") == 3 for prompt, _ in found)
    assert {"piqa": found} == requests(own)


# --- what is refused ---

GOOD = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
BAD_RECORDS: dict[str, tuple[str, Any, str]] = {
    "a field is missing": ("piqa", {"goal": "a", "sol1": "b", "label": 0}, "line 2 has no field 'sol2'; give the fields of piqa"),
    "not a record": ("piqa", [1], "line 2 is not a record"),
    "no such choice": ("piqa", {**GOOD, "label": 2}, "line 2 is not a document of piqa: the answer is choice 2, counted"),
    "no answer": ("piqa", {**GOOD, "label": ""}, "line 2 is not a document of piqa: invalid literal"),
    "no text": ("piqa", {**GOOD, "goal": ""}, "line 2 is not a document of piqa: '' is not a text"),
    "no gap": ("winogrande", {"sentence": "a b", "option1": "a", "option2": "b", "answer": "1"}, "has no gap"),
    "WinoGrande counts from 1": (
        "winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "0"}, "the answer is choice -1",
    ),
    "no such label": (
        "arc_easy", {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}, "the answer 'B' is none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_are_named(name: str, tmp_path: Path) -> None:
    task, row, message = BAD_RECORDS[name]
    file = write(tmp_path, task, [record(task, 0), row])
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2 ")) as caught:
        load_tasks([task], tmp_path)
    assert message in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, **given: Any) -> None:
        with pytest.raises(error, match=message):
            load_tasks(**{"tasks": ["piqa"], "data": tmp_path, **given})

    refused(FileNotFoundError, r"has no file for the task piqa; put piqa\.jsonl there$")
    refused(FileNotFoundError, "^tasks_data is .*, which is not a folder", data=tmp_path / "no")
    (tmp_path / "piqa.jsonl").write_text("")
    refused(ValueError, r"piqa\.jsonl holds no documents")
    (tmp_path / "piqa.jsonl").write_text("{")
    refused(ValueError, r"piqa\.jsonl, line 1 is not a JSON record")
    write(tmp_path, "piqa", [GOOD])
    refused(
        ValueError,
        r"^num_fewshot is 1, and tasks_data has no examples for the task piqa; put 1 or more into piqa_train",
        num_fewshot=1,
    )
    write(tmp_path, "piqa", [GOOD], "piqa_train.jsonl")
    refused(ValueError, r"^num_fewshot is 2, and tasks_data has 1 examples for the task piqa; put 2", num_fewshot=2)
    write(tmp_path, "piqa", [GOOD], "piqa_test.jsonl")
    refused(ValueError, r"has several files for the task piqa: piqa\.jsonl, piqa_test\.jsonl; keep one$")
