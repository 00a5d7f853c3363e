"""Let Triton's kernels overlap with the next ones, as the products of cuda_decode.h do: programmatic dependent launch.

Every kernel waits for the end of the one before it, which has waited for that before it. So whatever a kernel reads after its wait
is there, and earlier it reads only what no kernel near it writes.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_impl.decode import cuda

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU does not install it
    triton = None

if triton is not None:

    @triton.jit
    def take_turn(EARLY: tl.constexpr):
        """Wait for the previous kernel; let the next one start, before that (2) or then (1). EARLY 0: kernels do not overlap."""
        if EARLY == 2:
            tl.extra.cuda.gdc_launch_dependents()
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if EARLY == 1:
            tl.extra.cuda.gdc_launch_dependents()


def early(x: torch.Tensor) -> dict[str, Any]:
    """Return the options of a launch: whether the kernel starts before the previous one ends, and when the next one may."""
    if not x.is_cuda or not cuda.Card.of(x.device).early:
        return {"EARLY": 0}
    return {"EARLY": 1 + cuda.LAUNCH_FIRST, "launch_pdl": True}
