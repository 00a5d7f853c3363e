"""Folders of tiny models, and ways to change them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle_tests.small_runs import make_place
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.commands import pack
from torch_impl.engine.checkpoints.contents import INDEX, SINGLE

Tensors = dict[str, torch.Tensor]
PLAIN = {
    "steps": 1,
    "layer_sparsity": "uniform",
    "finetune": "false",
    "eval_windows": 2,
    "nsamples": 2,
    "rmi_samples": 2,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a valid model: biases everywhere, half of the projections sparse."""
    place = make_place(tmp_path_factory.mktemp("sound"))
    shutil.rmtree(place / "model")
    save_sparse(place / "model", attention_bias=True, mlp_bias=True)
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(sound, tmp_path / "place")
    return tmp_path / "place"


def save_sparse(folder: Path, family: str = "llama", **options: Any) -> None:
    model = random_model(family, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") and "v_proj" not in name:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.7] = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def stored(folder: Path) -> Tensors:
    """Tensors of the files that transformers would read."""
    files = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if (folder / INDEX).exists() else [SINGLE]
    files = [SINGLE] if (folder / SINGLE).exists() else files
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write(tensors: Tensors, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit(model: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of a single-file model in place."""
    tensors = load_file(model / SINGLE)
    change(tensors)
    write(tensors, model / SINGLE)


def configure(model: Path, **changes: Any) -> None:
    """Change its config.json; None removes an entry."""
    content = {**read_json(model / "config.json"), **changes}
    (model / "config.json").write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def split(model: Path, parts: int = 3) -> None:
    """Split a single-file model into several files with an index."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    of = {name: f"model-{k % parts + 1:05}-of-{parts:05}.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(of.values()):
        write({name: tensor for name, tensor in tensors.items() if of[name] == file}, model / file)
    index = {"metadata": {"total_size": 7, "made by": "hand"}, "weight_map": of}
    (model / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def other(tensors: Tensors) -> Tensors:
    """Wrong tensors of the same names and shapes."""
    return {name: torch.full_like(tensor, 3) for name, tensor in tensors.items()}


def packed(folder: Path) -> Path:
    target = folder.parent / "packed"
    if not target.exists():
        assert pack.main([str(folder), str(target), "--device", "cpu"]) == 0
        assert any(entry["packed"] for entry in read_json(target / "packed.json")["tensors"].values())
    return target


def stale_shards(model: Path) -> None:
    """Add a file of an earlier save that the index does not name."""
    split(model)
    write(other(stored(model)), model / "model-00001-of-00009.safetensors")


def single_and_index(model: Path) -> None:
    """Keep both a single file and an index; transformers reads the single file."""
    tensors = load_file(model / SINGLE)
    split(model)
    for file in model.glob("model-*"):
        write(other(load_file(file)), file)
    write(tensors, model / SINGLE)


def a_head_of_its_own(model: Path) -> None:
    configure(model, tie_word_embeddings=True)


def tied(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    edit(model, lambda tensors: tensors.pop("lm_head.weight"))


def said(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """Check that a command was refused; return its error line."""
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert status == 2, line
    assert "perplexity" not in shown.out
    return line
