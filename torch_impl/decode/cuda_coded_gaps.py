"""Decoding with sparse codes, scales and gaps on a GPU: the layout of cuda_coded_gaps.cu, computed on load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from torch_impl import code_tiles, gaps, quantise
from torch_impl.decode import cuda
from torch_impl.decode.cuda_gaps import NIBBLES, GapLayout, indexed, join_gaps, split_gaps
from torch_impl.decode.cuda_plan import gaps_kernel_bytes


@dataclass(frozen=True)
class CodedGapLayout(GapLayout):
    """A sparse weight of codes and scales as a GPU reads it: as `GapLayout`, with the codes of `gaps.pack_gaps` for values.

    Sections are the columns that share a scale, so four entries have one scale. A group has a byte, code + 128, for each code of
    more than 4 bits, otherwise half a byte, code + 8, in the order of gaps. `starts` ends with the scales, fp16: of each strip,
    section by section, of each lane. dtype: of inputs and outputs. bits: of a code, 2 to 8.
    """

    bits: int = 8

    @property
    def code_bits(self) -> int:
        """Return the bits of a code in the groups."""
        return code_tiles.stream_bits(self.bits)

    @property
    def sections(self) -> int:
        """Return the number of scales of a row."""
        return -(-self.columns // quantise.GROUP)

    def coded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (rows, columns) int8 and scales (rows, ⌈columns/128⌉) float16."""
        codes = gaps.unpack_gaps(*self.parts(), self.rows, self.columns).to(torch.int8)
        lanes = self._index()[3].view(torch.float16).view(self.strips, self.sections, gaps.LANES)
        scales = codes.new_empty(self.rows, self.sections, dtype=torch.float16)
        scales[self._index()[1].long()] = lanes.transpose(1, 2).flatten(0, 1)[: self.rows]
        return codes, scales

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Restore the dense weight (rows, columns) by torch: code times scale, rounded once."""
        codes, scales = self.coded()
        return (codes * scales.float().repeat_interleave(quantise.GROUP, 1)[:, : self.columns]).to(dtype)

    def shared(self, warps: int, rows: int = 1) -> int:
        """Return the shared memory of a block of warps in bytes, for so many rows of x and the strips' scales."""
        strips = -(-warps // self.panels)
        return gaps_kernel_bytes(self.columns, warps, rows) + strips * self.sections * gaps.LANES * 2

    def _values(self, stored: torch.Tensor) -> torch.Tensor:
        if self.code_bits == 8:
            return stored.half() - 128
        return split_gaps(stored).half() - 8

    def _index(self) -> Sequence[torch.Tensor]:
        panels = self.strips * self.panels
        scales = self.strips * self.sections * gaps.LANES // 2
        return self.starts.split([panels + 1, self.rows, panels * gaps.LANES // 2, scales])


def pack_codes(
    codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype, parts: int | None = None
) -> CodedGapLayout:
    """Pack codes (out, in) int8 and scales (out, ⌈in/128⌉) float16, on their device, for inputs of bf16 or fp16.

    parts: as `cuda_gaps.pack_gaps_rows`. Errors: TypeError for another dtype.
    """
    if dtype not in cuda.DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: bfloat16 or float16")
    width, (rows, columns) = code_tiles.stream_bits(bits), codes.shape
    values, own, starts, order = gaps.pack_gaps(codes.half(), quantise.GROUP)
    stored = (values + 2 ** (width - 1)).to(torch.uint8)
    data = torch.cat([stored.flatten(1) if width == 8 else join_gaps(stored), join_gaps(own)], 1).flatten()
    lanes = functional.pad(scales[order], (0, 0, 0, -rows % gaps.LANES)).view(-1, gaps.LANES, scales.shape[1])
    slot = width * gaps.LANES * gaps.ENTRIES // 8 + NIBBLES
    layout = CodedGapLayout(rows, columns, 0, slot, dtype, data, starts, (rows,), bits=bits)
    of_strips = lanes.transpose(1, 2).contiguous().flatten().view(torch.int32)
    return indexed(layout, starts.int(), order.int(), [of_strips], parts)
