"""Windows of tokens and training examples, and errors for bad arguments."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny_models import train
from tiny_models.random_models import byte_tokenizer
from torch_impl.engine import distributed
from torch_impl.experiment.text import windows as text
from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.protocols import WIKITEXT2
from torch_impl.experiment.text.sources import load_documents

BOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def without_special_tokens() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)


def letters(*counts: int) -> list[Document]:
    """Documents "aaa…", "bbb…" of given lengths."""
    return [Document(chr(ord("a") + k) * count) for k, count in enumerate(counts)]


def test_evaluation_windows_are_the_stream_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text.evaluation_windows(letters(5, 4), tokenizer, 3)
    a, b = ord("a"), ord("b")
    decoded = [
        [{tokenizer.convert_tokens_to_ids(c): ord(c) for c in "ab"}.get(i, i) for i in row] for row in windows.tolist()
    ]
    assert decoded == [[BOS, a, a], [a, a, a], [BOS, b, b]]
    assert text.evaluation_windows(letters(5, 4), tokenizer, 3, limit=2).tolist() == windows[:2].tolist()


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


@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_windows_do_not_overlap_while_the_text_lasts(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """95 different tokens hold ten windows of nine; what is drawn beyond them begins elsewhere."""
    documents = [Document("".join(map(chr, range(ord("!"), ord("!") + 94))))]
    windows = text.calibration_windows(documents, tokenizer, 27, 9, seed)
    first, second = windows[:10], windows[10:20]
    assert len(set(first.flatten().tolist())) == 90
    assert len(set(second[:9].flatten().tolist())) == 81
    assert {row[0] for row in first.tolist()} != {row[0] for row in second.tolist()}
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())
    assert text.calibration_windows(documents, tokenizer, 7, 9, seed).tolist() == windows[:7].tolist()


def test_a_text_of_one_window_is_drawn_again_and_again(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text.calibration_windows(letters(3), tokenizer, 5, 4, seed=0)
    assert windows.tolist() == [windows[0].tolist()] * 5


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(2, 9), st.integers(0, 3))
def test_packed_examples_are_the_stream_s_windows_shuffled(lengths: list[int], seqlen: int, seed: int) -> None:
    tokenizer = byte_tokenizer()
    total = sum(lengths) + len(lengths)
    assume(total >= seqlen)
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


def test_long_records_are_cut_and_hopeless_ones_left_out(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    documents = [Document("yes" * 9, "well? "), Document("no", "a long question " * 9)]
    (example,) = text.training_examples(documents, tokenizer, 12, 0)
    assert tokenizer.decode(example["input_ids"]) == "<|endoftext|>well? yesye"
    assert "skipped 1 of 2 documents: no token to learn within train_seqlen 12" in caplog.text
    with pytest.raises(ValueError, match="train_seqlen is 5, no longer than the shortest prompt"):
        text.training_examples(documents, tokenizer, 5, 0)


def test_documents_with_prompts_are_one_example_each(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document(document.text, "?") for document in letters(*range(1, 41))]
    examples = text.training_examples(documents, tokenizer, 20, 0)
    assert sorted(len(e["input_ids"]) for e in examples) == sorted(min(20, k + 3) for k in range(1, 41))
    assert len(text.training_examples(documents, tokenizer, 20, 0, limit=33)) == 33


def test_a_text_shorter_than_asked_for_is_told_with_numbers(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 tokens are three windows of four. Nothing is said if the text has enough, or nothing is asked for."""
    records = [Document("yes", "well? ")] * 3

    def said(work: Callable[[], object]) -> list[str]:
        caplog.clear()
        work()
        return caplog.messages

    assert said(lambda: text.calibration_windows(letters(11), tokenizer, 4, 4, 0, "calibration_data 'x'")) == [
        "nsamples is 4, but calibration_data 'x' has only 3 windows of 4 tokens; further ones overlap them"
    ]
    assert said(lambda: text.training_examples(letters(11), tokenizer, 4, 0, 4, "train")) == [
        "train_examples is 4, but train has only 3 windows of 4 tokens, which are all used"
    ]
    assert said(lambda: text.training_examples(records, tokenizer, 64, 0, 10_000, "train")) == [
        "train_examples is 10,000, but train has only 3 records to learn, which are all used"
    ]
    for enough in (
        lambda: text.calibration_windows(letters(11), tokenizer, 3, 4, 0),
        lambda: text.training_examples(letters(11), tokenizer, 4, 0, 3),
        lambda: text.training_examples(letters(11), tokenizer, 4, 0),
        lambda: text.training_examples(records, tokenizer, 64, 0, 3),
        lambda: text.training_examples(records, tokenizer, 64, 0),
    ):
        assert said(enough) == []
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    assert said(lambda: text.calibration_windows(letters(11), tokenizer, 4, 4, 0)) == []


