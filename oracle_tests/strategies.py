"""Hypothesis strategies: small arrays that contain everything that has ever gone wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.lamp import lamp_levels
from reference.masks.prune import METHODS
from reference.masks.sparsegpt import hessian


def examples(count: int) -> int:
    """Scale a test's number of examples, `count` in the default profile of 40, to the profile in use (conftest.py)."""
    return max(1, count * settings.default.max_examples // 40)


SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def _rng(draw: st.DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(SEEDS))


@st.composite
def matrices(draw: st.DrawFn, rows: Any = SIZES, columns: Any = SIZES) -> np.ndarray:
    """(rows, columns): normal, tied (small integers), sparse, with zero rows, dead or huge columns, or all zero."""
    shape = (
        draw(rows) if not isinstance(rows, int) else rows,
        draw(columns) if not isinstance(columns, int) else columns,
    )
    rng = _rng(draw)
    kind = draw(
        st.sampled_from(["normal", "ties", "sparse", "zero row", "dead column", "huge column", "zeros", "tiny"])
    )
    matrix = rng.standard_normal(shape)
    if kind == "ties":
        matrix = rng.integers(-2, 3, shape).astype(float)
    elif kind == "sparse":
        matrix *= rng.random(shape) < 0.4
    elif kind == "zero row":
        matrix[rng.integers(shape[0])] = 0
    elif kind == "dead column":
        matrix[:, rng.integers(shape[1])] = 0
    elif kind == "huge column":
        matrix[:, rng.integers(shape[1])] *= 1e4
    elif kind == "zeros":
        matrix = np.zeros(shape)
    elif kind == "tiny":
        matrix *= 1e-6
    return matrix


@st.composite
def kept_masks(draw: st.DrawFn, shape: tuple[int, int]) -> np.ndarray:
    """A mask as earlier steps leave it."""
    return _rng(draw).random(shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))


SPARSITIES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0, 1 / 3]), st.floats(0, 1))
SCALES = st.sampled_from([2.0, 0.5, -1.0, 0.0])
BITS = st.integers(2, 8)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    """weight, A, B, scale; rank from 0 to beyond min(in, out)."""
    weight = draw(matrices())
    out, inputs = weight.shape
    rng, rank = _rng(draw), draw(st.integers(0, 14))
    return {
        "weight": weight,
        "A": rng.standard_normal((rank, inputs)),
        "B": rng.standard_normal((out, rank)),
        "scale": draw(SCALES),
    }


@st.composite
def adapter_inputs(draw: st.DrawFn, gradient: bool = False) -> dict[str, Any]:
    """x (and grad_y) for an adapter: a matrix, a batch of them, or one vector."""
    case = draw(adapters())
    rng, lead = _rng(draw), draw(st.sampled_from([(), (1,), (5,), (2, 3)]))
    out, inputs = case["weight"].shape
    extra = {"grad_y": rng.standard_normal((*lead, out))} if gradient else {}
    return {"x": rng.standard_normal((*lead, inputs)), **case, **extra}


@st.composite
def gated_adapters(draw: st.DrawFn) -> dict[str, Any]:
    """x, A, B, gate, scale; some gates are 0, as after the threshold."""
    case = draw(adapter_inputs())
    del case["weight"]
    gate = _rng(draw).standard_normal(len(case["A"]))
    return {**case, "gate": gate * (np.abs(gate) > 0.5)}


