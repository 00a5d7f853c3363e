"""Algorithm 1 of LoSA on a Hugging Face decoder model. Read side by side with reference/losa.py."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import adapter, rank, schedule, sparsity
from torch_impl.engine import calibration, distributed, statistics, training
from torch_impl.engine.adapted_linear import block_adapters, hold_merged_weights
from torch_impl.engine.batches import Example
from torch_impl.engine.blocks import Blocks, ModelBlocks
from torch_impl.engine.compressed_linear import compress_block
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.engine.lockstep import Lockstep
from torch_impl.engine.memory import find_executable_batch_size
from torch_impl.engine.progress import bar
from torch_impl.engine.reconstruction import Reconstructor
from torch_impl.engine.record import Clock, PartObserver, StepRecord
from torch_impl.engine.resume.checkpointer import Checkpointer, Progress
from torch_impl.engine.settings import PruneConfig, Settings, TrainingConfig
from torch_impl.engine.structure import check_model
from torch_impl.engine.structures import remove_structures
from torch_impl.masks import prune as masks
from torch_impl.masks.method import GradientStatistic, InputStatistic
from torch_impl.masks.nm import kept_per_group
from torch_impl.masks.select import rest_sparsity

logger = logging.getLogger(__name__)

Observer = Callable[[StepRecord], None]
LossObserver = Callable[[int, int, float, float], None]


def initial_rates(shares: torch.Tensor, weights: torch.Tensor, config: PruneConfig) -> tuple[float, torch.Tensor]:
    """Return the initial sparsity of the model and of each block (L,), from the blocks' shares of zeros and sizes.

    Errors: ValueError if the model is already sparser than the target.
    """
    initial = float((weights * shares).sum() / weights.sum())
    if initial > config.final_sparsity + 1e-3:
        raise ValueError(
            f"sparsity_ratio is {config.final_sparsity}; allowed: {initial:.4f} or more, the model's own sparsity"
        )
    # A few exact zeros in a dense checkpoint do not come from pruning.
    if initial < 1e-3:
        return 0.0, torch.zeros_like(shares)
    return initial, shares


def block_targets(
    config: PruneConfig, target: float, importance: torch.Tensor | None, weights: torch.Tensor, previous: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[int, int] | None]]:
    """Choose the sparsity of each block (L,) at this step, and its N:M if the pattern has one."""
    blocks = len(weights)
    if config.group is None:
        first, last = config.dense_blocks
        inner, middle = sparsity.middle_sparsity(target, weights, previous, first, last), slice(first, blocks - last)
        rates, of_middle = previous.clone(), None if importance is None else importance[middle]
        rates[middle] = config.rule.allocate(of_middle, inner, weights[middle], previous[middle])
        return rates, [None] * blocks
    m = config.group[1]
    kept = torch.full((blocks,), kept_per_group(target, m))
    if config.pattern.mixed and importance is not None:
        ceiling = torch.round((1 - previous) * m).long()
        moves = sparsity.even_moves(schedule.sparsity_spread(target), blocks, m)
        kept = sparsity.allocate_kept(importance, int(kept.sum()), m, ceiling=ceiling, moves=moves)
    return 1 - kept.double() / m, [(int(n), m) for n in kept]


def _set_targets(blocks: Blocks, target: float, settings: Settings, progress: Progress) -> None:
    """Measure importances if the rate rule needs them, in batches that fit into memory; choose each block's sparsity."""
    importance, progress.importance = None, []
    if (measure := settings.prune.rule.measure) is not None:
        size = progress.calibration_batch_size or settings.calibration.calibration_batch_size
        importance, progress.calibration_batch_size = find_executable_batch_size(
            lambda size: blocks.importance(measure(blocks.decoder, target), size), size, "calibration_batch_size"
        )
        progress.importance = importance.tolist()
    previous = torch.tensor(progress.sparsity, dtype=torch.float64)
    rates, groups = block_targets(settings.prune, target, importance, blocks.weights, previous)
    progress.sparsity, progress.groups = rates.tolist(), groups


