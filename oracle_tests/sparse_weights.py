"""Weights in 16 bits as the kernels for GPUs must take them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@st.composite
def sparse_weights(draw: st.DrawFn, most_rows: int = 70, most_columns: int = 300) -> torch.Tensor:
    """Weights of any shape and sparsity: empty rows, full panels, N:M, large and tiny values, zeros of both signs."""
    rows = draw(st.sampled_from([n for n in (1, 5, 15, 16, 17, 33, 70) if n <= most_rows]))
    columns = draw(st.integers(1, most_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 1e2]))
    kind = draw(st.sampled_from([0.0, 0.5, 0.7, 0.95, 1.0, "2:4", "uneven"]))
    if kind == "2:4":
        place = torch.rand(rows, -(-columns // 4), 4, generator=generator).argsort(2)
        weight[(place < 2).flatten(1)[:, :columns]] = 0
    elif kind == "uneven":
        # Panels of very different sizes.
        weight[torch.rand(weight.shape, generator=generator) < torch.rand(rows, 1, generator=generator)] = 0
    else:
        weight[torch.rand(rows, columns, generator=generator) < kind] = 0
    weight[draw(st.integers(0, rows - 1))] *= 0
    return weight.to(draw(DTYPES))
