"""Plans of cyclic convolutions: lengths, their factors, tiles. Pure functions without triton, torch or a GPU.

A length runs as one factor up to 64, or as two or three up to 32, each padded to a power of two of at least 16; a
leading factor of 3 or 4 before two others stays as it is (see structured_kernels.py). A length without such factors, or
only ones whose padding costs more than it is worth, is convolved linearly within a longer one: `cyclic_length` says
which. Tiles were chosen from the compiler's report (no register spills, at most 99 KB of shared memory, so that they
run on every GPU), not from timings.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from .problem import H200, Gpu
from .tiles import DTYPES, cdiv, next_power_of_2

MAX_SINGLE = 64
MAX_FACTOR = 32
# Pairs (N2, N3). Two factors of 32, or three of which the last two are padded to 16, or the last to 32 after a small
# one: more would not fit the registers. Neither would factors of 64, whose W each warp holds.
LAST_FACTORS = [(1, last) for last in range(2, 33)] + [(n, last) for n in range(2, 17) for last in range(2, 33)]
# Leading factors without padding: their product costs the square of them, of which more than 16 would not be worth it.
# Lengths of twice two factors have two factors themselves.
SMALL_FACTORS = (3, 4)
MAX_LENGTH = 8192
# Larger tiles are transformed in bands of leading frequencies, and results made in as many leading rows, BAND at once.
LARGE = 4096
BAND = 16
PRECISIONS = ("half", "split")
# What a stage of a transform costs a point beside its products, in multiply-adds: instructions of code for sm_90.
STAGE = 128
# Beyond five times the length, padding costs more than a linear convolution in a length of twice as much.
MAX_PADDING = 5


@dataclass(frozen=True)
class ConvolutionPlan:
    """How a convolution runs.

    factors, padded: (N1, N2, N3) and (P1, P2, P3) of structured_kernels.py, 1 where there is no such factor.
    band: leading frequencies that a tile holds at once, all P1 of them or less; of a small P1 one.
    rows_in, rows_mid, rows_out: leading rows of a tile for the columns of the input, the intermediate and the output;
    blocks_out: how many programs share the output's.
    pairs: pairs of matrix rows in a tile; programs: how many share the tiles of the backward, 0 in a forward.
    fused: the backward makes dx and dk in one pass; otherwise dx is a convolution of its own.
    chained: two convolutions run as one kernel; otherwise the intermediate goes through memory in fp32.
    """

    factors: tuple[int, int, int]
    padded: tuple[int, int, int]
    band: int
    rows_in: int
    rows_mid: int
    rows_out: int
    blocks_out: int
    pairs: int
    split: bool
    num_warps: int
    num_stages: int
    programs: int = 0
    fused: bool = False
    chained: bool = False

    @property
    def tile(self) -> tuple[int, int, int]:
        return (self.band, *self.padded[1:])

    @property
    def maxnreg(self) -> int:
        """All registers of a multiprocessor for one block: the compiler would rather spill a little to fit another."""
        return min(255, 2048 // self.num_warps)

    @property
    def points(self) -> int:
        return math.prod(self.padded)


def padded_factors(factors: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tensor cores take at least 16; only the last factor is there when it is 1, and a small leading one as it is."""
    sizes = [max(16, next_power_of_2(factor)) for factor in factors]
    if _small(factors):
        sizes[0] = factors[0]
    return (sizes[0] if factors[0] > 1 else 1, sizes[1] if factors[1] > 1 else 1, sizes[2])


def _small(factors: tuple[int, int, int]) -> bool:
    return factors[0] in SMALL_FACTORS and factors[1] > 1


def cost(padded: tuple[int, int, int]) -> int:
    """Instructions of the transforms, up to a constant."""
    return math.prod(padded) * sum(max(16, p) + STAGE for p in padded if p > 1)


