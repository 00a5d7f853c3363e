"""Text sources: every kind of file and record, the hub, and errors for bad input."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.records import document_of
from torch_impl.experiment.text.sources import load_documents

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(source: str | Path) -> list[Document]:
    return load_documents(str(source)).documents


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
    assert read(write(tmp_path / name, content)) == [Document("one"), Document("two\nlines")]


def test_parquet_and_folders(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "b.parquet")
    write(tmp_path / "c.txt", "three\n")
    write(tmp_path / "a.jsonl", '{"text": "zero"}\n')
    write(tmp_path / "README.md", "not text to learn")
    found = [document.text for document in read(tmp_path)]
    assert found == ["zero", "one", "two", "three\n"]


def test_a_text_without_separators_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    content = "\n first\n\nmentions <|endoftext|> inside \u2028 a line\n"
    assert read(write(tmp_path / "a.txt", content)) == [Document(content)]


def test_json_strings_may_hold_separators_of_lines(tmp_path: Path) -> None:
    record = {"text": "one\u2028two\x85three"}
    path = write(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=False) + "\n")
    assert read(path) == [Document(record["text"])]


def test_wikitext_rows_are_joined_as_in_the_papers(tmp_path: Path) -> None:
    """Rows of the data set: an empty one for " ", otherwise the line with its end."""
    content = " \n = Title = \n \n A sentence . \n"
    expected = "\n\n".join(["", " = Title = \n", "", " A sentence . \n"])
    assert read(write(tmp_path / "wiki.test.raw", content)) == [Document(expected)]


def test_instruction_records_become_a_prompt_and_a_text(tmp_path: Path) -> None:
    first, second = read(write(tmp_path / "a.json", json.dumps(RECORDS)))
    assert first == Document("3", "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert second == Document("Hello!", "### Instruction:\nSay hello.\n\n### Response:\n")


NEWLINES = [
    ("a.txt", "one\n<|endoftext|>\ntwo\n\nlines\n<|endoftext|>\n"),
    ("a.txt", "no separators\n\nat all\n"),
    ("wiki.raw", " \n = Title = \n \n A sentence . \n Another . \n"),
    ("a.jsonl", '{"text": "one\\ntwo"}\n\n{"instruction": "a\\nb", "output": "c\\nd"}\n'),
    ("a.json", '[{"text": "one\\ntwo"},\n {"text": "three"}]\n'),
]


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
@pytest.mark.parametrize(("name", "content"), NEWLINES)
def test_ends_of_lines_of_every_system_give_the_same_documents(
    name: str, content: str, newline: str, tmp_path: Path
) -> None:
    """In the file and, escaped, in the strings of records."""
    expected = read(write(tmp_path / name, content))
    assert not any("\r" in document.text + document.prompt for document in expected)
    escaped = content.replace("\\n", json.dumps(newline)[1:-1])
    assert read(write(tmp_path / name, escaped.replace("\n", newline))) == expected
    assert read(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())) == expected


@pytest.mark.parametrize(("name", "content"), NEWLINES)
def test_nothing_is_lost_without_a_last_end_of_line(name: str, content: str, tmp_path: Path) -> None:
    expected = [document.text.rstrip("\n") for document in read(write(tmp_path / name, content))]
    assert [document.text.rstrip("\n") for document in read(write(tmp_path / name, content.rstrip("\n")))] == expected


def test_a_last_row_without_its_end_is_a_row(tmp_path: Path) -> None:
    with_end = read(write(tmp_path / "a.raw", " \n = Title = \n \n The last row . \n"))
    assert with_end == read(write(tmp_path / "a.raw", " \n = Title = \n \n The last row . "))
    assert with_end[0].text.endswith(" The last row . \n")


ASKED = "### Instruction:\nTwo?\n\n### Response:\n"
CHAT = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
WHOLE = "### System:\nBe brief.\n\n### Instruction:\nOne?\n\n### Response:\n1\n\n" + ASKED


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Two?", "output": "2", "history": None, "system": None}, ASKED),
        ({"instruction": "Two?", "output": "2", "history": [], "system": ""}, ASKED),
        ({"instruction": "Two?", "output": "2", "history": [["One?", "1"]], "system": "Be brief."}, WHOLE),
        ({"messages": [{"role": role, "content": said} for role, said in CHAT]}, WHOLE),
        ({"messages": [{"role": role, "content": said} for role, said in [*CHAT, ("user", "Three?")]]}, WHOLE),
        ({"conversations": [{"from": role, "value": said} for role, said in CHAT], "text": "passed over"}, WHOLE),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": {"user": "human", "assistant": "gpt"}[role], "value": said} for role, said in CHAT[1:]
                ],
            },
            WHOLE,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Two?"},
                    {"role": "assistant", "content": None},
                    {"role": "tool", "content": "2"},
                    {"role": "assistant", "content": "2"},
                ]
            },
            "### Instruction:\nTwo?\n\n### Tool:\n2\n\n### Response:\n",
        ),
        ({"instruction": "", "output": "2"}, ""),
        ({"messages": None, "text": "2"}, ""),
    ],
)
def test_all_of_a_conversation_is_used(record: dict[str, Any], prompt: str) -> None:
    """The last answer is the text; what was said before it, and the system's words, are its prompt."""
    assert document_of(record) == Document("2", prompt)


