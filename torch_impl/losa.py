"""Algorithm 1 of LoSA on a Hugging Face decoder model. Read side by side with reference/losa.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torch_impl import adapter, rank, schedule, sparsity
from torch_impl.engine import calibration, distributed, finite, statistics, training
from torch_impl.engine.adapted_linear import attach_adapters, block_adapters, holding
from torch_impl.engine.batches import Example
from torch_impl.engine.checkpoints import fsdp
from torch_impl.engine.checkpoints.contents import check_finite
from torch_impl.engine.families import Family, decoder_blocks, find_family, prunable_weights, weight_of
from torch_impl.engine.lockstep import Lockstep, Reconstruct, reconstruction_error
from torch_impl.engine.memory import halving
from torch_impl.engine.rates import RULES, Measure
from torch_impl.engine.reconstruction import ReconstructionConfig, reconstruct_block
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume.journal import Journal, Progress
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig
from torch_impl.masks import prune as masks
from torch_impl.masks.method import InputStatistic
from torch_impl.masks.nm import kept_per_group
from torch_impl.masks.select import rest_sparsity

logger = logging.getLogger(__name__)

Observer = Callable[[StepRecord], None]


@torch.no_grad()
def measure_importance(
    model: nn.Module, family: Family, measure: Measure, ids: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Measure the importance (L,) of every block of the current model from token ids (n, tokens); keep no features."""
    stream = calibration.start_stream(model, family, distributed.share(ids, "rmi_samples"), batch_size)
    for index, block in enumerate(_blocks_shown(decoder_blocks(model, family), "importance")):
        with distributed.whole(block), holding(list(block_adapters(block, family).values())):
            measure.advance(stream, block, index)
    return distributed.agreed(measure.importance())


def _blocks_shown(blocks: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar, in the process that prints."""
    return tqdm(blocks, desc=description, total=total, leave=False, disable=not distributed.leads())


def zero_share(block: nn.Module, family: Family) -> float:
    """Share of zeros of a block's projections."""
    weights = [weight_of(block, name) for name in family.projections]
    zeros = distributed.total_of(sum(int((distributed.local(weight) == 0).sum()) for weight in weights))
    return zeros / sum(weight.numel() for weight in weights)


def _measure_importance(
    model: nn.Module, family: Family, ids: torch.Tensor, settings: Settings, progress: Progress
) -> torch.Tensor | None:
    """`measure_importance` on the sequences asked for, in batches that fit into memory; None if the rule measures nothing."""
    if (measure := settings.prune.rule.measure) is None:
        return None
    size = progress.calibration_batch_size or settings.calibration.calibration_batch_size
    importance, progress.calibration_batch_size = halving(
        lambda size: measure_importance(model, family, measure(family), ids[: settings.calibration.rmi_rows], size),
        size,
        "calibration_batch_size",
    )
    return importance


def _zero_shares(model: nn.Module, family: Family) -> torch.Tensor:
    """Share of zeros of each block's projections, float64 (L,)."""
    return torch.tensor([zero_share(block, family) for block in decoder_blocks(model, family)], dtype=torch.float64)


def initial_rates(shares: torch.Tensor, weights: torch.Tensor, config: PruneConfig) -> tuple[float, torch.Tensor]:
    """(share of zeros, that of each block (L,)) that a run starts from, by what its model has and its block sizes.

    Errors: ValueError if the model is already sparser than asked.
    """
    initial = float((weights * shares).sum() / weights.sum())
    if initial > config.final_sparsity + 1e-3:
        raise ValueError(
            f"sparsity_ratio is {config.final_sparsity} and the model's share of zeros is {initial:.4f} already; "
            "allowed: as much or more"
        )
    # A few exact zeros in a dense checkpoint are no earlier pruning.
    if initial < 1e-3:
        return 0.0, torch.zeros_like(shares)
    return min(initial, config.final_sparsity), shares


def block_targets(
    config: PruneConfig, target: float, importance: torch.Tensor | None, weights: torch.Tensor, previous: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int] | None]]:
    """Sparsity of each block (L,) at this step, and its N:M if the pattern has one."""
    blocks = len(weights)
    if config.group is None:
        return config.rule.allocate(importance, target, weights, previous), [None] * blocks
    m = config.group[1]
    kept = torch.full((blocks,), kept_per_group(target, m))
    if config.pattern.mixed and importance is not None:
        ceiling = torch.round((1 - previous) * m).long()
        kept = sparsity.allocate_kept(importance, int(kept.sum()), m, ceiling=ceiling)
    return 1 - kept.double() / m, [(int(n), m) for n in kept]