@lru_cache(maxsize=4096)
def factors_of(length: int) -> tuple[int, int, int] | None:
    """Cheapest (N1, N2, N3) of a cyclic length, None when it has to be embedded in a longer one."""
    if length <= MAX_SINGLE:
        return (1, 1, length)
    found = []
    for middle, last in LAST_FACTORS:
        leading, rest = divmod(length, middle * last)
        factors = (leading, middle, last)
        if rest == 0 and 1 < leading <= MAX_FACTOR and (middle == 1 or last <= 16 or _small(factors)):
            padded = padded_factors(factors)
            if math.prod(padded) <= MAX_PADDING * length:
                # The more of the columns of a tile are contiguous, the better.
                found.append((cost(padded), math.prod(padded), -math.gcd(last, 16), factors))
    return min(found)[-1] if found else None


def aligned(factors: tuple[int, int, int]) -> bool:
    """Whether the columns of a tile come in vectors, and dropout is drawn by groups of eight."""
    return factors[2] % 8 == 0


def cost_of(length: int) -> int:
    """`cost` of a length that the kernels take as it is."""
    return cost(padded_factors(factors_of(length)))


def direct(n: int) -> bool:
    """Whether the kernels take the cyclic length n as it is."""
    return n >= 1 and factors_of(n) is not None


@lru_cache(maxsize=4096)
def next_length(least: int) -> int:
    """Cheapest length of at least `least`. Raises ValueError beyond MAX_LENGTH."""
    if not 1 <= least <= MAX_LENGTH:
        raise ValueError(f"a convolution needs a length in 1..{MAX_LENGTH}, got {least}")
    if least <= MAX_FACTOR:
        return least
    lengths = [cdiv(least, rest) * rest for rest in (16, 32, 96, 128, 256)]
    lengths = [length for length in lengths if length <= MAX_LENGTH and direct(length)]
    return min(lengths, key=lambda length: (cost_of(length), not aligned(factors_of(length)), length))


def cyclic_length(n: int) -> int:
    """Length in which a cyclic convolution of n runs: n itself, or a longer one that embeds it as a linear convolution.
    Raises ValueError where that is beyond MAX_LENGTH.
    """
    return n if direct(n) else next_length(2 * n - 1)


def plan_convolution(
    m: int,
    n_in: int,
    n_out: int,
    length: int,
    precision: str,
    *,
    n_mid: int = 0,
    backward: bool = False,
    gpu: Gpu = H200,
) -> ConvolutionPlan:
    """Plan of m rows through a matrix [n_out, n_in] cut from the cyclic one of `length`.

    n_mid: columns between two convolutions, 0 for one. backward: the pass that makes dx and the gradient of the kernel.
    Raises ValueError for a length without factors or one shorter than the columns.
    """
    return _plan(next_power_of_2(m), n_in, n_out, length, precision, n_mid, backward, gpu)


