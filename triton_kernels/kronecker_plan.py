"""Launch plans of the Kronecker kernels: a pure function, without torch or triton, like lowrank_plan.py.

Tiles depend on the factors' sizes and types and on the GPU's shared memory alone, so that no number of rows compiles a
kernel again. They were chosen from the compiler's resource report (no register spills, no more shared memory than the
GPU has), not from timings.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from .problem import H200, LARGE, MEDIUM, SMALL, Gpu
from .tiles import DTYPES, KernelConfig, cdiv, next_power_of_2, operand_class


@dataclass(frozen=True)
class KroneckerProblem:
    """m rows, A [a1, a2], B [b1, b2]: b2 a2 inputs and b1 a1 outputs. Types are names such as "bfloat16"."""

    m: int
    a1: int
    a2: int
    b1: int
    b2: int
    dtype: str
    factor_dtype: str
    gpu: Gpu


@dataclass(frozen=True)
class KroneckerLaunch:
    """Tile of one kernel: block_m rows at a time and block_a1 columns of every Y_m, the other sizes whole but padded.

    m_blocks: blocks of rows of one program. grid: programs along the rows and along the columns.
    """

    block_m: int
    block_a1: int
    block_a2: int
    block_b1: int
    block_b2: int
    num_warps: int
    num_stages: int
    m_blocks: int
    grid: tuple[int, int]


TOGETHER, DX_ALONE, ALONE = ("xAB",), ("x", "AB"), ("x", "A", "B")


@dataclass(frozen=True)
class Tile:
    """How large a tile may be: elements of its largest matrix, and columns of Y_m, whose number divides the work.

    passes: of a backward, which gradients one pass takes together; dx by itself is the forward kernel on dY. More
    operands, or wider ones, do not fit the registers together.
    shared_memory: bytes of a block that a GPU must have to take the tile; every one has SMALL.
    """

    elements: int
    columns: int
    num_warps: int
    num_stages: int = 2
    passes: tuple[str, ...] = TOGETHER
    shared_memory: int = SMALL


# By class of operands (see lowrank_plan.py) and by the largest padded size, which must be in the table: tiles, of which
# a GPU takes the first for which it has the shared memory.
FORWARD = {
    "half": {
        16: (Tile(8192, 16, 8),),
        32: (Tile(8192, 32, 4),),
        64: (Tile(8192, 64, 4),),
        128: (Tile(16384, 128, 8, shared_memory=MEDIUM), Tile(16384, 64, 8, 1)),
    },
    "split": {16: (Tile(4096, 16, 4),), 32: (Tile(4096, 32, 8),), 64: (Tile(4096, 32, 8),)},
    "full": {16: (Tile(2048, 16, 4),), 32: (Tile(4096, 32, 4),), 64: (Tile(2048, 32, 4),)},
}
BACKWARD = {
    "half": {
        16: (Tile(2048, 16, 4),),
        32: (Tile(2048, 32, 4),),
        # Without wgmma, operands that it reads from shared memory take registers.
        64: (Tile(4096, 64, 4, shared_memory=LARGE), Tile(4096, 64, 4, passes=DX_ALONE)),
        128: (Tile(16384, 32, 8, 1, ALONE),),
    },
    "split": {
        16: (Tile(1024, 16, 4),),
        32: (Tile(2048, 32, 8, 2, DX_ALONE),),
        64: (Tile(2048, 32, 8, 2, DX_ALONE, LARGE), Tile(2048, 16, 8, 2, DX_ALONE)),
    },
    "full": {
        16: (Tile(1024, 16, 4, 2, ALONE),),
        32: (Tile(2048, 32, 4, 2, ALONE),),
        64: (Tile(2048, 32, 4, 2, ALONE, MEDIUM), Tile(2048, 32, 4, 1, ALONE)),
    },
}
# Several programs for each multiprocessor, but each of backward's costs a partial of partial sums.
PROGRAMS_PER_SM = {"forward": 4, "backward": 2}
REDUCE = {"BLOCK_P": 16, "BLOCK": 128}
REDUCE_WARPS = 4

# Factors of common layers as (a1, a2, b1, b2): 768 = 32 x 24 to itself and to 3072 = 64 x 48, 4096 = 64 x 64 and
# 16384 = 128 x 128; factors whose rows are no groups of eight; a column times a row.
SHAPES = (
    (24, 24, 32, 32),
    (48, 24, 64, 32),
    (64, 64, 64, 64),
    (128, 128, 128, 128),
    (7, 11, 13, 5),
    (1, 96, 100, 1),
)


def limits(a1: int, a2: int, b1: int, b2: int, dtype: str, factor_dtype: str, dropout: bool = False) -> list[str]:
    """Why the kernels are not for factors A [a1, a2] and B [b1, b2]; empty when they are. dropout: of the input."""
    if dtype not in DTYPES or factor_dtype not in (dtype, "float32"):
        return [f"x is {dtype} and the factors are {factor_dtype}; the kernels take factors of x's type or float32"]
    most = max(FORWARD[operand_class(dtype, factor_dtype)])
    reasons = [
        f"{name} is {list(sizes)}; the kernels take sizes up to {most} for {dtype} x and {factor_dtype} factors"
        for name, sizes in (("A", (a1, a2)), ("B", (b1, b2)))
        if max(sizes) > most
    ]
    # Every element then draws eight numbers of which it uses one, and on larger tiles they fill the registers.
    if dropout and a2 % 8 and max(a1, a2, b1, b2) > 16:
        reasons.append(f"A is {[a1, a2]}; dropout takes a multiple of 8 columns unless all sizes are at most 16")
    return reasons


def forward_launch(problem: KroneckerProblem) -> KroneckerLaunch:
    """Launch of a forward. ValueError for factors beyond the limits."""
    return _launch(problem, "forward")


def backward_passes(
    problem: KroneckerProblem, needs: frozenset[str]
) -> list[tuple[frozenset[str], KroneckerLaunch | None]]:
    """The passes of a backward: gradients taken together, and their launch. dx alone has none: it is a forward."""
    passes = [frozenset(group) & needs for group in _tile(problem, "backward").passes]
    return [(group, None if group == {"x"} else _launch(problem, "backward")) for group in passes if group]


def _tile(p: KroneckerProblem, direction: str) -> Tile:
    reasons = limits(p.a1, p.a2, p.b1, p.b2, p.dtype, p.factor_dtype)
    if reasons:
        raise ValueError("; ".join(reasons))
    table = FORWARD if direction == "forward" else BACKWARD
    tiles = table[operand_class(p.dtype, p.factor_dtype)][padded(max(p.a1, p.a2, p.b1, p.b2))]
    return next(tile for tile in tiles if tile.shared_memory <= p.gpu.shared_memory)


def padded(size: int) -> int:
    """The size of a block that holds an axis of a factor."""
    return max(16, next_power_of_2(size))


@lru_cache(maxsize=4096)
def _launch(p: KroneckerProblem, direction: str) -> KroneckerLaunch:
    tile = _tile(p, direction)
    block_a1 = min(padded(p.a1), tile.columns)
    block_a2, block_b1, block_b2 = padded(p.a2), padded(p.b1), padded(p.b2)
    block_m = max(1, tile.elements // (max(block_a1, block_a2) * max(block_b1, block_b2)))
    blocks, columns = cdiv(p.m, block_m), cdiv(p.a1, block_a1)
    m_blocks = max(1, cdiv(blocks, cdiv(PROGRAMS_PER_SM[direction] * p.gpu.sm_count, columns)))
    grid = (cdiv(blocks, m_blocks), columns)
    return KroneckerLaunch(
        block_m, block_a1, block_a2, block_b1, block_b2, tile.num_warps, tile.num_stages, m_blocks, grid
    )


def constexprs(problem: KroneckerProblem, launch: KroneckerLaunch) -> dict[str, int]:
    """What both kernels are compiled for, apart from their flags."""
    sizes = {"A1": problem.a1, "A2": problem.a2, "B1": problem.b1, "B2": problem.b2}
    names = ("block_m", "block_a1", "block_a2", "block_b1", "block_b2")
    return sizes | {name.upper(): getattr(launch, name) for name in names}


def transposed(problem: KroneckerProblem) -> KroneckerProblem:
    """The problem of dx = dy W: a forward with the factors transposed."""
    return replace(problem, a1=problem.a2, a2=problem.a1, b1=problem.b2, b2=problem.b1)


def kernel_configs(problem: KroneckerProblem) -> list[KernelConfig]:
    """Every kernel that a problem launches for all gradients or for those of the factors, with the precision default of
    fp32 products."""
    configs = []

    def add(kernel, constants, num_warps, num_stages):
        found = tuple(sorted(constants.items()))
        configs.append(KernelConfig(kernel, problem.dtype, problem.factor_dtype, found, num_warps, num_stages))

    def add_product(kernel, of, launch, **flags):
        add(kernel, constexprs(of, launch) | {"PREC": "tf32x3"} | flags, launch.num_warps, launch.num_stages)

    for dropout in (None, "input"):
        add_product("forward_kernel", problem, forward_launch(problem), DROPOUT=dropout)
    for needs, dropout in product((frozenset("xAB"), frozenset("AB")), (False, True)):
        for group, launch in backward_passes(problem, needs):
            if launch is None:
                back = transposed(problem)
                add_product("forward_kernel", back, forward_launch(back), DROPOUT="output" if dropout else None)
            else:
                flags = {"NEED_DX": "x" in group, "NEED_DA": "A" in group, "NEED_DB": "B" in group}
                add_product("backward_kernel", problem, launch, DROPOUT=dropout, **flags)
    add("reduce_kernel", REDUCE, REDUCE_WARPS, 1)
    return list(dict.fromkeys(configs))


def configurations(gpu: Gpu = H200) -> list[KernelConfig]:
    """Every distinct kernel configuration for the factors in SHAPES on a GPU, over all supported types."""
    found = {}
    for dtype in DTYPES:
        for factor_dtype in dict.fromkeys((dtype, "float32")):
            for shape in SHAPES:
                if not limits(*shape, dtype, factor_dtype):
                    found |= dict.fromkeys(kernel_configs(KroneckerProblem(4096, *shape, dtype, factor_dtype, gpu)))
    return list(found)
