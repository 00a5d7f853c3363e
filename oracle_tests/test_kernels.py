"""The Triton kernels against the spec, under Triton's interpreter: shapes that fit no tile, ranks that are no power of two.

On a GPU the whole suite uses them; there `python -m oracle_tests.programs.gpu_kernels` compares every one with the spec.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import itertools
import math
from collections.abc import Callable
from typing import Any

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close, assert_exact
from oracle_tests.programs import gpu_kernels
from oracle_tests.strategies import examples
from reference import adapter as spec
from reference.masks import nm as spec_nm
from reference.masks import select as spec_select
from reference.masks import sparsegpt as spec_sparsegpt
from torch_impl import _kernels, adapter
from torch_impl.masks import select as masks
from torch_impl.masks import sparsegpt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def adapted(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(G, W, A, B): sizes around the tiles' edges, some weights pruned, an empty row now and then."""
    rows, columns = draw(st.sampled_from([1, 5, 63, 64, 129, 200])), draw(st.sampled_from([1, 7, 64, 128, 130]))
    rank = draw(st.sampled_from([1, 3, 8, 16, 17]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(DTYPES)
    weight = torch.randn(rows, columns, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    weight[draw(st.integers(0, rows - 1))] = 0
    G = torch.randn(rows, columns, generator=generator)
    A, B = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return G.to(DEVICE, dtype), weight.to(DEVICE, dtype), A.to(DEVICE), B.to(DEVICE)


def wide(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.double().cpu().numpy() for tensor in tensors]


@settings(max_examples=examples(20))
@given(case=adapted())
def test_merge(case: tuple[torch.Tensor, ...]) -> None:
    _, weight, A, B = case
    W, a, b = wide(weight, A, B)
    expected = spec.effective_weight(W, a, b, 0.5)
    found = _kernels.merge(weight, A, B, 0.5)
    assert found.dtype == weight.dtype
    assert_exact("zeros", np.logical_or(W == 0, expected == 0), (found == 0).cpu())
    terms = abs(W) + 0.5 * abs(b) @ abs(a)
    assert_close("merge", expected, found.cpu(), tolerances.bound(weight.dtype), scale=terms)


@settings(max_examples=examples(20))
@given(case=adapted())
def test_contract(case: tuple[torch.Tensor, ...]) -> None:
    check_contract(*case)


@pytest.mark.parametrize(("rows", "columns"), [(1100, 300), (3, 1500)])
def test_contract_adds_up_all_its_parts(rows: int, columns: int) -> None:
    """More bands of rows than are added at once, more strips of columns than one, more sums than a program has."""
    generator = torch.Generator().manual_seed(0)
    G, weight, A, B = (torch.randn(n, generator=generator) for n in ((rows, columns),) * 2 + ((3, columns), (rows, 3)))
    check_contract(G.to(DEVICE), weight.to(DEVICE), A.to(DEVICE), B.to(DEVICE))


def check_contract(G: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
    """dA and dB against the spec; the same bits again."""
    g, W, a, b = wide(G, weight, A, B)
    masked = g * (W != 0)
    grad_A, grad_B = _kernels.contract(G, weight, A, B, 0.5)
    for name, left, right, found in (("dA", b.T, masked, grad_A), ("dB", masked, a.T, grad_B)):
        # In the interpreter all is float32.
        allowed = tolerances.contracted_by_kernel(G.dtype if DEVICE == "cuda" else torch.float32, left, right)
        assert_close(name, 0.5 * left @ right, found.cpu(), 1.0, scale=allowed)
    for first, second in zip((grad_A, grad_B), _kernels.contract(G, weight, A, B, 0.5), strict=True):
        assert_exact("again", first.cpu(), second.cpu())


@settings(max_examples=examples(20))
@given(
    rows=st.sampled_from([1, 15, 16, 33]),
    width=st.sampled_from([1, 4, 12, 16]),
    seed=st.integers(0, 2**31),
    halves=st.booleans(),
)
def test_sweep_is_the_column_loop(rows: int, width: int, seed: int, halves: bool) -> None:
    """In one call or in two, on a block that is part of a wider matrix, as in `sparsegpt`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width + 5, generator=generator)
    factor = torch.randn(width, width, generator=generator).triu() + 4 * torch.eye(width)
    mask = torch.rand(rows, width + 5, generator=generator) < 0.5
    expected, expected_errors = weight.clone(), torch.zeros(rows, width)
    for j in range(width):
        expected_errors[:, j] = expected[:, j].masked_fill(mask[:, j], 0.0) / factor[j, j]
        expected[:, j:width] -= expected_errors[:, j : j + 1] * factor[j : j + 1, j:]
    found, errors = weight.to(DEVICE), torch.zeros(rows, width, device=DEVICE)
    cuts = [0, width // 2, width] if halves else [0, width]
    for first, last in itertools.pairwise(cuts):
        _kernels.sweep(found[:, :width], factor.to(DEVICE), mask.to(DEVICE)[:, :width], errors, first, last)
    scale = float(expected.abs().max() + 1)
    assert_close("weight", expected, found.cpu(), tolerances.bound(torch.float32), scale=scale)
    assert_close("errors", expected_errors, errors.cpu(), tolerances.bound(torch.float32), scale=scale)


@settings(max_examples=examples(20))
@given(
    rows=st.sampled_from([1, 15, 16, 33]),
    pattern=st.sampled_from([(2, 4), (0, 4), (4, 4), (1, 3), (2, 8), (1, 1), (0, 1), (5, 12)]),
    groups=st.integers(1, 4),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(rows=16, pattern=(2, 4), groups=4, ties=True, seed=0)
def test_sweep_chooses_the_groups_of_a_pattern(
    rows: int, pattern: tuple[int, int], groups: int, ties: bool, seed: int
) -> None:
    """By the spec's mask of each group as its columns are when it is reached; what may not be kept goes first."""
    n, m = pattern
    width = groups * m
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width + 5, generator=generator)
    factor = torch.randn(width, width, generator=generator).triu() + 4 * torch.eye(width)
    if ties:
        # Small whole numbers, and no column changes another: equal scores, also between columns.
        weight, factor = weight.mul(2).round(), 2 * torch.eye(width)
    may_stay = torch.rand(rows, width + 5, generator=generator) < 0.7
    W, U = weight.double().numpy(), factor.double().numpy()
    mask, errors = may_stay.numpy().copy(), np.zeros((rows, width))
    for j in range(width):
        if j % m == 0:
            group = slice(j, j + m)
            score = spec_select.demote_pruned((W[:, group] / U.diagonal()[group]) ** 2, mask[:, group])
            mask[:, group] &= spec_nm.nm_mask(score, n, m)
        errors[:, j] = np.where(mask[:, j], 0.0, W[:, j]) / U[j, j]
        W[:, j:width] -= errors[:, j : j + 1] * U[j, j:]
    found, found_mask, found_errors = weight.to(DEVICE), may_stay.to(DEVICE), torch.zeros(rows, width, device=DEVICE)
    _kernels.sweep(found[:, :width], factor.to(DEVICE), found_mask[:, :width], found_errors, 0, width, pattern)
    assert_exact("mask", mask, found_mask.cpu())
    scale = float(abs(W).max() + 1)
    assert_close("weight", W, found.cpu(), tolerances.bound(torch.float32), scale=scale)
    assert_close("errors", errors, found_errors.cpu(), tolerances.bound(torch.float32), scale=scale)


def test_sparsegpt_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole algorithm with every block of columns swept by the kernel."""
    calls = []
    monkeypatch.setattr(_kernels, "usable", lambda *tensors: calls.append(1) or True)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(10, 24, generator=generator), torch.randn(50, 24, generator=generator)
    H = sparsegpt.hessian(inputs, 2)
    expected, expected_mask = spec_sparsegpt.sparsegpt(*wide(weight, H), 0.5, block_size=10)
    found, mask = sparsegpt.sparsegpt(weight.to(DEVICE), H.to(DEVICE), 0.5, block_size=10)
    assert calls
    assert_exact("mask", expected_mask, mask.cpu())
    assert_close("weight", expected, found.cpu(), tolerances.bound(torch.float32), scale=float(abs(expected).max()))
    kept = torch.rand(10, 24, generator=generator) < 0.8
    expected, expected_mask = spec_sparsegpt.sparsegpt_nm(*wide(weight, H), 2, 4, block_size=8, kept=kept.numpy())
    found, mask = sparsegpt.sparsegpt_nm(weight.to(DEVICE), H.to(DEVICE), 2, 4, block_size=8, kept=kept.to(DEVICE))
    assert_exact("mask of 2:4", expected_mask, mask.cpu())
    assert_close("2:4", expected, found.cpu(), tolerances.bound(torch.float32), scale=float(abs(expected).max()))


@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64], ids=str)
def test_the_adapter_through_the_kernels(monkeypatch: pytest.MonkeyPatch, adapter_dtype: torch.dtype, r: int) -> None:
    """Adapters in float32 go through the kernels; no ranks, or any other dtype, through torch."""
    calls = []
    for name in ("merge", "contract"):
        kernel = getattr(_kernels, name)
        monkeypatch.setattr(_kernels, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a))[1])
    monkeypatch.setattr(_kernels, "usable", lambda *tensors: True)
    generator = torch.Generator().manual_seed(r)
    x, dy = torch.randn(7, 12, generator=generator), torch.randn(7, 9, generator=generator)
    weight = torch.randn(9, 12, generator=generator) * (torch.rand(9, 12, generator=generator) < 0.5)
    A, B = (torch.randn(shape, generator=generator, dtype=adapter_dtype) for shape in ((r, 12), (9, r)))
    layer = [tensor.to(DEVICE) for tensor in (weight, A, B)]
    expected = spec.effective_weight(*wide(weight, A, B), 0.5)
    into = torch.empty_like(layer[0])
    adapter.merge_into(into, *layer, 0.5)
    gradients = adapter.masked_lora_grad(x.to(DEVICE), *layer, 0.5, dy.to(DEVICE))
    assert calls == (["merge", "merge", "contract"] if r and adapter_dtype == torch.float32 else [])
    bound = tolerances.bound(torch.float32)
    assert_close("merge_into", expected, into.cpu(), bound)
    assert_close("merge", expected, adapter.merge(*layer, 0.5).cpu(), bound)
    for name, ours, theirs in zip(
        ("dx", "dA", "dB"), gradients, spec.masked_lora_grad(*wide(x, weight, A, B), 0.5, *wide(dy)), strict=True
    ):
        assert_close(name, theirs, ours.cpu(), bound)


@settings(max_examples=examples(30))
@given(
    rows=st.integers(1, 3),
    columns=st.sampled_from([1, 7, 64, 100, 129]),
    share=st.floats(0, 1),
    values=st.sampled_from(["apart", "tied", "signed", "hard"]),
    seed=st.integers(0, 2**31),
)
def test_select_is_the_stable_sort(rows: int, columns: int, share: float, values: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(rows, columns, generator=generator)
    if values == "tied":
        score = score.mul(2).round()
    elif values == "hard":
        limits = torch.tensor([-torch.inf, -1e38, -1e-45, -0.0, 0.0, 1e-45, 1e38, torch.inf])
        score = limits[torch.randint(len(limits), score.shape, generator=generator)]
    elif values == "apart":
        score = score.abs()
    expected = spec_select.row_mask(score.double().numpy(), share)
    found = _kernels.select(score.to(DEVICE), math.floor(share * columns + 1e-9))
    assert found.dtype == torch.bool
    assert_exact("mask", expected, found.cpu())


def test_rows_that_a_program_can_hold_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    select = _kernels.select
    monkeypatch.setattr(_kernels, "usable", lambda *tensors: True)
    monkeypatch.setattr(_kernels, "select", lambda score, count: sizes.append(score.shape[1]) or select(score, count))
    for shape, dtype in (
        ((4, 64), torch.float32),
        ((1, _kernels.WIDEST_ROW + 1), torch.float32),
        ((2, 8), torch.float16),
    ):
        score = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        expected = spec_select.row_mask(score.double().cpu().numpy(), 0.7)
        assert_exact("mask", expected, masks.row_mask(score, 0.7).cpu())
    assert sizes == [64]


def test_the_gpu_program_runs_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """In the interpreter, on few shapes: a line for each kernel and dtype, all within their bounds."""
    assert gpu_kernels.main(["--device", DEVICE, "--small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [tuple(line.split()[:2]) for line in lines[2:]] == [
        (name, str(dtype).removeprefix("torch."))
        for name, (_, dtypes) in gpu_kernels.CHECKS.items()
        for dtype in dtypes
    ]
    assert "OUTSIDE" not in "".join(lines)
    assert gpu_kernels.main(["--device", DEVICE, "--small", "--only", "select"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["select"]


def test_the_gpu_program_sees_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number that is never written, one beyond its bound, a pruned weight that is not 0."""

    def damaged(spoil: Callable[[torch.Tensor], None]) -> float:
        def merge(
            weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, into: Any = None
        ) -> torch.Tensor:
            result = adapter.effective_weight(weight, A, B, scale).to(weight.dtype)
            spoil(result)
            return result if into is None else into.copy_(result)

        monkeypatch.setattr(_kernels, "merge", merge)
        return gpu_kernels.run("merge", torch.bfloat16, torch.device(DEVICE), small=True).share

    assert damaged(lambda result: None) <= 1
    assert damaged(lambda result: result[0, 0].fill_(torch.nan)) == np.inf
    assert damaged(lambda result: result.mul_(1.02)) > 1
    assert damaged(lambda result: result[result == 0].fill_(0)) <= 1
    assert damaged(lambda result: result.add_(result == 0, alpha=1e-6)) == np.inf
    monkeypatch.setattr(gpu_kernels, "CHECKS", {"merge": (gpu_kernels.merge, [torch.bfloat16])})
    assert gpu_kernels.main(["--device", DEVICE, "--small"]) == 1
    assert "OUTSIDE" in capsys.readouterr().out
