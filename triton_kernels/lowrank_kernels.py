"""Device code of the low-rank adapter  y = x W^T + bias + scale * v . (B[eb] (u . keep_rank(A[ea] drop(x)))).

Conventions of every kernel:
- A control (`scale`, `rank`, `expert`) is a pair (pointer, value). A None pointer selects the value; otherwise the
  0-d device tensor is loaded instead, so that a CUDA graph can replay with another one. Neither recompiles.
- Row and column offsets are widened to 64 bits before they meet a stride: M * K passes 2**31 for long batches.
- A test on a None pointer stands alone, outside any run-time condition: its branch must not be compiled.
- Sums are accumulated in fp32 in an order fixed by the plan; nothing is atomic, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

from .philox import keep_mask

# These change from call to call or from step to step; specialising on 1 or on divisibility would compile again. X is M
# in the sum over splits of the columns.
VOLATILE = ["M", "scale", "rank", "expert", "expert_a", "expert_b", "threshold"]
VOLATILE += ["k_blocks", "n_blocks", "m_blocks", "partials", "X"]
# 0-d tensors are often views into a table, at any offset.
UNALIGNED = ["scale_ptr", "rank_ptr", "expert_ptr", "expert_a_ptr", "expert_b_ptr", "seed_ptr"]


@triton.jit
def control(ptr, value, DTYPE: tl.constexpr):
    """The value of a runtime control, as DTYPE."""
    if ptr is None:
        return tl.cast(value, DTYPE)
    else:
        return tl.load(ptr).to(DTYPE)


@triton.jit
def keep_scale(threshold):
    return 65536.0 / (65536 - threshold).to(tl.float32)


@triton.jit
def dot(a, b, acc, PREC: tl.constexpr):
    """acc + a b with an activation tile a. Two equal types take the native product.

    bf16 against fp32 splits b into three bf16 terms, 3 * 8 bits = the 24 bits of fp32: three native products that are
    exact before accumulation, while a stays in shared memory as it is. Upcasting a to tf32x3 would cost twice the
    tensor-core time and enough registers to spill. fp16 has too few exponent bits for the terms, so it is upcast.
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PREC)
    elif a.dtype == tl.bfloat16:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        # Tensor cores truncate where they add, fp32 adders round: a long sum is better kept out of the former.
        part = tl.dot(a, low)
        part = tl.dot(a, middle, part)
        return acc + tl.dot(a, high, part)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PREC)


