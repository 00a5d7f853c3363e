"""The library: ten lines from a transformers model to a packed one, whatever form text comes in, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import torch_impl
from oracle_tests.small_runs import WORDS, arguments, make_place
from torch_impl import api, losa
from torch_impl.commands.run import main
from torch_impl.engine import training
from torch_impl.engine.adapted_linear import attach_adapters
from torch_impl.engine.batches import IGNORED
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.resume.run_folder import CHECKPOINTS
from torch_impl.experiment import arguments as arguments_of
from torch_impl.experiment.planning import checks
from torch_impl.experiment.text import given as given_of
from torch_impl.experiment.text.records import document_of

TEXTS = [f"{WORDS}{number} {WORDS[number % 50 :]}" for number in range(40)]
RECORDS = [{"instruction": f"say {number}", "output": f"{WORDS}{number}"} for number in range(30)]
CHATS = [
    {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
    for r in RECORDS
]
SMALL: dict[str, Any] = {
    "nsamples": 6,
    "seqlen": 32,
    "rmi_samples": 4,
    "steps": 2,
    "train_examples": 24,
    "train_seqlen": 128,
}
SHAPE: dict[str, Any] = {name: SMALL[name] for name in ("steps", "train_examples")} | {"train_seqlen": 16}
IDS = torch.arange(128).view(4, 32) % 100
DECIDED = ("nsamples", "seqlen", "train_examples", "train_seqlen")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any]:
    folder = make_place(tmp_path_factory.mktemp("library")) / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(loaded: tuple[PreTrainedModel, Any]) -> PreTrainedModel:
    return copy.deepcopy(loaded[0])


@pytest.fixture
def tokenizer(loaded: tuple[PreTrainedModel, Any]) -> Any:
    return loaded[1]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def share_of_zeros(model: PreTrainedModel) -> float:
    found = Decoder(model).weights
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


# --- the ten lines ---


def test_from_a_model_to_a_packed_one(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    steps: list[torch_impl.StepRecord] = []
    losses: list[tuple[int, int, float, float]] = []
    result = torch_impl.prune(
        model, tokenizer, calibration=TEXTS, train=RECORDS, sparsity=0.6, learning_rate=1e-2,
        on_step=steps.append, on_loss=lambda *heard: losses.append(heard), **SMALL,
    )  # fmt: skip
    assert result.model is model
    assert not any("adapted" in type(module).__name__.lower() for module in model.modules())
    assert result.sparsity == share_of_zeros(model) == pytest.approx(0.6, abs=0.02)
    assert [step.step for step in result.steps] == [step.step for step in steps] == [1, 2]
    assert len(losses) == sum(len(step.losses) for step in result.steps) > 2
    assert result.settings["prune"]["sparsity_ratio"] == 0.6
    assert result.settings["calibration"]["nsamples"] == 6
    json.dumps(result.settings, allow_nan=False)
    prompt = tokenizer("the quick", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in weights(again).items())

    sizes = torch_impl.pack(model, tmp_path / "packed", tokenizer=tokenizer)
    assert sum(size.after for size in sizes) < sum(size.before for size in sizes)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed").get_vocab() == tokenizer.get_vocab()
    packed = torch_impl.load_packed(tmp_path / "packed", device="cpu")
    assert torch.equal(packed.generate(**prompt, max_new_tokens=4, do_sample=False), text)
    assert torch_impl.load_packed(tmp_path / "packed", "cpu", torch.float16).dtype == torch.float16
    torch_impl.pack(tmp_path / "plain", tmp_path / "again")
    expected = torch_impl.evaluate(model, tokenizer, text=TEXTS, seqlen=16)
    assert torch_impl.evaluate(packed, tokenizer, text=TEXTS, seqlen=16)["perplexity"] == pytest.approx(
        expected["perplexity"], rel=1e-5
    )


def test_the_library_and_the_command_line_give_the_same_bits(tmp_path: Path) -> None:
    """The texts of the command line are split from its evaluation text first, so both get the same windows as token ids."""
    place = make_place(tmp_path)
    assert main(arguments(place, finetune="false", steps=2)) == 0
    model, tokenizer = (kind.from_pretrained(place / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    from torch_impl.experiment.config import parse
    from torch_impl.experiment.material import load_material

    windows = load_material(parse(arguments(place, finetune="false", steps=2))).calibration
    torch_impl.prune(model, tokenizer, calibration=windows, steps=2, rmi_samples=4)
    other = AutoModelForCausalLM.from_pretrained(place / "out" / "model")
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(model).items())
    # Rates by mutual information are part of LoSA: without training they are for those who ask.
    rates = [record["sparsity"] for record in json.loads((place / "out" / "steps.json").read_text())]
    assert all(max(step) - min(step) < 1e-9 for step in rates)
    asked = torch_impl.prune(other, calibration=windows, steps=1, layer_sparsity="rmi", sparsity=0.8)
    assert asked.settings["prune"]["layer_sparsity"] == "rmi"
    assert max(asked.steps[0].sparsity) - min(asked.steps[0].sparsity) > 1e-3


# --- forms of text ---


def pruned(model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> dict[str, Any]:
    """What Algorithm 1 gets of these arguments."""
    got: dict[str, Any] = {}

    def caught(_: PreTrainedModel, windows: torch.Tensor, parts: list[Any], *rest: Any) -> list[Any]:
        got.update(windows=windows, examples=[example for part in parts for example in part])
        return []

    monkeypatch.setattr(losa, "run", caught)
    without = given.pop("without", ())
    options = {name: value for name, value in SMALL.items() if name not in without}
    torch_impl.prune(model, tokenizer, **{"calibration": TEXTS, **options, **given})
    return got


def test_token_ids_are_used_as_they_are(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(20, (5, 9), generator=torch.Generator().manual_seed(0))
    for given in (ids, ids.numpy(), ids.to(torch.int32)):
        got = pruned(model, None, monkeypatch, calibration=given, train=given, steps=1, without=DECIDED)
        assert torch.equal(got["windows"], ids)
        assert torch.equal(torch.stack([example["labels"] for example in got["examples"]]), ids)
    labels = [IGNORED, 3, 4]
    tokenized = [{"input_ids": [1, 3, 4], "labels": labels}, {"input_ids": torch.tensor([5, 6])}]
    got = pruned(model, None, monkeypatch, calibration=ids, train=tokenized, steps=1, without=DECIDED)
    assert [example["labels"].tolist() for example in got["examples"]] == [labels, [5, 6]]
    once = pruned(model, None, monkeypatch, calibration=ids, train=iter(tokenized), steps=1, without=DECIDED)
    assert [example["labels"].tolist() for example in once["examples"]] == [labels, [5, 6]], "what can be read once"


@pytest.mark.parametrize("labelled", [False, True])
def test_padding_is_not_learned(labelled: bool, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tokenizer pads on either side, with the mask that it returns; a label of padding counts as little."""
    rows = [([7, 5, 6, 0, 0], [1, 1, 1, 0, 0]), ([0, 0, 8, 9, 7], [0, 0, 1, 1, 1]), ([4, 5, 6, 7, 8], [1] * 5)]
    given = [{"input_ids": ids, "attention_mask": mask} for ids, mask in rows]
    if labelled:
        given = [{**item, "labels": item["input_ids"]} for item in given]
    got = pruned(model, None, monkeypatch, calibration=IDS, train=given, steps=1, without=DECIDED)
    plain = [[7, 5, 6], [8, 9, 7], [4, 5, 6, 7, 8]]
    assert [example["input_ids"].tolist() for example in got["examples"]] == plain
    assert [example["labels"].tolist() for example in got["examples"]] == plain


