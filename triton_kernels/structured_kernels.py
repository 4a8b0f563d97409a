"""Device code of cyclic convolutions of rows by tensor-core discrete Fourier transforms (DFTs).

A length has factors N = (N1, N2, N3), any of them 1, index (i1 N2 + i2) N3 + i3 and frequency k1 + N1 (k2 + N2 k3).
With W_n the DFT matrix of n points and w_n = exp(-2 pi i / n), the transform of a row is

    W_N1 over i1,  times w_{N1 N2 N3}^(k1 (i2 N3 + i3)),  W_N2 over i2,  times w_{N2 N3}^(k2 i3),  W_N3 over i3

and the inverse runs the conjugates backwards. Factors are padded to P = (P1, P2, P3), each 1 or a power of two of at
least 16, by zero rows and columns of W. Only a small N1, below 16 and in front of two others, stays as it is: its
product is a sum over rows on ordinary cores, which costs less than what padding it to 16 would.

Conventions of every kernel, beside those of lowrank_kernels.py:
- Rows 2p and 2p + 1 are the real and the imaginary part of pair p. Convolution kernels are real, so they stay apart.
- A tile holds PAIRS pairs: [leading digit, (pair, P2, P3)] as rows of the matrix, [P3, (P2, P1, pair)] as spectrum.
  Each digit in turn leads, for the product with its W from the left, so that the warps share out the columns and each
  holds all of W, which is small. A product from the right, or a W of 64 points, would be repeated by warps, or spill.
- A tile too large for the registers is transformed by bands of leading frequencies, of shape Q instead of P: only the
  first stage mixes them. Those of a small N1 come one by one.
- Between two products a state is rounded to its storage type: fp16 is one product of fp16 operands, fp32 is three of
  high and low fp16 halves, which keep the accuracy of fp32. bf16 has too few bits for either.
- Nothing overflows fp16. A power of two brings the norm of a row to GAIN..2 GAIN, and no stage enlarges the norm of a
  pair: the 1 / sqrt(N) of unitary transforms are in the twiddles and spectra (inside W they would make its low half
  subnormal), and spectra are brought below 1.
- The DFT matrices of padded factors are one tensor [high, low][W1, W2, W3][re, im][P, P]; twiddles, after which come
  the roots of a small N1, and spectra are [re, im] partials. A spectrum has its bands one after another.
"""

import triton
import triton.language as tl

from .lowrank_kernels import control, keep_scale

# These change from call to call; specialising on 1 or on divisibility would compile again.
VOLATILE = ["M", "scale", "threshold", "tiles", "programs"]
# 0-d tensors are often views into a table, at any offset.
UNALIGNED = ["scale_ptr", "seed_ptr"]

# The norm of a pair stays below sqrt(2) * 2 * GAIN, within fp16, and elements are far above its subnormal numbers.
GAIN = tl.constexpr(8192.0)


@triton.jit
def complex_dot(ar, ai, br, bi, re, im):
    """re + i im + (ar + i ai) (br + i bi)."""
    re = tl.dot(ar, br, re)
    im = tl.dot(ar, bi, im)
    return tl.dot(-ai, bi, re), tl.dot(ai, br, im)


