"""Zero-shot accuracy by lm-eval against a loop over log-likelihoods; prompts against those of lm-eval's own tasks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import random
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

import torch_impl
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl import cli
from torch_impl.engine.adapted_linear import adapters, attach_adapters, merge_adapters
from torch_impl.engine.decoder import Decoder
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
    golds = [measured.doc_to_text(d) if task == "winogrande" else measured.doc_to_target(d) for d in measured.eval_docs]
    assert golds == [asked(task, row)[1] for row in records(task)]


# --- models of every kind ---


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """The model with adapters of LoSA that change what it says."""
    decoder = Decoder(model)
    attach_adapters(decoder, scale=2.0)
    for seed, layer in enumerate(adapters(model)):
        layer.resize(3, (seed,))
        with torch.no_grad():
            layer.B.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def figures(model: Any, folder: Path) -> dict[str, Any]:
    tasks = ["piqa", "openbookqa", "arc_easy"]
    found = torch_impl.evaluate(model, TOKENIZER, tasks=tasks, tasks_data=folder)
    assert "perplexity" not in found
    return found


def test_merged_packed_and_unmerged_models(folder: Path, tmp_path: Path) -> None:
    """An unmerged model is measured as it is, with its adapters; merged it says the same, and packed too."""
    before = figures(random_model("llama-gqa", max_position_embeddings=256), folder)
    unmerged = adapted(random_model("llama-gqa", max_position_embeddings=256))
    found = figures(unmerged, folder)
    assert len(adapters(unmerged)) > 0
    assert found["tasks"] != before["tasks"], "the adapters are ignored"
    merge_adapters(Decoder(unmerged))
    assert figures(unmerged, folder) == found
    torch_impl.pack(unmerged, tmp_path / "packed", TOKENIZER)
    assert figures(torch_impl.load_packed(tmp_path / "packed", "cpu"), folder) == found


# peft asks transformers for a name of the past.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_of_peft(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra baselines")
    wrapped = peft.get_peft_model(
        random_model("llama-gqa", max_position_embeddings=256),
        peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    found = figures(wrapped, folder)
    assert found["tasks"] != figures(random_model("llama-gqa", max_position_embeddings=256), folder)["tasks"]
    assert figures(wrapped.merge_and_unload(), folder) == found
    text = torch_impl.evaluate(wrapped, TOKENIZER, text=["some text"], seqlen=4)
    assert set(text) >= {"perplexity", "protocol"}


def test_nothing_is_changed_or_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Modes, the tokenizer's padding, random numbers and logs are as before; standard error stays empty."""
    model = random_model("llama-gqa", max_position_embeddings=256).train()
    model.model.layers[0].eval()
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    state = torch.get_rng_state()
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, levels = random.getstate(), [logging.getLogger(name).level for name in ("lm_eval", "huggingface_hub")]
    zero_shot(model, tokenizer, ["piqa"], folder, limit=2)
    assert random.getstate() == before
    assert np.random.random() == np.random.RandomState(5).random()  # noqa: NPY002
    assert [logging.getLogger(name).level for name in ("lm_eval", "huggingface_hub")] == levels
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token is None
    assert model.training
    assert not model.model.layers[0].training
    assert capsys.readouterr() == ("", "")


# --- where documents come from ---


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


