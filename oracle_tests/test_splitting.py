"""No measured document is in a calibration or training text, whatever the sources; and the report says so correctly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.experiment import config, material, report
from torch_impl.experiment.sections import TextConfig
from torch_impl.experiment.text import protocols
from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.sources import load_documents
from torch_impl.experiment.text.splitting import Texts, load_texts, separate


def same(one: Document, other: Document) -> bool:
    """Whether two documents are the same text, or answer the same prompt; ignoring white space."""

    def plain(text: str) -> str:
        return " ".join(text.split())

    prompts = plain(one.prompt), plain(other.prompt)
    if all(prompts) and prompts[0] == prompts[1]:
        return True
    if plain(one.prompt + one.text) == plain(other.prompt + other.text):
        return True
    return not all(prompts) and plain(one.text) == plain(other.text)


def overlaps(texts: Texts) -> list[tuple[Document, Document]]:
    return [(d, e) for e in texts.evaluation for d in [*texts.calibration, *texts.finetune] if same(d, e)]


# --- sources that overlap in every way ---


def stories(*numbers: int) -> list[str]:
    return [f"Story {number}.\nIt has two lines, and this is number {number}." for number in numbers]


def text_file(path: Path, texts: Sequence[str], newline: str = "\n") -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("\n<|endoftext|>\n".join(texts).replace("\n", newline).encode())
    return str(path)


def json_file(path: Path, records: Sequence[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([record if isinstance(record, dict) else {"text": record} for record in records]))
    return str(path)


def folder_of(path: str) -> str:
    return str(Path(path).parent)


def book(number: int) -> str:
    return f"Chapter of book {number}.\n" + "".join(f"Line {line} of book {number}.\n" for line in range(40))


def books(folder: Path, *numbers: int) -> str:
    for number in numbers:
        text_file(folder / f"{number}.txt", [book(number)])
    return str(folder)


def asked(*numbers: int, answer: str = "answer") -> list[dict[str, str]]:
    return [{"instruction": f"Question {number}?", "output": f"{answer} {number}"} for number in numbers]


Case = Callable[[Path], tuple[str, str | None, str]]


def of_one(write: Callable[[Path], str]) -> Case:
    """A case that reads one source for all three purposes."""

    def case(p: Path) -> tuple[str, str, str]:
        source = write(p)
        return source, source, source

    return case


# By name: calibration, fine-tuning and evaluation source, and which share of the evaluation's documents is measured.
CASES: dict[str, tuple[Case, float | None]] = {
    "the same file": (of_one(lambda p: text_file(p / "a.txt", stories(*range(40)))), 0.1),
    "a file inside the folder": (
        lambda p: (
            text_file(p / "f" / "a.txt", stories(*range(20))),
            folder_of(text_file(p / "f" / "b.txt", stories(*range(20, 60)))),
            str(p / "f" / "b.txt"),
        ),
        0.15,
    ),
    "one of ten books": (lambda p: (books(p / "b", *range(10)), str(p / "b"), str(p / "b" / "3.txt")), 1.0),
    "one of three books": (lambda p: (books(p / "b", *range(3)), str(p / "b"), str(p / "b" / "1.txt")), 1.0),
    "ten books, one of which calibrates": (lambda p: (books(p / "b", *range(10)) + "/3.txt", None, str(p / "b")), 0.9),
    "the folder of the file": (
        lambda p: (
            text_file(p / "f" / "a.txt", stories(*range(20))),
            None,
            folder_of(text_file(p / "f" / "b.txt", stories(99))),
        ),
        3 / 21,
    ),
    "the same documents in two files": (
        lambda p: (
            json_file(p / "a.json", stories(*range(30))),
            text_file(p / "b.txt", stories(*range(29, -1, -1)), newline="\r\n"),
            json_file(p / "c.json", [story.replace("\n", "  \n\n") for story in stories(*range(30))]),
        ),
        0.1,
    ),
    "a few documents in common": (
        lambda p: (
            text_file(p / "a.txt", stories(*range(50))),
            json_file(p / "b.json", [*asked(*range(9)), *stories(50)] * 2),
            text_file(p / "c.txt", stories(*range(47, 90))),
        ),
        1.0,
    ),
    "the same prompts with other answers": (
        lambda p: (
            text_file(p / "a.txt", stories(*range(9))),
            json_file(p / "b.json", asked(*range(40))),
            json_file(p / "c.json", asked(*range(40), answer="no")),
        ),
        0.1,
    ),
    "records and the plain text of them": (
        lambda p: (
            text_file(p / "a.txt", [f"answer {number}" for number in range(40)]),
            text_file(
                p / "b.txt", [f"### Instruction:\nQuestion {n}?\n\n### Response:\nanswer {n}" for n in range(40)]
            ),
            json_file(p / "c.json", asked(*range(40))),
        ),
        0.1,
    ),
    "the same hub set": (lambda p: ("hf:a/set", "hf:a/set", "hf:a/set"), 0.1),
    "a hub set by two names": (lambda p: ("c4", "alpaca-gpt4", "hf:vicgalle/alpaca-gpt4"), 0.1),
    "a split that repeats some of another": (lambda p: ("hf:a/set", None, "hf:a/set::test"), 1.0),
    "a split that nothing else reads": (lambda p: ("hf:a/set", None, "hf:a/other::test"), 1.0),
    "a named set's own split": (lambda p: ("c4", "wikitext2", "wikitext2"), 1.0),
    "a file that nothing else reads": (
        lambda p: (
            text_file(p / "a.txt", stories(*range(9))),
            None,
            text_file(p / "b.txt", stories(*range(9, 19)) * 2),
        ),
        1.0,
    ),
    "one document for all": (of_one(lambda p: text_file(p / "a.txt", [book(1)])), None),
    "one document without an end of line": (of_one(lambda p: text_file(p / "a.txt", ["word " * 100])), None),
    "one document as .raw and as .txt": (
        lambda p: (text_file(p / "a.raw", [book(1)]), text_file(p / "a.txt", [book(1)]), str(p / "a.raw")),
        None,
    ),
    "one document, and a folder with it": (
        lambda p: (text_file(p / "b" / "1.txt", [book(1)]), books(p / "b", 2, 3), str(p / "b" / "1.txt")),
        None,
    ),
    "two books that calibrate and train": (
        lambda p: (books(p / "b", 1, 2) + "/1.txt", str(p / "b" / "2.txt"), str(p / "b")),
        None,
    ),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub: splits of thirty texts, of which `test` shares two with `train`, and Alpaca's records."""
    import datasets

    def load(repo: str, config: str | None, split: str, data_files: dict[str, str] | None) -> Any:
        if "alpaca" in repo:
            return datasets.Dataset.from_list(asked(*range(30)))
        start = {"train": 0, "test": 28, "validation": 60}[split] + 100 * len(repo)
        return datasets.Dataset.from_list([{"text": story} for story in stories(*range(start, start + 30))])

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", CASES)
def test_nothing_measured_is_trained_on(name: str, tmp_path: Path) -> None:
    case, share = CASES[name]
    calibration, finetune, evaluation = case(tmp_path)
    texts = load_texts(calibration, finetune, evaluation)
    assert not overlaps(texts)
    assert texts.evaluation
    assert texts.calibration
    assert bool(texts.finetune) == (finetune is not None)
    source = load_documents(evaluation, "measure").documents
    if share is None:
        assert texts.facts["end_of_document"]
        for tail in texts.evaluation:
            [whole] = [document.text for document in source if document.text.endswith(tail.text)]
            [head] = {d.text for d in [*texts.calibration, *texts.finetune] if whole.startswith(d.text)}
            assert head + tail.text == whole
            assert 0.8 < len(head) / len(whole) <= 0.9
            assert head.endswith("\n") or "\n" not in whole
    else:
        assert len(texts.evaluation) == round(share * len(source))
        assert texts.evaluation == [document for document in source if document in texts.evaluation]

    # Of the other sources nothing is lost but what is measured.
    for own, kept, title in (
        (calibration, texts.calibration, "calibration"),
        (finetune, texts.finetune, "fine-tuning"),
    ):
        if own is not None and share is not None:
            documents = list(dict.fromkeys(load_documents(own).documents))
            assert kept == [d for d in documents if not any(same(d, e) for e in texts.evaluation)]
            assert texts.facts["documents_left_out"][title] == len(documents) - len(kept)
            assert len(documents) - len(kept) <= max(1, round(0.1 * len(documents)))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("name", CASES)
