"""Launch plans of the bottleneck kernels: a pure function, without torch or triton, like lowrank_plan.py.

The rows of a group never share a block with those of another, so the number of rows of a group picks the block. Tiles
were chosen from the compiler's resource report (no register spills, at most the 99 KB of shared memory that every GPU
has), not from timings.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from .problem import H200, LARGE, Gpu, Problem
from .tiles import DTYPES, MAX_RANK, KernelConfig, cdiv, next_power_of_2, operand_class, reduce_launch

BOTTLENECK_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swish", "tanh", "identity")


@dataclass(frozen=True)
class BottleneckProblem(Problem):
    """h [m, k] through r units to [m, n], its rows in `groups` equal groups with an expert each."""

    r: int
    groups: int
    activation: str

    def describe(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return self.sentence("bottleneck", f", r={self.r}, {self.activation}{groups}", rows="h")

    def limits(self, backend: str) -> list[str]:
        if backend == "cuda":
            return ["bottleneck has no CUDA C++ kernel of its own"]
        reasons = []
        if self.r > MAX_RANK:
            reasons.append(f"r is {self.r}; the kernels take up to {MAX_RANK}")
        if self.activation not in BOTTLENECK_ACTIVATIONS:
            reasons.append(f"activation is {self.activation!r}; the kernels know {', '.join(BOTTLENECK_ACTIVATIONS)}")
        return reasons

    def preference(self) -> tuple[str, ...]:
        return ("triton", "torch")

    def native(self, backend: str) -> bool:
        return backend == "triton" or (backend == "torch" and self.device == "cpu")

    def launch_plan(self, backend: str):
        return plan_bottleneck(self) if backend == "triton" else None

    def words(self, backend: str) -> str:
        if backend != "triton":
            return ", two GEMMs"
        return ", one kernel" if plan_bottleneck(self).fused else ", two kernels"


@dataclass(frozen=True)
class RowsLaunch:
    """One launch of rows_kernel, over rows of one group at a time.

    block_k: columns read in a step of the product into the units. block_n: columns of a tile of the result. block_r:
    units of a block, all of them where one launch does both, which are `shrink` and `expand`. maxnreg: registers of a
    thread, if not the compiler's own choice. splits: programs that share the columns of the result; each finds the
    units of its rows again.
    """

    shrink: bool
    expand: bool
    block_m: int
    block_k: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    splits: int = 1


@dataclass(frozen=True)
class GradLaunch:
    """Tile of grad_kernel. splits: of the rows, each with partial sums of its own."""

    block_m: int
    block_x: int
    block_r: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    splits: int = 1


@dataclass(frozen=True)
class ReduceLaunch:
    """Tile of the second stage: of partial sums, columns and units."""

    block_p: int
    block_x: int
    block_r: int
    num_warps: int


@dataclass(frozen=True)
class BottleneckPlan:
    """How a problem runs. forward, backward (to dz and dh): one launch for both products, or two."""

    forward: tuple[RowsLaunch, ...]
    backward: tuple[RowsLaunch, ...]
    grad_down: GradLaunch
    grad_up: GradLaunch
    reduce: ReduceLaunch

    @property
    def fused(self) -> bool:
        return len(self.forward) == 1


class RowsTile(NamedTuple):
    """most_rows: of a block; small_rows: the same on a GPU with less shared memory than LARGE. The other names are as
    in RowsLaunch."""

    most_rows: int
    block_k: int
    block_n: int
    num_warps: int
    maxnreg: int | None = None
    small_rows: int | None = None


# By class of operands (see lowrank_plan.py) and block of units. More units than the largest key of FUSED take two
# launches, with blocks of units in both. Without maxnreg the compiler would rather leave a few numbers in local memory
# than have fewer blocks on a multiprocessor. Without wgmma, 64 rows of the most units are more than the registers hold.
FUSED = {
    "half": {
        16: RowsTile(64, 128, 64, 4),
        32: RowsTile(64, 128, 64, 4, 255),
        64: RowsTile(64, 64, 64, 8, 255),
        128: RowsTile(32, 64, 64, 8),
    },
    "split": {16: RowsTile(64, 64, 64, 4), 32: RowsTile(64, 64, 64, 4, 255), 64: RowsTile(32, 64, 64, 8)},
    "full": {
        16: RowsTile(64, 32, 64, 4, 255),
        32: RowsTile(64, 32, 32, 4),
        64: RowsTile(64, 32, 32, 8, small_rows=32),
    },
}
SHRINK = {
    "half": {128: RowsTile(32, 64, 64, 8)},
    "split": {64: RowsTile(64, 64, 64, 8, 255, small_rows=32)},
    "full": {64: RowsTile(64, 32, 32, 8)},
}
EXPAND = {
    "half": {64: RowsTile(64, 64, 64, 4)},
    "split": {32: RowsTile(32, 64, 32, 4)},
    "full": {32: RowsTile(64, 32, 32, 4)},
}
ROWS_STAGES = 3
# (most rows, block_x, num_warps, num_stages).
GRAD = {
    "half": {16: (64, 64, 4, 3), 32: (64, 64, 8, 3), 64: (64, 64, 8, 3), 128: (64, 64, 8, 2)},
    "split": {16: (64, 64, 4, 3), 32: (32, 64, 4, 3)},
    "full": {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 8, 3)},
}
# Each program costs a partial sum, so there are few for a multiprocessor: no use in saving registers for more of them.
GRADS_PER_SM = 2
GRAD_MAXNREG = 255
# Rows of a block, the most first: as many as leave the multiprocessors a block each, but for one in IDLE at most.
ROWS = (64, 32, 16)
IDLE = 32
# Least columns of a part: with fewer, finding the units again costs more than the part.
PART_COLUMNS = 256


def plan_bottleneck(problem: BottleneckProblem) -> BottleneckPlan:
    """Plan of a problem. ValueError for a size or an activation beyond the limits, or an unsupported pair of types."""
    return _plan(problem)


@lru_cache(maxsize=4096)
def _plan(p: BottleneckProblem) -> BottleneckPlan:
    if not 1 <= p.r <= MAX_RANK:
        raise ValueError(f"r must be in 1..{MAX_RANK}, got {p.r}")
    if p.activation not in BOTTLENECK_ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(BOTTLENECK_ACTIVATIONS)}, got {p.activation!r}")
    if p.dtype not in DTYPES or p.adapter_dtype not in (p.dtype, "float32"):
        raise ValueError(f"unsupported types: h {p.dtype}, parameters {p.adapter_dtype}")
    kind = operand_class(p.dtype, p.adapter_dtype)
    tile, reduce_warps = reduce_launch(p.r)
    return BottleneckPlan(
        forward=_rows(p, kind, p.n),
        backward=_rows(p, kind, p.k),
        grad_down=_grad(p, kind, p.k),
        grad_up=_grad(p, kind, p.n),
        reduce=ReduceLaunch(*tile.values(), reduce_warps),
    )


def _block_r(table: dict, r: int) -> int:
    return min(max(16, next_power_of_2(r)), max(table))


def _rows(p: BottleneckProblem, kind: str, columns: int) -> tuple[RowsLaunch, ...]:
    rows = cdiv(p.m, p.groups)
    busy = p.gpu.sm_count - p.gpu.sm_count // IDLE
    enough = next((b for b in ROWS if p.groups * cdiv(rows, b) >= busy and rows >= b), ROWS[-1])

    def launch(table, shrink, expand):
        block_r = _block_r(table, p.r)
        tile = table[block_r]
        small = tile.small_rows and p.gpu.shared_memory < LARGE  # and no wgmma
        block_m = min(enough, tile.small_rows if small else tile.most_rows)
        blocks = p.groups * cdiv(rows, block_m)
        splits = max(1, min(cdiv(busy, max(1, blocks)), columns // PART_COLUMNS)) if expand else 1
        sizes = block_m, tile.block_k, tile.block_n, block_r, tile.num_warps, ROWS_STAGES
        return RowsLaunch(shrink, expand, *sizes, tile.maxnreg, splits)

    if p.r <= max(FUSED[kind]):
        return (launch(FUSED[kind], True, True),)
    return launch(SHRINK[kind], True, False), launch(EXPAND[kind], False, True)


def _grad(p: BottleneckProblem, kind: str, columns: int) -> GradLaunch:
    block_r = _block_r(GRAD[kind], p.r)
    block_m, block_x, num_warps, num_stages = GRAD[kind][block_r]
    rows = cdiv(p.m, p.groups)
    block_m = max(16, min(block_m, next_power_of_2(rows)))
    # At least four blocks of rows each.
    row_splits = cdiv(GRADS_PER_SM * p.gpu.sm_count, cdiv(columns, block_x) * cdiv(p.r, block_r))
    splits = max(1, min(row_splits, p.groups * cdiv(rows, block_m) // 4))
    return GradLaunch(block_m, block_x, block_r, num_warps, num_stages, GRAD_MAXNREG, splits)


def rows_constexprs(launch: RowsLaunch, activation: str, backward: bool) -> dict[str, object]:
    """What rows_kernel is compiled for, apart from the precision of fp32 products."""
    blocks = {name.upper(): getattr(launch, name) for name in ("block_m", "block_k", "block_n", "block_r")}
    flags = {"BACKWARD": backward, "SHRINK": launch.shrink, "EXPAND": launch.expand}
    return blocks | flags | {"ACTIVATION": "silu" if activation == "swish" else activation}


def grad_constexprs(launch: GradLaunch) -> dict[str, int]:
    return {name.upper(): getattr(launch, name) for name in ("block_m", "block_x", "block_r")}


def shrink_only(launches: tuple[RowsLaunch, ...]) -> tuple[RowsLaunch, ...]:
    """The launches without the product that leaves the units."""
    return (replace(launches[0], expand=False, splits=1),)


def reduce_constexprs(launch: ReduceLaunch) -> dict[str, int]:
    return {name.upper(): getattr(launch, name) for name in ("block_p", "block_x", "block_r")}


def kernel_configs(problem: BottleneckProblem) -> list[KernelConfig]:
    """Every kernel that the plan of a problem may launch, with the precision default of fp32 products."""
    chosen = plan_bottleneck(problem)
    configs = []

    def add(kernel, constants, num_warps, num_stages, maxnreg=None):
        found = tuple(sorted(constants.items()))
        types = problem.dtype, problem.adapter_dtype
        configs.append(KernelConfig(kernel, *types, found, num_warps, num_stages, maxnreg))

    for backward, launches in (
        (False, chosen.forward),
        (True, chosen.backward),
        (True, shrink_only(chosen.backward)),
    ):
        for launch in launches:
            constants = rows_constexprs(launch, problem.activation, backward) | {"PREC": "tf32x3"}
            add("rows_kernel", constants, launch.num_warps, launch.num_stages, launch.maxnreg)
    for launch, absent in ((chosen.grad_down, "sums_ptr"), (chosen.grad_up, "unit_sums_ptr")):
        constants = grad_constexprs(launch) | {"PREC": "tf32x3", absent: None}
        add("grad_kernel", constants, launch.num_warps, launch.num_stages, launch.maxnreg)
    add("reduce_kernel", reduce_constexprs(chosen.reduce), chosen.reduce.num_warps, 1)
    return list(dict.fromkeys(configs))


def configurations(gpu: Gpu = H200) -> list[KernelConfig]:
    """Every distinct kernel configuration of the plans for a GPU over all supported types, ranks and sizes with gelu,
    and for the other activations those of one size."""
    found = {}
    types = [(dtype, adapter) for dtype in DTYPES for adapter in dict.fromkeys((dtype, "float32"))]
    for (dtype, adapter), r, m in product(types, (16, 32, 64, 128, 256), (1, 32, 64, 4096, 6144, 32768)):
        problem = BottleneckProblem(m, 1024, 1024, dtype, adapter, "cpu", gpu, r, 1, "gelu")
        found |= dict.fromkeys(kernel_configs(problem))
    for (dtype, adapter), activation in product(types, BOTTLENECK_ACTIVATIONS):
        problem = BottleneckProblem(4096, 1024, 1024, dtype, adapter, "cpu", gpu, 16, 1, activation)
        found |= dict.fromkeys(kernel_configs(problem))
    return list(found)
