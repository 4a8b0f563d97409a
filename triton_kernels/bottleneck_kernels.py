"""Device code of the bottleneck adapter  y = residual + scale * (act(h D[i]^T + b[i]) U[j]^T + c[j]).

Both directions are the same two products: h through D to the units z and act(z) through U, dy through U^T to
dz = scale * (dy U) * act'(z) and dz through D. Rows come in equal groups with an expert each, and a block of rows never
straddles two groups. Controls, None pointers, wide offsets and the order of sums are as in lowrank_kernels.py.
"""

import triton
import triton.language as tl

from .lowrank_kernels import UNALIGNED, control, dot

# These change from call to call; specialising on 1 or on divisibility would compile again.
VOLATILE = ["scale", "expert_in", "expert_out", "stride_gi", "stride_go", "stride_g", "down_expert", "up_expert"]
VOLATILE += ["group_rows", "row_blocks", "n_blocks", "blocks", "row_split_blocks"]
VOLATILE += ["down_row_splits", "up_row_splits", "down_slots", "up_slots"]
UNALIGNED = [*UNALIGNED, "expert_in_ptr", "expert_out_ptr", "down_expert_ptr", "up_expert_ptr"]

SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBE = tl.constexpr(0.044715)


@triton.jit
def tanh(z):
    """From exp alone, which cancels near 0: there a series, to the precision of fp32."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    s = z * z
    near = z * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(s < 0.0625, near, tl.where(z < 0, -far, far))


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """act(z) in fp32."""
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + tanh((z + z * z * z * CUBE) * SQRT_2_OVER_PI))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # keeps a NaN, like torch
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "tanh":
        return tanh(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """act'(z) in fp32; 0 at the kink of relu."""
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * SQRT_2_OVER_PI * 0.5
        return 0.5 * (1.0 + tl.math.erf(z * SQRT_HALF)) + z * density
    elif ACTIVATION == "gelu_tanh":
        t = tanh((z + z * z * z * CUBE) * SQRT_2_OVER_PI)
        inner = (1.0 + z * z * CUBE * 3.0) * SQRT_2_OVER_PI
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(z)
        return 1.0 - t * t
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def group_expert(ptr, value, group, stride):
    """Index of the expert of a group; of the only one for a stride of 0."""
    if ptr is None:
        return tl.cast(value, tl.int64)
    else:
        return tl.load(ptr + tl.cast(group, tl.int64) * stride).to(tl.int64)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def rows_kernel(
    x_ptr,
    w_in_ptr,
    b_in_ptr,
    w_out_ptr,
    b_out_ptr,
    add_ptr,
    z_ptr,
    s_ptr,
    a_ptr,
    y_ptr,
    scale_ptr,
    expert_in_ptr,
    expert_out_ptr,
    group_rows,
    row_blocks,
    K,
    N,
    r,
    scale,
    expert_in,
    expert_out,
    n_blocks,
    stride_gi,
    stride_go,
    stride_xm,
    stride_xk,
    stride_ie,
    stride_ir,
    stride_ik,
    stride_be,
    stride_oe,
    stride_on,
    stride_or,
    stride_ce,
    stride_dm,
    stride_dn,
    BACKWARD: tl.constexpr,
    SHRINK: tl.constexpr,
    EXPAND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """SHRINK finds s [M, r] from x [M, K], EXPAND then y [M, N] from s; one launch with both holds all of r in a block.

    Forward:  z = x Win^T + b_in, stored; s = act(z);            y = add + scale * (s Wout^T + b_out)
    Backward: s = scale * (x Win^T) * act'(z), z read;           y = add + s Wout^T;      a = act(z), stored
    s is stored where it has a pointer, and read from there without SHRINK. Without x only a is of interest; without z
    the activation is the identity.
    """
    group = tl.program_id(0) // row_blocks
    local = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    alive = (local < group_rows)[:, None]
    rows = tl.cast(group, tl.int64) * group_rows + local
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    factor = control(scale_ptr, scale, tl.float32)
    if SHRINK:
        in_expert = group_expert(expert_in_ptr, expert_in, group, stride_gi)
        units = rows[:, None] * r + ranks[None, :]
        inside = alive & (ranks < r)[None, :]
        # Programs that share these rows all find the same; one of them writes it.
        owned = inside & (tl.program_id(1) == 0)
        s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if x_ptr is not None:
            x_rows = x_ptr + rows[:, None] * stride_xm
            w_ranks = w_in_ptr + in_expert * stride_ie + ranks.to(tl.int64)[None, :] * stride_ir
            for k in range(0, K, BLOCK_K):
                cols = k + tl.arange(0, BLOCK_K)
                wide = cols.to(tl.int64)
                x = tl.load(x_rows + wide[None, :] * stride_xk, mask=alive & (cols < K)[None, :], other=0.0)
                w_mask = (cols < K)[:, None] & (ranks < r)[None, :]
                w = tl.load(w_ranks + wide[:, None] * stride_ik, mask=w_mask, other=0.0)
                s = dot(x, w, s, PREC)
        if BACKWARD:
            s *= factor
            if z_ptr is not None:
                z = tl.load(z_ptr + units, mask=inside, other=0.0).to(tl.float32)
                s *= slope(z, ACTIVATION)
                if a_ptr is not None:
                    tl.store(a_ptr + units, activated(z, ACTIVATION).to(a_ptr.dtype.element_ty), mask=owned)
        else:
            if b_in_ptr is not None:
                b = tl.load(b_in_ptr + in_expert * stride_be + ranks, mask=ranks < r, other=0.0)
                s += b.to(tl.float32)[None, :]
            tl.store(z_ptr + units, s.to(z_ptr.dtype.element_ty), mask=owned)
            s = activated(s, ACTIVATION)
        if s_ptr is not None:
            tl.store(s_ptr + units, s.to(s_ptr.dtype.element_ty), mask=owned)
    if EXPAND:
        out_expert = group_expert(expert_out_ptr, expert_out, group, stride_go)
        w_base = w_out_ptr + out_expert * stride_oe
        if SHRINK:
            s = s.to(w_out_ptr.dtype.element_ty)
        n_begin = tl.program_id(1) * n_blocks * BLOCK_N
        n_end = tl.minimum(n_begin + n_blocks * BLOCK_N, N)
        for n in range(n_begin, n_end, BLOCK_N):
            cols = n + tl.arange(0, BLOCK_N)
            wide = cols.to(tl.int64)
            w_cols = w_base + wide[None, :] * stride_on
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if SHRINK:
                w_mask = (ranks < r)[:, None] & (cols < N)[None, :]
                w = tl.load(w_cols + ranks.to(tl.int64)[:, None] * stride_or, mask=w_mask, other=0.0)
                acc = dot(s, w, acc, PREC)
            else:
                for j in range(0, r, BLOCK_R):
                    inner = j + tl.arange(0, BLOCK_R)
                    s_mask = alive & (inner < r)[None, :]
                    s_block = tl.load(s_ptr + rows[:, None] * r + inner[None, :], mask=s_mask, other=0.0)
                    w_mask = (inner < r)[:, None] & (cols < N)[None, :]
                    w = tl.load(w_cols + inner.to(tl.int64)[:, None] * stride_or, mask=w_mask, other=0.0)
                    acc = dot(s_block, w, acc, PREC)
            if b_out_ptr is not None:
                c = tl.load(b_out_ptr + out_expert * stride_ce + cols, mask=cols < N, other=0.0)
                acc += c.to(tl.float32)[None, :]
            if not BACKWARD:
                acc *= factor
            shown = alive & (cols < N)[None, :]
            if add_ptr is not None:
                add = add_ptr + rows[:, None] * stride_dm + wide[None, :] * stride_dn
                acc += tl.load(add, mask=shown, other=0.0).to(tl.float32)
            tl.store(y_ptr + rows[:, None] * N + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def grad_kernel(
    x_ptr,
    s_ptr,
    partials_ptr,
    sums_ptr,
    unit_sums_ptr,
    expert_ptr,
    group_rows,
    row_blocks,
    blocks,
    row_split_blocks,
    X,
    r,
    stride_g,
    stride_xm,
    stride_xk,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Per split of the rows and, with an expert pointer, per expert (otherwise all rows are of one):
    partials [experts, row_splits, X, r] = x^T s;  sums [experts, row_splits, X] = column sums of x;  unit_sums
    [experts, row_splits, r] = column sums of s. Every output is optional, and so is an operand that none needs.

    A program passes over the groups of other experts without reading their rows, so the partials are as many for a
    group per row as for a few.
    """
    cols = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    row_split = tl.program_id(1)
    rank_blocks = tl.cdiv(r, BLOCK_R)
    slot = tl.program_id(2) // rank_blocks
    rank_block = tl.program_id(2) % rank_blocks
    ranks = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    wide_cols = cols.to(tl.int64)
    acc = tl.zeros([BLOCK_X, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_X], tl.float32)
    unit_sums = tl.zeros([BLOCK_R], tl.float32)
    first = row_split * row_split_blocks
    last = tl.minimum(first + row_split_blocks, blocks)
    for group in range(first // row_blocks, tl.cdiv(last, row_blocks)):
        begin = tl.maximum(first, group * row_blocks)
        end = tl.minimum(last, (group + 1) * row_blocks)
        if expert_ptr is not None:
            expert = tl.load(expert_ptr + tl.cast(group, tl.int64) * stride_g)
            end = tl.where(expert == slot, end, begin)
        for block in range(begin, end):
            local = (block - group * row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            alive = (local < group_rows)[:, None]
            rows = tl.cast(group, tl.int64) * group_rows + local
            if x_ptr is not None:
                x_cols = rows[:, None] * stride_xm + wide_cols[None, :] * stride_xk
                x = tl.load(x_ptr + x_cols, mask=alive & (cols < X)[None, :], other=0.0)
            if s_ptr is not None:
                s_mask = alive & (ranks < r)[None, :]
                s = tl.load(s_ptr + rows[:, None] * r + ranks[None, :], mask=s_mask, other=0.0)
            if partials_ptr is not None:
                acc = dot(tl.trans(x), s, acc, PREC)
            if sums_ptr is not None:
                sums += tl.sum(x.to(tl.float32), 0)
            if unit_sums_ptr is not None:
                unit_sums += tl.sum(s.to(tl.float32), 0)
    partial = slot.to(tl.int64) * tl.num_programs(1) + row_split
    if partials_ptr is not None:
        out = partials_ptr + (partial * X + wide_cols)[:, None] * r + ranks[None, :]
        tl.store(out, acc, mask=(cols < X)[:, None] & (ranks < r)[None, :])
    if sums_ptr is not None:
        tl.store(sums_ptr + partial * X + cols, sums, mask=(cols < X) & (rank_block == 0))
    if unit_sums_ptr is not None:
        tl.store(unit_sums_ptr + partial * r + ranks, unit_sums, mask=(ranks < r) & (tl.program_id(0) == 0))


@triton.jit
def reduce_side(
    program,
    partials_ptr,
    sums_ptr,
    unit_sums_ptr,
    out_ptr,
    bias_ptr,
    unit_bias_ptr,
    expert_ptr,
    expert,
    slots,
    row_splits,
    X,
    r,
    factor,
    stride_oe,
    stride_ox,
    stride_or,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For each expert, out [experts, X, r], bias [experts, X] and unit_bias [experts, r] are factor * the sum over the
    splits of partials, sums and unit_sums. Every output is optional.

    With one slot its sums are those of `expert` and all others get zeros.
    """
    x_blocks = tl.cdiv(X, BLOCK_X)
    slot = program // x_blocks
    cols = program % x_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    ranks = tl.arange(0, BLOCK_R)
    wide_cols = cols.to(tl.int64)
    mine = (slots > 1) | (control(expert_ptr, expert, tl.int64) == slot)
    first = tl.where(slots > 1, slot, 0).to(tl.int64) * row_splits
    count = tl.where(mine, row_splits, 0)
    # BLOCK_P splits are in flight at a time: one after the other, the sum would wait for memory at each.
    if partials_ptr is not None:
        inside = (cols < X)[:, None] & (ranks < r)[None, :]
        total = tl.zeros([BLOCK_X, BLOCK_R], tl.float32)
        for p in range(0, count, BLOCK_P):
            row_split = p + tl.arange(0, BLOCK_P)
            offsets = ((first + row_split)[:, None] * X + wide_cols[None, :])[:, :, None] * r + ranks[None, None, :]
            mask = (row_split < count)[:, None, None] & inside[None, :, :]
            total += tl.sum(tl.load(partials_ptr + offsets, mask=mask, other=0.0), 0)
        out = out_ptr + slot.to(tl.int64) * stride_oe + wide_cols[:, None] * stride_ox
        out += ranks.to(tl.int64)[None, :] * stride_or
        tl.store(out, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        bias = tl.zeros([BLOCK_X], tl.float32)
        for p in range(0, count, BLOCK_P):
            row_split = p + tl.arange(0, BLOCK_P)
            mask = (row_split < count)[:, None] & (cols < X)[None, :]
            bias += tl.sum(
                tl.load(sums_ptr + (first + row_split)[:, None] * X + cols[None, :], mask=mask, other=0.0), 0
            )
        to = bias_ptr + slot.to(tl.int64) * X + cols
        tl.store(to, (bias * factor).to(bias_ptr.dtype.element_ty), mask=cols < X)
    if unit_sums_ptr is not None:
        unit_bias = tl.zeros([BLOCK_R], tl.float32)
        for p in range(0, count, BLOCK_P):
            row_split = p + tl.arange(0, BLOCK_P)
            mask = (row_split < count)[:, None] & (ranks < r)[None, :]
            loaded = tl.load(unit_sums_ptr + (first + row_split)[:, None] * r + ranks[None, :], mask=mask, other=0.0)
            unit_bias += tl.sum(loaded, 0)
        to = unit_bias_ptr + slot.to(tl.int64) * r + ranks
        written = (ranks < r) & (program % x_blocks == 0)
        tl.store(to, (unit_bias * factor).to(unit_bias_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def reduce_kernel(
    down_partials_ptr,
    unit_sums_ptr,
    down_ptr,
    unit_bias_ptr,
    down_expert_ptr,
    up_partials_ptr,
    sums_ptr,
    up_ptr,
    bias_ptr,
    up_expert_ptr,
    scale_ptr,
    down_programs,
    r,
    scale,
    down_expert,
    down_slots,
    down_row_splits,
    K,
    stride_de,
    stride_dk,
    stride_dr,
    up_expert,
    up_slots,
    up_row_splits,
    N,
    stride_ue,
    stride_un,
    stride_ur,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Second stage of both factors: the first programs sum what grad_kernel has left of down [experts, K, r] and its
    bias [experts, r], the others that of up [experts, N, r] and its bias [experts, N], times the scale. A program per
    BLOCK_X columns of an expert."""
    program = tl.program_id(0)
    if program < down_programs:
        reduce_side(
            program, down_partials_ptr, None, unit_sums_ptr, down_ptr, None, unit_bias_ptr, down_expert_ptr,
            down_expert, down_slots, down_row_splits, K, r, 1.0, stride_de, stride_dk, stride_dr,
            BLOCK_P, BLOCK_X, BLOCK_R,
        )  # fmt: skip
    else:
        reduce_side(
            tl.maximum(program - down_programs, 0), up_partials_ptr, sums_ptr, None, up_ptr, bias_ptr, None,
            up_expert_ptr, up_expert, up_slots, up_row_splits, N, r, control(scale_ptr, scale, tl.float32),
            stride_ue, stride_un, stride_ur, BLOCK_P, BLOCK_X, BLOCK_R,
        )  # fmt: skip
