"""Products with structured matrices, forward and backward, as cyclic convolutions of rows by Triton kernels.

    y = add + scale * crop(C(kernel) pad(drop(x)))        C(c) the circulant matrix with first column c

A circulant matrix is the case without padding; a Toeplitz matrix is cut from a circulant one of `fft_plan.next_length`.
x is fp16, bf16 or fp32 with any strides, the kernel fp32. `scale` is a Python number or a 0-d tensor on the device, and
the dropout seed is a 0-d int64 tensor: no value of theirs synchronises or recompiles, and neither does the number of
rows. Rows are transformed in pairs: where one has an infinity or a NaN, its partner has NaNs too.

precision: "half" (fp16 operands, relative error about 5e-4) or "split" (pairs of fp16 operands, the accuracy of fp32).
By default half for bf16 results and split for others.
"""

import math
from functools import cache, partial

import torch

from . import structured_kernels as kernels
from .fft_plan import ConvolutionPlan, plan_convolution
from .launching import control, gpu_of
from .tiles import cdiv

BLOCK = 512  # elements of a program of the kernels over a single spectrum
BLOCK_S = 8  # partials that a program of the reduction reads at once


def convolve(
    x,
    kernel,
    n_out,
    *,
    add=None,
    scale=1.0,
    transposed=False,
    then=None,
    n_mid=None,
    threshold=0,
    seed=None,
    mask_output=False,
    out_dtype=None,
    precision=None,
    plan=None,
):
    """y [M, n_out] = add + scale * crop(C(kernel) pad(drop(x))) for x [M, n_in], kernel [L], L >= n_in, n_out.

    transposed: the transpose of C. then [L]: a second convolution, y = add + scale * crop(C(then) pad(z)) with z [M,
    n_mid] = crop(C(kernel) pad(drop(x))) kept on chip. mask_output: dropout of y, before `add`, instead of x.
    """
    (M, n_in), length = x.shape, kernel.shape[0]
    out_dtype = out_dtype or x.dtype
    if M == 0:
        return x.new_empty(M, n_out, dtype=out_dtype)
    precision = precision or _precision(out_dtype)
    n_mid = 0 if then is None else n_mid
    plan = plan or _plan(x, n_in, n_out, length, precision, n_mid=n_mid)
    if then is not None and not plan.chained:
        drop, keep = {"threshold": threshold, "seed": seed, "mask_output": mask_output}, {}
        first, second = (keep, drop) if mask_output else (drop, keep)
        z = convolve(x, kernel, n_mid, **first, out_dtype=torch.float32, precision=precision)
        return convolve(z, then, n_out, add=add, scale=scale, **second, out_dtype=out_dtype, precision=precision)
    y = x.new_empty(M, n_out, dtype=out_dtype)
    scale_ptr, scale = control(scale, 1.0)
    with torch.cuda.device_of(x):
        spectrum = _spectrum(kernel, plan, threshold, transposed)
        outer = None if then is None else _spectrum(then, plan, 0)
        kernels.convolve_kernel[(cdiv(M, 2 * plan.pairs), plan.blocks_out)](
            x, spectrum, outer, add, y, *_tables(plan, x.device),
            scale_ptr, seed, M, n_in, n_mid, n_out, scale, threshold,
            *x.stride(), *((0, 0) if add is None else add.stride()),
            N=plan.factors, P=plan.padded, Q=plan.tile, PAIRS=plan.pairs,
            IN=plan.rows_in, MID=plan.rows_mid, OUT=plan.rows_out, SPLIT=plan.split,
            DROP_INPUT=threshold > 0 and not mask_output, DROP_OUTPUT=threshold > 0 and mask_output,
            num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.maxnreg,
        )  # fmt: skip
    return y


def convolve_bwd(
    dy,
    x,
    kernel,
    n_in,
    *,
    scale=1.0,
    threshold=0,
    seed=None,
    need_dx=True,
    need_dk=True,
    dx_dtype=None,
    precision=None,
    plan=None,
):
    """(dx [M, n_in], dk [L] fp32) of y = scale * crop(C(kernel) pad(drop(x))) for dy [M, n_out]; None where not needed.

    dx is in dx_dtype, by default dy's. x may be None without dk. Both come from one pass over dy and x wherever that
    fits the registers. A dx in bf16 may be made from half operands where dk is from split ones. Equal inputs give equal
    bits.
    """
    M, n_out = dy.shape
    dx_dtype = dx_dtype or dy.dtype
    precision = precision or _precision(dx_dtype)
    dx = dk = None
    options = {"scale": scale, "threshold": threshold, "seed": seed}
    if need_dk and M:
        plan = plan or _plan(dy, n_in, n_out, kernel.shape[0], precision, backward=True)
        if need_dx and plan.fused:
            dx = dy.new_empty(M, n_in, dtype=dx_dtype)
        dk = _correlate(dy, x, kernel, n_in, dx, plan, **options)
    elif need_dk:
        dk = torch.zeros_like(kernel)
    if need_dx and dx is None:
        if precision == "split":
            precision = _precision(dx_dtype)
        dx = convolve(
            dy, kernel, n_in, transposed=True, mask_output=True, out_dtype=dx_dtype, precision=precision, **options
        )
    return dx, dk


