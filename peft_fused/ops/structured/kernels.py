"""Structured maps on the Triton kernels: all but the Kronecker map are cyclic convolutions of one padded length."""

from functools import reduce

import torch

from . import maps
from .plan import CONVOLUTIONS, fft_lengths


def _kernels(kind, p, q):
    """[(kernels of one term's convolutions, in order)]; fp32."""
    p, q = p.float(), None if q is None else q.float()
    length = fft_lengths(kind, maps.sizes_of(kind, p.shape, None if q is None else q.shape)).triton
    if kind in CONVOLUTIONS:
        return [(maps.kernel(kind, p, q, length).contiguous(),)]
    if kind == "toeplitz_product":
        return [tuple(maps.kernel("toeplitz", t, t[1:], length) for t in (p, q))]
    return [
        (maps.kernel("skew_circulant", h, None, length), maps.kernel("circulant", g, None, length).contiguous())
        for g, h in zip(p, q, strict=True)
    ]


def _reversed(kernel):
    """The kernel of the transposed cyclic convolution."""
    return kernel.flip(0).roll(1)


def forward(x2, p, q, add2, *, kind, n, scale, threshold, seed, transposed) -> torch.Tensor:
    """y [m, n] in x2's type."""
    from ...triton_kernels import kronecker, structured

    if kind == "kronecker":
        A, B = (p.t(), q.t()) if transposed else (p, q)
        return kronecker.kronecker_fwd(x2, A, B, add=add2, scale=scale, threshold=threshold, seed=seed)
    terms = _kernels(kind, p, q)
    drops = dict(threshold=threshold, seed=seed)
    if kind in CONVOLUTIONS:
        return structured.convolve(x2, terms[0][0], n, add=add2, scale=scale, transposed=transposed, **drops)
    for index, (first, last) in enumerate(terms):
        if transposed:
            first, last = _reversed(last), _reversed(first)
        # What is added up stays in fp32 until the last term: one rounding, as if it were one product.
        dtype = x2.dtype if index + 1 == len(terms) else torch.float32
        add2 = structured.convolve(
            x2, first, n, add=add2, scale=scale, then=last, n_mid=n, out_dtype=dtype, **drops
        )  # fmt: skip
    return add2


def backward(dy2, x2, p, q, *, kind, k, scale, threshold, seed, needs):
    """Gradients (dx, dp, dq) of the map that is not transposed, None where not needed."""
    from ...triton_kernels import kronecker, structured

    need_x, need_p, need_q = needs
    drops = dict(threshold=threshold, seed=seed)
    if kind == "kronecker":
        names = frozenset(name for name, need in zip(("x", "A", "B"), needs, strict=True) if need)
        grads = kronecker.kronecker_bwd(dy2, x2, p, q, scale=scale, needs=names, **drops)
        return [grads.get(name) for name in ("x", "A", "B")]
    need_dk = need_p or need_q
    # An fp32 gradient of a vector keeps its digits, whatever the type of the activations.
    precision = "split" if need_dk and p.dtype == torch.float32 else None
    wide = [None if t is None else t.float() for t in (p, q)]
    terms = _kernels(kind, p, q)
    if kind in CONVOLUTIONS:
        dx, dk = structured.convolve_bwd(
            dy2, x2, terms[0][0], k, scale=scale, need_dx=need_x, need_dk=need_dk, precision=precision, **drops
        )  # fmt: skip
        dp, dq = maps.fold(kind, dk, *wide) if need_dk else (None, None)
    else:
        found = [_product_backward(structured, dy2, x2, term, k, scale, drops, need_x, need_dk) for term in terms]
        dx = reduce(torch.add, [dx for dx, _ in found]).to(dy2.dtype) if need_x else None
        dp, dq = maps.fold_terms(kind, [dks for _, dks in found], *wide) if need_dk else (None, None)
    return dx, dp.to(p.dtype) if need_p else None, dq.to(q.dtype) if need_q else None


def _product_backward(structured, dy2, x2, term, k, scale, drops, need_dx, need_dk):
    """(dx in fp32, (dk of the first, dk of the last)) of a product of two, its intermediate recomputed in fp32."""
    first, last = term
    fp32 = dict(dx_dtype=torch.float32, precision="split")
    inner = structured.convolve(x2, first, dy2.shape[1], out_dtype=torch.float32, **drops) if need_dk else None
    dinner, dlast = structured.convolve_bwd(dy2, inner, last, dy2.shape[1], scale=scale, need_dk=need_dk, **fp32)
    dx, dfirst = structured.convolve_bwd(dinner, x2, first, k, need_dx=need_dx, need_dk=need_dk, **fp32, **drops)
    return dx, (dfirst, dlast)
