"""Launch plans: a pure function from the description of a problem to the kernels and tiles that run it.

Nothing here needs triton, torch or a GPU. A plan comes from a table measured on the GPU at hand,
`tuned/<gpu name>.json`, where there is one, and otherwise from the defaults below, which hold on any GPU: nothing is
measured at run time and an unknown GPU is no error. The defaults were chosen from the compiler's resource report (no
register spills, no more shared memory than a GPU has), not from timings.

A tuned file maps `table_key(problem)` to the fields that replace the default, for example
    {"m4096_n4096_k4096_r16_bfloat16_bfloat16": {"forward": "shrink_expand_gemm", "shrink": {"block_m": 32}}}
"""

import json
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from .problem import H200, Gpu, Problem
from .tiles import DTYPES, MAX_RANK, KernelConfig, cdiv, next_power_of_2, operand_class, padded_rank, reduce_launch

TUNED = Path(__file__).parent / "tuned"
# Of factors that share x, all together and padded.
MOST_SHARED_RANKS = 128


@dataclass(frozen=True)
class LowRankProblem(Problem):
    """x [m, k] against W [n, k] with rank r. Of several members it is their product with x alone, whatever n is."""

    r: int
    dropout: bool
    has_weight: bool
    uv: bool = False  # whether there is u or v
    stacked: bool = False  # whether A or B are stacks of experts
    given: bool = False  # whether S is given, and A is not there
    members: int = 1  # projections whose product with x is shared; r is the most ranks of one of them

    def shared_by(self, members: int) -> "LowRankProblem":
        """The product with x alone, of so many layers like this one."""
        return replace(self, n=members * self.r, has_weight=False, members=members)

    def describe(self) -> str:
        op = "lowrank_linear" if self.has_weight else "lowrank_adapter"
        if self.members > 1:
            op = f"shared_shrink of {self.members} factors"
        return self.sentence(op, f", r={self.r}", parameters="A, B", more=", dropout" if self.dropout else "")

    def limits(self, backend: str) -> list[str]:
        reasons = [f"r is {self.r}; the kernels take ranks up to {MAX_RANK}"] if self.r > MAX_RANK else []
        if backend == "cuda" and self.members > 1:
            reasons.append("it has no kernel for factors that share x")
        if self.members > 1 and next_power_of_2(self.members) * padded_rank(self.r) > MOST_SHARED_RANKS:
            reasons.append(f"{self.members} factors of r={self.r}, padded, have more than {MOST_SHARED_RANKS} ranks")
        return reasons

    def preference(self) -> tuple[str, ...]:
        # For products of mixed types the CUDA backend converts the larger operand.
        same = self.adapter_dtype == self.dtype and not self._widens
        return ("triton", "cuda", "torch") if same else ("triton", "torch")

    @property
    def _widens(self) -> bool:
        """Whether factors in fp16 are to be fp32 for the products: u, v and scale, folded into B, may leave its range.
        That is the composition in Python's, not the C++ node's."""
        return self.uv and self.adapter_dtype == "float16"

    def native(self, backend: str) -> bool:
        return backend in ("triton", "cuda") or (backend == "torch" and self.device == "cpu" and not self._widens)

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
    single kernel. splits: how many programs share the columns of a block of rows, or the rows of a block of columns.
    maxnreg: registers of a thread, if not the compiler's own choice.
    """

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int
    block_k: int = 0
    splits: int = 1
    maxnreg: int | None = None


@dataclass(frozen=True)
class LowRankPlan:
    """How a problem runs.

    forward: "single_kernel", "shrink_expand_gemm" or "shrink_expand_add"; of several members "shared_shrink", of which
        the backward is expand, grad_a and reduce, and nothing else is there.
    grad_b: dSu and sums for dB from one pass over dY; None for two passes, by `dsu` and `db`.
    fused_a: dx and sums for dA from one kernel, otherwise dx from `expand`.
    reduce: block_m counts partial sums, block_n what each is of.
    """

    forward: str
    shrink: LowRankLaunch
    expand: LowRankLaunch
    linear: LowRankLaunch | None
    grad_b: LowRankLaunch | None
    dsu: LowRankLaunch | None
    db: LowRankLaunch | None
    fused_a: bool
    grad_a: LowRankLaunch
    reduce: LowRankLaunch


# Tiles by class of operands: "half" (all of one 16-bit type), "split" (bf16 activations, fp32 adapter: every product
# is by three bf16 terms), "full" (fp32, or fp16 activations against an fp32 adapter: tf32x3). The last two hold more
# operands in registers, so their tiles are smaller. Keys are the rank block; a rank above the largest takes several.
# Tuples are (block_m, block_n, num_warps, num_stages), in lists the tallest first, of which the first is taken that
# leaves programs enough. What reads a large matrix is to have about 50 KB of it in flight per program: then half as
# many programs as multiprocessors saturate the memory.
SHRINK = {
    "half": {
        16: [(64, 64, 4, 6)],
        32: [(64, 64, 4, 6), (16, 128, 4, 4)],
        64: [(64, 64, 4, 4), (16, 128, 4, 4)],
        128: [(64, 64, 8, 3), (16, 64, 4, 4)],
    },
    "split": {16: [(64, 64, 4, 6)], 32: [(64, 64, 4, 4), (16, 64, 4, 4)], 64: [(64, 32, 4, 4), (16, 32, 4, 4)]},
    "full": {16: [(64, 32, 4, 4)], 32: [(64, 32, 4, 3), (16, 32, 4, 4)]},
}
EXPAND = {
    "half": {16: (64, 128, 8, 1), 32: (64, 128, 8, 1), 64: (64, 128, 8, 1)},
    "split": {16: (64, 128, 8, 1), 32: (64, 64, 8, 1)},
    "full": {16: (64, 64, 4, 1)},
}
# Taller blocks leave fewer partial sums of dB: 4 r / block_m bytes, written and read, for every 2 bytes of 16-bit dY.
# With more ranks a second pass over dY costs less than these.
GRAD_B = {
    "half": {16: [(256, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)]},
    "split": {16: [(256, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)]},
    "full": {},
}
GRAD_A_FUSED = {
    "half": {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 4, 3)},
    "split": {16: (32, 64, 4, 3)},
    "full": {},
}
# Where the tensor cores read their operands in shared memory, registers suffice for twice the rows.
GRAD_A_FUSED_WGMMA = {"half": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3)}, "split": {16: (64, 64, 4, 3)}}
GRAD_A = {
    "half": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 8, 3)},
    "split": {16: (64, 64, 4, 3), 32: (32, 64, 4, 2)},
    "full": {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (16, 64, 4, 3)},
}
# Of members, whose ranks are better in one block, which reads x once.
GRAD_A_MEMBERS = GRAD_A | {"split": GRAD_A["split"] | {64: (32, 64, 4, 2)}}
# The single kernel: (block_m, block_n, block_k, num_warps, num_stages). With few rows, block_m is a maximum and W is
# all there is to read: the narrow tile spreads it over many programs.
LINEAR_FEW_ROWS = {"half": (64, 32, 128, 4, 3), "split": (64, 32, 32, 4, 4), "full": (32, 32, 32, 4, 3)}
LINEAR_SMALL = (64, 64, 64, 4, 3)
LINEAR_LARGE = (128, 128, 64, 8, 3)

# Rows of tiles of the single kernel that share their columns of W.
GROUP_M = 8
FEW_ROWS = 64
# S on the fly repeats the product with A in every column of tiles; past this rank that outweighs reading W once.
FEW_ROWS_MAX_RANK = {"half": 32, "split": 32, "full": 16}
# With more rows the single kernel has to keep up with the library's GEMM: where both sides are short, what it saves is
# most of the time, and where operands are of one 16-bit type, the product with A is one more step on the tensor cores.
NARROW = 1536
NARROW_MAX_RANK = 16
# Partial sums at most that the next kernel adds up, of so many ranks at most, and columns at least that each is of.
MOST_PLANES = 4
PLANES_MAX_RANK = 16
# Of a thread, where the compiler would rather leave a few numbers in local memory than have fewer blocks.
MAXNREG = 255
LEAST_COLUMNS = 256
# Operands that a product of members never has.
ABSENT = (
    ("shrink", "v scale rank expert"),
    ("expand", "u v bias s scale expert"),
    ("grad_a", "a s u dx dots sums expert"),
    ("reduce", "b_partials sums b v db dv dbias dots u du scale rank expert_a expert_b"),
)


def table_key(problem: LowRankProblem) -> str:
    """Key of a tuned file. M is bucketed by powers of two; dropout, the missing base weight and a given S have their
    own rows, and so has the product that members share."""
    p = problem
    key = f"m{next_power_of_2(p.m)}_n{p.n}_k{p.k}_r{p.r}_{p.dtype}_{p.adapter_dtype}" + (
        "_dropout" if p.dropout else ""
    )
    if p.members > 1:
        return f"{key}_members{p.members}"
    return key + ("" if p.has_weight else "_add") + ("_given" if p.given else "")


def plan_lowrank(problem: LowRankProblem) -> LowRankPlan:
    """Plan of a problem. Raises ValueError for a rank outside 1..256 or an unsupported pair of types."""
    return _plan(replace(problem, m=next_power_of_2(problem.m)))


@lru_cache(maxsize=4096)
def _plan(problem: LowRankProblem) -> LowRankPlan:
    if not 1 <= problem.r <= MAX_RANK:
        raise ValueError(f"rank must be in 1..{MAX_RANK}, got {problem.r}")
    if problem.dtype not in DTYPES or problem.adapter_dtype not in (problem.dtype, "float32"):
        raise ValueError(f"unsupported types: activations {problem.dtype}, adapter {problem.adapter_dtype}")
    chosen = _default_plan(problem) if problem.members == 1 else _shared_plan(problem)
    if problem.gpu.capability != 90:
        launches = {f.name: getattr(chosen, f.name) for f in fields(chosen)}
        more = {n: replace(v, maxnreg=MAXNREG) for n, v in launches.items() if isinstance(v, LowRankLaunch)}
        chosen = replace(chosen, **more)
    changes = tuned_table(problem.gpu.name).get(table_key(problem)) if problem.device == "cuda" else None
    chosen = _merge(chosen, changes) if changes else chosen
    impossible = problem.dropout or not problem.has_weight or problem.given or problem.members > 1
    if chosen.forward == "single_kernel" and (chosen.linear is None or impossible):
        raise ValueError(
            f"a tuned plan has the single kernel, which it does not describe or which cannot run {problem}"
        )
    return chosen


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
    block_r = padded_rank(p.r)
    linear = _linear(p, kind, block_r)
    forward = "shrink_expand_gemm" if p.has_weight else "shrink_expand_add"
    if linear is not None:
        forward = "single_kernel"

    grad_b = None
    if block_r in GRAD_B[kind]:
        # In the buffers of dY an element has 2 bytes; as many are left for those of B, its terms and what is stored.
        shapes = [s for s in GRAD_B[kind][block_r] if 4 * s[0] * s[1] * s[3] <= p.gpu.shared_memory]
        grad_b = _share_columns(shapes, block_r, p, p.n, _planes(block_r))
    fused_a = block_r in GRAD_A_FUSED[kind]
    if not fused_a:
        grad_a = _launch(GRAD_A[kind], block_r)
    elif p.gpu.capability == 90 and block_r in GRAD_A_FUSED_WGMMA[kind]:
        grad_a = _launch(GRAD_A_FUSED_WGMMA[kind], block_r)
    else:
        grad_a = _launch(GRAD_A_FUSED[kind], block_r)
    shrink = min(block_r, max(SHRINK[kind]))
    tile, reduce_warps = reduce_launch(p.r)
    return LowRankPlan(
        forward=forward,
        shrink=_share_columns(SHRINK[kind][shrink], shrink, p, p.k, _planes(block_r)),
        expand=_share_expansion(_launch(EXPAND[kind], block_r), p),
        linear=linear,
        grad_b=grad_b,
        dsu=_share_columns(SHRINK[kind][shrink], shrink, p, p.n, _planes(block_r)),
        db=_share_rows(_launch(GRAD_A[kind], block_r), p, p.n),
        fused_a=fused_a,
        grad_a=_share_rows(grad_a, p, p.k),
        reduce=LowRankLaunch(tile["BLOCK_P"], tile["BLOCK_X"], tile["BLOCK_R"], reduce_warps, 1),
    )


def _shared_plan(p: LowRankProblem) -> LowRankPlan:
    """Of several members. With dropout each has its own mask, and so its own block of ranks."""
    kind, each = operand_class(p.dtype, p.adapter_dtype), padded_rank(p.r)
    R = all_ranks(p.r, p.members)
    block_r = each if p.dropout else R
    shrink = min(block_r, max(SHRINK[kind]))
    grad_a = _launch(GRAD_A_MEMBERS[kind], block_r)
    tile, reduce_warps = reduce_launch(R)
    return LowRankPlan(
        forward="shared_shrink",
        # Planes are added up before anyone reads them, so that the number of ranks is no bound.
        shrink=_share_columns(SHRINK[kind][shrink], shrink, p, p.k, MOST_PLANES, cdiv(p.members * each, shrink)),
        expand=_share_expansion(_launch(EXPAND[kind], block_r), p),
        linear=None,
        grad_b=None,
        dsu=None,
        db=None,
        fused_a=False,
        grad_a=_share_rows(grad_a, p, p.k * cdiv(p.members * each, grad_a.block_r)),
        reduce=LowRankLaunch(tile["BLOCK_P"], tile["BLOCK_X"], tile["BLOCK_R"], reduce_warps, 1),
    )


def _launch(table: dict, block_r: int) -> LowRankLaunch:
    block_r = min(block_r, max(table))
    block_m, block_n, num_warps, num_stages = table[block_r]
    return LowRankLaunch(block_m, block_n, block_r, num_warps, num_stages)


def _linear(p: LowRankProblem, kind: str, block_r: int) -> LowRankLaunch | None:
    if p.dropout or not p.has_weight or p.given:  # with dropout every column of tiles would draw the mask again
        return None
    if p.m <= FEW_ROWS and block_r <= FEW_ROWS_MAX_RANK[kind]:
        shape = LINEAR_FEW_ROWS[kind]
        shape = (max(16, min(shape[0], next_power_of_2(p.m))), *shape[1:])
    elif kind == "half" and max(p.n, p.k) <= NARROW and p.r <= NARROW_MAX_RANK:
        # Without operands in shared memory the larger tile does not fit the registers.
        large = p.gpu.capability in (90, 100)
        many = cdiv(p.m, LINEAR_LARGE[0]) * cdiv(p.n, LINEAR_LARGE[1]) >= p.gpu.sm_count
        shape = LINEAR_LARGE if large and many else LINEAR_SMALL
    else:
        return None
    block_m, block_n, block_k, num_warps, num_stages = shape
    return LowRankLaunch(block_m, block_n, block_r, num_warps, num_stages, block_k)


def _enough(programs: int, p: LowRankProblem) -> bool:
    """Whether so many programs saturate the memory: half the multiprocessors, of which a few may be missing."""
    return 2.1 * programs >= p.gpu.sm_count


def _planes(block_r: int) -> int:
    return MOST_PLANES if block_r <= PLANES_MAX_RANK else 1


def _share_columns(
    shapes: list, block_r: int, p: LowRankProblem, columns: int, most: int, rank_blocks: int = 1
) -> LowRankLaunch:
    """The first shape that leaves programs enough, else the last, its columns shared out to as few planes as suffice,
    of `most`. Their number is compiled in: it is a power of two."""
    most = min(most, columns // LEAST_COLUMNS)
    for block_m, block_n, num_warps, num_stages in shapes:
        blocks, planes = cdiv(p.m, block_m) * rank_blocks, 1
        while not _enough(blocks * planes, p) and 2 * planes <= most:
            planes *= 2
        launch = LowRankLaunch(block_m, block_n, block_r, num_warps, num_stages, splits=planes)
        if _enough(blocks * planes, p):
            return launch
    return launch


def _share_rows(launch: LowRankLaunch, p: LowRankProblem, columns: int) -> LowRankLaunch:
    """Two programs per multiprocessor, but at least four blocks of rows each: every split costs a partial sum."""
    row_splits = cdiv(2 * p.gpu.sm_count, cdiv(columns, launch.block_n))
    return replace(launch, splits=max(1, min(row_splits, p.m // (4 * launch.block_m))))


def _share_expansion(launch: LowRankLaunch, p: LowRankProblem) -> LowRankLaunch:
    """Four programs per multiprocessor, each for as many columns as are left: it loads S once."""
    return replace(launch, splits=max(1, cdiv(4 * p.gpu.sm_count, cdiv(p.m, launch.block_m))))


def all_ranks(r: int, members: int) -> int:
    """R of members of r ranks at most."""
    return next_power_of_2(members) * padded_rank(r)


def kernel_configs(problem: LowRankProblem) -> list[KernelConfig]:
    """Every kernel that the plan of a problem may launch, with the precision default of fp32 products."""
    chosen = plan_lowrank(problem)
    configs = []
    each, members = padded_rank(problem.r), problem.members
    side_by_side = {"R": all_ranks(problem.r, members), "EACH": each, "MEMBERS": members}

    def add(kernel, launch, columns, **flags):
        by_k = kernel in ("shrink_kernel", "grad_a_kernel")
        flags |= {"BLOCK_M": launch.block_m, "BLOCK_K" if by_k else "BLOCK_N": launch.block_n}
        flags |= {"PREC": "tf32x3", "R": each}
        if kernel in ("shrink_kernel", "expand_kernel", "grad_a_kernel"):
            flags |= side_by_side | {"BLOCK_R": launch.block_r}
        if launch.block_k:
            flags |= {"BLOCK_K": launch.block_k, "GROUP_M": GROUP_M}
        flags["RAGGED"] = columns % (launch.block_k or launch.block_n) != 0
        types = problem.dtype, problem.adapter_dtype
        options = launch.num_warps, launch.num_stages, launch.maxnreg
        configs.append(KernelConfig(kernel, *types, tuple(sorted(flags.items())), *options))

    def add_reduce(launch, **flags):
        flags |= side_by_side | {"BLOCK_P": launch.block_m, "BLOCK_X": launch.block_n}
        types = problem.dtype, problem.adapter_dtype
        options = launch.num_warps, launch.num_stages, launch.maxnreg
        configs.append(KernelConfig("reduce_kernel", *types, tuple(sorted(flags.items())), *options))

    k, n, dropout = problem.k, problem.n, problem.dropout
    if members > 1:
        absent = {name: dict.fromkeys(f"{operand}_ptr" for operand in operands.split()) for name, operands in ABSENT}
        add("shrink_kernel", chosen.shrink, k, DROPOUT=dropout, **absent["shrink"])
        add("expand_kernel", chosen.expand, k, DROPOUT=dropout, PLANES=1, **absent["expand"])
        needs = {"NEED_DX": False, "NEED_DA": True}
        add("grad_a_kernel", chosen.grad_a, k, DROPOUT=dropout, PLANES=1, **needs, **absent["grad_a"])
        add_reduce(chosen.reduce, FROZEN=False, OF_B=False, **absent["reduce"])
        return configs
    if chosen.forward == "single_kernel":
        add("linear_kernel", chosen.linear, k)
    add("shrink_kernel", chosen.shrink, k, DROPOUT=dropout)
    add("expand_kernel", chosen.expand, n, DROPOUT=False, PLANES=chosen.shrink.splits)
    if chosen.grad_b is not None:
        add("grad_b_kernel", chosen.grad_b, n)
    add("shrink_kernel", chosen.dsu, n, DROPOUT=False)
    add("grad_a_kernel", chosen.db, n, DROPOUT=False, NEED_DX=False, NEED_DA=True, PLANES=1)
    for planes in {launch.splits for launch in (chosen.grad_b, chosen.dsu) if launch is not None}:
        add("expand_kernel", chosen.expand, k, DROPOUT=dropout, PLANES=planes)
        wanted = [(False, True), (False, False)] + ([(True, True), (True, False)] if chosen.fused_a else [])
        for need_dx, need_da in wanted:
            add("grad_a_kernel", chosen.grad_a, k, DROPOUT=dropout, NEED_DX=need_dx, NEED_DA=need_da, PLANES=planes)
    add_reduce(chosen.reduce, FROZEN=True, OF_B=True)
    return configs


def configurations(gpu: Gpu = H200) -> list[KernelConfig]:
    """Every distinct kernel configuration of the default plans for a GPU, over all supported types, ranks and sizes."""
    found = {}
    types = [(dtype, adapter) for dtype in DTYPES for adapter in dict.fromkeys((dtype, "float32"))]
    rows = [1 << i for i in range(0, 18)]
    ranks = [16, 32, 64, 128, 256]
    for (dtype, adapter), m, n, r, dropout in product(types, rows, (768, 4096, 4104), ranks, (False, True)):
        problem = LowRankProblem(m, n, n, dtype, adapter, "cpu", gpu, r, dropout, True)
        found |= dict.fromkeys(kernel_configs(problem))
        for members in (3, 2, 4) if r <= 32 else ():
            found |= dict.fromkeys(kernel_configs(replace(problem, members=members)))
    return list(found)
