"""The rate rules beside Eq. 5, against their formulas written out, sorting, and every integer solution there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracle_tests import strategies
from oracle_tests.llama_pair import random_llama
from reference import atp, lamp, llama, losa, rates, sparsity
from reference.owl import outlier_share, owl_rates

SIZES = llama.Sizes(vocabulary=17, hidden=8, intermediate=16, heads=2, kv_heads=2)
IDS = np.random.default_rng(1).integers(17, size=(9, 6))


def model(blocks: int = 4, seed: int = 0) -> llama.Llama:
    return random_llama(SIZES, blocks, tied=False, seed=seed, widths=(16, 8, 12))


def kept_of(model: llama.Llama) -> np.ndarray:
    """Share of its projections' weights that each block keeps."""
    return np.array([np.mean([*itertools.chain(*(w.ravel() != 0 for w in b.weights.values()))]) for b in model.blocks])


@given(strategies.wanted_rates())
@example({"wanted": np.array([0.5, 0.5]), "target": 1.0, "weights": np.ones(2), "floor": np.zeros(2)})
def test_the_nearest_rates_are_the_optimum(case: dict[str, Any]) -> None:
    """The conditions of Karush, Kuhn and Tucker: one shift for all within their bounds, none that a bound holds back."""
    found, wanted, floor = sparsity.nearest_rates(**case), case["wanted"], case["floor"]
    assert abs(np.average(found, weights=case["weights"]) - case["target"]) <= 1e-9
    assert (found >= floor).all()
    assert (found <= 1).all()
    shift = found - wanted
    free = (found > floor + 1e-12) & (found < 1 - 1e-12)
    low = shift[found <= floor + 1e-12].min(initial=np.inf)
    high = shift[found >= 1 - 1e-12].max(initial=-np.inf)
    if free.any():
        assert np.ptp(shift[free]) <= 1e-9
        assert low >= shift[free].max() - 1e-9
        assert high <= shift[free].min() + 1e-9
    else:
        assert high <= low + 1e-9


@given(strategies.dense_ends())
def test_the_middle_makes_up_for_ends_that_stay_as_they_are(case: dict[str, Any]) -> None:
    w, rates = case["weights"], case["floor"].copy()
    rates[case["first"] : len(w) - case["last"]] = sparsity.middle_sparsity(**case)
    assert np.average(rates, weights=w) == pytest.approx(case["target"], abs=1e-9)


def test_without_ends_the_middle_has_the_target_itself() -> None:
    """To the bit, so that results do not depend on this option."""
    for target in (0.1, 0.3, 0.7):
        assert sparsity.middle_sparsity(target, np.array([3.0, 7.0]), np.array([0.0, 0.1]), 0, 0) == target


