"""What a model's folder means: every reader finds the same tensors in it, and refuses the same folders in the same words."""

from __future__ import annotations

import ast
import builtins
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, dynamic_module_utils

from oracle_tests.test_run import arguments, make_place
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl import generate, losa, pack, run
from torch_impl.engine import checkpoint, checkpoint_files, packed_folder, sharded, skeleton, streaming
from torch_impl.engine.checkpoint_files import INDEX, SINGLE
from torch_impl.engine.families import find_family
from torch_impl.engine.layers import AdaptedLinear
from torch_impl.engine.packed_linear import PackedLinear
from torch_impl.engine.settings import Settings
from torch_impl.experiment import compare

CPU = torch.device("cpu")
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
    """A folder with text and a model as it should be: biases everywhere, half of the projections sparse."""
    place = make_place(tmp_path_factory.mktemp("sound"))
    shutil.rmtree(place / "model")
    save_sparse(place / "model", attention_bias=True, mlp_bias=True)
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
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
    """What the files that count hold."""
    files = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if (folder / INDEX).exists() else [SINGLE]
    files = [SINGLE] if (folder / SINGLE).exists() else files
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write(tensors: Tensors, file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit(model: Path, change: Callable[[Tensors], Any]) -> None:
    """Change what the one file of a model holds, in place."""
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
    """The same tensors in several files with an index."""
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    of = {name: f"model-{k % parts + 1:05}-of-{parts:05}.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(of.values()):
        write({name: tensor for name, tensor in tensors.items() if of[name] == file}, model / file)
    index = {"metadata": {"total_size": 7, "made by": "hand"}, "weight_map": of}
    (model / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def other(tensors: Tensors) -> Tensors:
    """Tensors of the same names and shapes that are never the right ones."""
    return {name: torch.full_like(tensor, 3) for name, tensor in tensors.items()}


# --- the same tensors in every reader ---


def in_memory(folder: Path) -> Tensors:
    return dict(checkpoint.load(str(folder), CPU, "stored")[0].state_dict())


def from_files(folder: Path) -> Tensors:
    model = streaming.open_streamed(folder, CPU, None)
    family = find_family(model)
    found = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for index, block in enumerate(streaming.sweep(model, family)):
        found |= {f"{family.blocks}.{index}.{name}": tensor.clone() for name, tensor in block.state_dict().items()}
    return found


def in_shards(folder: Path) -> Tensors:
    model = sharded.load(folder, CPU, None)
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


def packed(folder: Path) -> Path:
    target = folder.parent / "packed"
    if not target.exists():
        assert pack.main([str(folder), str(target), "--device", "cpu"]) == 0
        assert any(entry["packed"] for entry in read_json(target / "packed.json")["tensors"].values())
    return target


READERS = (in_memory, from_files, in_shards, packed_and_loaded, packed_and_unpacked)


def stale_shards(model: Path) -> None:
    """Of an earlier save, which no index names."""
    split(model)
    write(other(stored(model)), model / "model-00001-of-00009.safetensors")


def single_and_index(model: Path) -> None:
    """transformers takes the single file."""
    tensors = load_file(model / SINGLE)
    split(model)
    for file in model.glob("model-*"):
        write(other(load_file(file)), file)
    write(tensors, model / SINGLE)


def one_file_of_an_index(model: Path) -> None:
    split(model, 1)


def another_file_than_the_index_says(model: Path) -> None:
    """transformers takes all that the named files hold."""
    split(model)
    index = read_json(model / INDEX)
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    (model / INDEX).write_text(json.dumps(index))


def a_head_of_its_own(model: Path) -> None:
    configure(model, tie_word_embeddings=True)


def tied(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    edit(model, lambda tensors: tensors.pop("lm_head.weight"))


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
        model: Any = sharded.load(place / "model", CPU, None)
        (place / "saved").mkdir()
        sharded.save(model, find_family(model), place / "saved")
    finally:
        assert os.umask(before) == MASK
    return place


def test_what_is_written_says_whether_the_head_is_tied(written: Path, place: Path) -> None:
    """Others tie what the configuration says, without a look at the files."""
    for folder in ("on/model", "off/model", "saved"):
        assert read_json(written / folder / "config.json")["tie_word_embeddings"] is False
    model: Any = sharded.load(written / "model", CPU, None)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied(place / "model")
    for loaded in (sharded.load(place / "model", CPU, None), checkpoint.load(str(place / "model"), CPU, "auto")[0]):
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


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_no_bias_is_lost(family: str, tmp_path: Path) -> None:
    """Packed, read block by block, in shards and saved from them."""
    save_sparse(tmp_path / "model", family)
    expected: Tensors = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    biases = [name for name in expected if name.endswith("bias")]
    assert len(biases) > 8
    assert all(bool(expected[name].any()) for name in biases)
    model: Any = sharded.load(tmp_path / "model", CPU, None)
    (tmp_path / "saved").mkdir()
    sharded.save(model, find_family(model), tmp_path / "saved")
    index = read_json(tmp_path / "saved" / INDEX)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in stored(tmp_path / "saved").values())}
    assert set(index["weight_map"]) == set(stored(tmp_path / "model"))
    results = [*(reader(tmp_path / "model") for reader in READERS), in_memory(tmp_path / "saved")]
    for found in results:
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_only_what_counts_is_hashed(place: Path) -> None:
    split(place / "model")
    before = checkpoint.weights_hash(place / "model")
    write(other(stored(place / "model")), place / "model" / "model-00001-of-00009.safetensors")
    assert checkpoint.weights_hash(place / "model") == before
    file = next(place.glob("model/model-00002-*"))
    write(other(load_file(file)), file)
    assert checkpoint.weights_hash(place / "model") != before


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
    """What bitsandbytes leaves in the place of a weight."""
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
        f"{SINGLE} cannot be read",
    ),
    "an index that is no JSON": (after_split(lambda model: (model / INDEX).write_text("{")), f"{INDEX} is not JSON"),
    "an index of nothing": (mapped(lambda index: index.pop("weight_map")), f"weight_map in {INDEX}"),
    "an index of other folders": (
        mapped(lambda index: index["weight_map"].update({KEY: "../place/model.safetensors"})),
        f"weight_map in {INDEX}",
    ),
    "an index of what is not held": (
        mapped(lambda index: index["weight_map"].update({"lm_head.bias": index["weight_map"][KEY]})),
        f"{INDEX} names 1 tensors that its files do not hold (lm_head.bias)",
    ),
    "a tensor in two files": (twice, "the same tensor twice, "),
    "a tensor by two names": (
        lambda model: edit(model, lambda t: t.update({"norm.weight": t["model.norm.weight"] * 2})),
        "by two names, 1 times (model.norm.weight and norm.weight)",
    ),
    "a block too many": (
        lambda model: configure(model, num_hidden_layers=2),
        "no place for 16 of its tensors (model.layers.2.input_layernorm.weight",
    ),
    "a block too few": (
        lambda model: configure(model, num_hidden_layers=4),
        "lacks model.layers.3.self_attn.q_proj.weight",
    ),
    "adapters in the file": (
        edited(**{f"{ATTENTION}.q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        f"no place for 2 of its tensors ({ATTENTION}.q_proj.lora_A.weight",
    ),
    "names of a compiled model": (renamed("_orig_mod."), "put before the names by torch.compile"),
    "names of a replicated model": (renamed("module."), "put before the names by DistributedDataParallel"),
    "a score head": (edited(**{"score.weight": torch.ones(2, 32)}), "no place for 1 of its tensors (score.weight)"),
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
        f"quantised, by 1 of its tensors ({KEY}_scale_inv)",
    ),
    "weights in fp8": (as_float8, f"quantised, by 1 of its tensors ({KEY})"),
    "weights as bytes": (as_bytes, f"quantised, by 1 of its tensors ({KEY})"),
    "codes of gptq": (
        edited(**{f"{ATTENTION}.q_proj.{x}": torch.ones(4, 4, dtype=torch.int32) for x in ("qweight", "qzeros")}),
        "quantised, by 2 of its tensors",
    ),
    "scales of bitsandbytes": (edited(**{f"{KEY}.absmax": torch.ones(4)}), f"quantised, by 1 of its tensors ({KEY}"),
    "an adapter's configuration": (
        lambda model: (model / "adapter_config.json").write_text("{}"),
        "adapter_config.json is an adapter that is not merged",
    ),
    "an adapter": (
        lambda model: write({"a": torch.ones(1)}, model / "adapter_model.safetensors"),
        "adapter_model.safetensors is an adapter that is not merged",
    ),
    "weights by another name": (
        lambda model: configure(model, transformers_weights="other.safetensors"),
        "names its weights by transformers_weights",
    ),
    "pieces that transformers would prefer": (
        lambda model: write({"a": torch.ones(1)}, model / "shard-00001-model-00001-of-00001.safetensors"),
        "piece of a distributed checkpoint",
    ),
    "pickles": (
        lambda model: (model / SINGLE).rename(model / "pytorch_model.bin"),
        "has no weights in safetensors files",
    ),
    "sizes that do not fit": (lambda model: configure(model, vocab_size=10**9), "vocab_size is 1000000000"),
    "no configuration": (lambda model: (model / "config.json").unlink(), "no config.json in this folder"),
}


def said(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line of a refusal."""
    shown = capsys.readouterr()
    [line] = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert status == 2, line
    assert "perplexity" not in shown.out
    return line


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
    lines.append(said(capsys, compare.main(arguments(place, learning_rate=None, output_dir=None))))
    assert len(set(lines)) == 1, lines
    assert lines[0].startswith(f"error: model {model}")
    assert words in lines[0]
    assert len(lines[0]) < 400 + 3 * len(str(model))
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_packed_model_is_not_pruned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed(place / "model")
    line = said(capsys, run.main(arguments(place, **PLAIN, model=folder)))
    assert f"{folder} is packed; unpack it first: python -m torch_impl.pack {folder} FOLDER --unpack" in line


def test_an_adapter_beside_a_packed_model_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (packed(place / "model") / "adapter_config.json").write_text("{}")
    assert "not merged" in said(capsys, generate.main([str(place / "packed"), "--prompt", "x", "--device", "cpu"]))


def test_names_are_shortened_and_counted() -> None:
    few = checkpoint_files.few
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(str(number) for number in range(1234)) == "0, 1, 2 and 1,231 more"
    assert few(["x" * 500]) == "x" * 100 + "…"


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
        sharded.load(place / "model", CPU, None)
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
    losa.check_model(model, Settings())
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = torch.inf
    with pytest.raises(ValueError, match=f"^{name} holds NaN or infinity"):
        losa.check_model(model, Settings())


def test_what_float16_cannot_hold_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place / "model", lambda tensors: tensors[KEY].view(-1)[:2].copy_(torch.tensor([65504.0, -65504.0])))
    checkpoint.load(str(place / "model"), CPU, "float16")
    edit(place / "model", lambda tensors: tensors[KEY].view(-1)[:1].fill_(1e6))
    packed(place / "model")
    for folder in ("model", "packed"):
        found = generate.main([str(place / folder), "--prompt", "x", "--device", "cpu", "--dtype", "float16"])
        line = said(capsys, found)
        assert f"{KEY} holds NaN or infinity (1 of " in line
        assert "; try --dtype bfloat16, or another checkpoint" in line


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
    assert checkpoint.outline(str(place / "model"), torch.device("cuda"), "auto").dtype == getattr(torch, expected)
    assert checkpoint.outline(str(place / "model"), CPU, "auto").dtype == torch.float32


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
    model: Any = sharded.load(place / "model", CPU, None, trust_remote_code=True)
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
        assert "needs the code that comes with it; --trust_remote_code true runs it" in line
    assert not (place / "new").exists()


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def test_every_place_that_loads_says_whether_code_is_trusted() -> None:
    """Else transformers asks on standard input."""
    found = 0
    for path in Path(run.__file__).parent.rglob("*.py"):
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
    monkeypatch.setattr(checkpoint, "_importable", lambda module: module in installed)
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
    place: Path, situation: Breaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And used by its name all the way, from configuration to tokenizer.model."""
    monkeypatch.chdir(place)
    model = place / "model"
    situation(model)
    (model / "tokenizer.model").write_bytes(b"kept")
    write({"a": torch.ones(1)}, model / "consolidated.safetensors")
    hub = Hub(model, place / "cache")
    monkeypatch.setattr(checkpoint_files, "snapshot_download", hub)
    assert run.main([*arguments(place, **PLAIN, model="some/model"), "--dry_run"]) == 0
    assert not any(name.endswith(".safetensors") for name in hub.given)
    offload = "on" if situation is stale_shards else "off"
    assert run.main(arguments(place, **PLAIN, model="some/model", offload=offload)) == 0
    assert (place / "out" / "model" / "tokenizer.model").exists()
    assert read_json(place / "out" / "environment.json")["model_sha256"] == checkpoint.weights_hash(model)
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    downloaded = {name for name in hub.given if name.endswith(".safetensors")}
    assert downloaded == ({SINGLE} if situation is single_and_index else shards)


def test_a_hub_that_does_not_answer_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(*_: Any, **__: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(checkpoint_files, "snapshot_download", silent)
    line = said(capsys, run.main(arguments(place, **PLAIN, model="some/model")))
    assert line == "error: model some/model cannot be downloaded: no network"


def test_a_parameter_that_may_be_missing_is_not_made_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would draw it at random where its class lets it be missing."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"model\.norm"])
    edit(place / "model", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        skeleton.describe(place / "model")


def test_what_a_class_ignores_may_lie_beside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    edit(place / "model", lambda tensors: tensors.update({"mtp.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"no place for 1 of its tensors \(mtp\.norm\.weight\)"):
        skeleton.describe(place / "model")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert skeleton.describe(place / "model").left_over == {"mtp.norm.weight"}
