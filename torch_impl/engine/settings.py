"""What decides a run's trajectory, and what one step of it leaves on record."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch_impl import _checks
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.rates import RULES, RateRule
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.masks import prune as masks
from torch_impl.masks.method import InputStatistic, Method
from torch_impl.masks.pattern import Pattern

MOST_STEPS = 1000
MOST_ALPHA = 1e6
MOST_WEIGHT = 1e6
DENSE, PACKED, INT8 = BASES = ("dense", "packed", "int8")
"""The forms of the base weights in training."""
RATIO, STRUCTURED_RATIO = 0.7, 0.2
"""Default sparsity: the paper's, and its authors' for whole heads and channels, of which 70 % would leave no working model."""


@dataclass(frozen=True)
class PruneConfig:
    """The pruning method, the target sparsity and the steps."""

    prune_method: str = "wanda"
    """Pruning method: {names}."""
    sparsity_ratio: float | None = None
    """Final share of zeros, in [0, 1); default 0.7, with sparsity_type structured 0.2, or the share implied by an N:M one."""
    sparsity_type: str = "unstructured"
    """unstructured; N:M: keep N of every M inputs (2:4, 2:8, ...); mixed-N:M: a few blocks keep one more or one
    fewer of every M, by their importance; structured: remove whole heads and MLP channels, for a smaller plain model."""
    channel_multiple: int = 8
    """With sparsity_type structured: the number of channels that a block's MLP keeps is a multiple of this."""
    dense_blocks: list[int] = field(default_factory=lambda: [0, 0])
    """How many blocks at the front and at the back are not pruned, such as 4 2 of 32 (default 0 0). The others are pruned so much
    more that the model reaches sparsity_ratio. Not for N:M. With sparsity_type structured, blocks then differ in size, so that
    the model is saved with its zeros."""
    steps: int = 5
    """T, the number of prune-and-train steps; 1 is one-shot pruning (paper: 5)."""
    first_token_weight: float = 1.0
    """How many times the first token of each calibration sequence counts when q, k and v are pruned. 1: as any token (as
    published). 10 to 50 helps sparsegpt on models that attend to that token most, as LLMs do; wanda gains nothing."""
    layer_sparsity: str = "rmi"
    """How the blocks share the sparsity: {names}. rmi is by mutual information (LoSA), uniform gives all the same. The default is
    rmi; with --finetune false or sparsity_type structured it is uniform, and rmi only if this option or a configuration file asks
    for it."""

    def __post_init__(self) -> None:
        _checks.choice("prune_method", self.prune_method, masks.METHODS)
        _checks.choice("layer_sparsity", self.layer_sparsity, RULES)
        _checks.count("steps", self.steps, most=MOST_STEPS)
        _checks.count("channel_multiple", self.channel_multiple)
        ratio = self.sparsity_ratio
        if ratio is not None and not 0 <= ratio < 1:
            meant = f"; did you mean {ratio / 100:g}?" if 2 <= ratio < 100 else ""
            raise ValueError(f"sparsity_ratio is {ratio}; allowed: 0 up to, not including, 1{meant}")
        if self.pattern.structured and self.method.structural_score is None:
            others = [method.name for method in masks.METHODS.values() if method.structural_score is not None]
            raise ValueError(
                f"prune_method is {self.prune_method!r}, which cannot score whole heads and channels; with sparsity_type "
                f"structured, use {' or '.join(others)}"
            )
        self._check_first_token_weight()
        self._check_dense_blocks()
        group = self.group
        if ratio is not None and group is not None and abs(ratio - self.final_sparsity) > 1e-9:
            raise ValueError(
                f"sparsity_ratio is {ratio}; allowed with sparsity_type {self.sparsity_type}: {self.final_sparsity}"
            )

    def _check_dense_blocks(self) -> None:
        given = self.dense_blocks
        if len(given) != 2:
            raise ValueError(f"dense_blocks has {len(given)} numbers; give two: blocks at the front and at the back")
        for number in given:
            _checks.integer("dense_blocks", number, 0)
        if any(given) and self.group is not None:
            raise ValueError(
                f"dense_blocks is {given}, and sparsity_type {self.sparsity_type} says how much every block keeps; leave one of "
                "them out"
            )

    def _check_first_token_weight(self) -> None:
        weight = self.first_token_weight
        if _checks.number("first_token_weight", weight, 0.0, MOST_WEIGHT) == 1:
            return
        if not isinstance(self.method.statistic, InputStatistic):
            others = [m.name for m in masks.METHODS.values() if isinstance(m.statistic, InputStatistic)]
            raise ValueError(
                f"first_token_weight is {weight:g}, and prune_method {self.prune_method} uses no statistics of inputs; leave it "
                f"out, or use {', '.join(others[:-1])} or {others[-1]}"
            )
        if self.pattern.structured:
            raise ValueError(
                f"first_token_weight is {weight:g}, and sparsity_type structured uses no statistics of the inputs of q, k and v; "
                "leave one of them out"
            )

    def prunes(self, index: int, blocks: int) -> bool:
        """Return whether block `index` of so many is pruned at all."""
        return self.dense_blocks[0] <= index < blocks - self.dense_blocks[1]

    @property
    def method(self) -> Method:
        """Return the record of `prune_method`."""
        return masks.METHODS[self.prune_method]

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
        if self.group is not None:
            return 1 - self.group[0] / self.group[1]
        if self.sparsity_ratio is None:
            return STRUCTURED_RATIO if self.pattern.structured else RATIO
        return self.sparsity_ratio


@dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapters and the allocation of their ranks."""

    lora_alpha: float = 16.0
    """α: the adapter is scaled by α / r₀."""
    lora_r: int = 8
    """r₀, the constant in the scale α / r₀; independent of the actual ranks."""
    initial_rank: int = 6
    """Mean rank at the first step; it grows by one each step (paper: 6)."""
    min_rank: int = 1
    """Lower bound on a block's rank."""
    max_rank: int = 16
    """Upper bound on a block's rank."""
    rank_allocation: str = "error"
    """error: allocate ranks by reconstruction error (LoSA); uniform: the mean rank for all blocks."""
    rank_shrink: str = "truncate"
    """truncate: drop surplus ranks (paper); fold: add them to the weight first."""
    adapted: str = "all"
    """Projections with adapters: all (LoSA), attention or mlp; the others are only pruned."""

    def __post_init__(self) -> None:
        _checks.choice("rank_allocation", self.rank_allocation, ("error", "uniform"))
        _checks.choice("rank_shrink", self.rank_shrink, ("truncate", "fold"))
        _checks.choice("adapted", self.adapted, ("all", "attention", "mlp"))
        _checks.count("lora_r", self.lora_r)
        _checks.count("max_rank", self.max_rank)
        if not 0 < self.lora_alpha <= MOST_ALPHA:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; allowed: above 0, up to {MOST_ALPHA:g}")
        if not 1 <= self.min_rank <= self.initial_rank <= self.max_rank:
            raise ValueError(
                f"initial_rank is {self.initial_rank}; allowed: min_rank {self.min_rank} (1 or more) "
                f"to max_rank {self.max_rank}"
            )

    @property
    def scale(self) -> float:
        """Return s = α / r₀."""
        return self.lora_alpha / self.lora_r

    def adapts(self, in_attention: bool) -> bool:
        """Return whether a projection has an adapter."""
        return self.adapted == "all" or in_attention == (self.adapted == "attention")


