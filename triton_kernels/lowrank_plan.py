"""Launch plans: a pure function from the description of a problem to the kernels and tiles that run it.

Nothing here needs triton, torch or a GPU. A plan comes from a table measured on the GPU at hand,
`tuned/<gpu name>.json`, where there is one, and otherwise from the defaults below, which hold on any GPU: nothing is
measured at run time and an unknown GPU is no error. The defaults were chosen from the compiler's resource report (no
register spills, at most 163 KB of shared memory, so that they also run on sm_80), not from timings.

A tuned file maps `table_key(problem)` to the fields that replace the default, for example
    {"m4096_n4096_k4096_r16_bfloat16_bfloat16": {"forward": "shrink_expand_gemm", "shrink": {"block_m": 32}}}
"""

import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from .problem import H200, Problem
from .tiles import DTYPES, MAX_RANK, KernelConfig, cdiv, next_power_of_2, operand_class, reduce_launch

TUNED = Path(__file__).parent / "tuned"
# Below this many multiply-adds the base product on a current GPU takes less time than launching Triton kernels from
# Python does, so the C++ node, which launches without Python, comes first there.
LAUNCH_BOUND = 4e10


@dataclass(frozen=True)
class LowRankProblem(Problem):
    """x [m, k] against W [n, k] with rank r."""

    r: int
    dropout: bool
    has_weight: bool
    uv: bool = False  # whether there is u or v
    stacked: bool = False  # whether A or B are stacks of experts

    def describe(self) -> str:
        op = "lowrank_linear" if self.has_weight else "lowrank_adapter"
        return self.sentence(op, f", r={self.r}", parameters="A, B", more=", dropout" if self.dropout else "")

    def limits(self, backend: str) -> list[str]:
        return [f"r is {self.r}; the kernels take ranks up to {MAX_RANK}"] if self.r > MAX_RANK else []

    def preference(self) -> tuple[str, ...]:
        # Other kernels take more of the GPU's time for launching than for working below this size, and for products of
        # mixed types the C++ node converts the larger operand.
        in_node = self.adapter_dtype == self.dtype and not self._widens and self.m * self.n * self.k < LAUNCH_BOUND
        return ("cuda", "triton", "torch") if in_node else ("triton", "torch")

    @property
    def _widens(self) -> bool:
        """Whether factors in fp16 are to be fp32 for the products: u, v and scale, folded into B, may leave its range.
        That is the composition in Python's, not the C++ node's."""
        return self.uv and self.adapter_dtype == "float16"

    def native(self, backend: str) -> bool:
        return backend == "cuda" or (backend == "torch" and self.device == "cpu" and not self._widens)

    def launch_plan(self, backend: str):
        return plan_lowrank(self) if backend == "triton" else None

    def words(self, backend: str) -> str:
        if backend == "triton":
            return f", {plan_lowrank(self).forward}"
        if backend == "cuda":
            return ", CUDA shrink kernel" + (", adapter first, base GEMM last with beta=1" if self.has_weight else "")
        return f", {'three' if self.has_weight else 'two'} GEMMs"