@triton.jit
def scaled(tile, factors):
    """tile * factors with one rounding back to the tile's type."""
    return (tile.to(tl.float32) * factors.to(tl.float32)).to(tile.dtype)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def shrink_kernel(
    x_ptr,
    a_ptr,
    v_ptr,
    out_ptr,
    scale_ptr,
    rank_ptr,
    expert_ptr,
    seed_ptr,
    M,
    K,
    r,
    scale,
    rank,
    expert,
    threshold,
    k_blocks,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [splits, M, r] = scale * keep_rank((v . A) drop(x)) over the columns of one split.

    With x := dY and A := B^T it is also dSu; only there is v present.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = ranks < tl.minimum(control(rank_ptr, rank, tl.int32), r)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    a_ranks = a_ptr + control(expert_ptr, expert, tl.int64) * stride_ae + ranks.to(tl.int64)[None, :] * stride_ar
    k_begin = split * k_blocks * BLOCK_K
    k_end = tl.minimum(k_begin + k_blocks * BLOCK_K, K)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        wide_cols = cols.to(tl.int64)
        x = tl.load(x_rows + wide_cols[None, :] * stride_xk, mask=(rows < M)[:, None] & (cols < K)[None, :], other=0.0)
        # Dead ranks are not even read: their columns of S come out as exact zeros.
        a = tl.load(a_ranks + wide_cols[:, None] * stride_ak, mask=(cols < K)[:, None] & live[None, :], other=0.0)
        if v_ptr is not None:
            a = scaled(a, tl.load(v_ptr + cols, mask=cols < K, other=0.0)[:, None])
        if DROPOUT:
            x = tl.where(keep_mask(seed_ptr, rows, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, PREC)
    factor = control(scale_ptr, scale, tl.float32)
    if DROPOUT:
        factor *= keep_scale(threshold)
    out = out_ptr + (split * M.to(tl.int64) + rows)[:, None] * r + ranks[None, :]
    tl.store(out, (acc * factor).to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (ranks < r)[None, :])


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def expand_kernel(
    s_ptr,
    b_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    scale_ptr,
    expert_ptr,
    seed_ptr,
    M,
    N,
    r,
    scale,
    expert,
    threshold,
    stride_be,
    stride_bn,
    stride_br,
    stride_dm,
    stride_dn,
    DROPOUT: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [M, N] = drop(scale * v . (B (u . S))) + bias + add.

    With S := dSu and B := A^T it is also dx, which is dropped like x was; only there is DROPOUT set.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_rows = rows.to(tl.int64)
    wide_cols = cols.to(tl.int64)
    b_cols = b_ptr + control(expert_ptr, expert, tl.int64) * stride_be + wide_cols[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # A block of ranks at a time keeps the operands of a large rank out of the register budget.
    for j in range(0, r, BLOCK_R):
        ranks = j + tl.arange(0, BLOCK_R)
        s_mask = (rows < M)[:, None] & (ranks < r)[None, :]
        s = tl.load(s_ptr + wide_rows[:, None] * r + ranks[None, :], mask=s_mask, other=0.0)
        if u_ptr is not None:
            s = scaled(s, tl.load(u_ptr + ranks, mask=ranks < r, other=0.0)[None, :])
        b_mask = (ranks < r)[:, None] & (cols < N)[None, :]
        b = tl.load(b_cols + ranks.to(tl.int64)[:, None] * stride_br, mask=b_mask, other=0.0)
        acc = dot(s, b, acc, PREC)
    acc *= control(scale_ptr, scale, tl.float32)
    if v_ptr is not None:
        acc *= tl.load(v_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = keep_mask(seed_ptr, rows, tl.program_id(1) * BLOCK_N, threshold, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc * keep_scale(threshold), 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if add_ptr is not None:
        add = add_ptr + wide_rows[:, None] * stride_dm + wide_cols[None, :] * stride_dn
        acc += tl.load(add, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + wide_rows[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    u_ptr,
    v_ptr,
    y_ptr,
    s_ptr,
    scale_ptr,
    rank_ptr,
    expert_a_ptr,
    expert_b_ptr,
    M,
    N,
    K,
    r,
    scale,
    rank,
    expert_a,
    expert_b,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ae,
    stride_ar,
    stride_ak,
    stride_be,
    stride_bn,
    stride_br,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y [M, N] and S [M, r] in one pass: every column of tiles accumulates S beside x W^T and never reloads it."""
    # Neighbouring programs walk GROUP_M rows of tiles together and share their columns of W in the L2 cache.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // per_group * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % per_group % group_m
    pid_n = pid % per_group // group_m

    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    wide_rows = rows.to(tl.int64)
    wide_cols = cols.to(tl.int64)
    wide_ranks = ranks.to(tl.int64)
    live = ranks < tl.minimum(control(rank_ptr, rank, tl.int32), r)
    x_rows = x_ptr + wide_rows[:, None] * stride_xm
    w_cols = w_ptr + wide_cols[None, :] * stride_wn
    a_ranks = a_ptr + control(expert_a_ptr, expert_a, tl.int64) * stride_ae + wide_ranks[None, :] * stride_ar
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        wide = inner.to(tl.int64)
        x = tl.load(x_rows + wide[None, :] * stride_xk, mask=(rows < M)[:, None] & (inner < K)[None, :], other=0.0)
        w = tl.load(w_cols + wide[:, None] * stride_wk, mask=(inner < K)[:, None] & (cols < N)[None, :], other=0.0)
        a = tl.load(a_ranks + wide[:, None] * stride_ak, mask=(inner < K)[:, None] & live[None, :], other=0.0)
        acc = dot(x, w, acc, PREC)
        s = dot(x, a, s, PREC)
    if pid_n == 0:
        saved = s_ptr + wide_rows[:, None] * r + ranks[None, :]
        tl.store(saved, s.to(s_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (ranks < r)[None, :])
    if u_ptr is not None:
        s *= tl.load(u_ptr + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
    b_cols = b_ptr + control(expert_b_ptr, expert_b, tl.int64) * stride_be + wide_cols[None, :] * stride_bn
    b = tl.load(b_cols + wide_ranks[:, None] * stride_br, mask=(ranks < r)[:, None] & (cols < N)[None, :], other=0.0)
    delta = dot(s.to(b.dtype), b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PREC)
    delta *= control(scale_ptr, scale, tl.float32)
    if v_ptr is not None:
        delta *= tl.load(v_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    acc += delta
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + wide_rows[:, None] * N + cols[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def grad_b_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    v_ptr,
    dsu_ptr,
    partials_ptr,
    sums_ptr,
    scale_ptr,
    rank_ptr,
    expert_ptr,
    M,
    N,
    r,
    scale,
    rank,
    expert,
    n_blocks,
    stride_ym,
    stride_yn,
    stride_be,
    stride_bn,
    stride_br,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One pass over dY: dsu [splits, M, r] = scale * dY (v . B) and, where their pointers are given, per split of
    the rows partials [row_splits, N, r] = dY^T S and sums [row_splits, N] = column sums of dY.

    dSu needs all of N and dB all of M. A program owns one split of BLOCK_M rows and walks its columns, so dSu stays in
    registers and only dB leaves in partial sums; u, scale and v reach dB in the reduction, in fp32.
    """
    row_split = tl.program_id(0)
    split = tl.program_id(1)
    rows = row_split * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    wide_rows = rows.to(tl.int64)
    live = ranks < tl.minimum(control(rank_ptr, rank, tl.int32), r)
    inside = (rows < M)[:, None] & (ranks < r)[None, :]
    y_rows = dy_ptr + wide_rows[:, None] * stride_ym
    b_ranks = b_ptr + control(expert_ptr, expert, tl.int64) * stride_be + ranks.to(tl.int64)[None, :] * stride_br
    if partials_ptr is not None:
        s = tl.load(s_ptr + wide_rows[:, None] * r + ranks[None, :], mask=inside, other=0.0)
    n_begin = split * n_blocks * BLOCK_N
    n_end = tl.minimum(n_begin + n_blocks * BLOCK_N, N)
    dsu = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(n_begin, n_end, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        wide_cols = cols.to(tl.int64)
        dy = tl.load(y_rows + wide_cols[None, :] * stride_yn, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)
        b = tl.load(b_ranks + wide_cols[:, None] * stride_bn, mask=(cols < N)[:, None] & live[None, :], other=0.0)
        if v_ptr is not None:
            b = scaled(b, tl.load(v_ptr + cols, mask=cols < N, other=0.0)[:, None])
        dsu = dot(dy, b, dsu, PREC)
        if partials_ptr is not None:
            db = dot(tl.trans(dy), s, tl.zeros([BLOCK_N, BLOCK_R], tl.float32), PREC)
            partial = partials_ptr + (row_split.to(tl.int64) * N + wide_cols)[:, None] * r + ranks[None, :]
            tl.store(partial, db, mask=(cols < N)[:, None] & (ranks < r)[None, :])
        if sums_ptr is not None:
            tl.store(sums_ptr + row_split.to(tl.int64) * N + cols, tl.sum(dy.to(tl.float32), 0), mask=cols < N)
    dsu *= control(scale_ptr, scale, tl.float32)
    out = dsu_ptr + (split * M.to(tl.int64) + rows)[:, None] * r + ranks[None, :]
    tl.store(out, dsu.to(dsu_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def grad_a_kernel(
    x_ptr,
    dsu_ptr,
    a_ptr,
    s_ptr,
    u_ptr,
    dx_ptr,
    partials_ptr,
    dots_ptr,
    sums_ptr,
    expert_ptr,
    seed_ptr,
    M,
    K,
    r,
    expert,
    threshold,
    m_blocks,
    stride_xm,
    stride_xk,
    stride_ae,
    stride_ar,
    stride_ak,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    DROPOUT: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One pass over x: dx [M, K] = drop^T((u . dSu) A) and partials [row_splits, K, r] = drop(x)^T dSu per split of
    the rows.

    Optional by-products: dots [row_splits, r] = column sums of dSu . S (for du), sums [row_splits, K] = column sums of
    x.
    dB is the same product with x := dY and dSu := S. u and the keep scale reach dA in the reduction, in fp32. dx needs
    every rank in one block; a larger rank takes it from expand_kernel, which need not read x.
    """
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    wide_cols = cols.to(tl.int64)
    if NEED_DX:
        a_ranks = a_ptr + control(expert_ptr, expert, tl.int64) * stride_ae + ranks.to(tl.int64)[:, None] * stride_ar
        a_mask = (ranks < r)[:, None] & (cols < K)[None, :]
        a = tl.load(a_ranks + wide_cols[None, :] * stride_ak, mask=a_mask, other=0.0)
        if u_ptr is not None:
            a = scaled(a, tl.load(u_ptr + ranks, mask=ranks < r, other=0.0)[:, None])
    if NEED_DA:
        da = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    dots = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_K], tl.float32)
    m_begin = row_split * m_blocks * BLOCK_M
    m_end = tl.minimum(m_begin + m_blocks * BLOCK_M, M)
    for m in range(m_begin, m_end, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        wide_rows = rows.to(tl.int64)
        inside = (rows < M)[:, None] & (cols < K)[None, :]
        lowrank = wide_rows[:, None] * r + ranks[None, :]
        dsu = tl.load(dsu_ptr + lowrank, mask=(rows < M)[:, None] & (ranks < r)[None, :], other=0.0)
        if DROPOUT:
            keep = keep_mask(seed_ptr, rows, tl.program_id(0) * BLOCK_K, threshold, BLOCK_M, BLOCK_K)
        if NEED_DA:
            x = tl.load(x_ptr + wide_rows[:, None] * stride_xm + wide_cols[None, :] * stride_xk, mask=inside, other=0.0)
            if sums_ptr is not None:
                sums += tl.sum(x.to(tl.float32), 0)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            da = dot(tl.trans(x), dsu, da, PREC)
        if NEED_DX:
            dx = dot(dsu, a, tl.zeros([BLOCK_M, BLOCK_K], tl.float32), PREC)
            if DROPOUT:
                dx = tl.where(keep, dx * keep_scale(threshold), 0.0)
            tl.store(dx_ptr + wide_rows[:, None] * K + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dots_ptr is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:
                s = tl.load(s_ptr + lowrank, mask=(rows < M)[:, None] & (ranks < r)[None, :], other=0.0)
                dots += tl.sum(dsu.to(tl.float32) * s.to(tl.float32), 0)
    if NEED_DA:
        partial = partials_ptr + (row_split.to(tl.int64) * K + wide_cols)[:, None] * r + ranks[None, :]
        tl.store(partial, da, mask=(cols < K)[:, None] & (ranks < r)[None, :])
    if sums_ptr is not None:
        tl.store(sums_ptr + row_split.to(tl.int64) * K + cols, sums, mask=cols < K)
    if dots_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(dots_ptr + row_split * r + ranks, dots, mask=ranks < r)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def reduce_kernel(
    partials_ptr,
    sums_ptr,
    dots_ptr,
    b_ptr,
    u_ptr,
    v_ptr,
    out_ptr,
    dv_ptr,
    dbias_ptr,
    du_ptr,
    scale_ptr,
    rank_ptr,
    expert_ptr,
    partials,
    X,
    r,
    scale,
    rank,
    expert,
    stride_oe,
    stride_ox,
    stride_or,
    stride_be,
    stride_bn,
    stride_br,
    FROZEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Second stage. With t[x, j] = scale * u[j] * the sum of partials [partials, X, r] over its first axis:
    out[expert, x, j] = v[x] t[x, j], zero but for column rank - 1 when FROZEN;  dv[x] = sum_j B[expert, x, j] t[x, j];
    dbias[x] = sum of sums [partials, X];  du[j] = sum of dots [partials, r]. Every output is optional.
    """
    rows = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    ranks = tl.arange(0, BLOCK_R)
    wide_rows = rows.to(tl.int64)
    inside = (rows < X)[:, None] & (ranks < r)[None, :]
    expert = control(expert_ptr, expert, tl.int64)
    if partials_ptr is not None:
        # BLOCK_P partials are in flight at a time: one after the other, the sum would wait for memory at each.
        total = tl.zeros([BLOCK_X, BLOCK_R], tl.float32)
        for p in range(0, partials, BLOCK_P):
            partial = p + tl.arange(0, BLOCK_P)
            offsets = (partial.to(tl.int64)[:, None] * X + wide_rows[None, :])[:, :, None] * r + ranks[None, None, :]
            mask = (partial < partials)[:, None, None] & inside[None, :, :]
            total += tl.sum(tl.load(partials_ptr + offsets, mask=mask, other=0.0), 0)
        total *= control(scale_ptr, scale, tl.float32)
        if u_ptr is not None:
            total *= tl.load(u_ptr + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
        if dv_ptr is not None:
            b_rows = b_ptr + expert * stride_be + wide_rows[:, None] * stride_bn
            b = tl.load(b_rows + ranks.to(tl.int64)[None, :] * stride_br, mask=inside, other=0.0)
            dv = tl.sum(total * b.to(tl.float32), 1)
            tl.store(dv_ptr + rows, dv.to(dv_ptr.dtype.element_ty), mask=rows < X)
        if out_ptr is not None:
            if v_ptr is not None:
                total *= tl.load(v_ptr + rows, mask=rows < X, other=0.0).to(tl.float32)[:, None]
            if FROZEN:
                total = tl.where((ranks == control(rank_ptr, rank, tl.int32) - 1)[None, :], total, 0.0)
            out = out_ptr + expert * stride_oe + wide_rows[:, None] * stride_ox
            out += ranks.to(tl.int64)[None, :] * stride_or
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        dbias = tl.zeros([BLOCK_X], tl.float32)
        for p in range(0, partials, BLOCK_P):
            partial = p + tl.arange(0, BLOCK_P)
            offsets = partial.to(tl.int64)[:, None] * X + rows[None, :]
            mask = (partial < partials)[:, None] & (rows < X)[None, :]
            dbias += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), 0)
        tl.store(dbias_ptr + rows, dbias.to(dbias_ptr.dtype.element_ty), mask=rows < X)
    if dots_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            du = tl.zeros([BLOCK_R], tl.float32)
            for p in range(0, partials, BLOCK_P):
                partial = p + tl.arange(0, BLOCK_P)
                mask = (partial < partials)[:, None] & (ranks < r)[None, :]
                du += tl.sum(tl.load(dots_ptr + partial[:, None] * r + ranks[None, :], mask=mask, other=0.0), 0)
            tl.store(du_ptr + ranks, du.to(du_ptr.dtype.element_ty), mask=ranks < r)
