"""Packed models through transformers alone: loaded, generated from, saved and loaded again, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

from oracle_tests.packed_models import assert_same_bits, save_sparse
from tiny_models.random_models import FAMILIES
from torch_impl.commands import pack
from torch_impl.decode import hf_quantizer, packed_folder, packed_writer
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.checkpoints.contents import METHOD

CPU = torch.device("cpu")
FILE = "packed-00001-of-00001.safetensors"
KEY = "model.layers.1.mlp.up_proj.weight"
IDS = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(3))


def packed_of(plain: Path) -> Path:
    target = plain.parent / "packed"
    assert pack.main([str(plain), str(target), "--device", "cpu"]) == 0
    return target


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_of(save_sparse(tmp_path_factory.mktemp("hf") / "plain", "llama"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def greedy(model: PreTrainedModel) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)


def layers_of(model: PreTrainedModel) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def assert_same_model(one: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_is_a_model_of_transformers(family: str, tmp_path: Path) -> None:
    """The same as the own loader gives, and the plain model's tokens; saved, it is a packed folder of the same weights."""
    plain = save_sparse(tmp_path / "plain", family)
    folder = packed_of(plain)
    model = load(folder)
    assert layers_of(model)
    assert_same_model(model, packed_folder.load(folder, CPU)[0])
    assert torch.equal(greedy(model), greedy(load(plain)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    model.save_pretrained(tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "again" / "tokenizer.json")
    assert pack.main([str(tmp_path / "again"), str(tmp_path / "back"), "--unpack"]) == 0
    assert_same_bits(plain, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype(packed_model: Path, dtype: torch.dtype) -> None:
    model = load(packed_model, dtype=dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert {layer.values.dtype for layer in layers_of(model)} == {dtype}
    assert_same_model(model, packed_folder.load(packed_model, CPU, dtype)[0])


PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": PLACES}],
    ids=str,
)
def test_device_maps(packed_model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    if "disk" in str(options):
        options = {**options, "offload_folder": tmp_path / "offload"}
    model = load(packed_model, **options)
    assert torch.equal(greedy(model), greedy(load(packed_model)))


def test_layers_on_disk_are_computed_with(packed_model: Path, tmp_path: Path) -> None:
    """With the packed tensors in memory, as transformers keeps buffers, or on disk too; saving what is on disk is refused."""
    places = {**PLACES, "model.layers": "disk"}
    for buffers in (False, True):
        folder = tmp_path / f"offload{buffers}"
        model = load(packed_model, device_map=places, offload_folder=folder, offload_buffers=buffers)
        assert torch.equal(greedy(model), greedy(load(packed_model)))
        with pytest.raises(ValueError, match=r"tensors are offloaded \(.*\), so the model cannot be saved"):
            model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "packed.json").exists()


def test_as_on_a_gpu(tmp_path: Path, as_on_a_gpu: list[str]) -> None:
    """The layouts that kernels read, q, k and v as one; what is saved from them is the same folder."""
    folder = packed_of(save_sparse(tmp_path / "plain", "llama-gqa", torch.bfloat16))
    model = load(folder)
    assert sum(call.startswith("pack") for call in as_on_a_gpu) >= len(layers_of(model))
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group is not None
    assert_same_model(model, packed_folder.load(folder, CPU)[0])
    model.save_pretrained(tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)
    as_on_a_gpu.clear()
    moved = load(folder, dtype=torch.float32)
    assert not as_on_a_gpu
    # As `model.to("cuda")`, which brings layers of another device to the kernels; here they come from another dtype.
    attention = moved.to(torch.bfloat16).model.layers[1].self_attn
    assert attention.q_proj.group is attention.k_proj.group is attention.v_proj.group is not None
    assert_same_model(moved, model)


def test_several_files_and_what_was_there_before(tmp_path: Path) -> None:
    """Saved in several files over a folder of more, of which none stays."""
    plain = save_sparse(tmp_path / "plain", "llama-gqa")
    model = load(packed_of(plain))
    model.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    more = len(list((tmp_path / "again").glob("packed-*")))
    assert more > 3
    (tmp_path / "again" / "model.safetensors").write_bytes(b"")
    # Of files that are not there any more, so no loader could read them.
    (tmp_path / "again" / "model.safetensors.index.json").write_text("{}")
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert 1 < len(files) < more
    assert all(name.startswith("packed-") for name in files)
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()
    assert_same_model(load(tmp_path / "again"), model)
    assert pack.main([str(tmp_path / "again"), str(tmp_path / "back"), "--unpack"]) == 0
    for name, tensor in load(plain).state_dict().items():
        assert torch.equal(tensor, load(tmp_path / "back").state_dict()[name])
    whole = sum(
        tensor.nbytes for file in (tmp_path / "back").glob("*.safetensors") for tensor in load_file(file).values()
    )
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole, "of the plain tensors"


def test_a_copy_saves_itself(packed_model: Path, tmp_path: Path) -> None:
    model = load(packed_model)
    other = copy.deepcopy(model)
    other.model.norm.weight.fill_(3)
    other.save_pretrained(tmp_path / "again")
    assert bool((load(tmp_path / "again").model.norm.weight == 3).all())
    # The own loader's models save in the same way.
    packed_folder.load(packed_model, CPU)[0].save_pretrained(tmp_path / "own")
    assert_same_model(load(tmp_path / "own"), model)


def test_a_model_is_saved_in_the_dtype_that_it_has_now(packed_model: Path, tmp_path: Path) -> None:
    """Its configuration was written for another one."""
    model = load(packed_model).to(torch.bfloat16)
    model.config.dtype = torch.float32
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in load(tmp_path / "again", dtype="auto").parameters()} == {torch.bfloat16}


def test_a_save_that_fails_leaves_the_earlier_one(packed_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also if the model comes from there."""
    folder = tmp_path / "packed"
    shutil.copytree(packed_model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, save = load(folder), packed_writer.save_tensors

    def full(tensors: Any, path: Path, *more: Any) -> None:
        save(tensors, path, *more)
        if "00002-of" in path.name:
            raise OSError("no space left on device")

    monkeypatch.setattr(packed_writer, "save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder, max_shard_size="10KB")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert not (folder / FILE).exists()
    assert not list(folder.glob(".*"))
    assert_same_model(load(folder), load(packed_model))


def test_options_of_saving(packed_model: Path, tmp_path: Path) -> None:
    model = load(packed_model)
    with pytest.raises(ValueError, match="a packed model is saved without push_to_hub, variant"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True, variant="fp16", token="x")
    assert not (tmp_path / "again").exists()
    model.save_pretrained(tmp_path / "again", is_main_process=False)
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="is not serializable"):
        PreTrainedModel.save_pretrained(model, tmp_path / "again")


def test_without_the_import_nothing_loads(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers goes on where it does not know a quantizer; the folder stops it in words that say what to do."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    advice = "packed by LoSA; install the package losa-oracle and run `import torch_impl` before loading it"
    for loader in (AutoModelForCausalLM, AutoModel):
        for options in ({}, {"ignore_mismatched_sizes": True}, {"use_safetensors": False}, {"device_map": "auto"}):
            with pytest.raises(ValueError, match=advice):
                loader.from_pretrained(packed_model, **options)
    hf_quantizer.register()
    hf_quantizer.register()
    assert layers_of(load(packed_model))


PROGRAM = """
import sys
import torch_impl
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "importing the package imports what it may never need"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[1].mlp.up_proj).__name__ == "PackedLinear"
assert not any(type(finder).__module__.startswith("torch_impl") for finder in sys.meta_path)
"""


def test_the_import_is_enough(packed_model: Path) -> None:
    """In a process of its own, transformers imported afterwards."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, packed_model], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def other_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.bitmap"][3, 1] ^= 4


def without_part(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{KEY}.offsets"]


def without_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def without_packed(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("bitmap", "values", "offsets"):
        del tensors[f"{KEY}.{part}"]


def other_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.bitmap"] = tensors[f"{KEY}.bitmap"].repeat(1, 2)


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.more.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            other_bits,
            r"layers\.1\.mlp\.up_proj: offsets\[4\] is \d+, but bitmap has \d+ bits set.*pack the model again",
        ),
        (without_part, f"{KEY} is not complete; pack the model again"),
        (without_tensor, r"lacks model\.norm\.weight"),
        (without_packed, f"lacks {KEY}"),
        (other_shape, rf"{KEY} has \(48, 64\) for \(48, 32\)"),
        (one_more, r"without 1 of the stored tensors \(model\.more\.weight\)"),
    ],
)
def test_damage_is_refused(
    packed_model: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    """Nothing that is missing is drawn at random, as transformers would with a warning."""
    broken = Path(shutil.copytree(packed_model, tmp_path / "broken"))
    tensors = load_file(broken / FILE)
    damage(tensors)
    save_file(tensors, broken / FILE)
    with pytest.raises(ValueError, match=message):
        load(broken)


def test_another_class_is_refused(packed_model: Path) -> None:
    with pytest.raises(ValueError, match="loads as LlamaForCausalLM only, not as LlamaModel; use AutoModelForCausalLM"):
        AutoModel.from_pretrained(packed_model)


def test_what_is_saved_is_marked(packed_model: Path, tmp_path: Path) -> None:
    """As `pack` marks it, so that it stops transformers without the import."""
    load(packed_model).save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", packed_model))
    assert ours == theirs
    assert (tmp_path / "again" / "generation_config.json").is_file()
