"""The whole of LoSA, Algorithm 1: from dense weights and token ids to sparse merged weights.

    for t = 1 .. T:
        importance of each block: the less its output shares with other blocks', the higher   hsic.py, rmi.py
        sparsity of each block, from its importance and this step's target                    schedule.py, rates.py, sparsity.py
        block by block, after the pruned ones: prune, reconstruct; error of its output        masks/, reconstruct.py, rank.py
        rank of each block, from its error; resize its adapters                               rank.py
        train the adapters on the t-th part of the examples, once anything is pruned          llama.py, adamw.py
    merge                                                                                     adapter.py

`run` is this box. The functions above it are its lines, in the order and with the names of torch_impl/losa.py, so that the
two files can be read side by side. Nothing is changed in place: each line takes a state and returns the next one.

Legend: L blocks; n calibration sequences of t tokens; a projection has weight (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from reference import _checks, adamw, adapter, llama, rank, reconstruct, schedule, sparsity
from reference._checks import Array, Mask
from reference.llama import Block, Ids, Llama
from reference.llm_pruner import structure_sum
from reference.masks import structured
from reference.masks.first_token import weigh_first
from reference.masks.method import Method
from reference.masks.nm import kept_per_group
from reference.masks.pattern import Pattern
from reference.masks.prune import METHODS, prune
from reference.masks.select import rest_sparsity
from reference.rates import RULES, RateRule

ATTENTION = ("q", "k", "v", "o")

Example = dict[str, Ids]
"""One training sequence: input_ids (t,) and labels (t,); the loss ignores tokens with label `llama.IGNORED`."""


@dataclass(frozen=True)
class Settings:
    """All that determines a run, apart from model and tokens. Names and defaults are those of torch_impl/engine/settings.py.

    prune_method: a name in masks/prune.py. sparsity_ratio: final share of zeros, for an unstructured pattern.
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


@dataclass(frozen=True)
class AdaptedLinear:
    """One projection: its frozen weight (out, in), zero where pruned, and its adapter A (r, in), B (out, r)."""

    weight: Array
    A: Array
    B: Array

    @property
    def mask(self) -> Mask:
        """Return the mask, bool (out, in), True = kept."""
        return self.weight != 0

    def merged(self, scale: float) -> Array:
        """Return M⊙(W + s·BA)."""
        return adapter.effective_weight(self.weight, self.A, self.B, scale)


Layers = dict[str, AdaptedLinear]
"""The projections of one block, by name, in order of use."""


@dataclass(frozen=True)
class StepRecord:
    """The decisions, measurements and result of one step. Lists have one entry per block; losses has one per optimizer step.

    losses: empty if nothing is trained at this step (see `_nothing_to_train`).
    """

    step: int
    target: float
    importance: list[float]
    sparsity: list[float]
    realised: list[float]
    errors: list[float]
    ranks: list[int]
    losses: list[float]
    layers: list[Layers]


def attach_adapters(model: Llama) -> list[Layers]:
    """Give every projection of every block an adapter of rank 0."""
    return [
        {name: AdaptedLinear(w, np.zeros((0, w.shape[1])), np.zeros((len(w), 0))) for name, w in block.weights.items()}
        for block in model.blocks
    ]


def merge_adapters(model: Llama, layers: Sequence[Layers], scale: float) -> Llama:
    """Merge all adapters: return the model with projections M⊙(W + s·BA). This model is saved.

    Source: LoSA, Eq. 1. model: all but the projections is taken from it. layers: one entry per block. scale: s.
    Returns: a plain model, its weights exactly zero where pruned. *Deviation*: none.
    """
    return model.with_weights([{name: layer.merged(scale) for name, layer in of_block.items()} for of_block in layers])


def _zero_shares(layers: Sequence[Layers]) -> Array:
    """Compute the share of zeros in each block's projections (L,)."""
    return np.array([(~np.concatenate([p.mask.ravel() for p in block.values()])).mean() for block in layers])


