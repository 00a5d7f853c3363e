"""The GPU layout of values and gaps: read lane by lane as the kernel does, stacked and in part, and its plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests.assertions import assert_exact
from oracle_tests.fused_cases import DEVICE
from oracle_tests.programs import gpu_gaps
from oracle_tests.sparse_weights import sparse_weights
from oracle_tests.strategies import examples
from torch_impl.decode import cuda, cuda_gaps, cuda_plan
from torch_impl.decode.cuda_plan import Card


def walk(layout: cuda_gaps.GapLayout) -> np.ndarray:
    """The dense weight's bits as the lanes find them, each part from the column that is stored for it."""
    data, index = layout.data.numpy(), layout.starts.numpy()
    panels = layout.strips * layout.panels
    starts, rest = index[: panels + 1], index[panels + 1 :]
    order, reached = rest[: layout.rows], rest[layout.rows :].view(np.uint16).reshape(layout.strips, layout.panels, 32)
    dense = np.zeros((layout.rows, layout.columns), dtype=np.uint16)
    for strip, part, lane in np.ndindex(reached.shape):
        column, panel = int(reached[strip, part, lane]), strip * layout.panels + part
        for group in range(starts[panel], starts[panel + 1]):
            record = data[640 * group :][:640]
            values, nibbles = record[16 * lane :][:16].view(np.uint16), record[512 + 4 * lane :][:4]
            for entry in range(8):
                column += int(nibbles[entry % 4]) >> entry // 4 * 4 & 15
                if values[entry]:
                    dense[order[32 * strip + lane], column] = values[entry]
    return dense


def bits(weight: torch.Tensor) -> np.ndarray:
    """All bits are 0 where there was a zero of either sign."""
    return torch.where(weight == 0, 0, weight).view(torch.uint16).numpy()


@settings(max_examples=examples(15))
@given(weight=sparse_weights(), parts=st.none() | st.integers(1, 7))
def test_lanes_find_their_numbers(weight: torch.Tensor, parts: int | None) -> None:
    layout = cuda_gaps.pack_gaps_rows(weight, parts)
    # The kernels see memory, not strides.
    assert all(tensor.is_contiguous() for tensor in layout.tensors().values())
    assert_exact("bits", bits(weight), walk(layout))
    assert_exact("unpacked", bits(weight), bits(cuda.unpack(layout)))


@settings(max_examples=examples(10))
@given(data=st.data(), columns=st.integers(1, 400))
def test_stacked_and_in_part(data: st.DataObject, columns: int) -> None:
    sizes = [*data.draw(st.lists(st.sampled_from([32, 64]), min_size=1, max_size=3)), data.draw(st.integers(1, 40))]
    generator = torch.Generator().manual_seed(columns)
    weights = [torch.randn(rows, columns, generator=generator).bfloat16() for rows in sizes]
    for weight in weights:
        weight[torch.rand(weight.shape, generator=generator) < torch.rand(len(weight), 1, generator=generator)] = 0
    stacked = cuda.stack([cuda_gaps.pack_gaps_rows(weight) for weight in weights])
    assert isinstance(stacked, cuda_gaps.GapLayout)
    assert stacked.panels == cuda_gaps.pack_gaps_rows(torch.cat(weights)).panels
    assert_exact("stacked", bits(torch.cat(weights)), walk(stacked))
    start = 0
    for weight in weights:
        own = stacked.part(start, len(weight))
        assert isinstance(own, cuda_gaps.GapLayout)
        assert own.data.data_ptr() == stacked.data.data_ptr()
        assert_exact("part", bits(weight), walk(own))
        assert_exact("unpacked part", bits(weight), bits(own.expanded(weight.dtype)))
        start += len(weight)
    both = stacked.part(0, sizes[0] + sizes[1])
    assert isinstance(both, cuda_gaps.GapLayout)
    assert_exact("two parts", bits(torch.cat(weights[:2])), walk(both))
    # Rows of a weight are in an order of their own, so they are not a part.
    assert stacked.part(0, sizes[0] - 1) is None
    assert stacked.part(16, sizes[0] - 16) is None
    if sizes[-1] % 32:
        assert cuda.stack([cuda_gaps.pack_gaps_rows(weight) for weight in weights[::-1]]) is None


