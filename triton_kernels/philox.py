"""Dropout mask on the device; the convention is in dropout.py."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed_ptr, rows, col_start, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mask [BLOCK_M, BLOCK_K] of kept elements for rows [BLOCK_M] and columns col_start (a multiple of 8) onwards."""
    groups = col_start // 8 + tl.arange(0, BLOCK_K // 8)
    # The counter words stay one-dimensional, so the first round and most of the second run on a row and a column
    # instead of on the whole tile.
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), groups[None, :], rows[:, None], 0, 0, n_rounds=7)
    # Two joins order the words as index 2a + b = 0..3; the third puts the low half of a word before its high half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    draws = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(draws.to(tl.int32), [BLOCK_M, BLOCK_K]) >= threshold