def _block_targets(
    settings: Settings, target: float, importance: Array | None, weights: Array, previous: Array
) -> tuple[Array, list[tuple[int, int] | None]]:
    """Choose the sparsity of each block (L,) at this step (LoSA, Eq. 5), and its N:M if the pattern has one."""
    blocks = len(weights)
    if settings.group is None:
        first, last = settings.dense_blocks
        inner, middle = sparsity.middle_sparsity(target, weights, previous, first, last), slice(first, blocks - last)
        rates, of_middle = previous.copy(), None if importance is None else importance[middle]
        rates[middle] = settings.rule.allocate(of_middle, inner, weights[middle], previous[middle])
        return rates, [None] * blocks
    m = settings.group[1]
    kept = np.full(blocks, kept_per_group(target, m))
    if settings.pattern.mixed and importance is not None:
        ceiling = np.rint((1 - previous) * m).astype(np.int64)
        moves = sparsity.even_moves(schedule.sparsity_spread(target), blocks, m)
        kept = sparsity.allocate_kept(importance, int(kept.sum()), m, ceiling=ceiling, moves=moves)
    return 1 - kept / m, [(int(n), m) for n in kept]


def _gather(settings: Settings, inputs: dict[str, Array], name: str) -> Array | None:
    """Compute the statistic that the method needs of a projection's calibration input (n, t, in)."""
    if settings.method.statistic is None:
        return None
    source = llama.INPUT_OF[name]
    X = weigh_first(inputs[source], settings.first_token_weight if source == "qkv" else 1.0)
    return settings.method.statistic(X, len(inputs[source]))


def _gather_gradients(model: Llama, ids: Ids, method: Method) -> list[dict[str, Array]] | None:
    """Compute the statistic that `method` needs of the gradients by each projection of the current, merged model."""
    if method.gradient_statistic is None:
        return None
    apart = [llama.weight_gradients(model, row[None]) for row in ids]
    return [
        {name: method.gradient_statistic(np.stack([of_row[index][name] for of_row in apart])) for name in block.weights}
        for index, block in enumerate(model.blocks)
    ]


def _prune_block(
    block: Block,
    layers: Layers,
    stream: Array,
    model: Llama,
    settings: Settings,
    rate: float,
    nm: tuple[int, int] | None,
    gradients: dict[str, Array] | None,
    last: bool,
) -> Layers:
    """Prune the projections of one block further. All statistics come from the block before this pruning.

    gradients: the statistic of each projection's gradients, for a method that needs it. last: whether this is the last step.
    """
    trace = llama.block_forward(block, stream, model.sizes)
    if settings.pattern.structured:
        return _prune_structures(block, layers, trace, model.sizes.kv_heads, settings, rate, gradients, last)
    # A projection that is already sparser reduces the share of the others.
    masks = [layer.mask for layer in layers.values()]
    rate = rest_sparsity(np.array([(~mask).sum() for mask in masks]), np.array([mask.size for mask in masks]), rate)
    pruned = {}
    for name, layer in layers.items():
        merged = block.weights[name]
        statistic = _gather(settings, trace.inputs, name) if gradients is None else gradients[name]
        share = rate if nm is None else None
        updated, mask = prune(settings.prune_method, merged, statistic, layer.mask, sparsity=share, nm=nm)
        pruned[name] = replace(layer, weight=adapter.rebase(layer.weight, merged, updated, mask))
    return pruned


def _prune_structures(
    block: Block,
    layers: Layers,
    trace: llama.BlockTrace,
    heads: int,
    settings: Settings,
    rate: float,
    gradients: dict[str, Array] | None,
    last: bool,
) -> Layers:
    """Remove key-value heads and channels of one block further, and with them all that belongs to them."""
    channels = block.weights[structured.READS_CHANNELS].shape[1]
    of_head = sum(block.weights[name].size for name in structured.BY_HEAD) // heads
    of_channel = sum(block.weights[name].size for name in structured.BY_CHANNEL) // channels
    gone = structured.removed_structures(rate, heads, channels, of_head, of_channel, settings.channel_multiple, last)
    kept = {}
    for name, count, many in zip(
        (structured.READS_HEADS, structured.READS_CHANNELS), (heads, channels), gone, strict=True
    ):
        score = _structure_score(block, trace, settings, gradients, name, count)
        kept[name] = structured.structure_mask(score, many, structured.kept_structures(layers[name].mask, count))
    pruned = {}
    for name, layer in layers.items():
        reader = structured.READS_HEADS if name in structured.BY_HEAD else structured.READS_CHANNELS
        mask = structured.coupled_mask(kept[reader], layer.weight.shape, structured.AXES[name])
        pruned[name] = replace(layer, weight=np.where(mask, layer.weight, 0.0))
    return pruned


