"""Products with packed codes and scales: every path of the kernels against the weights that the spec reads, on hard inputs."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import torch

from oracle_tests import tolerances
from reference import packed as spec_packed
from reference import quantise as spec
from torch_impl.decode import cpu
from torch_impl.decode.coded_linear import CodedLinear
from torch_impl.decode.packed_linear import DECODE_ROWS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (3, 31), (7, 33), (64, 96), (5, 257), (9, 1000), (40, 128))
SPARSITIES = (0.0, 0.5, 0.7, 0.97, 1.0)
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def paths() -> tuple[str, ...]:
    found = cpu.paths()
    assert found, "the kernels did not build"
    return found


def rounded(rows: int, columns: int, sparsity: float, bits: int, seed: int = 0) -> tuple[Parts, np.ndarray]:
    """Parts with an empty row and, if there is room, a full one; scales from tiny to large. And the weight that they are."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)) * np.exp(3 * rng.standard_normal((rows, 1))).clip(1e-3, 1e2)
    kept = rng.random(weight.shape) >= sparsity
    kept[rows // 2] = False
    if rows > 2:
        kept[0] = sparsity < 1
    codes, scales = spec.quantise_rows(weight * kept, bits)
    bitmap, stream, offsets = spec_packed.pack_codes(codes, bits)
    parts = tuple(torch.from_numpy(part.copy()) for part in (bitmap, stream, scales, offsets))
    return parts, spec.dequantise_rows(codes, scales)


def assert_product(
    what: str, y: torch.Tensor, x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor | None = None
) -> None:
    """y = x Wᵀ + b, each entry within the roundings of its own terms: the codes are not rounded."""
    inputs = x.double().numpy()
    expected, terms = inputs @ weight.T, np.abs(inputs) @ np.abs(weight).T
    if bias is not None:
        expected, terms = expected + bias.double().numpy(), terms + np.abs(bias.double().numpy())
    assert y.dtype == x.dtype
    error = np.abs(y.double().numpy() - expected)
    bound = tolerances.packed_product(x.dtype, expected, terms)
    assert (error <= bound).all(), f"{what}: off by {error.max():.3e}, {(error / bound).max():.2f} of what is allowed"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_path_is_the_dense_product(paths: tuple[str, ...], sparsity: float, bits: int) -> None:
    for number, (rows, columns) in enumerate(SHAPES):
        parts, weight = rounded(rows, columns, sparsity, bits, number)
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 11)[number % 2 :: 2]:
            dtype = DTYPES[(number + batch) % 3]
            generator = torch.Generator().manual_seed(batch)
            bias = torch.randn(rows, generator=generator).to(dtype) if number % 2 else None
            x = torch.randn(batch, columns, generator=generator).to(dtype)
            for path in paths:
                y = cpu.linear_coded(x, *parts, bias, path)
                assert_product(f"{path}, {(rows, columns)}, batch {batch}, {dtype}", y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows_in_every_dtype(paths: tuple[str, ...], dtype: torch.dtype) -> None:
    parts, weight = rounded(20, 300, 0.6, 4)
    for batch in range(1, 18):
        x = torch.randn(batch, 300, generator=torch.Generator().manual_seed(batch)).to(dtype)
        for path in paths:
            assert_product(f"{path}, batch {batch}", cpu.linear_coded(x, *parts, None, path), x, weight)


def test_threads_share_the_rows(paths: tuple[str, ...]) -> None:
    parts, weight = rounded(300, 2048, 0.6, 5)
    x = torch.randn(2, 2048).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([cpu.linear_coded(x, *parts, None, path) for path in paths])
    finally:
        torch.set_num_threads(before)
    assert_product("threads", results[0][0], x, weight)
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
def test_nothing_is_read_behind_the_end_of_what_is_there(paths: tuple[str, ...], bits: int) -> None:
    """Every array ends where a page ends whose successor may not be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 15 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    guards = (2, 5, 8, 11, 14)
    for number in guards:
        assert libc.mprotect(ctypes.c_void_p(address + number * page), ctypes.c_size_t(page), 0) == 0
    try:
        for rows, columns in ((3, 33), (8, 64), (1, 5), (2, 200)):
            for batch in (1, 2):
                parts, weight = rounded(rows, columns, 0.3, bits)
                placed = []
                for number, value in zip(guards, (*parts, torch.randn(batch, columns).bfloat16()), strict=True):
                    count = max(1, value.numel())
                    begin = number * page - count * value.element_size()
                    there = torch.frombuffer(memory, dtype=value.dtype, count=count, offset=begin)[: value.numel()]
                    placed.append(there.copy_(value.flatten()).view(value.shape))
                for path in paths:
                    y = cpu.linear_coded(placed[4], *placed[:4], None, path)
                    assert_product(path, y, placed[4], weight)
                    cpu._fill(torch.empty(rows, columns), placed[:4], 0, path)
    finally:
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(15 * page), 3)


def test_kernels_refuse_what_does_not_fit(paths: tuple[str, ...]) -> None:
    (bitmap, codes, scales, offsets), _ = rounded(4, 140, 0.5, 4)
    x = torch.ones(1, 140)
    for arguments, path, message in (
        ((x, bitmap, codes[1:], scales, offsets), paths[0], "codes has shape"),
        ((x, bitmap, codes.repeat(1, 3), scales, offsets), paths[0], "codes has shape"),
        ((x, bitmap, codes, scales[:, 1:], offsets), paths[0], "scales has shape"),
        ((x, bitmap, codes, scales.float(), offsets), paths[0], "scales Float; allowed: Byte and Half"),
        ((x, bitmap, codes, scales, offsets[1:]), paths[0], "offsets has"),
        ((x[:, 40:], bitmap, codes, scales, offsets), paths[0], "which does not match"),
        ((x, bitmap, codes, scales, offsets), "neon", "path is neon; allowed: "),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cpu.linear_coded(*arguments, None, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_decodes_by_the_kernels_and_unpacks_for_a_prompt(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    parts, weight = rounded(24, 150, 0.5, 4)
    layer = CodedLinear(parts, 150, dtype, torch.randn(24).to(dtype))
    calls = []
    kernel = cpu.linear_coded

    def noted(*arguments: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(arguments[0]))
        return kernel(*arguments)

    monkeypatch.setattr(cpu, "linear_coded", noted)
    for rows in (1, DECODE_ROWS, DECODE_ROWS + 1):
        x = torch.randn(rows, 150).to(dtype)
        meant = weight if rows <= DECODE_ROWS else torch.from_numpy(weight).to(dtype).double().numpy()
        assert_product(str(rows), layer(x), x, meant, layer.bias)
    assert calls == [1, DECODE_ROWS]
    assert layer(torch.randn(2, 3, 150).to(dtype)).shape == (2, 3, 24)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_every_path_unpacks_the_weight_of_the_spec(paths: tuple[str, ...], bits: int) -> None:
    """Whole and from any row on; each number rounded once, ties to even, as torch rounds it."""
    for number, (rows, columns) in enumerate(SHAPES):
        parts, weight = rounded(rows, columns, SPARSITIES[number % 5], bits, number)
        for dtype in DTYPES:
            expected = torch.from_numpy(weight).to(dtype)
            assert torch.equal(cpu.unpack(parts, columns, dtype), expected)
            for path in paths:
                first = rows // 3
                place = torch.full((rows - first, columns), torch.nan, dtype=dtype)
                cpu._fill(place, parts, first, path)
                assert torch.equal(place, expected[first:]), f"{path}, {(rows, columns)}, {dtype}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_is_multiplied_slab_by_slab(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs are whole tiles for each thread: 488 rows took up to 11 % longer than 512, three tiles on two threads 15 %."""
    parts, weight = rounded(150, 150, 0.5, 4)
    bias = torch.randn(150).to(dtype)
    x = torch.randn(30, 150).to(dtype)
    meant = torch.from_numpy(weight).to(dtype).double().numpy()
    heights: list[int] = []
    fill = cpu._fill

    def noted(place: torch.Tensor, *arguments: Any) -> None:
        heights.append(len(place))
        fill(place, *arguments)

    monkeypatch.setattr(cpu, "_fill", noted)
    cases = [(1, 1, [64, 64, 22]), (1, 100, [128, 22]), (1, 1000, [150]), (2, 15, [64, 64, 22]), (2, 60, [128, 22])]
    for threads, height, expected in cases:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        slab = height * 150 * x.element_size()
        for b in (bias, None):
            heights.clear()
            assert_product(f"{height}, {b is None}", cpu.linear_unpacked(x, parts, b, slab), x, meant, b)
            assert heights == expected


def test_unpacking_refuses_what_does_not_fit(paths: tuple[str, ...]) -> None:
    (bitmap, codes, scales, offsets), _ = rounded(4, 140, 0.5, 4)
    place = torch.empty(2, 140)
    for arguments, message in (
        ((place, (bitmap, codes, scales, offsets), 3), "weight has shape"),
        ((place, (bitmap, codes, scales, offsets), -1), "weight has shape"),
        ((place[:, 40:].contiguous(), (bitmap, codes, scales, offsets), 0), "bitmap has shape"),
        ((place[:, 40:], (bitmap, codes, scales, offsets), 0), "weight has shape"),
        ((place.double(), (bitmap, codes, scales, offsets), 0), "weight has dtype"),
        ((place, (bitmap, codes[1:], scales, offsets), 0), "codes has shape"),
        ((place, (bitmap, codes, scales[1:], offsets), 0), "scales has shape"),
        ((place, (bitmap, torch.ones(3), offsets), 0), "values has 3 entries"),
        ((place, (bitmap, torch.ones(int(offsets[-1])).bfloat16(), offsets), 0), "values has dtype"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cpu._fill(*arguments)


def test_without_kernels_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, weight = rounded(24, 150, 0.5, 3)
    monkeypatch.setattr(cpu, "paths", lambda: ())
    assert torch.equal(cpu.unpack(parts, 150, torch.float32).double(), torch.from_numpy(weight))
    x = torch.randn(3, 150)
    assert_product("unpacked", cpu.linear_unpacked(x, parts, None, 1000), x, weight)
    assert_product("torch", cpu.linear_coded(x, *parts), x, weight)
    y = cpu.linear_coded(x.double(), *parts)
    np.testing.assert_allclose(y.numpy(), x.double().numpy() @ weight.T, rtol=1e-12, atol=1e-12)
