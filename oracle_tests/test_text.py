"""Text sources: every kind of file, splits that never overlap, windows and examples, and what is said of bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny_models import train
from tiny_models.random_models import byte_tokenizer
from torch_impl.experiment import text
from torch_impl.experiment.text import Document, load_documents

BOS = 256
RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def without_special_tokens() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)


def letters(*counts: int) -> list[Document]:
    """Documents "aaa…", "bbb…" of given lengths."""
    return [Document(chr(ord("a") + k) * count) for k, count in enumerate(counts)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- reading ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n"),
        ("a.jsonl", '{"text": "one"}\n\n{"text": "two\\nlines", "url": "x"}\n{"text": " "}\n'),
        ("a.json", '[{"text": "one"},\n {"text": "two\\nlines"}]'),
        ("a.json", '{"text": "one"}\n{"text": "two\\nlines"}'),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two\\nlines"}\n', mtime=0)),
        ("a.json.gz", gzip.compress(b'{"text": "one"}\n{"text": "two\\nlines"}\n', mtime=0)),
    ],
)
def test_every_kind_of_file(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / name, content), "all") == [Document("one"), Document("two\nlines")]


def test_parquet_and_folders(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "b.parquet")
    write(tmp_path / "c.txt", "three\n")
    write(tmp_path / "a.jsonl", '{"text": "zero"}\n')
    write(tmp_path / "README.md", "not text to learn")
    found = [document.text for document in load_documents(str(tmp_path), "all")]
    assert found == ["zero", "one", "two", "three\n"]


def test_a_text_without_separators_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    content = "\n first\n\nmentions <|endoftext|> inside \u2028 a line\n"
    assert load_documents(write(tmp_path / "a.txt", content), "all") == [Document(content)]


def test_json_strings_may_hold_separators_of_lines(tmp_path: Path) -> None:
    record = {"text": "one\u2028two\x85three"}
    path = write(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
    assert load_documents(path, "all") == [Document(record["text"])]


def test_wikitext_rows_are_joined_as_in_the_papers(tmp_path: Path) -> None:
    """Rows of the data set: an empty one for " ", otherwise the line with its end."""
    content = " \n = Title = \n \n A sentence . \n"
    expected = "\n\n".join(["", " = Title = \n", "", " A sentence . \n"])
    assert load_documents(write(tmp_path / "wiki.test.raw", content), "all") == [Document(expected)]


def test_instruction_records_become_a_prompt_and_a_text(tmp_path: Path) -> None:
    first, second = load_documents(write(tmp_path / "a.json", json.dumps(RECORDS)), "all")
    assert first == Document("3", "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert second == Document("Hello!", "### Instruction:\nSay hello.\n\n### Response:\n")


# --- splits ---


@given(st.lists(st.text("abc ", min_size=1, max_size=3), min_size=2, max_size=60))
def test_split_shares_nothing_and_loses_nothing(texts: list[str]) -> None:
    documents = [Document(text) for text in texts]
    train_side, heldout = (text.split_documents(documents, split) for split in ("train", "heldout"))
    if len(set(documents)) > 1:
        assert set(train_side) | set(heldout) == set(documents)
        assert len(heldout) == max(1, round(0.1 * len(set(documents))))
        assert not set(train_side) & set(heldout)
    for side in (train_side, heldout):
        assert len(set(side)) == len(side)


@given(st.permutations(range(30)))
def test_split_does_not_depend_on_the_order(order: list[int]) -> None:
    documents = [Document(f"document {k}") for k in range(30)]
    shuffled = [documents[k] for k in order]
    assert set(text.split_documents(shuffled, "heldout")) == set(text.split_documents(documents, "heldout"))


@given(st.lists(st.tuples(st.sampled_from("pqrstuvwxyz"), st.integers(0, 9)), min_size=2, max_size=40))
def test_records_with_one_prompt_stay_on_one_side(pairs: list[tuple[str, int]]) -> None:
    documents = [Document(str(answer), prompt) for prompt, answer in pairs]
    sides = [{d.prompt for d in text.split_documents(documents, split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("content", ["one line after the other\n" * 50, "no end of a line " * 50])
def test_a_single_document_is_cut_at_nine_tenths(content: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", content)
    (head,), (tail,) = load_documents(path, "train"), load_documents(path, "heldout")
    assert head.text + tail.text == content
    assert 0.8 < len(head.text) / len(content) <= 0.9
    assert head.text.endswith("\n") or "\n" not in content
    assert load_documents(path, "all") == [Document(content)]


def test_stdlib_measures_on_nothing_it_trains_on() -> None:
    """No document is on both sides, and few long lines are: idioms and licences."""
    train_side, heldout = load_documents("stdlib", "train"), load_documents("stdlib", "heldout")
    assert not set(train_side) & set(heldout)

    def hashes(documents: list[Document]) -> list[int]:
        lines = (line.strip() for document in documents for line in document.text.splitlines())
        return [hash(line) for line in lines if len(line) >= 50]

    known = set(hashes(train_side))
    seen = [key in known for key in hashes(heldout)]
    assert len(seen) > 1000
    assert sum(seen) < 0.04 * len(seen)


def test_loading_is_repeatable_and_a_list_of_ones_own() -> None:
    first = load_documents("stdlib", "heldout")
    first.clear()
    assert load_documents("stdlib", "heldout")


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the hub's client that writes down what it is asked for."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(repo: str, config: str | None, split: str, data_files: dict[str, str] | None) -> Any:
        asked.append((repo, config, split, data_files))
        if repo == "nobody/nothing":
            raise ConnectionError("no\nroute")
        if "alpaca" in repo:
            return datasets.Dataset.from_list([{**RECORDS[0], "input": str(k), "text": "all of it"} for k in range(20)])
        return datasets.Dataset.from_list([{"text": f"{split} {k}"} for k in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_named_data_sets_bring_their_own_split(hub: list[tuple[Any, ...]]) -> None:
    assert load_documents("c4", "train")[0] == Document("train 0")
    assert load_documents("c4", "heldout")[0] == Document("validation 0")
    rows = "\n\n".join(f"test {k}" for k in range(20))
    assert load_documents("wikitext2", "all") == load_documents("wikitext2", "heldout") == [Document(rows)]
    assert [asked[:3] for asked in hub] == [
        ("allenai/c4", None, "train"),
        ("allenai/c4", None, "validation"),
        *[("Salesforce/wikitext", "wikitext-2-raw-v1", "test")] * 2,
    ]
    assert list(hub[0][3]) == ["train"]


def test_data_sets_without_a_split_are_cut(hub: list[tuple[Any, ...]]) -> None:
    sides = [load_documents("hf:some/set:config:part", split) for split in ("train", "heldout")]
    assert [len(side) for side in sides] == [18, 2]
    assert hub[0] == ("some/set", "config", "part", None)
    assert load_documents("hf:some/set", "all")[0] == Document("train 0")


def test_local_files_come_before_the_hub(hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    write(tmp_path / "c4" / "shard.jsonl", '{"text": "local"}\n')
    assert load_documents("c4", "all") == [Document("local")]
    assert not hub


def test_a_hub_that_cannot_be_reached_says_what_to_do(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*ConnectionError: no route.*or a local file") as error:
        load_documents("hf:nobody/nothing", "train")
    assert "\n" not in str(error.value)


def test_alpaca_of_the_hub_has_instructions_although_a_text_field_is_there(hub: list[tuple[Any, ...]]) -> None:
    assert len(load_documents("alpaca-gpt4", "train")) == 18
    assert all(document.prompt for document in load_documents("alpaca-gpt4", "heldout"))


# --- windows and examples ---


def test_evaluation_windows_are_the_stream_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text.evaluation_windows(letters(5, 4), tokenizer, 3)
    a, b = ord("a"), ord("b")
    decoded = [
        [{tokenizer.convert_tokens_to_ids(c): ord(c) for c in "ab"}.get(i, i) for i in row] for row in windows.tolist()
    ]
    assert decoded == [[BOS, a, a], [a, a, a], [BOS, b, b]]
    assert text.evaluation_windows(letters(5, 4), tokenizer, 3, limit=2).tolist() == windows[:2].tolist()


def test_joined_documents_are_one(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = text.evaluation_windows(letters(2, 2), tokenizer, 7, join="\n\n").tolist()
    assert tokenizer.decode(row) == "<|endoftext|>aa\n\nbb"


def test_a_tokenizer_without_special_tokens_adds_none() -> None:
    plain = without_special_tokens()
    (row,) = text.evaluation_windows(letters(2, 2), plain, 4).tolist()
    assert plain.decode(row) == "aabb"
    (example,) = text.training_examples([Document("3", "1+2=")], plain, 8, 0)
    assert example["labels"].tolist() == [-100] * 4 + plain("3")["input_ids"]


def test_calibration_windows_are_parts_of_the_stream(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document(f"{k:02d}" * 9) for k in range(40)]
    windows = text.calibration_windows(documents, tokenizer, 16, 10, seed=1)
    assert windows.shape == (16, 10)
    assert windows.dtype == torch.long
    for row in windows:
        pieces = tokenizer.decode(row).split("<|endoftext|>")
        assert all(any(piece in document.text for document in documents) for piece in pieces)
    assert torch.equal(windows, text.calibration_windows(documents, tokenizer, 16, 10, seed=1))
    assert not torch.equal(windows, text.calibration_windows(documents, tokenizer, 16, 10, seed=2))


def test_a_text_of_one_window_is_drawn_again_and_again(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text.calibration_windows(letters(3), tokenizer, 5, 4, seed=0)
    assert windows.tolist() == [windows[0].tolist()] * 5


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 9), st.integers(0, 3))
def test_packed_examples_are_the_stream_s_windows_shuffled(lengths: list[int], seqlen: int, seed: int) -> None:
    tokenizer = byte_tokenizer()
    total = sum(lengths) + len(lengths)
    if total < seqlen:
        return
    documents = [Document(chr(ord("!") + k) * length) for k, length in enumerate(lengths)]
    examples = text.training_examples(documents, tokenizer, seqlen, seed)
    assert len(examples) == total // seqlen
    assert all(len(e["input_ids"]) == seqlen and torch.equal(e["input_ids"], e["labels"]) for e in examples)
    learnt = torch.cat([e["input_ids"] for e in examples])
    for document in documents:
        (symbol,) = set(tokenizer(document.text)["input_ids"])
        assert int((learnt == symbol).sum()) <= len(document.text)
    assert total - len(learnt) < seqlen
    again = text.training_examples(documents, tokenizer, seqlen, seed)
    assert [e["input_ids"].tolist() for e in again] == [e["input_ids"].tolist() for e in examples]


@given(st.integers(1, 20), st.integers(0, 9))
def test_a_limit_takes_the_stream_s_first_windows(limit: int, seed: int) -> None:
    tokenizer = byte_tokenizer()
    documents = letters(*[6] * 20)
    few = text.training_examples(documents, tokenizer, 7, seed, limit=limit)
    assert len(few) == limit
    rows = {tuple(e["input_ids"].tolist()) for e in few}
    assert len(rows) == limit
    assert rows <= {tuple(e["input_ids"].tolist()) for e in text.training_examples(documents, tokenizer, 7, seed)}


def test_prompts_carry_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = text.training_examples([Document("yes", "well? ")], tokenizer, 64, 0)
    assert tokenizer.decode(example["input_ids"]) == "<|endoftext|>well? yes<|endoftext|>"
    learnt = example["labels"] != -100
    assert learnt.tolist() == [False] * 7 + [True] * 4
    assert torch.equal(example["labels"][learnt], example["input_ids"][learnt])


def test_long_records_are_cut_and_hopeless_ones_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("yes" * 9, "well? "), Document("no", "a long question " * 9)]
    (example,) = text.training_examples(documents, tokenizer, 12, 0)
    assert tokenizer.decode(example["input_ids"]) == "<|endoftext|>well? yesye"
    with pytest.raises(ValueError, match="seqlen = 5 leaves no token to learn"):
        text.training_examples(documents, tokenizer, 5, 0)


def test_unpacked_documents_are_one_example_each(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = text.training_examples(letters(*range(1, 41)), tokenizer, 20, 0, packed=False)
    assert sorted(len(e["input_ids"]) for e in examples) == sorted(min(20, k + 2) for k in range(1, 41))
    assert len(text.training_examples(letters(*range(1, 41)), tokenizer, 20, 0, packed=False, limit=33)) == 33


@given(st.integers(5, 60), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_parts_are_disjoint_and_complete(count: int, weights: list[int]) -> None:
    examples = [{"input_ids": torch.tensor([k]), "labels": torch.tensor([k])} for k in range(count)]
    shares = [weight / sum(weights) for weight in weights]
    if min(shares) * count < 1:
        return
    parts = text.split_parts(examples, shares)
    assert [int(e["input_ids"]) for part in parts for e in part] == list(range(count))
    assert all(abs(len(part) - share * count) <= 1 for part, share in zip(parts, shares, strict=True))


def test_description_names_the_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = letters(5, 4)
    windows = text.evaluation_windows(documents, tokenizer, 3)
    said = text.describe_windows("here", documents, windows)
    digest = hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in windows.flatten())).hexdigest()
    assert said == {"source": "here", "documents": 2, "windows": 3, "seqlen": 3, "tokens": 9, "sha256": digest}
    assert text.describe_windows("here", documents, windows + 1)["sha256"] != digest


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl, line 2: .*allowed: one JSON record a line"),
        ("a.json", '[{"text": "a"},\n {"text" 1}]', r"a\.json, line 2: .*allowed: a JSON list"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b"}',
            r"a\.jsonl, line 2: field 'instruction' is missing among \['body'\]",
        ),
        ("a.jsonl", '{"text": 7}', r"line 1: field 'text' is int; allowed: text, or instruction"),
        ("a.jsonl", "7", r"line 1: a record is int; allowed: fields text"),
        ("a.json", '[{"instruction": "a", "output": null}]', r"record 1: field 'output' is NoneType"),
        ("a.json", '[{"instruction": "a", "input": 3, "output": "b"}]', r"record 1: field 'input' is int"),
        ("a.txt", b"\xff\xfe", r"a\.txt has a bad byte at 0; allowed: text in UTF-8"),
        ("a.json.gz", b"nothing packed", r"a\.json\.gz cannot be unpacked"),
        ("a.parquet", b"nothing of it", r"a\.parquet cannot be read"),
        ("a.csv", "a,b", r"a\.csv is of no known kind; allowed: \.txt"),
        ("a.txt", " \n", r"holds no text for split = 'all'; allowed: at least one document"),
        ("a.jsonl", "", r"holds no text for split = 'all'"),
    ],
)
def test_bad_files_are_named_in_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_documents(write(tmp_path / name, content), "all")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "split", "error", "message"),
    [
        ("nowhere/a.txt", "all", FileNotFoundError, "source = 'nowhere/a.txt' does not exist; allowed: an existing"),
        ("missing.jsonl", "all", FileNotFoundError, "does not exist"),
        (
            "wikitext",
            "all",
            ValueError,
            "source = 'wikitext'; allowed: stdlib, a file .*c4, wikitext2, alpaca-gpt4, hf:",
        ),
        ("", "all", ValueError, "source = ''; allowed"),
        ("hf:", "all", ValueError, r"allowed: hf:repo\[:config\]\[:split\]"),
        ("hf:a/b:c:d:e", "all", ValueError, r"allowed: hf:repo\[:config\]\[:split\]"),
        ("stdlib", "test", ValueError, "split = 'test'; allowed: 'train', 'heldout', 'all'"),
    ],
)
def test_bad_sources_are_named(source: str, split: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_documents(source, split)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no text files; allowed: \.txt"):
        load_documents(str(tmp_path), "all")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_too_few_records_to_split_are_named(split: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps(RECORDS[:1] * 3))
    if split == "train":
        with pytest.raises(ValueError, match="holds no text for split = 'train'"):
            load_documents(path, split)
    else:
        assert len(load_documents(path, split)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: text.calibration_windows(letters(5), t, 2, 7, 0),
            "seqlen = 7 is longer than the text; .*its 6 tokens",
        ),
        (lambda t: text.calibration_windows([], t, 2, 7, 0), "seqlen = 7 is longer than the text; .*its 0 tokens"),
        (lambda t: text.calibration_windows(letters(5), t, 0, 2, 0), "nsamples is 0; allowed: 1 or more"),
        (lambda t: text.calibration_windows(letters(5), t, 1, 0, 0), "seqlen is 0; allowed: 1 or more"),
        (lambda t: text.evaluation_windows(letters(5), t, 7), "seqlen = 7 is longer than the text"),
        (lambda t: text.evaluation_windows(letters(5), t, 2, limit=0), "limit is 0; allowed: 1 or more"),
        (lambda t: text.training_examples(letters(5), t, 7, 0), "seqlen = 7 is longer than the text"),
        (lambda t: text.training_examples(letters(5), t, 1, 0), "seqlen is 1; allowed: 2 or more"),
        (lambda t: text.training_examples(letters(5), t, 2, 0, limit=-1), "limit is -1; allowed: 1 or more"),
        (lambda t: text.split_parts([{}] * 9, []), r"shares = \[\]; allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 9, [0.5, 0.6]), "allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 9, [1.5, -0.5]), "allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 2, [0.25] * 4), "examples has 2, too few for shares"),
    ],
)
def test_bad_arguments_are_named(
    call: Callable[[PreTrainedTokenizerFast], object], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


# --- real files ---


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("LOSA_REALDATA")
    if not folder:
        pytest.skip("LOSA_REALDATA, a folder of real texts, is not set")
    return Path(folder) / "text"


@pytest.mark.parametrize(
    ("name", "documents"), [("tinystories.txt", 1817), ("c4_demo.jsonl", 300), ("alpaca_5000.json", 4998)]
)
def test_real_documents(real: Path, name: str, documents: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Counts of their own description; two Alpaca records have no output."""
    path = str(real / name)
    assert len(load_documents(path, "all")) == documents
    train_side, heldout = load_documents(path, "train"), load_documents(path, "heldout")
    assert not set(train_side) & set(heldout)
    assert len(heldout) == pytest.approx(documents / 10, rel=0.02)
    examples = text.training_examples(train_side, tokenizer, 1024, 0, limit=100)
    assert len(examples) == 100
    assert text.calibration_windows(train_side, tokenizer, 8, 128, 0).shape == (8, 128)


def test_real_alpaca_records_keep_their_answers(real: Path) -> None:
    path = real / "alpaca_5000.json"
    documents = load_documents(str(path), "all")
    records = [record for record in json.loads(path.read_text()) if record["output"].strip()]
    tokenizer = AutoTokenizer.from_pretrained(Path(train.__file__).parent / "stdlib_llama")
    for document, record in zip(documents[:50], records, strict=False):
        (example,) = text.training_examples([document], tokenizer, 4096, 0)
        learnt = example["input_ids"][example["labels"] != -100]
        assert tokenizer.decode(learnt) == record["output"] + tokenizer.eos_token
        assert record["instruction"] in tokenizer.decode(example["input_ids"])


def test_real_wikitext_has_the_rows_of_its_data_set(real: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (document,) = load_documents(str(real / "wiki.test.raw"), "all")
    raw = (real / "wiki.test.raw").read_text()
    rows = ["" if line == " " else line + "\n" for line in raw.split("\n")[:-1]]
    assert len(rows) == 4358
    assert document.text == "\n\n".join(rows)
    windows = text.evaluation_windows([document], tokenizer, 2048)
    assert len(windows) == (len(document.text.encode()) + 1) // 2048