def test_what_is_said_of_the_measured_text_is_true(name: str, limit: int | None, tmp_path: Path) -> None:
    """Figures of losa_result.json, and the sentence of the report."""
    calibration, finetune, evaluation = CASES[name][0](tmp_path)
    found = material.with_text(settings(calibration, finetune, evaluation, limit), *MODEL)
    facts = found.evaluation_facts
    source = load_documents(evaluation, "measure")
    stream = len(byte_tokenizer()("".join(d.prompt + d.text for d in source.documents))["input_ids"])
    if source.protocol.joined_by is None:
        # Each document behind a token that begins it.
        stream += len(source.documents)
    else:
        stream += len(source.protocol.joined_by) * (len(source.documents) - 1)
    assert facts["protocol"] == source.protocol.name
    ids = found.evaluation
    whole = facts["documents"] == len(source.documents) and not facts["end_of_document"]
    assert facts["split"] == (source.part if whole else "held out")
    if whole and limit is None:
        # All of its tokens, but for the last window's rest.
        assert 0 <= stream - ids.numel() < ids.shape[1]
    assert (facts["windows"], facts["tokens"], facts["documents_of_source"]) == (
        len(ids),
        ids.numel(),
        len(source.documents),
    )
    said = report._measured_on(facts, "a text")
    assert ("all of it" in said) == (whole and source.part == "all of it" and limit is None)
    assert ("held out" in said) == (not whole)
    assert ("the first windows" in said) == facts["first_windows_only"] == (limit is not None)
    left_out = facts["documents_left_out"]
    assert ("removed from other texts" in said) == any(left_out.values())
    assert all((f"{count} of {title}" in said) == (count > 0) for title, count in left_out.items())


