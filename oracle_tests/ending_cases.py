"""Products that also compute what a block does next, against float64: kernels on an emulated GPU or a real one, or torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from oracle_tests.fused_cases import DEVICE
from torch_impl.decode import cuda, cuda_endings, cuda_gaps
from torch_impl.gaps import LANES
from torch_impl.tiles import ROWS

BF16 = torch.bfloat16
EPS = 1e-2
UNIT = torch.finfo(BF16).eps / 2
# Of float32's sums, relative to the sizes of their terms.
SUMS = 1e-5


def share_of_bound(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> float:
    """Return the largest error as a share of its bound, at most 1. NaN, which nobody wrote over, is not within it."""
    worst = float(((found.double() - expected).abs() / (bound + 1e-30)).max())
    assert found.dtype == BF16
    assert worst <= 1, f"{worst:.3g} times the bound"
    return worst


class Numbers:
    """A product: the weight (rows, in) as it is multiplied, x (b, in), a bias or None, and sums of squares."""

    def __init__(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, squares: torch.Tensor | None = None
    ) -> None:
        wide, offset = weight.double(), 0.0 if bias is None else bias.double()
        product, terms = x.double() @ wide.T, x.double().abs() @ wide.abs().T
        root = 1.0 if squares is None else torch.rsqrt(squares.double().sum(1, keepdim=True) / weight.shape[1] + EPS)
        self.y, self.terms = product * root + offset, terms * root

    def normed(self, found: torch.Tensor) -> float:
        """One rounding."""
        return share_of_bound(found, self.y, UNIT * self.y.abs() + SUMS * self.terms)

    def swiglu(self, found: torch.Tensor) -> float:
        """Gate and up are rounded, SiLU and the product. SiLU's slope is at most 1.1."""
        (gate, up), (gate_terms, up_terms) = self.y.chunk(2, 1), self.terms.chunk(2, 1)
        expected = gate * torch.sigmoid(gate) * up
        sums = gate_terms * up.abs() + gate.abs() * up_terms + gate_terms * up_terms
        return share_of_bound(
            found, expected, 3.01 * UNIT * expected.abs() + 1.2 * UNIT * (gate * up).abs() + SUMS * sums
        )

    def added(
        self,
        before: torch.Tensor,
        gain: torch.Tensor,
        total: torch.Tensor,
        scaled: torch.Tensor,
        squares: torch.Tensor,
        order: torch.Tensor | None = None,
    ) -> float:
        """The product is rounded, and the sum; from the rounded sum on, one rounding each. order: of the rows of gaps."""
        expected = before.double() + self.y
        bound = UNIT * (expected.abs() + 1.01 * self.y.abs()) + SUMS * self.terms
        worst = share_of_bound(total, expected, bound)
        assert torch.equal(scaled, total * gain)
        height = ROWS if order is None else LANES
        own = total.double() if order is None else total.double()[:, order]
        wide = functional.pad(own, (0, -total.shape[1] % height)).square().view(len(total), -1, height).sum(-1)
        torch.testing.assert_close(squares.double(), wide, rtol=1e-5, atol=0)
        return worst


def ending(kind: str, rows: int, columns: int, batch: int, seed: int = 0, gaps: bool = False) -> float:
    """Compute a product by `cuda_endings`, with a bias for odd batches, and check it: the share of the bound.

    gaps: of a weight with the same zeros in all rows, so that gate's are in the order of up's.
    """
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(BF16)

    weight = some(rows, columns)
    kept = torch.rand(1 if gaps else rows, columns, device=DEVICE) > 0.6
    layout = (cuda_gaps.pack_gaps_rows if gaps else cuda.pack_rows)(weight * kept)
    assert cuda_endings.fits(layout, kind, batch)
    x, bias = some(batch, columns), some(rows) if batch % 2 else None
    dense = layout.expanded(torch.float32)
    if kind == "added":
        before, gain = some(batch, rows), some(rows)
        total = before.clone()
        scaled, squares = cuda_endings.added(layout, x, total, gain, bias)
        order = torch.arange(rows, device=DEVICE) if gaps and layout.product is not None else None
        return Numbers(dense, x, bias).added(before, gain, total, scaled, squares, order)
    squares = torch.rand(batch, -(-columns // ROWS), generator=generator, device=DEVICE) * 40
    y = getattr(cuda_endings, kind)(layout, x, squares, EPS, bias)
    return float(getattr(Numbers(dense, x, bias, squares), kind)(y))
