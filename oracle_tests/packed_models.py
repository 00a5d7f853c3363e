"""Sparse models to pack, and what has come back of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.engine.decoder import Decoder


def save_sparse(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A random model, pruned to 40 to 90 %, one projection left dense, with a negative zero and a NaN payload's worth of bits."""
    model = random_model(family, dtype=dtype)
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, block in enumerate(decoder.blocks):
            for number, weight in enumerate(decoder.family.weights_of(block).values()):
                sparsity = 0.0 if (index, number) == (0, 0) else 0.4 + 0.1 * ((index + number) % 6)
                weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
        decoder.projections(0)[decoder.family.projections[-1]].weight[0, :2] = -0.0
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


def bits(folder: Path) -> dict[str, dict[str, tuple[torch.dtype, torch.Tensor]]]:
    """Every tensor of every file: dtype and bytes."""
    return {
        path.name: {name: (t.dtype, t.contiguous().view(torch.uint8)) for name, t in load_file(path).items()}
        for path in sorted(folder.glob("*.safetensors"))
    }


def assert_same_bits(one: Path, other: Path) -> None:
    before, after = bits(one), bits(other)
    assert {file: set(tensors) for file, tensors in before.items()} == {file: set(t) for file, t in after.items()}
    for file, tensors in before.items():
        for name, (dtype, content) in tensors.items():
            assert after[file][name][0] == dtype
            assert torch.equal(after[file][name][1], content), name
