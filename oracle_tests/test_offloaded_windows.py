"""Blocks from files, reconstructed in windows: the same bits as in memory, also resumed and in smaller batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle_tests.offloaded_runs import Killed, both, same, stop_after, weights_in
from oracle_tests.small_runs import arguments
from tiny_models.random_models import save_random_model
from torch_impl import losa, reconstruct
from torch_impl.engine import calibration
from torch_impl.engine.checkpoints import offload
from torch_impl.engine.checkpoints.contents import SINGLE
from torch_impl.engine.resume.checkpointer import Checkpointer
from torch_impl.run import main

WINDOWS: dict[str, object] = {
    "steps": 1,
    "finetune": "false",
    "layer_sparsity": "uniform",
    "eval_windows": 4,
    "reconstruct_epochs": 1,
    "reconstruct_window": 3,
    "compile_blocks": "off",
}
BLOCKS = 5


@pytest.fixture
def deep(place: Path) -> Path:
    """A place with a model of five blocks."""
    save_random_model(place / "model", "llama-gqa", num_hidden_layers=BLOCKS)
    return place


@pytest.mark.parametrize(
    "changes",
    [
        {"reconstruct_window": 2, "layer_sparsity": "rmi"},
        {"reconstruct_window": 3, "prune_method": "sparsegpt", "dtype": "bfloat16", "calibration_batch_size": 4},
    ],
    ids=lambda changes: f"windows of {changes['reconstruct_window']}",
)
def test_windows_of_blocks_from_files_get_the_same_bits(deep: Path, changes: dict) -> None:
    same(*both(deep, **{**WINDOWS, **changes}))


def test_blocks_before_the_first_damaged_one_get_the_same_bits(deep: Path) -> None:
    """Three blocks that are sparse enough leave nothing to reconstruct; the first window begins behind them."""
    file = deep / "model" / SINGLE
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.startswith(tuple(f"model.layers.{index}." for index in range(3))) and tensor.dim() == 2:
            tensor[:, : tensor.shape[1] * 7 // 8] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    same(*both(deep, **{**WINDOWS, "reconstruct_window": 2}))


def test_a_window_resumes_from_every_checkpoint(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every checkpoint: after the dense sweep, after each of five blocks, and as the last three are written."""
    assert main(arguments(deep, **WINDOWS, offload="on", output_dir=deep / "whole")) == 0
    pruned: list[int] = []
    prune_block = losa._prune_block
    monkeypatch.setattr(losa, "_prune_block", lambda *given: (pruned.append(given[1]), prune_block(*given))[1])
    again, stops = {}, 0
    while True:
        stop_after(1, monkeypatch)
        status = main(arguments(deep, **WINDOWS, offload="on", **again))
        if status == 0:
            break
        again, stops = {"resume": "true"}, stops + 1
    # The last sweep is that of the row "pruned at once".
    assert (stops, pruned) == (1 + BLOCKS + 3, 2 * [*range(BLOCKS)])
    same(deep / "out", deep / "whole")


def test_a_window_resumes_when_it_is_killed_in_its_training(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an optimizer step of the fourth window: the blocks of the third, which were being trained again, come back."""
    assert main(arguments(deep, **WINDOWS, offload="on", output_dir=deep / "whole")) == 0
    step, steps = reconstruct._Weights.step, [0]

    def killed(self: Any, *given: Any) -> None:
        step(self, *given)
        steps[0] += 1
        if steps[0] == 4:
            raise Killed

    monkeypatch.setattr(reconstruct._Weights, "step", killed)
    assert main(arguments(deep, **WINDOWS, offload="on")) == 1
    monkeypatch.setattr(reconstruct._Weights, "step", step)
    assert main(arguments(deep, **WINDOWS, offload="on", resume="true")) == 0
    same(deep / "out", deep / "whole")


def test_a_corrupt_block_that_others_were_trained_with_is_an_error(
    deep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stop_after(6, monkeypatch)
    assert main(arguments(deep, **WINDOWS, offload="on")) == 1
    file = deep / ".out.partial" / "model" / SINGLE
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(arguments(deep, **WINDOWS, offload="on", resume="true")) == 2
    assert "block 0 is corrupt on disk, and later blocks were trained with it" in capsys.readouterr().err


def test_windows_from_files_take_smaller_batches_when_memory_is_full(
    deep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the pruned stream passes a block behind the training: blocks of the window stay, those before come from the output."""
    options = {**WINDOWS, "offload": "on", "calibration_batch_size": 4, "reconstruct_window": 2}
    assert main(arguments(deep, **options, output_dir=deep / "plain")) == 0
    forward, advanced = calibration.Stream.forward, losa.Lockstep._pass
    full = [False]

    def limited(self: calibration.Stream, block: Any, index: int, batch: int, rows: slice) -> torch.Tensor:
        if full[0] and rows.stop - rows.start == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, block, index, batch, rows)

    def passing(self: Any) -> None:
        full[0] = self._index == 3 and self.batch_size == 4 and self._window == 2
        advanced(self)

    monkeypatch.setattr(calibration.Stream, "forward", limited)
    monkeypatch.setattr(losa.Lockstep, "_pass", passing)
    assert main(arguments(deep, **options)) == 0
    assert "reducing calibration_batch_size from 4 to 2" in caplog.text
    ours, plain = weights_in(deep / "out" / "model"), weights_in(deep / "plain" / "model")
    for name, weight in plain.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)


def test_blocks_have_weights_while_they_are_in_the_window(deep: Path) -> None:
    model = offload.open_offloaded(deep / "model", torch.device("cpu"), None)
    seen: list[torch.nn.Module] = []
    for block in offload.sweep(offload.Decoder(model), keep=3):
        seen.append(block)
        full = [all(parameter.numel() for parameter in block.parameters()) for block in seen]
        assert full == [False] * (len(seen) - 3) + [True] * min(3, len(seen))


def test_without_windows_checkpoints_hold_no_blocks(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output has them; with windows, checkpoints hold those that may still change and no others."""
    held: dict[int, list[set[str]]] = {1: [], 3: []}
    noted = Checkpointer.noted
    for window, parts in held.items():

        def counted(self: Checkpointer, parts: list[set[str]] = parts) -> None:
            noted(self)
            assert self.checkpoints is not None
            parts.append({name.partition(".")[0] for name in self.checkpoints.parts if name.startswith("block")})

        monkeypatch.setattr(Checkpointer, "noted", counted)
        assert main(arguments(deep, **{**WINDOWS, "reconstruct_window": window}, offload="on")) == 0
        shutil.rmtree(deep / "out")
    assert held[1] == [set()] * (1 + BLOCKS)
    numbers = [range(0), range(1), range(2), range(3), range(1, 4), range(2, 5), range(3, 5), range(4, 5), range(0)]
    assert held[3] == [{f"block-{number:03}" for number in some} for some in numbers]