def _structure_score(
    block: Block, trace: llama.BlockTrace, settings: Settings, gradients: dict[str, Array] | None, name: str, count: int
) -> Array:
    """Score the `count` structures that projection `name` reads, as the method does: by it alone or by all that go with it."""
    score = settings.method.structural_score
    assert score is not None
    if not settings.method.sums_structures:
        return structured.structure_score(score(block.weights[name], _gather(settings, trace.inputs, name)), count)
    assert gradients is not None
    coupled = structured.BY_HEAD if name in structured.BY_HEAD else structured.BY_CHANNEL
    parts = [structure_sum(score(block.weights[n], gradients[n]), count, axis) for n, axis in coupled.items()]
    return np.asarray(np.sum(parts, axis=0))


def _prune_model(
    dense: Llama,
    layers: Sequence[Layers],
    ids: Ids,
    settings: Settings,
    rates: Array,
    groups: Sequence[tuple[int, int] | None],
    gradients: list[dict[str, Array]] | None = None,
    last: bool = True,
) -> tuple[list[Layers], list[float]]:
    """Prune block by block, with dense and pruned streams in lockstep. Also return e of LoSA, Eq. 6, of every block.

    A stream is the hidden states of all calibration sequences between two blocks. last: whether this is the last step.
    """
    dense_stream = dense.embedding[ids]
    hidden = dense.sizes.hidden
    pruned: list[Layers] = []
    # The pruned stream before each block of `pruned`, and before the next.
    streams, errors = [dense_stream], []
    damaged: int | None = None
    for index, dense_block in enumerate(dense.blocks):
        block = _merged_block(dense_block, layers[index], settings)
        of_block = None if gradients is None else gradients[index]
        done = layers[index]
        if settings.prunes(index, len(layers)):
            done = _prune_block(
                block, layers[index], streams[-1], dense, settings, rates[index], groups[index], of_block, last
            )
        dense_stream = llama.block_forward(dense_block, dense_stream, dense.sizes).output
        pruned.append(done)
        # Until a block has lost a weight, the streams are equal up to rounding, and there is nothing to reconstruct.
        if damaged is None and any(
            (layer.mask != (dense_block.weights[name] != 0)).any() for name, layer in done.items()
        ):
            damaged = index
        first = index
        if settings.reconstruct_epochs and damaged is not None:
            first = max(damaged, index + 1 - settings.reconstruct_window)
            window = slice(first, index + 1)
            pruned[window] = _reconstruct_blocks(
                dense.blocks[window], pruned[window], streams[first], dense_stream, dense, settings
            )
        del streams[first + 1 :]
        for number in range(first, index + 1):
            merged = _merged_block(dense.blocks[number], pruned[number], settings)
            streams.append(llama.block_forward(merged, streams[-1], dense.sizes).output)
        errors.append(rank.reconstruction_error(dense_stream.reshape(-1, hidden), streams[-1].reshape(-1, hidden)))
    return pruned, errors


def _reconstruct_blocks(
    blocks: Sequence[Block],
    layers: Sequence[Layers],
    stream: Array,
    targets: Array,
    model: Llama,
    settings: Settings,
) -> list[Layers]:
    """Train the kept merged weights of pruned blocks together; add the changes to their base weights."""
    merged = [_merged_block(block, of_block, settings) for block, of_block in zip(blocks, layers, strict=True)]
    better = reconstruct.reconstruct_blocks(
        merged,
        [{name: layer.mask for name, layer in of_block.items()} for of_block in layers],
        stream,
        targets,
        settings.reconstruct_epochs,
        settings.reconstruct_learning_rate,
        settings.reconstruct_batch_size,
        model.sizes,
    )
    return [
        {
            name: replace(layer, weight=adapter.rebase(layer.weight, old.weights[name], new.weights[name], layer.mask))
            for name, layer in of_block.items()
        }
        for of_block, old, new in zip(layers, merged, better, strict=True)
    ]