MODEL = (random_model("llama"), byte_tokenizer())


def settings(
    calibration: str, finetune: str | None, evaluation: str, limit: int | None, seed: int = 0
) -> config.Config:
    words = f"--calibration_data {calibration} --eval_data {evaluation} --nsamples 8 --seqlen 16 --rmi_samples 4"
    words += f" --eval_seqlen 16 --train_seqlen 64 --train_examples 50 --model x --seed {seed}"
    words += " --finetune false" if finetune is None else f" --finetune_data {finetune}"
    return config.parse((words + ("" if limit is None else f" --eval_windows {limit}")).split())


def test_no_measured_text_is_in_a_calibration_window_or_an_example(tmp_path: Path) -> None:
    """In what the run itself gets: token windows, decoded again."""
    source = text_file(tmp_path / "a.txt", [f"w{number:03}" * 6 for number in range(100)])
    found = material.with_text(settings(source, source, source, None), *MODEL)
    tokenizer = found.tokenizer

    def documents(rows: Sequence[torch.Tensor]) -> set[int]:
        text = [piece for row in rows for piece in tokenizer.decode(row).split("<|endoftext|>") if len(piece) > 5]
        return {number for number in range(100) if any(piece in f"w{number:03}" * 6 for piece in text)}

    measured = documents(list(found.evaluation))
    assert len(measured) >= 9
    assert len(documents(list(found.calibration))) > 3
    assert len(documents([example["input_ids"] for example in found.examples])) > 50
    assert not measured & documents(list(found.calibration))
    assert not measured & documents([example["input_ids"] for example in found.examples])


def test_no_text_that_is_measured_besides_is_in_a_calibration_window_or_an_example(tmp_path: Path) -> None:
    texts = [f"w{number:03}" * 6 for number in range(100)]
    source, other = text_file(tmp_path / "a.txt", texts), text_file(tmp_path / "b.txt", texts[40:45])
    options = settings(source, source, text_file(tmp_path / "c.txt", ["another text " * 5] * 3), None)
    # So many windows have every piece of the text.
    options = replace(options, calibration=replace(options.calibration, nsamples=200))
    found = material.with_text(options, *MODEL, {"other": material.OtherText(other)})
    parts = [found.others["other"], found.calibration, [example["input_ids"] for example in found.examples]]
    measured, *learned = ("\n".join(found.tokenizer.decode(row) for row in part) for part in parts)
    assert all(f"w{number:03}" in measured for number in range(40, 44)), "the last window is dropped"
    for text in learned:
        assert [number for number in range(30, 50) if f"w{number:03}" in text] == [*range(30, 40), *range(45, 50)]


@pytest.mark.parametrize(("more", "cut"), [(-1, True), (0, False), (1, False)])
def test_a_text_is_cut_only_if_there_is_more_of_it(more: int, cut: bool, tmp_path: Path) -> None:
    """A limit that the text just reaches leaves nothing out. Other texts have the same limit."""
    source = text_file(tmp_path / "a.txt", stories(*range(50)))
    measured = text_file(tmp_path / "b.txt", stories(*range(60, 70)))
    everything = material.with_text(settings(source, None, measured, None), *MODEL)
    windows = len(everything.evaluation)
    options = settings(source, None, measured, windows + more)
    other = {"other": material.OtherText(text_file(tmp_path / "c.txt", stories(*range(80, 110))))}
    found = material.with_text(options, *MODEL, other)
    assert len(found.evaluation) == found.evaluation_facts["windows"] == min(windows, windows + more)
    assert found.evaluation_facts["first_windows_only"] == cut
    assert len(found.others["other"]) == windows + more


def test_documents_are_counted_as_far_as_the_protocol_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(protocols.PROTOCOLS, "c4", replace(protocols.C4, documents=3))
    source = text_file(tmp_path / "a.txt", stories(*range(100)))
    options = settings(source, None, source, None)
    options = replace(options, text=replace(options.text, eval_protocol="c4"))
    assert material.with_text(options, *MODEL).evaluation_facts["documents"] == 3


