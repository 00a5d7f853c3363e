"""Perplexity as in the literature: tokens, windows and figures against a computation by hand, and what is said of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import torch_impl
from oracle_tests.small_runs import WORDS, arguments, make_place
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl import cli
from torch_impl.experiment.text import windows as text
from torch_impl.experiment.text.documents import Document
from torch_impl.experiment.text.protocols import C4, DOCUMENTS, WIKITEXT2, Protocol

BOS = 256
TEXTS = ["one two\n", "three", "four five six"]


def begins_by_itself() -> PreTrainedTokenizerFast:
    """A tokenizer that puts the begin-of-text token before every text, as LLaMA's does."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    return tokenizer


def ids_of(whole: str) -> list[int]:
    return [byte_tokenizer().convert_tokens_to_ids(symbol) for symbol in byte_tokenizer().tokenize(whole)]


CASES: dict[str, tuple[Protocol, bool, list[int], str]] = {
    "wikitext2": (WIKITEXT2, False, ids_of("one two\n\n\nthree\n\nfour five six"), "none"),
    "wikitext2, begun": (WIKITEXT2, True, [BOS, *ids_of("one two\n\n\nthree\n\nfour five six")], "before the text"),
    "c4": (C4, False, ids_of("one two\n three four five six"), "none"),
    "c4, begun": (C4, True, [BOS, *ids_of("one two\n three four five six")], "before the text"),
    "documents": (
        DOCUMENTS, False, [i for one in TEXTS for i in (BOS, *ids_of(one))], "before each document",
    ),
    "documents, begun": (
        DOCUMENTS, True, [i for one in TEXTS for i in (BOS, *ids_of(one))], "before each document",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seqlen", [3, 4, 5, 27])
@pytest.mark.parametrize("name", CASES)
def test_windows_are_the_joined_text_cut(name: str, seqlen: int) -> None:
    """No token is lost or added between windows; the incomplete last one is dropped."""
    protocol, begun, ids, begin = CASES[name]
    tokenizer = begins_by_itself() if begun else byte_tokenizer()
    found = text.evaluation_windows([Document(one) for one in TEXTS], tokenizer, seqlen, protocol=protocol)
    assert found.tolist() == [ids[k : k + seqlen] for k in range(0, len(ids) - seqlen + 1, seqlen)]
    assert text.describe_protocol(protocol, found, tokenizer) == {
        "protocol": protocol.name,
        "joined_by": protocol.joined_by,
        "begin_of_text": begin,
    }
    two = text.evaluation_windows([Document(one) for one in TEXTS], tokenizer, 3, 2, protocol)
    assert two.flatten().tolist() == ids[:6]


def test_c4_is_the_beginning_of_its_validation_split() -> None:
    """1,100 documents, of which at most 256 windows are measured; a limit counts windows too."""
    documents = [Document(f"{number:05}") for number in range(1200)]
    assert text.evaluation_windows(documents, byte_tokenizer(), 3, protocol=C4).shape == (256, 3)
    assert text.evaluation_windows(documents, byte_tokenizer(), 3, 300, C4).shape == (256, 3)
    assert text.evaluation_windows(documents, byte_tokenizer(), 3, 255, C4).shape == (255, 3)
    whole = text.evaluation_windows(documents, byte_tokenizer(), 1, protocol=dataclasses.replace(C4, windows=None))
    assert byte_tokenizer().decode(whole.flatten()) == " ".join(f"{number:05}" for number in range(1100))


def by_hand(model: PreTrainedModel, ids: list[int], seqlen: int) -> tuple[float, int]:
    """Perplexity and number of predictions: each token of a window from those before it in the window, in float64."""
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        for place in range(start + 1, start + seqlen):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[start:place]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[ids[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


RAW = " = Title = \n \n The first paragraph . \n The second , a little longer . \n \n"
ROWS = [" = Title = \n", "", " The first paragraph . \n", " The second , a little longer . \n", ""]


@pytest.mark.parametrize("name", ["wikitext2", "c4", "documents"])
def test_the_figure_is_that_by_hand(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From a file to the output of losa eval. The text leaves a rest of several tokens after its last window."""
    model = random_model("llama-gqa")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / ("wiki.raw" if name == "wikitext2" else "some.jsonl")
    texts = [f"{number} {WORDS}" for number in (1, 2)]
    file.write_text(RAW if name == "wikitext2" else "".join(f"{json.dumps({'text': one})}\n" for one in texts))
    ids = {
        "wikitext2": ids_of("\n\n".join(ROWS)),
        "c4": ids_of(" ".join(texts)),
        "documents": [token for one in texts for token in (BOS, *ids_of(one))],
    }[name]
    seqlen = next(length for length in range(16, 32) if len(ids) % length > 4)
    expected, predictions = by_hand(model, ids, seqlen)

    options = ["--text", str(file), "--seqlen", str(seqlen), "--batch_size", "3", "--device", "cpu"]
    options += ["--protocol", "c4"] if name == "c4" else []
    assert cli.main(["eval", str(tmp_path / "model"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("perplexity") == pytest.approx(expected, rel=1e-6)
    count = len(ids) // seqlen
    digest = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in ids[: count * seqlen])).hexdigest()
    assert found == {
        "model": str(tmp_path / "model"), "text": str(file), "protocol": name,
        "joined_by": {"wikitext2": "\n\n", "c4": " ", "documents": None}[name],
        "begin_of_text": "before each document" if name == "documents" else "none",
        "windows": count, "seqlen": seqlen, "stride": seqlen, "tokens": count * seqlen, "predicted_tokens": predictions,
        "sha256": digest,
    }  # fmt: skip
    assert cli.main(["eval", str(tmp_path / "model"), *options]) == 0
    said = capsys.readouterr().out
    assert f"(token ids {digest[:12]}). Protocol {name}, " in said
    assert f"stride {seqlen}, {predictions:,} tokens predicted." in said
    assert ("documents joined by '\\n\\n'" in said) == (name == "wikitext2")


def test_a_run_names_its_protocol(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In its result and its table; the option changes what is measured."""
    place = make_place(tmp_path)
    small = {"steps": 1, "finetune": "false", "prune_method": "magnitude", "eval_windows": 3}
    found = {}
    for name in ("documents", "c4"):
        options = {} if name == "documents" else {"eval_protocol": name}
        assert cli.main(["run", *arguments(place, output_dir=place / name, **small, **options)]) == 0
        assert f"Protocol {name}, " in capsys.readouterr().out
        found[name] = json.loads((place / name / "losa_result.json").read_text())["evaluation"]
        assert found[name]["protocol"] == name
    assert found["c4"]["sha256"] != found["documents"]["sha256"]
    assert (found["c4"]["joined_by"], found["c4"]["begin_of_text"]) == (" ", "none")
    assert [found[name]["predicted_tokens"] for name in found] == [3 * (found["c4"]["seqlen"] - 1)] * 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"text": TEXTS, "protocol": "c5"}, ValueError, "^protocol is 'c5'; allowed: wikitext2, c4, documents"),
        (
            {"text": torch.zeros(2, 4, dtype=torch.long), "protocol": "c4"},
            TypeError,
            "^protocol is given, and text is token",
        ),
        (
            {"text": TEXTS, "protocol": "c4", "seqlen": 99},
            ValueError,
            "^seqlen is 99, but text has only 28 tokens",
        ),
    ],
)
def test_bad_protocols(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_impl.evaluate(random_model("llama-gqa"), byte_tokenizer(), **given)


def test_dropout_is_off_and_modes_stay() -> None:
    model = random_model("opt", dropout=0.5)
    expected = torch_impl.evaluate(model, byte_tokenizer(), text=TEXTS, seqlen=8)
    model.train()
    model.model.decoder.layers[1].eval()
    assert torch_impl.evaluate(model, byte_tokenizer(), text=TEXTS, seqlen=8) == expected
    assert model.training
    assert not model.model.decoder.layers[1].training
    assert model.model.decoder.layers[0].training