@lru_cache(maxsize=4096)
def _plan(m, n_in, n_out, length, precision, n_mid, backward, gpu):
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if not max(n_in, n_out, n_mid) <= length <= MAX_LENGTH or not direct(length):
        raise ValueError(f"no convolution of {n_in} to {n_out} columns in length {length}")
    factors = factors_of(length)
    padded = padded_factors(factors)
    points = math.prod(padded)
    small = _small(factors)
    split, large = precision == "split", points > LARGE
    rows_in, rows_mid, rows_out = (_leading_rows(n, factors) for n in (n_in, n_mid or n_out, n_out))
    blocks_out = 1
    if large and split and not backward:
        rows_out, blocks_out = BAND, rows_out // BAND
    if small:
        # Half as many where the compiler begins to spill: with split operands, with loads and draws by the column, and
        # in a backward on sm_120 by Triton 3.8.
        spills = split or not aligned(factors) or (backward and gpu.capability >= 120)
        pairs = (512 if spills else 1024) * padded[0] // points
    else:
        # Of two factors of 32 with split operands, four warps have no room for two pairs. One pair costs half as much
        # again for each row, because its columns are too few for the warps to share.
        pairs = 2 if split and points == 1024 else max(1, (1024 if split else 2048) // points)
    num_warps = 4 if points * pairs <= (1024 if split else 2048) or small else 8
    if points == LARGE and not backward and not n_mid:
        num_warps = 16
    # Each limit is where the compiler begins to spill.
    # Code with split operands takes a few registers more on sm_100, and on sm_120, which has little shared memory too.
    crowded = split and 100 <= gpu.capability < 120
    if crowded and backward and (small or large):
        num_warps *= 2
    roomy = not split or (gpu.shared_memory > 99 * 1024 and not crowded)
    fused = points < LARGE or (points == LARGE and aligned(factors) and roomy)
    chained = points <= LARGE // 4 and rows_in <= 16 if split else points <= LARGE
    return ConvolutionPlan(
        factors=factors,
        padded=padded,
        band=1 if small else BAND if large and (split or backward) else padded[0],
        rows_in=rows_in,
        rows_mid=rows_mid,
        rows_out=rows_out,
        blocks_out=blocks_out,
        pairs=pairs,
        split=split,
        num_warps=num_warps,
        num_stages=1,
        programs=min(2 * gpu.sm_count, cdiv(m, 2 * pairs)) if backward else 0,
        fused=backward and fused,
        chained=n_mid > 0 and chained and not small,
    )


def _leading_rows(n: int, factors: tuple[int, int, int]) -> int:
    """Rows of a tile that hold n columns, padded like a factor: they are the inner length of the first product."""
    rows = next_power_of_2(cdiv(n, factors[1] * factors[2]))
    return rows if _small(factors) or factors[0] == 1 else max(16, rows)


@dataclass(frozen=True)
class ConvolutionConfig:
    """One kernel to compile: convolve_kernel or backward_kernel for a plan, and its switches."""

    kernel: str
    dtype: str
    plan: ConvolutionPlan
    switches: frozenset[str]

    @property
    def num_warps(self) -> int:
        return self.plan.num_warps

    @property
    def num_stages(self) -> int:
        return self.plan.num_stages

    @property
    def maxnreg(self) -> int:
        return self.plan.maxnreg


def convolution_configs(dtype: str, n: int, length: int, m: int = 4096, gpu: Gpu = H200) -> list[ConvolutionConfig]:
    """Every kernel that n x n matrices cut from a cyclic one may launch in a type, with and without dropout."""
    precision = "half" if dtype == "bfloat16" else "split"
    forward = plan_convolution(m, n, n, length, precision, gpu=gpu)
    chain = plan_convolution(m, n, n, length, precision, n_mid=n, gpu=gpu)
    found = [("convolve_kernel", forward, names) for names in ((), ("DROP_INPUT",), ("DROP_OUTPUT",))]
    if chain.chained:
        found += [("convolve_kernel", chain, ("then", *names)) for names in ((), ("DROP_INPUT",))]
    # The gradient of an fp32 vector is in split precision, whatever the rows.
    for needed in dict.fromkeys((precision, "split")):
        backward = plan_convolution(m, n, n, length, needed, backward=True, gpu=gpu)
        for names in ((), ("DROPOUT",)):
            found.append(("backward_kernel", backward, names))
            if backward.fused:
                found.append(("backward_kernel", backward, ("NEED_DX", *names)))
    return [ConvolutionConfig(kernel, dtype, plan, frozenset(names)) for kernel, plan, names in found]


# Widths of models, with small and awkward ones.
WIDTHS = (
    1,
    7,
    16,
    33,
    64,
    97,
    128,
    256,
    384,
    512,
    768,
    1000,
    1024,
    1536,
    2048,
    2304,
    2560,
    3072,
    4096,
    5120,
    6144,
    8192,
)


def configurations(gpu: Gpu = H200) -> list[ConvolutionConfig]:
    """Every distinct kernel configuration of a GPU's plans over types and widths, circulant and Toeplitz."""
    found = {}
    for dtype in DTYPES:
        for n in WIDTHS:
            lengths = [cyclic_length(n)]
            if 2 * n - 1 <= MAX_LENGTH:
                lengths.append(next_length(2 * n - 1))
            for length in lengths:
                found |= dict.fromkeys(convolution_configs(dtype, n, length, gpu=gpu))
    return list(found)
