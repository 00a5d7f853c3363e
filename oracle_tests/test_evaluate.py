"""Perplexity against a computation by hand; figures that are not finite are never shown or written."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from oracle_tests.small_runs import arguments, fails
from tiny_models.random_models import random_model
from torch_impl.commands import evaluate
from torch_impl.engine import calibration, distributed, files
from torch_impl.engine.checkpoints import offload
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.resume import run_checkpoints
from torch_impl.experiment import job, metrics, zero_shot
from torch_impl.experiment.evaluate import perplexity, stream_perplexity
from torch_impl.run import main

ROOT = Path(__file__).parents[1]
# Float32 logits, summed in another order.
BOUND = 1e-5


def by_hand(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """A token of a window at a time, each predicted from those before it; in float64 from the logits on."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double().numpy()
        for position in range(1, len(window)):
            row = logits[position - 1]
            largest = row.max()
            losses.append(largest + math.log(np.exp(row - largest).sum()) - row[int(window[position])])
    assert len(losses) == len(windows) * (windows.shape[1] - 1)
    return math.exp(sum(losses) / len(losses))


def some_windows(model: PreTrainedModel, count: int, tokens: int = 7) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (count, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "batch"), [(33, 8), (8, 8), (3, 8), (33, 1)])
def test_perplexity_is_that_by_hand(count: int, batch: int) -> None:
    """33 windows in batches of 8: the last batch holds one, and none holds more than 8, which a device may not have room for."""
    model = random_model("llama-gqa")
    windows = some_windows(model, count)
    sizes: list[int] = []
    model.model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    assert perplexity(model, windows, batch) == pytest.approx(by_hand(model, windows), rel=BOUND)
    assert max(sizes[: -(-count // batch)]) == min(batch, count)


@pytest.mark.parametrize("offloaded", [False, True])
def test_perplexity_of_a_stream_is_that_by_hand(offloaded: bool, tmp_path: Path) -> None:
    """Of a model in memory, and of one whose blocks come from its files."""
    model = random_model("llama-gqa")
    windows = some_windows(model, 33)
    streamed: PreTrainedModel = model
    if offloaded:
        model.save_pretrained(tmp_path)
        streamed = offload.open_offloaded(tmp_path, torch.device("cpu"), None)
    decoder = Decoder(streamed)
    stream = calibration.start_stream(decoder, windows, 8)
    blocks = offload.sweep(decoder) if offloaded else decoder.blocks
    with torch.no_grad():
        for index, block in enumerate(blocks):
            stream.advance(block, index)
    found = stream_perplexity(decoder, windows, stream, "it")
    assert found == pytest.approx(by_hand(model, windows), rel=BOUND)


@pytest.mark.parametrize("processes", [2, 3, 40])
def test_every_process_measures_its_share(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they sum up to is the loss of all windows, however many have no batch left."""
    model = random_model("llama-gqa")
    windows = some_windows(model, 33)
    monkeypatch.setattr(distributed, "processes", lambda: processes)
    shares: list[float] = []
    monkeypatch.setattr(distributed, "all_reduce_number", lambda value: shares.append(value) or value)
    for number in range(processes):
        monkeypatch.setattr(distributed, "process_index", lambda number=number: number)
        perplexity(model, windows, 8)
    assert math.exp(sum(shares) / (33 * 6)) == pytest.approx(by_hand(model, windows), rel=BOUND)


class Saying(torch.nn.Module):
    """A model of a given dtype whose logits are the same everywhere."""

    def __init__(self, logits: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._logits = dtype, torch.nn.Parameter(torch.tensor(logits, dtype=dtype))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self._logits.expand(*input_ids.shape, -1)})


@pytest.mark.parametrize(
    ("logits", "dtype", "message"),
    [
        (
            [math.nan, 0.0],
            torch.float16,
            r"^dense: the output of the model holds NaN or infinity in float16; float16 ends at 65,504: use dtype bfloat16 or",
        ),
        ([math.inf, 0.0], torch.bfloat16, r"^dense: the output of the model holds NaN or infinity in bfloat16;"),
        ([-math.inf, 0.0], torch.float32, r"^dense: the output of the model holds NaN or infinity in float32;"),
        ([-1000.0, 0.0], torch.float32, r"^dense: perplexity is not finite; mean loss 1000 per token in float32$"),
    ],
)
def test_what_is_not_finite_is_an_error_that_names_the_model(
    logits: list[float], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(FloatingPointError, match=message):
        perplexity(Saying(logits, dtype), torch.zeros(2, 3, dtype=torch.long), 8, "dense")  # type: ignore[arg-type]


def test_the_largest_loss_that_has_a_perplexity_has_one() -> None:
    windows = torch.zeros(1, 3, dtype=torch.long)
    found = perplexity(Saying([-709.0, 0.0], torch.float32), windows, 8)  # type: ignore[arg-type]
    assert found == pytest.approx(math.exp(709), rel=1e-9)


# --- whole runs ---


def scale_up(place: Path) -> None:
    """Enlarge one block's weights: its output exceeds 65504 but fits float32."""
    file = place / "model" / "model.safetensors"
    tensors = load_file(file)
    for projection in ("up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.{projection}.weight"] *= 3000
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("offload", ["off", "on"])
def test_half_precision_that_overflows_ends_at_the_first_figure(
    place: Path, offload: str, capsys: pytest.CaptureFixture
) -> None:
    scale_up(place)
    plain = {"steps": 1, "finetune": "false", "offload": offload}
    fails(
        capsys, place, arguments(place, dtype="float16", **plain), ["output of model.layers.1", "float16", "bfloat16"]
    )
    assert main(arguments(place, dtype="float32", **plain)) == 0


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ([], {"text": "wikitext2", "seqlen": 2048, "windows": None, "protocol": None, "batch_size": 8}),
        (
            ["--text", "c4", "--seqlen", "64", "--windows", "3", "--protocol", "c4", "--batch_size", "5"],
            {"text": "c4", "seqlen": 64, "windows": 3, "protocol": "c4", "batch_size": 5},
        ),
    ],
)
def test_the_command_measures_what_it_is_asked_for(
    options: list[str], passed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults are those of --help."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, "load", lambda *_: (None, None))
    monkeypatch.setattr(evaluate.api, "evaluate", lambda *_, **options: given.update(options) or {"perplexity": 1.0})
    assert evaluate.main(["MODEL", *options, "--json"]) == 0
    assert given == passed


@pytest.mark.parametrize(
    ("options", "loaded"),
    [
        ([], ("MODEL", "auto", "auto", False)),
        (["--device", "cpu", "--dtype", "float64", "--trust_remote_code"], ("MODEL", "cpu", "float64", True)),
    ],
)
def test_the_command_loads_the_model_as_told(
    options: list[str], loaded: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(evaluate, "load", lambda *given: calls.append(given) or (None, None))
    monkeypatch.setattr(evaluate.api, "evaluate", lambda *_, **options: {"perplexity": 1.0})
    assert evaluate.main(["MODEL", *options, "--json"]) == 0
    assert calls == [loaded]


@pytest.mark.parametrize(("model", "named"), [("a/b/MODEL", "MODEL"), (".", ".")])
def test_the_command_names_the_model(
    model: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    found = {"perplexity": 12.345678, "windows": 3, "seqlen": 7, "text": "T", "sha256": "0" * 64, "stride": 7}
    monkeypatch.setattr(evaluate, "load", lambda *_: (None, None))
    monkeypatch.setattr(evaluate.api, "evaluate", lambda *_, **options: found)
    monkeypatch.setattr(evaluate.report, "protocol_of", lambda found: "As told")
    assert evaluate.main([model, "--text", "wikitext2"]) == 0
    said = f"{named}: perplexity 12.3457 on 3 windows of 7 tokens of T (token ids 000000000000). As told.\n"
    assert capsys.readouterr().out == said


def test_the_command_asks_for_the_tasks_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    nothing = zero_shot.ZeroShot({}, {}, {}, {}, 0.0, "0", {}, 3)
    monkeypatch.setattr(evaluate, "load", lambda *_: (None, None))
    monkeypatch.setattr(evaluate.zero_shot, "load_tasks", lambda *given: calls.append(given) or {"piqa": None})
    monkeypatch.setattr(evaluate.zero_shot, "measure", lambda *given: calls.append(given[2:]) or nothing)
    tasks = ["--tasks", "piqa", "--tasks_data", "folder", "--limit", "3", "--num_fewshot", "2", "--batch_size", "5"]
    assert evaluate.main(["MODEL", *tasks, "--json"]) == 0
    assert calls == [(["piqa"], "folder", 2), ({"piqa": None}, 3, 5)]


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_every_figure_has_a_name_and_every_file_of_a_run_is_strict_json(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def noted(*given: Any) -> float:
        names.append(given[-1])
        return perplexity(*given)

    monkeypatch.setattr(job, "perplexity", noted)
    assert main(arguments(place)) == 0
    after_steps = ["losa after step 1", "losa after step 2"]
    assert names == ["dense", "pruned at once", *after_steps, "losa, merged and reloaded"]
    files = [file for file in (place / "out").rglob("*.json*")]
    assert {"losa_result.json", "steps.json", "metrics.jsonl", "environment.json"} <= {file.name for file in files}
    for file in files:
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            strict(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_named_and_not_written(value: float, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=rf"^a\.json, rows\[1\], loss is {value}, which JSON cannot store$"):
        metrics.write_json(tmp_path / "a.json", {"rows": [{}, {"loss": value}]})
    lines = metrics.Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(FloatingPointError, match=r"^metrics\.jsonl, errors\[0\] is"):
        lines.log("step", errors=[value])
    with pytest.raises(FloatingPointError, match=r"^state, state, value is"):
        run_checkpoints.RunCheckpoints(tmp_path / "points").commit({"value": value})
    assert not list(tmp_path.rglob("*.json*"))


def test_strict_json_is_json() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert json.loads(files.dumps(value, "it")) == value
    assert files.dumps({"a": 1}, "it", indent=1) == json.dumps({"a": 1}, indent=1)


def test_no_json_is_written_otherwise() -> None:
    """Every call of json.dump and json.dumps forbids NaN."""
    for path in (ROOT / "torch_impl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                assert "allow_nan=False" in ast.unparse(node), f"{path}, line {node.lineno}"