def _merged_block(block: Block, layers: Layers, settings: Settings) -> Block:
    return replace(block, weights={name: layer.merged(settings.scale) for name, layer in layers.items()})


def _allocate_ranks(settings: Settings, step: int, errors: Sequence[float]) -> list[int]:
    """Allocate r of LoSA, Eq. 7, to every block."""
    mean = schedule.mean_rank(step, settings.initial_rank)
    if settings.rank_allocation == "uniform":
        return [mean] * len(errors)
    allocated = rank.allocate_ranks(np.array(errors), mean, min_rank=settings.min_rank, max_rank=settings.max_rank)
    return [int(r) for r in allocated]


def _resize(layers: Sequence[Layers], ranks: Sequence[int], step: int, settings: Settings) -> list[Layers]:
    """Give all adapted projections of a block its rank. New rows depend only on run, step, block and projection."""
    return [
        {
            name: _resize_layer(layer, ranks[index], (settings.seed, step, index, number), settings)
            if settings.adapts(name)
            else layer
            for number, (name, layer) in enumerate(of_block.items())
        }
        for index, of_block in enumerate(layers)
    ]


def _resize_layer(layer: AdaptedLinear, new_rank: int, seed: tuple[int, ...], settings: Settings) -> AdaptedLinear:
    weight, A, B = layer.weight, layer.A, layer.B
    if settings.rank_shrink == "fold" and new_rank < len(A):
        weight = rank.fold_adapter(weight, A, B, new_rank, settings.scale)
    new_rows = adapter.initial_rows(max(0, new_rank - len(A)), A.shape[1], seed)
    return AdaptedLinear(weight, *rank.resize_adapter(A, B, new_rank, new_rows))


def _lr_positions(parts: Sequence[Sequence[Example]], settings: Settings) -> list[tuple[int, int]]:
    """Return (optimizer steps done, total optimizer steps) of the learning-rate schedule at the start of each step."""
    counts = [math.ceil(len(part) / settings.batch_size) for part in parts]
    if settings.lr_schedule == "per_step":
        return [(0, count) for count in counts]
    return [(sum(counts[:t]), sum(counts)) for t in range(len(counts))]


def _nothing_to_train(model: Llama, layers: Sequence[Layers], settings: Settings) -> bool:
    """Return whether the loss is kl and no weight is pruned yet, so that the model still equals the dense one.

    This happens at step 1 of 5 with 1:2, say. The gradient is then 0 up to rounding. In float32 the rounding is larger than
    Adam's ε, and Adam divides by the gradient's size, so it would take full steps in random directions. Such a step trains
    nothing: its examples are skipped, and the learning-rate schedule continues after them. With labels (loss ce) the gradient
    is more than rounding, so training takes place.
    """
    unchanged = all(
        np.array_equal(layer.weight, block.weights[name])
        for block, of_block in zip(model.blocks, layers, strict=True)
        for name, layer in of_block.items()
    )
    return settings.loss == "kl" and unchanged


def _parameters(layers: Sequence[Layers]) -> list[Array]:
    """List the trained parameters: A and B of every projection, in order."""
    return [P for of_block in layers for layer in of_block.values() for P in (layer.A, layer.B)]


def _with_parameters(layers: Sequence[Layers], parameters: Sequence[Array]) -> list[Layers]:
    values = iter(parameters)
    return [
        {name: AdaptedLinear(layer.weight, A=next(values), B=next(values)) for name, layer in of_block.items()}
        for of_block in layers
    ]


def _train(
    dense: Llama, layers: list[Layers], examples: Sequence[Example], settings: Settings, position: tuple[int, int]
) -> tuple[list[Layers], list[float]]:
    """Train one epoch over `examples` in order, with a fresh optimizer. Also return the loss of every optimizer step."""
    done, total = position
    moments = adamw.start(_parameters(layers))
    losses = []
    for step, start in enumerate(range(0, len(examples), settings.batch_size)):
        batch = examples[start : start + settings.batch_size]
        rate = settings.learning_rate * adamw.lr_factor(done + step, total, settings.warmup_ratio)
        loss, gradients = _loss_and_gradients(dense, layers, batch, settings)
        clipped, norm = adamw.clip_by_global_norm(gradients, settings.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"optimizer step {step + 1}: loss {loss}, gradient norm {norm}")
        trained, moments = adamw.adamw(_parameters(layers), clipped, moments, rate, settings.weight_decay)
        layers = _with_parameters(layers, trained)
        losses.append(loss)
    return layers, losses


