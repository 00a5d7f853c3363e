"""One adapted layer through prune, grow, shrink, fold, train, merge, unmerge, hold, save and load, in any order.

The reference's functions mirror every rule on NumPy arrays. After each rule the two states agree, masks have only shrunk, merged
zeros are exact, the layer's output equals that of its merged weight, and nothing is learned under the mask.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load, save
from torch import nn

from reference import adamw, rank
from reference import adapter as reference_adapter
from reference.masks import prune as reference_masks
from reference.masks.sparsegpt import hessian
from reference.masks.wanda import input_norm
from torch_impl import adapter as torch_adapter
from torch_impl.engine import adapted_linear, families
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import Family
from torch_impl.masks import prune as torch_masks

OUT, IN, TOKENS, SCALE = 5, 8, 24, 2.0
# Float64, sums of at most 24 terms a rule, 25 rules in a row; SparseGPT's inverse has a condition of at most 100 · IN
# after damping. Adam divides by gradients that are far from 0 here: they are drawn at random.
BOUND = 1e-10
TOY = Family("toy", "blocks", (("projection",),))
seeds = st.integers(0, 2**16)


@dataclass(frozen=True)
class Mirror:
    """The layer's state in NumPy."""

    weight: np.ndarray
    A: np.ndarray
    B: np.ndarray

    @property
    def merged(self) -> np.ndarray:
        return reference_adapter.merge(self.weight, self.A, self.B, SCALE)


def toy_model(linear: nn.Module) -> nn.Module:
    """A model of one block with one projection, so that the engine's own attaching and merging is what is tested."""
    model, block = nn.Module(), nn.Module()
    block.projection = linear
    model.blocks = nn.ModuleList([block])
    return model


def toy_decoder(model: nn.Module) -> Decoder:
    with patch.object(families, "FAMILIES", (TOY,)):
        return Decoder(model)


def draw_arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


