"""All that determines a run, apart from model and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from reference import _checks
from reference.masks.method import Method
from reference.masks.pattern import Pattern
from reference.masks.prune import METHODS
from reference.rates import RULES, RateRule

ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Settings:
    """All that determines a run, apart from model and tokens. Names and defaults are those of torch_impl/engine/settings.py.

    prune_method: a name in masks/prune.py. sparsity_ratio: final share of zeros; an N:M pattern has its own.
    sparsity_type: unstructured, N:M, mixed-N:M or structured, which needs a method with a `structural_score`. channel_multiple:
    of which the number of channels that a structured block keeps is one. dense_blocks: how many blocks are not pruned, at the
    front and at the back; not for N:M. first_token_weight: see masks/first_token.py; 1 (paper)
    counts all tokens alike. steps: T. layer_sparsity: a name in rates.py; rmi is LoSA's.
    lora_alpha, lora_r: α and r₀ of the scale s = α / r₀. initial_rank: mean rank at step 1. min_rank, max_rank: bounds.
    rank_allocation: error (LoSA) or uniform. rank_shrink: truncate (paper) or fold the dropped ranks into the weight.
    adapted: the projections with adapters: all (LoSA), attention or mlp; the others are only pruned.
    rmi_samples: calibration sequences that measure the blocks' importance. finetune: train the adapters. learning_rate: peak.
    warmup_ratio, weight_decay, max_grad_norm: see adamw.py. batch_size: sequences per optimizer step. lr_schedule: per_step
    (paper) or whole_run. loss: ce (paper) or kl. seed: of the adapters' new rows. reconstruct_epochs: epochs over the
    calibration sequences for each block after it is pruned; 0 (paper): no reconstruction. reconstruct_learning_rate,
    reconstruct_batch_size: see reconstruct.py. reconstruct_window: blocks trained together, the pruned one and those before it.
    """

    prune_method: str = "wanda"
    sparsity_ratio: float = 0.7
    sparsity_type: str = "unstructured"
    channel_multiple: int = 8
    dense_blocks: tuple[int, int] = (0, 0)
    first_token_weight: float = 1.0
    steps: int = 5
    layer_sparsity: str = "rmi"
    lora_alpha: float = 16.0
    lora_r: int = 8
    initial_rank: int = 6
    min_rank: int = 1
    max_rank: int = 16
    rank_allocation: str = "error"
    rank_shrink: str = "truncate"
    adapted: str = "all"
    rmi_samples: int = 64
    finetune: bool = True
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.3
    weight_decay: float = 0.001
    max_grad_norm: float = 0.3
    batch_size: int = 8
    lr_schedule: str = "per_step"
    loss: str = "ce"
    reconstruct_epochs: int = 0
    reconstruct_learning_rate: float = 3e-3
    reconstruct_batch_size: int = 8
    reconstruct_window: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("prune_method", tuple(METHODS)),
            ("layer_sparsity", tuple(RULES)),
            ("rank_allocation", ("error", "uniform")),
            ("rank_shrink", ("truncate", "fold")),
            ("adapted", ("all", "attention", "mlp")),
            ("lr_schedule", ("per_step", "whole_run")),
            ("loss", ("ce", "kl")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.pattern.structured and self.method.structural_score is None:
            others = [method.name for method in METHODS.values() if method.structural_score is not None]
            raise ValueError(
                f"prune_method is {self.prune_method!r}; allowed with sparsity_type structured: {', '.join(others)}"
            )
        weighs = _checks.number("first_token_weight", self.first_token_weight, 0.0) != 1
        if weighs and (self.method.statistic is None or self.pattern.structured):
            raise ValueError(
                f"first_token_weight is {self.first_token_weight}; allowed with prune_method {self.prune_method} and "
                f"sparsity_type {self.sparsity_type}: 1, as no statistic of the inputs of attention is used"
            )
        self._check_dense_blocks()
        if not 0 <= self.sparsity_ratio < 1:
            raise ValueError(f"sparsity_ratio is {self.sparsity_ratio}; allowed: 0 up to, not including, 1")
        _checks.integer("rmi_samples", self.rmi_samples, 2)
        _checks.integer("reconstruct_epochs", self.reconstruct_epochs, 0)
        for name in (
            "steps",
            "channel_multiple",
            "lora_r",
            "batch_size",
            "reconstruct_batch_size",
            "reconstruct_window",
        ):
            _checks.integer(name, getattr(self, name), 1)
        if _checks.number("lora_alpha", self.lora_alpha) <= 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; allowed: above 0")
        _checks.integer("initial_rank", self.initial_rank, max(1, self.min_rank), self.max_rank)
        if self.finetune:
            _checks.integer("steps", self.steps, 1, self.max_rank - self.initial_rank + 1)

    def _check_dense_blocks(self) -> None:
        for blocks in self.dense_blocks:
            _checks.integer("dense_blocks", blocks, 0)
        if any(self.dense_blocks) and self.group is not None:
            raise ValueError(
                f"dense_blocks is {self.dense_blocks}; allowed with sparsity_type {self.sparsity_type}: (0, 0), as its N says how "
                "much every block keeps"
            )

    @property
    def method(self) -> Method:
        """Return the record of `prune_method`."""
        return METHODS[self.prune_method]

    @property
    def rule(self) -> RateRule:
        """Return the record of `layer_sparsity`."""
        return RULES[self.layer_sparsity]

    @property
    def pattern(self) -> Pattern:
        """Return the pattern of `sparsity_type`."""
        return Pattern.parse(self.sparsity_type)

    @property
    def group(self) -> tuple[int, int] | None:
        """Return (N, M) of an N:M pattern, None if unstructured."""
        return self.pattern.group

    @property
    def final_sparsity(self) -> float:
        """Return the final share of zeros."""
        return self.sparsity_ratio if self.group is None else 1 - self.group[0] / self.group[1]

    @property
    def scale(self) -> float:
        """Return s = α / r₀, the same at every rank."""
        return self.lora_alpha / self.lora_r

    def prunes(self, index: int, blocks: int) -> bool:
        """Return whether block `index` of so many is pruned at all."""
        return self.dense_blocks[0] <= index < blocks - self.dense_blocks[1]

    def adapts(self, name: str) -> bool:
        """Return whether a projection has an adapter."""
        return self.adapted == "all" or (name in ATTENTION) == (self.adapted == "attention")
