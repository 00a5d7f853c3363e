"""Reading and writing models: finite numbers, dtypes, code and tokenizers that come with a model, file modes, hubs."""

from __future__ import annotations

import ast
import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from oracle_tests.model_folders import (
    PLAIN,
    Tensors,
    a_head_of_its_own,
    configure,
    edit,
    packed,
    place,
    read_json,
    said,
    single_and_index,
    sound,
    stale_shards,
    tied,
    write,
)  # fmt: skip
from oracle_tests.small_runs import ROOT, arguments
from tiny_models.random_models import random_model
from torch_impl.commands import generate, pack, run
from torch_impl.engine import structure
from torch_impl.engine.checkpoints import contents, fsdp, pretrained
from torch_impl.engine.checkpoints.contents import SINGLE
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.settings import Settings

__all__ = ["place", "sound"]  # fixtures
CPU = torch.device("cpu")


# --- what is written ---

MASK = 0o027
SENTENCEPIECE = b"\x0a\x05<unk>"


@pytest.fixture(scope="module")
def written(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is ever written of a model, whose head is its own though its configuration ties it."""
    place = tmp_path_factory.mktemp("written") / "place"
    shutil.copytree(sound, place)
    a_head_of_its_own(place / "model")
    (place / "model" / "tokenizer.model").write_bytes(SENTENCEPIECE)
    before = os.umask(MASK)
    try:
        for offload in ("on", "off"):
            assert run.main(arguments(place, **PLAIN, offload=offload, output_dir=place / offload)) == 0
        packed(place / "model")
        assert pack.main([str(place / "packed"), str(place / "back"), "--unpack"]) == 0
        model: Any = fsdp.load(place / "model", CPU, None)
        (place / "saved").mkdir()
        fsdp.save(Decoder(model), place / "saved")
    finally:
        assert os.umask(before) == MASK
    return place


def test_what_is_written_says_whether_the_head_is_tied(written: Path, place: Path) -> None:
    """Others tie what the configuration says, without a look at the files."""
    for folder in ("on/model", "off/model", "saved"):
        assert read_json(written / folder / "config.json")["tie_word_embeddings"] is False
    model: Any = fsdp.load(written / "model", CPU, None)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied(place / "model")
    for loaded in (fsdp.load(place / "model", CPU, None), pretrained.load(str(place / "model"), CPU, "auto")[0]):
        assert loaded.config.tie_word_embeddings is True
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_files_have_the_mode_that_the_umask_says(written: Path) -> None:
    files = [path for name in ("on", "off", "packed", "back", "saved") for path in (written / name).rglob("*")]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 4 + 4
    for path in files:
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~MASK, path


def test_the_sentencepiece_file_is_kept(written: Path) -> None:
    for folder in ("on/model", "off/model", "packed", "back"):
        assert (written / folder / "tokenizer.model").read_bytes() == SENTENCEPIECE


# --- numbers that are none ---

KINDS = (
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight",
    "model.layers.2.self_attn.q_proj.bias", "model.layers.2.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight",
)  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_numbers_is_read(place: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it is: before pruning, by every command."""
    packed(place / "model")
    capsys.readouterr()

    def breaks(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    edit(place / "model", breaks)
    options = arguments(place, **PLAIN)
    lines = [said(capsys, run.main([*options, "--offload", offload])) for offload in ("on", "off")]
    lines.append(said(capsys, pack.main([str(place / "model"), str(place / "new"), "--device", "cpu"])))
    lines.append(said(capsys, generate.main([str(place / "model"), "--prompt", "x", "--device", "cpu"])))
    with pytest.raises(ValueError, match=name):
        fsdp.load(place / "model", CPU, None)
    file = place / "packed" / "packed-00001-of-00001.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.values" if f"{name}.values" in tensors else name].view(-1)[-1] = value
    write(tensors, file)
    lines.append(said(capsys, generate.main([str(place / "packed"), "--prompt", "x", "--device", "cpu"])))
    for line in lines:
        assert f"{name} holds NaN or infinity (1 of " in line
        assert "learning_rate" not in line


@pytest.mark.parametrize("name", KINDS)
def test_algorithm_1_takes_nothing_but_numbers(name: str) -> None:
    """Whoever calls it."""
    model = random_model("llama", attention_bias=True)
    structure.check_model(model, Settings())
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
        structure.check_model(model, Settings())


KEY = "model.layers.0.self_attn.q_proj.weight"


def test_what_float16_cannot_hold_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / "model", lambda tensors: tensors[KEY].view(-1)[:2].copy_(torch.tensor([65504.0, -65504.0])))
    pretrained.load(str(place / "model"), CPU, "float16")
    edit(place / "model", lambda tensors: tensors[KEY].view(-1)[:1].fill_(1e6))
    packed(place / "model")
    for folder in ("model", "packed"):
        found = generate.main([str(place / folder), "--prompt", "x", "--device", "cpu", "--dtype", "float16"])
        line = said(capsys, found)
        assert f"{KEY} holds NaN or infinity (1 of " in line
        assert "; try dtype bfloat16, or another checkpoint" in line


