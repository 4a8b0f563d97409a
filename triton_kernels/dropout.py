"""The dropout convention shared by every backend: 16 random bits per element.

Element (m, k) of the 2-D input draws a 16-bit integer from Philox-4x32-7 with counter (k // 8, m, 0, 0) and the 64-bit
seed as key; it is kept when that integer is at least `threshold`. The keep scale is derived from the threshold and not
from p, so dropout stays exactly unbiased although p is rounded to a multiple of 2**-16.
"""

LEVELS = 1 << 16


def dropout_threshold(p: float) -> int:
    """How many of the 65,536 equally likely draws drop an element, at most 65,535. ValueError for p outside [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be in [0, 1], got {p}")
    return min(LEVELS - 1, round(p * LEVELS))


def keep_scale(threshold: int) -> float:
    """Factor 1 / (1 - threshold / 65536) applied to kept elements."""
    return LEVELS / (LEVELS - threshold)
