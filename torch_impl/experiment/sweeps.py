"""Sweeps over the blocks of an offloaded model: measure it, prune it, verify the result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_impl import losa, schedule
from torch_impl.engine import calibration, memory
from torch_impl.engine.adapted_linear import adapt_block
from torch_impl.engine.blocks import sweep_backward, sweep_forward, zero_share
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.offload import free, reader_of, sweep
from torch_impl.engine.checkpoints.rewriting import Output, fingerprint
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.gradient_sweep import Collector, GradientSweep
from torch_impl.engine.measures import Measure
from torch_impl.engine.progress import bar
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.record import StepRecord
from torch_impl.engine.settings import Settings
from torch_impl.engine.structure import check_weights
from torch_impl.experiment.config import Config
from torch_impl.experiment.evaluate import stream_perplexity
from torch_impl.experiment.material import Material
from torch_impl.experiment.planning.phases import working
from torch_impl.experiment.planning.sizes import Sizes


@dataclass
class Dense:
    """The result of the sweep over the dense model: shares of zeros and importances have one entry per block."""

    perplexity: float
    shares: list[float]
    importance: list[float] | None
    seconds: float


@dataclass
class Pruned:
    """The result of a pruning sweep. masks: fingerprint by projection; logits: of the probe, None without an output."""

    record: StepRecord
    masks: dict[str, tuple[str, float]] = field(default_factory=dict)
    perplexity: float = 0.0
    logits: torch.Tensor | None = None


class Sweeps:
    """The sweeps over one offloaded model. Hidden states stay on the device if they fit, otherwise on the host.

    budget: device memory to use in bytes; default all free memory.
    """

    def __init__(self, decoder: Decoder, config: Config, material: Material, budget: int | None = None) -> None:
        self.decoder, self.config, self.material = decoder, config, material
        reader = reader_of(decoder)
        self.device = reader.device
        self._batch = config.calibration.calibration_batch_size
        self._sizes = Sizes.of(decoder, reader.dtype)
        self.budget = memory.MemoryBudget(self.device, working(config, self._sizes).total, budget)

    def stream(self, ids: torch.Tensor, batch: int, copies: int = 1) -> calibration.Stream:
        wanted = copies * self._sizes.stream(ids.numel())
        return calibration.start_stream(self.decoder, ids, batch, on_host=not self.budget.reserve(wanted))

    def _blocks(self, description: str) -> Iterator[nn.Module]:
        blocks = bar(sweep(self.decoder), description, len(self._sizes.blocks))
        with calibration.compiled([self.decoder], self.config.training.compiling):
            yield from blocks
        self.budget.release_all()

    def dense(self) -> Dense:
        """Check every block; measure perplexity and, if the rate rule needs it, the blocks' importance."""
        start = time.perf_counter()
        start_measure, rows = self.config.prune.rule.measure, self.config.calibration.rmi_rows
        target = schedule.cubic_sparsity(1, self.config.prune.steps, self.config.prune.final_sparsity)
        measure = None if start_measure is None else start_measure(self.decoder, target)
        measured = None if measure is None else self.stream(self.material.calibration[:rows], self._batch)
        windows = self.stream(self.material.evaluation, self.config.text.eval_batch_size)
        shares = []
        for index, block in enumerate(self._blocks("dense")):
            check_weights(block, index, self.decoder.family)
            shares.append(zero_share(self.decoder.family.weights_of(block).values()))
            windows.advance(block, index)
            if measure is not None and measured is not None:
                measure.advance(measured, block, index)
        sweep_backward(self.decoder, measure)
        return Dense(
            perplexity=stream_perplexity(self.decoder, self.material.evaluation, windows, "dense"),
            shares=shares,
            importance=None if measure is None else measure.importance().tolist(),
            seconds=time.perf_counter() - start,
        )

    def prune(self, settings: Settings, dense: Dense, output: Output | None = None) -> Pruned:
        """Prune and reconstruct every block with Algorithm 1 and write it to the output; without one, measure the perplexity.

        dense: the result of `dense`.
        """
        ids, batch = self.material.evaluation, self.config.text.eval_batch_size
        options = settings.reconstruction
        calibrated = self.stream(self.material.calibration, self._batch, copies=2 + options.more_streams)
        followed = self.stream(ids, batch) if output is None else self.stream(ids[:2], 2)
        blocks = OffloadedBlocks(self, dense, calibrated, followed, options, output)
        [record] = losa.run(self.decoder.model, self.material.calibration, [], settings, blocks=blocks)
        self.budget.release_all()
        if output is None:
            return Pruned(record, perplexity=stream_perplexity(self.decoder, ids, followed, "pruned at once"))
        masks = output.finish()
        # Keep them on the host until the checkpoint is read again.
        logits = calibration.finish(self.decoder, ids[:2], followed.states(slice(None))).cpu()
        return Pruned(record, masks, logits=logits)

    def verify(self, folder: Path, pruned: Pruned) -> tuple[float, pretrained.Verification]:
        """Verify the checkpoint in this folder against the pruned blocks; return its perplexity and the figures.

        Errors: RuntimeError naming a projection with other zeros than its mask, or the difference of the logits.
        """
        ids = self.material.evaluation
        windows, probe = self.stream(ids, self.config.text.eval_batch_size), self.stream(ids[:2], 2)
        zeros = {}
        for index, block in enumerate(self._blocks("verify")):
            for name, weight in self.decoder.family.weights_of(block).items():
                full = self.decoder.full_name(index, name)
                saved, share = fingerprint(weight != 0)
                if saved != pruned.masks[full][0]:
                    raise RuntimeError(
                        f"{folder}, {full}: the saved zeros differ from the mask; check the disk and run again"
                    )
                zeros[full] = (pruned.masks[full][1], share)
            windows.advance(block, index)
            probe.advance(block, index)
        logits = calibration.finish(self.decoder, ids[:2], probe.states(slice(None)))
        assert pruned.logits is not None
        before = pruned.logits.to(logits.device)
        difference = pretrained.logit_difference(folder, logits.float(), before.float(), logits.dtype)
        perplexity = stream_perplexity(self.decoder, ids, windows, "pruned, written and read again")
        return perplexity, pretrained.Verification(difference, zeros)