def test_a_text_that_begins_with_the_special_token_gets_no_second_one(tokenizer: PreTrainedTokenizerFast) -> None:
    """Chat templates and some corpora write it out; nor does one that ends with the end of text."""
    token = tokenizer.bos_token
    plain, written = [Document("aa")], [Document(f"{token}aa")]
    for windows in (
        text.evaluation_windows(written, tokenizer, 3),
        text.calibration_windows(written, tokenizer, 1, 3, 0),
    ):
        assert windows.tolist() == text.evaluation_windows(plain, tokenizer, 3).tolist()
    [example] = text.training_examples([Document(f"yes{token}", f"{token}well? ")], tokenizer, 64, 0)
    [expected] = text.training_examples([Document("yes", "well? ")], tokenizer, 64, 0)
    assert example["input_ids"].tolist() == expected["input_ids"].tolist()
    assert example["labels"].tolist() == expected["labels"].tolist()


@given(st.integers(5, 60), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_parts_are_disjoint_and_complete(count: int, weights: list[int]) -> None:
    examples = [{"input_ids": torch.tensor([k]), "labels": torch.tensor([k])} for k in range(count)]
    shares = [weight / sum(weights) for weight in weights]
    assume(min(shares) * count >= 1)
    parts = text.split_parts(examples, shares)
    assert [int(e["input_ids"]) for part in parts for e in part] == list(range(count))
    assert all(abs(len(part) - share * count) <= 1 for part, share in zip(parts, shares, strict=True))


def test_description_names_the_windows(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = text.evaluation_windows(letters(5, 4), tokenizer, 3)
    said = text.describe_windows(windows)
    digest = hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in windows.flatten())).hexdigest()
    counts = {"windows": 3, "seqlen": 3, "stride": 3, "tokens": 9, "predicted_tokens": 6}
    assert said == {**counts, "sha256": digest}
    assert text.describe_windows(windows + 1)["sha256"] != digest


# --- bad arguments ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: text.calibration_windows(letters(5), t, 2, 7, 0),
            "^seqlen is 7, but the text has only 6 tokens: too few for one window; give more text or a smaller seqlen$",
        ),
        (
            lambda t: text.calibration_windows([], t, 2, 7, 0),
            "^seqlen is 7, but the text has only 0 tokens",
        ),
        (lambda t: text.calibration_windows(letters(5), t, 0, 2, 0), "nsamples is 0; allowed: 1 or more"),
        (lambda t: text.calibration_windows(letters(5), t, 1, 0, 0), "seqlen is 0; allowed: 1 or more"),
        (lambda t: text.evaluation_windows(letters(5), t, 7), "^eval_seqlen is 7, but the text has only 6 tokens"),
        (
            lambda t: text.evaluation_windows(letters(5), t, 7, protocol=WIKITEXT2, name="text 'a'", option="seqlen"),
            "^seqlen is 7, but text 'a' has only [56] tokens.* a smaller seqlen$",
        ),
        (lambda t: text.evaluation_windows(letters(5), t, 2, limit=0), "limit is 0; allowed: 1 or more"),
        (lambda t: text.training_examples(letters(5), t, 7, 0), "^train_seqlen is 7, but the text has only 6 tokens"),
        (lambda t: text.training_examples(letters(5), t, 1, 0), "seqlen is 1; allowed: 2 or more"),
        (lambda t: text.training_examples(letters(5), t, 2, 0, limit=-1), "limit is -1; allowed: 1 or more"),
        (lambda t: text.split_parts([{}] * 9, []), r"shares is \[\]; allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 9, [0.5, 0.6]), "allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 9, [1.5, -0.5]), "allowed: positive numbers with sum 1"),
        (lambda t: text.split_parts([{}] * 2, [0.25] * 4), "2 training examples are too few for one part per step"),
    ],
)
def test_bad_arguments_are_named(
    call: Callable[[PreTrainedTokenizerFast], object], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


# --- real files ---


def test_real_alpaca_records_keep_their_answers() -> None:
    if "LOSA_REALDATA" not in os.environ:
        pytest.skip("LOSA_REALDATA, a folder of real texts, is not set")
    path = Path(os.environ["LOSA_REALDATA"]) / "text" / "alpaca_5000.json"
    documents = load_documents(str(path)).documents
    records = [record for record in json.loads(path.read_text()) if record["output"].strip()]
    tokenizer = AutoTokenizer.from_pretrained(Path(train.__file__).parent / "stdlib_llama")
    for document, record in zip(documents[:50], records, strict=False):
        (example,) = text.training_examples([document], tokenizer, 4096, 0)
        learnt = example["input_ids"][example["labels"] != -100]
        assert tokenizer.decode(learnt) == record["output"] + tokenizer.eos_token
        assert record["instruction"] in tokenizer.decode(example["input_ids"])