class AdapterMachine(RuleBasedStateMachine):
    """Each rule changes the layer and its mirror alike."""

    layer: adapted_linear.AdaptedLinear
    mirror: Mirror
    previous_mask: np.ndarray

    @initialize(seed=seeds, share=st.sampled_from([0.0, 0.3]), bias=st.booleans())
    def start(self, seed: int, share: float, bias: bool) -> None:
        weight, offset, self.x = draw_arrays(seed, (OUT, IN), (OUT,), (TOKENS, IN))
        weight = weight * (np.random.default_rng(seed + 1).random(weight.shape) >= share)
        linear = nn.Linear(IN, OUT, bias, dtype=torch.float64)
        self.bias = offset if bias else np.zeros(OUT)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(weight))
            if bias:
                linear.bias.copy_(torch.tensor(offset))
        self.adopt(linear)
        self.mirror = Mirror(weight, np.zeros((0, IN)), np.zeros((OUT, 0)))
        self.previous_mask = weight != 0
        self.saved: tuple[bytes, Mirror] = (save(self.layer.state_dict()), self.mirror)

    def adopt(self, linear: nn.Module) -> None:
        self.model = toy_model(linear)
        adapted_linear.attach_adapters(toy_decoder(self.model), SCALE)
        self.layer = adapted_linear.block_adapters(self.model.blocks[0], TOY)["projection"]

    def output(self) -> np.ndarray:
        return self.layer(torch.tensor(self.x)).detach().numpy()

    # --- rules ---

    @rule(
        method=st.sampled_from(["magnitude", "wanda", "sparsegpt"]),
        how=st.sampled_from(
            [{"sparsity": s} for s in (0.0, 0.25, 0.5, 0.8)] + [{"nm": nm} for nm in ((3, 4), (2, 4), (2, 8))]
        ),
    )
    def prune(self, method: str, how: dict[str, Any]) -> None:
        statistic = {"magnitude": None, "wanda": input_norm(self.x), "sparsegpt": hessian(self.x, 4)}[method]
        merged = self.layer.merged()
        given = None if statistic is None else torch.tensor(statistic)
        updated, mask = torch_masks.prune(method, merged, given, self.layer.mask, **how)
        self.layer.set_base(torch_adapter.rebase(self.layer.weight, merged, updated, mask))
        old = self.mirror
        new, kept = reference_masks.prune(method, old.merged, statistic, old.weight != 0, **how)
        self.mirror = replace(old, weight=reference_adapter.rebase(old.weight, old.merged, new, kept))
        np.testing.assert_array_equal(mask.numpy(), kept)
        np.testing.assert_allclose(self.layer.merged().numpy(), np.where(kept, new, 0), rtol=BOUND, atol=BOUND)

    @precondition(lambda self: self.layer.rank < 10)
    @rule(by=st.integers(1, 4), seed=seeds)
    def grow(self, by: int, seed: int) -> None:
        before = self.output()
        new_rank = self.layer.rank + by
        self.layer.resize(new_rank, (seed, 1))
        rows = reference_adapter.initial_rows(by, IN, (seed, 1))
        self.mirror = Mirror(self.mirror.weight, *rank.resize_adapter(self.mirror.A, self.mirror.B, new_rank, rows))
        np.testing.assert_allclose(self.output(), before, rtol=BOUND, atol=BOUND, err_msg="growing moved the output")

    @precondition(lambda self: self.layer.rank > 0)
    @rule(data=st.data(), fold=st.booleans())
    def shrink(self, data: st.DataObject, fold: bool) -> None:
        before = self.output()
        new_rank = data.draw(st.integers(0, self.layer.rank - 1))
        self.layer.resize(new_rank, (0,), fold=fold)
        weight, A, B = self.mirror.weight, self.mirror.A, self.mirror.B
        if fold:
            weight = rank.fold_adapter(weight, A, B, new_rank, SCALE)
            np.testing.assert_allclose(
                self.output(), before, rtol=BOUND, atol=BOUND, err_msg="folding moved the output"
            )
        self.mirror = Mirror(weight, *rank.resize_adapter(A, B, new_rank, None))

    @precondition(lambda self: self.layer.rank > 0)
    @rule(seed=seeds, held=st.booleans(), steps=st.integers(1, 2))
    def train(self, seed: int, held: bool, steps: int) -> None:
        """A fresh AdamW on a loss that is linear in the output, so that no gradient comes near 0."""
        optimizer = torch.optim.AdamW([self.layer.A, self.layer.B], lr=0.05, weight_decay=0.1)
        moments = adamw.start([self.mirror.A, self.mirror.B])
        self.layer.release()
        for step in range(steps):
            x, grad_y = draw_arrays(seed + step, (2, 3, IN), (2, 3, OUT))
            inputs = torch.tensor(x, requires_grad=True)
            optimizer.zero_grad(set_to_none=True)
            with adapted_linear.hold_merged_weights([self.layer] if held else []):
                (self.layer(inputs) * torch.tensor(grad_y)).sum().backward()
            m = self.mirror
            dx, dA, dB = reference_adapter.masked_lora_grad(x, m.weight, m.A, m.B, SCALE, grad_y)
            for ours, theirs in ((inputs.grad, dx), (self.layer.A.grad, dA), (self.layer.B.grad, dB)):
                np.testing.assert_allclose(ours.numpy(), theirs, rtol=BOUND, atol=BOUND)
            assert self.layer.weight.grad is None
            norm = torch.nn.utils.clip_grad_norm_([self.layer.A, self.layer.B], 0.3)
            clipped, expected = adamw.clip_by_global_norm([dA, dB], 0.3)
            np.testing.assert_allclose(float(norm), expected, rtol=BOUND, atol=BOUND)
            optimizer.step()
            [A, B], moments = adamw.adamw([m.A, m.B], clipped, moments, 0.05, 0.1)
            self.mirror = replace(m, A=A, B=B)

    @rule()
    def hold(self) -> None:
        self.layer.hold()

    @rule()
    def release(self) -> None:
        self.layer.release()

    @rule(go_on=st.booleans())
    def merge(self, go_on: bool) -> None:
        """Merge into a plain linear; then either start a new adapter on it, or drop it and continue unmerged."""
        before = self.output()
        merged_model = copy.deepcopy(self.model)
        masks = adapted_linear.merge_adapters(toy_decoder(merged_model))
        linear = merged_model.blocks[0].projection
        assert type(linear) is nn.Linear
        np.testing.assert_array_equal(masks["blocks.0.projection"].numpy(), self.layer.mask.numpy())
        assert not linear.weight[~self.layer.mask].any()
        np.testing.assert_allclose(linear(torch.tensor(self.x)).detach().numpy(), before, rtol=BOUND, atol=BOUND)
        if go_on:
            self.adopt(linear)
            self.mirror = Mirror(self.mirror.merged, np.zeros((0, IN)), np.zeros((OUT, 0)))
        np.testing.assert_allclose(self.output(), before, rtol=BOUND, atol=BOUND, err_msg="merging moved the output")

    @rule()
    def save(self) -> None:
        self.saved = (save(self.layer.state_dict()), self.mirror)

    @rule(seed=seeds, fresh=st.booleans())
    def load(self, seed: int, fresh: bool) -> None:
        """Load into this layer or a new one, whose rank is set first, as a resumed run does."""
        state, self.mirror = self.saved
        tensors = load(state)
        if fresh:
            self.adopt(nn.Linear(IN, OUT, "bias" in tensors, dtype=torch.float64))
        self.layer.resize(len(tensors["A"]), (seed,))
        self.layer.load_state_dict(tensors)
        self.previous_mask = self.mirror.weight != 0

    # --- invariants ---

    @invariant()
    def states_agree(self) -> None:
        assert self.layer.rank == len(self.mirror.A)
        np.testing.assert_array_equal(self.layer.mask.numpy(), self.mirror.weight != 0)
        for name in ("weight", "A", "B"):
            theirs = getattr(self.layer, name).detach().numpy()
            np.testing.assert_allclose(theirs, getattr(self.mirror, name), rtol=BOUND, atol=BOUND, err_msg=name)

    @invariant()
    def masks_nest(self) -> None:
        mask = self.layer.mask.numpy()
        assert not (mask & ~self.previous_mask).any(), "a pruned weight came back"
        self.previous_mask = mask

    @invariant()
    def merged_zeros_are_exact(self) -> None:
        merged = self.layer.merged()
        assert not merged[~self.layer.mask].any()
        np.testing.assert_allclose(merged.numpy(), self.mirror.merged, rtol=BOUND, atol=BOUND)

    @invariant()
    def forward_is_the_merged_weight_held_or_not(self) -> None:
        m = self.mirror
        expected = reference_adapter.masked_lora(self.x, m.weight, m.A, m.B, SCALE) + self.bias
        np.testing.assert_allclose(self.output(), expected, rtol=BOUND, atol=BOUND)

    @precondition(lambda self: self.layer.rank > 0)
    @invariant()
    def nothing_is_learned_under_the_mask(self) -> None:
        """Input e_j and loss y_i together touch the pruned weight (i, j) alone: all gradients are exactly 0."""
        for i, j in np.argwhere(~self.layer.mask.numpy())[:: max(1, OUT * IN // 6)]:
            x = torch.eye(IN, dtype=torch.float64)[[j]].requires_grad_()
            A, B, dx = torch.autograd.grad(self.layer(x)[0, i], (self.layer.A, self.layer.B, x))
            assert not A.any()
            assert not B.any()
            assert dx[0, j] == 0


AdapterMachine.TestCase.settings = settings(deadline=None, stateful_step_count=25)
TestAdapterMachine = AdapterMachine.TestCase