def test_settings_tell_how_many_tokenized_examples_there_were(model: PreTrainedModel) -> None:
    given = [{"input_ids": list(range(length))} for length in (9, 4, 5)]
    result = torch_impl.prune(model, calibration=IDS, train=given, steps=1)
    assert (result.settings["text"]["train_examples"], result.settings["text"]["train_seqlen"]) == (3, 9)


@pytest.mark.parametrize("records", [RECORDS, CHATS], ids=["instructions", "messages"])
@pytest.mark.parametrize("as_data_set", [False, True])
def test_records_are_learned_behind_their_prompt(
    records: list[Any], as_data_set: bool, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = datasets.Dataset.from_list(records) if as_data_set else records
    got = pruned(model, tokenizer, monkeypatch, train=given)
    assert len(got["examples"]) == 24
    prompts = {document_of(record).prompt for record in records}
    for example in got["examples"]:
        ids, labels = example["input_ids"], example["labels"]
        learned = labels != IGNORED
        assert torch.equal(ids[learned], labels[learned])
        first = int(learned.nonzero()[0])
        assert first > 0
        # As far as it goes, what is not learned is a prompt.
        assert any(tokenizer.decode(ids[:first], skip_special_tokens=True)[:20] in prompt for prompt in prompts)


def test_texts_a_generator_and_a_file_are_the_same_text(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(TEXTS), encoding="utf-8")
    forms = [TEXTS, (text for text in TEXTS), [{"text": text} for text in TEXTS], str(tmp_path / "a.txt")]
    windows = [pruned(model, tokenizer, monkeypatch, calibration=form)["windows"] for form in forms]
    assert all(torch.equal(found, windows[0]) for found in windows)


def test_without_training_text_nothing_is_trained(model: PreTrainedModel, tokenizer: Any, monkeypatch: Any) -> None:
    assert pruned(model, tokenizer, monkeypatch)["examples"] == []
    assert pruned(model, tokenizer, monkeypatch, preset="best")["examples"] == []


# --- what is wrong is said before anything changes ---

IDS = torch.zeros(4, 8, dtype=torch.long)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": ({"calibration": 3}, TypeError, "calibration is int; give token ids"),
    "bytes": ({"calibration": b"abc"}, TypeError, "calibration is bytes; give token ids"),
    "a mapping": ({"calibration": {"text": TEXTS}}, TypeError, "calibration is dict; give"),
    "records of another form": ({"train": [{"question": "x"}]}, ValueError, "train, [0]: the record has question but none of"),
    "a list of numbers": ({"train": [1, 2]}, ValueError, "train, [0]: the record is int"),
    "nothing": ({"calibration": []}, ValueError, "calibration holds no text"),
    "floats": ({"calibration": torch.zeros(4, 8)}, TypeError, "calibration has shape (4, 8) and dtype torch.float32"),
    "one row of ids": ({"calibration": IDS[0]}, TypeError, "calibration has shape (8,)"),
    "one sequence": ({"calibration": IDS[:1]}, ValueError, "give 2 or more sequences"),
    "ids beyond the vocabulary": ({"calibration": IDS + 10**6}, ValueError, "calibration has token id 1000000"),
    "negative ids": ({"train": IDS - 1}, ValueError, "train has token id -1"),
    "labels of another length": (
        {"train": [{"input_ids": [1, 2, 3], "labels": [1]}]}, ValueError, "train[0]: input_ids has shape (3,)"),
    "nothing to learn": (
        {"train": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, ValueError, "train[0]: every label is -100"),
    "text without a tokenizer": ({"tokenizer": None}, ValueError, "tokenizer is missing"),
    "an unknown source": ({"calibration": "c5"}, ValueError, "calibration is 'c5'; allowed"),
    "one long text": ({"calibration": "word " * 1000}, ValueError, "calibration is a string of 5,000 characters that begins"),
    "one text of lines": ({"train": "One.\nTwo."}, ValueError, "a string names a source or a file: give texts as a list"),
    "a method": ({"method": "wonda"}, ValueError, "method is 'wonda'; allowed: magnitude, wanda"),
    "a preset": ({"preset": "worst"}, ValueError, "preset is 'worst'; allowed: paper"),
    "percent": ({"sparsity": 70}, ValueError, "sparsity is 70.0; allowed: 0 up to"),
    "an option": ({"learning_rat": 1.0}, TypeError, "learning_rat is not an option of prune; did you mean learning_rate"),
    "an argument": ({"sparsty": 0.5}, TypeError, "sparsty is not an option of prune; did you mean sparsity or"),
    "an option of files": ({"output_dir": "x"}, TypeError, "output_dir is not an option of prune"),
    "an argument's other name": ({"prune_method": "wanda"}, TypeError, "prune_method is given by the argument method"),
    "a value": ({"steps": "many"}, ValueError, "steps: invalid int value: 'many'"),
    "too few examples": ({"train": RECORDS[:1]}, ValueError, "1 training examples are too few"),
    "examples with token ids": ({"train": IDS, "train_examples": 3}, TypeError, "train_examples is given, and train is tokenized"),
    "a share beside a pattern": (
        {"sparsity": 0.7, "sparsity_type": "2:4"}, ValueError, "sparsity is 0.7; allowed with sparsity_type 2:4: 0.5"),
    "a truth value": ({"sparsity": True}, ValueError, "sparsity: invalid float value: 'True'"),
    "padding between tokens": (
        {"train": [{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}]}, ValueError, "train[0]: attention_mask must be 1 for 3"),
    "padding alone": ({"train": [{"input_ids": [1, 2], "attention_mask": [0, 0]}]}, ValueError, "and 0 that are not 0"),
    "a mask of another length": (
        {"train": [{"input_ids": [1, 2], "attention_mask": [1, 1, 1]}]}, ValueError, "it has shape (3,)"),
    "a mask of words": ({"train": [{"input_ids": [1, 2], "attention_mask": "ab"}]}, TypeError, "train[0]: attention_mask must be"),
    "a length with token ids": ({"calibration": IDS, "seqlen": 4}, TypeError, "seqlen is given, and calibration is token ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_sentence_and_changes_nothing(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    changes, kind, words = WRONG[name]
    before = weights(model)
    given = {"tokenizer": tokenizer, "calibration": TEXTS, "train": RECORDS, **SMALL, **changes}
    tokens = {"calibration": ("nsamples", "seqlen"), "train": ("train_examples", "train_seqlen")}
    for argument, decided in tokens.items():
        if given_of.is_tokenized(given[argument]):
            given = {key: value for key, value in given.items() if key in changes or key not in decided}
    with pytest.raises(kind) as caught:
        torch_impl.prune(model, **given)
    assert words in str(caught.value)
    assert "prune_method" not in str(caught.value) or "prune_method" in changes, "the caller said method"
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value), "that is the command line's"
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_memory_that_is_lacking_is_said_before_any_work(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line says it; of the token ids that were given, not of the default nsamples and seqlen."""
    before = weights(model)
    with pytest.raises(ValueError, match=r"nsamples is 1000000000 and seqlen is 1000000: the token ids alone need"):
        torch_impl.prune(model, tokenizer, calibration=TEXTS, nsamples=10**9, seqlen=10**6, steps=1)
    ids = torch.ones(6, 32, dtype=torch.long)
    monkeypatch.setattr(checks, "free_bytes", lambda device: 2**20)
    torch_impl.prune(copy.deepcopy(model), calibration=ids, steps=1)
    monkeypatch.setattr(checks, "free_bytes", lambda device: 2**10)
    with pytest.raises(ValueError, match=r"device cpu: only 0\.00 GiB of memory are free, but the run needs at least"):
        torch_impl.prune(model, calibration=ids, steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_a_model_of_another_kind(tokenizer: Any, tmp_path: Path) -> None:
    for call in (
        lambda: torch_impl.prune(torch.nn.Linear(2, 2), tokenizer, calibration=TEXTS),  # type: ignore[arg-type]
        lambda: torch_impl.evaluate("folder", tokenizer, text=TEXTS),  # type: ignore[arg-type]
        lambda: torch_impl.pack(torch.nn.Linear(2, 2), tmp_path / "out"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"model is (Linear|str); give a transformers model"):
            call()
    assert not list(tmp_path.iterdir()), "nothing half-written"
    with pytest.raises(ValueError, match="values is 'int9'; allowed: same, int2"):
        torch_impl.pack(tmp_path, tmp_path / "out", values="int9")
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: auto"):
        torch_impl.load_packed(tmp_path, dtype="int8")


def test_packing_replaces_a_model_s_folder_alone_and_names_its_own_argument(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    for name in ("model", "other"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.tex").touch()
    (tmp_path / "other" / "thesis.tex").touch()
    torch_impl.pack(model, tmp_path / "packed")
    (tmp_path / ".begun.partial" / CHECKPOINTS).mkdir(parents=True)
    (tmp_path / ".begun.partial" / CHECKPOINTS / "000001.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases: list[tuple[Any, str, bool, str]] = [
        (model, "packed", False, "exists; use another folder or overwrite=True"),
        (model, "files", True, r"files that are not a model's \(thesis.tex\), so overwrite=True does not replace it"),
        (model, "other", True, r"files that are not a model's \(thesis.tex\)"),
        (
            tmp_path / "model",
            "model",
            True,
            "folder .*model is or contains model .*model, which overwrite=True would delete",
        ),
        (str(tmp_path / "model"), "", True, "is or contains model"),
        (
            tmp_path / "packed",
            "new",
            False,
            "is already packed; give a plain Hugging Face folder, or unpack it: losa pack",
        ),
        (model, "begun", False, "has an unfinished run in .*; use overwrite=True to delete it, or another folder"),
    ]
    for source, target, overwrite, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            torch_impl.pack(source, tmp_path / target, overwrite=overwrite)
        assert "--overwrite" not in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before
    torch_impl.pack(tmp_path / "model", tmp_path / "packed", overwrite=True)


def test_what_cannot_be_measured_is_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    for options, words in (
        ({"batch_size": 0}, "batch_size is 0; allowed"),
        ({"windows": 0}, "windows is 0; allowed"),
        ({"windows": -1}, "windows is -1; allowed"),
        ({"seqlen": 1}, "seqlen is 1; allowed: 2"),
        ({"limit": 0}, "limit is 0; allowed"),
    ):
        for text in (IDS, TEXTS):
            with pytest.raises(ValueError, match=words):
                torch_impl.evaluate(model, tokenizer, text=text, **options)
    with pytest.raises(TypeError, match="windows is True; allowed: an integer"):
        torch_impl.evaluate(model, text=IDS, windows=True)
    plain = torch_impl.evaluate(model, text=IDS, batch_size=2, windows=3)
    assert torch_impl.evaluate(model, text=IDS, batch_size=np.int64(2), windows=np.int64(3)) == plain
    assert json.loads(json.dumps(plain)) == plain


class Codes(torch.nn.Linear):
    """A linear whose weight is codes, as bitsandbytes has it."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.weight = torch.nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def test_models_that_cannot_be_pruned_are_refused_before_anything_changes(model: PreTrainedModel) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            torch_impl.prune(model, calibration=IDS, **options)
        assert not hasattr(caught.value, "__notes__"), "nothing changed"

    mlp = model.model.layers[0].mlp
    linear = mlp.up_proj
    mlp.up_proj = Codes(linear)
    refused("up_proj is a oracle_tests.Codes; give a plain model")
    mlp.up_proj = linear.to("meta")
    refused(r"model has weights that are not in memory \(model.layers.0.mlp.up_proj.weight\)")
    mlp.up_proj = linear.to_empty(device="cpu")
    mlp.up_proj.weight.data.fill_(torch.nan)
    refused("up_proj.weight holds NaN or infinity")
    mlp.up_proj.weight.data.fill_(1.0)
    torch_impl.prune(model, calibration=IDS, sparsity=0.6, method="magnitude", steps=1)
    refused("^sparsity is 0.3; allowed: 0.5996 or more", sparsity=0.3)


def test_a_packed_model_is_refused_in_one_line(model: PreTrainedModel, tmp_path: Path) -> None:
    torch_impl.prune(model, calibration=IDS, method="magnitude", steps=1)
    torch_impl.pack(model, tmp_path / "packed")
    loaded = torch_impl.load_packed(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"is a torch_impl\.PackedLinear; give a plain model"):
        torch_impl.prune(loaded, calibration=IDS)
    with pytest.raises(ValueError, match=r"is a torch_impl\.PackedLinear; give a plain model"):
        torch_impl.pack(loaded, tmp_path / "again")


def test_a_model_that_cannot_be_packed_is_refused_by_what_it_is(model: PreTrainedModel, tmp_path: Path) -> None:
    """Not by the files that it would be saved to in between."""
    with pytest.raises(ValueError, match="model is LlamaModel; give a causal language model"):
        torch_impl.pack(model.model, tmp_path / "out")
    attach_adapters(Decoder(model), 2.0)
    with pytest.raises(ValueError, match=r"q_proj is a torch_impl\.AdaptedLinear; .* merge other adapters first"):
        torch_impl.pack(model, tmp_path / "out")
    assert not list(tmp_path.iterdir()), "nothing half-written"


# --- the model stays a user's model ---


def test_gradient_checkpointing_and_random_numbers_stay_the_caller_s(model: PreTrainedModel) -> None:
    options: dict[str, Any] = {"calibration": IDS, "train": IDS, "steps": 1, "gradient_checkpointing": True}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch_impl.prune(model, **options)
    assert torch.equal(torch.rand(3), expected)
    assert not training.checkpoints_activations(model)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks
    assert not model.requires_grad_(False)(IDS).logits.requires_grad
    # A caller who trains with it goes on doing so.
    model.enable_input_require_grads()
    torch_impl.prune(model, **options)
    assert len(embeddings._forward_hooks) == 1
    assert not training.checkpoints_activations(model)
    training.checkpoint_activations(model)
    torch_impl.prune(model, **{**options, "gradient_checkpointing": False})
    assert training.checkpoints_activations(model)


def test_gradients_are_enabled_where_the_caller_has_none(model: PreTrainedModel) -> None:
    with torch.no_grad():
        result = torch_impl.prune(model, calibration=IDS, train=IDS, steps=2, step_shares=[0.5, 0.5])
        assert not torch.is_grad_enabled()
    assert [len(step.losses) for step in result.steps] == [1, 1]
    with torch.inference_mode(), pytest.raises(ValueError, match=r"^prune is called in torch.inference_mode\(\)"):
        torch_impl.prune(model, calibration=IDS, train=IDS)


def test_a_measurement_while_training_is_of_the_adapters_as_they_are(model: PreTrainedModel) -> None:
    """The last one, after the last optimizer step, is that of the merged model."""
    seen: list[float] = []

    def on_loss(*_: Any) -> None:
        seen.append(torch_impl.evaluate(model, text=IDS)["perplexity"])

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 0.01}
    result = torch_impl.prune(model, calibration=IDS, train=IDS, steps=1, on_loss=on_loss, **options)
    assert len(set(seen)) == len(seen) == 4
    assert seen[-1] == pytest.approx(torch_impl.evaluate(result.model, text=IDS)["perplexity"], rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_stay_as_they_were(
    fails: bool, model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.eval()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    if fails:
        monkeypatch.setattr(training, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as caught:
            torch_impl.prune(model, tokenizer, calibration=TEXTS, train=RECORDS, **SMALL)
        assert "may be pruned in part" in caught.value.__notes__[0]
    else:
        torch_impl.prune(model, tokenizer, calibration=TEXTS, train=RECORDS, **SMALL)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert share_of_zeros(model) > 0


def test_zeros_are_kept_while_training_on(model: PreTrainedModel, tokenizer: Any) -> None:
    result = torch_impl.prune(model, tokenizer, calibration=TEXTS, **SMALL)
    zeros = {name: tensor == 0 for name, tensor in weights(model).items() if "proj" in name and "weight" in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept = result.keep_zeros(optimizer)
    before = weights(model)

    def step() -> None:
        ids = tokenizer(TEXTS[:2], return_tensors="pt", padding=False, truncation=True, max_length=16)["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
        assert all(bool((weights(model)[name][zero] == 0).all()) for name, zero in zeros.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(model).items() if name in zeros)
    kept.remove()
    step()
    assert any(bool((weights(model)[name][zero] != 0).any()) for name, zero in zeros.items()), "one step fills them"


def test_a_pattern_decides_the_sparsity(model: PreTrainedModel, tokenizer: Any) -> None:
    result = torch_impl.prune(model, tokenizer, calibration=TEXTS, method="magnitude", sparsity_type="2:4", **SMALL)
    assert result.sparsity == 0.5


def test_evaluation_is_of_the_windows_asked_for(model: PreTrainedModel, tokenizer: Any) -> None:
    found = torch_impl.evaluate(model, tokenizer, text=TEXTS, seqlen=16, windows=3)
    assert (found["windows"], found["seqlen"], found["tokens"]) == (3, 16, 48)
    rows = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = torch.tensor(
        [token for text in TEXTS for token in [*rows, *tokenizer(text, add_special_tokens=False)["input_ids"]]]
    )
    windows = ids[: 3 * 16].view(3, 16)
    model.eval()
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    how = {name: found.pop(name) for name in ("protocol", "joined_by", "begin_of_text")}
    assert how == {"protocol": "documents", "joined_by": None, "begin_of_text": "before each document"}
    assert torch_impl.evaluate(model, text=windows.numpy()) == {**found, "protocol": "token ids"}
    with pytest.raises(TypeError, match="text has shape"):
        torch_impl.evaluate(model, text=np.zeros(3))


def test_evaluation_names_its_own_options_and_text(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    """Not those of `losa run`."""
    (tmp_path / "a.txt").write_text("two words")
    for given, named in ((["two words"], "text"), (str(tmp_path / "a.txt"), "text '.*a.txt'")):
        with pytest.raises(ValueError, match=rf"^seqlen is 999, but {named} has only \d+ tokens.* a smaller seqlen$"):
            torch_impl.evaluate(model, tokenizer, text=given, seqlen=999)
    with pytest.raises(ValueError, match=r"^seqlen is 999, but calibration has only \d+ tokens"):
        torch_impl.prune(model, tokenizer, calibration=["two words"], **{**SMALL, "seqlen": 999})


def test_windows_beyond_what_the_model_was_trained_on_are_told(
    model: PreTrainedModel, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model.config.max_position_embeddings = 16
    torch_impl.evaluate(model, tokenizer, text=TEXTS, seqlen=16, windows=1)
    assert not caplog.records
    torch_impl.evaluate(model, tokenizer, text=TEXTS, seqlen=17, windows=1)
    expected = "seqlen is 17; this model was trained on at most 16 tokens, expect worse results beyond"
    assert [record.message for record in caplog.records] == [expected]


def test_what_is_measured_is_measured_as_told(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(api, "perplexity", lambda of, ids, batch_size: told.update(batch=batch_size) or 1.0)
    monkeypatch.setattr(api.zero_shot, "load_tasks", lambda *options: told.update(tasks=options) or {})
    monkeypatch.setattr(
        api.zero_shot, "measure", lambda of, tokens, tasks, *how: told.update(how=how) or SimpleNamespace(by_task=dict)
    )
    options: dict[str, Any] = {"tasks": ["piqa"], "tasks_data": "here", "limit": 3, "num_fewshot": 2, "batch_size": 5}
    torch_impl.evaluate(model, tokenizer, text=TEXTS, seqlen=16, **options)
    assert told == {"batch": 5, "tasks": (["piqa"], "here", 2), "how": (3, 5)}


@pytest.mark.parametrize(
    "given",
    [
        {"text": TEXTS, "tasks_data": "here"},
        {"text": TEXTS, "limit": 3},
        {"num_fewshot": 0},
        {"tasks": ["piqa"], "windows": 3},
        {"tasks": ["piqa"], "protocol": "c4"},
    ],
)
def test_options_of_what_is_not_measured_are_refused(
    given: dict[str, Any], model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were ignored."""
    monkeypatch.setattr(api.zero_shot, "load_tasks", lambda *_: pytest.fail("it begins"))
    name, what = list(given)[-1], "text" if "tasks" in given else "tasks"
    with pytest.raises(ValueError, match=f"^{name} is about {what}, which is not measured here; give {what} too"):
        torch_impl.evaluate(model, tokenizer, **given)


def test_codes_are_chosen_on_the_windows_asked_for(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(api.packed_folder, "pack_folder", lambda *_, rounding: seen.append(rounding.ids) or [])
    for number, seed in enumerate((5, 5, 6)):
        options: dict[str, Any] = {"calibration": TEXTS, "nsamples": 3, "seqlen": 16, "seed": seed}
        torch_impl.pack(tmp_path, tmp_path / str(number), tokenizer, values="int4", **options)
    assert [ids.shape for ids in seen] == [(3, 16)] * 3
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_the_seed_draws_the_training_examples(model: PreTrainedModel, tokenizer: Any) -> None:
    def parts(seed: int) -> list[list[int]]:
        config = arguments_of.configuration(model, IDS, TEXTS, 0.5, "wanda", "paper", {**SHAPE, "seed": seed})
        found = arguments_of.material_of(model, tokenizer, IDS, TEXTS, config)[1]
        return [example["input_ids"].tolist() for part in found for example in part]

    assert parts(0) == parts(0) != parts(1)


def test_importance_is_measured_on_no_more_sequences_than_there_are(model: PreTrainedModel) -> None:
    config = arguments_of.configuration(model, IDS, None, 0.5, "wanda", "paper", {"rmi_samples": 6})
    assert arguments_of.with_shape(config, IDS).calibration.rmi_rows == len(IDS) == 4
    many = torch.zeros(300, 8, dtype=torch.long)
    config = arguments_of.configuration(model, many, None, 0.5, "wanda", "paper", {"rmi_samples": 200})
    assert arguments_of.with_shape(config, many).calibration.rmi_rows == 200


# --- what is public ---


def test_what_is_public() -> None:
    assert torch_impl.__all__ == ["PruneResult", "Saving", "StepRecord", "evaluate", "load_packed", "pack", "prune"]
    assert sorted(dir(torch_impl)) == sorted([*torch_impl.__all__, "__version__"])
    project = (Path(torch_impl.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{torch_impl.__version__}"' in project
    assert (Path(torch_impl.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = torch_impl.nonsense
    importlib.import_module("torch_impl.pack")
    assert torch_impl.pack is api.pack, "not the module that python -m torch_impl.pack runs"


def test_the_mirrored_functions_do_not_import_the_library() -> None:
    code = "import sys, torch_impl, torch_impl.schedule; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