class OffloadedBlocks:
    """Offloaded blocks, see `Blocks`: read one at a time and written to the output as soon as they are final.

    calibrated: the calibration sequences before the first block. followed: another stream to run through the pruned blocks.
    options: of reconstruction, whose windows keep blocks from becoming final.
    output: the checkpoint to write to, which may have blocks of an interrupted run; None: do not save the blocks.
    """

    def __init__(
        self,
        sweeps: Sweeps,
        dense: Dense,
        calibrated: calibration.Stream,
        followed: calibration.Stream,
        options: ReconstructionConfig,
        output: Output | None,
    ) -> None:
        self.decoder = self.dense = sweeps.decoder
        self.weights = torch.tensor(sweeps.decoder.prunable_weights, dtype=torch.float64)
        self.restartable = output is not None
        self._sweeps, self._found, self._output = sweeps, dense, output
        self._calibrated: calibration.Stream | None = calibrated
        self._followed, self._shares, self._options = followed, list(dense.shares), options

    def zero_shares(self) -> torch.Tensor:
        return torch.tensor(self._shares, dtype=torch.float64)

    def importance(self, measure: Measure, batch_size: int) -> torch.Tensor:
        """Return the importance measured by the sweep over the dense model."""
        return torch.tensor(self._found.importance, dtype=torch.float64)

    def gradients(self, collector: Collector, batch_size: int) -> None:
        """Sweep over the dense model: an offloaded run has one step."""
        stream = self._sweeps.stream(self._sweeps.material.calibration, batch_size)
        gradient_sweep = GradientSweep(self.decoder, collector)
        sweep_forward(self.decoder, stream, gradient_sweep)
        sweep_backward(self.decoder, gradient_sweep)

    def start(self, batch_size: int) -> calibration.Stream:
        first, self._calibrated = self._calibrated, None
        copies = 2 + self._options.more_streams
        return first or self._sweeps.stream(self._sweeps.material.calibration, batch_size, copies)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for block in sweep(self.decoder, keep=self._options.window):
            adapt_block(block, self.decoder.family, self._sweeps.config.adapter.scale)
            yield block, block

    def arguments(self) -> list[dict[str, Any]]:
        return calibration.block_arguments(self.decoder, self._sweeps.material.calibration[:1])

    def restore(self, index: int, block: nn.Module) -> bool:
        return self._output is not None and self._output.restore(index, block)

    def pruned(self, recent: Mapping[int, nn.Module], error: float) -> float:
        """Record the blocks that are final now: the first of a full window; with the last block of the model, all of them."""
        if self._output is not None:
            error = self._output.pruned(recent, error)
        last = max(recent)
        final = last if last + 1 == len(self._shares) else last + 1 - self._options.window
        for index, block in recent.items():
            if index <= final:
                self._finish(index, block)
        return error

    def _finish(self, index: int, block: nn.Module) -> None:
        self._followed.advance(block, index)
        self._shares[index] = zero_share(self.decoder.family.weights_of(block).values())
        if self._output is not None:
            self._output.write(index, block)

    def discard(self, block: nn.Module) -> None:
        free(block)