@triton.jit
def low_half(z, high):
    return (z - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dft_matrix(
    dft_ptr, start, DIGIT: tl.constexpr, PART: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """(re, im) of a block of the W of a digit, conjugated for SIGN -1; PART 0 is the high half and 1 the low one."""
    FIRST: tl.constexpr = P[0] * P[0] if P[0] >= 16 else 0
    SECOND: tl.constexpr = P[1] * P[1] if P[1] >= 16 else 0
    SQUARES: tl.constexpr = (FIRST, SECOND, P[2] * P[2])
    BEFORE: tl.constexpr = 0 if DIGIT == 0 else (SQUARES[0] if DIGIT == 1 else SQUARES[0] + SQUARES[1])
    BEGIN: tl.constexpr = 2 * (PART * (SQUARES[0] + SQUARES[1] + SQUARES[2]) + BEFORE)
    offsets = start + tl.arange(0, ROWS)[:, None] * P[DIGIT] + tl.arange(0, COLS)[None, :]
    re = tl.load(dft_ptr + BEGIN + offsets)
    im = tl.load(dft_ptr + BEGIN + SQUARES[DIGIT] + offsets)
    if SIGN < 0:
        im = -im
    return re, im


@triton.jit
def dft(
    dft_ptr, start, re, im, sum_re, sum_im, DIGIT: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """sum + W z in fp32, with the block of W from `start` that has ROWS rows; the conjugate of W for SIGN -1."""
    COLS: tl.constexpr = re.shape[0]
    wr, wi = dft_matrix(dft_ptr, start, DIGIT, 0, P, ROWS, COLS, SIGN)
    if re.dtype == tl.float16:
        return complex_dot(wr, wi, re, im, sum_re, sum_im)
    else:
        re_high = re.to(tl.float16)
        im_high = im.to(tl.float16)
        sum_re, sum_im = complex_dot(wr, wi, low_half(re, re_high), low_half(im, im_high), sum_re, sum_im)
        low_wr, low_wi = dft_matrix(dft_ptr, start, DIGIT, 1, P, ROWS, COLS, SIGN)
        sum_re, sum_im = complex_dot(low_wr, low_wi, re_high, im_high, sum_re, sum_im)
        return complex_dot(wr, wi, re_high, im_high, sum_re, sum_im)


@triton.jit
def whole_dft(dft_ptr, re, im, DIGIT: tl.constexpr, P: tl.constexpr, SIGN: tl.constexpr):
    """W z in fp32 for all digits of a middle or last place."""
    ROWS: tl.constexpr = P[DIGIT]
    COLS: tl.constexpr = re.shape[1]
    zero = tl.zeros([ROWS, COLS], tl.float32)
    return dft(dft_ptr, 0, re, im, zero, zero, DIGIT, P, ROWS, SIGN)


@triton.jit
def times(re, im, factor_ptr, offsets, PLANE: tl.constexpr, SIGN: tl.constexpr):
    """z times the complex factors at the offsets, conjugated for SIGN -1."""
    fr = tl.load(factor_ptr + offsets)
    fi = tl.load(factor_ptr + PLANE + offsets)
    if SIGN < 0:
        fi = -fi
    return re * fr - im * fi, re * fi + im * fr


@triton.jit
def leading_roots(twiddle_ptr, exponents, P: tl.constexpr):
    """(re, im) of the powers of exp(-2 pi i / N1) of a small N1."""
    roots_ptr = twiddle_ptr + 2 * P[1] * P[2] * (P[0] + 1)
    exponents = exponents % P[0]
    return tl.load(roots_ptr + exponents), tl.load(roots_ptr + P[0] + exponents)


@triton.jit
def middle_first(z, Q: tl.constexpr):
    """[Q1, (pair, Q2, Q3)] to [Q2, (Q1, pair, Q3)]."""
    OUTER: tl.constexpr = z.shape[0] * z.shape[1] // (Q[1] * Q[2])
    return tl.reshape(tl.permute(tl.reshape(z, (OUTER, Q[1], Q[2])), (1, 0, 2)), (Q[1], OUTER * Q[2]))


@triton.jit
def leading_first(z, Q: tl.constexpr):
    """[Q2, (Q1, pair, Q3)] to [Q1, (pair, Q2, Q3)]."""
    OUTER: tl.constexpr = z.shape[0] * z.shape[1] // (Q[1] * Q[2])
    return tl.reshape(tl.permute(tl.reshape(z, (Q[1], OUTER, Q[2])), (1, 0, 2)), (Q[0], OUTER * Q[1] * Q[2] // Q[0]))


@triton.jit
def last_first(z, Q: tl.constexpr):
    """[.., Q3], however its rows are split, to [Q3, ..]."""
    return tl.trans(tl.reshape(z, (z.shape[0] * z.shape[1] // Q[2], Q[2])))


@triton.jit
def last_back(z, ROWS: tl.constexpr):
    """[Q3, ..] to [ROWS, (.., Q3)]."""
    return tl.reshape(tl.trans(z), (ROWS, z.shape[0] * z.shape[1] // ROWS))


@triton.jit
def transform(re, im, dft_ptr, twiddle_ptr, P: tl.constexpr, PAIRS: tl.constexpr):
    """All frequencies [P3, (P2, P1, pair)], sqrt(N3) times unitary, of a state [leading rows, (pair, P2, P3)]; fp32."""
    STATE: tl.constexpr = re.dtype
    if P[0] > 1:
        ROWS: tl.constexpr = P[0]
        zero = tl.zeros([ROWS, PAIRS * P[1] * P[2]], tl.float32)
        lead_re, lead_im = dft(dft_ptr, 0, re, im, zero, zero, 0, P, ROWS, 1)
        return trailing(lead_re, lead_im, 0, dft_ptr, twiddle_ptr, STATE, P, P, PAIRS)
    else:
        return trailing(re, im, 0, dft_ptr, twiddle_ptr, STATE, P, P, PAIRS)


@triton.jit
def trailing(
    lead_re, lead_im, band, dft_ptr, twiddle_ptr, STATE: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """What a transform does to a band after the product of the leading digit [Q1, (pair, Q2, Q3)]."""
    if P[0] > 1:
        k1 = band * Q[0] + tl.arange(0, Q[0])[:, None]
        rest = tl.arange(0, PAIRS * Q[1] * Q[2])[None, :] % (Q[1] * Q[2])
        lead_re, lead_im = times(lead_re, lead_im, twiddle_ptr, k1 * (P[1] * P[2]) + rest, P[0] * P[1] * P[2], 1)
    re = lead_re.to(STATE)
    im = lead_im.to(STATE)
    if P[1] > 1:
        k2 = tl.arange(0, Q[1])[:, None]
        i3 = tl.arange(0, Q[0] * PAIRS * Q[2])[None, :] % Q[2]
        wide_re, wide_im = whole_dft(dft_ptr, middle_first(re, Q), middle_first(im, Q), 1, P, 1)
        second_ptr = twiddle_ptr + 2 * P[0] * P[1] * P[2]
        wide_re, wide_im = times(wide_re, wide_im, second_ptr, k2 * P[2] + i3, P[1] * P[2], 1)
        re = wide_re.to(STATE)
        im = wide_im.to(STATE)
    return whole_dft(dft_ptr, last_first(re, Q), last_first(im, Q), 2, P, 1)


@triton.jit
def inverse(
    re, im, sum_re, sum_im, band, start, dft_ptr, twiddle_ptr,
    P: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """sum + what a band [Q3, (Q2, Q1, pair)] adds to the inverse transform, sqrt(N3) times unitary, in the leading rows
    [rows of the sum, (pair, Q2, Q3)] from `start`. Twiddles meet the layout that a product
    leaves, so that it is the narrow state that changes layout.
    """
    STATE: tl.constexpr = re.dtype
    wide_re, wide_im = whole_dft(dft_ptr, re, im, 2, P, -1)
    place = tl.arange(0, Q[1] * Q[0] * PAIRS)[None, :]
    i3 = tl.arange(0, Q[2])[:, None]
    if P[1] > 1:
        k2 = place // (Q[0] * PAIRS)
        second_ptr = twiddle_ptr + 2 * P[0] * P[1] * P[2]
        wide_re, wide_im = times(wide_re, wide_im, second_ptr, k2 * P[2] + i3, P[1] * P[2], -1)
        re = last_back(wide_re.to(STATE), Q[1])
        im = last_back(wide_im.to(STATE), Q[1])
        wide_re, wide_im = whole_dft(dft_ptr, re, im, 1, P, -1)
        place = tl.arange(0, Q[0] * PAIRS * Q[2])[None, :]
        k1 = band * Q[0] + place // (PAIRS * Q[2])
        rest = tl.arange(0, Q[1])[:, None] * P[2] + place % Q[2]
    else:
        k1 = band * Q[0] + place // PAIRS
        rest = i3
    if P[0] > 1:
        wide_re, wide_im = times(wide_re, wide_im, twiddle_ptr, k1 * (P[1] * P[2]) + rest, P[0] * P[1] * P[2], -1)
    if P[1] > 1:
        re = leading_first(wide_re.to(STATE), Q)
        im = leading_first(wide_im.to(STATE), Q)
    elif P[0] > 1:
        re = last_back(wide_re.to(STATE), Q[0])
        im = last_back(wide_im.to(STATE), Q[0])
    if P[0] == 1:
        return sum_re + last_back(wide_re, 1), sum_im + last_back(wide_im, 1)
    elif P[0] < 16:
        root_re, root_im = leading_roots(twiddle_ptr, (start + tl.arange(0, sum_re.shape[0])[:, None]) * band, P)
        re = re.to(tl.float32)
        im = im.to(tl.float32)
        return sum_re + (re * root_re + im * root_im), sum_im + (im * root_re - re * root_im)
    else:
        return dft(dft_ptr, start * P[0] + band * Q[0], re, im, sum_re, sum_im, 0, P, sum_re.shape[0], -1)


@triton.jit
def frequencies(band, Q: tl.constexpr, PAIRS: tl.constexpr):
    """(offset in a partial [bands, Q3, Q2, Q1] of a spectrum, pair) of every element of a band [Q3, (Q2, Q1, pair)]."""
    place = tl.arange(0, Q[1] * Q[0] * PAIRS)[None, :]
    last = band * Q[2] + tl.arange(0, Q[2])[:, None]
    return last * (Q[1] * Q[0]) + place // PAIRS, place % PAIRS


@triton.jit
def digits(point, P: tl.constexpr, Q: tl.constexpr):
    """(k1, k2, k3) at an offset in a partial of a spectrum."""
    band = point // (Q[0] * P[1] * P[2])
    return band * Q[0] + point % Q[0], point // Q[0] % P[1], point // (Q[0] * P[1]) % P[2]


@triton.jit
def positions(start, LEAD: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr):
    """(pair, column, column is not padding) of every STEP-th place of a tile whose leading rows begin at `start`."""
    place = tl.arange(0, PAIRS * Q[1] * Q[2] // STEP)[None, :] * STEP
    i2 = place // Q[2] % Q[1]
    i3 = place % Q[2]
    column = (start + tl.arange(0, LEAD)[:, None]) * (N[1] * N[2]) + i2 * N[2] + i3
    return place // (Q[1] * Q[2]), column, (i2 < N[1]) & (i3 < N[2])


@triton.jit
def load_rows(
    ptr, tile, M, n, stride_m, stride_n, start, HALF: tl.constexpr,
    LEAD: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The first (HALF 0) or second rows of the pairs of a tile, zero past the ends of the matrix [M, n]."""
    pair, column, inside = positions(start, LEAD, N, Q, PAIRS, 1)
    rows = 2 * (tile * PAIRS + pair) + HALF
    offsets = rows.to(tl.int64) * stride_m + column.to(tl.int64) * stride_n
    return tl.load(ptr + offsets, mask=inside & (column < n) & (rows < M), other=0.0).to(tl.float32)


@triton.jit
def keep_mask(
    seed_ptr, tile, threshold, start, HALF: tl.constexpr,
    LEAD: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Which elements of what `load_rows` loads the dropout convention keeps."""
    # A call of the generator serves eight columns if a group of them never crosses a row of the tile.
    STEP: tl.constexpr = 8 if N[2] % 8 == 0 else 1
    pair, column, _ = positions(start, LEAD, N, Q, PAIRS, STEP)
    rows = 2 * (tile * PAIRS + pair) + HALF
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), column // 8, rows, 0, 0, n_rounds=7)
    if STEP == 8:
        # As in philox.py: two joins order the words, the third puts the low half of a word before its high half.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (LEAD, PAIRS * Q[1] * Q[2]))
    else:
        word = tl.where(column % 8 < 4, tl.where(column % 4 < 2, w0, w1), tl.where(column % 4 < 2, w2, w3))
        draws = tl.where(column % 2 == 0, word & 0xFFFF, word >> 16)
    return draws.to(tl.int32) >= threshold


@triton.jit
def power_of_two(exponent):
    """2**exponent for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log2_floor(x):
    """floor(log2(x)) of positive normal numbers."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def exponents(rows, PAIRS: tl.constexpr):
    """[PAIRS] floor(log2) of the norm of each row of a tile, between -110 and 117. By the norm and not by the largest
    element: errors are a share of the norm of a pair, and a row with an outlier must not drown in its partner's.
    """
    REST: tl.constexpr = rows.shape[1] // PAIRS
    largest = tl.max(tl.reshape(tl.max(tl.abs(rows), 0), (PAIRS, REST)), 1)
    exponent = tl.minimum(tl.maximum(log2_floor(largest), -110), 110)
    rows *= by_place(power_of_two(-exponent), REST)
    squares = tl.sum(tl.reshape(tl.sum(rows * rows, 0), (PAIRS, REST)), 1)
    return exponent + tl.maximum(log2_floor(squares) >> 1, 0)


@triton.jit
def by_place(values, REST: tl.constexpr):
    """[PAIRS] to [1, (pair, REST)]."""
    PAIRS: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (PAIRS, REST)), (1, PAIRS * REST))


@triton.jit
def normalising(exponent):
    """[PAIRS] factors that bring rows of these exponents to norms of GAIN..2 GAIN."""
    return power_of_two(-exponent) * GAIN


@triton.jit
def shrunk(factor, exponent):
    """Factors divided by 2**exponent, which is not negative; by 2**126 at most. What this makes 0 is less than the
    rounding of the row that is not shrunk.
    """
    return factor * power_of_two(tl.maximum(-exponent, -126))


@triton.jit
def normalised(rows, factor, SPLIT: tl.constexpr):
    """The rows times the factor of their pair, as a state."""
    REST: tl.constexpr = rows.shape[1] // factor.shape[0]
    return (rows * by_place(factor, REST)).to(tl.float32 if SPLIT else tl.float16)


@triton.jit
def add_band(
    re, im, sum_re, sum_im, spectrum_ptr, band, start, dft_ptr, twiddle_ptr, STATE: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """sum + what a band of a transform, times the spectrum of a kernel, adds to the rows: see `inverse`."""
    offsets, _ = frequencies(band, Q, PAIRS)
    re, im = times(re, im, spectrum_ptr, offsets, P[0] * P[1] * P[2], 1)
    return inverse(re.to(STATE), im.to(STATE), sum_re, sum_im, band, start, dft_ptr, twiddle_ptr, P, Q, PAIRS)


@triton.jit
def magnitude(spectrum_ptr, P: tl.constexpr):
    """What a spectrum was divided by, times the factor of dropout."""
    return tl.load(spectrum_ptr + 2 * P[0] * P[1] * P[2])


@triton.jit
def store_rows(
    values, factor, add_ptr, y_ptr, seed_ptr, tile, M, n, threshold, stride_am, stride_an, start, DROP: tl.constexpr,
    HALF: tl.constexpr, LEAD: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """y [M, n] = add + drop(factor * values) in the first or second rows of the pairs; the factor is one of a pair."""
    y = values * by_place(factor, Q[1] * Q[2])
    if DROP:
        y = tl.where(keep_mask(seed_ptr, tile, threshold, start, HALF, LEAD, N, Q, PAIRS), y, 0.0)
    pair, column, inside = positions(start, LEAD, N, Q, PAIRS, 1)
    rows = (2 * (tile * PAIRS + pair) + HALF).to(tl.int64)
    mask = inside & (column < n) & (rows < M)
    if add_ptr is not None:
        add = add_ptr + rows * stride_am + column.to(tl.int64) * stride_an
        y += tl.load(add, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * n + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def transform_rows(
    ptr, seed_ptr, tile, M, n, threshold, stride_m, stride_n, re_factor, im_factor,
    band, dft_ptr, twiddle_ptr, DROP: tl.constexpr, LEAD: tl.constexpr, SPLIT: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A band of the transform of the rows of a tile in memory, in fp32; where there are several bands, also of a few
    leading rows at a time.
    """
    STATE: tl.constexpr = tl.float32 if SPLIT else tl.float16
    BLOCK: tl.constexpr = LEAD if Q[0] == P[0] else Q[0]
    ROWS: tl.constexpr = Q[0]
    SMALL: tl.constexpr = (P[0] > 1) & (P[0] < 16)
    lead_re = tl.zeros([ROWS, PAIRS * Q[1] * Q[2]], tl.float32)
    lead_im = tl.zeros([ROWS, PAIRS * Q[1] * Q[2]], tl.float32)
    # As a loop of unknown length it also keeps the mask in the layout in which it is cheap to draw.
    for start in tl.range(0, tl.cdiv(n, N[1] * N[2]), BLOCK, disable_licm=True):
        re = load_rows(ptr, tile, M, n, stride_m, stride_n, start, 0, BLOCK, N, Q, PAIRS)
        im = load_rows(ptr, tile, M, n, stride_m, stride_n, start, 1, BLOCK, N, Q, PAIRS)
        if DROP:
            re = tl.where(keep_mask(seed_ptr, tile, threshold, start, 0, BLOCK, N, Q, PAIRS), re, 0.0)
            im = tl.where(keep_mask(seed_ptr, tile, threshold, start, 1, BLOCK, N, Q, PAIRS), im, 0.0)
        re = normalised(re, re_factor, SPLIT or SMALL)
        im = normalised(im, im_factor, SPLIT or SMALL)
        if SMALL:
            root_re, root_im = leading_roots(twiddle_ptr, band * start, P)
            lead_re += re * root_re - im * root_im
            lead_im += re * root_im + im * root_re
        elif P[0] > 1:
            lead_re, lead_im = dft(dft_ptr, band * ROWS * P[0] + start, re, im, lead_re, lead_im, 0, P, ROWS, 1)
        else:
            lead_re = re.to(tl.float32)
            lead_im = im.to(tl.float32)
    return trailing(lead_re, lead_im, band, dft_ptr, twiddle_ptr, STATE, P, Q, PAIRS)


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def convolve_kernel(
    x_ptr,
    spectrum_ptr,
    then_ptr,
    add_ptr,
    y_ptr,
    dft_ptr,
    twiddle_ptr,
    scale_ptr,
    seed_ptr,
    M,
    n_in,
    n_mid,
    n_out,
    scale,
    threshold,
    stride_xm,
    stride_xk,
    stride_am,
    stride_an,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PAIRS: tl.constexpr,
    IN: tl.constexpr,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    DROP_INPUT: tl.constexpr,
    DROP_OUTPUT: tl.constexpr,
):
    """y [M, n_out] = add + scale * crop(then * crop(kernel * pad(x))), by rows; `then` may be missing.

    IN, MID and OUT are how many leading rows hold n_in, n_mid and n_out columns: the products skip the rest. Programs
    along axis 1 share the rows of n_out where OUT is less. A conjugate spectrum makes the transposed matrix. Dropout is
    that of x or, for the gradient of a dropped x, that of y.
    """
    tile = tl.program_id(0)
    start = tl.program_id(1) * OUT
    re_exponent = exponents(load_rows(x_ptr, tile, M, n_in, stride_xm, stride_xk, 0, 0, IN, N, Q, PAIRS), PAIRS)
    im_exponent = exponents(load_rows(x_ptr, tile, M, n_in, stride_xm, stride_xk, 0, 1, IN, N, Q, PAIRS), PAIRS)
    STATE: tl.constexpr = tl.float32 if SPLIT else tl.float16
    FIRST: tl.constexpr = OUT if then_ptr is None else MID
    first_start = start if then_ptr is None else 0
    sum_re = tl.zeros([FIRST, PAIRS * Q[1] * Q[2]], tl.float32)
    sum_im = tl.zeros([FIRST, PAIRS * Q[1] * Q[2]], tl.float32)
    for band in tl.range(0, P[0] // Q[0], disable_licm=True):
        re, im = transform_rows(
            x_ptr, seed_ptr, tile, M, n_in, threshold, stride_xm, stride_xk,
            normalising(re_exponent), normalising(im_exponent),
            band, dft_ptr, twiddle_ptr, DROP_INPUT, IN, SPLIT, N, P, Q, PAIRS,
        )  # fmt: skip
        sum_re, sum_im = add_band(
            re, im, sum_re, sum_im, spectrum_ptr, band, first_start, dft_ptr, twiddle_ptr, STATE, P, Q, PAIRS
        )
    if then_ptr is not None:
        _, column, inside = positions(0, MID, N, Q, PAIRS, 1)
        sum_re = tl.where(inside & (column < n_mid), sum_re, 0.0)
        sum_im = tl.where(inside & (column < n_mid), sum_im, 0.0)
        re_exponent_mid = exponents(sum_re, PAIRS)
        im_exponent_mid = exponents(sum_im, PAIRS)
        re = normalised(sum_re, normalising(re_exponent_mid), SPLIT)
        im = normalised(sum_im, normalising(im_exponent_mid), SPLIT)
        re, im = transform(re, im, dft_ptr, twiddle_ptr, P, PAIRS)
        sum_re = tl.zeros([OUT, PAIRS * Q[1] * Q[2]], tl.float32)
        sum_im = tl.zeros([OUT, PAIRS * Q[1] * Q[2]], tl.float32)
        sum_re, sum_im = add_band(re, im, sum_re, sum_im, then_ptr, 0, start, dft_ptr, twiddle_ptr, STATE, P, Q, PAIRS)
    factor = control(scale_ptr, scale, tl.float32) * magnitude(spectrum_ptr, P) / GAIN
    re_factor = factor * power_of_two(re_exponent)
    im_factor = factor * power_of_two(im_exponent)
    if then_ptr is not None:
        outer = magnitude(then_ptr, P) / GAIN
        re_factor *= outer * power_of_two(re_exponent_mid)
        im_factor *= outer * power_of_two(im_exponent_mid)
    store_rows(
        sum_re, re_factor, add_ptr, y_ptr, seed_ptr, tile, M, n_out, threshold, stride_am, stride_an, start,
        DROP_OUTPUT, 0, OUT, N, Q, PAIRS,
    )  # fmt: skip
    store_rows(
        sum_im, im_factor, add_ptr, y_ptr, seed_ptr, tile, M, n_out, threshold, stride_am, stride_an, start,
        DROP_OUTPUT, 1, OUT, N, Q, PAIRS,
    )  # fmt: skip


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    dy_ptr,
    x_ptr,
    spectrum_ptr,
    dx_ptr,
    partials_ptr,
    scratch_ptr,
    dft_ptr,
    twiddle_ptr,
    scale_ptr,
    seed_ptr,
    M,
    n_out,
    n_in,
    scale,
    threshold,
    tiles,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
):
    """partials [programs, (re, im), bands, Q3, (Q2, Q1, pair)] = sum over a program's tiles of conj(DFT(drop(x)))
    DFT(dy), and dx [M, n_in] = drop(scale * crop(kernel^T * pad(dy))) if NEED_DX, from one pass over dy and x.

    The imaginary part of the inverse transform of such a sum is the correlation of one row of a pair with the other:
    it is dropped at the very end.
    """
    program = tl.program_id(0)
    PLANE: tl.constexpr = P[0] * P[1] * P[2] * PAIRS
    BAND: tl.constexpr = Q[0] * Q[1] * Q[2] * PAIRS
    COLS: tl.constexpr = Q[1] * Q[0] * PAIRS
    scratch_ptr += program.to(tl.int64) * (2 * BAND)
    partials_ptr += program.to(tl.int64) * (2 * PLANE)
    first = program * tiles
    for tile in tl.range(first, first + tiles, disable_licm=True):
        y_re_exponent = exponents(
            load_rows(dy_ptr, tile, M, n_out, stride_ym, stride_yn, 0, 0, OUT, N, Q, PAIRS), PAIRS
        )
        y_im_exponent = exponents(
            load_rows(dy_ptr, tile, M, n_out, stride_ym, stride_yn, 0, 1, OUT, N, Q, PAIRS), PAIRS
        )
        x_re_exponent = exponents(load_rows(x_ptr, tile, M, n_in, stride_xm, stride_xk, 0, 0, IN, N, Q, PAIRS), PAIRS)
        x_im_exponent = exponents(load_rows(x_ptr, tile, M, n_in, stride_xm, stride_xk, 0, 1, IN, N, Q, PAIRS), PAIRS)
        # All rows of a tile are summed with one weight, that of the largest product of magnitudes; the others shrink.
        both_re = x_re_exponent + y_re_exponent
        both_im = x_im_exponent + y_im_exponent
        largest = tl.max(tl.maximum(both_re, both_im), 0)
        # Each transform is sqrt(N3) times unitary.
        weight = power_of_two(largest // 2) * power_of_two(largest - largest // 2) / (GAIN * GAIN * N[2])
        if NEED_DX:
            dx_re = tl.zeros([IN, PAIRS * Q[1] * Q[2]], tl.float32)
            dx_im = tl.zeros([IN, PAIRS * Q[1] * Q[2]], tl.float32)
        for band in tl.range(0, P[0] // Q[0], disable_licm=True):
            re, im = transform_rows(
                x_ptr, seed_ptr, tile, M, n_in, threshold, stride_xm, stride_xk,
                shrunk(normalising(x_re_exponent), largest - both_re),
                shrunk(normalising(x_im_exponent), largest - both_im),
                band, dft_ptr, twiddle_ptr, DROPOUT, IN, SPLIT, N, P, Q, PAIRS,
            )  # fmt: skip
            # Memory that stays in the cache holds one spectrum and the sums: registers would spill.
            tl.debug_barrier()  # until all threads have read the band before
            place = tl.arange(0, Q[2])[:, None] * COLS + tl.arange(0, COLS)[None, :]
            tl.store(scratch_ptr + place, re * weight)
            tl.store(scratch_ptr + BAND + place, im * weight)

            re, im = transform_rows(
                dy_ptr, seed_ptr, tile, M, n_out, threshold, stride_ym, stride_yn,
                normalising(y_re_exponent), normalising(y_im_exponent),
                band, dft_ptr, twiddle_ptr, False, OUT, SPLIT, N, P, Q, PAIRS,
            )  # fmt: skip
            offsets, pair = frequencies(band, Q, PAIRS)
            sum_re_ptr = partials_ptr + offsets * PAIRS + pair
            sum_im_ptr = sum_re_ptr + PLANE
            tl.debug_barrier()  # until all threads have written
            x_re = tl.load(scratch_ptr + place)
            x_im = tl.load(scratch_ptr + BAND + place)
            begun = (offsets >= 0) & (tile > first)
            sum_re = tl.load(sum_re_ptr, mask=begun, other=0.0)
            sum_im = tl.load(sum_im_ptr, mask=begun, other=0.0)
            tl.store(sum_re_ptr, sum_re + (x_re * re + x_im * im))
            tl.store(sum_im_ptr, sum_im + (x_re * im - x_im * re))
            if NEED_DX:
                # Rows in bf16 have fewer digits than half operands. With three factors the compiler would spill.
                SPLIT_DX: tl.constexpr = SPLIT and (P[1] > 1 or dx_ptr.dtype.element_ty != tl.bfloat16)
                STATE: tl.constexpr = tl.float32 if SPLIT_DX else tl.float16
                dx_re, dx_im = add_band(
                    re, im, dx_re, dx_im, spectrum_ptr, band, 0, dft_ptr, twiddle_ptr, STATE, P, Q, PAIRS
                )
        if NEED_DX:
            factor = control(scale_ptr, scale, tl.float32) * magnitude(spectrum_ptr, P) / GAIN
            store_rows(
                dx_re, factor * power_of_two(y_re_exponent), None, dx_ptr, seed_ptr, tile, M, n_in, threshold, 0, 0, 0,
                DROPOUT, 0, IN, N, Q, PAIRS,
            )  # fmt: skip
            store_rows(
                dx_im, factor * power_of_two(y_im_exponent), None, dx_ptr, seed_ptr, tile, M, n_in, threshold, 0, 0, 0,
                DROPOUT, 1, IN, N, Q, PAIRS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def spectrum_kernel(
    frequencies_ptr, spectrum_ptr, threshold, SIGN: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Frequencies [N1 N2 N3, (re, im)] to partials [re, im][bands, Q3, Q2, Q1] divided by N3 and by a power of two
    above the largest of them; conjugated for SIGN -1. Padding is zero. The partials are followed by `magnitude`, which
    has the factor of dropout because the kernels that drop have no register left for it.
    """
    LENGTH: tl.constexpr = N[0] * N[1] * N[2]
    POINTS: tl.constexpr = P[0] * P[1] * P[2]
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, 2 * LENGTH, BLOCK):
        parts = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(frequencies_ptr + parts, mask=parts < 2 * LENGTH, other=0.0)))
    # Two above, so that the modulus is below 1 where both parts are the largest.
    exponent = tl.minimum(tl.maximum(log2_floor(tl.max(largest, 0)), -110), 110) + 2
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k1, k2, k3 = digits(point, P, Q)
    k = k1 + N[0] * (k2 + N[1] * k3)
    inside = (k1 < N[0]) & (k2 < N[1]) & (k3 < N[2]) & (point < POINTS)
    factor = power_of_two(-exponent) / N[2]
    tl.store(
        spectrum_ptr + point, tl.load(frequencies_ptr + 2 * k, mask=inside, other=0.0) * factor, mask=point < POINTS
    )
    im = tl.load(frequencies_ptr + 2 * k + 1, mask=inside, other=0.0) * (SIGN * factor)
    tl.store(spectrum_ptr + POINTS + point, im, mask=point < POINTS)
    tl.store(spectrum_ptr + 2 * POINTS, power_of_two(exponent) * keep_scale(threshold))


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=UNALIGNED)
def reduce_kernel(
    partials_ptr,
    frequencies_ptr,
    scale_ptr,
    programs,
    scale,
    threshold,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Frequencies [N1 N2 N3, (re, im)] = scale * sum over programs and pairs of the partials of backward_kernel."""
    LENGTH: tl.constexpr = N[0] * N[1] * N[2]
    POINTS: tl.constexpr = P[0] * P[1] * P[2]
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k1 = k % N[0]
    k2 = k // N[0] % N[1]
    k3 = k // (N[0] * N[1])
    element = (((k1 // Q[0] * P[2] + k3) * P[1] + k2) * Q[0] + k1 % Q[0]) * PAIRS
    sum_re = tl.zeros([BLOCK], tl.float32)
    sum_im = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs * PAIRS, BLOCK_S):
        term = start + tl.arange(0, BLOCK_S)
        offsets = (term // PAIRS).to(tl.int64)[:, None] * (2 * PAIRS * POINTS)
        offsets += (term % PAIRS)[:, None] + element[None, :]
        mask = (term < programs * PAIRS)[:, None] & (k < LENGTH)[None, :]
        sum_re += tl.sum(tl.load(partials_ptr + offsets, mask=mask, other=0.0), 0)
        sum_im += tl.sum(tl.load(partials_ptr + PAIRS * POINTS + offsets, mask=mask, other=0.0), 0)
    factor = control(scale_ptr, scale, tl.float32) * keep_scale(threshold)
    tl.store(frequencies_ptr + 2 * k, sum_re * factor, mask=k < LENGTH)
    tl.store(frequencies_ptr + 2 * k + 1, sum_im * factor, mask=k < LENGTH)