def _gather_gradients(blocks: Blocks, settings: Settings, progress: Progress) -> statistics.GradientSums | None:
    """Compute the statistic of the gradients by every projection of the current model, if the method needs one."""
    statistic = settings.prune.method.statistic
    if not isinstance(statistic, GradientStatistic):
        return None

    def attempt(size: int) -> statistics.GradientSums:
        sums = statistics.GradientSums(statistic, blocks.decoder.family)
        blocks.gradients(sums, size)
        return sums

    size = progress.calibration_batch_size or settings.calibration.calibration_batch_size
    sums, progress.calibration_batch_size = find_executable_batch_size(attempt, size, "calibration_batch_size")
    return sums


@torch.no_grad()
def _prune_block(
    block: nn.Module,
    index: int,
    family: Family,
    on_pruned_input: Callable[[Callable[[calibration.Stream], Any]], Any],
    config: PruneConfig,
    rate: float,
    nm: tuple[int, int] | None,
    gradients: statistics.GradientSums | None,
    last: bool,
) -> None:
    """Prune the projections of one block further, on inputs that come from already pruned blocks, or by `gradients`.

    last: whether this is the last step.
    """
    layers = block_adapters(block, family)
    statistic = config.method.statistic
    gathered = gradients.take(index, layers[family.projections[0]].weight.device) if gradients else {}
    if isinstance(statistic, InputStatistic):
        with hold_merged_weights(list(layers.values())):
            gathered = on_pruned_input(
                lambda stream: statistics.of_inputs(statistic, block, index, family, stream, config.first_token_weight)
            )
    if config.pattern.structured:
        remove_structures(block, family, config.method, gathered, rate, config.channel_multiple, last)
        return
    # A projection that is already sparser reduces the share of the others.
    sizes = torch.tensor([layer.weight.numel() for layer in layers.values()], dtype=torch.float64)
    kept = torch.stack([layer.mask.sum() for layer in layers.values()]).cpu()
    rate = rest_sparsity(sizes - kept, sizes, rate)
    # Projections that share an input follow each other, so one prepared statistic is kept at a time.
    prepare = functools.lru_cache(maxsize=1)(config.method.prepare)
    amount = {"nm": nm} if nm else {"sparsity": rate}
    for number, (name, layer) in enumerate(layers.items()):
        if not distributed.owns(number):
            continue
        merged = layer.merged()
        try:
            updated, mask = masks.prune_prepared(
                config.method, merged, prepare(gathered.get(name)), layer.mask, **amount
            )
        except ValueError as error:
            sequences = on_pruned_input(lambda stream: len(stream.hidden))
            raise ValueError(f"block {index}, {name}, {sequences} calibration sequences: {error}") from error
        layer.set_base(adapter.rebase(layer.weight, merged, updated, mask))
    for number, layer in enumerate(layers.values()):
        distributed.broadcast_from_owner(layer.weight.detach(), number)


