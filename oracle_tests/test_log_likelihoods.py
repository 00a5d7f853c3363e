"""Log-likelihoods in large batches against lm-eval's own model, which takes one small batch after the other."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from oracle_tests.task_documents import DOCUMENTS, TOKENIZER, write_all
from tiny_models.random_models import random_model
from torch_impl.experiment import log_likelihoods as subject
from torch_impl.experiment import zero_shot
from torch_impl.experiment.zero_shot import PAPER, Tokens, load_tasks, measure

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.models.huggingface import HFLM

POSITIONS = 128


def model_of(family: str = "llama-gqa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random_model(family, max_position_embeddings=POSITIONS).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("tasks"))


def requests(folder: Path) -> list[Any]:
    """What the seven tasks ask, and what is rare: no context, a space at its end, too long a context, choices of one token with
    one context, equal requests."""
    tasks = load_tasks(["paper"], folder)
    for task in tasks.values():
        task.build_all_requests(limit=6)
    asked = [request.args for task in tasks.values() for request in task.instances]
    asked += [
        ("", "abc"),
        ("a b ", "c"),
        ("ab" * POSITIONS, "cd"),
        ("one", "x"),
        ("one", "y"),
    ]
    asked += [("ab" * POSITIONS, "c" * POSITIONS), ("a b", "c"), ("a b", "c")]
    return [SimpleNamespace(args=args, task_name=None) for args in asked]


def ours(model: PreTrainedModel, size: int = 4) -> Any:
    return subject.language_model(model, copy.deepcopy(TOKENIZER), {}, size)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-gqa", torch.float32), ("opt", torch.float32), ("qwen3", torch.bfloat16)]
)
def test_answers_are_those_of_lm_eval(
    family: str, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = model_of(family, dtype), requests(folder)
    monkeypatch.setattr(subject, "AT_ONCE_ON_CPU", 10**6)
    expected = HFLM(pretrained=model, tokenizer=copy.deepcopy(TOKENIZER), batch_size=3).loglikelihood(asked, True)
    found = ours(model).loglikelihood(asked, True)
    scores, wanted = (torch.tensor([score for score, _ in answers]) for answers in (found, expected))
    if dtype == torch.bfloat16:
        # Hardly any sum rounds differently; a softmax or a sum in float32 would be rounded nowhere.
        assert torch.equal(scores, scores.bfloat16().float())
        assert (scores == wanted).float().mean() > 0.8
    torch.testing.assert_close(scores, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    if dtype == torch.float32:
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(set(scores.tolist())) > len(asked) / 2


def test_one_text_parted_at_two_places() -> None:
    """Both are scored by one row of a batch. lm-eval's model takes the wrong tokens of the shorter continuation there."""
    asked = [SimpleNamespace(args=args, task_name=None) for args in (("abc", "def"), ("abc", "d"), ("abcd", "ef"))]
    whole, first, rest = (score for score, _ in ours(model_of()).loglikelihood(asked, True))
    assert whole == pytest.approx(first + rest, rel=1e-5)


def test_what_greedy_decoding_gives() -> None:
    """A continuation is greedy if each of its tokens is, and one of two tokens is not if its first token alone is."""
    model = model_of()
    text = "de fi"
    ids = TOKENIZER(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    first = model(ids).logits[0, -1].argmax()
    second = model(torch.cat([ids, first[None, None]], 1)).logits[0, -1].argmax()
    prompt = tuple(ids[0].tolist())
    other = (int(second) + 1) % model.config.vocab_size
    wanted = [(0, [int(first)]), (1, [int(first), int(second)]), (1, [int(first), other]), (0, [other])]
    found = subject.log_likelihoods(model, [prompt, (*prompt, int(first))], wanted)
    assert [greedy for _, greedy in found] == [True, True, False, int(first) == other]


def test_batches() -> None:
    """Every input once, the longest first; as many tokens as the longest inputs have, padded, and little padding."""
    draw = random.Random(3)
    for _ in range(50):
        inputs = {
            tuple(draw.choices(range(5), k=length)): None
            for length in draw.choices(range(1, 60), k=draw.randrange(1, 80))
        }
        size, most = draw.randrange(1, 9), draw.choice([30.0, 100.0, float("inf")])
        found = list(subject.batches(inputs, size, most))
        flat = [ids for batch in found for ids in batch]
        assert sorted(flat) == sorted(inputs)
        lengths = [len(ids) for ids in flat]
        assert lengths == sorted(lengths, reverse=True)
        budget = min(size * lengths[0], most)
        for batch, after in zip(found, [*found[1:], None], strict=True):
            longest, shortest = len(batch[0]), len(batch[-1])
            assert longest * len(batch) <= max(budget, longest)
            assert shortest >= 0.8 * longest
            if after is not None and len(after[0]) >= 0.8 * longest:
                assert longest * (len(batch) + 1) > budget, "there was room for one more"
    assert list(subject.batches({}, 4)) == []


def test_only_what_is_asked_is_computed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the choices' tokens alone; few batches; a second model's texts are not encoded again."""
    model, tasks, tokens = model_of(), load_tasks(["paper"], folder), Tokens(TOKENIZER)
    rows, shapes = [], []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: rows.append(output.shape[:-1].numel()))
    model.model.register_forward_pre_hook(
        lambda _, args, named: shapes.append(named["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(subject, "AT_ONCE_ON_CPU", 10**6)
    first = measure(model, tokens, tasks, batch_size=8)
    for task in tasks.values():
        task.build_all_requests()
    asked = [request.args for task in tasks.values() for request in task.instances]
    # The tokenizer's tokens are bytes.
    assert sum(rows) == sum(len(continuation.encode()) for _, continuation in asked)
    assert len(shapes) < len(asked) / 8 / 2
    assert max(shape.numel() for shape in shapes) <= 8 * shapes[0][1]
    monkeypatch.setattr(HFLM, "tok_encode", lambda *_, **__: pytest.fail("a text is encoded again"))
    assert measure(model, tokens, tasks, batch_size=8) == first


def test_documents_have_the_same_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy by document, with our model of the language and with lm-eval's."""
    model, seen = model_of(), []
    tasks = load_tasks(["paper"], folder)

    def by_document() -> list[Any]:
        seen.clear()
        measure(model, Tokens(TOKENIZER), tasks, batch_size=4)
        return list(seen)

    plain = zero_shot.METRIC
    for task in tasks.values():
        process = task.process_results

        def watched(doc: Any, results: Any, process: Any = process) -> Any:
            found = process(doc, results)
            seen.append(found[plain])
            return found

        monkeypatch.setattr(task, "process_results", watched)
    found = by_document()
    monkeypatch.setattr(
        zero_shot, "language_model", lambda model, tokenizer, _, size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
    )  # fmt: skip
    assert found == by_document()
    assert len(found) == len(PAPER) * DOCUMENTS
    assert 0.2 < sum(found) / len(found) < 0.8


def test_choices_that_cannot_be_scored() -> None:
    for continuation in ([2] * (POSITIONS + 1), []):
        with pytest.raises(ValueError, match=f"^a choice has {len(continuation)} tokens; the model takes 1 to 128$"):
            subject.answers(model_of(), [("", [1, 2], continuation)], POSITIONS, 4)
