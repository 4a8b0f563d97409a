"""Low-rank adapter on a linear map, forward and backward, by Triton kernels.

    y = x W^T + bias + scale * v . (B[eb] (u . keep_rank(A[ea] drop(x))))

x [M, K], W [N, K], A [r, K] or [E, r, K], B [N, r] or [E, N, r], u [r], v [N], bias [N]; 1 <= r <= 256. x and W share
one of fp16, bf16, fp32; A, B, u, v are of that type or all fp32. x, dY and `add` may have any strides. `scale`, `rank`
and `expert` are Python numbers or 0-d tensors on the device, and the dropout seed is a 0-d int64 tensor: no value of
theirs synchronises or recompiles. S = keep_rank(A drop(x)) is what the forward saves, without u, in A's type and padded
with zeros to R ranks (see lowrank_kernels.py). A call may be given S instead of A: then a product that projections
share has made it, drop(x) included, and its gradient dS = u . dSu goes back there.

Backward, with t = dY^T S:   dSu = scale dY (v . B)     dB = scale v . u . t     dv = scale rowsum(B . u . t)
                             dA  = u . dSu^T drop(x)    du = colsum(dSu . S)     dX = drop^T((u . dSu) A) + dY W

Projections that share x are members of one product S_i = A_i drop_i(x), i = 1..G, each with its own mask, which
`shared_shrink_fwd` makes in one pass over x and each layer is given; backward, `shared_shrink_bwd` has of all dS_i

    dA_i = dS_i^T drop_i(x)    dX = onto + sum_i drop_i^T(dS_i A_i)    onto: the sum of the base products' gradients

Their ranks lie side by side in the kernels, padded to the most ranks of one (see lowrank_kernels.py).

These functions launch what `lowrank_plan` says and check little: types, shapes and index ranges are up to the caller.
The base product comes last, accumulated onto the adapter: one rounding less of the larger term. Beside it a forward is
one kernel or two, and a backward three (dSu and sums for dB; dX and sums for dA; the sums) up to rank 32.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from . import lowrank_kernels as kernels
from .launching import control, dense, gpu_of, name_of, precision, stack_strides
from .lowrank_plan import GROUP_M, LowRankLaunch, LowRankPlan, LowRankProblem, plan_lowrank
from .tiles import cdiv, padded_rank

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def lowrank_fwd(call, *, plan=None):
    """(y [M, N], S [M, R]) of a call on rows x [M, K]. With a weight, y = x weight^T + bias + delta; without, y = add +
    bias + delta. A rank or an expert of None is all ranks, and the first expert.

    Of a call with S [M, r or more], in B's type and zero beyond r ranks, A is None and the threshold 0; that S is
    returned, padded.
    """
    x, weight, B = call.x, call.weight, call.B
    M, N, r = x.shape[0], *B.shape[-2:]
    R, given = padded_rank(r), call.S is not None
    plan = plan or _plan(x, B.dtype, N, r, call.threshold, has_weight=weight is not None, given=given)
    y, S = x.new_empty(M, N), with_columns(call.S, R) if given else x.new_empty(M, R, dtype=B.dtype)
    if plan.forward == "single_kernel":
        if call.threshold or weight is None or given:
            raise ValueError("the single kernel needs a weight and no dropout, and makes S itself")
        if plan.linear is None:
            raise ValueError("the plan has no single kernel for this problem")
        if M:
            with torch.cuda.device_of(x):
                linear(call, y, S, plan.linear)
        return y, S
    if M:
        with torch.cuda.device_of(x):
            planes = S if given else shrink(call, S, plan.shrink)
            expand(call, planes, y, S, plan.expand)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, S


def lowrank_bwd(dy, call, S, *, needs, plan=None):
    """Gradients by name for the names in `needs`, out of x, weight, bias, A, B, u, v, S; each in its parameter's type.

    Without a weight, the gradient of x is that of the delta alone. Of the call any input but B may be None where
    nothing reads it. Where S was given, A is None, the gradient of x is that of the base product alone, and that of S
    has as many columns as the call's S, or else this S. frozen: dA and dB are zero but for the rank `rank` - 1. A
    stacked factor gets a gradient that is zero outside its expert.
    """
    x, A, B = call.x, call.A, call.B
    (M, N), r = dy.shape, B.shape[-1]
    K = next((t.shape[-1] for t in (A, x) if t is not None), N)
    if plan is None:
        plan = _plan(dy.new_empty(1).expand(M, K), B.dtype, N, r, call.threshold, has_weight=call.weight is not None)
    found = {name: _gradient(getattr(call, name), M) for name in ("A", "B", "u", "v") if name in needs}
    of_base = "x" in needs and A is None  # alone: S was given
    if "x" in needs and not of_base:
        found["x"] = dy.new_empty(M, K)
    if "bias" in needs:
        found["bias"] = dy.new_zeros(N) if M == 0 else dy.new_empty(N)
    if M:
        with torch.cuda.device_of(dy):
            dSu, of_b = grad_b(dy, call, S, needs, plan, found.get("bias"))
            if "S" in needs:
                found["S"] = grad_s(dSu, call, S)
            of_a = grad_a(dSu, K, call, S, needs, plan, found.get("x"))
            reduce(call, N, K, of_b, of_a, found, plan.reduce)
    elif "S" in needs:
        found["S"] = B.new_empty(0, _columns_of_s(call, S))
    if of_base:
        found["x"] = dy @ call.weight
    elif "x" in needs and call.weight is not None:
        found["x"].addmm_(dy, call.weight)
    if "weight" in needs:
        found["weight"] = dy.t() @ x
    return {name: found[name] for name in needs}


# -------------------------------------------------------------------------------------------------------------- members


class Ranks(NamedTuple):
    """How the ranks of a product lie: R, of which each member has `each`. By itself a layer has all of them."""

    R: int
    each: int
    members: int

    @property
    def single(self) -> bool:
        return self.each == self.R

    def grid(self, blocks: int, splits: int, block_r: int) -> tuple[int, int, int]:
        """Of blocks of x and of ranks; see `block_of_ranks` of the kernels."""
        if self.single:
            return blocks, splits, self.R // block_r
        return blocks * cdiv(self.members * self.each, block_r), splits, 1


def shared_shrink_fwd(x, factors, *, threshold=0, seeds=None, plan=None):
    """S_i [M, R] = A_i drop_i(x) for rows x [M, K] and each of the factors A_i [r_i, K], in their type and padded with
    zeros to the same R ranks. seeds: int64 [G], of a mask each, where there is a threshold."""
    M, r = x.shape[0], max(A.shape[0] for A in factors)
    plan = plan or _plan_members(x, factors, threshold)
    ranks = Ranks(plan.reduce.block_r, padded_rank(r), len(factors))
    S = factors[0].new_empty(ranks.members, M, ranks.each)
    if M:
        with torch.cuda.device_of(x):
            A, splits = beside(factors, r), plan.shrink.splits
            planes = S if splits == 1 else x.new_empty(ranks.members, splits, M, ranks.each, dtype=torch.float32)
            _shrink(x, A, stack_strides(A), r, None, planes, 1.0, None, None, threshold, seeds, plan.shrink, ranks)
            S = S if splits == 1 else planes.sum(1).to(S.dtype)
    return list(S.unbind())


def shared_shrink_bwd(grads, x, factors, *, onto=None, threshold=0, seeds=None, need_x, needs, plan=None):
    """(dX [M, K] or None, dA_i or None for each factor) of dS_i [M, R]; a dS_i of None is zero, and leaves dA_i None.

    needs: whether dA_i is needed, for each. onto [M, K], which may be overwritten, is what dX is added to. x is read
    for dA_i alone. Without it onto tells the type of dX, without both the factors do. Of no gradient dX is onto.
    """
    kept = [i for i, dS in enumerate(grads) if dS is not None and (need_x or needs[i])]
    of_factors = [None] * len(factors)
    if not kept:
        return onto if need_x else None, of_factors
    M, (r, K) = grads[kept[0]].shape[0], (max(A.shape[0] for A in factors), factors[0].shape[1])
    like = next(t for t in (onto, x, factors[0]) if t is not None)
    plan = plan or _plan_members(like.new_empty(1).expand(M, K), factors, threshold)
    ranks = Ranks(plan.reduce.block_r, padded_rank(r), len(kept))
    dx = onto if onto is not None and onto.is_contiguous() else like.new_empty(M, K)
    over_rows = any(needs[i] for i in kept)
    dA = factors[0].new_empty(len(kept) * r, K) if M else factors[0].new_zeros(len(kept) * r, K)
    if M:
        with torch.cuda.device_of(dx):
            dS = [with_columns(grads[i], ranks.each) for i in kept]
            dS = torch.stack(dS) if len(kept) > 1 else dS[0]
            if threshold and len(kept) < len(factors):
                seeds = torch.stack([seeds[i] for i in kept])
            dropout = dict(threshold=threshold, seed=seeds)
            if need_x:
                A = beside([factors[i] for i in kept], r)
                expert, row, k = stack_strides(A)
                _expand(dS, A, (expert, k, row), r, dx, plan.expand, add=onto, ranks=ranks, **dropout)
            if over_rows:
                row_splits = _row_splits(M, plan.grad_a)[1]
                partials = dS.new_empty(row_splits, K, ranks.R, dtype=torch.float32)
                _over_rows(x, K, dS, r, dA.dtype, plan.grad_a, partials=partials, ranks=ranks, **dropout)
                _reduce_members(partials, dA, r, threshold, ranks, plan.reduce)
    for i, of_factor in zip(kept, dA.view(len(kept), r, K), strict=True):
        if needs[i]:
            of_factors[i] = of_factor[: factors[i].shape[0]]
    return dx if need_x else None, of_factors


def beside(factors, r: int):
    """The rows of the factors [r_i, K] one below the other, r of each."""
    rows = []
    for A in factors:
        rows += [A] if A.shape[0] == r else [A, A.new_zeros(r - A.shape[0], A.shape[1])]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _plan_members(x, factors, threshold) -> LowRankPlan:
    r, members = max(A.shape[0] for A in factors), len(factors)
    return _plan(x, factors[0].dtype, x.shape[1], r, threshold, members=members)


# ---------------------------------------------------------------------------------------------------------------- steps


def shrink(call, S, launch):
    """S [M, R] of a call, or its planes in fp32."""
    planes = S if launch.splits == 1 else _planes(S, *S.shape, launch.splits)
    strides, r = stack_strides(call.A), call.A.shape[-2]
    controls = 1.0, call.rank, call.expert_a, call.threshold, call.seed
    _shrink(call.x, call.A, strides, r, None, planes, *controls, launch)
    return planes


def expand(call, planes, y, S, launch):
    """y [M, N] of a call without its base product, and S of its planes."""
    add = call.add if call.weight is None else None
    _expand(planes, call.B, stack_strides(call.B), call.B.shape[-1], y, launch, u=call.u, v=call.v, bias=call.bias,
            add=add, S=None if planes is S else S, scale=call.scale, expert=call.expert_b)  # fmt: skip


def linear(call, y, S, launch):
    """y [M, N] of a call with a weight and without dropout, and S, by the single kernel."""
    x, weight, A, B = call.x, call.weight, call.A, call.B
    (M, K), N, r = x.shape, weight.shape[0], A.shape[-2]
    scale_ptr, scale = control(call.scale, 1.0)
    rank_ptr, rank = control(call.rank, r)
    expert_a_ptr, expert_a = control(call.expert_a, 0)
    expert_b_ptr, expert_b = control(call.expert_b, 0)
    kernels.linear_kernel[(cdiv(M, launch.block_m) * cdiv(N, launch.block_n),)](
        x, weight, dense(call.bias), A, B, dense(call.u), dense(call.v), y, S,
        scale_ptr, rank_ptr, expert_a_ptr, expert_b_ptr,
        M, N, K, r, scale, rank, expert_a, expert_b,
        *x.stride(), *weight.stride(), *stack_strides(A), *stack_strides(B),
        RAGGED=K % launch.block_k != 0, PREC=precision(), R=S.shape[1], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k, GROUP_M=GROUP_M, num_warps=launch.num_warps, num_stages=launch.num_stages,
        maxnreg=launch.maxnreg,
    )  # fmt: skip


def grad_b(dy, call, S, needs, plan, dbias):
    """(dSu [M, R] or its planes, (partials of dB, partials of dbias)); None for what is not needed. dbias: where it
    goes if nothing else is summed over the rows."""
    (M, N), B = dy.shape, call.B
    R = padded_rank(B.shape[-1])
    over_rows = not needs.isdisjoint(("B", "v"))
    need_dS = not needs.isdisjoint(("A", "u", "S")) or ("x" in needs and call.A is not None)
    one_pass = plan.grad_b is not None and need_dS and (over_rows or dbias is not None)
    row_blocks = cdiv(M, plan.grad_b.block_m) if one_pass else _row_splits(M, plan.db)[1]
    partials = dy.new_empty(row_blocks, N, R, dtype=torch.float32) if over_rows else None
    sums = dy.new_empty(row_blocks, N, dtype=torch.float32) if dbias is not None and (one_pass or over_rows) else None
    dSu = None
    if need_dS:
        launch = plan.grad_b if one_pass else plan.dsu
        dSu = _planes(B, M, R, launch.splits)
        controls = call.scale, call.rank, call.expert_b
        if one_pass:
            _one_pass_b(dy, B, S, dense(call.v), dSu, partials, sums, *controls, launch)
        else:
            expert, n, ranks = stack_strides(B)
            _shrink(dy, B, (expert, ranks, n), B.shape[-1], dense(call.v), dSu, *controls, 0, None, launch)
    if over_rows and not one_pass:
        _over_rows(dy, N, S, B.shape[-1], B.dtype, plan.db, partials=partials, sums=sums)
    elif dbias is not None and sums is None:
        torch.sum(dy, 0, out=dbias)
    return dSu, (partials, sums)


def grad_s(dSu, call, S):
    """dS [M, columns of S] of dSu or its planes."""
    dS = dSu.sum(0).to(call.B.dtype) if dSu.dim() == 3 else dSu
    if call.u is not None:
        dS = dS * torch.nn.functional.pad(call.u, (0, dS.shape[1] - call.u.shape[0]))
    return with_columns(dS, _columns_of_s(call, S))


def grad_a(dSu, K, call, S, needs, plan, dx):
    """(partials of dA, partials of du); None for what is not needed. dx: where that goes."""
    if dSu is None:
        return None, None
    A = call.A
    M, R = dSu.shape[-2:]
    over_rows = not needs.isdisjoint(("A", "u"))
    dropout = dict(threshold=call.threshold, seed=call.seed)
    fused = dx is not None and plan.fused_a and over_rows
    if dx is not None and not fused:
        expert, ranks, k = stack_strides(A)
        _expand(dSu, A, (expert, k, ranks), A.shape[-2], dx, plan.expand, u=call.u, expert=call.expert_a, **dropout)
    if not over_rows:
        return None, None
    row_splits = _row_splits(M, plan.grad_a)[1]
    partials = dSu.new_empty(row_splits, K, R, dtype=torch.float32) if "A" in needs else None
    dots = dSu.new_empty(row_splits, R, dtype=torch.float32) if "u" in needs else None
    _over_rows(call.x, K, dSu, call.B.shape[-1], call.B.dtype, plan.grad_a, A=A, S=S, u=dense(call.u),
               dx=dx if fused else None, partials=partials, dots=dots, expert=call.expert_a, **dropout)  # fmt: skip
    return partials, dots


def reduce(call, N, K, of_b, of_a, found, launch):
    """The second stage of every sum over the rows."""
    (b_partials, sums), (a_partials, dots) = of_b, of_a
    count_b, count_a = (next((t.shape[0] for t in of if t is not None), 0) for of in (of_b, of_a))
    if not count_b and not count_a:
        return
    B, dB, dA = call.B, found.get("B"), found.get("A")
    r = B.shape[-1]
    scale_ptr, scale = control(call.scale, 1.0)
    rank_ptr, rank = control(call.rank, r)
    expert_a_ptr, expert_a = control(call.expert_a, 0)
    expert_b_ptr, expert_b = control(call.expert_b, 0)
    blocks = cdiv(N, launch.block_n) if count_b else 0
    blocks += cdiv(K, launch.block_n) if a_partials is not None else dots is not None
    kernels.reduce_kernel[(blocks,)](
        b_partials, sums, B, dense(call.v), dB, found.get("v"), None if sums is None else found["bias"],
        a_partials, dots, dense(call.u), dA, found.get("u"),
        scale_ptr, rank_ptr, expert_a_ptr, expert_b_ptr,
        count_b, count_a, N, K, r, scale, rank, expert_a, expert_b, call.threshold,
        *stack_strides(B), *((0, 0, 0) if dB is None else stack_strides(dB)),
        *((0, 0, 0) if dA is None else stack_strides(dA)),
        OF_B=count_b > 0, FROZEN=call.frozen, R=launch.block_r, EACH=launch.block_r, MEMBERS=1,
        BLOCK_P=launch.block_m, BLOCK_X=launch.block_n, num_warps=launch.num_warps, num_stages=launch.num_stages,
        maxnreg=launch.maxnreg,
    )  # fmt: skip


def _plan(x, adapter_dtype, n, r, threshold, has_weight=True, **more) -> LowRankPlan:
    m, k = x.shape
    types, gpu = (name_of(x.dtype), name_of(adapter_dtype)), gpu_of(x.device)
    return plan_lowrank(LowRankProblem(m, n, k, *types, x.device.type, gpu, r, threshold > 0, has_weight, **more))


def with_columns(S, columns: int):
    """S or dS [M, columns], dense. What is cut off or added is the zeros of ranks that are not there."""
    return S.contiguous() if S.shape[1] == columns else torch.nn.functional.pad(S, (0, columns - S.shape[1]))


def _columns_of_s(call, S) -> int:
    given = S if call.S is None else call.S
    return padded_rank(call.B.shape[-1]) if given is None else given.shape[1]


def _gradient(like, M):
    """The kernels write all of a gradient except the other slots of a stack, and nothing when there are no rows."""
    return like.new_zeros(like.shape) if like.dim() == 3 or M == 0 else like.new_empty(like.shape)


def _planes(like, M: int, R: int, count: int):
    """For a sum [M, R] that `count` programs share: whole, of a type like that, or planes of fp32."""
    return like.new_empty(M, R) if count == 1 else like.new_empty(count, M, R, dtype=torch.float32)


def _planes_of(tensor, ranks) -> int:
    """Of members' gradients there are none: their tensor is [members, M, each]."""
    return tensor.shape[0] if tensor.dim() == 3 and ranks.single else 1


