"""Which layout a packed weight has on a GPU: the rule, how a user says for what, and that both kinds are the same model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import torch_impl
from oracle_tests.fused_cases import DEVICE
from oracle_tests.fused_models import model_of, next_tokens, pack
from oracle_tests.packed_models import save_sparse
from oracle_tests.tolerances import PACKED_LOGITS
from torch_impl.bench import decode, whole
from torch_impl.decode import cuda, cuda_gaps, cuda_layouts, packed_linear, packed_step
from torch_impl.decode.cuda_coded import CodedLayout
from torch_impl.decode.cuda_coded_gaps import CodedGapLayout
from torch_impl.decode.cuda_gaps import GapLayout
from torch_impl.decode.packed_group import Packed
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.decode.packed_quantizer import PackedConfig
from torch_impl.masks.nm import nm_mask

BF16 = torch.bfloat16


def weight_of(zeros: float, rows: int = 640, columns: int = 2048) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(BF16)
    return weight.masked_fill_(torch.rand(rows, columns) < zeros, 0)


def kinds(model: nn.Module) -> list[type[cuda.Layout]]:
    held = [module.layout for module in model.modules() if isinstance(module, Packed)]
    return [type(layout) for layout in held if layout is not None]


@pytest.mark.parametrize(
    ("zeros", "sequences", "kind"),
    [
        (0.0, 1, cuda.Layout),
        (0.4, 1, cuda.Layout),
        (0.5, 1, GapLayout),
        (0.6, 1, GapLayout),
        (0.7, 2, GapLayout),
        (0.7, 3, cuda.Layout),
        (0.7, 64, cuda.Layout),
        (0.9, 2, GapLayout),
        # Fillers between the few values take more than bitmaps.
        (0.99, 1, cuda.Layout),
        (1.0, 1, GapLayout),
    ],
)
def test_few_sequences_and_many_zeros_have_gaps(zeros: float, sequences: int, kind: type[cuda.Layout]) -> None:
    weight = weight_of(zeros)
    layout = cuda_layouts.lay_out(weight, sequences)
    assert type(layout) is kind
    assert torch.equal(layout.expanded(BF16), weight)
    if sequences == 1:
        assert type(cuda_layouts.lay_out(weight)) is kind


def test_a_pattern_of_two_in_four_has_gaps_and_three_in_four_is_not_packed_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, most = (weight_of(0) * nm_mask(torch.rand(640, 2048), n, 4) for n in (2, 3))
    assert type(cuda_layouts.lay_out(half)) is GapLayout
    monkeypatch.setattr(cuda_gaps, "pack_gaps_rows", None)
    assert type(cuda_layouts.lay_out(most)) is cuda.Layout


@pytest.mark.parametrize("shape", [(640, 2048), (41, 70), (33, 1000)])
def test_the_bytes_are_compared_with_those_of_panels(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for zeros in (0.56, 0.7, 0.95):
        weight = weight_of(zeros, *shape)
        panels, gaps = cuda.pack_rows(weight).nbytes, cuda_gaps.pack_gaps_rows(weight).nbytes
        for share, kind in ((0.99, cuda.Layout), (1.01, GapLayout)):
            monkeypatch.setattr(cuda_layouts, "MOST_SIZE", share * gaps / panels)
            assert type(cuda_layouts.lay_out(weight)) is kind


def test_other_dtypes_are_refused() -> None:
    for sequences in (1, 64):
        with pytest.raises(TypeError, match=r"^weight has dtype torch.float32; allowed: bfloat16 or float16"):
            cuda_layouts.lay_out(torch.ones(3, 8), sequences)


@torch.no_grad()
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", ["llama", "biases", "llama-gqa"])
def test_logits_are_the_plain_model_s(name: str, kind: type[cuda.Layout], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a prompt and of single tokens, by the model and by the fused step, in eight launches a block without a word."""
    for dtype in (BF16, torch.float16):
        model = model_of(name, dtype=dtype).to(DEVICE)
        plain = copy.deepcopy(model)
        pack(model)
        for (block, path), (packed_block, _) in zip(whole.places(plain), whole.places(model), strict=True):
            block.get_submodule(path).weight.copy_(packed_block.get_submodule(path).unpacked())
        assert set(kinds(model)) == {kind}
        ids = torch.arange(3 * 11, device=DEVICE).view(3, 11)
        pairs = [(model(ids).logits, plain(ids).logits)]
        for batch in (1, 3):
            expected = next_tokens(plain, kernels=False, batch=batch)[0]
            for kernels in (False, True):
                found, _, following = next_tokens(model, kernels=kernels, batch=batch)
                assert following.kernels == kernels
                pairs.append((found, expected))
        for found, expected in pairs:
            assert float((found - expected).abs().max() / expected.abs().max()) <= PACKED_LOGITS[dtype]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gaps_take_eight_launches_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packed_step, "FIVE", True)
    monkeypatch.setattr(cuda_layouts, "MOST_KEPT", 1)
    monkeypatch.setattr(cuda_layouts, "MOST_SIZE", float("inf"))
    for sequences, five in ((1, False), (8, True)):
        model = model_of("llama", dtype=BF16)
        pack(model, sequences)
        step: Any = next_tokens(model, kernels=True)[2]._fused
        assert bool(step._step.packed) == five
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layers_of_two_kinds_are_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out again, by the rule for all of them. Here the second would be small, but has a long row."""
    linears = [nn.Linear(1024, rows, dtype=BF16) for rows in (1024, 64)]
    for linear in linears:
        linear.weight.data[torch.rand(linear.weight.shape) < 0.7] = 0
    nn.init.ones_(linears[1].weight[5])
    layers = [PackedLinear.of(linear) for linear in linears]
    assert [type(layer.layout) for layer in layers] == [GapLayout, cuda.Layout]
    packed_linear.join(layers)
    assert layers[0].group is layers[1].group is not None
    assert type(layers[0].group.layout) is GapLayout
    assert all(torch.equal(layer.unpacked(), linear.weight) for layer, linear in zip(layers, linears, strict=True))
    # Rows that are no whole strips are laid out again, too.
    monkeypatch.setattr(cuda_layouts, "MOST_SIZE", float("inf"))
    for sequences, kind in ((1, GapLayout), (8, cuda.Layout)):
        some = [PackedLinear.of(linear, sequences) for linear in (linears[0], nn.Linear(1024, 5, dtype=BF16))]
        packed_linear.join(some[::-1])
        assert type(some[0].group.layout) is kind


@pytest.mark.usefixtures("as_on_a_gpu", "kind")
def test_compiled_code_computes_a_group_once() -> None:
    linears = [nn.Linear(70, rows, dtype=BF16).to(DEVICE) for rows in (64, 32, 7)]
    layers = [PackedLinear.of(linear) for linear in linears]
    packed_linear.join(layers)
    model = nn.ModuleList(layers)
    run = torch.compile(lambda x: [layer(x) for layer in model], backend="aot_eager", fullgraph=True)
    for count in (1, 9):
        x = torch.randn(count, 70, device=DEVICE).to(BF16)
        for found, layer, linear in zip(run(x), layers, linears, strict=True):
            assert torch.equal(found, layer(x))
            torch.testing.assert_close(found, linear(x), rtol=2**-6, atol=2**-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = save_sparse(tmp_path_factory.mktemp("layouts") / "plain", "llama-gqa", BF16)
    torch_impl.pack(plain, plain.parent / "packed")
    torch_impl.pack(plain, plain.parent / "codes", values="int8")
    return plain.parent


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_model_is_loaded_for_a_number_of_sequences(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layouts, "MOST_KEPT", 1)
    monkeypatch.setattr(cuda_layouts, "MOST_SIZE", float("inf"))
    monkeypatch.setattr(cuda_layouts, "MOST_ENTRIES", float("inf"))
    name = folder / "packed"

    def by_transformers(**entries: Any) -> Any:
        config = AutoConfig.from_pretrained(name)
        config.quantization_config |= entries
        return AutoModelForCausalLM.from_pretrained(name, config=config)

    for few in (torch_impl.load_packed(name, "cpu"), AutoModelForCausalLM.from_pretrained(name), by_transformers()):
        assert set(kinds(few)) == {GapLayout}
    for many in (torch_impl.load_packed(name, "cpu", sequences=8), by_transformers(sequences=8)):
        assert set(kinds(many)) == {cuda.Layout}
        assert all(torch.equal(own, few.state_dict()[key]) for key, own in many.state_dict().items())
        # Moved or cast there and back, and copied, too.
        for again in (many.to(torch.float32).to(BF16), copy.deepcopy(many), pickle.loads(pickle.dumps(many))):
            assert set(kinds(again)) == {cuda.Layout}
    many.save_pretrained(folder / "again")
    assert set(kinds(torch_impl.load_packed(folder / "again", "cpu"))) == {GapLayout}
    for sequences, kind in ((1, CodedGapLayout), (2, CodedGapLayout), (8, CodedLayout)):
        coded = torch_impl.load_packed(folder / "codes", "cpu", sequences=sequences)
        assert set(kinds(coded)) == {kind}
        for again in (coded.to(torch.float32).to(BF16), copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
            assert set(kinds(again)) == {kind}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_group_has_the_layout_for_the_most_sequences_of_its_layers() -> None:
    """One for few would make the others' sequences slow; one for many holds for all."""
    linears = []
    for _ in range(2):
        linears.append(nn.Linear(2048, 640, bias=False, dtype=BF16))
        linears[-1].weight.data = weight_of(0.7)
    for numbers, kind in (((1, 2), GapLayout), ((1, 8), cuda.Layout), ((8, 1), cuda.Layout)):
        layers = [PackedLinear.of(linear, number) for linear, number in zip(linears, numbers, strict=True)]
        packed_linear.join(layers)
        assert layers[0].group is layers[1].group is not None
        assert type(layers[0].group.layout) is kind
        assert all(torch.equal(layer.unpacked(), weight_of(0.7)) for layer in layers)


