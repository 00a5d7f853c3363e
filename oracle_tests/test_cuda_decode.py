"""The GPU layout: read lane by lane as the kernel does, unpacked, and through the kernels if there is a GPU."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests import tolerances
from oracle_tests.assertions import assert_exact
from oracle_tests.gpu_instructions import permute
from oracle_tests.programs import gpu_rows
from oracle_tests.sparse_weights import sparse_weights
from oracle_tests.strategies import examples
from torch_impl import packed
from torch_impl.decode import cuda, cuda_coded, cuda_plan
from torch_impl.decode.cuda_plan import Card

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AROUND = np.array([-1, -2, 0, 1])
"""Where a lane reads, from its middle: two values before it and two behind it, the nearer first."""


def read_quad(halves: np.ndarray, middle: int, bits: int) -> list[int]:
    """Four numbers of a row around a place: `read_quad` of the kernels, whose reads may go beyond the panel's values."""
    near_before, far_before, near, far = (int(halves[i]) if 0 <= i < len(halves) else 0xDEAD for i in middle + AROUND)
    # DP2A: two 16-bit numbers times two bytes.
    choices = [0x2222 + 0x43EE * (pair & 255) + 0xEE00 * (pair >> 8) for pair in (bits & 0xFFFF, bits >> 16)]
    high, low = permute(near, far, choices[0]), permute(near_before, far_before, choices[1])
    return [low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16]


