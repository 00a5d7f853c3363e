"""Gap streams: there and back, what an entry may be, and the formula against counted entries."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oracle_tests import strategies
from reference.gaps import CHUNK, bits_per_weight, pack_gaps, unpack_gaps


@given(weight=strategies.matrices(columns=st.integers(1, 40)), segment=st.integers(1, 45), gap_bits=st.integers(1, 8))
def test_there_and_back(weight: np.ndarray, segment: int, gap_bits: int) -> None:
    values, codes, chunks = pack_gaps(weight, segment, gap_bits)
    assert np.array_equal(unpack_gaps(values, codes, chunks, weight.shape[1], segment), weight)
    # Nothing but the kept weights, in the order of the rows, and zeros.
    assert np.array_equal(values[values != 0], weight[weight != 0])
    assert codes.max(initial=0) < 2**gap_bits
    # No entry jumps that need not, and less than a chunk of each stream is unused.
    assert len(values) <= CHUNK * (np.count_nonzero(weight) + weight.size / 2**gap_bits + chunks.size)


def test_entries_one_by_one() -> None:
    """Five zeros in a row: with one bit a jump takes two columns, with two bits four, with three none is needed."""
    row = [[0.0, 0.0, 0.0, 0.0, 0.0, 3.0]]
    for gap_bits, expected in ((1, [1, 1, 1]), (2, [3, 1]), (3, [5])):
        values, codes, chunks = pack_gaps(row, 6, gap_bits)
        assert codes.tolist() == expected + [0] * (8 - len(expected))
        assert values.tolist() == [0.0] * (len(expected) - 1) + [3.0] + [0.0] * (8 - len(expected))
        assert chunks.tolist() == [[1]]


def test_the_formula_is_the_mean_of_long_streams() -> None:
    random = np.random.default_rng(0)
    for sparsity in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0):
        weight = (random.random((4, 50_000)) >= sparsity).astype(float)
        for gap_bits in (1, 3, 4):
            entries = len(pack_gaps(weight, 50_000, gap_bits)[0])
            # At 100 % no jump is written since nothing follows it: the limit counts what a rare weight would cost.
            expected = 0.0 if sparsity == 1 else bits_per_weight(sparsity, 16, gap_bits)
            assert abs(entries * (16 + gap_bits) / weight.size - expected) < 0.02 * expected + 0.01
