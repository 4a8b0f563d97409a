"""Device code of the Kronecker adapter  y = add + scale * flatten(B X A^T).

Row m of x, viewed row-major, is X_m [B2, A2] and its output Y_m [B1, A1]. The products of a block of rows are never
batched: with elements ordered (j, m, i), where j counts rows of the X_m and i columns, X A^T is [(j m), i] times A^T,
and B (X A^T) is B times [j, (m i)]: an operand is the result before it reshaped, not transposed. The sums over rows, dA
and dB, are single products too.

The sizes of the factors are constants of a layer and compiled in, padded to the BLOCK sizes by zeros. Controls, None
pointers, wide offsets and the order of sums are as in lowrank_kernels.py.
"""

import triton
import triton.language as tl

from .lowrank_kernels import UNALIGNED, VOLATILE, control, dot, keep_scale

VOLATILE = [*VOLATILE, "a_count", "b_count"]


@triton.jit
def factor_tile(ptr, i, j, stride_i, stride_j, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Elements (i, j) of a factor [ROWS, COLS] for a column i and a row j of indices, zero outside."""
    return tl.load(ptr + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, mask=(i < ROWS) & (j < COLS), other=0.0)


@triton.jit
def elements(m, j, i, M, stride_m, stride_k, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask) of the elements (j, i) of matrix m, where a row of [M, ROWS COLS] is a matrix [ROWS, COLS]."""
    return m.to(tl.int64) * stride_m + (j * COLS + i).to(tl.int64) * stride_k, (m < M) & (j < ROWS) & (i < COLS)


@triton.jit
def keep_elements(seed_ptr, m, j, first, threshold, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout mask [(j m), BLOCK] of the columns from `first`, a multiple of 8, on, in row j of matrix m, where m and j
    are columns of indices. The convention is in dropout.py."""
    seed = tl.load(seed_ptr)
    if COLS % 8 == 0:
        # A row is a whole number of groups of eight: one Philox block each, ordered as in philox.py.
        groups = (j * COLS + first) // 8 + tl.arange(0, BLOCK // 8)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, groups, m, 0, 0, n_rounds=7)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        draws = tl.join(words & 0xFFFF, words >> 16)
        return tl.reshape(draws.to(tl.int32), [m.shape[0], BLOCK]) >= threshold
    else:
        # Rows start anywhere in a group, so every element draws the block of its own group.
        k = j * COLS + first + tl.arange(0, BLOCK)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, k // 8, m, 0, 0, n_rounds=7)
        word = k % 8 // 2
        draws = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
        return (draws >> (k % 2 * 16) & 0xFFFF).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def forward_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    add_ptr,
    y_ptr,
    scale_ptr,
    seed_ptr,
    M,
    scale,
    threshold,
    m_blocks,
    stride_xm,
    stride_xk,
    stride_ai,
    stride_aj,
    stride_bi,
    stride_bj,
    stride_dm,
    stride_dn,
    A1: tl.constexpr,
    A2: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    DROPOUT: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A1: tl.constexpr,
    BLOCK_A2: tl.constexpr,
    BLOCK_B1: tl.constexpr,
    BLOCK_B2: tl.constexpr,
):
    """y [M, B1 A1] = add + scale * drop(flatten(B X A^T)), the mask on x for DROPOUT "input", on the product for
    "output". A program takes m_blocks blocks of rows and BLOCK_A1 columns of every Y_m.

    With x := dY, A := A^T and B := B^T it is also dx, dropped like x was; only there is DROPOUT "output".
    """
    in_rows = tl.arange(0, BLOCK_B2 * BLOCK_M)[:, None]
    in_cols = tl.arange(0, BLOCK_A2)[None, :]
    out_rows = tl.arange(0, BLOCK_B1 * BLOCK_M)[:, None]
    first = tl.program_id(1) * BLOCK_A1
    out_cols = first + tl.arange(0, BLOCK_A1)[None, :]
    a = factor_tile(a_ptr, tl.arange(0, BLOCK_A2)[:, None], out_cols, stride_aj, stride_ai, A2, A1)
    b_rows = tl.arange(0, BLOCK_B1)[:, None]
    b = factor_tile(b_ptr, b_rows, tl.arange(0, BLOCK_B2)[None, :], stride_bi, stride_bj, B1, B2)
    factor = control(scale_ptr, scale, tl.float32)
    if DROPOUT is not None:
        factor *= keep_scale(threshold)
    m_begin = tl.program_id(0) * m_blocks * BLOCK_M
    m_end = tl.minimum(m_begin + m_blocks * BLOCK_M, M)
    for start in range(m_begin, m_end, BLOCK_M):
        m = start + in_rows % BLOCK_M
        j = in_rows // BLOCK_M
        offsets, inside = elements(m, j, in_cols, M, stride_xm, stride_xk, B2, A2)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        if DROPOUT == "input":
            x = tl.where(keep_elements(seed_ptr, m, j, 0, threshold, A2, BLOCK_A2), x, 0.0)
        t = dot(x, a, tl.zeros([BLOCK_B2 * BLOCK_M, BLOCK_A1], tl.float32), PREC).to(b.dtype)
        t = tl.reshape(t, [BLOCK_B2, BLOCK_M * BLOCK_A1])
        y = dot(b, t, tl.zeros([BLOCK_B1, BLOCK_M * BLOCK_A1], tl.float32), PREC)
        y = tl.reshape(y, [BLOCK_B1 * BLOCK_M, BLOCK_A1]) * factor
        m = start + out_rows % BLOCK_M
        j = out_rows // BLOCK_M
        if DROPOUT == "output":
            y = tl.where(keep_elements(seed_ptr, m, j, first, threshold, A1, BLOCK_A1), y, 0.0)
        if add_ptr is not None:
            offsets, inside = elements(m, j, out_cols, M, stride_dm, stride_dn, B1, A1)
            y += tl.load(add_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        offsets, inside = elements(m, j, out_cols, M, B1 * A1, 1, B1, A1)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    dy_ptr,
    x_ptr,
    a_ptr,
    b_ptr,
    dx_ptr,
    a_partials_ptr,
    b_partials_ptr,
    scale_ptr,
    seed_ptr,
    M,
    scale,
    threshold,
    m_blocks,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_ai,
    stride_aj,
    stride_bi,
    stride_bj,
    A1: tl.constexpr,
    A2: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DA: tl.constexpr,
    NEED_DB: tl.constexpr,
    DROPOUT: tl.constexpr,
    PREC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A1: tl.constexpr,
    BLOCK_A2: tl.constexpr,
    BLOCK_B1: tl.constexpr,
    BLOCK_B2: tl.constexpr,
):
    """Of dY and x, per row with G = dY, E = B^T G and H = drop(X) A^T: dx = drop^T(scale * E A), and sums over the rows
    of a program, a_partials [programs(0), A1, A2] of E^T drop(X) and b_partials [programs(0) programs(1), B1, B2] of
    G H^T.

    A program takes m_blocks blocks of rows and BLOCK_A1 columns of every G; dx needs all of them. The partials lack the
    scale, which reaches dA and dB in the reduction, in fp32.
    """
    rows = tl.arange(0, BLOCK_B2 * BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_A2)[None, :]
    # Columns (m i) of G; the quotient and the remainder of one range let the compiler see what is contiguous.
    wide = tl.arange(0, BLOCK_M * BLOCK_A1)[None, :]
    first = tl.program_id(1) * BLOCK_A1
    a_row = first + tl.arange(0, BLOCK_A1)
    b_row = tl.arange(0, BLOCK_B1)[:, None]
    b_col = tl.arange(0, BLOCK_B2)[None, :]
    if NEED_DX or NEED_DA:
        b = factor_tile(b_ptr, b_row, b_col, stride_bi, stride_bj, B1, B2)
    if NEED_DX:
        a = factor_tile(a_ptr, a_row[:, None], cols, stride_ai, stride_aj, A1, A2)
        factor = control(scale_ptr, scale, tl.float32)
        if DROPOUT:
            factor *= keep_scale(threshold)
    if NEED_DA:
        da = tl.zeros([BLOCK_A2, BLOCK_A1], tl.float32)
    if NEED_DB:
        a_t = factor_tile(a_ptr, tl.arange(0, BLOCK_A2)[:, None], a_row[None, :], stride_aj, stride_ai, A2, A1)
        db = tl.zeros([BLOCK_B1, BLOCK_B2], tl.float32)
    m_begin = tl.program_id(0) * m_blocks * BLOCK_M
    m_end = tl.minimum(m_begin + m_blocks * BLOCK_M, M)
    for start in range(m_begin, m_end, BLOCK_M):
        m = start + wide // BLOCK_A1
        offsets, inside = elements(m, b_row, first + wide % BLOCK_A1, M, stride_ym, stride_yn, B1, A1)
        g = tl.load(dy_ptr + offsets, mask=inside, other=0.0)
        m = start + rows % BLOCK_M
        j = rows // BLOCK_M
        if DROPOUT:
            keep = keep_elements(seed_ptr, m, j, 0, threshold, A2, BLOCK_A2)
        offsets, inside = elements(m, j, cols, M, stride_xm, stride_xk, B2, A2)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        if DROPOUT:
            x = tl.where(keep, x, 0.0)
        if NEED_DX or NEED_DA:
            # Transposed, because `dot` takes its activation from the left.
            e = dot(tl.trans(g), b, tl.zeros([BLOCK_M * BLOCK_A1, BLOCK_B2], tl.float32), PREC)
            e = tl.reshape(tl.trans(e.to(b.dtype)), [BLOCK_B2 * BLOCK_M, BLOCK_A1])
        if NEED_DX:
            dx = dot(e, a, tl.zeros([BLOCK_B2 * BLOCK_M, BLOCK_A2], tl.float32), PREC) * factor
            if DROPOUT:
                dx = tl.where(keep, dx, 0.0)
            offsets, inside = elements(m, j, cols, M, B2 * A2, 1, B2, A2)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_DA:
            da = dot(tl.trans(x), e, da, PREC)
        if NEED_DB:
            h = dot(x, a_t, tl.zeros([BLOCK_B2 * BLOCK_M, BLOCK_A1], tl.float32), PREC)
            h = tl.reshape(h.to(a_t.dtype), [BLOCK_B2, BLOCK_M * BLOCK_A1])
            db = dot(g, tl.trans(h), db, PREC)
    if NEED_DA:
        if DROPOUT:
            da *= keep_scale(threshold)
        a_col = tl.arange(0, BLOCK_A2)[:, None]
        partial = a_partials_ptr + tl.program_id(0).to(tl.int64) * (A1 * A2)
        tl.store(partial + a_row[None, :] * A2 + a_col, da, mask=(a_row[None, :] < A1) & (a_col < A2))
    if NEED_DB:
        if DROPOUT:
            db *= keep_scale(threshold)
        partial = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        partial = b_partials_ptr + partial * (B1 * B2)
        tl.store(partial + b_row * B2 + b_col, db, mask=(b_row < B1) & (b_col < B2))


@triton.jit
def reduce_factor(program, partials_ptr, out_ptr, count, size, factor, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = factor * the sum of partials [count, size] over its first axis, a block of it per program."""
    cols = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    # BLOCK_P partials are in flight at a time: one after the other, the sum would wait for memory at each.
    for p in range(0, count, BLOCK_P):
        partial = p + tl.arange(0, BLOCK_P)
        offsets = partial.to(tl.int64)[:, None] * size + cols[None, :]
        mask = (partial < count)[:, None] & (cols < size)[None, :]
        total += tl.sum(tl.load(partials_ptr + offsets, mask=mask, other=0.0), 0)
    tl.store(out_ptr + cols, (total * factor).to(out_ptr.dtype.element_ty), mask=cols < size)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def reduce_kernel(
    a_partials_ptr,
    a_ptr,
    b_partials_ptr,
    b_ptr,
    scale_ptr,
    scale,
    a_count,
    a_size,
    b_count,
    b_size,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dA and dB, either of which may be absent: scale * the sums of their partials. The first programs take dA's."""
    factor = control(scale_ptr, scale, tl.float32)
    program = tl.program_id(0)
    a_programs = tl.cdiv(a_size, BLOCK)
    if program < a_programs:
        if a_ptr is not None:
            reduce_factor(program, a_partials_ptr, a_ptr, a_count, a_size, factor, BLOCK_P, BLOCK)
    else:
        if b_ptr is not None:
            reduce_factor(program - a_programs, b_partials_ptr, b_ptr, b_count, b_size, factor, BLOCK_P, BLOCK)