def _loss_and_gradients(
    dense: Llama, layers: Sequence[Layers], batch: Sequence[Example], settings: Settings
) -> tuple[float, list[Array]]:
    """Compute the mean loss per predicted token of one optimizer step, and its gradients by the trained parameters.

    Sequences pass the model one by one. The loss is a sum over tokens, so batching and padding would not change it.
    """
    model = merge_adapters(dense, layers, settings.scale)
    count = max(1, sum(llama.label_count(example["labels"][None]) for example in batch))
    loss = 0.0
    gradients = [np.zeros_like(P) for P in _parameters(layers)]
    for example in batch:
        ids, labels = example["input_ids"][None], example["labels"][None]
        trace = llama.forward(model, ids)
        if settings.loss == "kl":
            total, grad_logits = llama.kl_divergence(trace.logits, llama.forward(dense, ids).logits, labels)
        else:
            total, grad_logits = llama.cross_entropy(trace.logits, labels)
        loss += total / count
        contributions = _adapter_gradients(layers, trace, llama.backward(model, trace, grad_logits / count), settings)
        gradients = [G + more for G, more in zip(gradients, contributions, strict=True)]
    return loss, gradients


def _adapter_gradients(
    layers: Sequence[Layers], trace: llama.Trace, grads: Sequence[dict[str, Array]], settings: Settings
) -> list[Array]:
    """Compute ∂loss/∂A and ∂loss/∂B of every projection, in order, from ∂loss/∂y of its output."""
    gradients: list[Array] = []
    for of_block, block_trace, grad in zip(layers, trace.blocks, grads, strict=True):
        for name, layer in of_block.items():
            x = block_trace.inputs[llama.INPUT_OF[name]]
            gradients += adapter.masked_lora_grad(x, layer.weight, layer.A, layer.B, settings.scale, grad[name])[1:]
    return gradients


def check_model(model: Llama, settings: Settings) -> None:
    """Check that the settings work with this model.

    Errors: ValueError for values that are not finite, for fewer blocks than layer_sparsity needs, for a projection whose
    number of inputs is not a multiple of M, for an MLP with fewer channels than channel_multiple, or if dense_blocks leaves
    no block to prune.
    """
    _checks.array("embedding", model.embedding, "v", "d")
    _checks.array("norm", model.norm, "d")
    _checks.array("head", model.head, "v", "d")
    if len(model.blocks) < (least := settings.rule.least_blocks):
        raise ValueError(
            f"layer_sparsity {settings.layer_sparsity!r} needs {least} or more blocks, and the model has "
            f"{len(model.blocks)}; use another layer_sparsity"
        )
    if sum(settings.dense_blocks) >= len(model.blocks):
        raise ValueError(
            f"dense_blocks is {settings.dense_blocks}; allowed: together fewer than {len(model.blocks)}, the model's blocks"
        )
    for index, block in enumerate(model.blocks):
        norms = {"attention_norm": block.attention_norm, "mlp_norm": block.mlp_norm}
        for name, gains in (norms | {f"bias of {name}": bias for name, bias in block.biases.items()}).items():
            _checks.array(f"block {index}, {name}", gains, "out")
        for name, weight in block.weights.items():
            _checks.array(f"block {index}, {name}", weight, "out", "in")
            if settings.pattern.structured and name == "down" and weight.shape[1] < settings.channel_multiple:
                raise ValueError(
                    f"channel_multiple is {settings.channel_multiple}; allowed: 1 to {weight.shape[1]}, the channels of the MLP of "
                    f"block {index}"
                )
            if settings.group is not None and weight.shape[1] % settings.group[1]:
                raise ValueError(
                    f"sparsity_type is {settings.sparsity_type!r} and block {index}, {name} has {weight.shape[1]} "
                    f"inputs; allowed: a multiple of {settings.group[1]}"
                )