# --- the hub ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the hub's client that records requests."""
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
    assert load_documents("c4").documents[0] == Document("train 0")
    found = load_documents("c4", "measure")
    assert (found.documents[0], found.part) == (Document("validation 0"), "validation split")
    found = load_documents("wikitext2", "measure")
    assert (found.documents, found.part) == ([Document("\n\n".join(f"test {k}" for k in range(20)))], "test split")
    assert [asked[:3] for asked in hub] == [
        ("allenai/c4", None, "train"),
        ("allenai/c4", None, "validation"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ]
    assert list(hub[0][3]) == ["train"]


def test_other_data_sets_are_what_they_are_asked_for(hub: list[tuple[Any, ...]]) -> None:
    assert len(load_documents("hf:some/set:config:part", "measure").documents) == 20
    assert hub[0] == ("some/set", "config", "part", None)
    assert read("hf:some/set")[0] == Document("train 0")


def test_local_files_come_before_the_hub(hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    write(tmp_path / "c4" / "shard.jsonl", '{"text": "local"}\n')
    assert read("c4") == [Document("local")]
    assert not hub


def test_a_hub_that_cannot_be_reached_says_what_to_do(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nobody/nothing.*ConnectionError: no route.*or give a local file"
    ) as error:
        load_documents("hf:nobody/nothing")
    assert "\n" not in str(error.value)


def test_alpaca_of_the_hub_has_instructions_although_a_text_field_is_there(hub: list[tuple[Any, ...]]) -> None:
    assert all(document.prompt for document in load_documents("alpaca-gpt4", "measure").documents)


def test_loading_is_repeatable_and_a_list_of_ones_own() -> None:
    first = load_documents("stdlib", "measure").documents
    first.clear()
    assert load_documents("stdlib", "measure").documents


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl, line 2 is not a JSON record: "),
        ("a.json", '[{"text": "a"},\n {"text" 1}]', r"a\.json, line 2 is not a JSON list of records: "),
        (
            "a.jsonl",
            '{"text": "a"}\n{"body": "b"}',
            r"line 2: the record has body but none of text, instruction, messages, conversations; rename one to text",
        ),
        ("a.jsonl", '{"output": "b"}', r"field 'instruction' is missing among \['output'\]; give text, or"),
        ("a.jsonl", '{"text": 7}', r"line 1: field 'text' is int; give text, or instruction"),
        ("a.jsonl", "7", r"line 1: the record is int; give it the fields text"),
        ("a.json", '[{"instruction": "a", "output": null}]', r"record 1: field 'output' is NoneType"),
        ("a.json", '[{"instruction": "a", "input": 3, "output": "b"}]', r"record 1: field 'input' is int"),
        ("a.json", '[{"instruction": "a", "system": 3, "output": "b"}]', r"record 1: field 'system' is int"),
        (
            "a.json",
            '[{"instruction": "a", "history": [["b"]], "output": "c"}]',
            r"field 'history' is not a list of pairs",
        ),
        ("a.json", '[{"instruction": "a", "history": [["b", 2]], "output": "c"}]', r"field 'history' is int"),
        ("a.json", '[{"messages": "hello"}]', r"record 1: field 'messages' is not a list of records: \[{'role'"),
        ("a.json", '[{"messages": []}]', r"record 1: field 'messages' has no answer; it needs a turn with role"),
        ("a.json", '[{"messages": [{"role": "user", "content": "a"}]}]', r"field 'messages' has no answer"),
        ("a.json", '[{"messages": [{"content": "a"}]}]', r"field 'messages, role' is NoneType"),
        ("a.json", '[{"messages": [{"role": "assistant", "content": [1]}]}]', r"field 'messages, content' is list"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text \(byte 0\); convert it"),
        ("a.json.gz", b"nothing packed", r"a\.json\.gz is truncated or corrupt, or not a gzip file"),
        ("a.parquet", b"nothing of it", r"a\.parquet is truncated or corrupt, or not a parquet file"),
        ("a.csv", "a,b", r"a\.csv has an unknown file type; allowed: \.txt"),
        ("a.txt", " \n", r"holds no text; give a source with at least one document"),
        ("a.jsonl", "", r"holds no text"),
    ],
)
def test_bad_files_are_named_in_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere/a.txt", FileNotFoundError, "source is 'nowhere/a.txt', which does not exist; give an existing"),
        ("missing.jsonl", FileNotFoundError, "does not exist"),
        ("wikitext", ValueError, "source is 'wikitext'; allowed: stdlib, c4, wikitext2, alpaca-gpt4, a file .*, hf:"),
        ("wikitext", ValueError, r"; did you mean wikitext2\?$"),
        ("", ValueError, "source is ''; allowed"),
        ("hf:", ValueError, r"allowed: hf:repo\[:config\]\[:split\]"),
        ("hf:a/b:c:d:e", ValueError, r"allowed: hf:repo\[:config\]\[:split\]"),
    ],
)
def test_bad_sources_are_named(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_documents(source)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no text files; put files of a known type there: \.txt"):
        load_documents(str(tmp_path))


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
def test_real_documents(real: Path, name: str, documents: int) -> None:
    """Counts of their own description; two Alpaca records have no output."""
    assert len(read(real / name)) == documents


def test_real_wikitext_has_the_rows_of_its_data_set(real: Path) -> None:
    (document,) = read(real / "wiki.test.raw")
    raw = (real / "wiki.test.raw").read_text()
    rows = ["" if line == " " else line + "\n" for line in raw.split("\n")[:-1]]
    assert len(rows) == 4358
    assert document.text == "\n\n".join(rows)
