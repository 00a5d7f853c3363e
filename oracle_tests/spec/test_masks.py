"""Masks against plain sorting, SparseGPT against optimal brain surgeon with explicit inverses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oracle_tests import strategies, tolerances
from reference.masks.nm import kept_per_group, nm_mask
from reference.masks.prune import prune
from reference.masks.select import matrix_mask, rest_sparsity, row_mask
from reference.masks.sparsegpt import sparsegpt, sparsegpt_nm


def lowest(values: list[float], k: int) -> set[int]:
    """Indices of the k lowest, ties by lower index: Python's own sort of (value, index)."""
    return {index for _, index in sorted((value, index) for index, value in enumerate(values))[:k]}


@given(strategies.matrices(), strategies.SPARSITIES)
def test_rows_and_matrices(score: np.ndarray, sparsity: float) -> None:
    rows, whole = row_mask(score, sparsity), matrix_mask(score, sparsity)
    for row, kept in zip(score.tolist(), rows, strict=True):
        pruned = lowest(row, math.floor(sparsity * len(row) + 1e-9))
        assert kept.tolist() == [index not in pruned for index in range(len(row))]
    pruned = lowest(score.ravel().tolist(), math.floor(sparsity * score.size + 1e-9))
    assert whole.ravel().tolist() == [index not in pruned for index in range(score.size)]


@given(
    st.sampled_from([2, 4, 8]).flatmap(
        lambda m: st.tuples(strategies.matrices(columns=m * 2), st.integers(0, m), st.just(m))
    )
)
def test_groups(case: tuple[np.ndarray, int, int]) -> None:
    score, n, m = case
    for row, kept in zip(score, nm_mask(score, n, m), strict=True):
        for start in range(0, len(row), m):
            pruned = lowest(row[start : start + m].tolist(), m - n)
            assert kept[start : start + m].tolist() == [index not in pruned for index in range(m)]