@torch.no_grad()
def prune_model(
    blocks: Blocks, settings: Settings, start: torch.Tensor, checkpointer: Checkpointer, clock: Clock | None = None
) -> None:
    """Prune block by block, and reconstruct if asked, with dense and pruned streams in lockstep.

    e of LoSA, Eq. 6, of every block goes to `progress.errors`. start: sparsity of each block (L,) at the start of the run.
    A checkpoint is saved after every block. Blocks that an interrupted run has already pruned at this step are not pruned
    again. clock: counts reconstruction apart.
    """
    progress, count, family = checkpointer.progress, len(blocks.weights), blocks.decoder.family
    if progress.block == count:
        return
    gradients = _gather_gradients(blocks, settings, progress)
    batch_size = progress.calibration_batch_size or settings.calibration.calibration_batch_size
    lockstep = Lockstep(blocks, batch_size, settings.reconstruction.window)
    apart = nullcontext if clock is None else functools.partial(clock.inside, "reconstruct", "prune")
    reconstructor = Reconstructor(family, start, settings.reconstruction, settings.training.cuda_graphs, apart)
    for index, block in bar(lockstep, "prune", count):
        done = index < progress.block
        with distributed.unsharded_with_writeback(block, family):
            earlier = done or blocks.restore(index, block)
            if not earlier:
                rate, group = progress.sparsity[index], progress.groups[index]
                last = progress.step == settings.prune.steps
                if settings.prune.prunes(index, count):
                    inputs = lockstep.pruned_input
                    _prune_block(block, index, family, inputs, settings.prune, rate, group, gradients, last)
                compress_block(block, family, settings.training.train_base)
            window = reconstructor.for_block(block, index)
            reconstruct = None if earlier else window
            with ExitStack() as stack:
                for other in () if reconstruct is None else reconstruct.blocks[:-1]:
                    stack.enter_context(distributed.unsharded_with_writeback(other, family))
                error = lockstep.advance(reconstruct)
        if not done:
            progress.errors.append(blocks.pruned(lockstep.recent, error))
            progress.calibration_batch_size = lockstep.batch_size
            # The gradients of this step's first model cannot be computed again once some of its blocks are pruned.
            save = gradients is None or index + 1 == count
            checkpointer.pruned(index, index if reconstruct is None else reconstruct.first, save)


def _allocate_ranks(settings: Settings, step: int, errors: Sequence[float]) -> list[int]:
    config = settings.adapter
    mean = schedule.mean_rank(step, config.initial_rank)
    if config.rank_allocation == "uniform":
        return [mean] * len(errors)
    allocated = rank.allocate_ranks(
        torch.tensor(errors, dtype=torch.float64), mean, min_rank=config.min_rank, max_rank=config.max_rank
    )
    return [int(r) for r in allocated]


def _give_ranks(blocks: Blocks, step: int, settings: Settings, checkpointer: Checkpointer) -> None:
    """Allocate the ranks of a step and resize the adapters, unless an interrupted run has done so."""
    if checkpointer.progress.ranks:
        return
    ranks = checkpointer.progress.ranks = _allocate_ranks(settings, step, checkpointer.progress.errors)
    fold = settings.adapter.rank_shrink == "fold"
    for index, block in enumerate(blocks.decoder.blocks):
        # Folding changes the base weight, which must be gathered for it.
        with distributed.unsharded_with_writeback(block, blocks.decoder.family) if fold else nullcontext():
            for number, (name, layer) in enumerate(block_adapters(block, blocks.decoder.family).items()):
                if settings.adapter.adapts(blocks.decoder.family.in_attention(name)):
                    layer.resize(ranks[index], (settings.seed, step, index, number), fold=fold)
    checkpointer.resized(base_moved=fold)


def _lr_positions(parts: Sequence[Sequence[Example]], settings: Settings) -> list[tuple[int, int]]:
    """Return (optimizer steps done, total optimizer steps) of the learning-rate schedule at the start of each step.

    Errors: ValueError if the parts do not match the steps.
    """
    config, steps = settings.training, settings.prune.steps
    if config.finetune and (len(parts) != steps or not all(parts)):
        sizes = [len(part) for part in parts]
        raise ValueError(f"parts has {len(parts)} parts of {sizes} examples; give {steps} parts, none empty")
    counts = [config.optimizer_steps(len(part)) for part in parts]
    if config.lr_schedule == "per_step":
        return [(0, count) for count in counts]
    return [(sum(counts[:t]), sum(counts)) for t in range(len(counts))]


def _nothing_to_train(blocks: Blocks, start: torch.Tensor, config: TrainingConfig) -> bool:
    """Return whether the loss is kl and no weight is pruned yet, so that the model still equals the dense one.

    start: sparsity of each block (L,) at the start of the run. Such a step's examples are skipped, and the learning-rate
    schedule continues after them. See reference/training.py.
    """
    return config.loss == "kl" and torch.equal(blocks.zero_shares(), start)


