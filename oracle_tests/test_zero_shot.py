"""Zero-shot accuracy by lm-eval against a loop over log-likelihoods; of models of every kind; losa eval --tasks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

import torch_impl
from oracle_tests.task_documents import DOCUMENTS, TOKENIZER, asked, records, write_all
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl import cli
from torch_impl.engine.adapted_linear import adapters, attach_adapters, merge_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment import zero_shot as subject
from torch_impl.experiment.zero_shot import PAPER, load_tasks, zero_shot

pytest.importorskip("lm_eval", reason="needs the extra eval")


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("tasks"))


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


def test_the_mean_is_over_tasks_however_long_they_are() -> None:
    """A task of 8 documents counts as much as one of 2; acc_norm is not acc; one document has no standard error."""

    def task(name: str) -> Any:
        config = SimpleNamespace(
            metadata={}, dataset_path=name, dataset_name=None, test_split="test", validation_split=None, num_fewshot=0
        )
        return SimpleNamespace(config=config, instances=[])

    figures = {
        "short": {"acc_norm,none": 0.9, "acc,none": 0.5, "acc_stderr,none": 0.25, "acc_norm_stderr,none": 0.1},
        "long": {"acc,none": 1.0, "acc_stderr,none": 0.125},
        "single": {"acc,none": 0.0, "acc_stderr,none": "N/A"},
    }
    counts = {"short": (2, 5), "long": (8, 8), "single": (1, 9)}
    results = {
        "results": figures,
        "n-samples": {name: {"effective": used, "original": there} for name, (used, there) in counts.items()},
    }
    found = subject._summarise({name: task(name) for name in figures}, results, 8)
    assert found.accuracy == {"short": 0.5, "long": 1.0, "single": 0.0}
    assert found.stderr == {"short": 0.25, "long": 0.125, "single": None}
    assert found.documents == {"short": 2, "long": 8, "single": 1}
    assert (found.mean, found.limit) == (0.5, 8)


def test_the_hash_is_of_every_prompt_and_choice_in_order() -> None:
    def digest(*requests: tuple[str, str]) -> str:
        config = SimpleNamespace(
            metadata={}, dataset_path="", dataset_name=None, test_split="test", validation_split=None
        )
        task = SimpleNamespace(config=config, instances=[SimpleNamespace(args=request) for request in requests])
        return str(subject._source("any", task)["requests_sha256"])

    one, two = ("a", "b"), ("c", "d")
    found = [digest(one, two), digest(two, one), digest(one), digest(("a", "B"), two), digest(("ab", ""), two)]
    assert len(set(found)) == 5
    assert digest(one, two) == found[0]


@pytest.mark.parametrize(("asked", "used"), [(None, 5), (0, 0), (2, 2)])
def test_examples_are_the_task_s_unless_a_number_is_given_even_0(asked: int | None, used: int) -> None:
    config: dict[str, int] = {}
    seeds: list[int] = []
    task = SimpleNamespace(
        aggregation=lambda: {"acc": sum}, config=SimpleNamespace(num_fewshot=5, metadata={}),
        set_config=lambda key, value: config.update({key: value}), set_fewshot_seed=lambda seed: seeds.append(seed),
    )  # fmt: skip
    subject._prepare("any", task, asked)
    assert config == {"num_fewshot": used}
    assert seeds == [1234], "lm-eval's own, so that its examples are the same"


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


# --- what is refused ---


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