def walk(layout: cuda.Layout) -> np.ndarray:
    """The dense weight's bits as the lanes of a warp find them, each for itself, panel after panel."""
    halves, starts = layout.data.numpy().view(np.uint16), layout.starts.numpy().astype(int)
    dense = np.zeros((-(-layout.rows // 16) * 16, layout.panels * 128), dtype=np.uint16)
    for panel, start in enumerate(starts[:-1]):
        words = halves[8 * start :][:128].view(np.uint32).astype(int)
        values = 8 * start + 128
        for tile in range(16):
            of_tile = [int(words[tile // 4 * 16 + 4 * i + tile % 4]) for i in range(4)]
            for lane in range(32):
                word, bit = of_tile[lane // 8], lane % 8
                before = 0x01010101 * ((1 << bit) - 1) | 0x01010000 << bit
                middle = values + sum(map(int.bit_count, of_tile[: lane // 8])) + (word & before).bit_count()
                row = panel // layout.panels * 16 + tile % 2 * 8 + lane // 4
                column = panel % layout.panels * 128 + tile // 4 * 32 + lane % 4 * 8 + tile // 2 % 2 * 4
                dense[row, column : column + 4] = read_quad(halves, middle, word >> bit & 0x01010101)
            values += sum(map(int.bit_count, of_tile))
        # Whole pieces of 16 bytes, none too many.
        assert -(-values // 8) == starts[panel + 1]
        assert 16 * (starts[panel + 1] - start) <= layout.slot
    return dense


@settings(max_examples=examples(15))
@given(weight=sparse_weights(33, 260))
def test_lanes_find_their_numbers(weight: torch.Tensor) -> None:
    layout = cuda.pack_rows(weight)
    # The kernels see memory, not strides.
    assert all(tensor.is_contiguous() for tensor in layout.tensors().values())
    rows, columns = weight.shape
    found = walk(layout)
    # Where there was a zero of either sign all bits are 0, also beyond the last row and column.
    expected = np.zeros_like(found)
    expected[:rows, :columns] = torch.where(weight == 0, 0, weight).view(torch.uint16).numpy()
    assert_exact("bits of the weight", expected, found)


def fragments(quads: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors (16, 16) and (16, 8) of one product m16n8k16 (PTX ISA, "Matrix Fragments"), from the numbers that the lanes hold.

    quads (2, 32, 4): of the upper and the lower eight rows, four numbers of a row in each lane; x (32, 4): four of a row of x.
    """
    a, b = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for lane, i in itertools.product(range(32), range(8)):
        # Registers: two numbers of the upper rows, two of the lower ones, then those eight columns further on.
        half, pair, place = i // 2 % 2, i // 4, lane % 4 * 2 + i % 2
        a[lane // 4 + 8 * half, place + 8 * pair] = quads[half, lane, 2 * pair + i % 2]
        if half == 0:
            b[place + 8 * pair, lane // 4] = x[lane, 2 * pair + i % 2]
    return a, b


@pytest.mark.parametrize("batch", [5, 8, 32])
def test_fragments_make_the_product(batch: int) -> None:
    """A panel by tiles of eight rows of x, every lane with its numbers of each: as cuda.cu and cuda_rows.cu multiply."""
    generator = np.random.default_rng(batch)
    weight, x = generator.normal(size=(16, 128)) * (generator.random((16, 128)) < 0.4), generator.normal(size=(32, 128))
    x[batch:] = 0
    y = np.zeros((16, 32))
    lanes = np.arange(32)
    for group, product, tile in itertools.product(range(4), range(2), range(4)):
        columns = (group * 32 + product * 4 + lanes % 4 * 8)[:, None] + np.arange(4)
        quads = np.stack([weight[lanes[:, None] // 4 + 8 * half, columns] for half in range(2)])
        a, b = fragments(quads, x[lanes[:, None] // 4 + 8 * tile, columns])
        y[:, 8 * tile : 8 * tile + 8] += a @ b
    np.testing.assert_allclose(y, weight @ x.T, rtol=0, atol=1e-12)


@given(weight=sparse_weights())
def test_unpacked_it_is_the_weight(weight: torch.Tensor) -> None:
    found = cuda.unpack(cuda.pack_rows(weight.to(DEVICE)))
    assert found.dtype == weight.dtype
    assert found.is_contiguous()
    assert_exact("weight", weight, found.cpu())


@settings(max_examples=examples(60 if DEVICE == "cuda" else 15))
@given(
    weight=sparse_weights(70, 2000),
    batch=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    shift=st.integers(0, 1),
    biased=st.booleans(),
)
def test_the_product(weight: torch.Tensor, batch: int, seed: int, shift: int, biased: bool) -> None:
    """Against float64; x and bias may begin anywhere in memory."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    layout = cuda.pack_rows(weight.to(DEVICE))
    numbers = torch.randn(batch * columns + 1, generator=generator).to(weight.dtype).to(DEVICE)
    x = numbers[shift : shift + batch * columns].view(batch, columns)
    bias = torch.randn(rows, generator=generator).to(weight.dtype).to(DEVICE) if biased else None
    found = cuda.matvec(layout, x, bias)
    wide, inputs = weight.double(), x.double().cpu()
    expected, terms = inputs @ wide.T, inputs.abs() @ wide.abs().T
    if bias is not None:
        expected, terms = expected + bias.double().cpu(), terms + bias.double().abs().cpu()
    allowed = tolerances.one_rounding(weight.dtype, expected.abs().numpy(), terms.numpy())
    wrong = (found.double().cpu() - expected).abs().numpy() > allowed
    # Large weights in fp16 may add up to more than it can hold.
    beyond = (expected.abs().numpy() > torch.finfo(weight.dtype).max) & (
        found.cpu() == expected.sign() * np.inf
    ).numpy()
    assert not (wrong & ~beyond).any()


def test_a_plan_is_of_the_layout() -> None:
    """What the operators are told of the weight, or that they must unpack it: its rows are too long for a block."""
    weight = torch.zeros(40, 300, dtype=torch.float16, device=DEVICE)
    layout = cuda.pack_rows(weight)
    assert layout.plan[:5] == [40, 300, 3, layout.slot, 1]
    early = Card.of(weight.device).early * (1 + cuda.LAUNCH_FIRST)
    # After those of both kernels: panels of a warp in a block with one strip, and of a product with SwiGLU, which is impossible;
    # no gaps.
    assert layout.plan[5:] == [2, early, cuda.MOST_ROWS, 0, cuda.AT_ONCE, 1, 1, 1, 1, 2, 0, 0]
    assert cuda.pack_rows(weight.bfloat16()).plan[4] == 0
    assert replace(layout, slot=2**20).plan[5] == 0
    assert copy.deepcopy(layout).__dict__.keys() == replace(layout).__dict__.keys() < layout.__dict__.keys()


def test_what_packing_saves_is_what_the_formula_says() -> None:
    """Beside the bitmap and values a panel takes four bytes for its start and up to 14 to fill it up, 7 on average."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 4096, generator=generator).bfloat16()
    for sparsity in (0.0, 0.5, 0.6, 0.7, 0.8):
        sparse = weight * (torch.rand(weight.shape, generator=generator) >= sparsity)
        layout = cuda.pack_rows(sparse)
        expected = packed.bits_per_weight(float((sparse == 0).double().mean()), 16, 4096)
        assert expected < 8 * layout.nbytes / weight.numel() < expected + 8 * 12 / 2048


def plan_of(rows: int, columns: int, coded: bool, slot: int) -> list[int]:
    """The plan of a layout without its data, for an H200."""
    kind, some = (cuda_coded.CodedLayout, torch.empty(0)) if coded else (cuda.Layout, torch.empty(0))
    return kind(rows, columns, -(-columns // kind.PANEL), slot, torch.bfloat16, some, some).plan


# Bytes of a panel at 70 % zeros: of values, int8 and int4.
VALUES, INT8, INT4 = 1680, 2600, 1700


@pytest.mark.parametrize(
    ("rows", "columns", "values", "codes", "alone", "more"),
    [
        # 7B's q, k and v; o; gate and up; down.
        (12288, 4096, (8, 3), (4, 3), (4, 2), (2, 4, 1)),
        (4096, 4096, (4, 1), (2, 1), (4, 2), (2, 2, 1)),
        (22016, 4096, (4, 1), (4, 1), (4, 4), (2, 8, 2)),
        (4096, 11008, (8, 1), (4, 1), (8, 4), (2, 4, 1)),
        # 70B's gate and up, and down; 1B's q, k and v.
        (57344, 8192, (8, 1), (4, 1), (8, 4), (2, 8, 1)),
        (8192, 28672, (28, 1), (14, 1), (28, 14), (2, 28, 1)),
        (3072, 2048, (2, 1), (1, 1), (2, 1), (1, 2, 1)),
    ],
)
def test_plans_of_known_shapes(
    rows: int, columns: int, values: Any, codes: Any, alone: tuple[int, int], more: tuple[int, int, int]
) -> None:
    """Panels of a warp and strips of a block: for 7B the fastest that an H200 measured, or up to 3 % slower (decision 77)."""
    for coded, slot, expected in ((False, VALUES, values), (True, INT8, codes), (True, INT4, codes)):
        plan = plan_of(rows, columns, coded, slot)
        assert (plan[cuda.SHARE], plan[cuda.TOGETHER], plan[cuda.ALONE]) == (*expected, alone[coded])
    assert tuple(plan_of(rows, columns, False, VALUES)[10:13]) == more


@pytest.mark.parametrize("processors", [132, 46])
@pytest.mark.parametrize("width", [128, 256])
def test_every_panel_is_some_warps(width: int, processors: int) -> None:
    """Also in blocks that a GPU can launch, with so many of them that its processors have work."""
    for rows, columns, fitting in itertools.product(
        (7, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 28672, 57344),
        (3, 128, 1500, 4096, 8192, 11008, 28672, 40960),
        (12, 25, 62),
    ):
        panels = -(-columns // width)
        way = cuda_plan.choose_plan(rows, panels, width, fitting, processors)
        if not way.strips:
            assert -(-panels // 29) > fitting or -(-panels // 8) > 29
            continue
        # With two panels on their way, a warp's lanes hold the starts of two behind its own, which must find its end.
        assert 1 <= way.share <= min(29, panels)
        across = -(-panels // way.share)
        assert (across - 1) * way.share < panels
        assert way.warps(panels) <= min(32, fitting)
        strips = -(-rows // 16)
        fullest = way.groups * -(-strips // (way.groups * processors))
        # Blocks of several strips leave the fullest processor with no more strips, all at once.
        assert fullest == -(-strips // processors) or way.groups == 1
        assert way.groups == 1 or fullest * across <= min(32, fitting)
        # The fullest processor has eight warps, unless there is no room or there are too few columns.
        assert across * fullest >= min(8, -(-columns // 256)) or fitting < 16


def test_every_panel_is_some_warps_of_the_kernel_for_more_rows() -> None:
    card, refused = Card(), []
    for rows, columns, slot in itertools.product(
        (7, 1024, 2048, 4096, 11008, 22016, 28672), (3, 128, 2048, 4096, 11008, 28672, 40960, 100000), (272, 1664, 4352)
    ):
        panels = -(-columns // 128)
        way = cuda_plan.choose_rows_plan(rows, panels, slot, card)
        if not way.strips:
            refused.append(columns)
            continue
        assert 1 <= way.share <= 29
        warps = way.warps(panels)
        assert warps <= cuda_plan.MOST_ROW_WARPS
        assert warps * cuda_plan.rows_kernel_bytes(slot, way.strips) <= card.shared
        # Two strips at once only where nearly every processor still has a block.
        assert way.strips == 1 or rows > 0.9 * 32 * card.processors - 32
        # Two groups only where they make all strips run at once.
        blocks = -(-rows // (16 * way.strips * way.groups * card.processors))
        assert way.groups == 1 or blocks * warps <= cuda_plan.MOST_ROW_WARPS
    assert set(refused) == {100000}


def test_what_does_not_fit_is_named() -> None:
    layout = cuda.pack_rows(torch.ones(3, 8, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(TypeError, match=r"^weight has dtype torch.float32; allowed: bfloat16 or float16$"):
        cuda.pack_rows(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"^x has shape \[1, 7\]; allowed: \[..., 8\]$"):
        cuda.matvec(layout, torch.ones(1, 7, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(
        TypeError, match=r"^x has dtype (torch.float16|Half); allowed: (torch.bfloat16|BFloat16), the weight's$"
    ):
        cuda.matvec(layout, torch.ones(1, 8, dtype=torch.float16, device=DEVICE))


def test_the_gpu_program_runs_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rows, "KEPT", (0.3,))
    monkeypatch.setattr(gpu_rows, "BATCHES", (1, 9, 33))
    assert gpu_rows.main(["--small", "--check"]) == 0
    if DEVICE == "cpu":
        right = cuda.matvec
        monkeypatch.setattr(cuda, "matvec", lambda *arguments: right(*arguments) * 1.02)
        assert gpu_rows.main(["--small", "--check"]) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert cuda.available() == (False, "no CUDA device")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_a_graph_it_gives_the_same() -> None:
    weight = torch.randn(4096, 4096, device="cuda").bfloat16() * (torch.rand(4096, 4096, device="cuda") < 0.3)
    layout = cuda.pack_rows(weight)
    x = torch.randn(2, 4096, device="cuda").bfloat16()
    eager = cuda.matvec(layout, cuda.matvec(layout, x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.matvec(layout, cuda.matvec(layout, x))
    graph.replay()
    assert_exact("y", eager.cpu(), captured.cpu())