def _row_splits(M: int, launch: LowRankLaunch) -> tuple[int, int]:
    """(blocks of rows per split, number of splits)."""
    blocks = cdiv(M, launch.block_m)
    per_split = cdiv(blocks, launch.splits)
    return per_split, cdiv(blocks, per_split)


# ------------------------------------------------------------------------------------------------------------- launches


def _column_blocks(columns: int, launch: LowRankLaunch) -> int:
    """Blocks of columns of each of a launch's planes. A plane may be left without any; it is zero then."""
    return cdiv(cdiv(columns, launch.block_n), launch.splits)


def _alone(tensor) -> Ranks:
    R = tensor.shape[-1]
    return Ranks(R, R, 1)


def _shrink(x, A, strides, r, v, planes, scale, rank, expert, threshold, seed, launch, ranks=None):
    (M, K), ranks = x.shape, ranks or _alone(planes)
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_ptr, expert = control(expert, 0)
    kernels.shrink_kernel[ranks.grid(cdiv(M, launch.block_m), launch.splits, launch.block_r)](
        x, A, v, planes, scale_ptr, rank_ptr, expert_ptr, seed,
        M, K, r, scale, rank, expert, threshold, _column_blocks(K, launch), *x.stride(), *strides,
        DROPOUT=threshold > 0, RAGGED=K % launch.block_n != 0, PREC=precision(), R=ranks.R, EACH=ranks.each,
        MEMBERS=ranks.members, BLOCK_M=launch.block_m, BLOCK_K=launch.block_n, BLOCK_R=launch.block_r,
        num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip


def _expand(planes, B, strides, r, out, launch, *, u=None, v=None, bias=None, add=None, S=None, scale=1.0, expert=None,
            threshold=0, seed=None, ranks=None):  # fmt: skip
    (M, N), ranks = out.shape, ranks or _alone(planes)
    scale_ptr, scale = control(scale, 1.0)
    expert_ptr, expert = control(expert, 0)
    n_blocks = _column_blocks(N, launch)
    kernels.expand_kernel[(cdiv(M, launch.block_m) * cdiv(N, n_blocks * launch.block_n),)](
        planes, B, dense(u), dense(v), dense(bias), add, out, S, scale_ptr, expert_ptr, seed,
        M, N, r, scale, expert, threshold, n_blocks, *strides, *((0, 0) if add is None else add.stride()),
        DROPOUT=threshold > 0, RAGGED=N % launch.block_n != 0, PREC=precision(), PLANES=_planes_of(planes, ranks),
        R=ranks.R, EACH=ranks.each, MEMBERS=ranks.members, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_R=launch.block_r, num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip


def _one_pass_b(dy, B, S, v, dSu, partials, sums, scale, rank, expert, launch):
    (M, N), r = dy.shape, B.shape[-1]
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_ptr, expert = control(expert, 0)
    kernels.grad_b_kernel[(cdiv(M, launch.block_m), launch.splits)](
        dy, B, S, v, dSu, partials, sums, scale_ptr, rank_ptr, expert_ptr,
        M, N, r, scale, rank, expert, _column_blocks(N, launch), *dy.stride(), *stack_strides(B),
        RAGGED=N % launch.block_n != 0, PREC=precision(), R=dSu.shape[-1], BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, num_warps=launch.num_warps, num_stages=launch.num_stages,
        maxnreg=launch.maxnreg,
    )  # fmt: skip


def _over_rows(x, K, dSu, r, dtype, launch, *, A=None, S=None, u=None, dx=None, partials=None, dots=None, sums=None,
               expert=None, threshold=0, seed=None, ranks=None):  # fmt: skip
    """grad_a_kernel; also dB's partials and the bias sums, with x := dY and dSu := S."""
    M, ranks = dSu.shape[-2], ranks or _alone(dSu)
    expert_ptr, expert = control(expert, 0)
    m_blocks, row_splits = _row_splits(M, launch)
    columns = 1 if dx is None and partials is None else cdiv(K, launch.block_n)
    kernels.grad_a_kernel[ranks.grid(columns, row_splits, launch.block_r)](
        x, dSu, A, S, u, dx, partials, dots, sums, expert_ptr, seed,
        M, K, r, expert, threshold, m_blocks,
        *((0, 0) if x is None else x.stride()), *((0, 0, 0) if A is None else stack_strides(A)),
        NEED_DX=dx is not None, NEED_DA=partials is not None, DROPOUT=threshold > 0, RAGGED=K % launch.block_n != 0,
        PREC=precision(), DTYPE=_DTYPES[dtype], PLANES=_planes_of(dSu, ranks), R=ranks.R, EACH=ranks.each,
        MEMBERS=ranks.members, BLOCK_M=launch.block_m, BLOCK_K=launch.block_n, BLOCK_R=launch.block_r,
        num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip


def _reduce_members(partials, dA, r, threshold, ranks, launch):
    count, K, _ = partials.shape
    kernels.reduce_kernel[(cdiv(K, launch.block_n),)](
        None, None, None, None, None, None, None, partials, None, None, dA, None, None, None, None, None,
        0, count, 0, K, r, 1.0, r, 0, 0, threshold, 0, 0, 0, 0, 0, 0, *stack_strides(dA),
        OF_B=False, FROZEN=False, R=ranks.R, EACH=ranks.each, MEMBERS=ranks.members, BLOCK_P=launch.block_m,
        BLOCK_X=launch.block_n, num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip
