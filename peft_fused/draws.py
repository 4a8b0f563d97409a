"""Random choices as pure functions of what they are for: equal on every process and platform, and after a resume.

A stateful generator would have to be saved, kept in step on all processes, and replayed by activation checkpointing. A
hash of (seed, step, layer, purpose, index) needs none of that. The arithmetic is on integers, or on sums and products
of doubles that IEEE 754 defines exactly, so no two machines can disagree.
"""

import hashlib

BITS = 64


def draw_bits(seed: int, step: int, *, purpose: str, layer: int | str = 0, index: int = 0) -> int:
    """64 uniform bits. seed, step, index: any ints; layer: number or name; purpose: keeps unrelated choices
    independent.

    Equal arguments give equal bits; TypeError for other types.
    """
    for name, value in (("seed", seed), ("step", step), ("index", index)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not isinstance(purpose, str) or isinstance(layer, bool) or not isinstance(layer, int | str):
        raise TypeError(f"purpose must be a str and layer an int or a str, got {purpose!r} and {layer!r}")
    # repr separates the fields unambiguously, whatever the strings contain.
    key = repr((seed, step, layer, purpose, index)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=BITS // 8).digest(), "little")


def draw_float(seed: int, step: int, *, purpose: str, layer: int | str = 0, index: int = 0) -> float:
    """A uniform double in [0, 1), a multiple of 2^-53. Arguments: see `draw_bits`."""
    return (draw_bits(seed, step, purpose=purpose, layer=layer, index=index) >> (BITS - 53)) * 2.0**-53


def draw_int(low: int, high: int, seed: int, step: int, *, purpose: str, layer: int | str = 0, index: int = 0) -> int:
    """A uniform int in low..high, both included; no value is favoured by more than 2^-64 of the range.

    ValueError if the range is empty. The other arguments: see `draw_bits`.
    """
    if low > high:
        raise ValueError(f"low must not exceed high, got {low}..{high}")
    bits = draw_bits(seed, step, purpose=purpose, layer=layer, index=index)
    return low + (bits * (high - low + 1) >> BITS)


def draw_geometric(
    low: int, high: int, p: float, seed: int, step: int, *, purpose: str, layer: int | str = 0, index: int = 0
) -> int:
    """An int in low..high, both included, with probability proportional to (1 - p)^(value - low).

    ValueError if the range is empty or p is outside (0, 1). The other arguments: see `draw_bits`.
    """
    if low > high:
        raise ValueError(f"low must not exceed high, got {low}..{high}")
    if not 0.0 < p < 1.0:
        raise ValueError(f"p must be in (0, 1), got {p}")
    weights = [1.0]
    while len(weights) <= high - low:
        weights.append(weights[-1] * (1.0 - p))
    target = draw_float(seed, step, purpose=purpose, layer=layer, index=index) * sum(weights)
    total = 0.0
    for value, weight in enumerate(weights, low):
        total += weight
        if target < total:
            return value
    return high