def _gather(
    statistic: InputStatistic | None, block: nn.Module, index: int, family: Family, stream: calibration.Stream
) -> dict[str, torch.Tensor | None]:
    """The statistic of each projection's input, one per shared input; None of each if the method needs none."""
    if statistic is None:
        return dict.fromkeys(family.projections)
    samples = int(distributed.total_of(len(stream.hidden)))
    gathered = {group[0]: statistics.InputSum(statistic, samples) for group in family.inputs}
    with calibration.watching_inputs(
        block_adapters(block, family), family.inputs, lambda name, x: gathered[name].update(x)
    ):
        for batch, rows in stream.batches():
            stream.show(block, index, batch, rows)
    results = {name: accumulator.result() for name, accumulator in gathered.items()}
    for name, result in results.items():
        # Sums of squares, in a Hessian on its diagonal; all processes have the same.
        squares = result if result.dim() == 1 else result.diagonal()
        if not bool(torch.isfinite(squares).all()):
            raise finite.NotFiniteError(f"input of {family.blocks}.{index}.{name}", stream.hidden.dtype)
    return {name: results[group[0]] for group in family.inputs for name in group}


@torch.no_grad()
def _prune_block(
    block: nn.Module,
    index: int,
    family: Family,
    look: Callable[[Callable[[calibration.Stream], Any]], Any],
    config: PruneConfig,
    rate: float,
    nm: tuple[int, int] | None,
) -> None:
    """Prune the projections of one block further, on inputs that come from already pruned blocks."""
    layers = block_adapters(block, family)
    # A projection that is sparser already leaves less to the others.
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.float64)
    kept = torch.stack([layer.mask.sum() for layer in layers.values()]).cpu()
    rate = rest_sparsity(sizes - kept, sizes, rate)
    with holding(list(layers.values())):
        gathered = look(lambda stream: _gather(config.method.statistic, block, index, family, stream))
    for number, (name, layer) in enumerate(layers.items()):
        if not distributed.decides(number):
            continue
        merged = layer.merged()
        try:
            updated, mask = masks.prune(
                config.prune_method, merged, gathered[name], layer.mask, **({"nm": nm} if nm else {"sparsity": rate})
            )
        except ValueError as error:
            sequences = look(lambda stream: len(stream.hidden))
            raise ValueError(f"block {index}, {name}, {sequences} calibration sequences: {error}") from error
        layer.set_base(adapter.rebase(layer.weight, merged, updated, mask))
    for number, layer in enumerate(layers.values()):
        distributed.take(layer.weight.detach(), number)


@torch.no_grad()
def _prune_model(
    model: nn.Module,
    dense: nn.Module,
    family: Family,
    ids: torch.Tensor,
    settings: Settings,
    rates: Sequence[float] | torch.Tensor,
    groups: Sequence[tuple[int, int] | None],
    journal: Journal | None = None,
    start: torch.Tensor | None = None,
) -> list[float]:
    """Prune block by block, and reconstruct if asked, dense and pruned streams in lockstep. Returns e of LoSA, Eq. 6, for every
    block. start: share of zeros of each block (L,) at the start of the run; default 0.

    Goes on behind the blocks that the journal says are done; every block is a point of it.
    """
    journal = journal or Journal()
    progress = journal.progress
    size = progress.calibration_batch_size or settings.calibration.calibration_batch_size
    streams = Lockstep(model, dense, family, distributed.share(ids, "nsamples"), size, progress.block)
    blocks = decoder_blocks(model, family)
    healing = Healing(family, start, settings.reconstruction, blocks[: progress.block])
    for index in _blocks_shown(range(progress.block, len(blocks)), "prune"):
        block = blocks[index]
        with distributed.keeping(block, family):
            _prune_block(block, index, family, streams.pruned_input, settings.prune, float(rates[index]), groups[index])
            progress.errors.append(streams.advance(healing.of(block, index)))
        progress.calibration_batch_size = streams.batch_size
        journal.pruned(index)
    return progress.errors