# --- as stored ---


@pytest.mark.parametrize("named", [None, "float64"])
def test_as_stored_is_what_the_weights_are(place: Path, named: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Where config.json names no dtype; plain and packed, generated and planned."""
    edit(place / "model", lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    configure(place / "model", dtype=named)
    packed(place / "model")
    expected = named or "bfloat16"
    for folder in ("model", "packed"):
        capsys.readouterr()
        options = ["--prompt", "def", "--max_new_tokens", "2", "--device", "cpu"]
        assert generate.main([str(place / folder), *options]) == 0
        assert f" MB, {expected};" in capsys.readouterr().err
    assert pretrained.outline(str(place / "model"), torch.device("cuda"), "auto").dtype == getattr(torch, expected)
    assert pretrained.outline(str(place / "model"), CPU, "auto").dtype == torch.float32


# --- code that comes with a model ---


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers keeps such code; and nobody is asked anything."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on standard input"))
    return folder


def with_code(model: Path) -> None:
    """The same LLaMA by another name, and a file of code that nothing but the other imports."""
    (model / "configuration_ours.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OursConfig(LlamaConfig):\n    model_type = 'ours'\n"
    )
    (model / "modeling_ours.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_ours import OursConfig\n\n\n"
        "class OursForCausalLM(LlamaForCausalLM):\n    config_class = OursConfig\n"
    )
    configure(
        model,
        model_type="ours",
        architectures=["OursForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_ours.OursConfig",
            "AutoModelForCausalLM": "modeling_ours.OursForCausalLM",
        },
    )


def test_a_model_with_code_of_its_own(place: Path, modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_code(place / "model")
    code = {path.name: path.read_bytes() for path in (place / "model").glob("*.py")}
    trust = {"trust_remote_code": "true"}
    assert run.main([*arguments(place, **PLAIN, **trust), "--dry_run"]) == 0
    for offload in ("on", "off"):
        assert run.main(arguments(place, **PLAIN, **trust, offload=offload, output_dir=place / offload)) == 0
        assert {path.name: path.read_bytes() for path in (place / offload / "model").glob("*.py")} == code
        assert read_json(place / offload / "model" / "config.json")["auto_map"]["AutoConfig"].startswith("conf")
    pairs = (load_file(place / offload / "model" / SINGLE) for offload in ("on", "off"))
    one, two = pairs
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert pack.main([str(place / "on" / "model"), str(place / "packed"), "--trust_remote_code"]) == 0
    assert {path.name: path.read_bytes() for path in (place / "packed").glob("*.py")} == code
    assert pack.main([str(place / "packed"), str(place / "back"), "--unpack"]) == 0
    texts = set()
    for folder in (place / "off" / "model", place / "packed", place / "back"):
        capsys.readouterr()
        options = ["--prompt", "def", "--max_new_tokens", "4", "--device", "cpu", "--trust_remote_code", "true"]
        assert generate.main([str(folder), *options]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    model: Any = fsdp.load(place / "model", CPU, None, trust_remote_code=True)
    assert type(model).__name__ == "OursForCausalLM"


def test_code_is_run_only_if_told_so(place: Path, modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_code(place / "model")
    target = place / "packed"
    assert pack.main([str(place / "model"), str(target), "--device", "cpu", "--trust_remote_code"]) == 0
    capsys.readouterr()
    options = arguments(place, **PLAIN)
    lines = [said(capsys, run.main([*options, "--offload", offload])) for offload in ("on", "off")]
    lines.append(said(capsys, run.main([*options, "--dry_run"])))
    lines.append(said(capsys, pack.main([str(place / "model"), str(place / "new"), "--device", "cpu"])))
    lines += [said(capsys, generate.main([str(place / f), "--prompt", "x"])) for f in ("model", "packed")]
    for line in lines:
        assert "needs the code that comes with it; if you trust its source, set trust_remote_code to true" in line
    assert not (place / "new").exists()


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def test_every_place_that_loads_says_whether_code_is_trusted() -> None:
    """Otherwise transformers asks on standard input."""
    found = 0
    for path in (ROOT / "torch_impl").rglob("*.py"):
        for call in calls(path):
            assert isinstance(call.func, ast.Attribute)
            what = getattr(call.func.value, "id", "")
            if call.func.attr in ("from_pretrained", "from_config") and what.startswith("Auto"):
                assert "trust_remote_code" in {word.arg for word in call.keywords}, f"{path}, line {call.lineno}"
                found += 1
    assert found >= 4


# --- tokenizers ---


@pytest.mark.parametrize(
    ("installed", "advice"),
    [
        ((), "install sentencepiece and protobuf to read it"),
        (("sentencepiece",), "install protobuf to read it"),
        (("sentencepiece", "google.protobuf"), "it is corrupt; download it again"),
    ],
)
def test_a_sentencepiece_file_takes_its_packages(
    place: Path,
    installed: tuple[str, ...],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = place / "model"
    packed(model)
    for folder in (model, place / "packed"):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"no protobuf message")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')
    monkeypatch.setattr(pretrained, "_importable", lambda module: module in installed)
    capsys.readouterr()
    options = arguments(place, **PLAIN)
    lines = [said(capsys, run.main([*options, "--offload", offload])) for offload in ("on", "off")]
    lines += [said(capsys, generate.main([str(place / f), "--prompt", "x"])) for f in ("model", "packed")]
    for line in lines:
        assert f"its tokenizer is a SentencePiece file, tokenizer.model; {advice}" in line
        assert "tiktoken" not in line


# --- hubs ---


class Hub:
    """Stands in for huggingface_hub: gives the files of a folder that match, and keeps their names."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source, self.cache = source, cache
        self.given: set[str] = set()

    def __call__(self, name: str, allow_patterns: list[str]) -> str:
        assert name == "some/model"
        self.cache.mkdir(exist_ok=True)
        for path in self.source.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, self.cache / path.name)
                self.given.add(path.name)
        return str(self.cache)