@dataclass(frozen=True)
class TrainingConfig:
    """Training of the adapters at each step."""

    finetune: bool = True
    """Train the adapters. false: prune in steps, without training; layer_sparsity is then uniform unless it is given."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW (paper: 2e-4 at 7B; small models need much more)."""
    warmup_ratio: float = 0.3
    """Share of the schedule with linear warm-up; the rest decays linearly to 0."""
    weight_decay: float = 0.001
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 0.3
    """Clip gradients to this global norm; 0: no clipping."""
    per_device_train_batch_size: int = 4
    """Sequences per micro-batch, in each process."""
    gradient_accumulation_steps: int = 2
    """Micro-batches per optimizer step. Several processes share the sequences of one optimizer step."""
    lr_schedule: str = "per_step"
    """per_step: warm up and decay the learning rate within every LoSA step (paper); whole_run: once over all steps."""
    loss: str = "ce"
    """ce: cross-entropy with the labels (paper); kl: KL divergence from the dense model's predictions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    hold_merged: str = "auto"
    """Keep all merged weights in memory during an optimizer step. on; off: rebuild them at each use, with less memory and
    more time; auto: on if they take at most half of the device's free memory, and train_base is dense."""
    train_base: str = "dense"
    """How the pruned base weights are kept while adapters are trained. dense; packed: without their zeros, same results; int8: kept
    values rounded to 8 bits as well. Each weight is unpacked when it is used: less memory, more time."""
    compile_blocks: str = "auto"
    """Compile the blocks with torch.compile for calibration and training: on, off or auto (on CUDA, from a billion prunable
    weights; off if train_base is not dense)."""
    cuda_graphs: bool = True
    """On CUDA, capture micro-batches of a recurring shape as CUDA graphs."""

    def __post_init__(self) -> None:
        _checks.choice("lr_schedule", self.lr_schedule, ("per_step", "whole_run"))
        _checks.choice("loss", self.loss, ("ce", "kl"))
        _checks.choice("hold_merged", self.hold_merged, ("auto", "on", "off"))
        _checks.choice("compile_blocks", self.compile_blocks, ("auto", "on", "off"))
        self._check_base()
        _checks.count("per_device_train_batch_size", self.per_device_train_batch_size)
        _checks.count("gradient_accumulation_steps", self.gradient_accumulation_steps)
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a finite number, 0 or more")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; allowed: 0 to 1")

    def _check_base(self) -> None:
        _checks.choice("train_base", self.train_base, BASES)
        if self.train_base == DENSE:
            return
        if not self.finetune:
            raise ValueError(
                f"train_base is {self.train_base!r} with finetune False; it is for training: leave one of them out"
            )
        for name, value in (("hold_merged", self.hold_merged), ("compile_blocks", self.compile_blocks)):
            if value == "on":
                raise ValueError(
                    f"{name} is 'on' with train_base {self.train_base}, which unpacks a weight at each use; use auto or off"
                )

    @property
    def compressed(self) -> bool:
        """Return whether base weights are compressed while adapters are trained."""
        return self.train_base != DENSE

    @property
    def compiling(self) -> str:
        """Return `compile_blocks`: off with compressed base weights, whose unpacking interrupts a compiled block."""
        return "off" if self.compressed else self.compile_blocks

    @property
    def batch_size(self) -> int:
        """Return the number of sequences per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def optimizer_steps(self, examples: int) -> int:
        """Return the number of optimizer steps of one epoch over `examples` sequences."""
        return math.ceil(examples / self.batch_size)


@dataclass(frozen=True)
class Settings:
    """All settings that determine a run's result, apart from model, tokens and machine."""

    prune: PruneConfig = field(default_factory=PruneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.training.compressed and self.prune.pattern.structured:
            raise ValueError(
                f"train_base is {self.training.train_base!r} with sparsity_type structured, which leaves no zeros to pack; use "
                "train_base dense"
            )
        last = self.adapter.initial_rank + self.prune.steps - 1
        if self.training.finetune and last > self.adapter.max_rank:
            raise ValueError(
                f"steps is {self.prune.steps}, so the mean rank would reach {last}, above max_rank "
                f"{self.adapter.max_rank}; use fewer steps, a lower initial_rank or a higher max_rank"
            )

    @property
    def mean_rank(self) -> int:
        """Return the mean rank over all steps, rounded down: the one rank of methods that train once."""
        return self.adapter.initial_rank + (self.prune.steps - 1) // 2

    def without_reconstruction(self) -> Settings:
        """Return the same settings without reconstruction."""
        return replace(self, reconstruction=ReconstructionConfig())
