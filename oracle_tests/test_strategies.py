"""Tests of the strategies: every kind of input that they promise occurs, and none that its function would refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from oracle_tests import strategies as s
from oracle_tests.strategies import examples

COUNT = 100
Check = Callable[[Any], bool]


def drawn(strategy: st.SearchStrategy[Any]) -> list[Any]:
    """Draw examples, the same every time."""
    found: list[Any] = []

    @settings(
        max_examples=COUNT,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found  # fmt: skip


def check(strategy: st.SearchStrategy[Any], always: dict[str, Check], sometimes: dict[str, Check]) -> None:
    """Check every promise on many examples."""
    found = drawn(strategy)
    for what, holds in always.items():
        broken = [example for example in found if not holds(example)]
        assert not broken, f"not always {what}: {broken[0]}"
    for what, holds in sometimes.items():
        kinds = {bool(holds(example)) for example in found}
        assert kinds == {True, False}, f"{'nothing but' if kinds == {True} else 'never'} {what}"


def zero_rows(weight: np.ndarray) -> np.ndarray:
    return ~weight.any(axis=1)


def test_matrices() -> None:
    def loud(m: np.ndarray) -> bool:
        sizes = np.sort(np.abs(m).max(0))
        return len(sizes) > 1 and sizes[-1] > 100 * sizes[-2] > 0

    check(
        s.matrices(),
        {"two axes": lambda m: m.ndim == 2, "finite": lambda m: bool(np.isfinite(m).all())},
        {
            "tied": lambda m: 2 < len(np.unique(m[m != 0])) < m.astype(bool).sum() // 2,
            "all zero": lambda m: not m.any(),
            "one huge column": loud,
            "sparse": lambda m: 0.3 < (m == 0).mean() < 0.9 and m.size > 20,
            "tiny": lambda m: 0 < np.abs(m).max() < 1e-4,
            "one row": lambda m: len(m) == 1,
            "the largest": lambda m: 12 in m.shape,
            "normal": lambda m: m.size > 4 and len(np.unique(m)) == m.size and 0.1 < np.abs(m).max() < 10,
        },
    )
    lone = {
        "one zero row": lambda m: zero_rows(m).any() and (m == 0).sum() == 5,
        "one dead column": lambda m: zero_rows(m.T).any() and (m == 0).sum() == 3,
    }
    check(s.matrices(rows=3, columns=5), {"as asked": lambda m: m.shape == (3, 5)}, lone)
    check(s.matrices(rows=st.just(2)), {"as drawn": lambda m: len(m) == 2}, {"wide": lambda m: m.shape[1] == 12})


def test_masks_and_rates() -> None:
    check(
        s.kept_masks((4, 6)),
        {"a mask of that shape": lambda m: m.dtype == bool and m.shape == (4, 6)},
        {
            "nothing kept": lambda m: not m.any(),
            "all kept": lambda m: bool(m.all()),
            "some": lambda m: 0 < m.sum() < 24,
        },
    )
    check(
        s.SPARSITIES,
        {"a share": lambda x: 0 <= x <= 1},
        {f"{value}": lambda x, value=value: x == value for value in (0.0, 0.25, 0.5, 0.7, 1.0, 1 / 3)},
    )


def test_adapters() -> None:
    def ranks(case: dict[str, Any]) -> tuple[int, int]:
        return len(case["A"]), min(case["weight"].shape)

    fits = {
        "shapes that fit": lambda c: (
            c["B"].shape == (len(c["weight"]), len(c["A"])) and c["A"].shape[1] == c["weight"].shape[1]
        )
    }
    kinds = {
        "rank 0": lambda c: ranks(c)[0] == 0,
        "rank beyond min(in, out)": lambda c: ranks(c)[0] > ranks(c)[1],
        "no scale": lambda c: c["scale"] == 0,
        "a negative scale": lambda c: c["scale"] < 0,
    }
    check(s.adapters(), fits, kinds)
    leads = {f"{n} axes before": lambda c, n=n: c["x"].ndim == n + 1 for n in range(3)}
    check(s.adapter_inputs(), {**fits, "no gradient": lambda c: "grad_y" not in c}, leads)
    lead = {"the gradient is the output's": lambda c: c["grad_y"].shape == (*c["x"].shape[:-1], len(c["weight"]))}
    check(s.adapter_inputs(gradient=True), fits | lead, leads)
    check(s.folds(), fits | {"a rank to fold to": lambda c: 0 <= c["rank"] <= len(c["A"])}, {})
    check(
        s.resizes(),
        {"rows enough": lambda c: len(c["new_rows"]) >= c["rank"] - len(c["A"])},
        {
            "up": lambda c: c["rank"] > len(c["A"]),
            "down": lambda c: c["rank"] < len(c["A"]),
            "the same": lambda c: c["rank"] == len(c["A"]),
            "from 0": lambda c: len(c["A"]) == 0,
            "to 0": lambda c: c["rank"] == 0,
            "just as many rows": lambda c: len(c["new_rows"]) == c["rank"] - len(c["A"]),
        },
    )
    check(
        s.rebases(),
        {"one shape": lambda c: len({c[name].shape for name in ("weight", "merged", "updated", "mask")}) == 1},
        {"no update": lambda c: np.array_equal(c["merged"], c["updated"]), "all masked": lambda c: not c["mask"].any()},
    )


def test_hessians() -> None:
    check(
        s.hessians(6),
        {
            "symmetric": lambda H: np.allclose(H, H.T, rtol=1e-12, atol=0),
            "not negative": lambda H: np.linalg.eigvalsh(H)[0] >= -1e-9 * max(1, np.abs(H).max()),
        },
        {
            "singular": lambda H: np.linalg.matrix_rank(H) < 6,
            "regular": lambda H: np.linalg.matrix_rank(H) == 6,
            "a dead input": lambda H: bool((np.diag(H) == 0).any()),
            "a loud input": lambda H: np.diag(H).max() > 100 * np.sort(np.diag(H))[-2],
            "tied inputs": lambda H: any(np.array_equal(H[0], H[k]) for k in range(1, 6)),
            "small": lambda H: 0 < np.abs(H).max() < 1e-3,
        },
    )


def test_arguments_of_pruning() -> None:
    sizes = {
        "blocks smaller": lambda c: c["block_size"] < c["weight"].shape[1],
        "blocks as large": lambda c: c["block_size"] == c["weight"].shape[1],
        "blocks larger": lambda c: c["block_size"] > c["weight"].shape[1],
        "an earlier mask": lambda c: c["kept"] is not None,
        "already sparse": lambda c: (c["weight"] == 0).mean() > 0.1,
    }
    square = {"one Hessian": lambda c: c["hessian"].shape == (c["weight"].shape[1],) * 2}
    check(s.sparsegpt_cases(), square, sizes | {"none kept": lambda c: c["sparsity"] == 1})
    groups = {
        "whole groups": lambda c: not c["weight"].shape[1] % c["m"] and not c.get("block_size", 0) % c["m"],
        "some of each group": lambda c: 0 <= c["n"] <= c["m"],
    }
    ends = {"none": lambda c: c["n"] == 0, "all": lambda c: c["n"] == c["m"]}
    check(s.sparsegpt_cases(group=True), square | groups, sizes | ends)
    searched = square | {"no kept weight is 0": lambda c: bool(c["weight"][c["kept"]].all())}
    check(s.searched_cases(), searched, {"an earlier mask": lambda c: not c["kept"].all()})
    check(s.searched_cases(group=True), searched | groups, ends)
    on_support = {"on its support": lambda c: not c["start"][~c["support"]].any()}
    check(s.starts_of_refine(), square | on_support, {"nothing to do": lambda c: c["steps"] == 0})
    check(
        s.supports(),
        {"one shape": lambda c: c["values"].shape == c["kept"].shape},
        {"groups": lambda c: isinstance(c["amount"], tuple), "a share": lambda c: isinstance(c["amount"], float)},
    )
    check(s.gradients(), {"sequences": lambda g: g.ndim == 3}, {"one": lambda g: len(g) == 1})
    check(
        s.weights_and_gradient_sizes(),
        {"sizes": lambda c: c["gradient_size"].min() >= 0 and c["gradient_size"].shape == c["weight"].shape},
        {
            "all equal": lambda c: np.ptp(c["gradient_size"]) == 0,
            "ties": lambda c: len(np.unique(c["gradient_size"])) <= 3,
        },
    )
    check(
        s.prune_cases(),
        {
            "its statistic": lambda c: (c["statistic"] is None) == (c["method"] == "magnitude"),
            "pruned where it was": lambda c: not c["weight"][~c["kept"]].any(),
            "one pattern": lambda c: ("sparsity" in c) != ("nm" in c),
        },
        {
            **{
                method: lambda c, method=method: c["method"] == method
                for method in ("magnitude", "wanda", "sparsegpt", "alps", "admm", "pruner_zero")
            },
            **{f"N:{m}": lambda c, m=m: c.get("nm", (0, 0))[1] == m for m in (2, 4, 8)},
        },
    )
    check(
        s.sparse_groups(),
        {"no more zeros than weights": lambda c: bool((c["zeros"] <= c["sizes"]).all())},
        {
            "one size": lambda c: len(c["sizes"]) > 1 and len(set(c["sizes"])) == 1,
            "sizes": lambda c: len(set(c["sizes"])) > 1,
            "none zero": lambda c: not c["zeros"].any(),
            "a full one": lambda c: bool((c["zeros"] == c["sizes"]).any()),
        },
    )


def test_gram_matrices() -> None:
    check(
        s.grams(),
        {"square": lambda G: G.ndim == 2 and G.shape[0] == G.shape[1], "symmetric": lambda G: np.allclose(G, G.T)},
        {
            "constant": lambda G: np.ptp(G) == 0,
            "one feature": lambda G: np.linalg.matrix_rank(G) == 1 and np.ptp(G) > 0,
            "large": lambda G: np.abs(G).max() > 1e6,
            "plain": lambda G: np.linalg.matrix_rank(G) > 2 and np.abs(G).max() < 1e4,
        },
    )
    check(s.grams(4), {"four of the same samples": lambda G: len(G) == 4 and G.shape[1] == G.shape[2]}, {})
    pairs = {"the same samples": lambda c: c["gram_x"].shape == c["gram_y"].shape}
    check(s.gram_pairs(), pairs, {"constant": lambda c: np.ptp(c["gram_x"]) == 0})


def test_allocations_have_a_solution() -> None:
    def mean_floor(c: dict[str, Any]) -> float:
        return 0.0 if c["floor"] is None else float(np.average(c["floor"], weights=c["weights"]))

    check(
        s.importances(),
        {"positive": lambda v: bool((v >= 0).all()), "one axis": lambda v: v.ndim == 1},
        {
            "one block": lambda v: len(v) == 1,
            "eighty blocks": lambda v: len(v) == 80,
            "ties": lambda v: 1 < len(set(v)) < len(v),
            "equal": lambda v: len(v) > 1 and len(set(v)) == 1,
            "tiny": lambda v: v.min() < 1e-20,
        },
    )
    check(s.importances(least=4), {"at least so many": lambda v: len(v) >= 4}, {})
    check(
        s.allocations(),
        {"a floor below the target": lambda c: mean_floor(c) <= c["target"] + 1e-12},
        {
            "weights": lambda c: c["weights"] is not None,
            "no spread": lambda c: c["spread"] == 0,
            "a wide spread": lambda c: c["spread"] == 0.3,
            "an uneven floor": lambda c: c["floor"] is not None and np.ptp(c["floor"]) > 0,
            "a floor that leaves nothing": lambda c: mean_floor(c) == pytest.approx(c["target"]) and c["target"] > 0,
        },
    )

    def room(c: dict[str, Any]) -> int:
        L = len(c["importance"])
        most = min(c["m"], c["kept_total"] // L + c["spread"])
        return int(np.full(L, most).sum() if c["ceiling"] is None else np.minimum(c["ceiling"], most).sum())

    check(
        s.kept_allocations(),
        {
            "room for all": lambda c: room(c) >= c["kept_total"],
            "no spread only of equal shares": lambda c: c["spread"] > 0 or c["kept_total"] % len(c["importance"]) == 0,
        },
        {
            "a ceiling": lambda c: c["ceiling"] is not None,
            "no spread": lambda c: c["spread"] == 0,
            "not equal shares": lambda c: c["kept_total"] % len(c["importance"]) > 0,
            "nothing kept": lambda c: c["kept_total"] == 0,
            "all kept": lambda c: c["kept_total"] == c["m"] * len(c["importance"]),
            "no room to spare": lambda c: room(c) == c["kept_total"] > 0,
        },
    )
    check(
        s.rank_cases(),
        {"a mean between the bounds": lambda c: 0 <= c["min_rank"] <= c["mean_rank"] <= c["max_rank"]},
        {
            "all errors zero": lambda c: not c["errors"].any(),
            "errors wildly uneven": lambda c: c["errors"].max() > 1e12 * c["errors"].min() > 0,
            "a mean that is no number of ranks": lambda c: c["mean_rank"] != int(c["mean_rank"]),
            "bounds that meet": lambda c: c["min_rank"] == c["max_rank"],
            "no lower bound": lambda c: c["min_rank"] == 0,
        },
    )


def test_outputs() -> None:
    check(
        s.pairs_of_outputs(),
        {"one shape": lambda c: c["dense"].shape == c["sparse"].shape},
        {
            "equal": lambda c: np.array_equal(c["dense"], c["sparse"]),
            "near": lambda c: 0 < np.abs(c["dense"] - c["sparse"]).max() < 0.5,
            "far": lambda c: np.abs(c["dense"] - c["sparse"]).max() > 5,
        },
    )
    check(
        s.outputs_of_sequences(),
        {"three axes": lambda x: x.ndim == 3},
        {"a silent channel": lambda x: bool((~x.any((0, 1))).any()), "none": lambda x: bool(x.any((0, 1)).all())},
    )


def test_weights_to_pack() -> None:
    check(
        s.weights_to_pack(),
        {"a dtype that packs": lambda w: w.dtype in (np.float64, np.uint16, np.uint32)},
        {
            **{str(kind): lambda w, kind=kind: w.dtype == kind for kind in (np.float64, np.uint16, np.uint32)},
            "negative zeros": lambda w: w.dtype == np.float64 and bool(np.signbit(w[w == 0]).any()),
            "all zero": lambda w: not w.any(),
            "none zero": lambda w: bool(w.all()),
            "a zero row among others": lambda w: bool(zero_rows(w).any()) and bool(w.any()),
            "three words a row": lambda w: w.shape[1] > 64,
            "one word a row": lambda w: w.shape[1] <= 32,
        },
    )

    def rows_of(c: dict[str, Any]) -> np.ndarray:
        return np.unpackbits(c["bitmap"], axis=1).sum(1)

    check(
        s.packed_weights(),
        {
            "as many values as bits": lambda c: rows_of(c).sum() == len(c["values"]),
            "rows where the offsets say": lambda c: np.array_equal(np.diff(c["offsets"]), rows_of(c)),
            "whole words": lambda c: c["bitmap"].shape[1] == 4 * -(-c["columns"] // 32),
            "no value of only zero bits": lambda c: all(any(value.tobytes()) for value in c["values"]),
        },
        {"a negative zero kept": lambda c: c["values"].dtype == np.float64 and bool((c["values"] == 0).any())},
    )
    shapes = {
        "two panels down": lambda w: len(w) > 16,
        "two across": lambda w: w.shape[1] > 128,
        "one": lambda w: w.size < 99,
    }
    check(s.weights_to_tile(), {}, shapes)
    check(
        s.tiled_weights(),
        {
            "as many values as bits": lambda c: np.unpackbits(c["bitmaps"]).sum() == len(c["values"]),
            "no value zero": lambda c: bool(c["values"].all()),
            "a panel for every 16 x 128": lambda c: (
                c["bitmaps"].shape == (-(-c["rows"] // 16) * -(-c["columns"] // 128), 256)
            ),
        },
        {"four panels": lambda c: len(c["bitmaps"]) == 4},
    )


def test_structures() -> None:
    check(
        s.structured_columns(),
        {"a divisor of the columns": lambda c: c[0].shape[1] % c[1] == 0},
        {"one structure": lambda c: c[1] == 1, "one column each": lambda c: c[0].shape[1] == c[1]},
    )
    check(
        s.structured_lines(),
        {"a divisor of the lines": lambda c: c["values"].shape[c["axis"]] % len(c["kept"]) == 0},
        {
            "columns": lambda c: c["axis"] == 1,
            "none kept": lambda c: not c["kept"].any(),
            "all kept": lambda c: bool(c["kept"].all()),
        },
    )
    check(
        s.structures_to_remove(),
        {"no more than there are": lambda c: 0 <= c["removed"] <= len(c["score"])},
        {
            "tied": lambda c: len(set(c["score"])) < len(c["score"]),
            "more gone than asked": lambda c: int((~c["kept"]).sum()) > c["removed"],
        },
    )
    check(
        s.structured_blocks(),
        {"a multiple up to the channels": lambda c: 1 <= c["multiple"] <= c["channels"]},
        {
            "one head": lambda c: c["heads"] == 1,
            "a multiple that does not divide": lambda c: c["channels"] % c["multiple"] != 0,
            "attention larger than the MLP": lambda c: (
                c["heads"] * c["head_weights"] > c["channels"] * c["channel_weights"]
            ),
        },
    )


def test_examples_are_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, expected in ((40, [1, 8, 40, 100]), (400, [10, 80, 400, 1000]), (10, [1, 2, 10, 25])):
        monkeypatch.setattr(s, "settings", SimpleNamespace(default=SimpleNamespace(max_examples=most)))
        assert [examples(count) for count in (1, 8, 40, 100)] == expected