@pytest.mark.parametrize(
    ("target", "floor", "allowed"),
    [(0.6, 0.0, r"0 to 0\.5"), (0.2, 0.8, r"0\.4 to 0\.9")],
    ids=["dense", "sparse ends"],
)
def test_what_the_middle_does_not_have_cannot_go(target: float, floor: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^target is {target}; allowed: {allowed} with these ends$"):
        sparsity.middle_sparsity(target, np.ones(4), np.full(4, floor), 1, 1)


@st.composite
def cases_with_moves(draw: st.DrawFn) -> dict[str, Any]:
    L, m = draw(st.integers(1, 5)), draw(st.sampled_from([2, 4, 5]))
    ceilings = st.lists(st.integers(0, m), min_size=L, max_size=L).map(np.array)
    return {
        "importance": np.array(draw(st.lists(st.integers(1, 4), min_size=L, max_size=L)), dtype=float),
        "kept_total": draw(st.integers(0, L * m)),
        "m": m,
        "spread": draw(st.integers(1, 2)),
        "ceiling": draw(st.none() | ceilings),
        "moves": draw(st.integers(0, 3)),
    }


@settings(max_examples=strategies.examples(400))
@given(cases_with_moves())
# The ceiling of the first of two blocks forces the only move that there may be.
@example(
    {"importance": np.array([3.0, 5]), "kept_total": 6, "m": 8, "spread": 2, "ceiling": np.array([2, 5]), "moves": 1}
)
@example({"importance": np.array([4.0, 1, 3, 2]), "kept_total": 8, "m": 4, "spread": 1, "ceiling": None, "moves": 1})
# Of the two that keep one at most, one move is forced by each.
@example(
    {
        "importance": np.array([1.0, 2, 3]),
        "kept_total": 7,
        "m": 4,
        "spread": 2,
        "ceiling": np.array([1, 4, 4]),
        "moves": 2,
    }
)
def test_few_moves_are_the_best_of_all_integer_solutions(case: dict[str, Any]) -> None:
    """No more zeros above the even share than allowed or forced; the most importance kept; of equals the fewest moves."""
    L, m, total, spread = len(case["importance"]), case["m"], case["kept_total"], case["spread"]
    tops = [m] * L if case["ceiling"] is None else case["ceiling"].tolist()
    choices = [
        [n for n in range(top + 1) if L * n <= total + L * spread and (L * n >= total - L * spread or n == top)]
        for top in tops
    ]
    solutions = [kept for kept in itertools.product(*choices) if sum(kept) == total]
    if not solutions:
        with pytest.raises(ValueError, match="kept_total"):
            sparsity.allocate_kept(**case)
        return

    def above(kept: Any) -> int:
        return sum(max(0, total // L - n) for n in kept)

    allowed = max(case["moves"], min(above(kept) for kept in solutions))
    best = min((-(case["importance"] @ kept), above(kept)) for kept in solutions if above(kept) <= allowed)
    found = sparsity.allocate_kept(**case)
    assert tuple(found) in solutions
    assert (-(case["importance"] @ found), above(found)) == best


def test_equal_importances_keep_equally_many() -> None:
    """Without `moves` half of these blocks keep one of four, and the others three."""
    almost = np.full(30, 0.9) + 1e-6 * np.arange(30)
    assert sorted(set(sparsity.allocate_kept(almost, 60, 4))) == [1, 3]
    assert list(sparsity.allocate_kept(np.ones(30), 60, 4, moves=8)) == [2] * 30
    few = sparsity.allocate_kept(almost, 60, 4, moves=sparsity.even_moves(0.01, 30, 4))
    assert list(few) == [1, *[2] * 28, 3]


@pytest.mark.parametrize(("spread", "blocks", "m", "moves"), [(0.01, 25, 4, 0), (0.03, 25, 4, 2), (0.5, 3, 2, 2)])
def test_halves_of_a_move(spread: float, blocks: int, m: int, moves: int) -> None:
    """0.5 and 1.5 go to the even number."""
    assert sparsity.even_moves(spread, blocks, m) == moves


def test_outliers_one_by_one() -> None:
    generator = np.random.default_rng(3)
    scores = [np.abs(generator.standard_normal(shape)) ** 4 for shape in ((5, 8), (3, 4))]
    every = [value for score in scores for row in score for value in row]
    mean = sum(every) / len(every)
    expected = 100 * sum(value > 5 * mean for value in every) / len(every)
    assert expected > 0
    assert outlier_share(scores) == pytest.approx(expected, rel=1e-12)
    assert outlier_share(scores, 0.5) > expected


def test_owl_s_share_to_keep() -> None:
    """keep = 2λ (D − min) / (max − min), minus its mean, plus 1 − S."""
    D = np.array([1.0, 4.0, 2.0, 9.0])
    keep = 2 * 0.08 * (D - D.min()) / (D.max() - D.min())
    keep = keep - keep.mean() + (1 - 0.7)
    np.testing.assert_allclose(owl_rates(D, 0.7, np.ones(4), np.zeros(4)), 1 - keep)
    weights = np.array([1.0, 2, 3, 4])
    found = owl_rates(D, 0.7, weights, np.zeros(4))
    assert np.average(found, weights=weights) == pytest.approx(0.7, abs=1e-12)
    np.testing.assert_allclose(np.diff(found), np.diff(1 - keep))
    np.testing.assert_allclose(owl_rates(np.full(3, 2.0), 0.7, np.ones(3), np.zeros(3)), 0.7)


@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_progressions(target: float, blocks: int) -> None:
    steps = atp.candidate_steps(target, blocks)
    assert len(steps) == 9
    for step in steps:
        found = atp.progression(target, blocks, step)
        assert found.mean() == pytest.approx(target, abs=1e-12)
        np.testing.assert_allclose(np.diff(found), step, atol=1e-12)
    assert blocks == 1 or min(found.min(), 1 - found.max()) == pytest.approx(0, abs=1e-12), "the largest step"
    with pytest.raises(ValueError, match="step"):
        atp.progression(target, blocks, steps[-1] + 0.01)


def test_the_best_progression_by_its_losses() -> None:
    """Each candidate pruned by hand: the lowest scores of each row; the loss of sequences 0, 4 and 8."""
    dense = model()
    losses = []
    traces = llama.forward(dense, IDS).blocks
    for k in range(9):
        step = k / 8 * 2 * 0.4 / 3
        weights = []
        for index, block in enumerate(dense.blocks):
            pruned = {}
            for name, W in block.weights.items():
                x = traces[index].inputs[llama.INPUT_OF[name]].reshape(-1, W.shape[1])
                score = np.abs(W) * np.sqrt((x**2).sum(0))
                count = int((0.6 - 1.5 * step + step * index) * W.shape[1] + 1e-9)
                pruned[name] = W.copy()
                for row in range(len(W)):
                    pruned[name][row, np.argsort(score[row], kind="stable")[:count]] = 0
            weights.append(pruned)
        logits = llama.forward(dense.with_weights(weights), IDS[[0, 4, 8]]).logits
        losses.append(
            sum(
                np.log(np.exp(logits[i, p]).sum()) - logits[i, p, IDS[4 * i, p + 1]]
                for i in range(3)
                for p in range(IDS.shape[1] - 1)
            )
        )
    best = int(np.argmin(losses))
    expected = 0.6 + best / 8 * 2 * 0.4 / 3 * (np.arange(4) - 1.5)
    np.testing.assert_allclose(rates.best_progression(dense, IDS, 0.6), 1 - expected, atol=1e-12)


def test_of_equal_losses_the_smaller_step() -> None:
    assert list(rates.best_progression(model(), IDS, 0.0)) == [1, 1, 1, 1]


@pytest.mark.parametrize("target", [0.0, 0.31, 0.5, 0.8, 1.0])
def test_lamp_by_sorting_every_score_of_the_model(target: float) -> None:
    """The lowest k scores of all go, and no level holds two scores of so small a model at its threshold."""
    dense = model(3, seed=5)
    scores, places = [], []
    for index, block in enumerate(dense.blocks):
        for W in block.weights.values():
            squares = np.sort(W.ravel() ** 2)
            scores += [square / squares[position:].sum() for position, square in enumerate(squares)]
            places += [index] * W.size
    order = np.argsort(scores)[: int(target * len(scores) + 1e-9)]
    zeros = np.bincount(np.array(places)[order], minlength=3)
    sizes = np.bincount(places)
    found = rates.kept_by_lamp(dense, IDS, target)
    assert np.abs((1 - found) * sizes - zeros).sum() <= 2
    assert (1 - found) @ sizes <= target * sizes.sum() + 1e-9


def test_lamp_counts_weights_that_are_zero_already() -> None:
    sparse, _ = losa.run(model(3), IDS, [], losa.Settings("magnitude", 0.5, steps=1, finetune=False))
    found = rates.kept_by_lamp(sparse, IDS, 0.5)
    np.testing.assert_allclose(found, kept_of(sparse), atol=0.02)
    levels = lamp.lamp_levels(np.zeros((3, 4)))
    assert (levels[0], levels.sum()) == (12, 12)


def test_tiny_scores_share_the_lowest_level() -> None:
    levels = lamp.lamp_levels(np.array([[1.0, 1e-12, 1e-20]]))
    assert (levels[0], levels[1], levels[-1], levels.sum()) == (0, 2, 0, 3)
    assert lamp.LEVELS == 65537


def test_first_order_importance_is_a_sum_over_a_block() -> None:
    dense = model()
    gradients = llama.weight_gradients(dense, IDS)
    expected = [
        sum(abs(w * g) for name, W in block.weights.items() for w, g in zip(W.flat, G[name].flat, strict=True))
        for block, G in zip(dense.blocks, gradients, strict=True)
    ]
    np.testing.assert_allclose(rates.loss_by_first_order(dense, IDS), expected)
    sizes = np.array([100.0, 300.0, 200.0])
    # Per weight 0.03, 0.01 and 0.02: the second block is pruned most, although its sum is not the smallest.
    found = rates.by_total(np.array([3.0, 3.5, 4.0]), 0.5, sizes, np.zeros(3))
    assert found[1] == found.max()


@pytest.mark.parametrize("rule", ["owl", "atp", "lamp", "gradient"])
@pytest.mark.parametrize("pattern", ["unstructured", "mixed-2:8"])
def test_rates_only_grow_and_meet_every_target(rule: str, pattern: str) -> None:
    dense = random_llama(SIZES, 8, tied=False, seed=2, widths=(16, 8) if pattern != "unstructured" else (16, 8, 12))
    settings = losa.Settings(layer_sparsity=rule, sparsity_type=pattern, steps=4, finetune=False)
    _, records = losa.run(dense, IDS, [], settings)
    sizes = [sum(w.size for w in block.weights.values()) for block in dense.blocks]
    before = np.zeros(8)
    for record in records:
        found = np.array(record.sparsity)
        assert (found >= before - 1e-12).all()
        if pattern == "unstructured":
            assert np.average(found, weights=sizes) == pytest.approx(record.target, abs=1e-9)
        before = found
    assert len(set(found)) > 1
    if pattern != "unstructured":
        assert found.mean() == pytest.approx(0.75)
        # δ = 0.04 at 75 %: 0.04 · 8 · 8 / 2 = 1.28.
        assert (found > 0.75).sum() == 1


def test_a_rule_is_asked_for_the_current_model_and_target() -> None:
    seen = []

    def measure(current: llama.Llama, ids: np.ndarray, target: float) -> np.ndarray:
        seen.append((1 - kept_of(current).mean(), target))
        return np.array([3.0, 2.0, 1.0])

    rule = rates.RateRule("seen", rates.by_importance, measure)
    rates.RULES["seen"] = rule
    try:
        settings = losa.Settings("magnitude", 0.6, steps=2, layer_sparsity="seen", finetune=False)
        losa.run(replace(model(3)), IDS, [], settings)
    finally:
        del rates.RULES["seen"]
    assert [target for _, target in seen] == pytest.approx([0.525, 0.6])
    assert seen[0][0] == 0
    assert seen[1][0] == pytest.approx(0.525, abs=0.02)


@pytest.mark.parametrize(("below", "level"), [(0.0, 62465), (2e-10, 62465), (1e-8, 62464)])
def test_a_score_just_below_a_level_belongs_to_it(below: float, level: int) -> None:
    """1/4 = ½ · 2⁻¹ begins the level 1 + 61 · 1024. The smaller of two weights scores it, or a little less."""
    weight = np.array([[1.0, math.sqrt(4 / (1 - below) - 1)]])
    assert np.flatnonzero(lamp.lamp_levels(weight)).tolist() == [level, 64513]
