"""The benchmark's figures, computed by hand from times that a stopped clock gives: units, denominators, which side is which."""

from __future__ import annotations

import itertools
import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torch_impl.bench import __main__ as bench
from torch_impl.bench import decode, decode_cpu, large, measure, whole, whole_cpu
from torch_impl.bench.decode import Cell
from torch_impl.bench.measure import Row
from torch_impl.bench.whole import Decoding
from torch_impl.decode.next_token import WARM_UP

CPU = torch.device("cpu")


def clock(*times: float) -> SimpleNamespace:
    """A module `time` whose clock shows these seconds, one after the other."""
    return SimpleNamespace(perf_counter=iter(times).__next__)


def test_limits_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of 1024³ in 2 ms is 2·2³⁰ operations; a copy of 4·2²⁰ floats in 1 ms reads and writes 2²⁴ bytes each."""
    times = iter([2.0, 1.0])
    monkeypatch.setattr(measure, "alternate", lambda *_: [(next(times), 0.0, [])])
    tflops, tb_per_s = measure.ceilings(CPU, torch.float32)
    assert tflops == pytest.approx(2**31 / 2e-3 / 1e12)
    assert tb_per_s == pytest.approx(2 * 2**24 / 1e-3 / 1e12)


def test_memory_is_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(1024, 256, bias=False)
    linear.register_buffer("other", torch.zeros(1024, 512, dtype=torch.bfloat16))
    assert measure.resident(linear, linear) == 2 * 2 / 1024
    # Linux counts KiB.
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert measure.host_peak() == 3.0


def test_the_memory_of_a_call_is_what_it_allocates_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 GiB that were there and 7 at the peak."""
    for name, found in {
        "synchronize": 0,
        "reset_peak_memory_stats": 0,
        "memory_allocated": 5,
        "max_memory_allocated": 7,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found * 2**30)
    assert measure.once(lambda: "result", torch.device("cuda"))[1:] == (2.0, "result")


def test_a_row_s_share_is_of_the_product_s_limit() -> None:
    shown = bench._shown(Row("p", 10.0, 25.0, 1.5, 2.5, tflops=50.0, disagreement=0.0, bound=1.0), (200.0, 4.0))
    assert shown.splitlines()[0].split() == ["p", "10.0", "ms", "25.0", "ms", "2.50×", "50", "25%", "1.5", "2.5"]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"), [("llama-2-7b", 4 * 4096**2), ("llama-2-70b", 2 * 8192 * (8192 + 1024))]
)
def test_the_projections_of_a_block_are_all_there(name: str, attention: int, joined: bool) -> None:
    hidden, inner = {"llama-2-7b": (4096, 11008), "llama-2-70b": (8192, 28672)}[name]
    found = decode.projections(name, joined).values()
    assert sum(sum(rows) * columns * count for rows, columns, count in found) == attention + 3 * hidden * inner


def test_a_block_counts_each_projection_as_often_as_it_has_it() -> None:
    """Four of 2 against 3 µs, one of 5 against 8; as one product 7 instead of 8. Bytes of the packed weight against the rate."""
    base: dict[str, Any] = {
        "geometry": "g",
        "sparsity": "50",
        "batch": 1,
        "peak_tb_per_s": 0.05,
        "disagreement": 0.0,
        "bound": 1.0,
    }
    cells = [
        Cell(projection="a", count=4, ours_us=2.0, dense_us=3.0, ours_bytes=20_000, dense_bytes=32_000, **base),
        Cell(
            projection="b",
            count=1,
            ours_us=5.0,
            dense_us=8.0,
            ours_bytes=60_000,
            dense_bytes=96_000,
            joined_us=7.0,
            **base,
        ),
        Cell(projection="a", count=4, ours_us=9.0, dense_us=9.0, ours_bytes=1, dense_bytes=1, **{**base, "batch": 2}),
    ]
    assert decode.block(cells, "50", 1) == (13.0, 20.0, 19.0)
    assert decode._ratios((13.0, 20.0, 19.0), True) == "1.54× (1.46×)"
    # 20 kB in 2 µs are 10 GB/s.
    assert (cells[0].tb_per_s, cells[0].share) == (pytest.approx(0.01), pytest.approx(0.2))
    cells[1].disagreement = 2.0
    assert decode.block(cells, "50", 1) is None


