"""The CPU's decode benchmark: both sides give the same numbers, and its figures follow from what it read."""

from __future__ import annotations

import pytest
import torch

from torch_impl.bench import decode_cpu


def test_a_small_block_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decode_cpu, "STREAM", 4e5)
    assert (
        decode_cpu.main(["--geometry", "small", "--zeros", "0.5", "2:4", "--batches", "1", "3", "--repeats", "1"]) == 0
    )
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 + 4
    assert [line.split()[:3] for line in shown[2:]] == [["small", z, b] for z in ("0.5", "2:4") for b in "13"]
    # 16 bits against 1 + 8 and the offsets' 64 a row.
    assert all(1.6 < float(line.split("×")[1]) < 1.78 for line in shown[2:])


def test_sides_agree_and_blocks_do_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, "STREAM", 1e6)
    [row] = decode_cpu.measure("small", 0.7, [2], repeats=1)
    weights = sum(rows * columns for rows, columns in decode_cpu.projections("small"))
    assert row.dense_bytes == 2 * weights
    assert row.disagreement < 1e-2
    assert row.as_dict()["ratio"] == min(row.torch_ms, row.loop_ms or row.torch_ms) / row.packed_ms


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_dense_loop_is_a_dense_product(batch: int) -> None:
    loop = decode_cpu.dense_loop()
    if loop is None:
        pytest.skip("this CPU has no VDPBF16PS")
    x, weight = torch.randn(batch, 352).bfloat16(), torch.randn(9, 352).bfloat16()
    torch.testing.assert_close(loop(x, weight).float(), x.float() @ weight.float().T, rtol=2**-8, atol=1e-3)


def test_two_of_every_four_are_kept() -> None:
    mask = decode_cpu.kept(5, 16, "2:4", torch.Generator().manual_seed(0))
    assert (mask.view(5, 4, 4).sum(2) == 2).all()
