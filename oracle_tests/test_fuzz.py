"""Input files, broken in every way: one clear message, no code run, nothing written, no pickle opened."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tiny_models.random_models import save_random_model
from torch_impl.engine.checkpoints import pretrained
from torch_impl.experiment.text.sources import load_documents
from torch_impl.run import main

# One folder serves all examples of a test: each writes the files it reads.
SHARED_FOLDER = settings(suppress_health_check=[*HealthCheck], deadline=None)
FEW = settings(SHARED_FOLDER, max_examples=max(25, settings.default.max_examples // 2))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([0, -1, 10**9, 10**30, 1e308]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def broken(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes changed, a piece cut out, or another put in."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(result) - 1)))
        match draw(st.sampled_from(["change", "cut", "insert", "end"])):
            case "change" if result:
                result[start] = draw(st.integers(0, 255))
            case "cut":
                del result[start : start + draw(st.integers(1, 40))]
            case "insert":
                result[start:start] = draw(st.binary(min_size=1, max_size=20))
            case "end":
                del result[start:]
    return bytes(result)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    save_random_model(folder, "llama-gqa")
    return folder


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- configuration ---

TOML = """steps = 3
[prune]
prune_method = "wanda"
sparsity_ratio = 0.5
[text]
step_shares = [0.2, 0.2, 0.6]
[training]
learning_rate = 1e-3
finetune = true
"""


def run_toml(data: bytes, model: Path, capsys: pytest.CaptureFixture) -> None:
    file = model.parent / "config.toml"
    file.write_bytes(data)
    before = contents(model.parent)
    data = ["--calibration_data", "c4", "--finetune_data", "c4", "--eval_data", "c4"]
    status = main(["--config", str(file), "--model", str(model), "--device", "cpu", "--dry_run", "true", *data])
    said = capsys.readouterr()
    assert contents(model.parent) == before
    if status == 0:
        assert "prunable weights" in said.out
        return
    assert status == 2
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert len(lines[0]) > len("error: ") + 10


@FEW
@given(data=broken(TOML.encode()))
@example(data=b"x = " + b"[" * 5000)
@example(data=b"steps = " + b"9" * 5000)
@example(data=b"steps = 1000000000\nfinetune = false")
@example(data=b'config = "other.toml"')
@example(data=b"[[prune]]\nsteps = 3")
@example(data=b"trust_remote_code = [true]")
def test_a_broken_toml(data: bytes, model: Path, capsys: pytest.CaptureFixture) -> None:
    run_toml(data, model, capsys)


NAMES = (
    "steps",
    "sparsity_ratio",
    "learning_rate",
    "nsamples",
    "seqlen",
    "lora_r",
    "max_rank",
    "step_shares",
    "seed",
    "dtype",
)


@FEW
@given(name=st.sampled_from(NAMES), value=st.integers() | st.floats() | st.text("ab -9.\u00e9\n", max_size=6))
def test_any_value_of_an_option(name: str, value: Any, model: Path, capsys: pytest.CaptureFixture) -> None:
    shown = json.dumps(value) if isinstance(value, str) else repr(value)
    run_toml(f"{name} = {shown}".encode(), model, capsys)


# --- text ---

RECORDS = [{"text": "one two"}, {"instruction": "say", "input": None, "output": "three\u2028four"}]
JSON = json.dumps(RECORDS).encode()
JSONL = "\n".join(map(json.dumps, RECORDS)).encode()


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one two", "three"], "n": [1, 2]}), sink)
    return sink.getvalue()


KINDS = {
    "a.json": JSON,
    "a.jsonl": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL),
    "a.parquet": parquet(),
    "a.txt": "one\n<|endoftext|>\ntwo é".encode(),
}


def read_text(file: Path) -> None:
    """Documents, or an error that names the file."""
    message, documents = "", []
    try:
        documents = load_documents(str(file)).documents
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert documents or file.name in message
    tokenizer = pretrained.AutoTokenizer.from_pretrained(file.parent / "model")
    for document in documents:
        tokenizer(document.prompt + document.text)


@pytest.mark.parametrize("name", KINDS)
@FEW
@given(data=st.data())
def test_a_broken_text_file(name: str, data: st.DataObject, model: Path) -> None:
    file = model.parent / name
    file.write_bytes(data.draw(broken(KINDS[name])))
    read_text(file)
    assert {path.name for path in model.parent.iterdir()} == {"model", name}


@FEW
@given(
    records=st.lists(
        values
        | st.fixed_dictionaries({"text": values})
        | st.fixed_dictionaries(
            {"messages": values | st.lists(st.fixed_dictionaries({"role": values, "content": values}))}
        )
        | st.fixed_dictionaries(
            {"instruction": st.just("a"), "output": st.just("b"), "history": values, "system": values}
        ),
        max_size=3,
    )
)
@example(records=[{"text": "\ud800"}])
@example(records=[{"instruction": "\udc00", "output": "x"}])
def test_records_of_any_shape(records: list[Any], model: Path) -> None:
    for name, content in {"a.json": json.dumps(records), "a.jsonl": "\n".join(map(json.dumps, records))}.items():
        (model.parent / name).write_text(content)
        read_text(model.parent / name)


@pytest.mark.parametrize("content", ["[" * 100000, '{"text": ' * 100000, "9" * 10000, '{"text": NaN}', "\x00"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_breaks_readers(name: str, content: str, model: Path) -> None:
    (model.parent / name).write_text(content)
    read_text(model.parent / name)


# --- models ---


def load(model: Path) -> None:
    """A model, or an error that names the folder; never anything else, nor anything written."""
    before, message = contents(model.parent), None
    try:
        pretrained.load(str(model), torch.device("cpu"), "auto")
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert message is None or str(model) in message
    assert contents(model.parent) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@FEW
@given(data=st.data())
def test_a_broken_json_file_of_a_model(name: str, data: st.DataObject, sound: Path, model: Path) -> None:
    original = (sound / name).read_bytes() if (sound / name).exists() else b"{}"
    (model / name).write_bytes(data.draw(broken(original)))
    load(model)


@FEW
@given(data=st.data())
def test_any_value_in_a_model_s_configuration(data: st.DataObject, sound: Path, model: Path) -> None:
    configuration = json.loads((sound / "config.json").read_text())
    name = data.draw(st.sampled_from([*configuration, "auto_map", "quantization_config"]))
    (model / "config.json").write_text(json.dumps({**configuration, name: data.draw(values)}))
    load(model)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_a_model_of_absurd_size_is_refused(name: str, sound: Path, model: Path) -> None:
    configuration = json.loads((sound / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**configuration, name: 10**9}))
    with pytest.raises(ValueError, match=name):
        pretrained.load(str(model), torch.device("cpu"), "auto")


@FEW
@given(data=st.data())
def test_a_broken_safetensors_header(data: st.DataObject, sound: Path, model: Path) -> None:
    content = (sound / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    (model / "model.safetensors").write_bytes(data.draw(broken(content[:size])) + content[size:])
    load(model)


def test_a_model_that_lacks_a_tensor_is_refused(model: Path) -> None:
    """transformers would fill it with random numbers."""
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        pretrained.load(str(model), torch.device("cpu"), "auto")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "code-was-run"
    assert not (tmp_path / "code-was-run").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_not_opened(name: str, model: Path, trace: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps([Bomb(trace), bytes(100000)]))
    with pytest.raises(ValueError, match=r"safetensors|header"):
        pretrained.load(str(model), torch.device("cpu"), "auto")


def test_code_that_comes_with_a_model_is_not_run(sound: Path, model: Path, trace: Path) -> None:
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Some: pass\n"
    (model / "some.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((sound / name).read_text())
        classes = {"AutoConfig": "some.Some", "AutoModelForCausalLM": "some.Some", "AutoTokenizer": ["some.Some", None]}
        (model / name).write_text(json.dumps({**content, "auto_map": classes}))
        load(model)
        if name == "config.json":
            (model / name).write_text(json.dumps({**content, "auto_map": classes, "model_type": "some"}))
            with pytest.raises(ValueError, match="model"):
                pretrained.load(str(model), torch.device("cpu"), "auto")
            shutil.copy(sound / name, model / name)
