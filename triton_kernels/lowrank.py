"""Low-rank adapter on a linear map, forward and backward, by Triton kernels.

    y = x W^T + bias + scale * v . (B[eb] (u . keep_rank(A[ea] drop(x))))

x [M, K], W [N, K], A [r, K] or [E, r, K], B [N, r] or [E, N, r], u [r], v [N], bias [N]; 1 <= r <= 256. x and W share
one of fp16, bf16, fp32; A, B, u, v are of that type or all fp32. x, dY and `add` may have any strides. `scale`, `rank`
and `expert` are Python numbers or 0-d tensors on the device, and the dropout seed is a 0-d int64 tensor: no value of
theirs synchronises or recompiles. S = keep_rank(A drop(x)) is what the forward saves, without u and in A's type.

Backward, with t = dY^T S:   dSu = scale dY (v . B)     dB = scale v . u . t     dv = scale rowsum(B . u . t)
                             dA  = u . dSu^T drop(x)    du = colsum(dSu . S)     dX = drop^T((u . dSu) A) + dY W

These functions launch what `lowrank_plan` says and check little: types, shapes and index ranges are up to the caller.
"""

import torch

from . import lowrank_kernels as kernels
from .dropout import keep_scale
from .launching import control, dense, gpu_of, name_of, precision, stack_strides
from .lowrank_plan import LowRankLaunch, LowRankPlan, LowRankProblem, plan_lowrank
from .tiles import cdiv, reduce_launch

GROUP_M = 8


def shrink(x, A, *, rank=None, expert=None, threshold=0, seed=None, plan=None):
    """S [M, r] = keep_rank(A[expert] drop(x)) in A's type. threshold: see dropout_threshold; it needs the seed."""
    S = x.new_empty(x.shape[0], A.shape[-2], dtype=A.dtype)
    if x.shape[0]:
        plan = plan or _plan(x, A.dtype, x.shape[1], A.shape[-2], threshold)
        with torch.cuda.device_of(x):
            _shrink(x, A, stack_strides(A), None, S, 1.0, rank, expert, threshold, seed, plan.shrink)
    return S


def expand(S, B, *, out_dtype, add=None, bias=None, u=None, v=None, scale=1.0, expert=None, plan=None):
    """T [M, N] = scale * v . (B[expert] (u . S)) + bias + add in out_dtype. add [M, N] may have any strides."""
    M, N = S.shape[0], B.shape[-2]
    bias, u, v = dense(bias), dense(u), dense(v)
    T = S.new_empty(M, N, dtype=out_dtype)
    if M:
        plan = plan or _plan(T, B.dtype, N, B.shape[-1], 0)
        with torch.cuda.device_of(S):
            _expand(S, B, stack_strides(B), u, v, bias, add, T, scale, expert, 0, None, plan.expand)
    return T


