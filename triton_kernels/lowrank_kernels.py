"""Device code of the low-rank adapter  y = x W^T + bias + scale * v . (B[eb] (u . keep_rank(A[ea] drop(x)))).

Conventions of every kernel:
- S and dSu are [M, R]: their ranks are padded to R, a power of two of at least 16, so that their rows are aligned and
  no load of them is masked by rank. What is padded is zero. A sum over columns that several programs share is left as
  PLANES partial sums [PLANES, M, R] in fp32, which whoever reads it adds up: that saves a kernel in between.
- Projections that share x are MEMBERS of one product. Their ranks lie side by side, EACH of every member, which are its
  r ranks padded; R is EACH times a power of two: of three members the last fourth is padding. A is [MEMBERS r, K] then,
  without what is padded; S and dSu are [MEMBERS, M, EACH] (planes are [MEMBERS, planes, M, EACH]), so that what a
  member has is that of a layer by itself; and seed_ptr points to a seed of each. With dropout a block of ranks is of
  one member. Programs of the same block of x are neighbours, whichever ranks are theirs: one reads it from memory, the
  others find it in the L2 cache. A layer by itself has EACH == R.
- A control (`scale`, `rank`, `expert`) is a pair (pointer, value). A None pointer selects the value; otherwise the
  0-d device tensor is loaded instead, so that a CUDA graph can replay with another one. Neither recompiles.
- RAGGED: the columns end inside a block, and need a mask.
- Row and column offsets are widened to 64 bits before they meet a stride: M * K passes 2**31 for long batches.
- A test on a None pointer stands alone, outside any run-time condition: its branch must not be compiled.
- Sums are accumulated in fp32 in an order fixed by the plan; nothing is atomic, so equal inputs give equal bits.
"""

import triton
import triton.language as tl

from .philox import keep_mask

# These change from call to call or from step to step; specialising on 1 or on divisibility would compile again.
VOLATILE = ["M", "scale", "rank", "expert", "expert_a", "expert_b", "threshold"]
VOLATILE += ["k_blocks", "n_blocks", "m_blocks", "b_partials", "a_partials"]
# 0-d tensors are often views into a table, at any offset.
UNALIGNED = ["scale_ptr", "rank_ptr", "expert_ptr", "expert_a_ptr", "expert_b_ptr", "seed_ptr"]
# Ranks of a product whose fp32 operand is multiplied as all its bf16 terms side by side; more fill the registers.
WIDE_RANKS = tl.constexpr(32)


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
def bf16_terms(t):
    """fp32 as the sum of three bf16: 3 * 8 bits are its 24. fp16 has too few exponent bits for that."""
    high = t.to(tl.bfloat16)
    rest = t - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def beside(a, b, c, d, AXIS: tl.constexpr):
    """Four tiles in a row along an axis."""
    tiles = tl.join(tl.join(a, c), tl.join(b, d))  # [.., 2, 2], of which the first of the two is the slower
    if AXIS == 0:
        return tl.reshape(tl.permute(tiles, (2, 3, 0, 1)), [4 * a.shape[0], a.shape[1]])
    else:
        return tl.reshape(tl.permute(tiles, (0, 2, 3, 1)), [a.shape[0], 4 * a.shape[1]])


@triton.jit
def dot(a, b, acc, PREC: tl.constexpr):
    """acc + a b with an activation tile a. Two equal types take the native product.

    bf16 against fp32 multiplies by the three bf16 terms of b, exact before accumulation, while a stays in shared memory
    as it is. Upcasting a to tf32x3 would cost twice the tensor-core time and enough registers to spill. fp16 is upcast.
    """
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PREC)
    elif a.dtype == tl.bfloat16:
        high, middle, low = bf16_terms(b)
        # Tensor cores truncate where they add, fp32 adders round: a long sum is better kept out of the former.
        if b.shape[1] <= WIDE_RANKS:
            wide = tl.dot(a, beside(high, middle, low, tl.zeros_like(high), 1))
            return acc + tl.sum(tl.reshape(wide, [a.shape[0], 4, b.shape[1]]), 1)
        else:
            part = tl.dot(a, low)
            part = tl.dot(a, middle, part)
            return acc + tl.dot(a, high, part)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PREC)