def _train_adapters(
    blocks: Blocks,
    part: Sequence[Example],
    position: tuple[int, int],
    settings: Settings,
    start: torch.Tensor,
    checkpointer: Checkpointer,
    on_loss: LossObserver | None,
) -> None:
    """Allocate ranks, resize the adapters and train them on this step's part of the examples."""
    step, steps = checkpointer.progress.step, settings.prune.steps
    _give_ranks(blocks, step, settings, checkpointer)
    if _nothing_to_train(blocks, start, settings.training):
        logger.warning(
            "step %d of %d: nothing is pruned yet, so training is skipped; its %d examples are not used",
            *(step, steps, len(part)),
        )
        return
    heard = None if on_loss is None else functools.partial(on_loss, step)
    training.train(
        blocks.decoder.model,
        blocks.dense.model,
        part,
        settings.training,
        position,
        f"train {step}/{steps}",
        heard,
        checkpointer,
    )


def _in_memory(
    model: PreTrainedModel, dense: PreTrainedModel | None, calibration_ids: torch.Tensor, settings: Settings
) -> ModelBlocks:
    """Check a model in memory and prepare its blocks for `run`. Errors: see `check_model`."""
    decoder = check_model(model, settings)
    model.eval()
    other = None if dense is None else Decoder(dense)
    blocks = ModelBlocks(decoder, other, calibration_ids, settings.calibration.rmi_rows, settings.adapter.scale)
    if settings.training.gradient_checkpointing:
        training.checkpoint_activations(model)
    return blocks


def run(
    model: PreTrainedModel,
    calibration_ids: torch.Tensor,
    parts: Sequence[Sequence[Example]],
    settings: Settings,
    on_step: Observer | None = None,
    on_loss: LossObserver | None = None,
    dense: PreTrainedModel | None = None,
    checkpointer: Checkpointer | None = None,
    blocks: Blocks | None = None,
    on_part: PartObserver | None = None,
) -> list[StepRecord]:
    """Prune and adapt `model` in place with LoSA, Algorithm 1; the adapters are not merged at the end.

    calibration_ids: token ids (nsamples, seqlen). parts: T lists of training examples, one per step; not empty if fine-tuning
    is on. on_step is called with each step's record, on_loss with (step, optimizer step, loss, learning rate). dense: the
    original model; default a copy. checkpointer: saves checkpoints and resumes from the last one; then the callbacks get only the
    remaining steps. blocks: the source of the blocks if they are not in memory; it holds model and ids. on_part: called with
    importance, prune, reconstruct or train whenever some of it ends.

    Returns one record per step. Errors: see `check_model`; FloatingPointError if training diverges.
    """
    positions = _lr_positions(parts, settings)
    blocks = blocks or _in_memory(model, dense, calibration_ids, settings)
    config, start, checkpointer = settings.prune, blocks.zero_shares(), checkpointer or Checkpointer()
    initial, rates = initial_rates(start, blocks.weights, config)
    torch.manual_seed(settings.seed)
    progress = checkpointer.begin(blocks.decoder, blocks.dense, Progress(sparsity=rates.tolist()), blocks.pairs)
    with calibration.compiled([blocks.decoder, blocks.dense], settings.training.compiling):
        for step in range(progress.step, config.steps + 1):
            clock = Clock(next(model.parameters()).device, progress.seconds, on_part)
            # A model may have a few zeros more than are asked for; they stay.
            target = schedule.cubic_sparsity(step, config.steps, max(config.final_sparsity, initial), initial)
            if progress.block == 0:
                _set_targets(blocks, target, settings, progress)
            clock.lap("importance")
            prune_model(blocks, settings, start, checkpointer, clock)
            clock.lap("prune")
            if settings.training.finetune:
                _train_adapters(blocks, parts[step - 1], positions[step - 1], settings, start, checkpointer, on_loss)
            clock.lap("train")
            record = StepRecord.of(progress, target, blocks.zero_shares().tolist())
            if on_step is not None:
                on_step(record)
            checkpointer.step_done(record.as_dict())
    checkpointer.end()
    return [StepRecord(**record) for record in progress.records]
