"""The programs of oracle_tests/programs/ for GPUs, as far as they run without one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from oracle_tests.programs import (
    gpu_coded_gaps,
    gpu_codes,
    gpu_counters,
    gpu_gaps,
    gpu_resume,
    gpu_rows,
    gpu_spread,
    gpu_step,
    gpu_whole_run,
)
from oracle_tests.small_runs import ROOT
from oracle_tests.tolerances import GPU_STEP
from torch_impl.bench import decode
from torch_impl.decode import cuda
from torch_impl.decode.cuda_plan import Division
from torch_impl.experiment.planning import geometry

EMBEDDED = ROOT / "tiny_models/stdlib_llama"
COUNTED = (ROOT / "oracle_tests/data/ncu.csv").read_text()
"""What ncu printed on one H200, of a few kernels and counters."""


def test_counters_are_read_from_what_ncu_prints() -> None:
    heading, *lines = gpu_counters.report(COUNTED)
    assert heading.split()[:5] == ["µs", "MB", "memory", "%", "L2"]
    assert heading.endswith("waits for")
    assert [" ".join(line.split()) for line in lines] == [
        "o dense 1 11.9 33.6 59.5 29.4 12.4 10.9 3.7 1.5 14.3 1083.8 "
        "global memory 12.8, fixed latency 1.8, instructions 1.0, constants 0.9, arithmetic unit 0.3",
        "o dense 1, kernel 2 3.5 0.0 0.2 0.5 14.6 1.0 2.5 0.0 9.4 85.2 "
        "constants 5.9, instructions 4.8, shared memory 4.6, fixed latency 1.6, global memory 1.6",
        "gate,up same 1 28.3 65.9 50.1 24.9 69.4 64.8 40.0 3.0 42.8 15931.3 "
        "global memory 2.2, another warp's turn 2.0, fixed latency 1.4, shared memory 1.0, arithmetic unit 0.6",
        "gate,up int8 8 29.7 48.6 36.1 26.4 59.2 53.9 52.4 2.9 40.3 14269.1 "
        "global memory 2.8, another warp's turn 1.9, fixed latency 1.4, arithmetic unit 1.2, shared memory 1.0",
    ]


def test_a_counter_that_ncu_lacks_is_left_open_and_no_kernel_is_an_error() -> None:
    first = gpu_counters.report(COUNTED.replace("dram__bytes_read.sum", "dram__renamed.sum"))[1]
    assert first.split()[:6] == ["o", "dense", "1", "11.9", "nan", "59.5"]
    assert gpu_counters.report("\n".join(COUNTED.splitlines()[:5])) == []
    assert gpu_counters.report("==ERROR== no permission\n") == []


def test_every_product_is_launched_once_in_a_range_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the ranges recorded."""
    ranges: list[str] = []

    @contextlib.contextmanager
    def named(name: str) -> Iterator[None]:
        yield ranges.append(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range", named)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: None)
    shape = {"hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setitem(geometry.GEOMETRIES, "small", geometry.GEOMETRIES["small"] | shape)
    options = gpu_counters.parser().parse_args(["--geometry", "small", "--rows", "1", "16", "--values", "same", "int8"])
    gpu_counters.launch(options, torch.device("cpu"))
    products = ["dense 1", "same 1", "int8 1", "dense 16", "same 16"]
    assert ranges == [f"#{name} {product}" for name in ("q,k,v", "o", "gate,up", "down") for product in products]


def test_counting_runs_the_program_itself_under_ncu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a ncu that prints what one printed before."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int("--sparsity" not in command), COUNTED, "no such thing")

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu_counters.main([]) == 1
    assert "needs a GPU and ncu" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_counters.shutil, "which", lambda name: f"/somewhere/{name}")
    given = ["--sparsity", "2:4", "--save", str(tmp_path / "kept.csv")]
    assert gpu_counters.main(given) == 0
    assert capsys.readouterr().out.splitlines() == gpu_counters.report(COUNTED)
    assert (tmp_path / "kept.csv").read_text() == COUNTED
    own = ["-m", "oracle_tests.programs.gpu_counters", *given, "--launch"]
    assert commands[0][0] == "/somewhere/ncu"
    assert commands[0][-len(own) - 1 :] == [sys.executable, *own]
    with pytest.raises(RuntimeError, match="ncu failed with 1: no such thing"):
        gpu_counters.main([])


def test_a_step_on_a_gpu_is_compared_with_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """With the CPU in bf16 as the GPU."""
    assert gpu_step.main(["--small", "--device", "cpu"]) == 0
    found = re.findall(r"^(.+?) +([\d.e+-]+) +[\d.e+-]+$", capsys.readouterr().out, re.M)
    assert [name for name, _ in found] == list(GPU_STEP)
    assert all(float(value) > 0 for _, value in found)


def test_several_processes_are_compared_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    """With one process as several."""
    assert gpu_spread.main(["--small", "--device", "cpu", "--blocks", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"ranks are the same +True\n", printed)
    held, formula = re.search(r"rows of the weights +([\d,]+) +([\d,]+)\n", printed).groups()
    assert held == formula


def test_a_run_is_stopped_resumed_and_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, with fewer tokens and no compiled blocks; then with a resumed run that differs."""
    ready, (ids, parts) = gpu_resume.settings, gpu_resume.tokens()
    less = ids[:, :16], [[{name: row[:16] for name, row in example.items()} for example in part] for part in parts]

    def settings(method: str) -> gpu_resume.Settings:
        found = ready(method)
        return dataclasses.replace(
            found,
            calibration=dataclasses.replace(found.calibration, seqlen=16),
            training=dataclasses.replace(found.training, compile_blocks="off"),
        )

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert gpu_resume.main(command[3:]) == 0
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out)

    monkeypatch.setattr(gpu_resume, "settings", settings)
    monkeypatch.setattr(gpu_resume, "tokens", lambda: less)
    monkeypatch.setattr(gpu_resume, "make_deterministic", lambda: None)
    monkeypatch.setattr(subprocess, "run", run)
    given = ["--device", "cpu", "--hidden", "64", "--blocks", "3"]
    assert gpu_resume.main(given) == 0
    assert capsys.readouterr().out.count("stopped three times and resumed: same bits; run again: same bits") == 2
    monkeypatch.setattr(gpu_resume, "measure", lambda _: {"wanda": {"seconds": 1.0, "hashes": ["a", "a", "b"]}})
    assert gpu_resume.main(given) == 1
    assert "stopped three times and resumed: OTHER BITS; run again: same bits" in capsys.readouterr().out


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a program take the CPU for a GPU on which every product takes 10 µs, with a small model's shapes for 7B's."""
    randn, small = torch.randn, {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}

    def timed(actions: Sequence[Callable[[], object]], *_: object) -> float:
        for action in actions:
            action()
        return 10.0

    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **more: randn(*size, **more))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "available", lambda: (True, ""))
    monkeypatch.setattr(decode, "_copies", lambda *_: 2)
    monkeypatch.setitem(geometry.GEOMETRIES, "llama-2-7b", geometry.GEOMETRIES["small"] | small)
    for program in (decode, gpu_codes, gpu_coded_gaps, gpu_gaps, gpu_rows):
        monkeypatch.setattr(program, "graphed", timed)
    for program in (gpu_codes, gpu_coded_gaps, gpu_gaps, gpu_rows):
        monkeypatch.setattr(program, "check_all", lambda *_: True)