@triton.jit
def dot_to(a, b, acc, kind: tl.constexpr, PREC: tl.constexpr):
    """acc + a b of two tiles of factors, for a result of that kind: bf16 shows less than two terms of fp32 factors."""
    if kind == tl.bfloat16 and a.dtype == tl.float32:
        high, middle, low = bf16_terms(a)
        other, rest, _ = bf16_terms(b)
        return tl.dot(beside(high, middle, low, high, 1), beside(other, other, other, rest, 0), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PREC)


@triton.jit
def scaled(tile, factors):
    """tile * factors with one rounding back to the tile's type."""
    return (tile.to(tl.float32) * factors.to(tl.float32)).to(tile.dtype)


@triton.jit
def load_planes(
    ptr,
    u_ptr,
    rows,
    ranks,
    M,
    r,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """u . [rows, ranks] of S or dSu as DTYPE, the sum of its planes. Of several members' it has one."""
    if EACH == R:
        offsets = rows.to(tl.int64)[:, None] * R + ranks[None, :]
        mask = (rows < M)[:, None]
    else:
        tl.static_assert(PLANES == 1)
        offsets = (ranks // EACH).to(tl.int64)[None, :] * M * EACH + rows.to(tl.int64)[:, None] * EACH
        offsets += (ranks % EACH)[None, :]
        mask = and_if((rows < M)[:, None], (ranks < MEMBERS * EACH)[None, :], MEMBERS * EACH < R)
    total = tl.load(ptr + offsets, mask=mask, other=0.0)
    for plane in tl.static_range(1, PLANES):
        total += tl.load(ptr + plane * M.to(tl.int64) * R + offsets, mask=mask, other=0.0)
    total = total.to(DTYPE)
    if u_ptr is not None:
        total = scaled(total, tl.load(u_ptr + ranks, mask=ranks < r, other=0.0)[None, :])
    return total


@triton.jit
def there(ranks, r, R: tl.constexpr, EACH: tl.constexpr, MEMBERS: tl.constexpr):
    """Which padded ranks are ranks, of r that a member has."""
    if EACH == R:
        return ranks < r
    else:
        return and_if(ranks % EACH < r, ranks < MEMBERS * EACH, MEMBERS * EACH < R)


@triton.jit
def row_of(ranks, r, R: tl.constexpr, EACH: tl.constexpr):
    """Where a padded rank is among the rows of A."""
    if EACH == R:
        return ranks
    else:
        return ranks // EACH * r + ranks % EACH


@triton.jit
def and_if(mask, other, RAGGED: tl.constexpr):
    """mask & other, or the mask alone."""
    if RAGGED:
        return mask & other
    else:
        return mask


@triton.jit
def block_of_x(R: tl.constexpr, EACH: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Which block of its rows, or of its columns, is a program's."""
    if EACH == R:
        return tl.program_id(0)
    else:
        return tl.program_id(0) // ((MEMBERS * EACH + BLOCK_R - 1) // BLOCK_R)


@triton.jit
def block_of_ranks(R: tl.constexpr, EACH: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Which block of the ranks is a program's. Those of members come next to each other, without blocks of padding."""
    if EACH == R:
        return tl.program_id(2)
    else:
        return tl.program_id(0) % ((MEMBERS * EACH + BLOCK_R - 1) // BLOCK_R)


@triton.jit
def seed_of(seed_ptr, rank_block, R: tl.constexpr, EACH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Pointer to the seed of the member that a block of ranks is of."""
    if EACH == R:
        return seed_ptr
    else:
        tl.static_assert(BLOCK_R <= EACH)
        return seed_ptr + rank_block * BLOCK_R // EACH


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
    RAGGED: tl.constexpr,
    PREC: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [planes, M, R] = scale * keep_rank((v . A) drop(x)), each plane of k_blocks blocks of the columns.

    With x := dY and A := B^T it is also dSu; only there is v present. out of members is [MEMBERS, planes, M, EACH].
    """
    rows = block_of_x(R, EACH, MEMBERS, BLOCK_R) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(1)
    rank_block = block_of_ranks(R, EACH, MEMBERS, BLOCK_R)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = there(ranks, tl.minimum(control(rank_ptr, rank, tl.int32), r), R, EACH, MEMBERS)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_xm
    a_ranks = a_ptr + control(expert_ptr, expert, tl.int64) * stride_ae
    a_ranks += row_of(ranks, r, R, EACH).to(tl.int64)[None, :] * stride_ar
    k_begin = plane * k_blocks * BLOCK_K
    k_end = tl.minimum(k_begin + k_blocks * BLOCK_K, K)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        wide_cols = cols.to(tl.int64)
        x_mask = and_if((rows < M)[:, None], (cols < K)[None, :], RAGGED)
        x = tl.load(x_rows + wide_cols[None, :] * stride_xk, mask=x_mask, other=0.0)
        # Dead ranks are not even read.
        a_mask = and_if(live[None, :], (cols < K)[:, None], RAGGED)
        a = tl.load(a_ranks + wide_cols[:, None] * stride_ak, mask=a_mask, other=0.0)
        if v_ptr is not None:
            a = scaled(a, tl.load(v_ptr + cols, mask=cols < K, other=0.0)[:, None])
        if DROPOUT:
            seed = seed_of(seed_ptr, rank_block, R, EACH, BLOCK_R)
            x = tl.where(keep_mask(seed, rows, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, a, acc, PREC)
    acc = tl.where(live[None, :], acc, 0.0)  # zeros times an x that is not finite are none
    factor = control(scale_ptr, scale, tl.float32)
    if DROPOUT:
        factor *= keep_scale(threshold)
    if EACH == R:
        out = out_ptr + (plane * M.to(tl.int64) + rows)[:, None] * R + ranks[None, :]
        inside = (rows < M)[:, None]
    else:
        planes = ranks // EACH * tl.num_programs(1) + plane
        out = out_ptr + (planes.to(tl.int64)[None, :] * M + rows[:, None]) * EACH + (ranks % EACH)[None, :]
        inside = and_if((rows < M)[:, None], (ranks < MEMBERS * EACH)[None, :], MEMBERS * EACH < R)
    tl.store(out, (acc * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def expand_kernel(
    planes_ptr,
    b_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    add_ptr,
    out_ptr,
    s_ptr,
    scale_ptr,
    expert_ptr,
    seed_ptr,
    M,
    N,
    r,
    scale,
    expert,
    threshold,
    n_blocks,
    stride_be,
    stride_bn,
    stride_br,
    stride_dm,
    stride_dn,
    DROPOUT: tl.constexpr,
    RAGGED: tl.constexpr,
    PREC: tl.constexpr,
    PLANES: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [M, N] = drop(scale * v . (B (u . S))) + bias + add, and where s_ptr is given S [M, R], of its planes.

    With S := dSu and B := A^T it is also dx, which is dropped like x was; only there is DROPOUT set, and only there are
    members, whose parts are dropped one by one. out may be add.
    """
    # Neighbouring programs write neighbouring columns; each takes n_blocks blocks of them.
    groups = tl.cdiv(N, n_blocks * BLOCK_N)
    group = tl.program_id(0) % groups
    rows = tl.program_id(0) // groups * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_rows = rows.to(tl.int64)
    DTYPE: tl.constexpr = b_ptr.dtype.element_ty
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    if s_ptr is not None:
        for j in range(0, R, BLOCK_R):
            ranks = j + tl.arange(0, BLOCK_R)
            saved = load_planes(planes_ptr, None, rows, ranks, M, r, DTYPE, PLANES, R, EACH, MEMBERS)
            s_tile = s_ptr + wide_rows[:, None] * R + ranks[None, :]
            tl.store(s_tile, saved, mask=((rows < M) & (group == 0))[:, None])
    if R == BLOCK_R:
        s = load_planes(planes_ptr, u_ptr, rows, tl.arange(0, R), M, r, DTYPE, PLANES, R, EACH, MEMBERS)
    factor = control(scale_ptr, scale, tl.float32)
    b_expert = b_ptr + control(expert_ptr, expert, tl.int64) * stride_be
    n_begin = group * n_blocks * BLOCK_N
    for n in range(n_begin, tl.minimum(n_begin + n_blocks * BLOCK_N, N), BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        wide_cols = cols.to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # A block of ranks at a time keeps the operands of a large rank out of the register budget.
        for j in range(0, MEMBERS * EACH, BLOCK_R):
            ranks = j + tl.arange(0, BLOCK_R)
            if R != BLOCK_R:
                s = load_planes(planes_ptr, u_ptr, rows, ranks, M, r, DTYPE, PLANES, R, EACH, MEMBERS)
            b_mask = and_if(there(ranks, r, R, EACH, MEMBERS)[:, None], (cols < N)[None, :], RAGGED)
            b_tile = b_expert + wide_cols[None, :] * stride_bn
            b_tile += row_of(ranks, r, R, EACH).to(tl.int64)[:, None] * stride_br
            b = tl.load(b_tile, mask=b_mask, other=0.0)
            if DROPOUT and EACH != R:
                part = dot_to(s, b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), OUT, PREC)
                seed = seed_of(seed_ptr, j // BLOCK_R, R, EACH, BLOCK_R)
                acc += tl.where(keep_mask(seed, rows, n, threshold, BLOCK_M, BLOCK_N), part, 0.0)
            else:
                acc = dot_to(s, b, acc, OUT, PREC)
        acc *= factor
        if v_ptr is not None:
            acc *= tl.load(v_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        if DROPOUT and EACH != R:
            acc *= keep_scale(threshold)
        elif DROPOUT:
            keep = keep_mask(seed_ptr, rows, n, threshold, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc * keep_scale(threshold), 0.0)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        inside = and_if((rows < M)[:, None], (cols < N)[None, :], RAGGED)
        if add_ptr is not None:
            add = add_ptr + wide_rows[:, None] * stride_dm + wide_cols[None, :] * stride_dn
            acc += tl.load(add, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + wide_rows[:, None] * N + cols[None, :], acc.to(OUT), mask=inside)


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
    RAGGED: tl.constexpr,
    PREC: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y [M, N] and S [M, R] in one pass: every column of tiles accumulates S beside x W^T and never reloads it.

    RAGGED is said of K.
    """
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
    ranks = tl.arange(0, R)
    wide_rows = rows.to(tl.int64)
    wide_cols = cols.to(tl.int64)
    wide_ranks = ranks.to(tl.int64)
    live = ranks < tl.minimum(control(rank_ptr, rank, tl.int32), r)
    x_rows = x_ptr + wide_rows[:, None] * stride_xm
    w_cols = w_ptr + wide_cols[None, :] * stride_wn
    a_ranks = a_ptr + control(expert_a_ptr, expert_a, tl.int64) * stride_ae + wide_ranks[None, :] * stride_ar
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, R], tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        wide = inner.to(tl.int64)
        x_mask = and_if((rows < M)[:, None], (inner < K)[None, :], RAGGED)
        x = tl.load(x_rows + wide[None, :] * stride_xk, mask=x_mask, other=0.0)
        w_mask = and_if((cols < N)[None, :], (inner < K)[:, None], RAGGED)
        w = tl.load(w_cols + wide[:, None] * stride_wk, mask=w_mask, other=0.0)
        a_mask = and_if(live[None, :], (inner < K)[:, None], RAGGED)
        a = tl.load(a_ranks + wide[:, None] * stride_ak, mask=a_mask, other=0.0)
        acc = dot(x, w, acc, PREC)
        s = dot(x, a, s, PREC)
    s = tl.where(live[None, :], s, 0.0)
    if pid_n == 0:
        saved = s_ptr + wide_rows[:, None] * R + ranks[None, :]
        tl.store(saved, s.to(s_ptr.dtype.element_ty), mask=(rows < M)[:, None])
    if u_ptr is not None:
        s *= tl.load(u_ptr + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
    b_cols = b_ptr + control(expert_b_ptr, expert_b, tl.int64) * stride_be + wide_cols[None, :] * stride_bn
    b = tl.load(b_cols + wide_ranks[:, None] * stride_br, mask=(ranks < r)[:, None] & (cols < N)[None, :], other=0.0)
    delta = dot_to(s.to(b.dtype), b, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), y_ptr.dtype.element_ty, PREC)
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
    RAGGED: tl.constexpr,
    PREC: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One pass over dY: dsu [planes, M, R] = scale * dY (v . B) and, where their pointers are given, per block of the
    rows partials [row blocks, N, R] = dY^T S and sums [row blocks, N] = column sums of dY.

    dSu needs all of N and dB all of M. A program owns BLOCK_M rows and walks the columns of its plane, so dSu stays in
    registers and only dB leaves in partial sums; u, scale and v reach dB in the reduction, in fp32.
    """
    row_block = tl.program_id(0)
    plane = tl.program_id(1)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, R)
    wide_rows = rows.to(tl.int64)
    live = ranks < tl.minimum(control(rank_ptr, rank, tl.int32), r)
    y_rows = dy_ptr + wide_rows[:, None] * stride_ym
    b_ranks = b_ptr + control(expert_ptr, expert, tl.int64) * stride_be + ranks.to(tl.int64)[None, :] * stride_br
    if partials_ptr is not None:
        s = tl.load(s_ptr + wide_rows[:, None] * R + ranks[None, :], mask=(rows < M)[:, None], other=0.0)
    n_begin = plane * n_blocks * BLOCK_N
    n_end = tl.minimum(n_begin + n_blocks * BLOCK_N, N)
    dsu = tl.zeros([BLOCK_M, R], tl.float32)
    for n in range(n_begin, n_end, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        wide_cols = cols.to(tl.int64)
        dy_mask = and_if((rows < M)[:, None], (cols < N)[None, :], RAGGED)
        dy = tl.load(y_rows + wide_cols[None, :] * stride_yn, mask=dy_mask, other=0.0)
        b_mask = and_if(live[None, :], (cols < N)[:, None], RAGGED)
        b = tl.load(b_ranks + wide_cols[:, None] * stride_bn, mask=b_mask, other=0.0)
        if v_ptr is not None:
            b = scaled(b, tl.load(v_ptr + cols, mask=cols < N, other=0.0)[:, None])
        dsu = dot(dy, b, dsu, PREC)
        if partials_ptr is not None:
            db = dot(tl.trans(dy), s, tl.zeros([BLOCK_N, R], tl.float32), PREC)
            partial = partials_ptr + (row_block.to(tl.int64) * N + wide_cols)[:, None] * R + ranks[None, :]
            if RAGGED:
                tl.store(partial, db, mask=(cols < N)[:, None])
            else:
                tl.store(partial, db)
        if sums_ptr is not None:
            tl.store(sums_ptr + row_block.to(tl.int64) * N + cols, tl.sum(dy.to(tl.float32), 0), mask=cols < N)
    dsu = tl.where(live[None, :], dsu, 0.0) * control(scale_ptr, scale, tl.float32)
    out = dsu_ptr + (plane * M.to(tl.int64) + rows)[:, None] * R + ranks[None, :]
    tl.store(out, dsu.to(dsu_ptr.dtype.element_ty), mask=(rows < M)[:, None])


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
    RAGGED: tl.constexpr,
    PREC: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One pass over x: dx [M, K] = drop^T((u . dSu) A) and partials [row splits, K, R] = drop(x)^T dSu per split of the
    rows, with dSu as DTYPE.

    Optional by-products: dots [row splits, R] = column sums of dSu . S (for du), sums [row splits, K] = column sums of
    x.
    dB is the same product with x := dY and dSu := S. u and the keep scale reach dA in the reduction, in fp32. dx needs
    every rank in one block; a larger rank takes it from expand_kernel, which need not read x. Of members there are
    partials alone.
    """
    tl.static_assert(EACH == R or not NEED_DX)
    col_block = block_of_x(R, EACH, MEMBERS, BLOCK_R)
    cols = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
    row_split = tl.program_id(1)
    rank_block = block_of_ranks(R, EACH, MEMBERS, BLOCK_R)
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    wide_cols = cols.to(tl.int64)
    if NEED_DX:
        a_ranks = a_ptr + control(expert_ptr, expert, tl.int64) * stride_ae + ranks.to(tl.int64)[:, None] * stride_ar
        a_mask = and_if((ranks < r)[:, None], (cols < K)[None, :], RAGGED)
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
        inside = and_if((rows < M)[:, None], (cols < K)[None, :], RAGGED)
        dsu = load_planes(dsu_ptr, None, rows, ranks, M, r, DTYPE, PLANES, R, EACH, MEMBERS)
        if DROPOUT:
            seed = seed_of(seed_ptr, rank_block, R, EACH, BLOCK_R)
            keep = keep_mask(seed, rows, col_block * BLOCK_K, threshold, BLOCK_M, BLOCK_K)
        if NEED_DA:
            x = tl.load(x_ptr + wide_rows[:, None] * stride_xm + wide_cols[None, :] * stride_xk, mask=inside, other=0.0)
            if sums_ptr is not None:
                sums += tl.sum(x.to(tl.float32), 0)
            if DROPOUT:
                x = tl.where(keep, x, 0.0)
            da = dot(tl.trans(x), dsu, da, PREC)
        if NEED_DX:
            OUT: tl.constexpr = dx_ptr.dtype.element_ty
            dx = dot_to(dsu, a, tl.zeros([BLOCK_M, BLOCK_K], tl.float32), OUT, PREC)
            if DROPOUT:
                dx = tl.where(keep, dx * keep_scale(threshold), 0.0)
            tl.store(dx_ptr + wide_rows[:, None] * K + cols[None, :], dx.to(OUT), mask=inside)
        if dots_ptr is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:
                saved = s_ptr + wide_rows[:, None] * R + ranks[None, :]
                s = tl.load(saved, mask=(rows < M)[:, None], other=0.0)
                dots += tl.sum(dsu.to(tl.float32) * s.to(tl.float32), 0)
    if NEED_DA:
        partial = partials_ptr + (row_split.to(tl.int64) * K + wide_cols)[:, None] * R + ranks[None, :]
        if RAGGED:
            tl.store(partial, da, mask=(cols < K)[:, None])
        else:
            tl.store(partial, da)
    if sums_ptr is not None:
        tl.store(sums_ptr + row_split.to(tl.int64) * K + cols, sums, mask=cols < K)
    if dots_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(dots_ptr + row_split * R + ranks, dots)


@triton.jit
def summed(ptr, count, columns, rows, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """[BLOCK_X, R], for rows of it, of the sum of partials [count, columns, R] over the first axis. BLOCK_P of them are
    in flight at a time: one after the other, the sum would wait for memory at each."""
    total = tl.zeros([BLOCK_X, R], tl.float32)
    for p in range(0, count, BLOCK_P):
        partial = p + tl.arange(0, BLOCK_P)
        offsets = (partial.to(tl.int64)[:, None] * columns + rows.to(tl.int64)[None, :]) * R
        mask = ((partial < count)[:, None] & (rows < columns)[None, :])[:, :, None]
        total += tl.sum(tl.load(ptr + offsets[:, :, None] + tl.arange(0, R)[None, None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def reduce_kernel(
    b_partials_ptr,
    sums_ptr,
    b_ptr,
    v_ptr,
    db_ptr,
    dv_ptr,
    dbias_ptr,
    a_partials_ptr,
    dots_ptr,
    u_ptr,
    da_ptr,
    du_ptr,
    scale_ptr,
    rank_ptr,
    expert_a_ptr,
    expert_b_ptr,
    b_partials,
    a_partials,
    N,
    K,
    r,
    scale,
    rank,
    expert_a,
    expert_b,
    threshold,
    stride_be,
    stride_bn,
    stride_br,
    stride_dbe,
    stride_dbn,
    stride_dbr,
    stride_dae,
    stride_dar,
    stride_dak,
    OF_B: tl.constexpr,
    FROZEN: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Every sum over the rows of a backward, at its end. OF_B: whether
    there are those of dY; after them come those of x.

    Of partials [b_partials, N, R], with t[n, j] = scale * u[j] * their sum: dB[expert, n, j] = v[n] t[n, j], zero but
    for column rank - 1 when FROZEN; dv[n] = sum_j B[expert, n, j] t[n, j]; dbias[n] = the sum of sums [b_partials, N].
    Of partials [a_partials, K, R]: dA[expert, j, k] = keep_scale * u[j] * their sum, with FROZEN as above; du[j] = the
    sum of dots [a_partials, R]. Every output is optional. Of members there is dA [MEMBERS r, K] alone.
    """
    pid = tl.program_id(0)
    ranks = tl.arange(0, R)
    chosen = ranks == control(rank_ptr, rank, tl.int32) - 1
    blocks = tl.cdiv(N, BLOCK_X) if OF_B else 0
    if pid < blocks:
        rows = pid * BLOCK_X + tl.arange(0, BLOCK_X)
        wide_rows = rows.to(tl.int64)
        inside = (rows < N)[:, None] & (ranks < r)[None, :]
        expert = control(expert_b_ptr, expert_b, tl.int64)
        if b_partials_ptr is not None:
            total = summed(b_partials_ptr, b_partials, N, rows, R, BLOCK_P, BLOCK_X)
            total *= control(scale_ptr, scale, tl.float32)
            if u_ptr is not None:
                total *= tl.load(u_ptr + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
            if dv_ptr is not None:
                b_rows = b_ptr + expert * stride_be + wide_rows[:, None] * stride_bn
                b = tl.load(b_rows + ranks.to(tl.int64)[None, :] * stride_br, mask=inside, other=0.0)
                dv = tl.sum(total * b.to(tl.float32), 1)
                tl.store(dv_ptr + rows, dv.to(dv_ptr.dtype.element_ty), mask=rows < N)
            if db_ptr is not None:
                if v_ptr is not None:
                    total *= tl.load(v_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
                if FROZEN:
                    total = tl.where(chosen[None, :], total, 0.0)
                db = db_ptr + expert * stride_dbe + wide_rows[:, None] * stride_dbn
                db += ranks.to(tl.int64)[None, :] * stride_dbr
                tl.store(db, total.to(db_ptr.dtype.element_ty), mask=inside)
        if sums_ptr is not None:
            dbias = tl.zeros([BLOCK_X], tl.float32)
            for p in range(0, b_partials, BLOCK_P):
                partial = p + tl.arange(0, BLOCK_P)
                mask = (partial < b_partials)[:, None] & (rows < N)[None, :]
                offsets = partial.to(tl.int64)[:, None] * N + rows[None, :]
                dbias += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), 0)
            tl.store(dbias_ptr + rows, dbias.to(dbias_ptr.dtype.element_ty), mask=rows < N)
    else:
        rows = (pid - blocks) * BLOCK_X + tl.arange(0, BLOCK_X)
        if a_partials_ptr is not None:
            total = summed(a_partials_ptr, a_partials, K, rows, R, BLOCK_P, BLOCK_X) * keep_scale(threshold)
            if u_ptr is not None:
                total *= tl.load(u_ptr + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
            if FROZEN:
                total = tl.where(chosen[None, :], total, 0.0)
            da = da_ptr + control(expert_a_ptr, expert_a, tl.int64) * stride_dae
            da_rows = row_of(ranks, r, R, EACH).to(tl.int64)
            da += da_rows[None, :] * stride_dar + rows.to(tl.int64)[:, None] * stride_dak
            live = there(ranks, r, R, EACH, MEMBERS)
            tl.store(da, total.to(da_ptr.dtype.element_ty), mask=(rows < K)[:, None] & live[None, :])
        if dots_ptr is not None:  # noqa: SIM102
            if pid == blocks:
                du = tl.zeros([R], tl.float32)
                for p in range(0, a_partials, BLOCK_P):
                    partial = p + tl.arange(0, BLOCK_P)
                    offsets = partial[:, None] * R + ranks[None, :]
                    du += tl.sum(tl.load(dots_ptr + offsets, mask=(partial < a_partials)[:, None], other=0.0), 0)
                tl.store(du_ptr + ranks, du.to(du_ptr.dtype.element_ty), mask=ranks < r)
