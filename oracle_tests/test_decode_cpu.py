"""The CPU's decode benchmark compares with a dense loop: it must be a dense product."""

from __future__ import annotations

import pytest
import torch

from torch_impl.bench import decode_cpu


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_dense_loop_is_a_dense_product(batch: int) -> None:
    loop = decode_cpu.dense_loop()
    if loop is None:
        pytest.skip("this CPU has no VDPBF16PS")
    x, weight = torch.randn(batch, 384).bfloat16(), torch.randn(9, 384).bfloat16()
    torch.testing.assert_close(loop(x, weight).float(), x.float() @ weight.float().T, rtol=2**-8, atol=1e-3)