def test_the_number_of_sequences_is_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^sequences is 0; allowed: 1 or more"):
        torch_impl.load_packed(folder / "packed", "cpu", sequences=0)
    with pytest.raises(TypeError, match=r"^sequences is"):
        torch_impl.load_packed(folder / "packed", "cpu", sequences="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sequences is -1; allowed: 1 or more"):
        PackedConfig(sequences=-1)


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
@pytest.mark.parametrize("sequences", [1, 8])
def test_more_sequences_than_the_layout_is_for_are_said_once(
    sequences: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token each; a prompt is slower in no layout."""
    packed_linear._say.cache_clear()
    monkeypatch.setattr(cuda_layouts, "MOST_KEPT", 1)
    monkeypatch.setattr(cuda_layouts, "MOST_SIZE", float("inf"))
    model = model_of("llama", dtype=BF16)
    pack(model, sequences)
    model(torch.arange(12)[None])
    model(torch.arange(24).view(12, 2))
    model(torch.arange(8)[:, None])
    model(torch.arange(70)[:, None])
    assert capsys.readouterr().err == ""
    for _ in range(2):
        model(torch.arange(12)[:, None])
    said = (
        "packed weights: their layout is for up to 2 sequences at once, so decoding 12 is slower; load the model with "
        "sequences=12\n"
    )
    assert capsys.readouterr().err == (said if sequences == 1 else "")


def test_benchmarks_time_the_layout_of_each_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    arguments = ["--device", "cpu", "--whole_model", "small", "--blocks", "1", "--tokens", "2", "--repeats", "2"]
    words = [*arguments, "--batches", "1", "2", "3", "8", "--sparsities", "70", "--geometries", "small"]
    options = decode._parser().parse_args(words)
    of, pack_one = PackedLinear.of, decode.pack
    monkeypatch.setattr(PackedLinear, "of", lambda linear, number: made.append(number) or of(linear, number))
    assert [row.batch for row in whole.measure(options)] == [1, 2, 3, 8]
    assert made == 7 * [1] + 7 * [3]
    made.clear()
    monkeypatch.setattr(decode, "_copies", lambda *_: 1)
    monkeypatch.setattr(decode, "_times", lambda *_: (1.0, 1.0, None))
    monkeypatch.setattr(decode, "_lossy", lambda weight: [None, None])
    monkeypatch.setattr(decode, "pack", lambda *given: made.append(given[2]) or pack_one(*given))
    cells = decode.measure("small", options, 1.0)
    assert [cell.batch for cell in cells] == 4 * [1, 2, 3, 8]
    assert made == 4 * [1, 3]
