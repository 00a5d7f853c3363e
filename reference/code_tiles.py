"""A sparse matrix of codes and scales, in the order in which a GPU's matrix units read them: a stream of codes for each lane.

Legend: codes c from −q to q and scales s as in quantise.py, one scale for every 128 columns of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import _checks
from reference.quantise import GROUP, largest_code

ROWS, COLUMNS = 16, 256
"""Shape of a panel: what one warp multiplies at once."""
LANES, NUMBERS = 32, ROWS * COLUMNS // 32
"""Lanes of a warp, and numbers of a panel that each of them multiplies."""
MAP = ROWS * COLUMNS // 8
"""Bytes of a panel's bitmap."""
WORD = 4
"""Bytes of a word: what a lane reads at once."""


def pack_code_tiles(
    codes: NDArray[np.int8], scales: NDArray[np.float16], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8], NDArray[np.int64]]:
    """Cut a matrix of codes into panels of 16 x 256; of each, write a bitmap, the scales, and the kept codes lane by lane.

    Source: ours (decision 69).

    In the product m16n8k16, lane l of a warp holds four numbers of row l // 4 of the upper 8 rows, and four of the lower 8.
    A lane reads 8 neighbouring numbers of x at once, so 32 columns make two products, as in tiles.py.

        panels: 16 rows from left to right, then the next 16
        lane l = 4 (r mod 8) + c // 8 mod 4                          for row r and column c of a panel
        its number n = 16 (c // 32) + 8 (c // 4 mod 2) + 4 (r // 8) + c mod 4
        bitmap: bit n mod 8 of byte 16 l + n // 8;   scales: row by row, those of columns 0-127 and 128-255
        stream of lane l: its kept codes in the order of n, each in b' bits: |c| below the sign, the lowest bit first
        words: row k of the panel has bytes 4 k to 4 k + 3 of every lane's stream, lane by lane

    b' is 4 for b up to 4, otherwise 8. A panel has as many rows of words as its longest stream needs.

    Parameters: codes (out, in) int8, from −q to q; scales (out, ⌈in/128⌉) float16; bits b from 2 to 8.
    Returns: (bitmaps (panels, 512) uint8, scales (panels, 32) float16, words (rows, 128) uint8, panel by panel,
    starts (panels + 1,) int64, each panel's first row of words). Beyond the matrix, bits and scales are 0.

    *Deviation*: none.

    >>> bitmaps, scales, words, starts = pack_code_tiles(np.array([[0, 5, 0, -7]], np.int8), np.ones((1, 1), np.float16), 8)
    >>> bitmaps[0, :2], words[0, :4], starts
    (array([10,  0], dtype=uint8), array([  5, 135,   0,   0], dtype=uint8), array([0, 1]))
    """
    codes, scales = _check_codes(codes, scales, bits)
    width, (rows, columns) = _width(bits), codes.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS), dtype=np.int64)
    padded[:rows, :columns] = codes
    spread = np.zeros((len(padded), padded.shape[1] // GROUP), dtype=np.float16)
    spread[:rows, : scales.shape[1]] = scales
    bitmaps, own, words = [], [], []
    for top, left in _corners(rows, columns):
        bitmap, streams = np.zeros(MAP, dtype=np.uint8), [0] * LANES
        lengths = [0] * LANES
        for lane, n, row, column in _places():
            code = int(padded[top + row, left + column])
            if code:
                bitmap[NUMBERS // 8 * lane + n // 8] |= 1 << n % 8
                streams[lane] |= (abs(code) | (code < 0) << width - 1) << lengths[lane]
                lengths[lane] += width
        count = -(-max(lengths) // (8 * WORD))
        bitmaps.append(bitmap)
        own.append(spread[top : top + ROWS, left // GROUP : (left + COLUMNS) // GROUP].ravel())
        bytes_ = b"".join(stream.to_bytes(count * WORD, "little") for stream in streams)
        words.append(
            np.frombuffer(bytes_, np.uint8).reshape(LANES, count, WORD).swapaxes(0, 1).reshape(count, LANES * WORD)
        )
    starts = np.cumsum([0, *map(len, words)]).astype(np.int64)
    return np.stack(bitmaps), np.stack(own), np.concatenate(words), starts


def unpack_code_tiles(
    bitmaps: NDArray[np.uint8],
    scales: NDArray[np.float16],
    words: NDArray[np.uint8],
    starts: NDArray[np.int64],
    bits: int,
    rows: int,
    columns: int,
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Restore codes and scales from their tiles.

    Source: ours, the inverse of `pack_code_tiles`.

    Parameters: bitmaps, scales, words, starts as `pack_code_tiles` returns them, for the same bits; rows, columns: of the matrix.
    Returns: (codes (rows, columns) int8, scales (rows, ⌈columns/128⌉) float16).

    Errors: ValueError or TypeError for a wrong shape or dtype; starts that are not those of the bitmaps.

    *Deviation*: none.

    >>> unpack_code_tiles(*pack_code_tiles(np.array([[0, 5, 0, -7]], np.int8), np.ones((1, 1), np.float16), 8), 8, 1, 4)
    (array([[ 0,  5,  0, -7]], dtype=int8), array([[1.]], dtype=float16))
    """
    rows, columns = _checks.integer("rows", rows, 1), _checks.integer("columns", columns, 1)
    width, corners = _width(bits), list(_corners(rows, columns))
    _checks.typed("bitmaps", bitmaps, np.uint8, (len(corners), MAP))
    _checks.typed("scales", scales, np.float16, (len(corners), ROWS * COLUMNS // GROUP))
    _checks.typed("starts", starts, np.int64, (len(corners) + 1,))
    longest = np.unpackbits(bitmaps.reshape(-1, LANES, NUMBERS // 8), axis=2).sum(axis=2, dtype=np.int64).max(axis=1)
    needed = np.concatenate([[0], (-(-longest * width // (8 * WORD))).cumsum()])
    wrong = np.flatnonzero(starts != needed)
    if len(wrong):
        raise ValueError(f"starts[{wrong[0]}] is {starts[wrong[0]]}, but by bitmaps it is {needed[wrong[0]]}")
    _checks.typed("words", words, np.uint8, (int(starts[-1]), LANES * WORD))
    codes = np.zeros((-(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS), dtype=np.int8)
    spread = np.zeros((len(codes), codes.shape[1] // GROUP), dtype=np.float16)
    for panel, (top, left) in enumerate(corners):
        own = words[starts[panel] : starts[panel + 1]].reshape(-1, LANES, WORD).swapaxes(0, 1)
        streams = [int.from_bytes(own[lane].tobytes(), "little") for lane in range(LANES)]
        for lane, n, row, column in _places():
            if bitmaps[panel, NUMBERS // 8 * lane + n // 8] >> n % 8 & 1:
                code, streams[lane] = streams[lane] % 2**width, streams[lane] >> width
                size = code % 2 ** (width - 1)
                codes[top + row, left + column] = size if code == size else -size
        block = scales[panel].reshape(ROWS, COLUMNS // GROUP)
        spread[top : top + ROWS, left // GROUP : (left + COLUMNS) // GROUP] = block
    return codes[:rows, :columns], spread[:rows, : -(-columns // GROUP)]


def _width(bits: int) -> int:
    """Return the bits of a code in a stream."""
    return 4 if largest_code(bits) <= largest_code(4) else 8


def _corners(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and column of every panel."""
    for top in range(0, rows, ROWS):
        for left in range(0, columns, COLUMNS):
            yield top, left


def _places() -> Iterator[tuple[int, int, int, int]]:
    """Yield (lane, its number n, row, column) of every number of a panel, lane by lane."""
    for lane in range(LANES):
        for n in range(NUMBERS):
            yield lane, n, n // 4 % 2 * 8 + lane // 4, n // 16 * 32 + lane % 4 * 8 + n // 8 % 2 * 4 + n % 4


def _check_codes(codes: Any, scales: Any, bits: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Check codes and their scales."""
    q = largest_code(bits)
    _checks.typed("codes", codes, np.int8)
    if codes.ndim != 2 or codes.size == 0:
        raise ValueError(f"codes has shape {codes.shape}; allowed: (out, in), none of them 0")
    if np.abs(codes.astype(np.int64)).max() > q:
        raise ValueError(f"codes holds {codes.min()} and {codes.max()}; allowed: {-q} to {q} with {bits} bits")
    _checks.typed("scales", scales, np.float16, (len(codes), -(-codes.shape[1] // GROUP)))
    return codes, scales