class Healing:
    """Decides which blocks are reconstructed at a step: those from the first on that has lost a weight. Before it both streams
    are the same, and there is only rounding to train on.

    start: share of zeros of each block (L,) at the start of the run. done: blocks that this step has pruned already.
    """

    def __init__(
        self, family: Family, start: torch.Tensor | None, config: ReconstructionConfig, done: Iterable[nn.Module] = ()
    ) -> None:
        self._family, self._start, self._config = family, start, config
        self._damaged = any(self._lost(block, index) for index, block in enumerate(done))

    def _lost(self, block: nn.Module, index: int) -> bool:
        return bool(self._config.reconstruct_epochs) and zero_share(block, self._family) > self._start_of(index)

    def _start_of(self, index: int) -> float:
        return 0.0 if self._start is None else float(self._start[index])

    def of(self, block: nn.Module, index: int) -> Reconstruct | None:
        """What reconstructs this block, which is pruned; None if nothing is to be done."""
        self._damaged = self._damaged or self._lost(block, index)
        if not self._damaged:
            return None
        return lambda pruned, dense, arguments: reconstruct_block(
            block, index, self._family, pruned, dense, arguments, self._config
        )


@torch.no_grad()
def prune_blocks(
    pairs: Iterable[tuple[nn.Module, nn.Module]],
    dense_stream: calibration.Stream,
    family: Family,
    settings: Settings,
    rates: torch.Tensor,
    groups: Sequence[tuple[int, int] | None],
    arguments: Sequence[dict[str, Any]],
    earlier: Callable[[int, nn.Module], bool] = lambda index, block: False,
    start: torch.Tensor | None = None,
) -> Iterator[tuple[nn.Module, float]]:
    """Each block as soon as it is pruned, and reconstructed if asked, with its e of LoSA, Eq. 6, for blocks that come and go.

    pairs: (dense block, adapted block to prune), which may be one and the same: the dense block is done with when the
    other is pruned. dense_stream: at the first block; it and a second stream, of the pruned model, go on in lockstep.
    arguments: what the model calls each block with, for one sequence.
    earlier: gives a block the weights that an interrupted run has left of it; False if it is still to be pruned.
    start: share of zeros of each block (L,) at the start of the run; default 0.
    """
    stream = dense_stream.clone()
    healing = Healing(family, start, settings.reconstruction)
    for index, (dense_block, block) in enumerate(pairs):
        dense_stream.advance(dense_block, index)
        if earlier(index, block):
            healing.of(block, index)
        else:
            rate = float(rates[index])
            _prune_block(block, index, family, lambda work: work(stream), settings.prune, rate, groups[index])
            if (heal := healing.of(block, index)) is not None:
                heal(stream, dense_stream, arguments[index])
        with holding(list(block_adapters(block, family).values())):
            stream.advance(block, index)
        yield block, reconstruction_error(dense_stream, stream)


def _allocate_ranks(settings: Settings, step: int, errors: Sequence[float]) -> list[int]:
    config = settings.adapter
    mean = schedule.mean_rank(step, config.initial_rank)
    if config.rank_allocation == "uniform":
        return [mean] * len(errors)
    allocated = rank.allocate_ranks(
        torch.tensor(errors, dtype=torch.float64), mean, min_rank=config.min_rank, max_rank=config.max_rank
    )
    return [int(r) for r in allocated]


