"""What a model's folder means: every reader finds the same tensors in it, and refuses the same folders in the same words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from oracle_tests.model_folders import (
    PLAIN,
    Tensors,
    a_head_of_its_own,
    configure,
    edit,
    other,
    packed,
    place,
    read_json,
    said,
    save_sparse,
    single_and_index,
    sound,
    split,
    stale_shards,
    stored,
    tied,
    write,
)  # fmt: skip
from oracle_tests.small_runs import arguments
from torch_impl import _checks
from torch_impl.commands import compare, evaluate, generate, pack, run
from torch_impl.decode import packed_folder
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.adapted_linear import AdaptedLinear
from torch_impl.engine.checkpoints import fsdp, offload, pretrained, skeleton
from torch_impl.engine.checkpoints.contents import INDEX, SINGLE
from torch_impl.engine.decoder import Decoder

__all__ = ["place", "sound"]  # fixtures
CPU = torch.device("cpu")


# --- the same tensors in every reader ---


def in_memory(folder: Path) -> Tensors:
    return dict(pretrained.load(str(folder), CPU, "stored")[0].state_dict())


def from_files(folder: Path) -> Tensors:
    model = offload.open_offloaded(folder, CPU, None)
    decoder = Decoder(model)
    found = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for index, block in enumerate(offload.sweep(decoder)):
        found |= {decoder.full_name(index, name): tensor.clone() for name, tensor in block.state_dict().items()}
    return found


def in_shards(folder: Path) -> Tensors:
    model = fsdp.load(folder, CPU, None)
    layers = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not (name.endswith((".A", ".B")) and name[:-2] in layers)}


def packed_and_loaded(folder: Path) -> Tensors:
    model: PreTrainedModel = packed_folder.load(packed(folder), CPU)[0]
    found = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for part in ("bitmap", "values", "offsets"):
                del found[f"{name}.{part}"]
            found[f"{name}.weight"] = module.unpacked()
    return found


def packed_and_unpacked(folder: Path) -> Tensors:
    target = folder.parent / "unpacked"
    assert pack.main([str(packed(folder)), str(target), "--unpack"]) == 0
    for name, tensor in stored(target).items():
        assert torch.equal(tensor, stored(folder)[name]), name
    assert len(stored(target)) == len(stored(folder))
    return in_memory(target)


READERS = (in_memory, from_files, in_shards, packed_and_loaded, packed_and_unpacked)


def one_file_of_an_index(model: Path) -> None:
    split(model, 1)


def another_file_than_the_index_says(model: Path) -> None:
    """transformers takes all that the named files hold."""
    split(model)
    index = read_json(model / INDEX)
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    (model / INDEX).write_text(json.dumps(index))


def tied_by_its_head(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    edit(model, lambda tensors: tensors.pop("model.embed_tokens.weight"))


def tied_and_held_twice(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    edit(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))


def a_bare_decoder(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    write({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, model / SINGLE)


def left_over(model: Path) -> None:
    block = "model.layers.1.self_attn"
    more = {f"{block}.rotary_emb.inv_freq": torch.rand(4), "model.position_ids": torch.arange(5)}
    more |= {f"{block}.masked_bias": torch.tensor(-torch.inf), "model.decoder.version": torch.ones(1)}
    edit(model, lambda tensors: tensors.update(more))


def no_dtype(model: Path) -> None:
    """Most of the weights are in bfloat16, though most of the tensors are not."""
    configure(model, dtype=None)

    def halve(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if tensor.dim() == 1 else tensor.bfloat16()

    edit(model, halve)


SITUATIONS = (
    stale_shards, single_and_index, one_file_of_an_index, another_file_than_the_index_says, a_head_of_its_own, tied,
    tied_by_its_head, tied_and_held_twice, a_bare_decoder, left_over, no_dtype,
)  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__)
def test_every_reader_finds_what_transformers_finds(place: Path, situation: Callable[[Path], None]) -> None:
    model = place / "model"
    before = stored(model)
    situation(model)
    dtype = torch.bfloat16 if situation is no_dtype else torch.float32
    expected: Tensors = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).state_dict()
    head = "model.embed_tokens.weight" if situation in (tied, tied_and_held_twice) else "lm_head.weight"
    assert torch.equal(expected["lm_head.weight"], before[head].to(dtype))
    for reader in READERS:
        found = reader(model)
        assert set(found) == set(expected), reader.__name__
        for name, tensor in expected.items():
            assert found[name].dtype == dtype, (reader.__name__, name)
            assert torch.equal(found[name], tensor), (reader.__name__, name)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_no_bias_is_lost(family: str, tmp_path: Path) -> None:
    """Pack, read block by block, shard, and save the shards."""
    save_sparse(tmp_path / "model", family)
    expected: Tensors = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    biases = [name for name in expected if name.endswith("bias")]
    assert len(biases) > 8
    assert all(bool(expected[name].any()) for name in biases)
    model: Any = fsdp.load(tmp_path / "model", CPU, None)
    (tmp_path / "saved").mkdir()
    fsdp.save(Decoder(model), tmp_path / "saved")
    index = read_json(tmp_path / "saved" / INDEX)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in stored(tmp_path / "saved").values())}
    assert set(index["weight_map"]) == set(stored(tmp_path / "model"))
    results = [*(reader(tmp_path / "model") for reader in READERS), in_memory(tmp_path / "saved")]
    for found in results:
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_only_what_counts_is_hashed(place: Path) -> None:
    split(place / "model")
    before = pretrained.weights_hash(place / "model")
    write(other(stored(place / "model")), place / "model" / "model-00001-of-00009.safetensors")
    assert pretrained.weights_hash(place / "model") == before
    file = next(place.glob("model/model-00002-*"))
    write(other(load_file(file)), file)
    assert pretrained.weights_hash(place / "model") != before


@pytest.mark.skipif("LOSA_REALDATA" not in os.environ, reason="LOSA_REALDATA is unset: no trained model to read")
def test_a_trained_model_is_one_to_every_reader(tmp_path: Path) -> None:
    shutil.copytree(Path(os.environ["LOSA_REALDATA"]) / "stories260K", tmp_path / "model")
    expected = in_memory(tmp_path / "model")
    for reader in (from_files, in_shards):
        found = reader(tmp_path / "model")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- the same refusals from every command ---

Breaks = Callable[[Path], Any]


def after_split(change: Breaks) -> Breaks:
    def both(model: Path) -> None:
        split(model)
        change(model)

    return both


def edited(**changes: Any) -> Breaks:
    """Tensors, or functions of all tensors that make them."""
    return lambda model: edit(model, lambda tensors: tensors.update(changes))


def renamed(prefix: str) -> Breaks:
    return lambda model: write({f"{prefix}{k}": v for k, v in load_file(model / SINGLE).items()}, model / SINGLE)


def mapped(change: Callable[[dict[str, Any]], Any]) -> Breaks:
    def in_index(model: Path) -> None:
        split(model)
        index = read_json(model / INDEX)
        change(index)
        (model / INDEX).write_text(json.dumps(index))

    return in_index


def twice(model: Path) -> None:
    split(model)
    file = model / "model-00002-of-00003.safetensors"
    write({**load_file(file), **other(load_file(model / "model-00001-of-00003.safetensors"))}, file)


def as_bytes(model: Path) -> None:
    """What bitsandbytes stores instead of a weight."""
    edit(model, lambda t: t.update({KEY: t[KEY].abs().to(torch.uint8)}))


def as_float8(model: Path) -> None:
    edit(model, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}))


KEY = "model.layers.0.self_attn.q_proj.weight"
ATTENTION = KEY.removesuffix(".q_proj.weight")
REFUSED: dict[str, tuple[Breaks, str]] = {
    "a missing file": (
        after_split(lambda model: (model / "model-00002-of-00003.safetensors").unlink()),
        f"1 of the 3 files that {INDEX} names is missing (model-00002-of-00003.safetensors)",
    ),
    "a truncated file": (
        lambda model: (model / SINGLE).write_bytes((model / SINGLE).read_bytes()[:-1]),
        f"{SINGLE} is truncated or corrupt",
    ),
    "an index that is no JSON": (after_split(lambda model: (model / INDEX).write_text("{")), f"{INDEX} is not JSON"),
    "an index of nothing": (mapped(lambda index: index.pop("weight_map")), f"weight_map in {INDEX}"),
    "an index of other folders": (
        mapped(lambda index: index["weight_map"].update({KEY: "../place/model.safetensors"})),
        f"weight_map in {INDEX}",
    ),
    "an index of what is not held": (
        mapped(lambda index: index["weight_map"].update({"lm_head.bias": index["weight_map"][KEY]})),
        f"{INDEX} names 1 tensors that its files lack (lm_head.bias)",
    ),
    "a tensor in two files": (twice, " tensors twice ("),
    "a tensor by two names": (
        lambda model: edit(model, lambda t: t.update({"norm.weight": t["model.norm.weight"] * 2})),
        "store 1 tensors under two names (model.norm.weight and norm.weight)",
    ),
    "a block too many": (
        lambda model: configure(model, num_hidden_layers=2),
        "without 16 of the stored tensors (model.layers.2.input_layernorm.weight",
    ),
    "a block too few": (
        lambda model: configure(model, num_hidden_layers=4),
        "lacks model.layers.3.self_attn.q_proj.weight",
    ),
    "adapters in the file": (
        edited(**{f"{ATTENTION}.q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        f"without 2 of the stored tensors ({ATTENTION}.q_proj.lora_A.weight",
    ),
    "names of a compiled model": (renamed("_orig_mod."), "torch.compile added the prefix _orig_mod."),
    "names of a replicated model": (renamed("module."), "DistributedDataParallel added the prefix module."),
    "a score head": (edited(**{"score.weight": torch.ones(2, 32)}), "without 1 of the stored tensors (score.weight)"),
    "another shape": (
        edited(**{"model.norm.weight": torch.ones(3)}),
        "other shapes for 1 of its tensors (model.norm.weight has (3,) for (32,))",
    ),
    "a quantised configuration": (
        lambda model: configure(model, quantization_config={"quant_method": "fp8"}),
        "quantised (quantization_config in config.json: fp8)",
    ),
    "scales of fp8": (
        edited(**{f"{KEY}_scale_inv": torch.ones(1, 1)}),
        f"quantised (1 tensors: {KEY}_scale_inv)",
    ),
    "weights in fp8": (as_float8, f"quantised (1 tensors: {KEY})"),
    "weights as bytes": (as_bytes, f"quantised (1 tensors: {KEY})"),
    "codes of gptq": (
        edited(**{f"{ATTENTION}.q_proj.{x}": torch.ones(4, 4, dtype=torch.int32) for x in ("qweight", "qzeros")}),
        "quantised (2 tensors",
    ),
    "scales of bitsandbytes": (edited(**{f"{KEY}.absmax": torch.ones(4)}), f"quantised (1 tensors: {KEY}"),
    "an adapter's configuration": (
        lambda model: (model / "adapter_config.json").write_text("{}"),
        "adapter_config.json is an unmerged adapter",
    ),
    "an adapter": (
        lambda model: write({"a": torch.ones(1)}, model / "adapter_model.safetensors"),
        "adapter_model.safetensors is an unmerged adapter",
    ),
    "weights by another name": (
        lambda model: configure(model, transformers_weights="other.safetensors"),
        "names its weight file in transformers_weights",
    ),
    "pieces that transformers would prefer": (
        lambda model: write({"a": torch.ones(1)}, model / "shard-00001-model-00001-of-00001.safetensors"),
        "part of a distributed checkpoint",
    ),
    "pickles": (
        lambda model: (model / SINGLE).rename(model / "pytorch_model.bin"),
        "has neither model.safetensors nor",
    ),
    "sizes that do not fit": (
        lambda model: configure(model, vocab_size=10**9),
        "vocab_size is implausibly large, 1000000000",
    ),
    "no configuration": (lambda model: (model / "config.json").unlink(), "no config.json in this folder"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_every_command_refuses_in_the_same_words(place: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    breaks, words = REFUSED[fault]
    model = place / "model"
    breaks(model)
    before = sorted(path.name for path in place.iterdir())
    options = arguments(place, **PLAIN)
    lines = [said(capsys, run.main([*options, "--offload", offload])) for offload in ("on", "off")]
    lines.append(said(capsys, run.main([*options, "--dry_run"])))
    lines.append(said(capsys, pack.main([str(model), str(place / "packed"), "--device", "cpu"])))
    lines.append(said(capsys, generate.main([str(model), "--prompt", "x", "--device", "cpu"])))
    lines.append(said(capsys, compare.main(["quick", *arguments(place, learning_rate=None, output_dir=None)])))
    assert len(set(lines)) == 1, lines
    assert lines[0].startswith(f"error: model {model}")
    assert words in lines[0]
    assert len(lines[0]) < 400 + 3 * len(str(model))
    assert sorted(path.name for path in place.iterdir()) == before


def test_the_folder_of_a_run_names_its_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's output folder holds its model in `model`."""
    words = f"error: model {place}: no config.json in this folder; did you mean {place / 'model'}?"
    asked = [said(capsys, pack.main([str(place), str(place / "packed"), "--device", "cpu"]))]
    asked.append(said(capsys, generate.main([str(place), "--prompt", "x", "--device", "cpu"])))
    asked.append(said(capsys, evaluate.main([str(place), "--device", "cpu"])))
    asked.append(said(capsys, run.main([*arguments(place, **PLAIN), "--model", str(place)])))
    assert asked == [words] * 4