def surgeon(row: np.ndarray, H: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Prune one row left to right. Each weight that goes moves those right of it by the optimal brain surgeon's step,
    −w_j / [H⁻¹]_jj · H⁻¹[:, j], with the inverse of what is left of the Hessian."""
    row = row.copy()
    for j in range(len(row)):
        if not mask[j]:
            inverse = np.linalg.inv(H[j:, j:])
            row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
            row[j] = 0.0
    return row


@pytest.mark.parametrize("block_size", [1, 3, 4, 128])
@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_is_the_optimal_brain_surgeon(seed: int, block_size: int) -> None:
    rng = np.random.default_rng(seed)
    W, X = rng.standard_normal((5, 8)), rng.standard_normal((20, 8))
    H = 2 / 4 * X.T @ X
    kept = rng.random(W.shape) < 0.9
    new, mask = sparsegpt(W, H, 0.5, block_size=block_size, kept=kept)
    damped = H + 0.01 * np.diag(H).mean() * np.eye(8)
    for row in range(5):
        np.testing.assert_allclose(new[row], surgeon(W[row], damped, mask[row]), rtol=1e-8, atol=1e-10)
    assert not (mask & ~kept).any()
    for start in range(0, 8, block_size):
        block = mask[:, start : start + block_size]
        assert (~block).sum() >= math.floor(0.5 * block.size + 1e-9)


def published(W: np.ndarray, H: np.ndarray, sparsity: float, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rule of the published SparseGPT: in a block of columns all weights go whose score is at most the one that stands at
    place k = ⌊ρ · entries⌋ of the sorted scores, counted from 0."""
    W, rest = W.copy(), H + 0.01 * np.diag(H).mean() * np.eye(len(H))
    mask = np.ones(W.shape, dtype=bool)
    for start in range(0, W.shape[1], block_size):
        block = range(start, min(start + block_size, W.shape[1]))
        # What is left of the problem at each column, inverted: its first entry is U_jj².
        inverses = [np.linalg.inv(rest[j:, j:]) for j in block]
        scores = np.stack([W[:, j] ** 2 / inverse[0, 0] for j, inverse in zip(block, inverses, strict=True)], axis=1)
        mask[:, block.start : block.stop] = scores > np.sort(scores, axis=None)[int(sparsity * scores.size)]
        for j, inverse in zip(block, inverses, strict=True):
            lost = np.where(mask[:, j], 0.0, W[:, j])
            W[:, j:] -= np.outer(lost / inverse[0, 0], inverse[0])
    return W * mask, mask


@pytest.mark.parametrize("seed", range(3))
def test_the_published_sparsegpt_prunes_one_more_of_every_block(seed: int) -> None:
    """Ours with one more is theirs, over two steps: where all columns are one block, what is 0 goes first at the second, too."""
    W, H, _ = surgical_case(seed, 1.0, columns=12)
    for block_size in (4, 12):
        entries = 5 * block_size
        _, fewer = sparsegpt(W, H, 0.5, block_size=block_size)
        theirs, their_mask = published(W, H, 0.5, block_size)
        assert (~fewer).sum() == 30
        assert (~their_mask).sum() == 30 + 12 // block_size
        new, mask = sparsegpt(W, H, (entries // 2 + 1) / entries, block_size=block_size)
        np.testing.assert_array_equal(mask, their_mask)
        np.testing.assert_allclose(new, theirs, rtol=tolerances.SPARSEGPT_FLOAT64, atol=tolerances.SPARSEGPT_FLOAT64)
    new, mask = sparsegpt(new, H, (42 + 1) / 60, block_size=12, kept=mask)
    theirs, their_mask = published(theirs, H, 0.7, 12)
    np.testing.assert_array_equal(mask, their_mask)
    np.testing.assert_allclose(new, theirs, rtol=tolerances.SPARSEGPT_FLOAT64, atol=tolerances.SPARSEGPT_FLOAT64)


def test_the_published_sparsegpt_prunes_all_that_tie() -> None:
    W, H = np.ones((2, 3)), np.eye(3)
    assert (~published(W, H, 0.5, 3)[1]).sum() == 6
    assert (~sparsegpt(W, H, 0.5)[1]).sum() == 3


def surgery(
    W: np.ndarray, H: np.ndarray, span: int, share: Callable[[int, int], int], kept: np.ndarray, by_row: bool
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT by its definition, with a fresh inverse of what is left of the Hessian at every column.

    When the first of `span` columns is reached, the entries that cost least go: removing w_j from the problem of columns
    j and on costs w_j² / [H[j:, j:]⁻¹]_00. `share(rows, columns)` of them, out of all rows together or in each row alone.
    Entries that are gone already cost less than any other. Then each column is visited as `surgeon` does.
    """
    W, (rows, columns) = W.copy(), W.shape
    mask = np.ones(W.shape, dtype=bool)
    for j in range(columns):
        if j % span == 0:
            group = range(j, min(j + span, columns))
            trailing = {c: np.linalg.inv(H[c:, c:])[0, 0] for c in group}
            cost = [[W[i, c] ** 2 / trailing[c] if kept[i, c] else -1.0 for c in group] for i in range(rows)]
            for some in [[i] for i in range(rows)] if by_row else [range(rows)]:
                places = [(i, c) for i in some for c in group]
                going = lowest([cost[i][c - j] for i, c in places], share(len(some), len(group)))
                for number, place in enumerate(places):
                    mask[place] = kept[place] and number not in going
        inverse = np.linalg.inv(H[j:, j:])
        for i in range(rows):
            if not mask[i, j]:
                W[i, j:] -= W[i, j] / inverse[0, 0] * inverse[:, 0]
                W[i, j] = 0.0
    return W, mask


def surgical_case(seed: int, kept_share: float, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W (5, columns), a Hessian of correlated inputs, and an earlier mask."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((60, columns)) @ (np.eye(columns) + 0.4 * rng.standard_normal((columns, columns)))
    return rng.standard_normal((5, columns)), 2 / 6 * X.T @ X, rng.random((5, columns)) < kept_share


@pytest.mark.parametrize("kept_share", [1.0, 0.6])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 12, 128])
def test_sparsegpt_is_surgery_block_by_block(
    block_size: int, sparsity: float, damping: float, kept_share: float
) -> None:
    W, H, kept = surgical_case(block_size, kept_share, columns=12)
    damped = H + damping * np.diag(H).mean() * np.eye(12)
    expected, expected_mask = surgery(
        W, damped, block_size, lambda rows, columns: math.floor(sparsity * rows * columns + 1e-9), kept, by_row=False
    )
    new, mask = sparsegpt(W, H, sparsity, block_size=block_size, damping=damping, kept=kept)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(new, expected, rtol=tolerances.SPARSEGPT_FLOAT64, atol=tolerances.SPARSEGPT_FLOAT64)


@pytest.mark.parametrize("kept_share", [1.0, 0.6])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("blocks", [1, 2, 128])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (0, 3), (2, 6), (1, 12)])
def test_sparsegpt_nm_is_surgery_group_by_group(n: int, m: int, blocks: int, damping: float, kept_share: float) -> None:
    """However many groups a block holds, each group's mask is chosen when it is reached."""
    W, H, kept = surgical_case(10 * n + m, kept_share, columns=12)
    damped = H + damping * np.diag(H).mean() * np.eye(12)
    expected, expected_mask = surgery(W, damped, m, lambda _, columns: columns - n, kept, by_row=True)
    new, mask = sparsegpt_nm(W, H, n, m, block_size=m * blocks, damping=damping, kept=kept)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(new, expected, rtol=tolerances.SPARSEGPT_FLOAT64, atol=tolerances.SPARSEGPT_FLOAT64)


@given(strategies.sparsegpt_cases(group=True))
def test_sparsegpt_nm_follows_its_pattern_and_the_surgeon(case: dict[str, Any]) -> None:
    new, mask = sparsegpt_nm(**case)
    groups = mask.reshape(len(mask), -1, case["m"]).sum(-1)
    assert (groups <= case["n"]).all()
    if case["kept"] is None:
        assert (groups == case["n"]).all()
    assert not new[~mask].any()
    H = case["hessian"]
    damped = H + 0.01 * np.diag(H).mean() * np.eye(len(H))
    if np.linalg.cond(damped) < 1e6:
        expected = np.stack([surgeon(row, damped, kept) for row, kept in zip(case["weight"], mask, strict=True)])
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-7 * max(1.0, np.abs(expected).max()))


def test_sparsegpt_loses_less_than_cutting() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((64, 16)) @ rng.standard_normal((16, 16))
    W = rng.standard_normal((8, 16))
    new, mask = sparsegpt(W, 2 * X.T @ X, 0.5)
    assert np.linalg.norm(X @ (W - new).T) < 0.9 * np.linalg.norm(X @ (W - W * mask).T)


def test_damping_is_raised_before_giving_up() -> None:
    nearly = np.array([[1.0, 1.05], [1.05, 1.0]])  # eigenvalue −0.05: 0.01 is too little, 0.1 enough
    _, mask = sparsegpt(np.ones((1, 2)), nearly, 0.5)
    assert mask.sum() == 1
    with pytest.raises(ValueError, match=r"hessian .* damping 0\.01, 0\.1, 1"):
        sparsegpt(np.ones((1, 2)), np.zeros((2, 2)), 0.5)


@given(strategies.sparse_groups())
# 0.7 of two and of one is one and nothing: one zero is asked, not two.
@example({"zeros": np.array([0.0, 1.0]), "sizes": np.array([2.0, 1.0]), "sparsity": 0.7})
# A full group beside one without entries.
@example({"zeros": np.array([4.0, 0.0]), "sizes": np.array([4.0, 0.0]), "sparsity": 0.5})
def test_the_rest_takes_as_much_as_it_may(case: dict[str, Any]) -> None:
    """Against all that could be asked: for groups of one size, every whole number of zeros; else every thousandth."""
    zeros, sizes, sparsity = case["zeros"], case["sizes"], case["sparsity"]
    asked = np.floor(sparsity * sizes + 1e-9).sum()
    rest = rest_sparsity(**case)

    def total(rate: float) -> float:
        return float(np.maximum(np.floor(rate * sizes + 1e-9), zeros).sum())

    assert total(rest) <= max(asked, zeros.sum())
    if (zeros <= np.floor(sparsity * sizes + 1e-9)).all():
        assert rest == sparsity
    size = int(sizes[0])
    candidates = np.arange(size + 1) / size if (sizes == size).all() else np.linspace(0, 1, 1001)
    best = max((total(rate) for rate in candidates if rate <= sparsity and total(rate) <= asked), default=zeros.sum())
    # Sizes that differ are filled by floors of one rate, which may leave less than one entry of each group.
    assert total(rest) >= best - (0 if (sizes == size).all() else len(sizes))


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps", "admm"])
def test_what_is_zero_already_counts(method: str, sparsity: float) -> None:
    """Half of the rows, a tenth of the rest, and all of the first 128 inputs: the total is what was asked, or what was there."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((12, 320))
    kept = rng.random(W.shape) < 0.9
    kept[: 6 if method != "sparsegpt" else 0] = False
    kept[:, : 128 if method == "sparsegpt" else 0] = False
    statistic = {"magnitude": None, "wanda": np.ones(320)}.get(method, np.eye(320))
    _, mask = prune(method, W * kept, statistic, kept, sparsity=sparsity)
    # Up to one of each row or block less.
    slack = {"wanda": len(W), "sparsegpt": 3}.get(method, 1)
    expected = max(sparsity * W.size, (~kept).sum())
    assert expected - slack <= (~mask).sum() <= expected
    if method == "wanda" and sparsity > 0.6:
        assert len({int(count) for count in (~mask[6:]).sum(1)}) == 1, "the live rows share alike"


@given(strategies.prune_cases())
def test_masks_only_shrink(case: dict[str, Any]) -> None:
    new, mask = prune(**case)
    assert not (mask & ~case["kept"]).any()
    assert not new[~mask].any()


def test_a_dead_input_does_not_bring_back_what_was_pruned() -> None:
    """All scores 0: the pruned weights go first, though their index is higher."""
    kept = np.array([[True, True, False, False]])
    _, mask = prune("wanda", np.array([[1.0, 2.0, 0.0, 0.0]]), np.zeros(4), kept, sparsity=0.5)
    assert mask.tolist() == [[True, True, False, False]]


def test_groups_lose_weights_as_the_schedule_goes() -> None:
    from reference.schedule import cubic_sparsity

    counts = [kept_per_group(cubic_sparsity(t, 5, 0.75), 8) for t in range(1, 6)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2