def _resize(model: nn.Module, family: Family, ranks: Sequence[int], step: int, settings: Settings) -> None:
    fold = settings.adapter.rank_shrink == "fold"
    for index, block in enumerate(decoder_blocks(model, family)):
        # Folding moves the base weight, which has to be whole for it.
        with distributed.keeping(block, family) if fold else nullcontext():
            for number, layer in enumerate(block_adapters(block, family).values()):
                layer.resize(ranks[index], (settings.seed, step, index, number), fold=fold)


def _give_ranks(
    model: nn.Module, family: Family, errors: Sequence[float], step: int, settings: Settings, journal: Journal
) -> None:
    """Allocate the ranks of a step and resize the adapters, unless the run goes on from behind that."""
    if journal.progress.ranks:
        return
    journal.progress.ranks = _allocate_ranks(settings, step, errors)
    _resize(model, family, journal.progress.ranks, step, settings)
    journal.resized(base_moved=settings.adapter.rank_shrink == "fold")


def _lr_positions(parts: Sequence[Sequence[Example]], config: TrainingConfig) -> list[tuple[int, int]]:
    """(optimizer steps done, optimizer steps in all) of the learning-rate schedule at the start of every step."""
    counts = [config.optimizer_steps(len(part)) for part in parts]
    if config.lr_schedule == "per_step":
        return [(0, count) for count in counts]
    return [(sum(counts[:t]), sum(counts)) for t in range(len(counts))]


def _nothing_to_heal(model: nn.Module, family: Family, start: torch.Tensor, config: TrainingConfig) -> bool:
    """Whether there is nothing to train on but rounding: the loss is kl, and the model, with no zeros but those it started
    from (shares of each block (L,)), still is the dense one.

    Such a step's examples are not used, and the learning-rate schedule goes on behind it. See reference/losa.py.
    """
    return config.loss == "kl" and torch.equal(_zero_shares(model, family), start)


def check_structure(model: nn.Module, settings: Settings) -> Family:
    """The family of `model`, after checking what can be checked without its weights.

    Errors: ValueError for an unknown structure, fewer than three blocks with RMI, or inputs that M does not divide.
    """
    family = find_family(model)
    blocks = decoder_blocks(model, family)
    if len(blocks) < (least := settings.prune.rule.least_blocks):
        others = [rule.name for rule in RULES.values() if rule.least_blocks <= len(blocks)]
        raise ValueError(
            f"layer_sparsity is {settings.prune.layer_sparsity!r} and the model has {len(blocks)} decoder blocks; "
            f"allowed: {least} or more, or layer_sparsity {', '.join(others)}"
        )
    for index, block in enumerate(blocks):
        for name in family.projections:
            inputs = weight_of(block, name).shape[1]
            if settings.prune.group is not None and inputs % settings.prune.group[1]:
                raise ValueError(
                    f"sparsity_type is {settings.prune.sparsity_type!r} and {family.blocks}.{index}.{name} has "
                    f"{inputs} inputs; allowed: a multiple of {settings.prune.group[1]}"
                )
    return family


def check_weights(block: nn.Module, index: int, family: Family) -> None:
    """Errors: ValueError naming a tensor of block number `index` that holds NaN or infinity."""
    named = ((name, distributed.local(tensor)) for name, tensor in block.state_dict().items())
    check_finite(((f"{family.blocks}.{index}.{name}", tensor) for name, tensor in named))


def check_model(model: nn.Module, settings: Settings) -> Family:
    """The family of `model`, after checking that these settings can be carried out on it.

    Errors: ValueError as for `check_structure`, or naming a tensor that holds NaN or infinity.
    """
    family = check_structure(model, settings)
    check_finite((name, distributed.local(tensor)) for name, tensor in model.state_dict().items())
    return family


