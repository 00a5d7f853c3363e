"""Decoding with sparse codes and scales on a GPU: the layout of cuda_coded.cu, computed on load. The product is `cuda.matvec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from torch_impl import code_tiles, quantise
from torch_impl.decode import cuda

# As in cuda_coded.cu: bytes of a panel before its words, and of a block's table.
HEAD = code_tiles.MAP + 2 * code_tiles.ROWS * code_tiles.COLUMNS // quantise.GROUP
TABLE = 64
ROW_OF_WORDS = code_tiles.LANES * code_tiles.WORD


@dataclass(frozen=True)
class CodedLayout(cuda.Layout):
    """A sparse weight of codes and scales as a GPU reads it: panels of 16 × 256, stored strip by strip of 16 rows.

    A panel is its bitmap, scales and words, as in code_tiles.py. dtype: of inputs and outputs. bits: of a code, 2 to 8.
    """

    TABLE: ClassVar[int] = TABLE
    PANEL: ClassVar[int] = code_tiles.COLUMNS
    # 69 µs for eight rows, 275 to unpack and multiply: 7B, 70 %, 8 bits, one H200 (gpu_codes, gpu_rows).
    MOST_ROWS: ClassVar[int] = 24
    bits: int = 8

    @property
    def code_bits(self) -> int:
        """Return the bits of a code in the panels."""
        return code_tiles.stream_bits(self.bits)

    def coded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (rows, columns) int8 and scales (rows, ⌈columns/128⌉) float16."""
        places = cuda.PIECE * self.starts[:-1].long()
        head = self.data[places[:, None] + torch.arange(HEAD, device=places.device)]
        bitmaps, scales = head.split([code_tiles.MAP, HEAD - code_tiles.MAP], 1)
        panels = torch.arange(len(places) + 1, device=places.device)
        starts = (cuda.PIECE * self.starts.long() - HEAD * panels) // ROW_OF_WORDS
        words = self.data[_word_places(starts)].view(-1, ROW_OF_WORDS)
        scales = scales.contiguous().view(torch.float16)
        return code_tiles.unpack_code_tiles(
            bitmaps.contiguous(), scales, words, starts, self.bits, self.rows, self.columns
        )

    def expanded(self, dtype: torch.dtype) -> torch.Tensor:
        """Restore the dense weight (rows, columns) by torch: code times scale, rounded once."""
        codes, scales = self.coded()
        spread = scales.float().repeat_interleave(quantise.GROUP, 1)[:, : self.columns]
        return (codes * spread).to(dtype)


def pack_codes(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> CodedLayout:
    """Pack codes (out, in) int8 and scales (out, ⌈in/128⌉) float16, on their device, for inputs of bf16 or fp16.

    Errors: TypeError for another dtype; as `code_tiles.pack_code_tiles`.
    """
    if dtype not in cuda.DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: bfloat16 or float16")
    bitmaps, own, words, starts = code_tiles.pack_code_tiles(codes, scales, bits)
    panels = torch.arange(len(bitmaps) + 1, device=codes.device)
    places = HEAD * panels + ROW_OF_WORDS * starts
    data = torch.empty(int(places[-1]), dtype=torch.uint8, device=codes.device)
    head = torch.cat([bitmaps, own.view(torch.uint8)], 1)
    data[places[:-1, None] + torch.arange(HEAD, device=codes.device)] = head
    data[_word_places(starts)] = words.flatten()
    rows, columns = codes.shape
    layout = CodedLayout(
        rows,
        columns,
        -(-columns // code_tiles.COLUMNS),
        int(places.diff().max()),
        dtype,
        data,
        (places // cuda.PIECE).to(torch.int32),
        bits,
    )
    cuda.complete(data)
    return layout


def _word_places(starts: torch.Tensor) -> torch.Tensor:
    """Return the positions of all words' bytes in the data; starts: each panel's first row of words, int64."""
    panels = torch.arange(1, len(starts), device=starts.device)
    head = HEAD * torch.repeat_interleave(panels, starts.diff())
    rows = torch.arange(len(head), device=starts.device)
    return ((head + ROW_OF_WORDS * rows)[:, None] + torch.arange(ROW_OF_WORDS, device=starts.device)).flatten()