def linear(x, weight, bias, A, B, *, scale, rank=None, expert_a=None, expert_b=None, u=None, v=None, plan=None):
    """(y [M, N] in x's type, S [M, r]) from the single kernel, without dropout."""
    (M, K), N, r = x.shape, weight.shape[0], A.shape[-2]
    bias, u, v = dense(bias), dense(u), dense(v)
    y = x.new_empty(M, N)
    S = x.new_empty(M, r, dtype=A.dtype)
    if M == 0:
        return y, S
    launch = (plan or _plan(x, A.dtype, N, r, 0)).linear
    if launch is None:
        raise ValueError("the plan has no single kernel for this problem")
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_a_ptr, expert_a = control(expert_a, 0)
    expert_b_ptr, expert_b = control(expert_b, 0)
    with torch.cuda.device_of(x):
        kernels.linear_kernel[(cdiv(M, launch.block_m) * cdiv(N, launch.block_n),)](
            x, weight, bias, A, B, u, v, y, S, scale_ptr, rank_ptr, expert_a_ptr, expert_b_ptr,
            M, N, K, r, scale, rank, expert_a, expert_b,
            *x.stride(), *weight.stride(), *stack_strides(A), *stack_strides(B),
            PREC=precision(), BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
            BLOCK_R=launch.block_r, GROUP_M=GROUP_M, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y, S


def grad_b(
    dy,
    B,
    S,
    *,
    scale,
    rank=None,
    expert=None,
    u=None,
    v=None,
    frozen=False,
    need_dS,
    need_dB,
    need_dv,
    need_dbias,
    plan=None,
):
    """(dSu [M, r] in B's type, dB like B, dv [N], dbias [N] in dy's type); None for what is not needed.

    frozen: dB is zero but for column rank - 1. A stacked B gets a gradient that is zero outside its expert.
    """
    (M, N), r = dy.shape, B.shape[-1]
    u, v = dense(u), dense(v)
    dSu = dy.new_empty(M, r, dtype=B.dtype) if need_dS else None
    dB = _gradient(B, B.shape, M) if need_dB else None
    dv = _gradient(v, v.shape, M) if need_dv else None
    dbias = _gradient(dy, (N,), M) if need_dbias else None
    if M == 0:
        return dSu, dB, dv, dbias

    plan = plan or _plan(dy, B.dtype, N, r, 0)
    strides = stack_strides(B)
    over_rows = need_dB or need_dv
    partials = sums = None
    with torch.cuda.device_of(dy):
        if need_dS and (over_rows or need_dbias) and plan.grad_b is not None:
            row_splits = cdiv(M, plan.grad_b.block_m)
            partials, sums = _workspace(dy, row_splits, N, r, over_rows, need_dbias)
            _one_pass_b(dy, B, strides, S, v, dSu, partials, sums, scale, rank, expert, plan.grad_b)
        else:
            if need_dS:
                transposed = (strides[0], strides[2], strides[1])
                _shrink(dy, B, transposed, v, dSu, scale, rank, expert, 0, None, plan.dsu)
            if over_rows:
                m_blocks, row_splits = _row_splits(M, plan.db)
                partials, sums = _workspace(dy, row_splits, N, r, over_rows, need_dbias)
                _over_rows(dy, S, m_blocks, plan.db, partials=partials, sums=sums)
            elif need_dbias:  # no other sum over the rows to share the pass with
                torch.sum(dy, 0, out=dbias)
        if partials is not None or sums is not None:
            _reduce(
                row_splits,
                N,
                r,
                partials=partials,
                sums=sums,
                B=B,
                u=u,
                v=v,
                out=dB,
                dv=dv,
                dbias=dbias,
                scale=scale,
                rank=rank,
                expert=expert,
                frozen=frozen,
            )
    return dSu, dB, dv, dbias


def grad_a(
    x,
    dSu,
    A,
    S,
    *,
    rank=None,
    expert=None,
    u=None,
    threshold=0,
    seed=None,
    frozen=False,
    need_dA,
    need_dx,
    need_du,
    plan=None,
):
    """(dA like A, U [M, K] = drop^T((u . dSu) A[expert]) in x's type, du [r] like u); None for what is not needed.

    frozen: dA is zero but for row rank - 1. A stacked A gets a gradient that is zero outside its expert.
    """
    (M, K), r = x.shape, dSu.shape[1]
    u = dense(u)
    U = x.new_empty(M, K) if need_dx else None
    dA = _gradient(A, A.shape, M) if need_dA else None
    du = _gradient(u, u.shape, M) if need_du else None
    if M == 0:
        return dA, U, du

    plan = plan or _plan(x, dSu.dtype, K, r, threshold)
    with torch.cuda.device_of(x):
        fused = need_dx and plan.fused_a and (need_dA or need_du)
        if need_dx and not fused:
            strides = stack_strides(A)
            transposed = (strides[0], strides[2], strides[1])
            _expand(dSu, A, transposed, u, None, None, None, U, 1.0, expert, threshold, seed, plan.expand)
        if need_dA or need_du:
            m_blocks, row_splits = _row_splits(M, plan.grad_a)
            partials = x.new_empty(row_splits, K, r, dtype=torch.float32) if need_dA else None
            dots = x.new_empty(row_splits, r, dtype=torch.float32) if need_du else None
            _over_rows(
                x,
                dSu,
                m_blocks,
                plan.grad_a,
                A=A,
                S=S,
                u=u,
                dx=U if fused else None,
                partials=partials,
                dots=dots,
                expert=expert,
                threshold=threshold,
                seed=seed,
            )
            _reduce(
                row_splits,
                K,
                r,
                partials=partials,
                dots=dots,
                u=u,
                out=dA.mT if need_dA else None,
                du=du,
                scale=keep_scale(threshold),
                rank=rank,
                expert=expert,
                frozen=frozen,
            )
    return dA, U, du


def lowrank_fwd(call, *, plan=None):
    """(y [M, N], S [M, r]) of a call on rows x [M, K]. With a weight, y = x weight^T + bias + delta; without, y = add +
    bias + delta. A rank or an expert of None is all ranks, and the first expert.

    The adapter comes first and the base product last, accumulated onto it: one rounding less of the larger term.
    """
    x, weight, A, B = call.x, call.weight, call.A, call.B
    r = A.shape[-2]
    plan = plan or _plan(x, A.dtype, B.shape[-2], r, call.threshold, has_weight=weight is not None)
    outer = dict(u=call.u, v=call.v, scale=call.scale)
    if plan.forward == "single_kernel":
        if call.threshold or weight is None:
            raise ValueError("the single kernel needs a weight and no dropout")
        return linear(
            x, weight, call.bias, A, B, rank=call.rank, expert_a=call.expert_a, expert_b=call.expert_b, **outer,
            plan=plan,
        )  # fmt: skip
    S = shrink(x, A, rank=call.rank, expert=call.expert_a, threshold=call.threshold, seed=call.seed, plan=plan)
    add = call.add if weight is None else None
    y = expand(S, B, out_dtype=x.dtype, add=add, bias=call.bias, expert=call.expert_b, **outer, plan=plan)
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, S


def lowrank_bwd(dy, call, S, *, needs, plan=None):
    """Gradients by name for the names in `needs`, out of x, weight, bias, A, B, u, v; each in its parameter's type.

    Without a weight, the gradient of x is that of the delta alone. Of the call any input but B may be None where
    nothing reads it.
    """
    x, weight, A, B = call.x, call.weight, call.A, call.B
    (m, n), r = dy.shape, B.shape[-1]
    if x is None:  # its shape and type are read, not its values
        x = dy.new_empty(1).expand(m, n if A is None else A.shape[-1])
    plan = plan or _plan(x, B.dtype, n, r, call.threshold, has_weight=weight is not None)
    need_dS = not needs.isdisjoint(("x", "A", "u"))
    runtime = dict(rank=call.rank, u=call.u, frozen=call.frozen, plan=plan)
    dSu, dB, dv, dbias = grad_b(
        dy, B, S, scale=call.scale, expert=call.expert_b, v=call.v, need_dS=need_dS, need_dB="B" in needs,
        need_dv="v" in needs, need_dbias="bias" in needs, **runtime,
    )  # fmt: skip
    dA = dx = du = None
    if need_dS:
        dA, dx, du = grad_a(
            x, dSu, A, S, expert=call.expert_a, threshold=call.threshold, seed=call.seed, need_dA="A" in needs,
            need_dx="x" in needs, need_du="u" in needs, **runtime,
        )  # fmt: skip
    if dx is not None and weight is not None:
        dx.addmm_(dy, weight)
    grads = {"x": dx, "bias": dbias, "A": dA, "B": dB, "u": du, "v": dv}
    if "weight" in needs:
        grads["weight"] = dy.t() @ x
    return {name: grads[name] for name in needs}


def _plan(x, adapter_dtype, n, r, threshold, has_weight=True) -> LowRankPlan:
    m, k = x.shape
    types = name_of(x.dtype), name_of(adapter_dtype)
    return plan_lowrank(LowRankProblem(m, n, k, *types, x.device.type, gpu_of(x.device), r, threshold > 0, has_weight))


def _row_splits(M: int, launch: LowRankLaunch) -> tuple[int, int]:
    """(blocks of rows per row_split, number of row_splits)."""
    blocks = cdiv(M, launch.block_m)
    per_split = cdiv(blocks, launch.splits)
    return per_split, cdiv(blocks, per_split)


def _gradient(like, shape, M):
    """The kernels write all of a gradient except the other slots of a stack, and nothing when there are no rows."""
    return like.new_zeros(shape) if len(shape) == 3 or M == 0 else like.new_empty(shape)


def _workspace(like, row_splits, columns, r, need_partials, need_sums):
    partials = like.new_empty(row_splits, columns, r, dtype=torch.float32) if need_partials else None
    return partials, like.new_empty(row_splits, columns, dtype=torch.float32) if need_sums else None


def _split(columns: int, launch: LowRankLaunch) -> tuple[int, int]:
    """(blocks of columns per split, number of splits)."""
    blocks = cdiv(columns, launch.block_n)
    per_split = cdiv(blocks, launch.splits)
    return per_split, cdiv(blocks, per_split)


def _splits_of(out, splits):
    return out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)