@dataclass(frozen=True)
class LowRankLaunch:
    """Tile and shape of one kernel.

    block_n counts columns of the wide matrix (x, y, dY or dx), block_r ranks, block_k steps of the inner product of the
    single kernel. splits: how many programs share one sum, of the columns or of the rows.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    block_k: int = 0
    splits: int = 1


@dataclass(frozen=True)
class LowRankPlan:
    """How a problem runs.

    forward: "single_kernel", "shrink_expand_gemm" or "shrink_expand_add".
    grad_b: dSu and dB from one pass over dY; None for two passes, by `dsu` and `db`.
    fused_a: dx and dA from one kernel, otherwise dx from `expand`.
    """

    forward: str
    shrink: LowRankLaunch
    expand: LowRankLaunch
    linear: LowRankLaunch | None
    grad_b: LowRankLaunch | None
    dsu: LowRankLaunch
    db: LowRankLaunch
    fused_a: bool
    grad_a: LowRankLaunch


# Tiles by class of operands: "half" (all of one 16-bit type), "split" (bf16 activations, fp32 adapter: every product
# is three bf16 ones), "full" (fp32, or fp16 activations against an fp32 adapter: tf32x3). The last two hold more
# operands in registers, so their tiles are smaller. Keys are the rank block; a rank above the largest takes several.
# Tuples are (block_m, block_n, num_warps, num_stages).
SHRINK = {
    "half": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 8, 3)},
    "split": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 32, 4, 3)},
    "full": {16: (64, 32, 4, 3), 32: (64, 32, 4, 3)},
}
EXPAND = {
    "half": {16: (64, 128, 8, 1), 32: (64, 128, 8, 1), 64: (64, 128, 8, 1)},
    "split": {16: (64, 64, 4, 1), 32: (64, 64, 4, 1)},
    "full": {16: (64, 64, 4, 1), 32: (64, 64, 4, 1)},
}
GRAD_B = {
    "half": {16: (128, 64, 8, 3), 32: (128, 64, 8, 3)},
    "split": {16: (128, 64, 8, 3)},
    "full": {},
}
GRAD_A_FUSED = {
    "half": {16: (64, 64, 8, 3), 32: (64, 64, 8, 3), 64: (32, 64, 4, 3)},
    "split": {16: (64, 64, 8, 3)},
    "full": {},
}
GRAD_A = {
    "half": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 8, 3)},
    "split": {16: (64, 64, 4, 3), 32: (32, 64, 4, 3)},
    "full": {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (16, 64, 4, 3)},
}
# The single kernel: (block_m, block_n, block_k, num_warps, num_stages). With few rows, block_m is a maximum and W is
# all there is to read: the narrow tile spreads it over many programs.
LINEAR_FEW_ROWS = {"half": (64, 32, 128, 4, 3), "split": (64, 32, 32, 4, 4), "full": (32, 32, 32, 4, 3)}
LINEAR_SMALL = {"half": (64, 64, 64, 4, 3), "split": (64, 64, 64, 4, 3), "full": (64, 32, 32, 4, 3)}
LINEAR_LARGE = {"half": (128, 128, 64, 8, 3), "split": (128, 64, 64, 8, 3), "full": (128, 64, 32, 8, 3)}

FEW_ROWS = 64
# S on the fly repeats the product with A in every column of tiles; past this rank that outweighs reading W once.
FEW_ROWS_MAX_RANK = 64
NARROW = 3072
NARROW_MAX_RANK = 16


def table_key(problem: LowRankProblem) -> str:
    """Key of a tuned file. M is bucketed by powers of two; dropout and the missing base weight have their own rows."""
    p = problem
    key = f"m{next_power_of_2(p.m)}_n{p.n}_k{p.k}_r{p.r}_{p.dtype}_{p.adapter_dtype}"
    return key + ("_dropout" if p.dropout else "") + ("" if p.has_weight else "_add")


def plan_lowrank(problem: LowRankProblem) -> LowRankPlan:
    """Plan of a problem. Raises ValueError for a rank outside 1..256 or an unsupported pair of types."""
    return _plan(replace(problem, m=next_power_of_2(problem.m)))


@lru_cache(maxsize=4096)
def _plan(problem: LowRankProblem) -> LowRankPlan:
    if not 1 <= problem.r <= MAX_RANK:
        raise ValueError(f"rank must be in 1..{MAX_RANK}, got {problem.r}")
    if problem.dtype not in DTYPES or problem.adapter_dtype not in (problem.dtype, "float32"):
        raise ValueError(f"unsupported types: activations {problem.dtype}, adapter {problem.adapter_dtype}")
    chosen = _default_plan(problem)
    changes = tuned_table(problem.gpu.name).get(table_key(problem)) if problem.device == "cuda" else None
    return _merge(chosen, changes) if changes else chosen


@lru_cache(maxsize=64)
def tuned_table(gpu: str) -> dict:
    """Contents of the tuned file of a GPU, empty when there is none."""
    path = TUNED / f"{gpu.replace(' ', '-').replace('/', '-')}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _merge(chosen: LowRankPlan, changes: dict) -> LowRankPlan:
    unknown = changes.keys() - {field.name for field in fields(LowRankPlan)}
    if unknown:
        raise ValueError(f"unknown fields in a tuned plan: {sorted(unknown)}")
    values = {}
    for name, change in changes.items():
        current = getattr(chosen, name)
        if isinstance(change, dict):
            change = replace(current, **change) if current is not None else LowRankLaunch(**change)
        values[name] = change
    return replace(chosen, **values)


def _default_plan(p: LowRankProblem) -> LowRankPlan:
    kind = operand_class(p.dtype, p.adapter_dtype)
    block_r = max(16, next_power_of_2(p.r))
    linear = _linear(p, kind, block_r)
    forward = "shrink_expand_gemm" if p.has_weight else "shrink_expand_add"
    if linear is not None:
        forward = "single_kernel"

    # One pass over dY leaves 4 r / block_m bytes of partial dB for every 2 bytes of half-precision dY, written and read
    # again: with 128 rows a second pass is no dearer from rank 32 on, and it needs no such workspace. Rank 32 keeps one
    # pass in half precision for one launch less. In fp32 the kernel would read dY through registers, unpipelined.
    grad_b = None
    if block_r in GRAD_B[kind]:
        grad_b = _launch(GRAD_B[kind], block_r)
        if kind == "half" and block_r == 16 and p.m >= 16384:
            # Half the partial partials, once there are row_splits enough to fill the GPU without short ones.
            grad_b = replace(grad_b, block_m=256)
        grad_b = _split_columns(grad_b, p.m, p.n, p.gpu.sm_count, least=256)
    fused_a = block_r in GRAD_A_FUSED[kind]
    return LowRankPlan(
        forward=forward,
        shrink=_split_columns(_launch(SHRINK[kind], block_r), p.m, p.k, p.gpu.sm_count),
        expand=_launch(EXPAND[kind], block_r),
        linear=linear,
        grad_b=grad_b,
        dsu=_split_columns(_launch(SHRINK[kind], block_r), p.m, p.n, p.gpu.sm_count),
        db=_split_rows(_launch(GRAD_A[kind], block_r), p.m, p.n, p.gpu.sm_count),
        fused_a=fused_a,
        grad_a=_split_rows(_launch((GRAD_A_FUSED if fused_a else GRAD_A)[kind], block_r), p.m, p.k, p.gpu.sm_count),
    )


def _launch(table: dict, block_r: int) -> LowRankLaunch:
    block_r = min(block_r, max(table))
    block_m, block_n, num_warps, num_stages = table[block_r]
    return LowRankLaunch(block_m, block_n, block_r, num_warps, num_stages)


def _linear(p: LowRankProblem, kind: str, block_r: int) -> LowRankLaunch | None:
    if p.dropout or not p.has_weight:  # with dropout every column of tiles would draw the mask again
        return None
    if p.m <= FEW_ROWS and block_r <= FEW_ROWS_MAX_RANK:
        shape = LINEAR_FEW_ROWS[kind]
        shape = (max(16, min(shape[0], next_power_of_2(p.m))), *shape[1:])
    elif p.n <= NARROW and p.r <= NARROW_MAX_RANK:
        shape = LINEAR_LARGE[kind]
        if cdiv(p.m, shape[0]) * cdiv(p.n, shape[1]) < p.gpu.sm_count:
            shape = LINEAR_SMALL[kind]
    else:
        return None
    block_m, block_n, block_k, num_warps, num_stages = shape
    return LowRankLaunch(block_m, block_n, block_r, num_warps, num_stages, block_k)


def _split_columns(launch: LowRankLaunch, m: int, columns: int, sm_count: int, least: int = 1024) -> LowRankLaunch:
    """Share the columns out when the rows alone leave multiprocessors idle, but not into less than `least` columns."""
    row_blocks = cdiv(m, launch.block_m)
    return replace(launch, splits=max(1, min(cdiv(sm_count, max(1, row_blocks)), columns // least)))


def _split_rows(launch: LowRankLaunch, m: int, columns: int, sm_count: int) -> LowRankLaunch:
    """Two programs per multiprocessor, but at least four blocks of rows each: every split costs a partial sum."""
    row_splits = cdiv(2 * sm_count, cdiv(columns, launch.block_n))
    return replace(launch, splits=max(1, min(row_splits, m // (4 * launch.block_m))))


def kernel_configs(problem: LowRankProblem) -> list[KernelConfig]:
    """Every kernel that the plan of a problem may launch, with the precision default of fp32 products."""
    chosen = plan_lowrank(problem)
    configs = []

    def add(kernel, launch, **flags):
        blocks = {"BLOCK_M": launch.block_m, "BLOCK_R": launch.block_r, "PREC": "tf32x3"}
        blocks["BLOCK_K" if kernel in ("shrink_kernel", "grad_a_kernel") else "BLOCK_N"] = launch.block_n
        if launch.block_k:
            blocks |= {"BLOCK_K": launch.block_k, "GROUP_M": 8}
        constexprs = tuple(sorted((blocks | flags).items()))
        configs.append(
            KernelConfig(kernel, problem.dtype, problem.adapter_dtype, constexprs, launch.num_warps, launch.num_stages)
        )

    dropout = problem.dropout
    if chosen.forward == "single_kernel":
        add("linear_kernel", chosen.linear)
    add("shrink_kernel", chosen.shrink, DROPOUT=dropout)
    add("expand_kernel", chosen.expand, DROPOUT=False)
    add("expand_kernel", chosen.expand, DROPOUT=dropout)
    if chosen.grad_b is not None:
        add("grad_b_kernel", chosen.grad_b)
    add("shrink_kernel", chosen.dsu, DROPOUT=False)
    add("grad_a_kernel", chosen.db, DROPOUT=False, NEED_DX=False, NEED_DA=True)
    for need_dx, need_da in ((True, True), (True, False)) if chosen.fused_a else ():
        add("grad_a_kernel", chosen.grad_a, DROPOUT=dropout, NEED_DX=need_dx, NEED_DA=need_da)
    for need_da in (True, False):
        add("grad_a_kernel", chosen.grad_a, DROPOUT=dropout, NEED_DX=False, NEED_DA=need_da)
    blocks, num_warps = reduce_launch(problem.r)
    constexprs = tuple(sorted((blocks | {"FROZEN": True}).items()))
    configs.append(KernelConfig("reduce_kernel", problem.dtype, problem.adapter_dtype, constexprs, num_warps, 1))
    return configs


def configurations() -> list[KernelConfig]:
    """Every distinct kernel configuration of the default plans, over all supported types, ranks and sizes."""
    found = {}
    types = [(dtype, adapter) for dtype in DTYPES for adapter in dict.fromkeys((dtype, "float32"))]
    rows = [1 << i for i in range(0, 18)]
    ranks = [16, 32, 64, 128, 256]
    for (dtype, adapter), m, n, r, dropout in product(types, rows, (768, 4096), ranks, (False, True)):
        problem = LowRankProblem(m, n, n, dtype, adapter, "cpu", H200, r, dropout, True)
        found |= dict.fromkeys(kernel_configs(problem))
    return list(found)
