"""The GPU layout: walked lane by lane as the kernel does, unpacked, and through the kernels where there is a GPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close, assert_exact
from torch_impl.engine import cuda_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@st.composite
def sparse_weights(draw: st.DrawFn, largest: int = 200) -> torch.Tensor:
    """Weights of any shape and sparsity: empty rows, long gaps, N:M, large and tiny values."""
    rows, columns = draw(st.sampled_from([1, 5, 31, 32, 33, 70])), draw(st.integers(1, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e2]))
    kind = draw(st.sampled_from([0.0, 0.5, 0.7, 0.95, 1.0, "2:4", "uneven"]))
    if kind == "2:4":
        place = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(2)
        weight[(place < 2).flatten(1)[:, :columns]] = 0
    elif kind == "uneven":
        # Lanes of a warp drift far apart.
        weight[torch.rand(weight.shape, generator=generator) < torch.rand(rows, 1, generator=generator)] = 0
    else:
        weight[torch.rand(rows, columns, generator=generator) < kind] = 0
    weight[draw(st.integers(0, rows - 1))] = 0
    return weight.to(draw(DTYPES))


def walk(layout: cuda_decode.Layout, x: np.ndarray) -> np.ndarray:
    """y as the kernel finds it, one lane after another: what it loads, in which order, and where it goes from there."""
    stored, words = cuda_decode.stored_chunks(layout)
    values = stored.double().numpy()
    y = np.zeros(layout.rows)
    for task, counts in enumerate(layout.counts.numpy().astype(int)):
        following = int(layout.bases[task])
        column = np.full(32, task % layout.segments * layout.segment)
        for step in range(counts.max()):
            for lane in np.flatnonzero(step < counts):
                codes = int(words[following])
                for i in range(8):
                    column[lane] += codes >> (i * layout.gap_bits) & (2**layout.gap_bits - 1)
                    row = task // layout.segments * 32 + lane
                    # Entries without a weight may go up to two chunks past the end, where the kernel has zeros.
                    assert column[lane] + i < layout.segments * layout.segment + 16
                    if values[following, i]:
                        y[row] += values[following, i] * x[column[lane] + i]
                column[lane] += 8
                following += 1
    return y


@settings(max_examples=25)
@given(weight=sparse_weights(90), bits=st.sampled_from([2, 3, 4]), segment=st.sampled_from([8, 24, 96]))
def test_a_lane_finds_its_weights(weight: torch.Tensor, bits: int, segment: int) -> None:
    layout = cuda_decode.pack_rows(weight, segment, bits)
    # The kernels see memory, not strides.
    assert all(tensor.is_contiguous() for tensor in layout.tensors().values())
    x = np.random.default_rng(0).standard_normal(weight.shape[1])
    expected = weight.double().numpy() @ x
    assert_close("y", expected, walk(layout, x), 1e-12, scale=float(abs(expected).max() + 1))


@settings(max_examples=40)
@given(weight=sparse_weights(), bits=st.sampled_from([2, 3, 4, None]), segment=st.sampled_from([8, 40, 208, None]))
def test_unpacked_it_is_the_weight(weight: torch.Tensor, bits: int | None, segment: int | None) -> None:
    if segment is None:
        bits = None
    layout = cuda_decode.pack_rows(weight.to(DEVICE), segment, bits)
    found = cuda_decode.unpack(layout)
    assert found.dtype == weight.dtype
    assert_exact("weight", weight, found.cpu())


@settings(max_examples=60 if DEVICE == "cuda" else 15)
@given(
    weight=sparse_weights(2000),
    batch=st.integers(1, 8),
    bits=st.sampled_from([2, 3, 4]),
    segment=st.sampled_from([80, 1000, None]),
    seed=st.integers(0, 2**31),
    shift=st.integers(0, 1),
    biased=st.booleans(),
)
def test_the_product(
    weight: torch.Tensor, batch: int, bits: int, segment: int | None, seed: int, shift: int, biased: bool
) -> None:
    """Against float64; x and bias may begin anywhere in memory."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    layout = cuda_decode.pack_rows(weight.to(DEVICE), segment, bits)
    numbers = torch.randn(batch * columns + 1, generator=generator).to(weight.dtype).to(DEVICE)
    x = numbers[shift : shift + batch * columns].view(batch, columns)
    bias = torch.randn(rows, generator=generator).to(weight.dtype).to(DEVICE) if biased else None
    found = cuda_decode.matvec(layout, x, bias)
    wide, inputs = weight.double(), x.double().cpu()
    expected, terms = inputs @ wide.T, inputs.abs() @ wide.abs().T
    if bias is not None:
        expected, terms = expected + bias.double().cpu(), terms + bias.double().abs().cpu()
    allowed = tolerances.one_rounding(weight.dtype, expected.abs().numpy(), terms.numpy())
    assert ((found.double().cpu() - expected).abs().numpy() <= allowed).all()