def run(
    model: nn.Module,
    calibration_ids: torch.Tensor,
    parts: Sequence[Sequence[Example]],
    settings: Settings,
    on_step: Observer | None = None,
    on_loss: Callable[[int, int, float, float], None] | None = None,
    dense: nn.Module | None = None,
    journal: Journal | None = None,
) -> list[StepRecord]:
    """Prune and adapt `model` in place by LoSA, Algorithm 1; it ends with adapters on, unmerged.

    calibration_ids: token ids (nsamples, seqlen). parts: T lists of training examples, one list a step, none of them
    empty if fine-tuning is on. on_step hears each step's record, on_loss(step, optimizer step, loss, learning rate).
    dense: the model as it was, a second one or one whose blocks come from its files; default, a copy made here.
    journal: writes down how far the run is, or has it go on from there; observers hear only what is done now.

    Returns one record a step. Errors: see `check_model`; FloatingPointError if training diverges.
    """
    family = check_model(model, settings)
    config = settings.prune
    if settings.training.finetune and (len(parts) != config.steps or not all(parts)):
        sizes = [len(part) for part in parts]
        raise ValueError(f"parts has {len(parts)} parts of {sizes} examples; allowed: {config.steps}, none empty")
    model.eval()
    dense = fsdp.twin(model, family).requires_grad_(False) if dense is None else dense
    attach_adapters(model, family, settings.adapter.scale)
    for part in (model, dense):
        distributed.shard(part, family, next(model.parameters()).device)
    if settings.training.gradient_checkpointing:
        training.checkpoint_activations(model)  # type: ignore[arg-type]
    torch.manual_seed(settings.seed)

    weights = torch.tensor(prunable_weights(model, family), dtype=torch.float64)
    start = _zero_shares(model, family)
    initial, rates = initial_rates(start, weights, config)
    positions = _lr_positions(parts, settings.training)
    journal = journal or Journal()
    progress = journal.begin(model, dense, family, Progress(sparsity=rates.tolist()))
    with calibration.compiled([model, dense], family, settings.training.compile_blocks):
        for step in range(progress.step, config.steps + 1):
            clock = _Clock(next(model.parameters()).device, progress.seconds)
            target = schedule.cubic_sparsity(step, config.steps, config.final_sparsity, initial)
            if progress.block == 0:
                importance = _measure_importance(model, family, calibration_ids, settings, progress)
                progress.importance = [] if importance is None else importance.tolist()
                rates = torch.tensor(progress.sparsity, dtype=torch.float64)
                rates, groups = block_targets(config, target, importance, weights, rates)
                progress.sparsity, progress.groups = rates.tolist(), groups
                clock.lap("importance")
            errors = _prune_model(
                model, dense, family, calibration_ids, settings, progress.sparsity, progress.groups, journal, start
            )
            clock.lap("prune")
            if settings.training.finetune:
                _give_ranks(model, family, errors, step, settings, journal)
                if _nothing_to_heal(model, family, start, settings.training):
                    logger.warning(
                        "step %d of %d: nothing is pruned yet, so nothing is trained; its %d examples are not used",
                        *(step, config.steps, len(parts[step - 1])),
                    )
                else:
                    training.train(
                        model,
                        dense,
                        parts[step - 1],
                        settings.training,
                        positions[step - 1],
                        f"train {step}/{config.steps}",
                        None if on_loss is None else lambda k, loss, rate, t=step: on_loss(t, k, loss, rate),  # type: ignore[misc]
                        journal,
                    )
            clock.lap("train")
            record = StepRecord(
                step=step,
                target=target,
                importance=progress.importance,
                sparsity=progress.sparsity,
                realised=_zero_shares(model, family).tolist(),
                errors=errors,
                ranks=progress.ranks,
                losses=progress.losses,
                seconds=progress.seconds,
            )
            if on_step is not None:
                on_step(record)
            journal.step_done(record.as_dict())
    journal.end()
    return [StepRecord(**record) for record in progress.records]


class _Clock:
    """Wall-clock seconds of the parts of a step."""

    def __init__(self, device: torch.device, laps: dict[str, float] | None = None) -> None:
        self._device, self.laps = device, {} if laps is None else laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.laps[name], self._last = self.laps.get(name, 0.0) + now - self._last, now