def _initial_sparsity(layers: Sequence[Layers], weights: Array, settings: Settings) -> tuple[float, Array]:
    """Measure the initial sparsity: s₀ of Eq. 8, and that of each block (L,)."""
    rates = _zero_shares(layers)
    initial = float((weights * rates).sum() / weights.sum())
    if initial > settings.final_sparsity + 1e-3:
        raise ValueError(
            f"sparsity_ratio is {settings.final_sparsity}; allowed: {initial:.4f} or more, the model's own sparsity"
        )
    if initial < 1e-3:  # a few exact zeros in a dense checkpoint do not come from pruning
        return 0.0, np.zeros_like(rates)
    return min(initial, settings.final_sparsity), rates


def run(
    model: Llama, calibration_ids: Ids, parts: Sequence[Sequence[Example]], settings: Settings
) -> tuple[Llama, list[StepRecord]]:
    """Prune and adapt a model.

    Source: LoSA, Algorithm 1. calibration_ids: token ids (n, t). parts: T lists of training examples, one per step; not
    empty if fine-tuning is on.
    Returns: the merged model, zero where pruned, and a record of every step. Ties and rounding: as its parts.
    Errors: see `check_model`; ValueError if parts do not match the steps, or if the model is already sparser than the
    target; FloatingPointError if training diverges.
    *Deviation*: as its parts. The published code trains the last step on six times as many examples, some of them of step 4.

    Example: three blocks with weights (1, 2; 3, 4) lose the smaller half, 1 and 2; nothing is trained:

    >>> block = Block(np.ones(2), np.ones(2), {name: np.array([[1.0, 2], [3, 4]]) for name in llama.PROJECTIONS})
    >>> sizes = llama.Sizes(vocabulary=2, hidden=2, intermediate=2, heads=1, kv_heads=1)
    >>> dense = Llama(sizes, np.eye(2), (block,) * 3, np.ones(2), np.eye(2))
    >>> settings = Settings("magnitude", 0.5, steps=1, layer_sparsity="uniform", finetune=False)
    >>> merged, [record] = run(dense, np.array([[0, 1]]), [], settings)
    >>> merged.blocks[2].weights["down"], record.realised
    (array([[0., 0.],
           [3., 4.]]), [0.5, 0.5, 0.5])
    """
    check_model(model, settings)
    if settings.finetune and (len(parts) != settings.steps or not all(parts)):
        sizes = [len(part) for part in parts]
        raise ValueError(f"parts has {len(parts)} parts of {sizes} examples; give {settings.steps} parts, none empty")
    layers = attach_adapters(model)
    weights = np.array([sum(layer.weight.size for layer in of_block.values()) for of_block in layers], dtype=np.float64)
    initial, rates = _initial_sparsity(layers, weights, settings)
    positions = _lr_positions(parts, settings)
    records = []
    for step in range(1, settings.steps + 1):
        target = schedule.cubic_sparsity(step, settings.steps, settings.final_sparsity, initial)
        importance = None
        if (measure := settings.rule.measure) is not None:
            current = merge_adapters(model, layers, settings.scale)
            importance = measure(current, calibration_ids[: settings.rmi_samples], target)
        rates, groups = _block_targets(settings, target, importance, weights, rates)
        gradients = _gather_gradients(merge_adapters(model, layers, settings.scale), calibration_ids, settings.method)
        last = step == settings.steps
        layers, errors = _prune_model(model, layers, calibration_ids, settings, rates, groups, gradients, last)
        ranks: list[int] = []
        losses: list[float] = []
        if settings.finetune:
            ranks = _allocate_ranks(settings, step, errors)
            layers = _resize(layers, ranks, step, settings)
            if not _nothing_to_train(model, layers, settings):
                layers, losses = _train(model, layers, parts[step - 1], settings, positions[step - 1])
        records.append(
            StepRecord(
                step=step,
                target=target,
                importance=[] if importance is None else importance.tolist(),
                sparsity=rates.tolist(),
                realised=_zero_shares(layers).tolist(),
                errors=errors,
                ranks=ranks,
                losses=losses,
                layers=layers,
            )
        )
    return merge_adapters(model, layers, settings.scale), records