def test_a_copy_points_at_its_own_memory() -> None:
    layout = cuda_decode.pack_rows(torch.randn(40, 30).bfloat16())
    assert layout.pointers[0].value == layout.data.data_ptr()
    other = copy.deepcopy(layout)
    assert other.pointers[0].value == other.data.data_ptr() != layout.data.data_ptr()


def test_what_packing_saves_is_what_the_formula_says() -> None:
    from torch_impl import gaps

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 4096, generator=generator).bfloat16()
    for sparsity in (0.5, 0.6, 0.7, 0.8):
        sparse = weight * (torch.rand(weight.shape, generator=generator) >= sparsity)
        layout = cuda_decode.pack_rows(sparse, 1024)
        sizes = {bits: gaps.bits_per_weight(sparsity, 16, bits) for bits in cuda_decode.GAP_BITS}
        assert sizes[layout.gap_bits] < 1.03 * min(sizes.values())
        # The rest of last chunks: half a chunk of each stream of 1,024 columns.
        assert sizes[layout.gap_bits] < 8 * layout.nbytes / weight.numel() < sizes[layout.gap_bits] + 20 * 5 / 1024


@pytest.mark.parametrize(
    "shape", [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (8192, 28672), (7, 3), (28672, 8192)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "card", [cuda_decode.Card(), cuda_decode.Card(128, 99 * 1024, 100 * 1024, False)], ids=["H200", "4090"]
)
def test_chosen_segments_fit_the_card(shape: tuple[int, int], bits: int, card: cuda_decode.Card) -> None:
    rows, columns = shape
    segment = cuda_decode._choose_segments(rows, columns, bits, card)
    segments = -(-columns // segment)
    assert segment % 8 == 0
    assert segments <= 32
    # A lane counts its chunks in a byte.
    assert segment <= 8 * 255
    if (columns, card.processors) != (28672, 128):
        assert cuda_decode._shared(segment, segments, bits, 1) <= card.shared


def test_blocks_share_a_processor_evenly() -> None:
    """One block a processor: the next kernel's fits beside it; more: as many as it takes to have all there at once."""
    card = cuda_decode.Card()
    for rows, together in ((4096, 2), (8192, 2), (11008, 3), (14336, 4), (28672, 3)):
        room = cuda_decode._room(rows, card) + cuda_decode.SHARED_OF_BLOCK
        assert card.shared_of_processor // room == together


def test_what_does_not_fit_is_named() -> None:
    layout = cuda_decode.pack_rows(torch.ones(3, 8, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(TypeError, match=r"^weight has dtype torch.float32; allowed: bfloat16 or float16$"):
        cuda_decode.pack_rows(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"^x has shape \(1, 7\); allowed: \(b, 8\)$"):
        cuda_decode.matvec(layout, torch.ones(1, 7, dtype=torch.bfloat16, device=DEVICE))
    with pytest.raises(TypeError, match=r"^x has dtype torch.float16; allowed: torch.bfloat16, the weight's$"):
        cuda_decode.matvec(layout, torch.ones(1, 8, dtype=torch.float16, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert cuda_decode.available() == (False, "no CUDA device")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_in_a_graph_it_gives_the_same() -> None:
    weight = torch.randn(4096, 4096, device="cuda").bfloat16() * (torch.rand(4096, 4096, device="cuda") < 0.3)
    layout = cuda_decode.pack_rows(weight)
    x = torch.randn(2, 4096, device="cuda").bfloat16()
    eager = cuda_decode.matvec(layout, cuda_decode.matvec(layout, x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_decode.matvec(layout, cuda_decode.matvec(layout, x))
    graph.replay()
    assert_exact("y", eager.cpu(), captured.cpu())
