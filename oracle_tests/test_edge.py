"""Hard numerical cases in both packages: half precision, ten orders of magnitude, silent inputs, singularity, ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies, tolerances
from oracle_tests.assertions import assert_close, assert_exact, assert_masks_agree, to_numpy
from oracle_tests.ops import to_torch
from reference import adapter as spec_adapter
from reference import hsic as spec_hsic
from reference import rank as spec_rank
from reference import rmi as spec_rmi
from reference import schedule as spec_schedule
from reference import sparsity as spec_sparsity
from reference.masks import nm as spec_nm
from reference.masks import prune as spec_prune
from reference.masks import sparsegpt as spec_sparsegpt
from reference.masks import wanda as spec_wanda
from torch_impl import adapter, hsic, rank, rmi, schedule, sparsity
from torch_impl.masks import nm, prune, sparsegpt, wanda

HALF = [torch.float16, torch.bfloat16]
ALL_DTYPES = [torch.float64, torch.float32, *HALF]
PATTERNS: list[dict[str, Any]] = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"nm": (2, 4)}]


def both(spec: Callable[..., Any], production: Callable[..., Any], *values: Any, **options: Any) -> tuple[Any, Any]:
    """The results of a pair on the same arguments."""
    return spec(*values, **options), production(*map(to_torch, values), **options)


def exact(value: torch.Tensor) -> np.ndarray:
    """The values of a tensor in float64."""
    return value.double().numpy()


def assert_rounded_once(name: str, expected: np.ndarray, found: torch.Tensor, terms: float) -> None:
    """Every entry of a half-precision result on its own: one rounding away, float32's with terms of that size aside."""
    assert_exact(f"{name}, zeros", expected == 0, found == 0)
    excess = np.abs(exact(found) - expected) - tolerances.one_rounding(found.dtype, np.abs(expected), terms)
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"{name}: {exact(found)[worst]!r} at {worst}, the spec's is {expected[worst]!r}"


