"""The corpus, the random tiny models, and the embedded model with the script that trained it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import corpus, train
from tiny_models.random_models import FAMILIES, byte_tokenizer, random_model, save_random_model

EMBEDDED = Path(train.__file__).parent / "stdlib_llama"


# --- the corpus ---


def library(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(tag: str, count: int = 12) -> str:
    return "".join(f"value_{tag}_{k} = compute_the_{tag}({k}, {k * k})\n" for k in range(count))


def names_on(split: corpus.Split, count: int) -> list[str]:
    """File names that the hash puts on one side."""
    names = (f"module{k}.py" for k in range(1000))
    return [n for n in names if corpus._is_heldout(n) == (split == "heldout")][:count]


def test_corpus_splits_are_disjoint_sorted_and_of_the_promised_size() -> None:
    train_side, heldout, everything = (corpus.documents(split) for split in ("train", "heldout", "all"))
    for side in (train_side, heldout, everything):
        names = [name for name, _ in side if name != corpus.TOPICS]
        assert names == sorted(names)
        assert all(len(text) >= corpus.SHORTEST for _, text in side)
    assert not {name for name, _ in train_side} & {name for name, _ in heldout}
    assert {name for name, _ in train_side + heldout} <= {name for name, _ in everything}
    characters = [sum(len(text) for _, text in side) for side in (train_side, heldout)]
    assert characters[0] > 4e6
    assert 0.03 < characters[1] / sum(characters) < 0.2
    assert corpus.documents("heldout") == heldout


def test_corpus_leaves_out_what_only_some_machines_have(tmp_path: Path) -> None:
    kept, *_ = names_on("train", 1)
    root = library(
        tmp_path,
        {
            kept: lines("a"),
            "copy_of_it.py": lines("a"),
            "short.py": "x = 1\n",
            "latin.py": b"# \xe9\n" + lines("b").encode(),
            "site-packages/numpy.py": lines("c"),
            "test/test_it.py": lines("d"),
            "email/tests/mails.py": lines("e"),
            "encodings/cp437.py": lines("f"),
            "_sysconfigdata_linux.py": lines("g"),
            "config-3.11/makesetup.py": lines("h"),
            "notes.txt": lines("i"),
            "pydoc_data/topics.py": f"topics = {{'if': {lines('reference')!r}}}\n",
        },
    )
    found = dict(corpus.documents("all", root))
    assert list(found.values()) == [lines("a"), lines("reference")]
    assert corpus.documents("train", root)[-1] == (corpus.TOPICS, lines("reference"))


def test_heldout_files_that_repeat_training_text_are_dropped(tmp_path: Path) -> None:
    (first,), (same, fresh) = names_on("train", 1), names_on("heldout", 2)
    root = library(tmp_path, {first: lines("a"), same: lines("a") + lines("b"), fresh: lines("c", 30) + lines("a", 1)})
    assert [name for name, _ in corpus.documents("heldout", root)] == [fresh]
    assert len(corpus.documents("all", root)) == 3


def test_modules_that_became_packages_keep_their_side(tmp_path: Path) -> None:
    """zipfile.py, training text of the embedded model, is zipfile/__init__.py since Python 3.12."""
    root = library(tmp_path, {"zipfile/__init__.py": lines("a"), "zipfile/_path/__init__.py": lines("b")})
    assert len(corpus.documents("train", root)) == 2


def test_corpus_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no Python sources"):
        corpus.documents("train", tmp_path)
    with pytest.raises(ValueError, match="split is 'test'; allowed: train, heldout, all"):
        corpus.documents("test")  # type: ignore[arg-type]


# --- random models ---


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_finite_repeatable_and_survive_saving(family: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    model = random_model(family, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(random_model(family, seed=3)(input_ids=ids).logits, logits, rtol=0, atol=0)
        assert not torch.equal(random_model(family, seed=4)(input_ids=ids).logits, logits)
        folder = save_random_model(tmp_path / family, family, seed=3)
        again = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1 == model.config.bos_token_id
    assert list(folder.glob("*.safetensors"))


def test_random_models_take_overrides_and_name_what_is_wrong() -> None:
    model = random_model("llama", dtype=torch.float64, num_hidden_layers=5, vocab_size=64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (len(model.model.layers), model.config.vocab_size) == (5, 64)
    with pytest.raises(ValueError, match="family is 'gpt'; allowed: llama, "):
        random_model("gpt")


@given(st.text())
def test_byte_tokenizer_keeps_every_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


# --- the embedded model and its training ---


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "  héllo\t漢字 😀\r\n\x00", "<|endoftext|>x", ""])
def test_embedded_tokenizer_keeps_every_text(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 0, train.VOCABULARY)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_embedded_model_is_small_and_has_learnt() -> None:
    """On held-out text it is far better than the bigram model of its card (75), on any version of Python."""
    assert (EMBEDDED / "model.safetensors").stat().st_size < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert model.dtype == torch.float32
    assert all(torch.isfinite(p).all() for p in model.parameters())
    texts = [text for _, text in corpus.documents("heldout")]
    stream = train.token_stream(tokenizer, texts)
    windows = stream[: len(stream) // train.WINDOW * train.WINDOW].view(-1, train.WINDOW)
    loss = train.mean_loss(model, windows[:: max(1, len(windows) // 64)].flatten())
    assert math.exp(loss) < 30


def test_baselines_are_what_a_person_counts() -> None:
    train_ids, heldout = np.array([0, 1, 0, 1, 0]), np.array([0, 1])
    total = 5 + train.VOCABULARY
    unigram = [4 / total, 3 / total]
    assert train.unigram_loss(train_ids, heldout) == pytest.approx(-np.log(unigram).mean())
    # After 0 always comes 1, so the more the pairs weigh, the better: 0.9 of the nine weights.
    assert train.bigram_loss(train_ids, heldout) == pytest.approx(-np.log(0.9 + 0.1 * unigram[1]))


def test_training_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second), (held,) = names_on("train", 2), names_on("heldout", 1)
    root = library(tmp_path / "lib", {first: lines("a", 60), second: lines("b", 60), held: lines("c", 60)})
    options = f"--output_dir {tmp_path / 'out'} --stdlib {root} --device cpu --steps 2 --batch 2 --python 3.x"
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    train.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "the weights are as readable as the rest"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(lines("é"))["input_ids"]) == lines("é")
    assert model.num_parameters() == 1_738_880
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| **this model** |" in card
    assert "Python 3.x" in card
    assert "2 steps of 2 windows" in card