@st.composite
def hessians(draw: st.DrawFn, size: int) -> np.ndarray:
    """2/N Σ x xᵀ from few or many tokens, with dead or loud inputs: singular about half of the time."""
    rng, tokens = _rng(draw), draw(st.integers(1, 3 * size))
    X = rng.standard_normal((tokens, size))
    kind = draw(st.sampled_from(["plain", "dead", "loud", "tied", "scaled"]))
    column = rng.integers(size)
    if kind == "dead" and size > 1:
        X[:, column] = 0
    elif kind == "loud":
        X[:, column] *= 30
    elif kind == "tied":
        X[:, column] = X[:, 0]
    elif kind == "scaled":
        X *= 1e-3
    return 2 / max(1, tokens // 2) * X.T @ X


@st.composite
def sparsegpt_cases(draw: st.DrawFn, group: bool = False) -> dict[str, Any]:
    """Arguments of sparsegpt or sparsegpt_nm: blocks smaller than, equal to and larger than the matrix, earlier masks."""
    m = draw(st.sampled_from([2, 4])) if group else 1
    columns = m * draw(st.integers(1, 12 // m))
    rng = _rng(draw)
    weight = rng.standard_normal((draw(SIZES), columns))
    weight *= rng.random(weight.shape) < draw(st.sampled_from([1.0, 0.6]))
    case: dict[str, Any] = {"weight": weight, "hessian": draw(hessians(columns))}
    case |= {"n": draw(st.integers(0, m)), "m": m} if group else {"sparsity": draw(SPARSITIES)}
    case["block_size"] = m * draw(st.integers(1, 8))
    case["kept"] = draw(st.one_of(st.none(), kept_masks(weight.shape)))
    if not group:
        divisors = [size for size in range(case["block_size"], 0, -1) if case["block_size"] % size == 0]
        case |= {"bits": draw(st.none() | BITS), "group": draw(st.sampled_from(divisors))}
    return case


@st.composite
def rounding_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of sparsegpt_codes."""
    case = draw(sparsegpt_cases())
    return {name: case[name] for name in ("weight", "hessian", "kept")} | {"bits": draw(BITS)}


@st.composite
def harm_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of rounding_harm."""
    case = draw(sparsegpt_cases())
    gradients = _rng(draw).standard_normal(len(case["weight"])) ** 2 * draw(st.sampled_from([1.0, 0.0, 1e-6]))
    choices = draw(st.lists(BITS, min_size=1, max_size=3))
    return {name: case[name] for name in ("weight", "hessian")} | {"output_weights": gradients, "choices": choices}


@st.composite
def searched_cases(draw: st.DrawFn, group: bool = False) -> dict[str, Any]:
    """Arguments of alps and admm, or of their N:M forms.

    No kept weight is 0, as in a run: two of them would tie up to what rounding leaves, and each may be chosen.
    """
    drawn = draw(sparsegpt_cases(group))
    case = {name: value for name, value in drawn.items() if name not in ("block_size", "bits", "group")}
    kept = np.ones(case["weight"].shape, dtype=bool) if case["kept"] is None else case["kept"]
    return case | {"kept": kept & (case["weight"] != 0)}


@st.composite
def starts_of_refine(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of refine: a start on its support, from none to all entries, and a damped Hessian."""
    columns, rng = draw(SIZES), _rng(draw)
    weight = rng.standard_normal((draw(SIZES), columns))
    H, support = draw(hessians(columns)), draw(kept_masks(weight.shape))
    start = weight * support * draw(st.sampled_from([0.0, 1.0, 0.5]))
    damped = H + 0.1 * max(np.diag(H).mean(), 1e-6) * np.eye(columns)
    return {"weight": weight, "start": start, "hessian": damped, "support": support, "steps": draw(st.integers(0, 4))}


@st.composite
def supports(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of keep_largest: a sparsity or N:M, and earlier masks."""
    m = draw(st.sampled_from([2, 4, 8]))
    values = draw(matrices(columns=8))
    amount = draw(st.one_of(SPARSITIES, st.integers(0, m).map(lambda n: (n, m))))
    return {"values": values, "kept": draw(kept_masks(values.shape)), "amount": amount}


@st.composite
def sparse_groups(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of rest_sparsity: groups of one size or several, none of them full, some, or all."""
    count = draw(st.integers(1, 8))
    sizes = (
        [draw(st.integers(1, 30))] * count if draw(st.booleans()) else draw(st.lists(st.integers(1, 30), min_size=1))
    )
    most = draw(st.sampled_from([0.0, 0.5, 1.0]))
    zeros = [draw(st.integers(0, round(most * size))) for size in sizes]
    return {"zeros": np.array(zeros, float), "sizes": np.array(sizes, float), "sparsity": draw(SPARSITIES)}


@st.composite
def prune_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of prune, every method and pattern."""
    method = draw(st.sampled_from(list(METHODS)))
    m = draw(st.sampled_from([2, 4, 8]))
    weight = _rng(draw).standard_normal((draw(SIZES), 8))
    kept = draw(kept_masks(weight.shape))
    weight *= kept
    statistic = None
    if method == "wanda":
        statistic = np.abs(draw(matrices(rows=1, columns=8)))[0]
    elif METHODS[method].statistic is hessian:
        statistic = draw(hessians(8))
    elif METHODS[method].gradient_statistic is not None:
        statistic = np.abs(draw(matrices(*weight.shape)))
    elif (made := METHODS[method].statistic) is not None:
        statistic = made(draw(matrices(columns=8)), 1)
    target = draw(st.one_of(st.none(), SPARSITIES))
    pattern = {"sparsity": target} if target is not None else {"nm": (draw(st.integers(0, m)), m)}
    return {"method": method, "weight": weight, "statistic": statistic, "kept": kept, **pattern}


@st.composite
def gradients(draw: st.DrawFn) -> np.ndarray:
    """(n, out, in), the gradients of n sequences."""
    first = draw(matrices())
    return np.stack([first, *(draw(matrices(*first.shape)) for _ in range(draw(st.integers(0, 2))))])


@st.composite
def weights_and_gradient_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of pruner_zero_score: sizes that differ, tie, or are all equal."""
    weight = draw(matrices())
    return {"weight": weight, "gradient_size": np.abs(draw(matrices(*weight.shape)))}


@st.composite
def grams(draw: st.DrawFn, count: int | None = None) -> np.ndarray:
    """(L, n, n) Gram matrices, or (n, n) without count; some constant, some of one feature."""
    n, rng = draw(st.integers(2, 8)), _rng(draw)
    result = []
    for _ in range(count or 1):
        kind = draw(st.sampled_from(["plain", "constant", "one feature", "large"]))
        X = rng.standard_normal((n, 1 if kind == "one feature" else draw(SIZES)))
        if kind == "constant":
            X[:] = X[0]
        elif kind == "large":
            X *= 1e4
        result.append(X @ X.T)
    return np.stack(result) if count else result[0]


@st.composite
def gram_pairs(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Two Gram matrices of the same samples."""
    pair = draw(grams(2))
    return {"gram_x": pair[0], "gram_y": pair[1]}


@st.composite
def importances(draw: st.DrawFn, least: int = 1) -> np.ndarray:
    """(L,) from 1 to 80 blocks, tied about half of the time, or tiny."""
    L, rng = draw(st.one_of(st.integers(least, 12), st.just(80))), _rng(draw)
    kind = draw(st.sampled_from(["plain", "ties", "equal", "tiny"]))
    values = rng.random(L)
    if kind == "ties":
        values = rng.integers(1, 4, L) / 4
    elif kind == "equal":
        values = np.full(L, 0.5)
    elif kind == "tiny":
        values = np.exp(-100 * values)
    return values


@st.composite
def allocations(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of allocate_sparsity that have a solution."""
    importance = draw(importances())
    L, rng = len(importance), _rng(draw)
    target, spread = draw(st.floats(0, 1)), draw(st.sampled_from([0.0, 0.01, 0.03, 0.3]))
    weights = draw(st.sampled_from([None, rng.integers(1, 50, L).astype(float)]))
    # A floor whose mean is at most the target, as an earlier step or an unevenly sparse model leaves it.
    floor = draw(st.sampled_from([None, target * rng.random(L), np.full(L, target)]))
    if floor is not None and weights is not None and (weights @ floor) / weights.sum() > target:
        floor = np.minimum(floor, target)
    return {"importance": importance, "target": target, "spread": spread, "weights": weights, "floor": floor}


@st.composite
def uneven_blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of uniform_sparsity: dense blocks, and blocks that are more or less sparse already."""
    L, rng = draw(st.integers(1, 6)), _rng(draw)
    weights = rng.integers(1, 50, L).astype(float)
    floor = draw(st.sampled_from([np.zeros(L), rng.integers(0, weights + 1) / weights]))
    return {"target": draw(SPARSITIES), "weights": weights, "floor": floor}


@st.composite
def kept_allocations(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of allocate_kept that have a solution."""
    importance, m = draw(importances()), draw(st.sampled_from([2, 4, 8]))
    L, rng = len(importance), _rng(draw)
    kept_total = draw(st.one_of(st.integers(0, m).map(lambda n: n * L), st.integers(0, L * m)))
    spread = draw(st.integers(0 if kept_total % L == 0 else 1, 2))
    ceiling = draw(st.sampled_from([None, rng.integers(0, m + 1, L)]))
    if ceiling is not None:
        most = min(m, kept_total // L + spread)
        for block in rng.permutation(L):  # raise until there is a solution
            if np.minimum(ceiling, most).sum() < kept_total:
                ceiling[block] = m
    case = {"importance": importance, "kept_total": kept_total, "m": m, "spread": spread, "ceiling": ceiling}
    return case | {"moves": draw(st.none() | st.integers(0, 5))}


@st.composite
def bit_allocations(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of allocate_bits that have a solution: the mean of some bits among the choices."""
    importance = draw(importances())
    choices = draw(st.sampled_from([(4, 8), (3, 4, 5), (2, 3, 8), (4,)]) | st.lists(BITS, min_size=1, max_size=4))
    bits = draw(st.lists(st.sampled_from(choices), min_size=len(importance), max_size=len(importance)))
    return {"importance": importance, "mean_bits": sum(bits) / len(bits), "choices": choices}


@st.composite
def harms(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of allocate_bits_by_harm: harms that fall, that tie, and that follow no rule; equal and unequal sizes."""
    choices = sorted(draw(st.sets(BITS, min_size=1, max_size=4)))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 6, 64]), min_size=1, max_size=5))
    harm = _rng(draw).random((len(sizes), len(choices)))
    kind = draw(st.sampled_from(["falling", "ties", "any"]))
    harm = harm * 4.0 ** -np.array(choices) if kind == "falling" else np.rint(3 * harm) if kind == "ties" else harm
    share = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    mean = (1 - share) * choices[0] + share * choices[-1]
    return {"harm": harm, "sizes": sizes, "mean_bits": min(max(mean, choices[0]), choices[-1]), "choices": choices}


@st.composite
def scaled_values(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of nearest_codes: scales of 0, that make ties, too small, too large."""
    values = draw(matrices())
    scales = st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.0**-24, 1e-3, 3.7e4])
    return {"values": values, "scales": np.array([draw(scales) for _ in values]), "bits": draw(BITS)}


@st.composite
def bases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of round_base: a base as it was, one that has lost weights since it was rounded, and one that has moved."""
    weight, group = draw(matrices()), draw(st.integers(1, 13))
    kind = draw(st.sampled_from(["first", "pruned", "moved"]))
    if kind == "first":
        return {"weight": weight, "scales": None, "group": group}
    rng, columns = _rng(draw), min(group, weight.shape[1])
    scales = rng.choice([0.0, 0.125, 1.0, 2.0**-24], (len(weight), -(-weight.shape[1] // columns))).astype(np.float16)
    if kind == "pruned":
        codes = rng.integers(-127, 128, weight.shape) * (rng.random(weight.shape) < 0.6)
        weight = codes * np.repeat(scales.astype(np.float64), columns, axis=1)[:, : weight.shape[1]]
    return {"weight": weight, "scales": scales, "group": group}


@st.composite
def codes_and_scales(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of dequantise: whole and short last groups, no codes at all."""
    rng, group, n = _rng(draw), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    scales = rng.random(-(-n // group)).astype(np.float16)
    return {"codes": rng.integers(-127, 128, n, dtype=np.int8), "scales": scales, "group": group}


@st.composite
def rank_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of allocate_ranks: tied, equal, zero and wildly uneven errors, up to 80 blocks."""
    errors = draw(st.one_of(importances(), importances().map(lambda e: e**8), importances().map(np.zeros_like)))
    min_rank = draw(st.integers(0, 3))
    max_rank = min_rank + draw(st.integers(0, 20))
    mean = draw(st.one_of(st.integers(min_rank, max_rank), st.floats(min_rank, max_rank)))
    return {"errors": errors, "mean_rank": mean, "min_rank": min_rank, "max_rank": max_rank}


@st.composite
def resizes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of resize_adapter: up, down, to the same, from and to 0."""
    case = draw(adapters())
    rank = draw(st.integers(0, 16))
    rows = _rng(draw).standard_normal((draw(st.integers(0, 2)) + max(1, rank - len(case["A"])), case["A"].shape[1]))
    return {"A": case["A"], "B": case["B"], "rank": rank, "new_rows": rows}


@st.composite
def folds(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of fold_adapter."""
    case = draw(adapters())
    return {**case, "rank": draw(st.integers(0, len(case["A"])))}


@st.composite
def rebases(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of rebase: an update, or none."""
    weight = draw(matrices())
    rng = _rng(draw)
    merged = weight + rng.standard_normal(weight.shape)
    updated = merged + draw(st.sampled_from([0.0, 1.0])) * rng.standard_normal(weight.shape)
    return {"weight": weight, "merged": merged, "updated": updated, "mask": draw(kept_masks(weight.shape))}


@st.composite
def pairs_of_outputs(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """dense and sparse (tokens, hidden)."""
    dense = draw(matrices())
    noise = draw(st.sampled_from([0.0, 0.1, 10.0])) * _rng(draw).standard_normal(dense.shape)
    return {"dense": dense, "sparse": dense + noise}


@st.composite
def outputs_of_sequences(draw: st.DrawFn) -> np.ndarray:
    """(n, t, d), some channels silent."""
    rng = _rng(draw)
    outputs = rng.standard_normal((draw(st.integers(1, 4)), draw(SIZES), draw(SIZES)))
    return outputs * (rng.random(outputs.shape[2]) < draw(st.sampled_from([1.0, 0.7])))


@st.composite
def weights_to_pack(draw: st.DrawFn) -> np.ndarray:
    """(out, in) of any dtype that packs, 0 to 100 % zeros, up to three words a row; negative zeros, every pattern of bits."""
    rng, shape = _rng(draw), (draw(SIZES), draw(st.integers(1, 70)))
    dtype = draw(st.sampled_from([np.float64, np.uint16, np.uint32]))
    if dtype == np.float64:
        weight = rng.standard_normal(shape)
        weight[rng.random(shape) < 0.1] = -0.0
    else:
        weight = rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    weight[rng.random(shape) < draw(SPARSITIES)] = 0
    if draw(st.booleans()):
        weight[rng.integers(shape[0])] = 0
    return weight


@st.composite
def packed_weights(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of unpack and check, built by hand."""
    weight = draw(weights_to_pack())
    kept = np.array([[any(value.tobytes()) for value in row] for row in weight])
    words = -(-weight.shape[1] // 32)
    bits = np.zeros((len(weight), 32 * words), dtype=bool)
    bits[:, : weight.shape[1]] = kept
    return {
        "bitmap": np.packbits(bits, axis=1, bitorder="little"),
        "values": weight[kept],
        "offsets": np.array([kept[:row].sum() for row in range(len(weight) + 1)], dtype=np.int64),
        "columns": weight.shape[1],
    }


@st.composite
def codes_to_pack(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of pack_codes: 0 to 100 % zeros, up to three words a row, the largest codes, an empty row."""
    rng, shape, bits = _rng(draw), (draw(SIZES), draw(st.integers(1, 70))), draw(BITS)
    most = 2 ** (bits - 1) - 1
    codes = rng.integers(-most, most, shape, dtype=np.int8, endpoint=True)
    codes[rng.random(shape) < draw(SPARSITIES)] = 0
    if draw(st.booleans()):
        codes[rng.integers(shape[0])] = 0
    return {"codes": codes, "bits": bits}


@st.composite
def packed_codes(draw: st.DrawFn, scaled: bool = False) -> dict[str, Any]:
    """Arguments of unpack_codes, built by hand; scaled: of check_codes."""
    case = draw(codes_to_pack())
    codes, bits = case["codes"], case["bits"]
    kept = codes != 0
    words = -(-codes.shape[1] // 32)
    places = np.zeros((len(codes), 32 * words), dtype=bool)
    places[:, : codes.shape[1]] = kept
    stream = sum((int(code) % 2**bits) << (bits * place) for place, code in enumerate(codes[kept]))
    rows = -(-int(kept.sum()) // 8)
    scales = _rng(draw).random((len(codes), -(-codes.shape[1] // 128))).astype(np.float16)
    return {
        "bitmap": np.packbits(places, axis=1, bitorder="little"),
        "codes": np.frombuffer(stream.to_bytes(rows * bits, "little"), dtype=np.uint8).reshape(rows, bits),
        **({"scales": scales} if scaled else {}),
        "offsets": np.array([kept[:row].sum() for row in range(len(codes) + 1)], dtype=np.int64),
        "columns": codes.shape[1],
    }


@st.composite
def coded_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of dequantise_rows: whole and short last groups."""
    rng, group, shape = _rng(draw), draw(st.integers(1, 5)), (draw(SIZES), draw(SIZES))
    scales = rng.random((shape[0], -(-shape[1] // group))).astype(np.float16)
    return {"codes": rng.integers(-127, 128, shape, dtype=np.int8), "scales": scales, "group": group}


def weights_to_tile() -> st.SearchStrategy[np.ndarray]:
    """Weights of one to two by two panels of 16 x 128."""
    return matrices(rows=st.integers(1, 16) | st.integers(17, 32), columns=st.integers(1, 40) | st.integers(125, 150))


@st.composite
def tiled_weights(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of unpack_tiles, built by hand."""
    weight = draw(weights_to_tile())
    rows, columns = weight.shape
    across = -(-columns // 128)
    bitmaps = np.zeros((-(-rows // 16) * across, 256), dtype=np.uint8)
    kept = []
    for row, column in np.argwhere(weight != 0).tolist():
        panel, tile = row // 16 * across + column // 128, (column // 32 % 4, column // 4 % 2, row // 8 % 2)
        lane, place = row % 8 * 4 + column // 8 % 4, column % 4
        word = np.ravel_multi_index((tile[0], lane // 8, 2 * tile[1] + tile[2]), (4, 4, 4))
        bitmaps[panel, 4 * word + (2, 3, 0, 1)[place]] |= 1 << lane % 8
        kept.append((panel, tile, lane, (1, 0, 2, 3)[place], weight[row, column]))
    values = np.array([value for *_, value in sorted(kept)], dtype=np.float64)
    return {"bitmaps": bitmaps, "values": values, "rows": rows, "columns": columns}


@st.composite
def codes_to_tile(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of pack_code_tiles: one to two by two panels of 16 x 256, empty and full lanes."""
    rng, bits = _rng(draw), draw(BITS)
    shape = draw(st.integers(1, 18)), draw(st.integers(1, 40) | st.integers(250, 260))
    most = 2 ** (bits - 1) - 1
    codes = rng.integers(-most, most, shape, dtype=np.int8, endpoint=True)
    codes[rng.random(shape) < draw(SPARSITIES)] = 0
    return {"codes": codes, "scales": rng.random((shape[0], -(-shape[1] // 128))).astype(np.float16), "bits": bits}


@st.composite
def tiled_codes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of unpack_code_tiles, built by hand: code by code, each lane's bits as text, the highest first."""
    case = draw(codes_to_tile())
    codes, (rows, columns), width = case["codes"], case["codes"].shape, 4 if case["bits"] <= 4 else 8
    across = -(-columns // 256)
    panels = -(-rows // 16) * across
    bitmaps, scales = np.zeros((panels, 512), dtype=np.uint8), np.zeros((panels, 32), dtype=np.float16)
    kept: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for row, column in np.argwhere(codes != 0).tolist():
        panel, lane = row // 16 * across + column // 256, row % 8 * 4 + column // 8 % 4
        n = np.ravel_multi_index((column // 32 % 8, column // 4 % 2, row // 8 % 2, column % 4), (8, 2, 2, 4))
        bitmaps[panel, 16 * lane + n // 8] |= 1 << n % 8
        code = codes[row, column]
        kept.setdefault((panel, lane), []).append((int(n), f"{int(code < 0)}{abs(int(code)):0{width - 1}b}"))
    for row, group in np.ndindex(*case["scales"].shape):
        scales[row // 16 * across + group // 2, row % 16 * 2 + group % 2] = case["scales"][row, group]
    words = []
    for panel in range(panels):
        streams = ["".join(text for _, text in sorted(kept.get((panel, lane), []))[::-1]) for lane in range(32)]
        count = -(-max(map(len, streams)) // 32)
        padded = [f"{stream:>0{32 * count}}" for stream in streams]
        for k in range(count):
            numbers = [int(stream[32 * (count - 1 - k) : 32 * (count - k)], 2) for stream in padded]
            words.append(np.array(numbers, dtype="<u4").view(np.uint8))
    counts = [-(-max(len(kept.get((panel, lane), [])) for lane in range(32)) * width // 32) for panel in range(panels)]
    return {
        "bitmaps": bitmaps,
        "scales": scales,
        "words": np.array(words, dtype=np.uint8).reshape(-1, 128),
        "starts": np.cumsum([0, *counts]),
        "bits": case["bits"],
        "rows": rows,
        "columns": columns,
    }


@st.composite
def weights_with_gaps(draw: st.DrawFn, most_rows: int = 70) -> np.ndarray:
    """(out, in) of one to three strips of 32 rows, each row with its own share of zeros: dense, empty, gaps of 1 to 199."""
    rng, shape = _rng(draw), (draw(st.integers(1, most_rows) | st.sampled_from([32, 33])), draw(st.integers(1, 200)))
    kept = draw(st.lists(st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]), min_size=1, max_size=4))
    weight = rng.standard_normal(shape)
    weight[rng.random(shape) < 0.1] = -0.0
    weight[rng.random(shape) >= rng.choice(kept, shape[0])[:, None]] = 0
    return weight


@st.composite
def gapped_weights(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of unpack_gaps, built by hand: fillers anywhere, groups to spare, rows in any order."""
    rng, weight = _rng(draw), draw(weights_with_gaps(40))
    rows, columns = weight.shape
    order = rng.permutation(rows)
    streams: list[list[tuple[int, float]]] = []
    for row in weight[order]:
        steps = np.diff(np.flatnonzero(row), prepend=0)
        stream = []
        for step, value in zip(steps.tolist(), row[row != 0].tolist(), strict=True):
            left = step
            while left > 15 or (left and rng.random() < 0.2):
                gap = int(rng.integers(0, min(left, 15) + 1))
                stream.append((gap, 0.0))
                left -= gap
            stream.append((left, value))
        streams.append(stream)
    strips = [streams[first : first + 32] for first in range(0, rows, 32)]
    counts = [-(-max(map(len, strip)) // 8) + int(rng.integers(0, 2)) for strip in strips]
    values, gaps = np.zeros((sum(counts), 32, 8)), np.zeros((sum(counts), 32, 8), dtype=np.uint8)
    starts = np.cumsum([0, *counts])
    for position, stream in enumerate(streams):
        for number, (gap, value) in enumerate(stream):
            place = starts[position // 32] + number // 8, position % 32, number % 8
            gaps[place], values[place] = gap, value
    return {"values": values, "gaps": gaps, "starts": starts, "order": order, "rows": rows, "columns": columns}


# Never on the border between two tokens of a small vocabulary with equal logits, where rounding decides.
_UNIFORMS = st.integers(0, 999).map(lambda number: (number + 0.37) / 1000)


@st.composite
def predictions(draw: st.DrawFn) -> dict[str, Any]:
    """Logits with ties and far apart, uniforms, and excluded tokens, which are not all."""
    n, v = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    logits = draw(arrays(np.float64, (n, v), elements=st.integers(-40, 40).map(float)))
    uniforms = draw(arrays(np.float64, n, elements=_UNIFORMS))
    return {"logits": logits, "uniforms": uniforms, "excluded": draw(st.lists(st.integers(0, v - 1), max_size=v - 1))}


def successor(ids: Any) -> Any:
    """Predict the sum of all tokens before, of five, more likely than others; in either package."""
    library = np if isinstance(ids, np.ndarray) else torch
    return library.where(library.arange(5) == (ids.sum(1)[:, None]) % 5, 2.0, 0.0)


def continuations() -> st.SearchStrategy[dict[str, Any]]:
    """Prompts and uniforms for `successor`."""

    def of(shape: tuple[int, int, int]) -> st.SearchStrategy[dict[str, Any]]:
        n, t, k = shape
        return st.fixed_dictionaries(
            {
                "predict": st.just(successor),
                "prompts": arrays(np.int64, (n, t), elements=st.integers(0, 4)),
                "uniforms": arrays(np.float64, (n, k), elements=_UNIFORMS),
                "excluded": st.sampled_from([[], [2]]),
            }
        )

    return st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)).flatmap(of)


@st.composite
def wanted_rates(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of nearest_rates that have a solution: rates beyond their bounds, equal ones, floors above them."""
    L, rng, target = draw(st.integers(1, 9)), _rng(draw), draw(SPARSITIES)
    wanted = draw(st.sampled_from([target + rng.normal(0, 0.1, L), rng.uniform(-0.5, 1.5, L), np.full(L, target)]))
    floor = draw(st.sampled_from([np.zeros(L), target * rng.random(L), np.full(L, target)]))
    return {"wanted": wanted, "target": target, "weights": rng.integers(1, 50, L).astype(float), "floor": floor}


def levels_of(weights: list[np.ndarray]) -> list[np.ndarray]:
    """What `lamp_levels` counts in each of these weights."""
    return [lamp_levels(weight) for weight in weights]


@st.composite
def removals(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of remove_blocks: losses that depend on all blocks that are left, with ties or infinite ones at times."""
    blocks, seed = draw(st.integers(1, 7)), draw(SEEDS)
    kind = draw(st.sampled_from(["plain", "ties", "infinite"]))

    def loss(left: tuple[int, ...]) -> float:
        found = np.random.default_rng([seed, *left]).standard_normal()
        return float(np.rint(found)) if kind == "ties" else np.inf if kind == "infinite" and found > 0 else float(found)

    return {"loss": loss, "blocks": blocks, "count": draw(st.integers(0, max(0, blocks - 2)))}


@st.composite
def spectra(draw: st.DrawFn) -> np.ndarray:
    """(d, d), symmetric, with eigenvalues apart from each other: their axes are determined but for the sign."""
    d, rng = draw(SIZES), _rng(draw)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    values = np.arange(d) + rng.uniform(0, 0.5, d)
    gram = draw(st.sampled_from([1.0, 1e-3, 1e4])) * (Q * values) @ Q.T
    return (gram + gram.T) / 2


@st.composite
def structures_of(draw: st.DrawFn, dimensions: int, axis: bool = False) -> dict[str, Any]:
    """A score of 1 or 2 dimensions, whose axis consists of runs of one length."""
    u, width, other = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(SIZES)
    score = draw(matrices(u * width, other if dimensions == 2 else 1))
    if not axis:
        return {"score": score[:, 0], "structures": u}
    chosen = draw(st.integers(0, 1))
    return {"score": score if chosen == 0 else score.T.copy(), "structures": u, "axis": chosen}


@st.composite
def protected_blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of rates_between that have a solution."""
    blocks, rng = draw(st.integers(1, 9)), _rng(draw)
    first = draw(st.integers(0, blocks - 1))
    last = draw(st.integers(0, blocks - 1 - first))
    weights = rng.integers(1, 9, blocks).astype(float)
    most = weights[first : blocks - last].sum() / weights.sum()
    return {"target": float(most * draw(st.floats(0, 1))), "weights": weights, "first": first, "last": last}


@st.composite
def dense_ends(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of middle_sparsity that have a solution, with blocks that are sparse already or not."""
    case, rng = draw(protected_blocks()), _rng(draw)
    w = case["weights"]
    floor = draw(st.sampled_from([np.zeros(len(w)), rng.integers(0, w + 1) / w]))
    ends = np.ones(len(w), dtype=bool)
    ends[case["first"] : len(w) - case["last"]] = False
    inner = draw(SPARSITIES)
    target = float((w[ends] @ floor[ends] + inner * w[~ends].sum()) / w.sum())
    return {"target": target, "weights": w, "floor": floor, "first": case["first"], "last": case["last"]}


@st.composite
def adapters_with_gradients(draw: st.DrawFn) -> dict[str, Any]:
    """An adapter of rank 1 or more and the gradients of A and B."""
    case, rng, rank = draw(adapters()), _rng(draw), draw(st.integers(1, 5))
    out, inputs = case["weight"].shape
    A, g_A = rng.standard_normal((2, rank, inputs))
    B, g_B = rng.standard_normal((2, out, rank))
    return {**case, "A": A, "B": B, "grad_A": g_A, "grad_B": g_B}


STRUCTURES = st.integers(1, 5)


@st.composite
def structured_columns(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A matrix and the number of structures that its columns belong to, some without an entry above 0."""
    structures = draw(STRUCTURES)
    return draw(matrices(columns=structures * draw(st.integers(1, 3)))), structures


@st.composite
def structured_lines(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of cut: a weight whose rows or columns belong to structures, all, some or none of them kept."""
    axis, kept = draw(st.integers(0, 1)), draw(kept_masks((1, draw(STRUCTURES))))[0]
    shape = [draw(SIZES), draw(SIZES)]
    shape[axis] = len(kept) * draw(st.integers(1, 3))
    return {"values": draw(matrices(*shape)), "kept": kept, "axis": axis}


@st.composite
def scored_structures(draw: st.DrawFn) -> dict[str, Any]:
    """Scores of a whole model's structures, with ties and infinite ones, and whole numbers of weights."""
    n, rng = draw(st.integers(1, 12)), _rng(draw)
    score = rng.standard_normal(n) if draw(st.booleans()) else rng.integers(-1, 3, n).astype(float)
    score[rng.random(n) < 0.2] = np.inf
    return {"score": score, "weights": rng.integers(1, 5, n).astype(float), "sparsity": draw(SPARSITIES)}


@st.composite
def structures_to_remove(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of structure_mask: tied scores among them, structures that are gone, more or fewer of them than asked."""
    score = np.abs(draw(matrices(rows=1)))[0]
    kept = draw(kept_masks((1, len(score))))[0]
    return {"score": score, "removed": draw(st.integers(0, len(score))), "kept": kept}


@st.composite
def structured_blocks(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of removed_structures: one head, heads larger than the MLP, multiples that do not divide the channels."""
    channels = draw(st.integers(1, 48))
    return {
        "sparsity": draw(SPARSITIES),
        "heads": draw(st.sampled_from([1, 2, 3, 8, 9])),
        "channels": channels,
        "head_weights": draw(st.integers(1, 400)),
        "channel_weights": draw(st.integers(1, 40)),
        "multiple": draw(st.integers(1, channels)),
        "last": draw(st.booleans()),
    }