def _correlate(dy, x, kernel, n_in, dx, plan, *, scale, threshold, seed):
    """dk [L], and dx where it is given."""
    (M, n_out), length = dy.shape, kernel.shape[0]
    tiles = cdiv(cdiv(M, 2 * plan.pairs), plan.programs)
    programs = cdiv(cdiv(M, 2 * plan.pairs), tiles)
    partials = dy.new_empty(programs, 2, plan.pairs * plan.points, dtype=torch.float32)
    scratch = dy.new_empty(programs, 2, plan.pairs * math.prod(plan.tile), dtype=torch.float32)
    frequencies = dy.new_empty(length, 2, dtype=torch.float32)
    scale_ptr, scale = control(scale, 1.0)
    with torch.cuda.device_of(dy):
        kernels.backward_kernel[(programs,)](
            dy, x, None if dx is None else _spectrum(kernel, plan, threshold, True), dx, partials, scratch,
            *_tables(plan, dy.device),
            scale_ptr, seed, M, n_out, n_in, scale, threshold, tiles, *dy.stride(), *x.stride(),
            N=plan.factors, P=plan.padded, Q=plan.tile, PAIRS=plan.pairs, OUT=plan.rows_out, IN=plan.rows_in,
            SPLIT=plan.split, DROPOUT=threshold > 0, NEED_DX=dx is not None,
            num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.maxnreg,
        )  # fmt: skip
        kernels.reduce_kernel[(cdiv(length, BLOCK),)](
            partials, frequencies, scale_ptr, programs, scale, threshold,
            N=plan.factors, P=plan.padded, Q=plan.tile, PAIRS=plan.pairs, BLOCK_S=BLOCK_S, BLOCK=BLOCK,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    # The transforms were unitary, so their products lack the factor L that the inverse divides by.
    return torch.fft.ifft(torch.view_as_complex(frequencies), norm="forward").real.contiguous()


def _spectrum(kernel, plan: ConvolutionPlan, threshold, transposed=False):
    """Spectrum of a convolution kernel in the order of a tile, and its magnitude; see spectrum_kernel."""
    spectrum = kernel.new_empty(2 * plan.points + 1)
    frequencies = torch.view_as_real(torch.fft.fft(kernel))
    kernels.spectrum_kernel[(cdiv(plan.points, BLOCK),)](
        frequencies, spectrum, threshold, SIGN=-1 if transposed else 1, N=plan.factors, P=plan.padded, Q=plan.tile,
        BLOCK=BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return spectrum


def _plan(x, n_in, n_out, length, precision, **kind) -> ConvolutionPlan:
    return plan_convolution(x.shape[0], n_in, n_out, length, precision, gpu=gpu_of(x.device), **kind)


def _precision(dtype: torch.dtype) -> str:
    return "half" if dtype == torch.bfloat16 else "split"


def _tables(plan: ConvolutionPlan, device):
    return _tables_of(plan.factors, plan.padded, plan.split, device)


@cache
def _tables_of(factors, padded, split, device):
    """(DFT matrices in fp16, twiddles in fp32) in the layout of structured_kernels.py."""
    count = partial(torch.arange, device="cpu")  # whatever the default device, on which it would be made too late
    squares = []
    for n, p in ((n, p) for n, p in zip(factors, padded, strict=True) if p >= 16):
        square = torch.zeros(2, p, p, dtype=torch.float64, device="cpu")
        square[:, :n, :n] = _roots(n, count(n)[:, None] * count(n))
        squares.append(square.flatten())
    exact = torch.cat(squares)
    high = exact.half()
    dft = torch.cat((high, (exact - high).half())) if split else high

    (n1, n2, n3), (p1, p2, p3) = factors, padded
    rest = count(p2)[:, None] * n3 + count(p3)
    first = _roots(n1 * n2 * n3, count(p1)[:, None, None] * rest) / math.sqrt(n1)
    second = _roots(n2 * n3, count(p2)[:, None] * count(p3)) / math.sqrt(n2)
    # Of a leading factor that is not padded.
    roots = _roots(n1, count(n1))
    return dft.to(device), torch.cat([part.flatten() for part in (first, second, roots)]).float().to(device)


def _roots(n, exponents):
    """[re, im] of exp(-2 pi i / n) to integer powers, reduced first so that the angle is exact."""
    angles = (exponents % n).double() * (-2 * math.pi / n)
    return torch.stack((angles.cos(), angles.sin()))