@pytest.mark.parametrize("situation", [stale_shards, single_and_index])
def test_of_a_hub_s_model_what_counts_is_downloaded(
    place: Path, situation: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And used by its name all the way, from configuration to tokenizer.model."""
    monkeypatch.chdir(place)
    model = place / "model"
    situation(model)
    (model / "tokenizer.model").write_bytes(b"kept")
    write({"a": torch.ones(1)}, model / "consolidated.safetensors")
    hub = Hub(model, place / "cache")
    monkeypatch.setattr(contents, "snapshot_download", hub)
    assert run.main([*arguments(place, **PLAIN, model="some/model"), "--dry_run"]) == 0
    assert not any(name.endswith(".safetensors") for name in hub.given)
    offload = "on" if situation is stale_shards else "off"
    assert run.main(arguments(place, **PLAIN, model="some/model", offload=offload)) == 0
    assert (place / "out" / "model" / "tokenizer.model").exists()
    assert read_json(place / "out" / "environment.json")["model_sha256"] == pretrained.weights_hash(model)
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    downloaded = {name for name in hub.given if name.endswith(".safetensors")}
    assert downloaded == ({SINGLE} if situation is single_and_index else shards)


def test_what_a_hub_s_configuration_shows_is_refused_without_its_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    configure(place / "model", quantization_config={"quant_method": "gptq"})
    hub = Hub(place / "model", place / "cache")
    monkeypatch.setattr(contents, "snapshot_download", hub)
    line = said(capsys, run.main([*arguments(place, **PLAIN, model="some/model"), "--dry_run"]))
    assert "quantised (quantization_config in config.json: gptq)" in line
    assert SINGLE not in hub.given


def test_a_hub_that_does_not_answer_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(*_: Any, **__: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(contents, "snapshot_download", silent)
    line = said(capsys, run.main(arguments(place, **PLAIN, model="some/model")))
    assert line == "error: model some/model cannot be downloaded: no network"
