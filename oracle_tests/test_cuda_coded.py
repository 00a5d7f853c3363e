"""The GPU layout of codes and scales: read lane by lane as the kernel does, unpacked, stacked, and through the kernels on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle_tests.assertions import assert_exact
from oracle_tests.gpu_instructions import permute
from oracle_tests.programs import gpu_codes
from reference import quantise as spec
from torch_impl import quantise
from torch_impl.decode import cuda, cuda_coded
from torch_impl.decode.cuda_coded import CodedLayout

SHAPES = ((1, 3), (17, 300), (40, 520))


def rounded(rows: int, columns: int, sparsity: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a random matrix with an empty row."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 2, rows)[:, None]
    weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    if rows > 1:
        weight[rows // 2] = 0
    return quantise.quantise_rows(weight, bits)


def entry(nibble: int, bits: int) -> tuple[int, int]:
    """What the kernel's table says for four bits of the bitmap: the permutation, and the bits of the codes."""
    places, zero = ((0, 1, 2, 3), 4) if bits == 8 else ((0, 4, 1, 5), 2)
    which, count = 0, 0
    for i in range(4):
        kept = nibble >> i & 1
        which |= (places[count] if kept else zero) << 4 * i
        count += kept
    return which, count * bits


def walk(layout: CodedLayout) -> np.ndarray:
    """The dense weight as the lanes of a warp find it: subnormal numbers, times what makes integers of them, times scales."""
    data, bits = layout.data.numpy(), layout.code_bits
    dense = np.zeros((-(-layout.rows // 16) * 16, layout.panels * 256))
    for panel, start in enumerate(layout.starts.tolist()[:-1]):
        own = data[16 * start :]
        scales = own[512:576].view(np.float16).reshape(16, 2).astype(float)
        words = own[576 : len(own) // 128 * 128 + 576]
        for lane in range(32):
            word = [int.from_bytes(words[at : at + 4].tobytes(), "little") for at in range(4 * lane, len(words), 128)]
            # Reads may go up to three words beyond the panel's.
            word += [0xDEADBEEF] * 3
            bit = 0
            for n in range(32):
                which, used = entry(int(own[16 * lane + n // 2]) >> n % 2 * 4 & 15, bits)
                now = (word[bit // 32] | word[bit // 32 + 1] << 32) >> bit % 32 & 0xFFFFFFFF
                sources = (now, 0) if bits == 8 else (now << 4 & 0xF0F0, now & 0xF0F0)
                codes = permute(*sources, which)
                bit += used
                row, column = n % 2 * 8 + lane // 4, n // 4 * 32 + lane % 4 * 8 + n // 2 % 2 * 4
                for i in range(4):
                    code = codes >> 8 * i & 255
                    # The number with the size as its low byte and the sign on top, as fp16.
                    half = np.array([code & 127 | (code >> 7) << 15], dtype=np.uint16).view(np.float16)[0]
                    number = float(half) * 2.0**24 / (1 if bits == 8 else 16)
                    top, left = panel // layout.panels * 16, panel % layout.panels * 256
                    dense[top + row, left + column + i] = number * scales[row, column // 128]
    return dense


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lanes_find_their_codes(shape: tuple[int, int], bits: int) -> None:
    codes, scales = rounded(*shape, 0.5, bits)
    layout = cuda_coded.pack_codes(codes, scales, bits, torch.bfloat16)
    assert all(tensor.is_contiguous() for tensor in layout.tensors().values())
    assert 16 * int(layout.starts.diff().max()) == layout.slot
    assert 16 * int(layout.starts[-1]) == len(layout.data)
    found = walk(layout)
    expected = np.zeros_like(found)
    expected[: shape[0], : shape[1]] = spec.dequantise_rows(codes.numpy(), scales.numpy())
    assert_exact("weight", expected, found)


@pytest.mark.parametrize("bits", [8, 3])
def test_stacked_layouts_are_the_layout_of_all_rows(bits: int) -> None:
    parts = [rounded(rows, 300, 0.6, bits) for rows in (16, 48, 5)]
    layouts = [cuda_coded.pack_codes(*part, bits, torch.float16) for part in parts]
    whole = cuda_coded.pack_codes(*map(torch.cat, zip(*parts, strict=True)), bits, torch.float16)
    stacked = cuda.stack(layouts)
    assert stacked is not None
    assert (stacked.rows, stacked.slot, stacked.plan) == (whole.rows, whole.slot, whole.plan)
    for name, tensor in whole.tensors().items():
        assert_exact(name, tensor, stacked.tensors()[name])
    assert cuda.stack(layouts[::-1]) is None


def test_the_program_checks_it_here_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_codes.main(["--small", "--check"]) == 0
    assert "OUTSIDE" not in capsys.readouterr().out
    wrong = CodedLayout.expanded
    monkeypatch.setattr(CodedLayout, "expanded", lambda *given: wrong(*given) * 1.1)
    assert gpu_codes.main(["--small", "--check"]) == 1
    assert "OUTSIDE" in capsys.readouterr().out