def test_the_product_without_kernels() -> None:
    weight = torch.randn(40, 100).half() * (torch.rand(40, 100) < 0.3)
    layout = cuda_gaps.pack_gaps_rows(weight.to(DEVICE))
    x, bias = torch.randn(2, 3, 100).half().to(DEVICE), torch.randn(40).half().to(DEVICE)
    y = cuda.matvec(layout, x, bias)
    expected = torch.nn.functional.linear(x.float(), weight.to(DEVICE).float(), bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3)
    parts = cuda.matvec_parts(layout, x, bias, [30, 10])
    assert_exact("parts", y.cpu(), torch.cat(list(parts), -1).cpu())
    with pytest.raises(TypeError, match=r"^weight has dtype torch.float32; allowed: bfloat16 or float16$"):
        cuda_gaps.pack_gaps_rows(torch.ones(3, 8))


def test_the_gpu_program_runs_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_gaps, "BATCHES", ((1, 0), (8, 3)))
    small = ["--small", "--sparsities", "70", "--batches", "1"]
    assert gpu_gaps.main(small) == 0
    assert "a block   70 %    1" in capsys.readouterr().out
    if DEVICE == "cpu":
        right = cuda.matvec
        monkeypatch.setattr(cuda, "matvec", lambda *arguments: right(*arguments) * 1.02)
        assert gpu_gaps.main([*small, "--check"]) == 1


def layout_of(rows: int, columns: int) -> cuda_gaps.GapLayout:
    """A layout without its data, for an H200."""
    parts = cuda_plan.choose_parts(rows, columns, Card().processors)
    some = torch.empty(0)
    return cuda_gaps.GapLayout(rows, columns, parts, cuda_gaps.GROUP, torch.bfloat16, some, some, (rows,))


@pytest.mark.parametrize(
    ("rows", "columns", "parts", "together"),
    [
        # 7B's q, k and v; o; gate and up; down. 70B's gate and up. 1B's q, k and v; its down.
        (12288, 4096, 16, 1),
        (4096, 4096, 32, 1),
        (22016, 4096, 8, 2),
        (4096, 11008, 32, 1),
        (57344, 8192, 8, 2),
        (3072, 2048, 16, 1),
        (2048, 8192, 32, 1),
        (64, 100, 1, 1),
    ],
)
def test_plans_of_known_shapes(rows: int, columns: int, parts: int, together: int) -> None:
    layout = layout_of(rows, columns)
    assert layout.plan[: cuda.SHARE + 1] == [rows, columns, parts, 640, 0, 1]
    assert layout.plan[cuda.TOGETHER] == together
    assert layout.plan[-1] == 1


def test_a_plan_fits_the_gpu() -> None:
    """A block has up to 32 warps, and as many rows of x at once as fit in its memory."""
    for rows, columns, at_once in (
        (4096, 4096, 8),
        (4096, 11008, 8),
        (8192, 28672, 2),
        (8192, 60000, 1),
        (64, 120000, 0),
    ):
        layout = layout_of(rows, columns)
        warps = layout.panels * layout.plan[cuda.TOGETHER]
        assert warps <= 32
        assert layout.plan[9] == at_once
        assert layout.plan[cuda.SHARE] == (at_once > 0)
        assert at_once == 8 or cuda_plan.gaps_kernel_bytes(columns, warps, 2 * at_once or 1) > Card().shared
        assert not at_once or cuda_plan.gaps_kernel_bytes(columns, warps, at_once) <= Card().shared
    # A processor of any GPU has up to 48 warps at once, where so few parts are enough.
    for rows, processors in ((4096, 132), (22016, 46), (300, 8)):
        parts = cuda_plan.choose_parts(rows, 4096, processors)
        of_processor = -(-rows // (32 * processors))
        together = cuda_plan.choose_together(rows, parts, processors)
        assert of_processor % together == 0
        assert parts * of_processor <= 48 or parts == cuda_plan.LEAST_PARTS


def test_rows_too_long_for_a_stored_column_are_one_part() -> None:
    weight = torch.zeros(2, cuda_gaps.MOST_COLUMNS + 9, dtype=torch.float16)
    weight[:, [3, -1]] = 1
    layout = cuda_gaps.pack_gaps_rows(weight, 4)
    assert layout.panels == 1
    assert replace(layout, columns=40000).plan[cuda.SHARE] == 1
    assert_exact("bits", bits(weight), walk(layout))