PROJECTIONS = ["q,k,v", "o", "gate,up", "down"]


@pytest.mark.usefixtures("pretended_gpu")
def test_products_with_codes_are_timed_as_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_codes.main(["--device", "cuda"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    batches, zeros = ("1", "8"), ("50", "60", "70")
    assert [line[:4] for line in lines] == [[n, z, "%", b] for n in PROJECTIONS for z in zeros for b in batches]
    # Dense, there are as many products as projections.
    apart = zip(PROJECTIONS, ("30.00", "10.00", "20.00", "10.00"), ("3.00×", "1.00×", "2.00×", "1.00×"), strict=True)
    assert {(line[0], *line[4:6], line[9]) for line in lines} == {
        (name, us, "10.00", ratio) for name, us, ratio in apart
    }
    assert gpu_codes.main(["--device", "cuda", "--sweep", "--batches", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:3] for line in lines] == [[n, kind, "2"] for n in PROJECTIONS for kind in ("bf16", "int8", "int4")]
    assert all("10.00" in line for line in lines)


@pytest.mark.usefixtures("pretended_gpu")
def test_products_of_more_rows_are_timed_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A product that cannot be launched is left out of a sweep."""

    def divided(layout: cuda.Layout, x: torch.Tensor, y: torch.Tensor, way: Division) -> torch.Tensor:
        if way.groups > 1:
            raise RuntimeError(f"divided by {way}")
        return y.copy_(cuda.matvec(layout, x))

    monkeypatch.setattr(gpu_rows, "divided", divided)
    monkeypatch.setattr(gpu_rows, "DIVISIONS", ((1, 4, 1), (1, 4, 2)))
    assert gpu_rows.main(["--device", "cuda", "--sweep", "--sparsities", "70"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if "eight at once 10" in line] == [
        n for n in PROJECTIONS for _ in range(4)
    ]
    assert "divided by Division(strips=1, share=1, groups=2)" in printed
    assert "    a block, 32 rows: best 40.0, plan 40.0, eight at once 40.0" in printed
    monkeypatch.setitem(geometry.GEOMETRIES, "llama-3.2-1b", geometry.GEOMETRIES["llama-2-7b"])
    assert gpu_rows.main(["--device", "cuda", "--sparsities", "70"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.split()[0] in ("8", "128")] == [
        f"{rows:>6}       40.0     40.0     40.0      40.0     40.0   1.00×" for rows in (8, 128)
    ] * 2
    assert "µs to unpack a block: values 40, int8 40, int4 40" in printed


@pytest.mark.usefixtures("pretended_gpu")
def test_products_of_gaps_are_timed_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_gaps, "expanded", lambda layout, dense, width: dense)
    assert gpu_gaps.main(["--device", "cuda", "--sparsities", "70", "--batches", "1", "4"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split()[:5] for line in printed.splitlines() if " % " in line]
    apart = dict(zip(PROJECTIONS, ("30.00", "10.00", "20.00", "10.00"), strict=True))
    assert lines[:8] == [[name, "70", "%", rows, apart[name]] for name in PROJECTIONS for rows in ("1", "4")]
    assert "llama-2-7b, 70 %, µs to unpack a block: panels 40, gaps 40" in printed
    monkeypatch.setattr(gpu_gaps, "PARTS", (1, 2))
    assert gpu_gaps.main(["--device", "cuda", "--sweep", "--sparsities", "70", "--batches", "1"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if "rule (1, 1) 10.00 µs" in line] == [
        [name, "1"] for name in PROJECTIONS
    ]
    assert "a block, 1 rows: best 40.00, rule 40.00 µs" in printed


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("values", ["same", "int8"])
def test_losa_bench_decode_times_as_on_a_gpu(
    values: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors say that they are on a GPU; torch multiplies the layouts."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    monkeypatch.setattr(cuda, "complete", lambda _: None)
    monkeypatch.setattr(cuda.Layout, "product", None)
    monkeypatch.setattr(decode, "ceilings", lambda *_: (1.0, 4.0))
    monkeypatch.setattr(decode.int4, "pack", lambda _: None)
    given = ["--device", "cuda", "--geometries", "llama-2-7b", "--sparsities", "70", "2:4", "--batches", "1", "8"]
    assert decode.main([*given, "--values", values]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if " µs" in line]
    assert [line[:3] for line in lines] == [[n, z, b] for n in PROJECTIONS for z, b in product(("70", "2:4"), "18")]
    ratios = zip(PROJECTIONS, ("3.00×", "1.00×", "2.00×", "1.00×"), strict=True)
    assert {(line[0], line[7]) for line in lines} == set(ratios)
    assert "    batch 8   70: 1.75× (1.00×)   2:4: 1.75× (1.00×)" in printed


@pytest.mark.usefixtures("pretended_gpu")
def test_products_of_coded_gaps_are_timed_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_coded_gaps.main(["--device", "cuda", "--sparsities", "70", "--batches", "1", "2"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split()[:5] for line in printed.splitlines() if " % " in line]
    apart = dict(zip(PROJECTIONS, ("30.00", "10.00", "20.00", "10.00"), strict=True))
    assert lines[:8] == [[name, "70", "%", rows, apart[name]] for name in PROJECTIONS for rows in ("1", "2")]
    assert "µs to unpack a block: bf16 gaps 40, int8 panels 40, int8 gaps 40, int4 panels 40, int4 gaps 40" in printed
    monkeypatch.setattr(gpu_gaps, "PARTS", (1, 2))
    assert gpu_coded_gaps.main(["--device", "cuda", "--sweep", "--sparsities", "70", "--batches", "1"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if "rule (1, 1) 10.00 µs" in line] == [
        [kind, name] for kind in ("int8", "int4") for name in PROJECTIONS
    ]
    assert "int4 a block, 1 rows: best 40.00, rule 40.00 µs" in printed


# --- a whole run on a model of a real one's shapes ---


def test_a_tokenizer_is_cut_to_a_smaller_vocabulary(tmp_path: Path) -> None:
    gpu_whole_run.cut_tokenizer(EMBEDDED, tmp_path, 300)
    whole, cut = (AutoTokenizer.from_pretrained(folder) for folder in (EMBEDDED, tmp_path))
    text = "def main(argv):\n    return 0  # the end\n"
    ids = cut(text)["input_ids"]
    assert max(ids) < 300 <= max(whole(text)["input_ids"])
    assert cut.decode(ids) == whole.decode(whole(text)["input_ids"])


WHOLE: dict[str, Any] = {
    "perplexity_after_step": [30.0, 20.0],
    "losa": {"perplexity": 20.0, "sparsity": 0.698},
    "target_sparsity": 0.7,
    "seconds_in_all": 90.0,
    "peak_memory": {"host": 2**30, "device": 3 * 2**29},
    "verification": {"sparsity_pruned_and_saved": {"q": (0.7, 0.7)}},
}


def test_a_whole_run_is_shown_by_its_parts() -> None:
    seconds = [{"prune": 2.0, "reconstruct": 10.0, "train": 30.0}, {"importance": 1.0, "prune": 2.0, "train": 15.0}]
    steps = [
        {"step": number, "target": target, "realised": [target - 0.01, target + 0.02], "seconds": taken}
        for number, target, taken in zip((1, 2), (0.5, 0.7), seconds, strict=True)
    ]
    assert [" ".join(line.split()) for line in gpu_whole_run.report(WHOLE, steps)] == [
        "step target found importance prune reconstruct train perplexity",
        "1 50.00% 50.50% 0.0 s 2.0 s 10.0 s 30.0 s 30.0",
        "2 70.00% 70.50% 1.0 s 2.0 s 0.0 s 15.0 s 20.0",
        "all 1.0 s 4.0 s 10.0 s 45.0 s",
        "1.5 minutes in all, 1.0 of them Algorithm 1; the rest: loading, pruning at once for comparison, "
        "evaluating, saving, verifying",
        "peak memory: host 1.0 GiB, device 1.5 GiB",
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"perplexity_after_step": [math.nan, 20.0]}, ["a perplexity is not finite"]),
        ({"losa": {"perplexity": 20.0, "sparsity": 0.69}}, ["sparsity 0.6900 instead of 0.7000"]),
        ({"verification": {"sparsity_pruned_and_saved": {"q": (0.7, 0.6)}}}, ["q is saved with 0.6000 zeros"]),
        ({"seconds_in_all": 121.0}, ["more than 2 minutes"]),
        ({"peak_memory": {"device": 2**31 + 2**30}}, ["3.0 GiB on the device, more than 2"]),
    ],
)
def test_what_is_wrong_with_a_whole_run_is_said(changed: dict[str, Any], words: list[str]) -> None:
    found = gpu_whole_run.failures({**WHOLE, **changed}, 2.0, 2.0)
    assert len(found) == len(words)
    assert all(line.startswith(word) for line, word in zip(found, words, strict=True))


def test_a_whole_run_on_a_small_geometry(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    asked = (
        "--geometry small --preset best --written_per_sample 0 --steps 2 --reconstruct_epochs 1 --nsamples 2 --seqlen 32 "
        "--train_examples 8 --train_seqlen 32 --eval_seqlen 32 --eval_windows 2 --device cpu --calibration_data stdlib "
        "--finetune_data stdlib --eval_data stdlib"
    )
    command = [str(tmp_path / "whole"), "--tokenizer", str(EMBEDDED), *asked.split()]
    assert gpu_whole_run.main([*command, "--minutes", "0.0001"]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "FAILED: more than 0.0001 minutes"
    assert [line.split()[1] for line in said if line.split()[:1] in (["1"], ["2"])] == ["61.25%", "70.00%"]
    assert (tmp_path / "whole/run/model/model.safetensors").is_file()
    assert gpu_whole_run.main([str(tmp_path / "wrong"), *command[1:], "--sparsity_ratio", "2"]) == 2
