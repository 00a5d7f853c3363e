"""The GPU layout of codes, scales and gaps: read lane by lane as the kernel does, stacked and in part, plans, and its choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests.assertions import assert_exact
from oracle_tests.fused_cases import DEVICE
from oracle_tests.programs import gpu_coded_gaps, gpu_codes
from oracle_tests.strategies import examples
from reference import quantise as spec
from torch_impl import packed, quantise
from torch_impl.decode import cuda, cuda_coded_gaps, cuda_layouts, packed_linear
from torch_impl.decode.coded_linear import CodedLinear
from torch_impl.decode.cuda_coded import CodedLayout
from torch_impl.decode.cuda_coded_gaps import CodedGapLayout
from torch_impl.decode.cuda_plan import Card, gaps_kernel_bytes

BF16 = torch.bfloat16


def rounded(rows: int, columns: int, zeros: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a random matrix, with an empty row, whose groups of columns differ in size."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    weight = torch.randn(rows, columns, generator=generator) * 3.0 ** (torch.arange(columns) // 128 % 5)
    weight[torch.rand(weight.shape, generator=generator) < zeros] = 0
    weight[rows // 2] = 0
    return quantise.quantise_rows(weight, bits)


def walk(layout: CodedGapLayout) -> np.ndarray:
    """The dense weight as the lanes find it: of four entries, all have the scale of the last one's columns."""
    data, index, eight = layout.data.numpy(), layout.starts.numpy(), layout.code_bits == 8
    panels, values = layout.strips * layout.panels, 256 if eight else 128
    starts, order, rest = np.split(index, [panels + 1, panels + 1 + layout.rows])
    reached, scales = np.split(rest, [panels * 16])
    reached = reached.view(np.uint16).reshape(layout.strips, layout.panels, 32)
    scales = scales.view(np.float16).reshape(layout.strips, -1, 32)
    dense = np.zeros((layout.rows, layout.columns))
    for strip, part, lane in np.ndindex(reached.shape):
        column, panel = int(reached[strip, part, lane]), strip * layout.panels + part
        for group in range(starts[panel], starts[panel + 1]):
            record = data[layout.slot * group :][: layout.slot]
            codes = record[values // 32 * lane :][: values // 32].astype(int)
            codes = codes - 128 if eight else np.concatenate([codes & 15, codes >> 4]) - 8
            nibbles = record[values + 4 * lane :][:4].astype(int)
            columns = column + np.concatenate([nibbles & 15, nibbles >> 4]).cumsum()
            for entry in np.flatnonzero(codes):
                scale = scales[strip, columns[entry | 3] // 128, lane].astype(float)
                dense[order[32 * strip + lane], columns[entry]] = codes[entry] * scale
            column = columns[-1]
    return dense


@settings(max_examples=examples(15))
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    zeros=st.sampled_from([0.0, 0.5, 0.7, 0.97, 1.0]),
    bits=st.sampled_from([8, 6, 4, 2]),
    parts=st.none() | st.integers(1, 7),
)
def test_lanes_find_their_codes(rows: int, columns: int, zeros: float, bits: int, parts: int | None) -> None:
    codes, scales = rounded(rows, columns, zeros, bits)
    layout = cuda_coded_gaps.pack_codes(codes, scales, bits, BF16, parts)
    # The kernels see memory, not strides.
    assert all(tensor.is_contiguous() for tensor in layout.tensors().values())
    assert len(layout.data) % layout.slot == 0
    weight = spec.dequantise_rows(codes.numpy(), scales.numpy())
    assert_exact("weight", weight, walk(layout))
    for name, expected, found in zip(("codes", "scales"), (codes, scales), layout.coded(), strict=True):
        assert_exact(name, expected, found)
    for dtype in cuda.DTYPES:
        assert torch.equal(layout.expanded(dtype), torch.from_numpy(weight).to(dtype))


@pytest.mark.parametrize("bits", [8, 3])
def test_stacked_and_in_part(bits: int) -> None:
    sizes = (64, 32, 5)
    coded = [rounded(rows, 300, 0.6, bits) for rows in sizes]
    layouts = [cuda_coded_gaps.pack_codes(*own, bits, torch.float16) for own in coded]
    stacked = cuda.stack(layouts)
    assert type(stacked) is CodedGapLayout
    assert (stacked.bits, stacked.slot, stacked.dtype) == (bits, layouts[0].slot, torch.float16)
    each = [spec.dequantise_rows(codes.numpy(), scales.numpy()) for codes, scales in coded]
    assert_exact("stacked", np.concatenate(each), walk(stacked))
    start = 0
    for rows, weight in zip(sizes, each, strict=True):
        own = stacked.part(start, rows)
        assert type(own) is CodedGapLayout
        assert own.data.data_ptr() == stacked.data.data_ptr()
        assert_exact("part", weight, walk(own))
        start += rows
    assert cuda.stack(layouts[::-1]) is None


def test_the_product_without_kernels() -> None:
    codes, scales = rounded(40, 300, 0.7, 8)
    layout = cuda_coded_gaps.pack_codes(codes.to(DEVICE), scales.to(DEVICE), 8, torch.float16)
    x, bias = torch.randn(2, 3, 300).half().to(DEVICE), torch.randn(40).half().to(DEVICE)
    weight = quantise.dequantise_rows(codes, scales).to(DEVICE)
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(cuda.matvec(layout, x, bias).float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(TypeError, match=r"^dtype is torch.float32; allowed: bfloat16 or float16$"):
        cuda_coded_gaps.pack_codes(codes, scales, 8, torch.float32)


@pytest.mark.parametrize(("bits", "slot"), [(8, 384), (5, 384), (4, 256), (2, 256)])
def test_a_plan_counts_the_scales(bits: int, slot: int) -> None:
    """In shared memory, those of each strip of a block."""
    some = torch.empty(0)
    for rows, columns, parts, together, at_once in (
        (22016, 4096, 8, 2, 8),
        (4096, 11008, 32, 1, 8),
        (8192, 28672, 32, 1, 2),
    ):
        layout = CodedGapLayout(rows, columns, parts, slot, BF16, some, some, (rows,), bits=bits)
        wide = 8 if bits > 4 else 4
        assert layout.plan == [rows, columns, parts, slot, 0, 1, 2, 8, wide, at_once, 0, 0, 0, together, 1, 0, 1]
        scales = together * -(-columns // 128) * 64
        warps = parts * together
        assert layout.shared(warps, 8) == gaps_kernel_bytes(columns, warps, 8) + scales
    # A row of x fits, but not with the scales.
    columns = (Card().shared - 32 * 128) // 2 // 128 * 128
    assert gaps_kernel_bytes(columns, 32, 1) <= Card().shared
    assert replace(layout, columns=columns).plan[cuda.SHARE] == 0


@pytest.mark.parametrize(
    ("zeros", "sequences", "kind"),
    [
        (0.0, 1, CodedLayout),
        (0.4, 1, CodedLayout),
        (0.5, 1, CodedGapLayout),
        (0.7, cuda_layouts.FEW, CodedGapLayout),
        (0.7, cuda_layouts.FEW + 1, CodedLayout),
        (0.9, 1, CodedGapLayout),
        (0.97, 1, CodedLayout),
        (1.0, 1, CodedGapLayout),
    ],
)
def test_few_sequences_and_many_zeros_have_gaps(zeros: float, sequences: int, kind: type[cuda.Layout]) -> None:
    codes, scales = rounded(640, 2048, zeros, 8)
    layout = cuda_layouts.lay_out_codes(codes, scales, 8, BF16, sequences)
    assert type(layout) is kind
    assert torch.equal(layout.expanded(BF16), quantise.dequantise_rows(codes, scales).to(BF16))


def layer_of(rows: int, zeros: float, bits: int, sequences: int = 1) -> CodedLinear:
    codes, scales = rounded(rows, 520, zeros, bits)
    bitmap, stream, offsets = packed.pack_codes(codes, bits)
    return CodedLinear((bitmap, stream, scales, offsets), 520, BF16, sequences=sequences)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layers_of_two_kinds_are_a_group_of_one() -> None:
    """Laid out again, by the rule for all of them; rows that are no whole strips, too."""
    for zeros, rows, kinds, sequences in (
        ((0.7, 0.2), (640, 64), {CodedGapLayout, CodedLayout}, 1),
        ((0.7, 0.7), (61, 64), {CodedGapLayout}, 1),
        ((0.7, 0.7), (61, 64), {CodedLayout}, 8),
    ):
        layers = [layer_of(*own, 6 + 2 * number, sequences) for number, own in enumerate(zip(rows, zeros, strict=True))]
        assert {type(layer.layout) for layer in layers} == kinds
        weights = [layer.unpacked() for layer in layers]
        packed_linear.join(layers)
        group = layers[0].group
        assert group is layers[1].group is not None
        assert group.layout.bits == 8
        assert type(group.layout) is (CodedGapLayout if sequences == 1 else CodedLayout)
        assert all(torch.equal(layer.unpacked(), weight) for layer, weight in zip(layers, weights, strict=True))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_more_sequences_than_the_layout_is_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Panels of codes take 24 at once."""
    for sequences, count, said in ((1, 8, False), (1, 12, True), (1, 25, False), (8, 12, False), (8, 25, False)):
        packed_linear._say.cache_clear()
        layer_of(64, 0.7, 8, sequences)(torch.ones(count, 1, 520, dtype=BF16))
        assert (f"load the model with sequences={count}" in capsys.readouterr().err) == said


def test_the_gpu_program_runs_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_codes, "BATCHES", ((1, 0), (8, 1)))
    small = ["--small", "--sparsities", "70", "--batches", "1"]
    assert gpu_coded_gaps.main(small) == 0
    printed = capsys.readouterr().out
    assert "a block   70 %    1" in printed
    assert "OUTSIDE" not in printed
    if DEVICE == "cpu":
        right = cuda.matvec
        monkeypatch.setattr(cuda, "matvec", lambda *arguments: right(*arguments) * 1.02)
        assert gpu_coded_gaps.main([*small, "--check"]) == 1