# Half precision: production takes the half tensor, the spec the numbers it holds.


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_weights_are_pruned_alike(
    dtype: torch.dtype, method: str, tied: bool, pattern: dict[str, Any]
) -> None:
    """A product of two half-precision numbers is exact in float32, so masks agree to the last tie."""
    rng = np.random.default_rng(1)
    values = rng.integers(-3, 4, (9, 16)) / 4 if tied else rng.standard_normal((9, 16))
    kept = rng.random((9, 16)) < 0.9
    weight = to_torch(values * kept, dtype)
    norm = np.repeat(rng.random(4), 4) if tied else rng.random(16)
    statistic = {
        "magnitude": None,
        "wanda": to_torch(norm, dtype).float(),
        "sparsegpt": to_torch(spec_sparsegpt.hessian(rng.standard_normal((60, 16)), 4), torch.float32),
    }[method]
    new, mask = prune.prune(method, weight, statistic, torch.from_numpy(kept), **pattern)
    held = None if statistic is None else exact(statistic)
    expected, expected_mask = spec_prune.prune(method, exact(weight), held, kept, **pattern)
    assert new.dtype == dtype
    assert_exact(f"{method}, mask", expected_mask, mask)
    if method == "sparsegpt":
        assert_rounded_once("sparsegpt, weight", expected, new, terms=float(np.abs(expected).max()))
    else:
        assert_exact(f"{method}, weight", expected, exact(new))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_weights_are_scored_in_float32(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(15)
    weight, norm = to_torch(rng.standard_normal((9, 16)), dtype), to_torch(rng.random(16), torch.float32)
    score = wanda.wanda_score(weight, norm)
    assert score.dtype == torch.float32
    ratio = exact(score) / spec_wanda.wanda_score(exact(weight), exact(norm))
    assert_close("wanda_score", np.ones((9, 16)), ratio, tolerances.UNIT[torch.float32])


@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_weights_are_rounded_once(dtype: torch.dtype, size: float) -> None:
    """Merging, folding and rebasing, with adapters in float32 as they are trained; tiny, usual and dominating."""
    rng = np.random.default_rng(2)
    weight = to_torch(rng.standard_normal((9, 12)) * (rng.random((9, 12)) < 0.5), dtype)
    A, B = (to_torch(size * rng.standard_normal(shape), torch.float32) for shape in ((3, 12), (9, 3)))
    arguments = (exact(weight), exact(A), exact(B))
    merged = adapter.merge(weight, A, B, 0.25)
    assert merged.dtype == dtype
    terms = float(spec_adapter.effective_weight(*map(np.abs, arguments), 0.25).max())
    assert_rounded_once("merge", spec_adapter.effective_weight(*arguments, 0.25), merged, terms)
    folded = rank.fold_adapter(weight, A, B, 1, 0.25)
    assert_rounded_once("fold", spec_rank.fold_adapter(*arguments, 1, 0.25), folded, terms)
    updated = to_torch(exact(merged) + size * rng.standard_normal((9, 12)), dtype)
    mask = (weight != 0) & torch.from_numpy(rng.random((9, 12)) < 0.7)
    expected = spec_adapter.rebase(exact(weight), exact(merged), exact(updated), mask.numpy())
    assert_rounded_once("rebase", expected, adapter.rebase(weight, merged, updated, mask), terms + size)


@pytest.mark.parametrize("huge", [1.0, 1e3])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_adapter_gradients_of_half_precision_weights_are_summed_in_float32(dtype: torch.dtype, huge: float) -> None:
    """G = dyᵀx comes in the weight's dtype, A and B are float32 as they are trained: every entry within float32's bound."""
    rng = np.random.default_rng(17)
    G, weight = (to_torch(rng.standard_normal((63, 40)), dtype) for _ in range(2))
    weight *= torch.from_numpy(rng.random((63, 40)) < 0.5)
    G[:, 7] *= huge
    A, B = (to_torch(rng.standard_normal(shape), torch.float32) for shape in ((3, 40), (63, 3)))
    masked = exact(G) * (exact(weight) != 0)
    expected = 0.5 * exact(B).T @ masked, 0.5 * masked @ exact(A).T
    terms = abs(exact(B)).T @ abs(masked), abs(masked) @ abs(exact(A)).T
    found = adapter.contract_gradient(G.clone(), weight, A, B, 0.5)
    for name, ours, theirs, size in zip(("dA", "dB"), found, expected, terms, strict=True):
        assert ours.dtype == torch.float32
        assert_close(name, theirs, ours, tolerances.bound(torch.float32), scale=size)


# Activations from 1e-6 to 1e4 in one matrix.


def wide_inputs(by: str, dtype: torch.dtype) -> torch.Tensor:
    """(24, 12): each entry of its own magnitude, or each input, or each token."""
    rng = np.random.default_rng(3)
    shape = {"entries": (24, 12), "inputs": (1, 12), "tokens": (24, 1)}[by]
    magnitudes = rng.permutation(np.linspace(-6, 4, shape[0] * shape[1])).reshape(shape)
    return to_torch(10.0**magnitudes * rng.choice([-1, 1], (24, 12)) * rng.uniform(0.5, 1, (24, 12)), dtype)


@pytest.mark.parametrize("by", ["entries", "inputs", "tokens"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_ten_orders_of_magnitude(dtype: torch.dtype, by: str) -> None:
    """Every entry on its own, small ones too: relative to its own sum of sizes. Statistics are float32 at least."""
    inputs = wide_inputs(by, dtype)
    held = exact(inputs)
    bound = tolerances.SAME_ALGORITHM if dtype == torch.float64 else tolerances.bound(torch.float32)
    norm = spec_wanda.input_norm(held)
    found_norm = wanda.input_norm(inputs)
    assert_close("input_norm", np.ones(12), exact(found_norm) / norm, bound)
    terms = spec_sparsegpt.hessian(np.abs(held), 2)
    zeros = np.zeros_like(terms)
    difference = exact(sparsegpt.hessian(inputs, 2)) - spec_sparsegpt.hessian(held, 2)
    assert_close("hessian", zeros, difference / terms, bound, scale=1.0)
    gram, found_gram = spec_hsic.linear_gram(held), hsic.linear_gram(inputs)
    terms = spec_hsic.linear_gram(np.abs(held))
    assert_close("linear_gram", np.zeros_like(gram), (exact(found_gram) - gram) / terms, bound, scale=1.0)

    other, found_other = gram[::-1, ::-1].copy(), found_gram.flip(0, 1)
    size = float(np.linalg.norm(gram)) ** 2
    assert_close("hsic", spec_hsic.hsic(gram, other), hsic.hsic(found_gram, found_other), bound, scale=size)
    assert_close("nhsic", spec_hsic.nhsic(gram, other), hsic.nhsic(found_gram, found_other), bound, scale=1.0)
    shared = rmi.nhsic_matrix(torch.stack([found_gram, found_other]))
    assert_close("nhsic_matrix", spec_rmi.nhsic_matrix(np.stack([gram, other])), shared, bound, scale=1.0)

    weight = np.random.default_rng(4).standard_normal((8, 12))
    score, found_score = spec_wanda.wanda_score(weight, norm), wanda.wanda_score(to_torch(weight), found_norm)
    assert_close("wanda_score", np.ones((8, 12)), exact(found_score) / score, bound)
    for share in (0.25, 0.5, 0.75):
        mask = wanda.wanda_mask(to_torch(weight), found_norm, share)
        assert_masks_agree("wanda_mask", spec_wanda.wanda_mask(weight, norm, share), mask, score, 2 * bound)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_features_of_more_than_one_chunk(dtype: torch.dtype) -> None:
    """Production widens a long sequence's features piece by piece."""
    features = to_torch(np.random.default_rng(14).standard_normal((3, 2 * hsic.CHUNK + 7)), dtype)
    bound = tolerances.SAME_ALGORITHM if dtype == torch.float64 else tolerances.long_sum(features.shape[1])
    assert_close("linear_gram", spec_hsic.linear_gram(exact(features)), hsic.linear_gram(features), bound)


# Inputs that are never active.

SILENT = [0, 5, 6, 11]


@pytest.mark.parametrize("pruned", range(13))
def test_silent_inputs_go_first_in_wanda(pruned: int) -> None:
    """Lower index first among them; with more to prune, all of them and then others."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((40, 12))
    inputs[:, SILENT] = 0
    norm, found_norm = both(spec_wanda.input_norm, wanda.input_norm, inputs)
    assert_exact("input_norm of silent inputs", np.zeros(4), found_norm[SILENT])
    weight = rng.standard_normal((6, 12))
    mask, found = both(spec_wanda.wanda_mask, wanda.wanda_mask, weight, norm, pruned / 12)
    assert_exact("mask", mask, found)
    assert (~mask).sum(1).tolist() == [pruned] * 6
    assert not mask[:, SILENT[:pruned]].any()
    assert mask[:, SILENT[pruned:]].all()


def silent_case() -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Weights of about the same size, a Hessian with zero rows, and the inputs that are active."""
    rng = np.random.default_rng(6)
    inputs = rng.standard_normal((60, 12))
    inputs[:, SILENT] = 0
    weight = rng.choice([-1, 1], (6, 12)) * rng.uniform(0.9, 1.1, (6, 12))
    return weight, spec_sparsegpt.hessian(inputs, 4), [j for j in range(12) if j not in SILENT]


@pytest.mark.parametrize("pruned", [24, 30, 43, 60])
def test_silent_inputs_cost_sparsegpt_nothing(pruned: int) -> None:
    """Damping carries their zero rows. All 24 of their weights go first, and the rest is the problem without them."""
    weight, H, active = silent_case()
    pair = spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt
    (new, mask), (found, found_mask) = both(*pair, weight, H, pruned / 72)
    without, without_mask = spec_sparsegpt.sparsegpt(
        weight[:, active], H[np.ix_(active, active)], (pruned - 24) / 48, damping=0.01 * 8 / 12
    )
    assert_exact("mask", mask, found_mask)
    assert_close("weight", new, found, tolerances.SPARSEGPT_FLOAT64)
    assert not mask[:, SILENT].any()
    assert_exact("mask of active inputs", without_mask, mask[:, active])
    assert_close("weight of active inputs", without, new[:, active], tolerances.SAME_ALGORITHM)


def test_silent_inputs_go_first_in_their_group() -> None:
    weight, H, _ = silent_case()
    (new, mask), (found, found_mask) = both(spec_sparsegpt.sparsegpt_nm, sparsegpt.sparsegpt_nm, weight, H, 2, 4)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", new, found, tolerances.SPARSEGPT_FLOAT64)
    assert not mask[:, SILENT].any()


def test_an_input_that_is_always_silent_everywhere() -> None:
    """No statistic at all: Wanda prunes by index, SparseGPT refuses."""
    weight, silence = np.arange(1.0, 9.0).reshape(2, 4), np.zeros((5, 4))
    mask, found = both(spec_wanda.wanda_mask, wanda.wanda_mask, weight, spec_wanda.input_norm(silence), 0.5)
    assert_exact("mask", mask, found)
    assert mask.tolist() == [[False, False, True, True]] * 2
    H = spec_sparsegpt.hessian(silence, 1)
    refused_alike(spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt, "damping 0.01, 0.1, 1$", weight, H, 0.5)


def refused_alike(
    spec: Callable[..., Any], production: Callable[..., Any], message: str, *values: Any, **options: Any
) -> None:
    """Both refuse the arguments, with a message that matches."""
    with pytest.raises(ValueError, match=message):
        spec(*values, **options)
    with pytest.raises(ValueError, match=message):
        production(*map(to_torch, values), **options)


# Hessians that are singular or nearly so.


def hessian_case(kind: str) -> np.ndarray:
    """A Hessian of 12 inputs."""
    rng = np.random.default_rng(7)
    plain = rng.standard_normal((40, 12))
    inputs = {
        "one token": plain[:1],
        "fewer tokens than inputs": plain[:3],
        "one token too few": plain[:11],
        "the same input twice": plain[:, [0, 1, 1, 3, 4, 5, 5, 7, 8, 9, 1, 11]],
        "opposite inputs": plain[:, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]] * np.repeat([1, -1], 6),
        "quiet inputs": plain * np.logspace(0, -6, 12),
        "ten orders of magnitude": exact(wide_inputs("entries", torch.float64)),
        "ten orders of magnitude by input": exact(wide_inputs("inputs", torch.float64)),
    }
    return spec_sparsegpt.hessian(inputs[kind], 1)


HESSIANS = [
    "one token",
    "fewer tokens than inputs",
    "one token too few",
    "the same input twice",
    "opposite inputs",
    "quiet inputs",
    "ten orders of magnitude",
    "ten orders of magnitude by input",
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("kind", HESSIANS)
def test_singular_hessians_are_carried_by_damping(kind: str, group: tuple[int, int] | None, dtype: torch.dtype) -> None:
    weight, H = to_torch(np.random.default_rng(8).standard_normal((6, 12)), dtype), to_torch(hessian_case(kind), dtype)
    if group is None:
        expected, mask = spec_sparsegpt.sparsegpt(exact(weight), exact(H), 0.5, block_size=4)
        found, found_mask = sparsegpt.sparsegpt(weight, H, 0.5, block_size=4)
    else:
        expected, mask = spec_sparsegpt.sparsegpt_nm(exact(weight), exact(H), *group, block_size=4)
        found, found_mask = sparsegpt.sparsegpt_nm(weight, H, *group, block_size=4)
    assert_exact("mask", mask, found_mask)
    assert (~mask).sum() == 36
    bound = tolerances.SPARSEGPT_FLOAT64 if dtype == torch.float64 else tolerances.SPARSEGPT_FLOAT32
    assert_close("weight", expected, found, bound, scale=float(np.abs(exact(weight)).max()))


@pytest.mark.parametrize("group", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
def test_ill_conditioned_hessians_without_damping(condition: float, group: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(9)
    Q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    H = Q * np.geomspace(1, 1 / condition, 12) @ Q.T
    H, weight = (H + H.T) / 2, rng.standard_normal((6, 12))
    if group is None:
        pair: Any = spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt, weight, H, 0.5
    else:
        pair = spec_sparsegpt.sparsegpt_nm, sparsegpt.sparsegpt_nm, weight, H, *group
    (expected, mask), (found, found_mask) = both(*pair, block_size=4, damping=0.0)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", expected, found, tolerances.ill_conditioned(condition))


@pytest.mark.parametrize(
    "H",
    [np.ones((3, 3)), np.diag([1.0, 0, 1]), np.array([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]]), np.eye(3) * 1e-320],
    ids=["one token", "silent input", "indefinite", "too small to invert"],
)
def test_hessians_that_cannot_be_factored_are_refused(H: np.ndarray) -> None:
    """Never a silent fallback, never infinities."""
    weight = np.ones((2, 3))
    message = "^hessian is not positive definite with damping 0, 0, 0$"
    refused_alike(spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt, message, weight, H, 0.5, damping=0.0)
    nm_pair = spec_sparsegpt.sparsegpt_nm, sparsegpt.sparsegpt_nm
    refused_alike(*nm_pair, message, weight, H, 1, 3, block_size=3, damping=0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_hessians_that_overflowed_are_refused(value: float) -> None:
    """An infinite pivot would factor, and prune with 0 / 0."""
    H, weight = np.diag([value, 1.0, 1.0]), np.ones((2, 3))
    message = "^hessian holds NaN or infinity; allowed: finite numbers$"
    refused_alike(spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt, message, weight, H, 0.5)
    # Finite in float32, while its mean diagonal is not.
    largest = torch.eye(3) * 3e38
    with pytest.raises(ValueError, match=r"^hessian is not positive definite with damping 0\.01, 0\.1, 1$"):
        sparsegpt.sparsegpt(torch.ones(2, 3), largest, 0.5)


@pytest.mark.parametrize(("off_diagonal", "raised_to"), [(0.9, 0.01), (1.005, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_damping_is_raised_alike(off_diagonal: float, raised_to: float) -> None:
    H = np.array([[1.0, off_diagonal], [off_diagonal, 1.0]])
    weight = np.array([[1.0, 2.0], [-3.0, 1.0]])
    (new, mask), (found, found_mask) = both(spec_sparsegpt.sparsegpt, sparsegpt.sparsegpt, weight, H, 0.5)
    assert_exact("mask", mask, found_mask)
    assert_close("weight", new, found, tolerances.SPARSEGPT_FLOAT64)
    raised = spec_sparsegpt.sparsegpt(weight, H, 0.5, damping=raised_to)
    assert_exact("weight at that damping", raised[0], new)


# The spread steps up just above each tenth.


@pytest.mark.parametrize("tenths", range(11))
def test_the_spread_at_every_tenth_and_beside_it(tenths: int) -> None:
    """δ = 0.01 up to a target of 0.5, and 0.01 more for each tenth begun above it; rounding begins no tenth."""
    at, above = max(1, tenths - 4), max(1, tenths - 3)
    targets = {
        tenths / 10: at,
        1 - (10 - tenths) / 10: at,
        min(0.1 * tenths, 1.0): at,
        np.nextafter(tenths / 10, 0): at,
        min(tenths / 10 + 1e-12, 1.0): at,
        max(tenths / 10 - 1e-6, 0.0): at,
        min(tenths / 10 + 1e-6, 1.0): min(above, 6),
    }
    for target, hundredths in targets.items():
        for spread in (spec_schedule.sparsity_spread, schedule.sparsity_spread):
            assert spread(float(target)) == hundredths / 100, target


# Importances and errors that tie.


@pytest.mark.parametrize(
    ("importance", "target", "spread", "expected"),
    [
        (np.ones(6), 0.31, 0.03, [0.34, 0.34, 0.34, 0.28, 0.28, 0.28]),
        (np.full(5, 1e-300), 0.5, 0.1, [0.6, 0.6, 0.5, 0.4, 0.4]),
        (np.zeros(4), 0.0, 0.1, [0.0, 0.0, 0.0, 0.0]),
        (np.ones(4), 1.0, 0.1, [1.0, 1.0, 1.0, 1.0]),
        (np.array([2.0, 1, 2, 1, 2, 1]), 0.5, 0.1, [0.4, 0.6, 0.4, 0.6, 0.4, 0.6]),
        (np.array([2.0, 2, 1, 1, 3, 3]), 0.05, 0.1, [0.0, 0.0, 0.15, 0.15, 0.0, 0.0]),
        (np.array([2.0, 2, 2, 1, 3, 3, 3]), 0.5, 0.1, [0.6, 0.6, 0.5, 0.6, 0.4, 0.4, 0.4]),
        (np.array([1.0, np.nextafter(1, 0), 1]), 0.5, 0.1, [0.5, 0.6, 0.4]),
    ],
)
def test_importances_that_tie(importance: np.ndarray, target: float, spread: float, expected: list[float]) -> None:
    """The lower index is pruned first."""
    pair = both(spec_sparsity.allocate_sparsity, sparsity.allocate_sparsity, importance, target, spread)
    for rates in pair:
        assert_close("rates", np.array(expected), rates, tolerances.SAME_ALGORITHM, scale=1.0)


@pytest.mark.parametrize(
    ("importance", "kept_total", "spread", "expected"),
    [
        (np.ones(6), 12, 1, [1, 1, 1, 3, 3, 3]),
        (np.ones(6), 20, 1, [3, 3, 3, 3, 4, 4]),
        (np.ones(6), 20, 0, None),
        (np.zeros(3), 0, 1, [0, 0, 0]),
        (np.zeros(3), 12, 2, [4, 4, 4]),
        (np.array([2.0, 1, 2, 1, 2, 1]), 12, 1, [3, 1, 3, 1, 3, 1]),
        (np.array([1.0, 1, 2, 2, 1]), 11, 1, [2, 2, 2, 3, 2]),
    ],
)
def test_importances_that_tie_in_groups(
    importance: np.ndarray, kept_total: int, spread: int, expected: list[int] | None
) -> None:
    pair = spec_sparsity.allocate_kept, sparsity.allocate_kept
    if expected is None:
        refused_alike(*pair, "kept_total is 20; .* at most 18", importance, kept_total, 4, spread)
        return
    for kept in both(*pair, importance, kept_total, 4, spread):
        assert_exact("kept", np.array(expected), kept)


@pytest.mark.parametrize(
    ("errors", "mean", "expected"),
    [
        (np.zeros(7), 6.5, [7, 7, 7, 7, 6, 6, 6]),
        (np.zeros(3), 16, [16, 16, 16]),
        (np.full(3, 1e-300), 1.5, [1, 1, 2]),
        (np.full(3, 1e300), 1.5, [1, 1, 2]),
        (np.array([1.0, 1, 2, 2, 2]), 3, [1, 2, 4, 4, 4]),
        (np.array([0.0, 0, 0, 1, 0, 0, 0]), 4, [2, 2, 2, 16, 2, 2, 2]),
        (np.array([0.0, 0, 0, 1, 0, 0, 0]), 5, [4, 3, 3, 16, 3, 3, 3]),
        (np.array([0.0, 5e-324]), 8.5, [1, 16]),
        (np.zeros(7), 6.6, [6, 6, 6, 7, 7, 7, 7]),
        (np.full(3, 1e308), 1.5, [1, 1, 2]),
        # Shares of exactly 1.5 and 2.5, and of 7.5, however they are computed.
        (np.array([3.0, 5]), 2, [2, 2]),
        (np.array([3.0, 2, 1, 5, 0, 1, 5, 5, 0, 1, 0, 1, 2]), 3, [4, 2, 1, 8, 1, 1, 8, 8, 1, 1, 1, 1, 2]),
    ],
)
def test_errors_that_tie_or_vanish(errors: np.ndarray, mean: float, expected: list[int]) -> None:
    for ranks in both(spec_rank.allocate_ranks, rank.allocate_ranks, errors, mean):
        assert_exact("ranks", np.array(expected), ranks)


# Eighty blocks, as of a 70B model.


@pytest.mark.parametrize("seed", range(3))
def test_eighty_blocks_share_information(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((80, 8, 16)) + 3 * rng.standard_normal((1, 8, 16))
    features[17] = features[16]
    features[40] = 1.0
    grams = np.stack([spec_hsic.linear_gram(X) for X in features])
    shared, found = both(spec_rmi.nhsic_matrix, rmi.nhsic_matrix, grams)
    assert_close("nhsic", shared, found, tolerances.SAME_ALGORITHM)
    redundancy = spec_rmi.redundancy(shared)
    assert redundancy[40] == 0
    for beta in (1.0, 100.0):
        importance, found = both(spec_rmi.importance, rmi.importance, redundancy, beta)
        assert_close("importance", importance, found, tolerances.SAME_ALGORITHM)
        assert -np.log(importance).sum() == pytest.approx(beta, rel=1e-12)
        assert importance.argmax() == 40


def block_values(kind: str, seed: int) -> np.ndarray:
    """(80,) values: all different, some equal, all equal, or far apart."""
    rng = np.random.default_rng(seed)
    return {
        "plain": rng.random(80),
        "ties": rng.integers(1, 4, 80) / 3,
        "equal": np.full(80, 1 / 3),
        "far apart": np.exp(6 * rng.standard_normal(80)),
    }[kind]


EIGHTY = st.builds(block_values, st.sampled_from(["plain", "ties", "equal", "far apart"]), strategies.SEEDS)
# A block with a billionth of the weights would show the budget's own rounding in its rate.
SIZES = st.builds(block_values, st.sampled_from(["plain", "ties", "equal"]), strategies.SEEDS).map(lambda v: v + 0.01)


@given(EIGHTY, SIZES, st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.06]))
def test_eighty_blocks_share_sparsity(
    importance: np.ndarray, weights: np.ndarray, target: float, spread: float
) -> None:
    lo, hi = max(0.0, target - spread), min(1.0, target + spread)
    pair = spec_sparsity.allocate_sparsity, sparsity.allocate_sparsity
    for rates in map(to_numpy, both(*pair, importance, target, spread, weights)):
        assert abs(weights @ rates / weights.sum() - target) <= 1e-12
        assert rates.min() >= lo
        assert rates.max() <= hi + 1e-15
        # The less important, the sparser, and all but one at a bound.
        assert (np.diff(rates[np.argsort(importance, kind="stable")]) <= 1e-9).all()
        assert ((rates > lo + 1e-9) & (rates < hi - 1e-9)).sum() <= 1


@given(EIGHTY, st.integers(0, 640), st.integers(1, 3))
def test_eighty_blocks_share_groups(importance: np.ndarray, kept_total: int, spread: int) -> None:
    kept, found = both(spec_sparsity.allocate_kept, sparsity.allocate_kept, importance, kept_total, 8, spread)
    assert_exact("kept", kept, found)
    assert kept.sum() == kept_total
    assert (np.abs(80 * kept - kept_total) <= 80 * spread).all()
    assert (np.diff(kept[np.argsort(importance, kind="stable")]) >= 0).all()


@given(EIGHTY, st.integers(2, 32))
def test_eighty_blocks_share_ranks(errors: np.ndarray, halves: int) -> None:
    ranks, found = both(spec_rank.allocate_ranks, rank.allocate_ranks, errors, halves / 2)
    assert_exact("ranks", ranks, found)
    assert ranks.sum() == 40 * halves
    assert ranks.min() >= 1
    assert ranks.max() <= 16


# Few samples.


def test_one_sample_says_nothing_and_is_refused() -> None:
    one = np.ones((1, 1))
    refused_alike(spec_hsic.hsic, hsic.hsic, "gram_x has n = 1 samples; allowed: n = 2 or more", one, one)
    refused_alike(spec_hsic.nhsic, hsic.nhsic, "gram_x has n = 1 samples; allowed: n = 2 or more", one, one)
    message = r"grams has shape \(3, 1, 1\); allowed: \(L, n, n\) with n = 2 or more"
    refused_alike(spec_rmi.nhsic_matrix, rmi.nhsic_matrix, message, np.ones((3, 1, 1)))
    for centred in both(spec_hsic.center, hsic.center, one):
        assert_exact("center", np.zeros((1, 1)), centred)


def test_two_samples_always_agree() -> None:
    """Two samples make one difference, which any other is a multiple of: nHSIC is 1, all blocks equally important."""
    rng = np.random.default_rng(10)
    features = rng.standard_normal((4, 2, 5))
    grams = np.stack([spec_hsic.linear_gram(X) for X in features])
    for shared in both(spec_rmi.nhsic_matrix, rmi.nhsic_matrix, grams):
        assert_close("nhsic", np.ones((4, 4)), shared, tolerances.SAME_ALGORITHM)
    squared = [float(((X[0] - X[1]) ** 2).sum()) for X in features]
    for value in both(spec_hsic.hsic, hsic.hsic, grams[0], grams[1]):
        assert_close("hsic", squared[0] * squared[1] / 4, value, tolerances.SAME_ALGORITHM)
    for importance in both(spec_rmi.importance, rmi.importance, spec_rmi.redundancy(np.ones((4, 4)))):
        assert_close("importance", np.full(4, np.exp(-1 / 4)), importance, tolerances.SAME_ALGORITHM)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("value", [7.0, 0.0, 1e-3])
def test_constant_representations_share_nothing(value: float, dtype: torch.dtype) -> None:
    constant, other = torch.full((5, 3), value, dtype=dtype), to_torch(np.eye(5)[:, :3] + 1, dtype)
    found = rmi.nhsic_matrix(torch.stack([hsic.linear_gram(constant), hsic.linear_gram(other)]))
    grams = np.stack([spec_hsic.linear_gram(exact(constant)), spec_hsic.linear_gram(exact(other))])
    assert_exact("nhsic", np.eye(2), spec_rmi.nhsic_matrix(grams))
    assert_exact("nhsic", np.eye(2), exact(found))


@pytest.mark.parametrize(
    ("dtype", "variation"),
    [(torch.float64, 1.0), (torch.float64, 1e-3), (torch.float64, 1e-5), (torch.float32, 0.1), (torch.float32, 0.02)],
    ids=str,
)
def test_nearly_constant_representations_are_still_compared(dtype: torch.dtype, variation: float) -> None:
    """Tokens that have most in common: centring cancels all but variation² of a Gram matrix."""
    rng = np.random.default_rng(16)
    features = to_torch(1 + variation * rng.standard_normal((3, 6, 20)), dtype)
    found = rmi.nhsic_matrix(torch.stack([hsic.linear_gram(X) for X in features]))
    grams = np.stack([spec_hsic.linear_gram(X) for X in exact(features)])
    centred = features.double() - features.double().mean(1, keepdim=True)
    without_mean = np.stack([spec_hsic.linear_gram(X.numpy()) for X in centred])
    expected = spec_rmi.nhsic_matrix(without_mean)
    assert expected.min() > 0.1
    assert_close("spec", expected, spec_rmi.nhsic_matrix(grams), tolerances.cancelled(torch.float64, variation**2))
    assert_close("production", expected, found, tolerances.cancelled(dtype, variation**2))


# Numbers that have overflowed, where a weight is pruned.


def test_what_overflows_where_a_weight_is_pruned_stays_zero() -> None:
    """M⊙ is a choice, not a product: 0 · ∞ is NaN, and 0 · −1 is −0, which a packed weight would keep."""
    weight, A, B = np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, np.inf, -1.0]]), np.array([[2.0]])
    layer = (weight, A, B)
    for made in both(spec_adapter.effective_weight, adapter.effective_weight, *layer, 0.5):
        assert_exact("merged", np.array([[2.0, 0.0, 0.0]]), made)
        assert not np.signbit(to_numpy(made)).any()
    for made in both(spec_rank.fold_adapter, rank.fold_adapter, *layer, 0, 0.5):
        assert_exact("folded", np.array([[2.0, 0.0, 0.0]]), made)
        assert not np.signbit(to_numpy(made)).any()
    x = np.array([[3.0, np.inf, 5.0]])
    layer = (x, weight, np.ones((1, 3)), B, 0.5, np.array([[2.0]]))
    spec, found = both(spec_adapter.masked_lora_grad, adapter.masked_lora_grad, *layer)
    for name, theirs, ours, expected in zip(("dA", "dB"), spec[1:], found[1:], ([[6.0, 0, 0]], [[3.0]]), strict=True):
        assert_exact(name, np.array(expected), theirs)
        assert_exact(name, np.array(expected), ours)


# Adapters of full rank; weights of one row or one column.


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 7])
@pytest.mark.parametrize("before", [0, 1, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_adapters_come_to_full_rank_and_go(shape: tuple[int, int], before: int, after: int) -> None:
    """Rank min(out, in) = 4 and beyond: growing moves nothing, shrinking moves nothing if what is dropped is folded."""
    rng = np.random.default_rng(11)
    out, columns = shape
    weight = rng.standard_normal(shape) * (rng.random(shape) < 0.6)
    A, B = rng.standard_normal((before, columns)), rng.standard_normal((out, before))
    rows = rng.standard_normal((after - before, columns)) if after > before else None
    resized, found = both(spec_rank.resize_adapter, rank.resize_adapter, A, B, after, rows)
    for name, ours, theirs in zip("AB", found, resized, strict=True):
        assert_exact(name, theirs, ours)
    assert resized[0].shape == (after, columns)
    assert resized[1].shape == (out, after)
    base = weight, to_torch(weight)
    if after < before:
        base = both(spec_rank.fold_adapter, rank.fold_adapter, weight, A, B, after, 2.0)
        assert_close("folded", *base, tolerances.SAME_ALGORITHM)
    whole = spec_adapter.effective_weight(weight, A, B, 2.0)
    now = spec_adapter.effective_weight(base[0], *resized, 2.0), adapter.effective_weight(base[1], *found, 2.0)
    for effective in now:
        assert_close("effective weight", whole, effective, tolerances.SAME_ALGORITHM)


THIN = [(1, 8), (8, 1), (1, 1), (2, 8)]


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"sparsity": 1.0}, {"nm": (1, 1)}, {"nm": (0, 1)}], ids=str)
@pytest.mark.parametrize("shape", THIN, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps", "admm"])
def test_one_row_and_one_column(method: str, shape: tuple[int, int], pattern: dict[str, Any]) -> None:
    rng = np.random.default_rng(12)
    weight, inputs = rng.standard_normal(shape), rng.standard_normal((9, shape[1]))
    statistic = {"magnitude": None, "wanda": spec_wanda.input_norm(inputs)}.get(method, inputs.T @ inputs)
    kept = np.ones(shape, dtype=bool)
    (new, mask), (found, found_mask) = both(
        lambda *values: spec_prune.prune(method, *values, **pattern),
        lambda *values: prune.prune(method, *values, **pattern),
        *(weight, statistic, kept),
    )
    assert_exact("mask", mask, found_mask)
    assert_close("weight", new, found, tolerances.METHOD_FLOAT64.get(method, tolerances.SAME_ALGORITHM))
    per_row = method == "wanda"
    share = pattern.get("sparsity", 1 - pattern.get("nm", (0, 1))[0])
    pruned = shape[0] * int(share * shape[1]) if per_row else int(share * shape[0] * shape[1])
    assert (~mask).sum() == pruned


@pytest.mark.parametrize("r", [0, 1, 3])
@pytest.mark.parametrize("shape", THIN, ids=str)
def test_adapters_of_one_row_and_one_column(shape: tuple[int, int], r: int) -> None:
    rng = np.random.default_rng(13)
    out, columns = shape
    layer = rng.standard_normal(shape), rng.standard_normal((r, columns)), rng.standard_normal((out, r)), 2.0
    x, dy = rng.standard_normal((5, columns)), rng.standard_normal((5, out))
    assert_close("merge", *both(spec_adapter.merge, adapter.merge, *layer), tolerances.SAME_ALGORITHM)
    forward = both(spec_adapter.masked_lora, adapter.masked_lora, x, *layer)
    assert_close("masked_lora", *forward, tolerances.SAME_ALGORITHM)
    gradients = both(spec_adapter.masked_lora_grad, adapter.masked_lora_grad, x, *layer, dy)
    for expected, found in zip(*gradients, strict=True):
        assert_close("masked_lora_grad", expected, found, tolerances.SAME_ALGORITHM)


@pytest.mark.parametrize("n", range(5))
def test_groups_that_tie(n: int) -> None:
    score = np.repeat(np.array([[0.0, 1], [-1, 0], [np.inf, -np.inf]]), 4, axis=1)
    for mask in both(spec_nm.nm_mask, nm.nm_mask, score, n, 4):
        assert_exact("the lower columns go", np.tile(np.arange(4) >= 4 - n, (3, 2)), mask)


def test_many_ties_keep_their_order() -> None:
    """Short sorts are stable by luck; eighty blocks and groups of sixty-four are not."""
    importance = np.ones(80)
    rates = sparsity.allocate_sparsity(to_torch(importance), 0.5, 0.1)
    assert_close("rates", spec_sparsity.allocate_sparsity(importance, 0.5, 0.1), rates, tolerances.SAME_ALGORITHM)
    score = np.repeat([0.0, 1.0], 32)[None].repeat(3, 0)
    assert_exact("mask", spec_nm.nm_mask(score, 40, 64), nm.nm_mask(to_torch(score), 40, 64))


def test_dependence_stays_within_zero_and_one() -> None:
    """Rounding may lift a representation's dependence on itself above one; a matrix that is no Gram matrix, below zero."""
    for seed in range(200):
        gram = to_torch(spec_hsic.linear_gram(np.random.default_rng(seed).standard_normal((5, 3))))
        assert hsic.nhsic(gram, gram) <= 1.0
        assert hsic.nhsic(gram, -gram) == 0.0


def test_blocks_that_share_nothing_are_equally_important() -> None:
    expected = spec_rmi.importance(np.zeros(4))
    assert_close("importance", expected, rmi.importance(torch.zeros(4).double()), tolerances.SAME_ALGORITHM)
    assert expected.tolist() == pytest.approx([np.exp(-0.25)] * 4)


def test_an_infinite_beta_is_refused() -> None:
    """A block that shares nothing would have an importance of exp(−∞ · 0)."""
    for importance, convert in ((spec_rmi.importance, np.asarray), (rmi.importance, to_torch)):
        with pytest.raises(ValueError, match=r"^beta is inf; allowed: a finite number$"):
            importance(convert(np.array([0.0, 1.0])), float("inf"))


def test_rates_end_at_one() -> None:
    """Nothing can be pruned twice, however wide the spread; a floor of one is allowed, a higher one is not."""
    for allocate, convert in ((spec_sparsity.allocate_sparsity, np.asarray), (sparsity.allocate_sparsity, to_torch)):
        rates = allocate(convert(np.array([1.0, 2.0])), 0.9, 0.3)
        assert float(max(rates)) == 1.0
        full = allocate(convert(np.array([1.0, 2.0])), 0.9, 0.3, floor=convert(np.array([1.0, 0.0])))
        assert float(full[0]) == 1.0
        with pytest.raises(ValueError, match=r"floor holds 0\.0 to 1\.5; allowed: 0 to 1"):
            allocate(convert(np.array([1.0, 2.0])), 0.9, 0.3, floor=convert(np.array([1.5, 0.0])))


@pytest.mark.parametrize("kept", [3.4999999997, 3.5, 3.5000000003])
def test_a_half_is_a_half_after_rounding(kept: float) -> None:
    assert spec_nm.kept_per_group(kept / 8, 8) == nm.kept_per_group(kept / 8, 8) == 4


def test_a_huge_column_hides_no_other() -> None:
    """Of the comparison itself: an entry is held to its own terms, and to its own width."""
    reference, found = np.array([[1e4, 1.0], [1e4, 2.0]]), np.array([[1e4 + 1, 1.0], [1e4, 2.02]])
    assert_close("of the largest", reference, found, 1e-4)
    with pytest.raises(AssertionError, match=r"off by 2\.000e-02 at \(1, 1\)"):
        assert_close("of its own", reference, found, 1e-4, scale=np.abs(reference))
    assert_close("of its own", reference[:1], found[:1], 1e-4, scale=np.abs(reference[:1]))
    with pytest.raises(AssertionError, match="dtype float32, the spec's is float64"):
        assert_exact("width", reference, torch.tensor(reference).float())


def test_results_have_the_dtype_of_what_they_replace() -> None:
    """Adapters are float32 over half-precision weights, inputs may be half over wide weights, rates are always float64."""
    weight, A, B = torch.ones(4, 6).half(), torch.ones(2, 6), torch.ones(4, 2)
    x = torch.ones(3, 6)
    assert rank.fold_adapter(weight, A, B, 1, 1.0).dtype == torch.float16
    assert adapter.masked_lora(x.bfloat16(), weight.float(), A, B, 1.0).dtype == torch.bfloat16
    grads = adapter.masked_lora_grad(x.half(), weight, A, B, 1.0, torch.ones(3, 4).half())
    assert [grad.dtype for grad in grads] == [torch.float16, torch.float32, torch.float32]
    wide = adapter.masked_lora_grad(
        x.bfloat16(), weight.float(), A.bfloat16(), B.bfloat16(), 1.0, torch.ones(3, 4).bfloat16()
    )
    assert wide[0].dtype == torch.bfloat16
    given = {"weights": torch.ones(3), "floor": torch.zeros(3)}
    assert sparsity.allocate_sparsity(torch.ones(3), 0.5, 0.1, **given).dtype == torch.float64
    new, _ = sparsegpt.sparsegpt(weight, torch.eye(6).half(), 0.5)
    assert new.dtype == torch.float16
    assert wanda.input_norm(x.half()).dtype == torch.float32


@pytest.mark.parametrize("damping", [-0.1, float("inf"), "much"])
def test_damping_that_cannot_be(damping: Any) -> None:
    for prune_it, convert in ((spec_sparsegpt.sparsegpt, np.asarray), (sparsegpt.sparsegpt, to_torch)):
        with pytest.raises(
            (ValueError, TypeError), match=r"^damping is .*; allowed: (0.0 or more|a finite number|a number)$"
        ):
            prune_it(convert(np.ones((2, 3))), convert(np.eye(3)), 0.5, damping=damping)
