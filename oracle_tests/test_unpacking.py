"""The Triton kernel that unpacks a matrix, under Triton's interpreter: bit for bit what the spec's unpacking gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from reference import packed as spec
from reference.quantise import dequantise_rows
from torch_impl import _unpacking
from torch_impl.engine.adapted_linear import AdaptedLinear
from torch_impl.engine.compressed_linear import compress_block
from torch_impl.engine.families import Family

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 31), (5, 128), (4, 1023), (3, 1024), (2, 2100)]


def _weight(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of all sparsities, from an empty to a full one."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < torch.linspace(0, 1.1, rows)[:, None]
    return weight.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", ["packed", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_unpacks_the_bits_of_the_spec(
    shape: tuple[int, int], values: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = _weight(*shape, dtype)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device=DEVICE)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    block = nn.Module()
    block.projection = AdaptedLinear(linear, 1.0)
    compress_block(block, Family("toy", "blocks", (("projection",),)), values)
    parts = {name: part.cpu() for name, part in block.projection.parts.items()}
    if values == "packed":
        bits = parts["values"].view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        stored = bits.numpy().view(f"u{dtype.itemsize}")
        found = spec.unpack(parts["bitmap"].numpy(), stored, parts["offsets"].numpy(), shape[1])
        expected = torch.from_numpy(found.view(f"i{dtype.itemsize}")).view(dtype)
        assert torch.equal(expected, weight.cpu())
    else:
        codes = spec.unpack_codes(*(parts[name].numpy() for name in ("bitmap", "codes", "offsets")), shape[1])
        exact = torch.from_numpy(dequantise_rows(codes, parts["scales"].numpy()))
        expected = exact.to(dtype)
        if DEVICE == "cpu" and dtype == torch.bfloat16:
            # The interpreter cuts off where a GPU rounds.
            expected = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    launched = []
    launch = _unpacking._launch
    monkeypatch.setattr(_unpacking, "_launch", lambda *given, **named: (launched.append(1), launch(*given, **named)))
    monkeypatch.setattr(_unpacking, "usable", lambda bitmap, kind: True)
    assert torch.equal(block.projection.weight.cpu(), expected)
    assert launched