def _shrink(x, A, strides, v, out, scale, rank, expert, threshold, seed, launch):
    (M, K), r = x.shape, out.shape[1]
    k_blocks, splits = _split(K, launch)
    target = _splits_of(out, splits)
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_ptr, expert = control(expert, 0)
    kernels.shrink_kernel[(cdiv(M, launch.block_m), splits, cdiv(r, launch.block_r))](
        x, A, v, target, scale_ptr, rank_ptr, expert_ptr, seed,
        M, K, r, scale, rank, expert, threshold, k_blocks, *x.stride(), *strides,
        DROPOUT=threshold > 0, PREC=precision(), BLOCK_M=launch.block_m, BLOCK_K=launch.block_n,
        BLOCK_R=launch.block_r, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if splits > 1:
        _reduce(splits, M, r, partials=target, out=out)


def _expand(S, B, strides, u, v, bias, add, out, scale, expert, threshold, seed, launch):
    (M, N), r = out.shape, S.shape[1]
    scale_ptr, scale = control(scale, 1.0)
    expert_ptr, expert = control(expert, 0)
    kernels.expand_kernel[(cdiv(M, launch.block_m), cdiv(N, launch.block_n))](
        S, B, u, v, bias, add, out, scale_ptr, expert_ptr, seed,
        M, N, r, scale, expert, threshold, *strides, *((0, 0) if add is None else add.stride()),
        DROPOUT=threshold > 0, PREC=precision(), BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
        BLOCK_R=launch.block_r, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _one_pass_b(dy, B, strides, S, v, dSu, partials, sums, scale, rank, expert, launch):
    (M, N), r = dy.shape, B.shape[-1]
    n_blocks, splits = _split(N, launch)
    target = _splits_of(dSu, splits)
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_ptr, expert = control(expert, 0)
    kernels.grad_b_kernel[(cdiv(M, launch.block_m), splits)](
        dy, B, S, v, target, partials, sums, scale_ptr, rank_ptr, expert_ptr,
        M, N, r, scale, rank, expert, n_blocks, *dy.stride(), *strides,
        PREC=precision(), BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_R=launch.block_r,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if splits > 1:
        _reduce(splits, M, r, partials=target, out=dSu)


def _over_rows(
    x,
    dSu,
    m_blocks,
    launch,
    *,
    A=None,
    S=None,
    u=None,
    dx=None,
    partials=None,
    dots=None,
    sums=None,
    expert=None,
    threshold=0,
    seed=None,
):
    """grad_a_kernel; also dB's partials and the bias sums, with x := dY and dSu := S."""
    (M, K), r = x.shape, dSu.shape[1]
    expert_ptr, expert = control(expert, 0)
    columns = 1 if dx is None and partials is None else cdiv(K, launch.block_n)
    kernels.grad_a_kernel[(columns, cdiv(M, m_blocks * launch.block_m), cdiv(r, launch.block_r))](
        x, dSu, A, S, u, dx, partials, dots, sums, expert_ptr, seed,
        M, K, r, expert, threshold, m_blocks, *x.stride(), *((0, 0, 0) if A is None else stack_strides(A)),
        NEED_DX=dx is not None, NEED_DA=partials is not None, DROPOUT=threshold > 0, PREC=precision(),
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_n, BLOCK_R=launch.block_r,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _reduce(
    count,
    X,
    r,
    *,
    partials=None,
    sums=None,
    dots=None,
    B=None,
    u=None,
    v=None,
    out=None,
    dv=None,
    dbias=None,
    du=None,
    scale=1.0,
    rank=None,
    expert=None,
    frozen=False,
):
    """Second stage of every partial sum; see reduce_kernel. `out` is indexed [expert, x, j] through its strides."""
    tile, num_warps = reduce_launch(r)
    scale_ptr, scale = control(scale, 1.0)
    rank_ptr, rank = control(rank, r)
    expert_ptr, expert = control(expert, 0)
    rows = X if partials is not None or sums is not None else 1
    kernels.reduce_kernel[(cdiv(rows, tile["BLOCK_X"]),)](
        partials, sums, dots, B, u, v, out, dv, dbias, du, scale_ptr, rank_ptr, expert_ptr,
        count, X, r, scale, rank, expert,
        *((0, 0, 0) if out is None else stack_strides(out)), *((0, 0, 0) if B is None else stack_strides(B)),
        FROZEN=frozen, **tile, num_warps=num_warps, num_stages=1,
    )  # fmt: skip
