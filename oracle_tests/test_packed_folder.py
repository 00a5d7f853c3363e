"""Packed models on disk: unpacking restores the bits, tokens are the same, and corrupt files give one error line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oracle_tests import tolerances
from oracle_tests.packed_models import assert_same_bits, save_sparse
from tiny_models.random_models import FAMILIES, byte_tokenizer, random_model, save_random_model
from torch_impl.bench.measure import resident
from torch_impl.commands import generate, pack
from torch_impl.decode import cpu, packed_config, packed_folder
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.decode.packed_rounding import Rounding
from torch_impl.engine.decoder import Decoder

CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILE = "packed-00001-of-00001.safetensors"
KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse(tmp_path_factory.mktemp("plain") / "model", "llama")


@pytest.fixture(scope="module")
def packed_model(plain: Path) -> Path:
    target = plain.parent / "packed"
    assert pack.main([str(plain), str(target), "--device", "cpu"]) == 0
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_plain_are_one_model(
    family: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 the same greedy tokens; in half precision logits within what other orders of summation make of them."""
    source = save_sparse(tmp_path / "plain", family, dtype)
    target, back = tmp_path / "packed", tmp_path / "back"
    assert pack.main([str(source), str(target), "--device", "cpu"]) == 0
    assert pack.main(["--unpack", str(target), str(back)]) == 0
    assert_same_bits(source, back)
    assert capsys.readouterr().err.count("error") == 0
    model, _ = packed_folder.load(target, CPU)
    other = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    decoder = Decoder(other)
    prunable = len(decoder.family.projections) * len(decoder.blocks)
    # The one left dense is larger packed, and so may be others of 40 % in half precision.
    assert prunable // 2 < len(layers) < prunable
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits.float(), other(input_ids=ids).logits.float()
        bound = tolerances.PACKED_LOGITS[dtype]
        assert float((ours - theirs).abs().max()) <= bound * float(theirs.abs().max())
        if dtype == torch.float32:
            mask = torch.ones_like(ids)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
            assert torch.equal(model.generate(ids, **options), other.generate(ids, **options))


def test_decoding_never_unpacks(packed_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.paths()
    model, _ = packed_folder.load(packed_model, CPU)
    monkeypatch.setattr(PackedLinear, "unpacked", None)
    model.generate(torch.ones(3, 5, dtype=torch.long), max_new_tokens=3, pad_token_id=0, do_sample=False)


def test_on_a_gpu_projections_of_one_input_are_loaded_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: list[str]
) -> None:
    """One of them was left dense; the prompt and each token are of as few products as there are inputs."""
    source = save_sparse(tmp_path / "plain", "llama-gqa", torch.bfloat16)
    assert pack.main([str(source), str(tmp_path / "packed"), "--device", "cpu"]) == 0
    arguments = [str(tmp_path / "packed"), "--prompt", "of some", "--device", DEVICE, "--max_new_tokens", "4"]
    options = generate._parser().parse_args(arguments)
    model, tokenizer = generate._load(options)
    projections = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)
    assert model.model.layers[0].self_attn.k_proj.group is model.model.layers[0].self_attn.v_proj.group is not None
    products = len({layer.group or layer for layer in projections})
    assert products < len(projections)
    as_on_a_gpu.clear()
    ids, _ = generate.generate(model, tokenizer, options)
    assert as_on_a_gpu.count("matvec") == 4 * products
    with monkeypatch.context() as patch:
        patch.setattr(packed_folder, "group_projections", lambda model: None)
        alone, _ = generate._load(options)
    assert torch.equal(generate.generate(alone, tokenizer, options)[0], ids)
    assert list(alone.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in alone.state_dict().items())
    # Every weight is there once.
    assert resident(model) < 1.01 * resident(alone)


def metadata(folder: Path) -> dict[str, dict[str, str] | None]:
    """What each file says of itself."""
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found[path.name] = file.metadata()
    return found


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("size", ["30KB", "1GB"])
def test_shards_and_their_metadata_come_back(tmp_path: Path, size: str) -> None:
    """Also one shard alone; what a file and the index say of themselves, if anything."""
    source = save_sparse(tmp_path / "plain", "llama-gqa", max_shard_size="30KB")
    files = sorted(source.glob("*.safetensors"))
    assert len(files) > 2
    if size == "1GB":
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in files[1:]:
            file.unlink()
        save_file(tensors, files[0])
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(reversed(tensors), files[0].name)}
        (source / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    else:
        save_file(load_file(files[1]), files[1], {"format": "pt", "made by": "hand"})
    assert pack.main([str(source), str(tmp_path / "packed"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == len(list(source.glob("*.safetensors")))
    stored = [tensor for file in (tmp_path / "packed").glob("*.safetensors") for tensor in load_file(file).values()]
    listed = json.loads((tmp_path / "packed" / "packed.safetensors.index.json").read_text())
    assert listed["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored)
    assert pack.main([str(tmp_path / "packed"), str(tmp_path / "back"), "--unpack"]) == 0
    assert_same_bits(source, tmp_path / "back")
    assert metadata(source) == metadata(tmp_path / "back")
    assert (source / INDEX).read_text() == (tmp_path / "back" / INDEX).read_text()
    if size == "30KB":
        AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_folder_that_an_earlier_version_packed_comes_back(tmp_path: Path) -> None:
    """It kept no index."""
    source = save_sparse(tmp_path / "plain", "llama-gqa", max_shard_size="30KB")
    assert pack.main([str(source), str(tmp_path / "packed"), "--device", "cpu"]) == 0
    manifest = json.loads((tmp_path / "packed" / "packed.json").read_text())
    del manifest["index"]
    (tmp_path / "packed" / "packed.json").write_text(json.dumps(manifest))
    assert pack.main([str(tmp_path / "packed"), str(tmp_path / "back"), "--unpack"]) == 0
    assert_same_bits(source, tmp_path / "back")
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (source, tmp_path / "back"))
    assert before["weight_map"] == after["weight_map"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_tensor_that_the_list_does_not_name_is_refused(packed_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(packed_model, tmp_path / "broken"))
    tensors = load_file(broken / FILE)
    save_file({**tensors, "more": torch.ones(1)}, broken / FILE)
    with pytest.raises(ValueError, match=rf"{FILE} has, but packed\.json lacks, more; pack"):
        packed_folder.load(broken, CPU)


def test_a_checkpoint_without_the_model_s_prefix_packs_too(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "plain"
    shutil.copytree(plain, source)
    tensors = load_file(source / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    assert pack.main([str(source), str(tmp_path / "packed"), "--device", "cpu"]) == 0
    model, _ = packed_folder.load(tmp_path / "packed", CPU)
    reference, _ = (
        packed_folder.load(plain.parent / "packed", CPU) if (plain.parent / "packed").exists() else (model, 0)
    )
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert any(isinstance(module, PackedLinear) for module in model.modules())


def eight_columns(folder: Path) -> Path:
    """A LLaMA whose projections keep their first eight columns, two of the zeros negative."""
    model = random_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter[:, 8:] = 0
        model.model.layers[0].self_attn.v_proj.weight[0, 10:12] = -0.0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# By hand, in float32: bitmap of whole words, kept values, an offset of eight bytes a row and one more; three blocks. Of the
# others 32 are zero: the embedding of the token that pads.
SQUARE = 3 * (32 * 4 + 32 * 8 * 4 + 33 * 8)
WIDE = 3 * (48 * 4 + 48 * 8 * 4 + 49 * 8)
NARROW = 3 * (32 * 8 + 32 * 8 * 4 + 33 * 8)
OTHER = 4 * (2 * 257 * 32 + 7 * 32)
BYTES = {
    "q_proj": (4 * 3 * 32 * 32, SQUARE),
    "k_proj": (4 * 3 * 32 * 32, SQUARE),
    "v_proj": (4 * 3 * 32 * 32, SQUARE + 2 * 4),
    "o_proj": (4 * 3 * 32 * 32, SQUARE),
    "gate_proj": (4 * 3 * 48 * 32, WIDE),
    "up_proj": (4 * 3 * 48 * 32, WIDE),
    "down_proj": (4 * 3 * 32 * 48, NARROW),
    "other": (OTHER, OTHER),
}
TABLE = """
           tensors  packed   zeros   before    after  of before  bits/weight
   q_proj        3       3  75.00%  0.01 MB  0.00 MB      0.346        11.06
   k_proj        3       3  75.00%  0.01 MB  0.00 MB      0.346        11.06
   v_proj        3       3  75.00%  0.01 MB  0.00 MB      0.346        11.08
   o_proj        3       3  75.00%  0.01 MB  0.00 MB      0.346        11.06
gate_proj        3       3  75.00%  0.02 MB  0.01 MB      0.345        11.04
  up_proj        3       3  75.00%  0.02 MB  0.01 MB      0.345        11.04
down_proj        3       3  83.33%  0.02 MB  0.00 MB      0.251         8.04
    other        9       0   0.19%  0.07 MB  0.07 MB      1.000        32.00
   in all       30      21  46.75%  0.17 MB  0.10 MB      0.590        18.89
"""


def test_the_table_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every column, against numbers worked out by hand."""
    source = eight_columns(tmp_path / "plain")
    (tmp_path / "twin").mkdir()
    savings = packed_folder.pack_folder(source, tmp_path / "twin", CPU)
    assert {saving.kind: (saving.before, saving.after) for saving in savings} == BYTES
    assert savings[-1].kind == "other"
    assert pack.main([str(source), str(tmp_path / "packed"), "--device", "cpu"]) == 0
    rows, note = capsys.readouterr().out.split("\n\n")[:2]
    expected = {line.split()[0]: line.split() for line in TABLE.strip("\n").splitlines()}
    found = {line.split()[0]: line.split() for line in rows.splitlines()}
    assert list(found)[-2:] == ["other", "in"]
    assert found == expected
    assert note == "2 zeros are negative and stored, because unpacking restores every bit."
    size = (tmp_path / "packed" / FILE).stat().st_size
    with (tmp_path / "packed" / FILE).open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert size - header == sum(after for _, after in BYTES.values())


def test_what_is_no_weight_is_copied_as_it_is(plain: Path, packed_model: Path, tmp_path: Path) -> None:
    """But for two entries of config.json, which unpacking takes out again."""
    config = json.loads((packed_model / "config.json").read_text())
    assert "sparsity_config" not in config
    added = {name: config.pop(name) for name in ("quantization_config", "transformers_weights")}
    assert added["quantization_config"] == {"quant_method": "losa-packed"}
    assert config == json.loads((plain / "config.json").read_text())
    assert (packed_model / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    assert pack.main([str(packed_model), str(tmp_path / "back"), "--unpack"]) == 0
    assert (tmp_path / "back" / "config.json").read_text() == (plain / "config.json").read_text()
    assert not (tmp_path / "back" / "packed.safetensors.index.json").exists()


def as_packed_before(folder: Path) -> Path:
    """The folder as the first version packed it: nothing for transformers."""
    packed_config.unmark(folder)
    (folder / "packed.safetensors.index.json").unlink()
    return folder


def test_a_folder_without_what_transformers_needs(packed_model: Path, tmp_path: Path) -> None:
    """transformers refuses it, and does not fill the gaps with random weights; the own loader reads it."""
    old = as_packed_before(Path(shutil.copytree(packed_model, tmp_path / "old")))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(old)
    new, now = packed_folder.load(old, CPU)[0].state_dict(), packed_folder.load(packed_model, CPU)[0].state_dict()
    assert all(torch.equal(new[name], now[name]) for name in now)
    assert pack.main([str(old), str(tmp_path / "back"), "--unpack"]) == 0


def test_values_that_a_narrower_dtype_rounds_to_zero(packed_model: Path, tmp_path: Path) -> None:
    """They are dropped: a packed weight keeps no zeros, whoever casts it."""
    tiny = Path(shutil.copytree(packed_model, tmp_path / "tiny"))
    tensors = load_file(tiny / FILE)
    tensors[f"{KEY}.values"][3:5] = 1e-9
    save_file(tensors, tiny / FILE)
    loaded, _ = packed_folder.load(tiny, CPU, torch.float16)
    layer = loaded.model.layers[1].mlp.up_proj
    assert len(layer.values) == layer.kept == len(tensors[f"{KEY}.values"]) - 2
    assert bool(layer.values.all())
    wide = packed_folder.load(tiny, CPU)[0].model.layers[1].mlp.up_proj
    assert wide.kept == layer.kept + 2
    assert torch.equal(wide.half().unpacked(), layer.unpacked())
    assert wide.kept == layer.kept


def turn_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.bitmap"][3, 1] ^= 4


def drop_a_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.values"] = tensors[f"{KEY}.values"][:-1].clone()


def move_an_offset(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.offsets"][5] = 2**40


def cut_the_bitmap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.bitmap"] = tensors[f"{KEY}.bitmap"][:-1].clone()


def cut_all(tensors: dict[str, torch.Tensor]) -> None:
    """One row fewer in every part: in itself consistent."""
    kept = int(tensors[f"{KEY}.offsets"][-2])
    for part, end in (("bitmap", -1), ("offsets", -1), ("values", kept)):
        tensors[f"{KEY}.{part}"] = tensors[f"{KEY}.{part}"][:end].clone()


def other_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.values"] = tensors[f"{KEY}.values"].bfloat16()


def remove(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{KEY}.offsets"]


def zero_a_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{KEY}.values"][7] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (turn_a_bit, r"offsets\[4\] is \d+, but bitmap has \d+ bits set"),
        (drop_a_value, r"values has \d+ entries, but bitmap has \d+ bits set"),
        (move_an_offset, r"offsets\[5\] is 1099511627776"),
        (cut_the_bitmap, r"offsets has shape \(49,\); allowed: \(48,\)"),
        (cut_all, r"(shape is \(47, 32\)|bitmap has 47 rows), but packed.json lists .*48"),
        (other_dtype, "dtype is bfloat16, but packed.json lists float32"),
        (remove, f"lacks, but packed.json lists, {KEY}.offsets; pack"),
        (zero_a_value, r"values\[7\] is 0"),
    ],
)
def test_damage_is_named(
    packed_model: Path, tmp_path: Path, damage: Callable[..., None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed_model, broken)
    tensors = load_file(broken / FILE)
    damage(tensors)
    save_file(tensors, broken / FILE)
    with pytest.raises(ValueError, match=message) as caught:
        packed_folder.load(broken, CPU)
    assert FILE in str(caught.value)
    assert KEY in str(caught.value)
    assert generate.main([str(broken), "--prompt", "x", "--device", "cpu"]) == 2
    assert pack.main(["--unpack", str(broken), str(tmp_path / "back")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and KEY in line for line in lines)
    assert not list(tmp_path.glob("*back*"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(packed_model: Path, tmp_path: Path, share: float) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed_model, broken)
    content = (broken / FILE).read_bytes()
    (broken / FILE).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"{FILE} is missing, truncated or corrupt \(.*\); pack"):
        packed_folder.load(broken, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-40], "is corrupt"),
        (
            lambda text: re.sub(r'"metadata": (null|{[^}]*})', '"metadata": 2', text),
            "is corrupt",
        ),
        (lambda text: text.replace(f'"file": "{FILE}"', '"file": [2]'), "is corrupt"),
        (
            lambda text: text.replace('"version": 1', '"version": 3'),
            "version 3, but this version reads only losa-packed, versions 1 and 2",
        ),
        (lambda text: text.replace(f'"{FILE}": {{', '"../other.safetensors": {'), "names files that are not"),
        (
            lambda text: text.replace(f'"{KEY}"', '"model.layers.7.mlp.up_proj.weight"'),
            r"without 1 of the stored tensors .*layers\.7\.",
        ),
    ],
)
def test_a_damaged_list_is_named(
    packed_model: Path, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed_model, broken)
    text = (broken / "packed.json").read_text()
    assert change(text) != text
    (broken / "packed.json").write_text(change(text))
    with pytest.raises(ValueError, match=message):
        packed_folder.load(broken, CPU)


def test_a_tensor_that_no_file_has_is_named(packed_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed_model, broken)
    manifest = json.loads((broken / "packed.json").read_text())
    del manifest["tensors"]["model.norm.weight"]
    (broken / "packed.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        packed_folder.load(broken, CPU)


def test_bad_arguments_get_one_line(
    plain: Path, packed_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for arguments, message in (
        ([str(tmp_path / "none"), out], "no such folder"),
        ([str(tmp_path / "none"), out, "--values", "int4", "--calibration_data", "stdlib"], "no such folder; give"),
        ([str(packed_model), out], "is already packed"),
        ([str(plain), out, "--unpack"], "no packed.json in this folder"),
        ([str(plain), str(packed_model)], "exists; use another folder or --overwrite"),
        ([str(plain), str(tmp_path / "full"), "--overwrite"], "holds files that are not a model's"),
        ([str(plain), out, "--device", "tpu"], "device is 'tpu'"),
    ):
        assert pack.main(arguments) == 2
        said = capsys.readouterr().err.strip()
        assert message in said.splitlines()[-1]
        assert said.count("error: ") == 1
    assert not (tmp_path / "out").exists()
    for option, value, message in (
        ("--max_new_tokens", "0", "max_new_tokens is 0; allowed: 1 to"),
        ("--temperature", "-1", "temperature is -1.0; allowed: 0, or 0.00001 or more"),
        ("--top_p", "0", "top_p is 0.0; allowed: above 0, up to 1"),
        ("--top_p", "0.9", "top_p is 0.9 and has no effect at temperature 0; give --temperature"),
        ("--seed", "-1", "seed is -1; allowed: 0 or more"),
        ("--dtype", "int8", "dtype is 'int8'; allowed: auto, float32"),
        ("--compile", "yes", "compile is 'yes'; allowed: auto, on, off"),
        ("--prompt", "", "prompt is ''; allowed: some text"),
    ):
        assert generate.main([str(packed_model), "--prompt", "x", option, value]) == 2
        assert message in capsys.readouterr().err
    assert generate.main([str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "no such folder" in capsys.readouterr().err
    monkeypatch.chdir(packed_model.parent)
    assert generate.main([f"{packed_model.name}/packed.json", "--prompt", "x"]) == 2
    assert f"{packed_model.name}/packed.json is a file; give the folder of the model, {packed_model.name}" in (
        capsys.readouterr().err
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_replaces_a_model(plain: Path, packed_model: Path, tmp_path: Path) -> None:
    for before in (packed_model, plain):
        target = tmp_path / before.name
        shutil.copytree(before, target)
        for name in ("README.md", "LICENSE.txt", "modeling_ours.py", "tokenizer.model", ".gitattributes"):
            (target / name).write_text("left over")
        assert pack.main([str(plain), str(target), "--overwrite", "--device", "cpu"]) == 0
        assert contents(target) == contents(packed_model)
    assert pack.main([str(packed_model), str(target), "--overwrite", "--unpack"]) == 0
    assert_same_bits(plain, target)


def test_overwrite_replaces_what_packing_a_model_with_a_card_has_written(plain: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "plain", tmp_path / "packed"
    shutil.copytree(plain, source)
    (source / "README.md").write_text("its card")
    for more in ([], ["--overwrite"]):
        assert pack.main([str(source), str(target), *more, "--device", "cpu"]) == 0
        assert (target / "README.plain.md").read_text() == "its card"


def beside(*names: str) -> Callable[[Path], Path]:
    """A model with something beside it."""

    def make(place: Path) -> Path:
        for name in names:
            (place / "out" / name).parent.mkdir(exist_ok=True)
            (place / "out" / name).write_text("{}")
        return place / "out"

    return make


def a_run(place: Path) -> Path:
    """Its model, and what else it leaves."""
    (place / "out").rename(place / "model")
    (place / "out").mkdir()
    (place / "model").rename(place / "out" / "model")
    for name in ("losa_config.toml", "losa_result.json", "report.html"):
        (place / "out" / name).write_text("{}")
    return place / "out"


def without(name: str) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        (place / "out" / name).unlink()
        return place / "out"

    return make


def a_link(place: Path) -> Path:
    (place / "link").symlink_to(place / "source")
    return place / "link"


@pytest.mark.parametrize("unpack", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_run, "holds files that are not a model's (losa_config.toml, losa_result"),
        (beside("losa_result.json"), "(losa_result.json)"),
        (beside("thesis.tex", "train.py", "data/a.txt", "notes.md"), "(data, notes.md, thesis.tex and 1 more)"),
        (beside("tokenizer/notes.txt"), "(tokenizer)"),
        (without("config.json"), "holds files that are not a model's"),
        (lambda place: place / "source", "is or contains MODEL"),
        (lambda place: place, "is or contains MODEL"),
        (a_link, "is or contains MODEL"),
    ],
)
def test_overwrite_replaces_nothing_else(
    plain: Path,
    packed_model: Path,
    tmp_path: Path,
    unpack: bool,
    make: Callable[[Path], Path],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "place"
    shutil.copytree(packed_model, place / "out")
    shutil.copytree(packed_model if unpack else plain, place / "source")
    target = make(place)
    before = contents(place)
    more = ["--unpack"] if unpack else ["--device", "cpu"]
    assert pack.main([str(place / "source"), str(target), "--overwrite", *more]) == 2
    assert message in capsys.readouterr().err
    assert contents(place) == before
    assert not list(tmp_path.rglob(".*partial"))


def test_a_dense_model_that_gains_nothing_is_told(
    tmp_path: Path, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_random_model(tmp_path / "dense", "llama")
    for model, told in ((plain, 0), (tmp_path / "dense", 1)):
        caplog.clear()
        (tmp_path / f"{model.name}-packed").mkdir()
        packed_folder.pack_folder(model, tmp_path / f"{model.name}-packed", CPU)
        assert len(caplog.records) == told
        assert all(
            "no projection gets smaller packed" in record.message and "packing leaves out zeros" in record.message
            for record in caplog.records
        )
    caplog.clear()
    (tmp_path / "int8").mkdir()
    packed_folder.pack_folder(tmp_path / "dense", tmp_path / "int8", CPU, rounding=Rounding("int8", None))
    assert not caplog.records, "codes are smaller than the weights of a dense model, too"


def test_kernels_are_compiled_before_the_first_token_is_timed(
    plain: Path, packed_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    generated = generate.generate
    monkeypatch.setattr(generate, "warm_up", lambda model: calls.append("warm up"))
    monkeypatch.setattr(generate, "generate", lambda *given: calls.append("generate") or generated(*given))
    for folder, expected in ((packed_model, ["warm up", "generate"]), (plain, ["generate"])):
        calls.clear()
        assert generate.main([str(folder), "--prompt", "def", "--max_new_tokens", "3", "--device", "cpu"]) == 0
        assert calls == expected


def test_generate_prints_the_same_text_for_packed_and_plain(
    plain: Path, packed_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for folder, *more in ((plain,), (packed_model,), (packed_model, "--compile", "on")):
        assert generate.main([str(folder), "--prompt", "def", "--max_new_tokens", "8", "--device", "cpu", *more]) == 0
        text = capsys.readouterr()
        assert "compilation failed" not in text.err
        assert ("compiling the blocks" in text.err) == bool(more)
        assert "tokens/s" in text.err
        assert "peak memory" in text.err
        shown.append(text.out)
    assert shown[0] == shown[1] == shown[2] != "\n"


def test_a_seed_is_a_text(packed_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        arguments = [str(packed_model), "--prompt", "def", "--max_new_tokens", "12", "--device", "cpu", *options]
        assert generate.main(arguments) == 0
        return capsys.readouterr().out

    hot = ("--temperature", "2")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot, "--top_p", "1e-6") == text()
    assert text("--dtype", "bfloat16")


def test_what_prepares_for_later_tokens_is_told_apart() -> None:
    even = [0.0, 1.0, *(1.0 + 0.5 * n for n in range(1, 21))]
    assert generate._rate(even) == "2.00 tokens/s"
    # The first token's time, then three that compile and capture in nine seconds, then twenty of half a second.
    compiling = [0.0, 1.0, 4.0, 7.0, 10.0, *(10.0 + 0.5 * n for n in range(1, 21))]
    assert generate._rate(compiling) == "2.00 tokens/s, after 9.0 s for the first 3, which compile and capture"
    assert generate._rate([0.0, 1.0, 4.0]) == "0.33 tokens/s"


def test_a_packed_folder_has_a_card_of_its_own(tmp_path: Path) -> None:
    """The plain model's says "a dense file", and comes back when the folder is unpacked; so it is without one."""
    plain = save_random_model(tmp_path / "plain", "llama")
    tensors = load_file(plain / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("_proj.weight"):
            tensor[: len(tensor) // 4] = 0
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    for card in ("# Mine\n\nA dense file.\n", None):
        if card is None:
            (plain / "README.md").unlink()
        else:
            (plain / "README.md").write_text(card)
        for name in ("packed", "again"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            (tmp_path / name).mkdir()
        savings = packed_folder.pack_folder(plain, tmp_path / "packed", torch.device("cpu"))
        text = (tmp_path / "packed" / "README.md").read_text()
        inside = [saving for saving in savings if saving.kind != "other"]
        bits = 8 * sum(saving.after for saving in inside) / sum(saving.positions for saving in inside)
        assert f"{bits:.2f} bits a weight" in text
        assert "have 25.0% zeros." in text
        assert "A dense file" not in text
        assert str(tmp_path) not in text
        packed_folder.unpack_folder(tmp_path / "packed", tmp_path / "again")
        found = tmp_path / "again" / "README.md"
        assert (found.read_text() if found.exists() else None) == card
        assert not (tmp_path / "again" / "README.plain.md").exists()
