"""The table that pairs the two packages: every public function of the spec, its inputs, how results are compared."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from oracle_tests import strategies as s


class Kind(enum.Enum):
    """How results are compared."""

    EXACT = "same values, shapes and kinds"
    CLOSE = "within the dtype's bound"
    OPTIMUM = "feasible, and the objective within the bound"


@dataclass(frozen=True)
class Op:
    """One pair of functions. name: module and function, the same in both packages. cases: its keyword arguments. bad:
    keyword arguments that both refuse, and the argument that the message must name. low_precision: also tested in float32,
    float16 and bfloat16. scale: size of the terms that cancel in a result, if it is not the size of the result."""

    name: str
    cases: st.SearchStrategy[dict[str, Any]]
    kind: Kind
    bad: tuple[dict[str, Any], str]
    low_precision: bool = False
    scale: Callable[[dict[str, Any]], float] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def reference(self) -> Callable[..., Any]:
        """The spec's function."""
        return _find("reference", self.name)

    @property
    def production(self) -> Callable[..., Any]:
        """Production's function."""
        return _find("torch_impl", self.name)


def _find(package: str, name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{module}"), function)
    return found


def to_torch(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Convert an argument for production: float arrays to `dtype`, other arrays and scales (float16) with their dtype, lists of
    arrays alike, anything else unchanged."""
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return [to_torch(part, dtype) for part in value]
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(np.array(value))
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float16 else tensor


W = np.array([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
A, B = np.ones((2, 3)), np.ones((2, 2))
LAYER = {"weight": W, "A": A, "B": B, "scale": 1.0}
GATED = {"A": A, "B": B, "gate": np.ones(2), "scale": 1.0}
EYE = np.eye(3)
KEPT = W != 0
ROW = np.array([0.2, 0.3, 0.5])
PACKED = {
    "bitmap": np.array([[5, 0, 0, 0], [3, 0, 0, 0]], dtype=np.uint8),
    "values": np.array([1.0, 2.0, 0.5, -1.0]),
    "offsets": np.array([0, 2, 4]),
    "columns": 3,
}
CODED = {
    "bitmap": np.array([[6, 0, 0, 0]], dtype=np.uint8),
    "codes": np.array([[247, 0, 0, 0]], dtype=np.uint8),
    "offsets": np.array([0, 2]),
    "columns": 4,
}
# No kept weight.
CODE_TILED = {
    "bitmaps": np.zeros((1, 512), dtype=np.uint8),
    "scales": np.zeros((1, 32), dtype=np.float16),
    "words": np.zeros((0, 128), dtype=np.uint8),
    "starts": np.zeros(2, dtype=np.int64),
    "bits": 8,
    "rows": 2,
    "columns": 3,
}
TILED = {"bitmaps": np.zeros((1, 256), dtype=np.uint8), "values": np.ones(0), "rows": 2, "columns": 3}

# No kept weight.
SECTIONS = st.none() | st.integers(1, 200)
GAPPED = {
    "values": np.zeros((0, 32, 8)),
    "gaps": np.zeros((0, 32, 8), dtype=np.uint8),
    "starts": np.zeros(2, dtype=np.int64),
    "order": np.arange(2),
    "rows": 2,
    "columns": 3,
}


def _cases(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(arguments)


_steps = st.integers(1, 12).flatmap(
    lambda steps: st.fixed_dictionaries(
        {
            "step": st.integers(1, steps),
            "steps": st.just(steps),
            "final": st.floats(0.5, 1),
            "initial": st.floats(0, 0.5),
        }
    )
)

OPS = (
    Op("schedule.cubic_sparsity", _steps, Kind.CLOSE, ({"step": 3, "steps": 2, "final": 0.5}, "step")),
    Op(
        "schedule.mean_rank",
        _cases(step=st.integers(1, 20), initial=st.integers(1, 9)),
        Kind.EXACT,
        ({"step": 0}, "step"),
    ),
    Op(
        "schedule.sparsity_spread",
        _cases(target=s.SPARSITIES | st.integers(0, 10).map(lambda tenths: tenths / 10)),
        Kind.EXACT,
        ({"target": 1.5}, "target"),
    ),
    Op(
        "hsic.linear_gram",
        _cases(features=s.matrices()),
        Kind.CLOSE,
        ({"features": np.ones(3)}, "features"),
        low_precision=True,
    ),
    Op(
        "hsic.center",
        _cases(gram=s.grams()),
        Kind.CLOSE,
        ({"gram": np.ones((2, 3))}, "gram"),
        scale=lambda case: float(np.abs(case["gram"]).max()),
    ),
    Op(
        "hsic.hsic",
        s.gram_pairs(),
        Kind.CLOSE,
        ({"gram_x": np.eye(1), "gram_y": np.eye(1)}, "gram_x"),
        scale=lambda case: float(np.linalg.norm(case["gram_x"]) * np.linalg.norm(case["gram_y"])),
    ),
    Op("hsic.nhsic", s.gram_pairs(), Kind.CLOSE, ({"gram_x": np.eye(2), "gram_y": np.eye(3)}, "gram_y")),
    Op("rmi.nhsic_matrix", _cases(grams=s.grams(4)), Kind.CLOSE, ({"grams": np.eye(3)}, "grams")),
    Op(
        "rmi.redundancy",
        _cases(nhsic=st.integers(1, 9).flatmap(lambda n: s.matrices(n, n))),
        Kind.CLOSE,
        ({"nhsic": np.ones((2, 3))}, "nhsic"),
        low_precision=True,
    ),
    Op(
        "rmi.importance",
        _cases(redundancy=s.importances(), beta=st.sampled_from([1.0, 100.0, 0.5])),
        Kind.CLOSE,
        ({"redundancy": -ROW}, "redundancy"),
    ),
    Op(
        "first_order.first_order_importance",
        s.matrices().flatmap(lambda w: _cases(weight=st.just(w), gradient=s.matrices(*w.shape))),
        Kind.CLOSE,
        ({"weight": W, "gradient": EYE}, "gradient"),
    ),
    Op(
        "sparsity.allocate_sparsity",
        s.allocations(),
        Kind.OPTIMUM,
        ({"importance": ROW, "target": 0.5, "spread": 0.1, "floor": np.full(3, 0.9)}, "floor"),
    ),
    Op(
        "sparsity.uniform_sparsity",
        s.uneven_blocks(),
        Kind.EXACT,
        ({"target": 0.5, "weights": np.ones(3), "floor": np.full(2, 0.9)}, "floor"),
    ),
    Op(
        "sparsity.allocate_kept",
        s.kept_allocations(),
        Kind.EXACT,
        ({"importance": ROW, "kept_total": 13, "m": 4}, "kept_total"),
    ),
    Op(
        "sparsity.middle_sparsity",
        s.dense_ends(),
        Kind.CLOSE,
        ({"target": 0.9, "weights": np.ones(3), "floor": np.zeros(3), "first": 1, "last": 1}, "target"),
    ),
    Op(
        "sparsity.nearest_rates",
        s.wanted_rates(),
        Kind.CLOSE,
        ({"wanted": ROW, "target": 0.5, "weights": np.ones(3), "floor": np.full(3, 0.9)}, "floor"),
    ),
    Op(
        "sparsity.even_moves",
        _cases(spread=s.SPARSITIES, blocks=st.integers(1, 80), m=st.integers(1, 8)),
        Kind.EXACT,
        ({"spread": 0.5, "blocks": 0, "m": 4}, "blocks"),
    ),
    Op(
        "bits.allocate_bits",
        s.bit_allocations(),
        Kind.EXACT,
        ({"importance": ROW, "mean_bits": 4.5, "choices": (4, 8)}, "mean_bits"),
    ),
    Op(
        "bits.nearby_bits",
        _cases(mean_bits=st.floats(2, 8) | st.integers(2, 8)),
        Kind.EXACT,
        ({"mean_bits": 8.5}, "mean_bits"),
    ),
    Op(
        "bits.allocate_bits_by_harm",
        s.harms(),
        Kind.EXACT,
        ({"harm": W, "sizes": [1, 0], "mean_bits": 4.0, "choices": (3, 4, 5)}, "sizes"),
    ),
    Op(
        "owl.outlier_share",
        _cases(scores=st.lists(s.matrices().map(np.abs), min_size=1, max_size=3), factor=st.sampled_from([5.0, 1.5])),
        Kind.CLOSE,
        ({"scores": [np.ones(3)]}, "scores"),
    ),
    Op(
        "owl.owl_rates",
        s.wanted_rates().map(
            lambda case: {"outliers": case.pop("wanted").clip(min=0), **case, "spread": 0.08},
        ),
        Kind.CLOSE,
        ({"outliers": ROW, "target": 0.5, "weights": np.ones(2), "floor": np.zeros(3)}, "weights"),
    ),
    Op(
        "atp.progression",
        st.tuples(s.SPARSITIES, st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0])).map(
            lambda drawn: {
                "target": drawn[0],
                "blocks": drawn[1],
                "step": drawn[2] * 2 * min(drawn[0], 1 - drawn[0]) / max(1, drawn[1] - 1),
            }
        ),
        Kind.CLOSE,
        ({"target": 0.5, "blocks": 3, "step": 0.6}, "step"),
    ),
    Op(
        "atp.largest_step",
        _cases(target=s.SPARSITIES, blocks=st.integers(1, 80)),
        Kind.EXACT,
        ({"target": 0.5, "blocks": 0}, "blocks"),
    ),
    Op(
        "atp.candidate_steps",
        _cases(target=s.SPARSITIES, blocks=st.integers(1, 80), count=st.integers(2, 12)),
        Kind.CLOSE,
        ({"target": 0.5, "blocks": 3, "count": 1}, "count"),
    ),
    Op("lamp.lamp_score", _cases(weight=s.matrices()), Kind.CLOSE, ({"weight": np.ones(3)}, "weight")),
    Op("lamp.lamp_levels", _cases(weight=s.matrices()), Kind.EXACT, ({"weight": np.ones(3)}, "weight")),
    Op(
        "lamp.lamp_kept",
        _cases(levels=st.lists(s.matrices(), min_size=1, max_size=4).map(s.levels_of), target=s.SPARSITIES),
        Kind.CLOSE,
        ({"levels": [np.ones(3, dtype=np.int64)], "target": 1.5}, "target"),
    ),
    Op(
        "rank.reconstruction_error",
        s.pairs_of_outputs(),
        Kind.CLOSE,
        ({"dense": W, "sparse": W.T.copy()}, "sparse"),
    ),
    Op(
        "reconstruct.channel_weights",
        _cases(targets=s.outputs_of_sequences()),
        Kind.CLOSE,
        ({"targets": W}, "targets"),
    ),
    Op("rank.allocate_ranks", s.rank_cases(), Kind.EXACT, ({"errors": ROW, "mean_rank": 17}, "mean_rank")),
    Op(
        "rank.resize_adapter",
        s.resizes(),
        Kind.EXACT,
        ({"A": A, "B": B, "rank": 3, "new_rows": None}, "new_rows"),
    ),
    Op("rank.fold_adapter", s.folds(), Kind.CLOSE, ({**LAYER, "rank": 3}, "rank"), low_precision=True),
    Op(
        "masks.select.row_mask",
        _cases(score=s.matrices(), sparsity=s.SPARSITIES),
        Kind.EXACT,
        ({"score": W, "sparsity": 1.1}, "sparsity"),
    ),
    Op(
        "masks.select.matrix_mask",
        _cases(score=s.matrices(), sparsity=s.SPARSITIES),
        Kind.EXACT,
        ({"score": np.full((2, 3), np.nan), "sparsity": 0.5}, "score"),
    ),
    Op(
        "masks.select.rest_sparsity",
        s.sparse_groups(),
        Kind.EXACT,
        ({"zeros": np.array([2.0, 5.0]), "sizes": np.array([4.0, 4.0]), "sparsity": 0.5}, "zeros"),
    ),
    Op(
        "masks.select.demote_pruned",
        s.matrices().flatmap(lambda w: _cases(score=st.just(w), kept=s.kept_masks(w.shape))),
        Kind.EXACT,
        ({"score": W, "kept": W}, "kept"),
    ),
    Op(
        "masks.structured.structure_score",
        s.structured_columns().map(lambda drawn: {"score": np.abs(drawn[0]), "structures": drawn[1]}),
        Kind.CLOSE,
        ({"score": W, "structures": 2}, "structures"),
        low_precision=True,
    ),
    Op(
        "masks.structured.removed_structures",
        s.structured_blocks(),
        Kind.EXACT,
        (
            {"sparsity": 0.5, "heads": 2, "channels": 8, "head_weights": 4, "channel_weights": 3, "multiple": 9},
            "multiple",
        ),
    ),
    Op(
        "masks.structured.structure_mask",
        s.structures_to_remove(),
        Kind.EXACT,
        ({"score": ROW, "removed": 4, "kept": np.ones(3, dtype=bool)}, "removed"),
    ),
    Op(
        "masks.structured.kept_structures",
        s.structured_columns().map(lambda drawn: {"mask": drawn[0] > 0, "structures": drawn[1]}),
        Kind.EXACT,
        ({"mask": KEPT, "structures": 2}, "structures"),
    ),
    Op(
        "masks.structured.coupled_mask",
        s.structured_lines().map(lambda case: {"shape": case.pop("values").shape, **case}),
        Kind.EXACT,
        ({"kept": np.ones(2, dtype=bool), "shape": (2, 3), "axis": 1}, "kept"),
    ),
    Op(
        "masks.structured.cut",
        s.structured_lines(),
        Kind.EXACT,
        ({"values": W, "kept": np.ones(3, dtype=bool), "axis": 2}, "axis"),
    ),
    Op(
        "masks.magnitude.magnitude_mask",
        _cases(weight=s.matrices(), sparsity=s.SPARSITIES),
        Kind.EXACT,
        ({"weight": np.full((2, 3), np.inf), "sparsity": 0.5}, "weight"),
    ),
    Op(
        "masks.wanda.input_norm",
        _cases(inputs=s.matrices()),
        Kind.CLOSE,
        ({"inputs": np.ones(3)}, "inputs"),
        low_precision=True,
    ),
    Op(
        "masks.wanda.wanda_score",
        s.matrices().flatmap(
            lambda w: _cases(weight=st.just(w), input_norm=s.matrices(1, w.shape[1]).map(lambda n: np.abs(n[0])))
        ),
        Kind.CLOSE,
        ({"weight": W, "input_norm": np.ones(2)}, "input_norm"),
        low_precision=True,
    ),
    Op(
        "masks.wanda.wanda_mask",
        s.matrices().flatmap(
            lambda w: _cases(
                weight=st.just(w),
                input_norm=s.matrices(1, w.shape[1]).map(lambda n: np.abs(n[0])),
                sparsity=s.SPARSITIES,
            )
        ),
        Kind.EXACT,
        ({"weight": W, "input_norm": -np.ones(3), "sparsity": 0.5}, "input_norm"),
    ),
    Op(
        "masks.nm.nm_mask",
        st.sampled_from([2, 4, 8]).flatmap(
            lambda m: _cases(score=s.matrices(columns=m * 2), n=st.integers(0, m), m=st.just(m))
        ),
        Kind.EXACT,
        ({"score": W, "n": 2, "m": 4}, "m"),
    ),
    Op(
        "masks.nm.kept_per_group",
        _cases(sparsity=s.SPARSITIES, m=st.integers(1, 16)),
        Kind.EXACT,
        ({"sparsity": -0.1, "m": 4}, "sparsity"),
    ),
    Op(
        "masks.sparsegpt.hessian",
        _cases(inputs=s.matrices(), samples=st.integers(1, 5)),
        Kind.CLOSE,
        ({"inputs": W, "samples": 0}, "samples"),
        low_precision=True,
    ),
    Op(
        "masks.sparsegpt.sparsegpt",
        s.sparsegpt_cases(),
        Kind.CLOSE,
        ({"weight": W, "hessian": -EYE, "sparsity": 0.5}, "hessian"),
    ),
    Op(
        "masks.sparsegpt.sparsegpt_codes",
        s.rounding_cases(),
        Kind.EXACT,
        ({"weight": W, "hessian": EYE, "bits": 1}, "bits"),
    ),
    Op(
        "masks.sparsegpt.rounding_harm",
        s.harm_cases(),
        Kind.CLOSE,
        ({"weight": W, "hessian": EYE, "output_weights": -ROW, "choices": (4,)}, "output_weights"),
    ),
    Op(
        "masks.sparsegpt.sparsegpt_nm",
        s.sparsegpt_cases(group=True),
        Kind.CLOSE,
        ({"weight": W, "hessian": EYE, "n": 1, "m": 2}, "m"),
    ),
    Op(
        "masks.least_squares.keep_largest",
        s.supports(),
        Kind.EXACT,
        ({"values": np.ones(3), "kept": KEPT, "amount": 0.5}, "values"),
    ),
    Op(
        "masks.least_squares.refine",
        s.starts_of_refine(),
        Kind.CLOSE,
        ({"weight": W, "start": B, "hessian": EYE, "support": KEPT}, "start"),
    ),
    *(
        Op(
            f"masks.{name}.{name}",
            s.searched_cases(),
            Kind.CLOSE,
            ({"weight": W, "hessian": -EYE, "sparsity": 0.5}, "hessian"),
        )
        for name in ("alps", "admm")
    ),
    *(
        Op(
            f"masks.{name}.{name}_nm",
            s.searched_cases(group=True),
            Kind.CLOSE,
            ({"weight": W, "hessian": EYE, "n": 1, "m": 2}, "m"),
        )
        for name in ("alps", "admm")
    ),
    Op(
        "masks.pruner_zero.gradient_size",
        _cases(gradients=s.gradients()),
        Kind.CLOSE,
        ({"gradients": W}, "gradients"),
        low_precision=True,
    ),
    Op(
        "masks.pruner_zero.pruner_zero_score",
        s.weights_and_gradient_sizes(),
        Kind.CLOSE,
        ({"weight": W, "gradient_size": W}, "gradient_size"),
    ),
    Op(
        "masks.pruner_zero.pruner_zero_mask",
        s.weights_and_gradient_sizes().flatmap(
            lambda case: _cases(**{k: st.just(v) for k, v in case.items()}, sparsity=s.SPARSITIES)
        ),
        Kind.EXACT,
        ({"weight": W, "gradient_size": B, "sparsity": 0.5}, "gradient_size"),
    ),
    Op(
        "masks.prune.prune",
        s.prune_cases(),
        Kind.CLOSE,
        ({"method": "best", "weight": W, "statistic": None, "kept": KEPT, "sparsity": 0.5}, "method"),
    ),
    Op("adapter.effective_weight", s.adapters(), Kind.CLOSE, ({**LAYER, "A": B}, "A"), low_precision=True),
    Op("adapter.merge", s.adapters(), Kind.CLOSE, ({**LAYER, "B": A}, "B"), low_precision=True),
    Op("adapter.masked_lora", s.adapter_inputs(), Kind.CLOSE, ({"x": B, **LAYER}, "x"), low_precision=True),
    Op(
        "adapter.masked_lora_grad",
        s.adapter_inputs(gradient=True),
        Kind.CLOSE,
        ({"x": W, **LAYER, "grad_y": W}, "grad_y"),
        low_precision=True,
    ),
    Op("sora.gated_lora", s.gated_adapters(), Kind.CLOSE, ({"x": B, **GATED}, "A"), low_precision=True),
    Op(
        "sora.soft_threshold",
        _cases(
            values=st.lists(st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0]) | st.floats(-2, 2), max_size=8).map(
                np.array
            ),
            amount=st.sampled_from([0.0, 0.25, 3e-4, 1.0]),
        ),
        Kind.CLOSE,
        ({"values": ROW, "amount": -1.0}, "amount"),
        low_precision=True,
    ),
    Op(
        "sleb.removed_blocks",
        _cases(sparsity=s.SPARSITIES, blocks=st.integers(1, 80)),
        Kind.EXACT,
        ({"sparsity": 0.5, "blocks": 0}, "blocks"),
    ),
    Op("sleb.remove_blocks", s.removals(), Kind.EXACT, ({"loss": sum, "blocks": 4, "count": 3}, "count")),
    Op(
        "llm_pruner.taylor_score",
        s.matrices().flatmap(lambda w: _cases(weight=st.just(w), gradient=s.matrices(*w.shape))),
        Kind.CLOSE,
        ({"weight": W, "gradient": EYE}, "gradient"),
    ),
    Op(
        "llm_pruner.structure_sum",
        s.structures_of(2, axis=True),
        Kind.CLOSE,
        ({"score": W, "structures": 2, "axis": 1}, "structures"),
        scale=lambda case: float(np.abs(case["score"]).sum()),
    ),
    Op(
        "llm_pruner.rates_between",
        s.protected_blocks(),
        Kind.CLOSE,
        ({"target": 0.5, "weights": np.ones(3), "first": 1, "last": 1}, "target"),
    ),
    Op(
        "loraprune.lora_score",
        s.adapters_with_gradients(),
        Kind.CLOSE,
        ({**LAYER, "grad_A": A, "grad_B": A}, "grad_B"),
        scale=lambda case: float(
            (
                np.abs(case["grad_B"]) @ np.abs(case["A"])
                + np.abs(case["B"]) @ np.abs(case["grad_A"])
                + np.abs(case["grad_B"]) @ np.abs(case["grad_A"])
            ).max()
            * (np.abs(case["weight"]) + np.abs(case["scale"]) * np.abs(case["B"]) @ np.abs(case["A"])).max()
        ),
    ),
    Op(
        "loraprune.smoothed",
        st.tuples(st.integers(1, 9), st.integers(1, 4)).flatmap(
            lambda sizes: _cases(
                before=s.matrices(1, sizes[0]).map(lambda m: m[0]), scores=s.matrices(sizes[1], sizes[0]).map(np.abs)
            )
        ),
        Kind.CLOSE,
        ({"before": ROW, "scores": np.ones((1, 2))}, "scores"),
        scale=lambda case: float(np.abs(case["before"]).max()) + len(case["scores"]),
    ),
    Op(
        "flap.fluctuation",
        s.matrices().flatmap(
            lambda w: _cases(weight=st.just(w), variance=s.matrices(1, w.shape[1]).map(lambda v: np.abs(v[0])))
        ),
        Kind.CLOSE,
        ({"weight": W, "variance": -np.ones(3)}, "variance"),
    ),
    Op(
        "flap.standardised",
        s.structures_of(1),
        Kind.CLOSE,
        ({"score": ROW, "structures": 2}, "structures"),
        scale=lambda case: len(case["score"]),
    ),
    Op(
        "flap.remove_lowest",
        s.scored_structures(),
        Kind.EXACT,
        ({"score": ROW, "weights": np.array([1.0, 0.0, 2.0]), "sparsity": 0.5}, "weights"),
    ),
    Op(
        "flap.compensation",
        s.matrices().flatmap(
            lambda w: _cases(
                weight=st.just(w),
                mean=s.matrices(1, w.shape[1]).map(lambda m: m[0]),
                kept=s.kept_masks((1, w.shape[1])).map(lambda k: k[0]),
            )
        ),
        Kind.CLOSE,
        ({"weight": W, "mean": np.ones(2), "kept": np.ones(2, dtype=bool)}, "mean"),
        scale=lambda case: float((np.abs(case["weight"]) @ np.abs(case["mean"])).max()),
    ),
    Op("slicegpt.principal_axes", _cases(gram=s.spectra()), Kind.CLOSE, ({"gram": np.ones((2, 3))}, "gram")),
    Op(
        "slicegpt.kept_axes",
        _cases(
            sparsity=s.SPARSITIES,
            width=st.integers(1, 600),
            weights=st.integers(1, 10**6),
            multiple=st.sampled_from([1, 8]),
        ),
        Kind.EXACT,
        ({"sparsity": 0.5, "width": 0, "weights": 9}, "width"),
    ),
    Op(
        "slicegpt.centred",
        _cases(axes=s.matrices()),
        Kind.CLOSE,
        ({"axes": np.ones(3)}, "axes"),
        scale=lambda case: float(np.abs(case["axes"]).max()),
    ),
    Op(
        "slicegpt.slice_inputs",
        s.matrices().flatmap(
            lambda w: _cases(
                weight=st.just(w),
                gain=s.matrices(1, w.shape[1]).map(lambda g: g[0]),
                axes=s.matrices(rows=w.shape[1]),
            )
        ),
        Kind.CLOSE,
        ({"weight": W, "gain": np.ones(2), "axes": EYE}, "gain"),
        scale=lambda case: float(np.max(np.abs(case["weight"] * case["gain"]) @ np.abs(case["axes"]))),
    ),
    Op(
        "slicegpt.slice_outputs",
        s.matrices().flatmap(lambda w: _cases(weight=st.just(w), axes=s.matrices(rows=len(w)))),
        Kind.CLOSE,
        ({"weight": W, "axes": EYE}, "axes"),
        scale=lambda case: float(np.max(np.abs(case["axes"]).T @ np.abs(case["weight"]))),
    ),
    Op(
        "slicegpt.shortcut",
        s.matrices().flatmap(lambda w: _cases(before=st.just(w), after=s.matrices(rows=len(w)))),
        Kind.CLOSE,
        ({"before": W, "after": EYE}, "after"),
        scale=lambda case: float(np.max(np.abs(case["before"]).T @ np.abs(case["after"]))),
    ),
    Op(
        "slicegpt.sliced_norm",
        _cases(x=s.matrices(), width=st.integers(1, 40), eps=st.sampled_from([1e-6, 0.5])),
        Kind.CLOSE,
        ({"x": W, "width": 0, "eps": 1e-5}, "width"),
    ),
    Op(
        "continuation.next_token",
        s.predictions(),
        Kind.EXACT,
        ({"logits": EYE, "uniforms": ROW, "excluded": [0, 1, 2]}, "excluded"),
    ),
    Op(
        "continuation.continue_text",
        s.continuations(),
        Kind.EXACT,
        ({"predict": s.successor, "prompts": np.array([1]), "uniforms": EYE}, "prompts"),
    ),
    Op(
        "adapter.initial_rows",
        _cases(
            count=st.integers(0, 5), in_features=st.integers(1, 20), seed=st.lists(st.integers(0, 2**40), max_size=4)
        ),
        Kind.EXACT,
        ({"count": -1, "in_features": 4, "seed": (0,)}, "count"),
    ),
    Op("adapter.rebase", s.rebases(), Kind.CLOSE, ({"weight": W, "merged": W, "updated": W, "mask": W}, "mask")),
    Op("packed.pack", _cases(weight=s.weights_to_pack()), Kind.EXACT, ({"weight": np.ones(3)}, "weight")),
    Op("packed.unpack", s.packed_weights(), Kind.EXACT, ({**PACKED, "values": np.ones(3)}, "values")),
    Op("packed.check", s.packed_weights(), Kind.EXACT, ({**PACKED, "offsets": np.array([0, 1, 4])}, "offsets")),
    Op("packed.pack_codes", s.codes_to_pack(), Kind.EXACT, ({"codes": np.ones((1, 2), np.int8), "bits": 9}, "bits")),
    Op("packed.unpack_codes", s.packed_codes(), Kind.EXACT, ({**CODED, "codes": np.ones((1, 4))}, "codes")),
    Op(
        "packed.check_codes",
        s.packed_codes(scaled=True),
        Kind.EXACT,
        ({**CODED, "scales": np.full((1, 1), -1, np.float16)}, "scales"),
    ),
    Op(
        "packed.bits_per_weight",
        _cases(sparsity=s.SPARSITIES, value_bits=st.sampled_from([16, 32]), columns=st.integers(1, 10**5)),
        Kind.CLOSE,
        ({"sparsity": 0.5, "value_bits": 0, "columns": 8}, "value_bits"),
    ),
    Op("quantise.largest_code", _cases(bits=s.BITS), Kind.EXACT, ({"bits": 1}, "bits")),
    Op(
        "quantise.quantise_rows",
        _cases(weight=s.matrices(), bits=s.BITS, group=st.integers(1, 13)),
        Kind.EXACT,
        ({"weight": ROW, "bits": 4}, "weight"),
    ),
    Op(
        "quantise.dequantise_rows",
        s.coded_rows(),
        Kind.EXACT,
        ({"codes": np.ones((3, 2), np.int8), "scales": np.ones((2, 1))}, "codes"),
    ),
    Op(
        "quantise.group_scales",
        _cases(values=s.matrices(), bits=s.BITS),
        Kind.EXACT,
        ({"values": np.full((1, 2), 1e9), "bits": 8}, "values"),
    ),
    Op(
        "quantise.nearest_codes",
        s.scaled_values(),
        Kind.EXACT,
        ({"values": W, "scales": -np.ones(2), "bits": 4}, "scales"),
    ),
    Op(
        "quantise.quantise",
        _cases(values=s.matrices(rows=1).map(np.ravel), bits=s.BITS, group=st.integers(1, 13)),
        Kind.EXACT,
        ({"values": ROW, "bits": 9, "group": 2}, "bits"),
    ),
    Op(
        "quantise.dequantise",
        s.codes_and_scales(),
        Kind.EXACT,
        ({"codes": np.arange(3), "scales": np.ones(3), "group": 2}, "scales"),
    ),
    Op(
        "masks.first_token.weigh_first",
        _cases(inputs=s.matrices().map(lambda X: np.stack([X, 2 * X])), weight=st.floats(0, 100)),
        Kind.CLOSE,
        ({"inputs": np.ones((1, 2, 3)), "weight": -1.0}, "weight"),
        low_precision=True,
    ),
    Op(
        "quantise.bits_per_weight",
        _cases(sparsity=s.SPARSITIES, bits=s.BITS, columns=st.integers(1, 10**5), group=st.integers(1, 512)),
        Kind.CLOSE,
        ({"sparsity": 0.5, "bits": 4, "columns": 8, "group": 0}, "group"),
    ),
    Op("base.round_base", s.bases(), Kind.EXACT, ({"weight": ROW, "scales": None}, "weight")),
    Op("tiles.pack_tiles", _cases(weight=s.weights_to_tile()), Kind.EXACT, ({"weight": np.ones(3)}, "weight")),
    Op("tiles.unpack_tiles", s.tiled_weights(), Kind.EXACT, ({**TILED, "values": np.ones(3)}, "values")),
    Op(
        "code_tiles.pack_code_tiles",
        s.codes_to_tile(),
        Kind.EXACT,
        ({"codes": np.ones((1, 2), np.int8), "scales": np.ones((1, 2), np.float16), "bits": 8}, "scales"),
    ),
    Op(
        "code_tiles.unpack_code_tiles",
        s.tiled_codes(),
        Kind.EXACT,
        ({**CODE_TILED, "starts": np.zeros(3, np.int64)}, "starts"),
    ),
    Op(
        "gaps.pack_gaps",
        _cases(weight=s.weights_with_gaps(), section=SECTIONS),
        Kind.EXACT,
        ({"weight": np.ones((1, 2)), "section": 0}, "section"),
    ),
    Op("gaps.unpack_gaps", s.gapped_weights(), Kind.EXACT, ({**GAPPED, "order": np.ones(2, np.int64)}, "order")),
)