def hub(monkeypatch: pytest.MonkeyPatch, **found: Any) -> list[tuple[Any, ...]]:
    """A stand-in for the hub. Returns what it is asked for."""
    seen: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        seen.append((path, name))
        if isinstance(found["data"], Exception):
            raise found["data"]
        return found["data"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


def test_a_task_of_the_hub(model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures and the same requests as from a file, and the source by name."""
    data = Dataset.from_list(records("arc_easy"))
    seen = hub(monkeypatch, data=dict.fromkeys(("train", "validation", "test"), data))
    found = zero_shot(model, TOKENIZER, ["arc_easy"], limit=20)
    local = zero_shot(model, TOKENIZER, ["arc_easy"], folder, limit=20)
    assert seen == [("allenai/ai2_arc", "ARC-Easy")]
    assert (found.accuracy, found.stderr, found.documents) == (local.accuracy, local.stderr, {"arc_easy": 20})
    [source], [file] = found.sources.values(), local.sources.values()
    asked = source.pop("requests_sha256")
    assert source == {"hub": "allenai/ai2_arc", "config": "ARC-Easy", "split": "test"}
    digest = hashlib.sha256((folder / "arc_easy.jsonl").read_bytes()).hexdigest()
    assert file == {"file": "arc_easy.jsonl", "sha256": digest, "requests_sha256": asked}
    assert zero_shot(model, TOKENIZER, ["arc_easy"], limit=19).sources["arc_easy"]["requests_sha256"] != asked
    assert found.version == importlib.metadata.version("lm_eval")
    assert found.as_dict()["accuracy"] == found.accuracy
    assert found.by_task()["tasks"]["arc_easy"]["acc"] == found.accuracy["arc_easy"]


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
        r"^num_fewshot is 1, and tasks_data has no examples for the task piqa; put piqa_train",
        num_fewshot=1,
    )
    write(tmp_path, "piqa", [GOOD], "piqa_test.jsonl")
    refused(ValueError, r"has several files for the task piqa: piqa\.jsonl, piqa_test\.jsonl; keep one$")


def test_bad_arguments_are_named(model: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in (
        ({"tasks": []}, r"^tasks is \[\]; give a list of names"),
        ({"tasks": "piqa"}, "^tasks is 'piqa'; give a list of names"),
        ({"tasks": ["pica"]}, "^tasks has pica, and from tasks_data come only hellaswag, .*did you mean piqa"),
        ({"num_fewshot": -1}, "^num_fewshot is -1"),
        ({"limit": 0}, "^limit is 0"),
        ({"batch_size": 0}, "^batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(**{"model": model, "tokenizer": TOKENIZER, "tasks": ["piqa"], "data": folder, **given})
    with pytest.raises(ValueError, match=r"^tasks are text and tokenizer is missing"):
        torch_impl.evaluate(model, tasks=["piqa"], tasks_data=folder)
    rows = Dataset.from_list([{"question": "1 + 1", "answer": "2 #### 2"}])
    hub(monkeypatch, data={"train": rows, "test": rows})
    monkeypatch.setitem(subject.DEFINED, "gsm8k", "gsm8k")
    with pytest.raises(ValueError, match=r"^the task gsm8k measures exact_match, not accuracy \(acc\); leave it out$"):
        load_tasks(["gsm8k"])


def test_the_command(model: PreTrainedModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """All seven tasks in the paper's order, beside a perplexity; JSON and table have the library's figures."""
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text to measure")
    options = [
        "eval",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--tasks",
        "paper",
        "--tasks_data",
        str(folder),
        "--limit",
        "9",
    ]
    expected = torch_impl.evaluate(model, TOKENIZER, tasks=["paper"], tasks_data=folder, limit=9)
    assert list(expected["tasks"]) == list(PAPER)
    assert expected["average_acc"] == pytest.approx(sum(t["acc"] for t in expected["tasks"].values()) / 7, rel=1e-12)
    assert cli.main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "model"), **expected}
    assert cli.main([*options, "--text", str(tmp_path / "text.txt"), "--seqlen", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model: perplexity ")
    assert lines[1] == "model: zero-shot accuracy"
    for name, line in zip(PAPER, lines[3:10], strict=True):
        acc, error = expected["tasks"][name]["acc"], expected["tasks"][name]["stderr"]
        assert line.split()[:5] == [name, f"{acc:.2%}", "±", f"{error:.2%}", "9"]
        assert f"{name}.jsonl (sha256 " in line
    assert lines[10].split()[:2] == ["average", f"{expected['average_acc']:.2%}"]
    assert "lm-eval" in lines[10]
    assert "the first 9 documents" in lines[10]


def test_what_the_command_refuses_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """There is no such model, and it is not what the message is about."""

    def refused(*words: str) -> str:
        assert cli.main(["eval", "no/model", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert refused("--limit", "3") == "error: limit is about tasks, which is not measured here; add --tasks"
    assert (
        refused("--tasks", "piqa", "--seqlen", "3")
        == "error: seqlen is about text, which is not measured here; add --text"
    )
    assert refused("--protocol", "c5").startswith("error: protocol is 'c5'; allowed: wikitext2, c4, documents")
    assert "has no file for the task piqa" in refused("--tasks", "piqa", "--tasks_data", str(folder.parent))
    hub(monkeypatch, data=ConnectionError("no network"))
    assert refused("--tasks", "piqa") == (
        "error: the documents of the task piqa cannot be loaded from the hub (ConnectionError: no network); check the network, "
        "or give a folder with local files by tasks_data"
    )
    monkeypatch.setattr(subject, "find_spec", lambda _: None)
    assert refused("--tasks", "piqa") == (
        'error: tasks need lm-eval, which is not installed: pip install "losa-oracle[eval]"'
    )