def test_a_hub_id_has_an_owner(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, generate.main(["gpt2", "--prompt", "x", "--device", "cpu"]))
    assert (
        told == "error: model gpt2: no such folder; give a Hugging Face model folder or a hub id, which is OWNER/NAME"
    )


def test_a_packed_model_is_not_pruned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(place / "model")
    line = said(capsys, run.main(arguments(place, **PLAIN, model=folder)))
    assert f"{folder} is packed; unpack it first: losa pack {folder} FOLDER --unpack" in line


def test_an_adapter_beside_a_packed_model_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed(place / "model") / "adapter_config.json").write_text("{}")
    assert "unmerged adapter" in said(
        capsys, generate.main([str(place / "packed"), "--prompt", "x", "--device", "cpu"])
    )


def test_names_are_shortened_and_counted() -> None:
    few = _checks.few
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(str(number) for number in range(1234)) == "0, 1, 2 and 1,231 more"
    assert few(["x" * 500]) == "x" * 100 + "…"


def test_a_parameter_that_may_be_missing_is_not_made_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would initialise it at random where its class lets it be missing."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm"])
    edit(place / "model", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        skeleton.describe(place / "model")


def test_what_a_class_ignores_may_lie_beside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(place / "model", lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"without 1 of the stored tensors \(mtp\.norm\.weight\)"):
        skeleton.describe(place / "model")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert skeleton.describe(place / "model").left_over == {"mtp.norm.weight"}