def test_the_seed_draws_calibration_and_examples_and_leaves_the_measured_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The model has no files.
    monkeypatch.setattr(material.pretrained, "weights_hash", lambda _: "")
    source = text_file(tmp_path / "a.txt", stories(*range(100)))
    first, again, other = (
        material.with_text(settings(source, source, source, None, seed), *MODEL) for seed in (0, 0, 1)
    )
    for name in ("calibration_tokens_sha256", "finetune_tokens_sha256", "evaluation_tokens_sha256"):
        hashes = [
            material.environment_of(settings(source, source, source, None), m)[name] for m in (first, again, other)
        ]
        assert hashes[0] == hashes[1]
        assert (hashes[0] == hashes[2]) == (name == "evaluation_tokens_sha256"), name


def test_most_of_the_training_text_is_left_to_the_last_step() -> None:
    assert TextConfig().shares(5) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])
    assert TextConfig().shares(1) == [1.0]
    assert TextConfig().shares(20) == pytest.approx([0.05] * 20)


# --- the rule itself ---

documents = st.builds(
    Document, st.sampled_from(["a", "b", "c", "ab", "a b", " a"]), st.sampled_from(["", "", "p", "q", "p "])
)


@given(
    st.lists(st.lists(documents, min_size=1, max_size=12), min_size=1, max_size=2),
    st.lists(documents, min_size=1, max_size=12),
)
def test_any_documents_are_kept_apart(training: list[list[Document]], evaluation: list[Document]) -> None:
    sources = {str(number): documents for number, documents in enumerate(training)}
    try:
        found = separate(sources, evaluation)
    except ValueError as error:
        assert "too few documents" in str(error)  # noqa: PT017
        return
    assert found.evaluation
    for name, source in sources.items():
        kept = found.training[name]
        assert kept
        assert not [(d, e) for d in kept for e in found.evaluation if same(d, e)]
        if not found.cut:
            assert kept == [d for d in dict.fromkeys(source) if not any(same(d, e) for e in found.evaluation)]
    if not found.cut:
        shared = [e for e in evaluation if any(same(d, e) for source in training for d in source)]
        unshared = [
            e for e in evaluation if e not in shared and not any(e.prompt.strip() == s.prompt.strip() for s in shared)
        ]
        assert set(unshared) <= set(found.evaluation) <= set(evaluation)
        if len(unshared) == len(evaluation):
            assert found.evaluation == evaluation


@given(st.lists(st.text("abc ", min_size=1, max_size=3), min_size=2, max_size=60))
def test_a_source_that_does_all_gives_up_a_tenth(texts: list[str]) -> None:
    documents = [Document(text) for text in texts if text.strip()]
    unique = {" ".join(document.text.split()) for document in documents}
    assume(len(unique) >= 2 and len(unique) == len(set(documents)))
    found = separate({"it": documents}, documents)
    assert len(found.evaluation) == max(1, round(0.1 * len(unique)))
    assert {*found.training["it"], *found.evaluation} == set(documents)


@given(st.permutations(range(30)))
def test_the_split_does_not_depend_on_the_order(order: list[int]) -> None:
    documents = [Document(f"document {k}") for k in range(30)]
    shuffled = [documents[k] for k in order]
    expected = separate({"it": documents}, documents).evaluation
    assert set(separate({"it": shuffled}, shuffled).evaluation) == set(expected)


@pytest.mark.parametrize("records", [asked(1) * 3, [*asked(1), *asked(1, answer="no")]])
def test_too_few_records_to_split_are_named(records: list[dict[str, str]], tmp_path: Path) -> None:
    source = json_file(tmp_path / "a.json", records)
    with pytest.raises(
        ValueError, match=r"a\.json: too few documents to train on some and evaluate on others; give more"
    ):
        load_texts(source, None, source)


def test_the_parts_of_a_document_that_repeats_itself_are_one_text() -> None:
    with pytest.raises(ValueError, match="too few documents"):
        separate({"it": [Document("aa")]}, [Document("aa")])


def test_stdlib_measures_on_nothing_it_trains_on() -> None:
    """No document is on both sides, and few long lines are: idioms and licences."""
    texts = load_texts("stdlib", "stdlib", "stdlib")
    assert texts.facts["split"] == "held out"
    assert not any(texts.facts["documents_left_out"].values())

    def lines(documents: list[Document]) -> list[str]:
        found = (line.strip() for document in documents for line in document.text.splitlines())
        return [line for line in found if len(line) >= 50]

    known = set(lines(texts.finetune))
    seen = [line in known for line in lines(texts.evaluation)]
    assert len(seen) > 1000
    assert sum(seen) < 0.04 * len(seen)