def test_tokens_per_second_are_of_the_whole_batch_in_the_fastest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of three sequences in 2, 1 and 4 seconds, after the warm-up."""
    steps = itertools.count()
    decoding = Decoding.__new__(Decoding)
    decoding.device, decoding.ids = CPU, torch.ones(3, 1)
    monkeypatch.setattr(Decoding, "restart", lambda self: None)
    monkeypatch.setattr(Decoding, "step", lambda self: next(steps))
    monkeypatch.setattr(whole, "time", clock(0.0, 2.0, 10.0, 11.0, 20.0, 24.0))
    assert decoding.tokens_per_second(5, 3) == 15.0
    assert next(steps) == WARM_UP + 1 + 3 * 5


@pytest.mark.parametrize(
    ("seconds", "times", "speed", "steps"),
    [
        # The first token takes 3 of 2 seconds: no other is decoded.
        (2.0, (0.0, 3.0, 3.0), 1.0, 1),
        # Each run of two tokens takes 2 s; after two of them 4 s are over, and the third does not start.
        (4.0, (0.0, 1.0, 2.0, 2.0, 5.0, 5.5, 7.0, 7.0), 3.0, 4),
    ],
)
def test_a_slow_model_is_not_measured_for_long(
    monkeypatch: pytest.MonkeyPatch, seconds: float, times: tuple[float, ...], speed: float, steps: int
) -> None:
    decoding, count = Decoding.__new__(Decoding), itertools.count()
    decoding.device, decoding.ids = CPU, torch.ones(3, 1)
    monkeypatch.setattr(Decoding, "restart", lambda self: None)
    monkeypatch.setattr(Decoding, "step", lambda self: next(count))
    monkeypatch.setattr(whole, "time", clock(*times))
    assert decoding.tokens_per_second(2, 3, seconds) == speed
    assert next(count) == WARM_UP + 1 + steps


def side(fast: float, eager: float, logits: float, between: str = whole.COMPILED) -> whole._Side:
    """Tokens/s, and logits that are this many times those of the model."""
    true = torch.tensor([3.0, 4.0])
    return whole._Side(fast, eager, graph=True, between=between, fast_logits=logits * true, logits=true)


def test_the_sides_of_a_whole_model_are_told_apart() -> None:
    packed, dense, joined = side(40.0, 4.0, 1.01, whole.KERNELS), side(20.0, 2.0, 1.0), side(25.0, 1.0, 1.0)
    same = side(21.0, 2.0, 1.0, whole.KERNELS)
    row = whole._compare("70", 1, packed, (dense, joined, same), (1.0, 2.0), 0.015)
    assert (row.packed, row.dense, row.dense_joined, row.dense_kernels, row.ratio) == (40.0, 20.0, 25.0, 21.0, 2.0)
    assert (row.packed_eager, row.dense_eager, row.packed_gib, row.dense_gib) == (4.0, 2.0, 1.0, 2.0)
    assert row.disagreement == pytest.approx(0.01)
    assert (row.between, row.dense_between) == ("our kernels", "compiled code")
    without = whole._compare("70", 1, dense, (dense, side(1.0, 1.0, 1.0, whole.PLAIN), dense), (1.0, 2.0), 0.015)
    assert (without.dense_joined, without.dense_kernels) == (None, None)
    whole._add_unmerged(row, side(30.0, 3.0, 1.02), dense)
    assert (row.unmerged, row.ratio) == (30.0, None), "its logits are others"
    assert row.disagreement == pytest.approx(0.02)


def test_a_model_is_made_sparser_and_sparser(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 % are 80 % of all weights, not of those that 50 % left: a bit and 16 · 0.2 for each, and an offset a row."""
    words = [
        "--device",
        "cpu",
        "--whole_model",
        "small",
        "--blocks",
        "1",
        "--tokens",
        "2",
        "--batches",
        "1",
        "--repeats",
        "2",
    ]
    first, second = whole.measure(decode._parser().parse_args([*words, "--sparsities", "80", "50"]))
    assert (first.sparsity, second.sparsity) == ("50", "80")
    weights = 2 * 128 * (128 + 64) + 3 * 128 * 352
    assert (first.packed_gib - second.packed_gib) * 2**30 / (2 * weights) == pytest.approx(0.3, abs=0.01)


def test_the_cpu_s_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster dense product counts; 256 MB read in 10 ms are 25.6 GB/s."""
    monkeypatch.setattr(decode_cpu, "quickest", lambda sides, _: [5.0, 9.0, 7.0][: len(sides)])
    monkeypatch.setattr(decode_cpu, "dense_loop", lambda: torch.mm)
    weight = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert decode_cpu.times([lambda x: x], [weight], weight[:1], 1) == (5.0, 7.0)
    assert decode_cpu.times([lambda x: x], [weight], weight[:1, :100], 1) == (5.0, 9.0)
    monkeypatch.setattr(decode_cpu, "quickest", lambda *_: [10_000.0])
    assert decode_cpu.read_rate() == pytest.approx(0.0256)


def test_each_time_of_a_whole_model_on_a_cpu_is_that_of_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """First of a token, then of a prompt."""
    times = iter([{"packed": 1.0, "dense": 3.0, "rest": 0.5}, {"packed": 10.0, "dense": 20.0}])
    monkeypatch.setattr(whole_cpu, "fastest", lambda *_: next(times))
    words = "--device cpu --whole_model small --blocks 1 --sparsities 50 --batches 2 --prompt 4"
    [row] = whole_cpu.measure(decode._parser().parse_args(words.split()))
    assert (row.packed, row.dense, row.rest, row.ratio) == (1.0, 3.0, 0.5, 3.0)
    assert (row.prompt, row.packed_prompt, row.dense_prompt) == (4, 10.0, 20.0)
    assert row.packed_gib < row.dense_gib


def test_seconds_and_bytes_of_a_block_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks: read in 2 s, looked at in 3 s, pruned in 7 s."""
    monkeypatch.setattr(large, "time", clock(0.0, 2.0, 10.0, 13.0, 20.0))
    found = large.stream("small", 2, CPU, torch.float32, 4, 16)
    numbers = 2 * 128 * (128 + 64) + 3 * 128 * 352 + 2 * 128
    assert (found["parameters of a block"], found["bytes of a block"]) == (numbers, 4 * numbers)
    assert (found["dense sweep, s a block"], found["pruning sweep, s a block"]) == (1.5, 3.5)
    assert found["read alone, GB/s"] == pytest.approx(2 * 4 * numbers / 2 / 1e9)
